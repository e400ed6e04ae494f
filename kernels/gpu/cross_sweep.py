"""The sweep of a cross set on a GPU: normalize both sides, then one launch for each to own.

rows against columns     E_i, and the gradient in the rows
columns against rows     the gradient in the columns, where it is wanted
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sweep import SweepRequest, SweepResult
from . import backend
from .cross import cross
from .cross_direct import cross_direct
from .finish import Units, store_gradient
from .pair_function import pair_constants
from .pair_terms import SMALL_SET, UNIT_SCALE, PairConstants
from .plan import (
    MAX_DIRECT,
    MAX_WIDTH,
    MAX_WITH_REST,
    Plan,
    Slots,
    Tiles,
    hold,
    load_row_tile,
    tiles_for,
)
from .sides import Side, cross_plan, make_side, padded_width
from .splits import multiprocessors, splits_of_columns


@triton.jit
def cross_finish_kernel(
    m,
    tiles_ptr,
    slots,
    gradient_ptr,
    energy_ptr,
    k,
    slot_width,
    units,
    scale,
    WITH_ENERGY: tl.constexpr,
    WITH_FORCE: tl.constexpr,
    WITH_WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (row tiles,). E_i [N] f64, and the gradient [N, k] f32, weighted by the row's weight."""
    row0, _, valid, slot0, num_slots, _ = load_row_tile(tiles_ptr, tl.program_id(0))
    lane = tl.arange(0, BLOCK_M)
    mask_m = lane < valid
    offs_m = row0.to(tl.int64) + lane
    first = slot0.to(tl.int64) * BLOCK_M + lane
    if WITH_ENERGY:
        energy = tl.zeros((BLOCK_M,), dtype=tl.float64)
        for slot in range(0, num_slots):
            energy += tl.load(slots.energy + first + slot * BLOCK_M).to(tl.float64)
        tl.store(energy_ptr + offs_m, energy * units.energy, mask=mask_m)
    if WITH_FORCE:
        axial = tl.zeros((BLOCK_M,), dtype=tl.float64)
        for slot in range(0, num_slots):
            axial += tl.load(slots.axial + first + slot * BLOCK_M).to(tl.float64)
        inv_nu = tl.load(m.rows.inv_nu + offs_m)
        factor = inv_nu * scale
        if WITH_WEIGHTS:
            factor = factor * tl.load(m.weights + offs_m, mask=mask_m, other=0.0)
        store_gradient(
            (m.points, gradient_ptr, offs_m * k, mask_m, inv_nu),
            (slots.force, first, num_slots, slot_width),
            axial * units.axial,
            units.force,
            factor,
            k,
            BLOCK_M,
            BLOCK_K,
        )


# above MAX_WIDTH columns: a product in parts needs more threads to hold its registers
_BLACKWELL = Tiles(64, 32, 8, 1, programs=1)
WIDE_TILES = {"sm_90": Tiles(128, 32, 8, 1, programs=1), "sm_100": _BLACKWELL, "sm_103": _BLACKWELL}


def wide_tiles(target: str) -> Tiles:
    """Launch shape above MAX_WIDTH columns, found by compiling."""
    tiles = WIDE_TILES.get(target) or tiles_for(target, MAX_WIDTH, 0, False)
    # several loads of a tile, each fetched ahead, would not fit into shared memory
    return replace(tiles, num_stages=1)


