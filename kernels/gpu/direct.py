"""The pairwise sweep for k <= 8: differences on the CUDA cores, every pair exact.

    D_ij = v_i - side v_j,  side = sign c_ij (1 where only c = 1 is ill-conditioned)
    G_i += -side F' D_ij,  axial_i += side F'

In few dimensions many pairs are close, and a difference of k <= 8 columns costs less than a product
padded to 16. Unit rows are pairs of float32, v = head + tail, so a difference of close rows keeps
its digits: head_i - head_j is exact there, and the tails supply the rest. Units are true ones.
"""

import triton
import triton.language as tl

from .pair_function import PairConstants, exact_terms
from .plan import Plan, Slots, Tiles, load_item
from .project_normalize import UnitRows


@triton.jit
def load_columns(hi_ptr, lo_ptr, rows, packed_rows, K: tl.constexpr):
    """Heads and tails of some unit rows, two tuples of K vectors."""
    heads = ()
    tails = ()
    offs = rows
    for _column in tl.static_range(K):
        heads = heads + (tl.load(hi_ptr + offs),)
        tails = tails + (tl.load(lo_ptr + offs),)
        # no product of 32-bit numbers: K * packed_rows may need more
        offs += packed_rows
    return heads, tails


@triton.jit
def add_tile(
    energy,
    axial,
    force,
    heads,
    tails,
    deficit_m,
    col_heads,
    col_tails,
    deficit_n,
    mask,
    s,
    min_distance,
    value_at_min,
    slope_at_min,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    ANGLE: tl.constexpr,
    WITH_FORCE: tl.constexpr,
    MASKED: tl.constexpr,
    K: tl.constexpr,
    FAST: tl.constexpr,
):
    """Running sums of a row tile plus one column tile; all but `force` and `mask` as [M] or [N]."""
    if HALF or ANGLE:
        c = heads[0][:, None] * col_heads[0][None, :]
        for column in tl.static_range(1, K):
            c += heads[column][:, None] * col_heads[column][None, :]
        side = tl.where(c < 0.0, -1.0, 1.0)
    else:
        side = 1.0
    m2 = deficit_m[:, None] + deficit_n[None, :]
    difference = ()
    for column in tl.static_range(K):
        d = heads[column][:, None] - col_heads[column][None, :] * side
        d += tails[column][:, None] - col_tails[column][None, :] * side
        m2 += d * d
        difference = difference + (d,)
    if HALF or ANGLE:
        r2 = tl.where(side > 0.0, m2, 4.0 - m2)
    else:
        r2 = m2
    q2 = 4.0 - m2
    if HALF or ANGLE:
        q2 = tl.where(side > 0.0, q2, m2)
    slope, value = exact_terms(
        r2, q2, s, min_distance, value_at_min, slope_at_min, KIND, HALF, ANGLE, FAST
    )
    if MASKED:
        slope = tl.where(mask, slope, 0.0)
        value = tl.where(mask, value, 0.0)
    energy += value
    moved = force
    if WITH_FORCE:
        slope = slope * side
        axial += slope
        moved = ()
        for column in tl.static_range(K):
            moved = moved + (force[column] - slope * difference[column],)
    return energy, axial, moved


