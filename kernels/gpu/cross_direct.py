"""Rows against columns of at most 8 coordinates: differences on the CUDA cores, as in `direct`."""

import triton
import triton.language as tl

from .direct import TILES_PER_SUM, add_sums, add_tile, load_tile, store_totals, zero_sums
from .pair_terms import PairConstants
from .plan import Plan, Slots, Tiles, load_item
from .sides import Side, load_ids, met_pairs


@triton.jit
def cross_direct_kernel(
    m,
    n,
    items_ptr,
    slots,
    packed_rows,
    packed_columns,
    value_unit,
    pair,
    WITH_FORCE: tl.constexpr,
    WITH_IDS: tl.constexpr,
    WITH_WEIGHTS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (items,). hi, lo [K, packed]. Per slot and row: force [K], energy, axial."""
    row0, tile_begin, tile_end, end_column, slot, end_row = load_item(items_ptr, tl.program_id(0))
    offs_m = row0.to(tl.int64) + tl.arange(0, BLOCK_M)
    row_tile = load_tile(m.rows, offs_m, packed_rows, K)
    row_ids = load_ids(m, offs_m, end_row, WITH_IDS)

    no_force = ()
    for _column in tl.static_range(K):
        no_force = no_force + (tl.zeros((BLOCK_M,), dtype=tl.float64),)
    nothing = tl.zeros((BLOCK_M,), dtype=tl.float64)
    totals = (nothing, nothing, no_force)
    num_tiles = tile_end - tile_begin
    for begin in range(0, num_tiles, TILES_PER_SUM):
        sums = zero_sums(K, BLOCK_M, BLOCK_N)
        for step in tl.range(begin, tl.minimum(begin + TILES_PER_SUM, num_tiles)):
            offs_n = (tile_begin + step).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            column_ids = load_ids(n, offs_n, end_column, WITH_IDS)
            mask = met_pairs(row_ids, column_ids, offs_n, end_column, WITH_IDS)
            weights = 1.0
            if WITH_WEIGHTS:
                weights = tl.load(n.weights + offs_n, mask=offs_n < end_column, other=0.0)[None, :]
            columns = load_tile(n.rows, offs_n, packed_columns, K)
            sums = add_tile(sums, row_tile, columns, mask, pair, WITH_FORCE, True, K, weights)
        totals = add_sums(totals, sums, WITH_FORCE, K)

    store_totals(totals, row_tile, slots, slot, value_unit, WITH_FORCE, K, BLOCK_M)


def cross_direct(
    m: Side,
    n: Side,
    plan: Plan,
    tiles: Tiles,
    pair: PairConstants,
    *,
    with_force: bool,
    with_ids: bool,
    with_weights: bool,
) -> Slots:
    """Energies, forces and axial sums of all work items, true ones in units of the range."""
    k, packed_rows = m.rows.hi.shape
    slots = Slots.empty(plan.num_items, tiles.block_m, k, with_force, m.points.device)
    cross_direct_kernel[(plan.num_items,)](
        m,
        n,
        plan.items,
        slots,
        packed_rows,
        n.rows.hi.shape[1],
        pair.value_unit,
        pair.float32_arguments,
        WITH_FORCE=with_force,
        WITH_IDS=with_ids,
        WITH_WEIGHTS=with_weights,
        K=k,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
    )
    return slots
