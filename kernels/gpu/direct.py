"""The pairwise sweep for k <= 8: differences on the CUDA cores, every pair exact.

    D_ij = v_i - side v_j,  side = sign c_ij (1 where only c = 1 is ill-conditioned)
    G_i += -side F' D_ij,  axial_i += side F' deficit_i

In few dimensions many pairs are near, and a difference of k <= 8 columns costs less than a product
padded to 16. Unit rows are pairs of float32, v = head + tail, so a difference of near rows keeps
its digits: head_i - head_j is exact there, and the tails supply the rest. Rows that 48 bits do not
tell apart count as coincident. Units are true ones, but for the range (`PairConstants`).

The sum of F' D is nearly parallel to v_i, and sqrt(N) times longer than the part across v_i, which
is the gradient. So float32 sums are kept short and totaled in float64, and a slot holds only the
part across. The part along v_i acts through the deficit alone, as `axial` does, and is added to it.
"""

import triton
import triton.language as tl

from .pair_terms import COINCIDENT, PairConstants, exact_terms
from .plan import Plan, Slots, Tiles, column_tile, load_item, split_tiles
from .project_normalize import UnitRows

# column tiles in a float32 sum
TILES_PER_SUM: tl.constexpr = tl.constexpr(32)


@triton.jit
def load_tile(rows, offs, packed_rows, K: tl.constexpr):
    """Heads and tails of some unit rows, two tuples of K vectors, and their deficits."""
    deficit = tl.load(rows.deficit + offs)
    heads = ()
    tails = ()
    for _column in tl.static_range(K):
        heads = heads + (tl.load(rows.hi + offs),)
        tails = tails + (tl.load(rows.lo + offs),)
        # no product of 32-bit numbers: K * packed_rows may need more
        offs += packed_rows
    return heads, tails, deficit


@triton.jit
def add_tile(
    sums,
    row_tile,
    columns,
    mask,
    pair,
    WITH_FORCE: tl.constexpr,
    MASKED: tl.constexpr,
    K: tl.constexpr,
    weights=1.0,
):
    """Add one column tile to the running sums of a row tile.

    Tiles are heads, tails and deficits as [M] and [N]; the sums energy, axial and force [M, N].
    `weights` multiply the forces.
    """
    energy, axial, force = sums
    heads, tails, deficit_m = row_tile
    col_heads, col_tails, deficit_n = columns
    if pair.two_ended:
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
    if pair.two_ended:
        r2 = tl.where(side > 0.0, m2, 4.0 - m2)
    else:
        r2 = m2
    q2 = 4.0 - m2
    if pair.two_ended:
        q2 = tl.where(side > 0.0, q2, m2)
    coefficient, value = exact_terms(r2, q2, pair)
    if MASKED:
        coefficient = tl.where(mask, coefficient, 0.0)
        value = tl.where(mask, value, 0.0)
    energy += value
    moved = force
    if WITH_FORCE:
        coefficient = coefficient * side * weights
        axial += coefficient
        moved = ()
        for column in tl.static_range(K):
            moved = moved + (force[column] - coefficient * difference[column],)
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
def add_sums(totals, sums, WITH_FORCE: tl.constexpr, K: tl.constexpr):
    """Totals of the rows, float64, plus running sums."""
    energy, axial, force = sums
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
def store_totals(
    totals,
    row_tile,
    slots,
    slot,
    value_unit,
    WITH_FORCE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Store energy, axial sum and force of a row tile in a slot: of the force the part across v."""
    total_energy, total_axial, total_force = totals
    heads, _, deficit_m = row_tile
    out = slot.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(slots.energy + out, (total_energy * value_unit).to(tl.float32))
    if WITH_FORCE:
        along = tl.zeros((BLOCK_M,), dtype=tl.float64)
        for column in tl.static_range(K):
            along += total_force[column] * heads[column].to(tl.float64)
        tl.store(slots.axial + out, ((total_axial + along) * deficit_m).to(tl.float32))
        for column in tl.static_range(K):
            tangent = total_force[column] - along * heads[column].to(tl.float64)
            tl.store(slots.force + out * K + column, tangent.to(tl.float32))


@triton.jit
def direct_kernel(
    rows,
    items_ptr,
    slots,
    packed_rows,
    value_unit,
    pair,
    WITH_FORCE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (items,). hi, lo [K, packed]. Per slot and row: force [K], energy, axial."""
    row0, tile_begin, tile_end, end_row, slot, _ = load_item(items_ptr, tl.program_id(0))
    offs_m = row0.to(tl.int64) + tl.arange(0, BLOCK_M)
    row_tile = load_tile(rows, offs_m, packed_rows, K)

    no_force = ()
    for _column in tl.static_range(K):
        no_force = no_force + (tl.zeros((BLOCK_M,), dtype=tl.float64),)
    nothing = tl.zeros((BLOCK_M,), dtype=tl.float64)
    totals = (nothing, nothing, no_force)
    # sums stay [BLOCK_M, BLOCK_N] in the loops: a reduction there would cost shuffles
    sums = zero_sums(K, BLOCK_M, BLOCK_N)
    split = split_tiles(row0, tile_begin, tile_end, end_row, BLOCK_M, BLOCK_N)
    num_clean, num_dirty = split[0], split[1]
    for step in tl.range(0, num_dirty):
        tile = column_tile(split, step, True)
        offs_n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = offs_n[None, :] < end_row
        if WITH_FORCE:
            mask = mask & (offs_n[None, :] != offs_m[:, None])
        else:
            mask = mask & (offs_n[None, :] > offs_m[:, None])
        columns = load_tile(rows, offs_n, packed_rows, K)
        sums = add_tile(sums, row_tile, columns, mask, pair, WITH_FORCE, True, K)
    totals = add_sums(totals, sums, WITH_FORCE, K)
    for begin in range(0, num_clean, TILES_PER_SUM):
        sums = zero_sums(K, BLOCK_M, BLOCK_N)
        for step in tl.range(begin, tl.minimum(begin + TILES_PER_SUM, num_clean)):
            tile = column_tile(split, step, False)
            offs_n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            columns = load_tile(rows, offs_n, packed_rows, K)
            sums = add_tile(sums, row_tile, columns, True, pair, WITH_FORCE, False, K)
        totals = add_sums(totals, sums, WITH_FORCE, K)

    store_totals(totals, row_tile, slots, slot, value_unit, WITH_FORCE, K, BLOCK_M)


def direct(
    rows: UnitRows, plan: Plan, tiles: Tiles, pair: PairConstants, with_force: bool
) -> Slots:
    """Energies, forces and axial sums of all work items, true ones in units of the range."""
    k, packed_rows = rows.hi.shape
    slots = Slots.empty(plan.num_items, tiles.block_m, k, with_force, rows.hi.device)
    direct_kernel[(plan.num_items,)](
        rows,
        plan.items,
        slots,
        packed_rows,
        pair.value_unit,
        pair.float32_arguments,
        WITH_FORCE=with_force,
        K=k,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
    )
    return slots