@triton.jit
def direct_kernel(
    hi_ptr,
    lo_ptr,
    deficit_ptr,
    items_ptr,
    force_ptr,
    energy_ptr,
    axial_ptr,
    packed_rows,
    s,
    min_distance,
    value_at_min,
    slope_at_min,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    ANGLE: tl.constexpr,
    WITH_FORCE: tl.constexpr,
    UPPER: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FAST: tl.constexpr,
):
    """Grid (items,). hi, lo [K, packed]. Per slot and row: force [K], energy, axial."""
    row0, tile_begin, tile_end, end_row, slot, _ = load_item(items_ptr, tl.program_id(0))
    offs_m = row0.to(tl.int64) + tl.arange(0, BLOCK_M)
    heads, tails = load_columns(hi_ptr, lo_ptr, offs_m, packed_rows, K)
    deficit_m = tl.load(deficit_ptr + offs_m)

    # sums stay [BLOCK_M, BLOCK_N] until the end: a reduction in the loop would cost shuffles
    energy = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    axial = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    force = ()
    for _column in tl.static_range(K):
        force = force + (tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),)

    # clean and dirty tiles as in `pairwise`
    diagonal_begin = tl.minimum(tl.maximum(row0 // BLOCK_N, tile_begin), tile_end)
    diagonal_end = tl.minimum(tl.maximum((row0 + BLOCK_M) // BLOCK_N, tile_begin), tile_end)
    ragged_begin = tl.maximum(tl.minimum(end_row // BLOCK_N, tile_end), diagonal_end)
    num_diagonal = diagonal_end - diagonal_begin
    num_clean = diagonal_begin - tile_begin + ragged_begin - diagonal_end
    num_dirty = num_diagonal + tile_end - ragged_begin
    for step in tl.range(0, num_dirty):
        tile = tl.where(
            step < num_diagonal, diagonal_begin + step, ragged_begin + step - num_diagonal
        )
        offs_n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        col_heads, col_tails = load_columns(hi_ptr, lo_ptr, offs_n, packed_rows, K)
        deficit_n = tl.load(deficit_ptr + offs_n)
        mask = offs_n[None, :] < end_row
        if UPPER:
            mask = mask & (offs_n[None, :] > offs_m[:, None])
        else:
            mask = mask & (offs_n[None, :] != offs_m[:, None])
        energy, axial, force = add_tile(
            energy,
            axial,
            force,
            heads,
            tails,
            deficit_m,
            col_heads,
            col_tails,
            deficit_n,
            mask,
            s,
            min_distance,
            value_at_min,
            slope_at_min,
            KIND,
            HALF,
            ANGLE,
            WITH_FORCE,
            True,
            K,
            FAST,
        )
    for step in tl.range(0, num_clean):
        tile = tile_begin + step
        tile = tl.where(tile >= diagonal_begin, tile + num_diagonal, tile)
        offs_n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        col_heads, col_tails = load_columns(hi_ptr, lo_ptr, offs_n, packed_rows, K)
        deficit_n = tl.load(deficit_ptr + offs_n)
        energy, axial, force = add_tile(
            energy,
            axial,
            force,
            heads,
            tails,
            deficit_m,
            col_heads,
            col_tails,
            deficit_n,
            True,
            s,
            min_distance,
            value_at_min,
            slope_at_min,
            KIND,
            HALF,
            ANGLE,
            WITH_FORCE,
            False,
            K,
            FAST,
        )

    out = slot.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(energy_ptr + out, tl.sum(energy, axis=1))
    if WITH_FORCE:
        tl.store(axial_ptr + out, tl.sum(axial, axis=1))
        for column in tl.static_range(K):
            tl.store(force_ptr + out * K + column, tl.sum(force[column], axis=1))


def direct(
    rows: UnitRows,
    plan: Plan,
    tiles: Tiles,
    pair: PairConstants,
    with_force: bool,
    fast: bool,
) -> Slots:
    """Energies, forces and axial sums of all work items, in true units."""
    k, packed_rows = rows.hi.shape
    slots = Slots(plan.num_items, tiles.block_m, k, with_force, rows.hi.device)
    direct_kernel[(plan.num_items,)](
        rows.hi,
        rows.lo,
        rows.deficit,
        plan.items,
        slots.force,
        slots.energy,
        slots.axial,
        packed_rows,
        pair.s,
        pair.min_distance,
        pair.value_at_min,
        pair.slope_at_min,
        KIND=pair.kind,
        HALF=pair.half_space,
        ANGLE=pair.angular,
        WITH_FORCE=with_force,
        UPPER=not with_force,
        K=k,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        FAST=fast,
        num_warps=tiles.num_warps,
    )
    return slots
