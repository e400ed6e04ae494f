"""The pairwise sweep for k <= 8: differences on the CUDA cores, every pair exact.

    D_ij = v_i - side v_j,  side = sign c_ij (1 where only c = 1 is ill-conditioned)
    G_i += -side F' D_ij,  axial_i += side F' deficit_i

In few dimensions many pairs are close, and a difference of k <= 8 columns costs less than a product
padded to 16. Unit rows are pairs of float32, v = head + tail, so a difference of close rows keeps
its digits: head_i - head_j is exact there, and the tails supply the rest. What 48 bits do not tell
apart coincides. Units are true ones, but for the range (`PairConstants`).

The sum of F' D points along v_i, sqrt(N) times longer than what the tangent projection leaves of
it. So float32 sums are short, their totals float64, and a slot holds G without its part along v_i:
that counts only by the deficit, like `axial`, to which it is added.
"""

import triton
import triton.language as tl

from .pair_function import COINCIDENT, PairConstants, exact_terms
from .plan import Plan, Slots, Tiles, column_tile, load_item, split_tiles
from .project_normalize import UnitRows

# column tiles in a float32 sum
TILES_PER_SUM: tl.constexpr = tl.constexpr(32)


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
    value_bits,
    factor,
    min_distance,
    value_at_min,
    slope_at_min,
    push_at_min,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    ANGLE: tl.constexpr,
    WITH_FORCE: tl.constexpr,
    FAST: tl.constexpr,
    MASKED: tl.constexpr,
    K: tl.constexpr,
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
    m2 = tl.where(m2 <= COINCIDENT, 0.0, m2)
    if HALF or ANGLE:
        r2 = tl.where(side > 0.0, m2, 4.0 - m2)
    else:
        r2 = m2
    q2 = 4.0 - m2
    if HALF or ANGLE:
        q2 = tl.where(side > 0.0, q2, m2)
    slope, value = exact_terms(
        r2,
        q2,
        s,
        value_bits,
        factor,
        min_distance,
        value_at_min,
        slope_at_min,
        push_at_min,
        KIND,
        HALF,
        ANGLE,
        FAST,
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
def zero_sums(K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Energy, axial and force of no column tile."""
    energy = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    axial = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    force = ()
    for _column in tl.static_range(K):
        force = force + (tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),)
    return energy, axial, force


@triton.jit
def add_sums(totals, energy, axial, force, WITH_FORCE: tl.constexpr, K: tl.constexpr):
    """Totals of the rows, float64, plus running sums."""
    total_energy, total_axial, total_force = totals
    total_energy += tl.sum(energy, axis=1).to(tl.float64)
    moved = total_force
    if WITH_FORCE:
        total_axial += tl.sum(axial, axis=1).to(tl.float64)
        moved = ()
        for column in tl.static_range(K):
            moved = moved + (total_force[column] + tl.sum(force[column], axis=1).to(tl.float64),)
    return total_energy, total_axial, moved


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
    value_unit,
    s,
    value_bits,
    factor,
    min_distance,
    value_at_min,
    slope_at_min,
    push_at_min,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    ANGLE: tl.constexpr,
    WITH_FORCE: tl.constexpr,
    FAST: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (items,). hi, lo [K, packed]. Per slot and row: force [K], energy, axial."""
    row0, tile_begin, tile_end, end_row, slot, _ = load_item(items_ptr, tl.program_id(0))
    offs_m = row0.to(tl.int64) + tl.arange(0, BLOCK_M)
    heads, tails = load_columns(hi_ptr, lo_ptr, offs_m, packed_rows, K)
    deficit_m = tl.load(deficit_ptr + offs_m)

    no_force = ()
    for _column in tl.static_range(K):
        no_force = no_force + (tl.zeros((BLOCK_M,), dtype=tl.float64),)
    nothing = tl.zeros((BLOCK_M,), dtype=tl.float64)
    totals = (nothing, nothing, no_force)
    # sums stay [BLOCK_M, BLOCK_N] in the loops: a reduction there would cost shuffles
    energy, axial, force = zero_sums(K, BLOCK_M, BLOCK_N)
    split = split_tiles(row0, tile_begin, tile_end, end_row, BLOCK_M, BLOCK_N)
    num_clean, num_dirty = split[0], split[1]
    for step in tl.range(0, num_dirty):
        tile = column_tile(split, step, True)
        offs_n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        col_heads, col_tails = load_columns(hi_ptr, lo_ptr, offs_n, packed_rows, K)
        deficit_n = tl.load(deficit_ptr + offs_n)
        mask = offs_n[None, :] < end_row
        if WITH_FORCE:
            mask = mask & (offs_n[None, :] != offs_m[:, None])
        else:
            mask = mask & (offs_n[None, :] > offs_m[:, None])
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
            value_bits,
            factor,
            min_distance,
            value_at_min,
            slope_at_min,
            push_at_min,
            KIND,
            HALF,
            ANGLE,
            WITH_FORCE,
            FAST,
            True,
            K,
        )
    totals = add_sums(totals, energy, axial, force, WITH_FORCE, K)
    for begin in range(0, num_clean, TILES_PER_SUM):
        energy, axial, force = zero_sums(K, BLOCK_M, BLOCK_N)
        for step in tl.range(begin, tl.minimum(begin + TILES_PER_SUM, num_clean)):
            tile = column_tile(split, step, False)
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
                value_bits,
                factor,
                min_distance,
                value_at_min,
                slope_at_min,
                push_at_min,
                KIND,
                HALF,
                ANGLE,
                WITH_FORCE,
                FAST,
                False,
                K,
            )
        totals = add_sums(totals, energy, axial, force, WITH_FORCE, K)

    total_energy, total_axial, total_force = totals
    out = slot.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(energy_ptr + out, (total_energy * value_unit).to(tl.float32))
    if WITH_FORCE:
        along = nothing
        for column in tl.static_range(K):
            along += total_force[column] * heads[column].to(tl.float64)
        tl.store(axial_ptr + out, ((total_axial + along) * deficit_m).to(tl.float32))
        for column in tl.static_range(K):
            tangent = total_force[column] - along * heads[column].to(tl.float64)
            tl.store(force_ptr + out * K + column, tangent.to(tl.float32))


def direct(
    rows: UnitRows,
    plan: Plan,
    tiles: Tiles,
    pair: PairConstants,
    with_force: bool,
    fast: bool,
) -> Slots:
    """Energies, forces and axial sums of all work items, true ones in units of the range."""
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
        pair.value_unit,
        *pair.exact,
        **pair.branches(with_force, fast),
        K=k,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
    )
    return slots
