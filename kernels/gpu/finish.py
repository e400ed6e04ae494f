"""From the slots of the work items to energies and gradients, every sum in a fixed order.

    E_set = scale sum_i E_i        (half space: the antipodal pairs sum_i f(-|v_i|^2) come in here)
    dE/dp_i = scale / nu_i (G_i - v_i <v_i, G_i> + axial_i v_i)

One program a row tile for the gradient, one a set for its energy.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pair_terms import PairConstants, exact_side
from .plan import Plan, Slots, load_row_tile
from .project_normalize import UnitRows

TOTAL_BLOCK = 256


class Units(NamedTuple):
    """What turns raw sums of pairs, and the exact terms of antipodal pairs, into true ones."""

    energy: float
    force: float
    axial: float
    antipode_energy: float
    antipode_force: float


@triton.jit
def store_gradient(
    gradient, sums, axial, force_unit, factor, k, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Store factor (G - v <v, G> + axial v) of a row tile, G the sum of its slots.

    gradient: points and gradient, first entry of each row, which rows count, 1/nu; sums: forces of
    all slots, first slot of each row, number of slots and width of one.
    """
    points_ptr, gradient_ptr, sources, mask_m, inv_nu = gradient
    force_ptr, first, num_slots, slot_width = sums
    offs_k = tl.arange(0, BLOCK_K)
    along = tl.zeros((BLOCK_M,), dtype=tl.float64)
    for k0 in range(0, k, BLOCK_K):
        mask = mask_m[:, None] & (k0 + offs_k < k)[None, :]
        p = tl.load(points_ptr + sources[:, None] + (k0 + offs_k)[None, :], mask=mask, other=0)
        v = p.to(tl.float64) * inv_nu[:, None]
        for slot in range(0, num_slots):
            offs = (first + slot * BLOCK_M)[:, None] * slot_width + (k0 + offs_k)[None, :]
            g = tl.load(force_ptr + offs, mask=mask, other=0.0).to(tl.float64)
            along += tl.sum(g * v, axis=1)
    outward = axial - along * force_unit
    for k0 in range(0, k, BLOCK_K):
        mask = mask_m[:, None] & (k0 + offs_k < k)[None, :]
        p = tl.load(points_ptr + sources[:, None] + (k0 + offs_k)[None, :], mask=mask, other=0)
        v = p.to(tl.float64) * inv_nu[:, None]
        force = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float64)
        for slot in range(0, num_slots):
            offs = (first + slot * BLOCK_M)[:, None] * slot_width + (k0 + offs_k)[None, :]
            force += tl.load(force_ptr + offs, mask=mask, other=0.0).to(tl.float64)
        result = (force * force_unit + outward[:, None] * v) * factor[:, None]
        tl.store(
            gradient_ptr + sources[:, None] + (k0 + offs_k)[None, :],
            result.to(tl.float32),
            mask=mask,
        )


@triton.jit
def finish_kernel(
    points_ptr,
    tiles_ptr,
    rows,
    slots,
    scale_ptr,
    gradient_ptr,
    tile_energy_ptr,
    k,
    slot_width,
    units,
    pair,
    WITH_FORCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (row tiles,). Gradient [T, k] f32 and the unscaled energy of the tile's rows, f64."""
    tile = tl.program_id(0)
    row0, source0, valid, slot0, num_slots, set_index = load_row_tile(tiles_ptr, tile)
    lane = tl.arange(0, BLOCK_M)
    mask_m = lane < valid
    first = slot0.to(tl.int64) * BLOCK_M + lane
    deficit = tl.load(rows.deficit + row0.to(tl.int64) + lane).to(tl.float64)

    energy = tl.zeros((BLOCK_M,), dtype=tl.float64)
    for slot in range(0, num_slots):
        energy += tl.load(slots.energy + first + slot * BLOCK_M).to(tl.float64)
    energy = energy * units.energy
    antipodal_slope = tl.zeros((BLOCK_M,), dtype=tl.float64)
    if pair.half_space:
        # c = -|v|^2: 4 - r^2 = 2 + 2c is twice the deficit
        antipodal_slope, value = exact_side(4.0 - 2.0 * deficit, 2.0 * deficit, pair)
        energy += value * units.antipode_energy
    tl.store(tile_energy_ptr + tile, tl.sum(tl.where(mask_m, energy, 0.0), axis=0))

    if WITH_FORCE:
        scale = tl.load(scale_ptr + set_index)
        inv_nu = tl.load(rows.inv_nu + row0.to(tl.int64) + lane)
        sources = (source0.to(tl.int64) + lane) * k
        axial = tl.zeros((BLOCK_M,), dtype=tl.float64)
        for slot in range(0, num_slots):
            axial += tl.load(slots.axial + first + slot * BLOCK_M).to(tl.float64)
        axial = axial * units.axial
        if pair.half_space:
            axial -= 2.0 * antipodal_slope * deficit * units.antipode_force

        gradient = (points_ptr, gradient_ptr, sources, mask_m, inv_nu)
        sums = (slots.force, first, num_slots, slot_width)
        store_gradient(gradient, sums, axial, units.force, inv_nu * scale, k, BLOCK_M, BLOCK_K)


@triton.jit
def total_kernel(
    tile_energy_ptr, set_tiles_ptr, scale_ptr, offset_ptr, energy_ptr, BLOCK: tl.constexpr
):
    """Grid (sets,). energy[set] = scale * sum of its tiles + offset, f32."""
    index = tl.program_id(0)
    begin = tl.load(set_tiles_ptr + index)
    end = tl.load(set_tiles_ptr + index + 1)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for tile in range(begin, end, BLOCK):
        offs = tile + tl.arange(0, BLOCK)
        total += tl.load(tile_energy_ptr + offs, mask=offs < end, other=0.0)
    scaled = tl.sum(total, axis=0) * tl.load(scale_ptr + index) + tl.load(offset_ptr + index)
    tl.store(energy_ptr + index, scaled.to(tl.float32))


def finish(
    points: Tensor,
    rows: UnitRows,
    slots: Slots,
    plan: Plan,
    block_m: int,
    pair: PairConstants,
    units: Units,
    set_constants: tuple[Tensor, Tensor],
    with_force: bool,
) -> tuple[Tensor, Tensor | None]:
    """Energy [B] and gradient [T, k] (or None), both float32.

    Args:
        points, rows, plan, block_m, pair: as for the sweep.
        slots: force, energy and axial of the work items.
        units: of what the slots hold.
        set_constants: factor and offset of each set's energy, float64.
        with_force: whether there are forces.
    """
    k = points.shape[1]
    scale, offset = set_constants
    tile_energy = torch.empty(plan.num_row_tiles, dtype=torch.float64, device=points.device)
    gradient = torch.empty(
        points.shape if with_force else (0, k), dtype=torch.float32, device=points.device
    )
    energy = torch.empty(scale.numel(), dtype=torch.float32, device=points.device)
    finish_kernel[(plan.num_row_tiles,)](
        points,
        plan.row_tiles,
        rows,
        slots,
        scale,
        gradient,
        tile_energy,
        k,
        slots.force.shape[1],
        units,
        pair.arguments,
        WITH_FORCE=with_force,
        BLOCK_M=block_m,
        BLOCK_K=min(2048 // block_m, triton.next_power_of_2(k)),
    )
    total_kernel[(scale.numel(),)](
        tile_energy, plan.set_tiles, scale, offset, energy, BLOCK=TOTAL_BLOCK
    )
    return energy, gradient if with_force else None