@dataclass(frozen=True)
class CrossCall:
    """What shapes and settings decide about one sweep of a cross set."""

    num_rows: int
    num_columns: int
    k: int
    pair: PairConstants
    wanted: tuple[bool, bool]  # gradients, in the rows and in the columns
    with_ids: bool
    with_weights: bool
    device: torch.device
    precision: str

    @property
    def is_direct(self) -> bool:
        return self.k <= MAX_DIRECT

    @property
    def with_rest(self) -> bool:
        return MAX_DIRECT < self.k <= MAX_WITH_REST and self.precision == "highest"

    @cached_property
    def tiles(self) -> Tiles:
        if (forced := backend.FORCED_TILES.get()) is not None:
            return forced
        target = backend.target_of(self.device)
        if self.k > MAX_WIDTH:
            return wide_tiles(target)
        largest = max(self.num_rows, self.num_columns)
        # ids and weights take registers, as angles do
        many_registers = self.pair.angle or self.with_ids or self.with_weights
        return tiles_for(target, self.k, largest, many_registers)

    def plan(self, num_rows: int, num_columns: int, with_force: bool) -> Plan:
        """Tables of so many rows against columns, with as many work items as fill a GPU."""
        halves = 8 if self.is_direct else 6 if self.with_rest else 4
        row_bytes = halves * (self.k if self.is_direct else padded_width(self.k)) + 12
        splits = splits_of_columns(
            num_rows,
            num_columns,
            self.tiles,
            self.k,
            row_bytes,
            with_force,
            multiprocessors(self.device),
        )
        return cross_plan(num_rows, num_columns, self.tiles, splits, self.device)

    def side(
        self, points: Tensor, plan: Plan, eps: float, ids: Tensor | None, weights: Tensor | None
    ) -> Side:
        """Normalize the rows or the columns of the call."""
        layout = {"columns": self.is_direct, "with_rest": self.with_rest}
        return make_side(points, plan, self.tiles.block_m, eps, ids, weights, **layout)

    def pairs(self, m: Side, n: Side, plan: Plan, with_force: bool, with_weights: bool) -> Slots:
        """Sum over the columns n for the rows m, forces by the weights of the columns."""
        flags = {
            "with_force": with_force,
            "with_ids": self.with_ids,
            "with_weights": with_weights,
        }
        if self.is_direct:
            return cross_direct(m, n, plan, self.tiles, self.pair, **flags)
        cosine, force = backend.TERMS[self.precision]
        terms = cosine + self.with_rest, force
        return cross(m, n, self.k, plan, self.tiles, self.pair, terms, **flags)

    @cached_property
    def units(self) -> Units:
        """What turns the slots into true sums."""
        pair, energy_unit, force_unit, scale = self.pair, 1.0, 1.0, 1.0
        if not self.is_direct:
            energy_unit, force_unit, scale = pair.energy_unit, pair.force_unit, UNIT_SCALE.value
        in_slots = pair.arguments.range_unit
        force = force_unit / scale / in_slots
        return Units(energy_unit / in_slots, force, force_unit / in_slots, 0.0, 0.0)

    def finish(
        self,
        m: Side,
        slots: Slots,
        plan: Plan,
        scale: float,
        energy: Tensor | None,
        *,
        with_force: bool,
        weighted: bool,
    ) -> Tensor | None:
        """Fill `energy` [N] with the E_i of the rows, and return the gradient in them."""
        num_rows, k = m.points.shape
        block_m = self.tiles.block_m
        gradient = m.points.new_empty(num_rows * with_force, k, dtype=torch.float32)
        cross_finish_kernel[(plan.num_row_tiles,)](
            m,
            plan.row_tiles,
            slots,
            gradient,
            slots.energy if energy is None else energy,
            k,
            slots.force.shape[1],
            self.units,
            scale,
            WITH_ENERGY=energy is not None,
            WITH_FORCE=with_force,
            WITH_WEIGHTS=weighted,
            BLOCK_M=block_m,
            BLOCK_K=min(2048 // block_m, triton.next_power_of_2(k)),
        )
        return gradient if with_force else None


def make_call(request: SweepRequest, columns: Tensor) -> CrossCall:
    """Make a call under the settings of now."""
    num_rows, k = request.points.shape
    device = columns.device
    pair = pair_constants(
        request.pair,
        backend.has_fast_functions(device),
        small_sets=max(num_rows, len(columns)) <= SMALL_SET,
        many_columns=k > MAX_WIDTH,
    )
    return CrossCall(
        num_rows,
        len(columns),
        k,
        pair,
        request.wanted,
        request.row_ids is not None,
        request.row_weights is not None,
        device,
        torch.get_float32_matmul_precision(),
    )


def sweep(request: SweepRequest) -> SweepResult:
    """Energy [1], gradients [N, k] and [M, k], and row energies [N], float32, of a cross set."""
    rows, columns = request.points, request.columns
    assert columns is not None
    backend.check(rows)
    backend.check(columns, "columns")
    (num_rows, k), num_columns = rows.shape, len(columns)
    if not k or not num_rows or not num_columns:
        return _sweep_nothing(request, columns)
    rows, columns = rows.contiguous(), columns.contiguous()
    weights = request.row_weights
    (scale,) = request.scales
    call = make_call(request, columns)
    with backend.on_device(call.device):
        of_rows, of_columns = call.wanted
        plan = call.plan(num_rows, num_columns, of_rows)
        back = call.plan(num_columns, num_rows, of_columns)
        m = call.side(rows, plan, request.eps, request.row_ids, weights)
        n = call.side(columns, back, request.eps, request.column_ids, None)
        each = torch.empty(num_rows, dtype=torch.float64, device=call.device)
        slots = call.pairs(m, n, plan, of_rows, False)
        flags = {"with_force": of_rows, "weighted": call.with_weights}
        gradient = call.finish(m, slots, plan, scale, each, **flags)
        energy = ((each if weights is None else each * weights).sum() * scale).float().view(1)
        columns_gradient = None
        if of_columns:
            del slots
            largest = None
            if weights is not None:
                # at most 1, they leave F' in the range of fp16
                largest = weights.abs().amax()
                largest = torch.where(largest > 0, largest, 1.0)
                m = m._replace(weights=weights.float() / largest)
            slots = call.pairs(n, m, back, True, call.with_weights)
            flags = {"with_force": True, "weighted": False}
            columns_gradient = call.finish(n, slots, back, scale, None, **flags)
            if columns_gradient is not None and largest is not None:
                columns_gradient.mul_(largest)
        hold([plan.items, plan.row_tiles, back.items, back.row_tiles])
    return SweepResult(
        energy, gradient, columns_gradient, each.float() if request.row_energies else None
    )


def _sweep_nothing(request: SweepRequest, columns: Tensor) -> SweepResult:
    """Sweep rows without columns to meet, or rows and columns without coordinates: dead ones."""
    rows = request.points
    if len(rows) and len(columns):
        ones = [x.new_zeros(len(x), 1) for x in (rows, columns)]
        result = sweep(replace(request, source=ones[0], columns=ones[1]))
        gradient, columns_gradient = (x if x is None else x[:, :0] for x in result[1:3])
        return SweepResult(result.energy, gradient, columns_gradient, result.row_energies)
    zeros = torch.zeros_like(rows, dtype=torch.float32)
    return SweepResult(
        zeros.new_zeros(1),
        zeros if request.wanted[0] else None,
        torch.zeros_like(columns, dtype=torch.float32) if request.wanted[1] else None,
        zeros.new_zeros(len(rows)) if request.row_energies else None,
    )
