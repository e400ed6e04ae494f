"""The pairwise sweep on tensor cores, for 8 < k <= 128.

    c_ij = <v_i, v_j>,  E_i = sum_j F(c_ij),  G_i = sum_j F'(c_ij) v_j

One program per work item: the rows of one tile against a range of column tiles, both products and
the pair function between them in registers; no [N, N] array, no atomics. Operands are fp16 pairs
hi + lo, and a product keeps the three terms hi hi + hi lo + lo hi: float32 accuracy at half of what
tf32 in three terms costs, safe because |v| <= 1 and F' is bounded away from the near pairs.

Tensor cores truncate: each step of 16 products rounds the running sum towards zero, and G is much
longer than the part across v_i that the gradient keeps (sqrt(N / k) times in half space). So small
terms come first, the product of a tile starts from zero, and the tiles are added by the float32
units, which round to nearest. Where N / k is largest the row is held in three parts, hi + lo +
rest: an error of v_i is the same in all its cosines and adds up as G does.

Tiles without the diagonal and without padding ("clean") run in a loop of their own that needs no
masks. The largest cosine of each row is stored with the result: rows that met a near pair are done
again by `near_pairs`, which is cheaper than a branch in this loop.

Source: Fasi, Higham, Mikaitis and Pranesh (2021), "Numerical behavior of NVIDIA tensor cores".
"""

import triton
import triton.language as tl

from .pair_terms import PairConstants, masked_terms
from .plan import Plan, Slots, Tiles, column_tile, load_item, split_tiles
from .project_normalize import UnitRows
from .special_functions import log2

# tiles summed before the running sums are added to the totals: bounds the error of long rows
TILES_PER_SUM: tl.constexpr = tl.constexpr(16)


@triton.jit
def load_rows(rows, offs, COSINE_TERMS: tl.constexpr):
    """Load the halves of some unit rows that `cosines` multiplies."""
    hi = tl.load(rows.hi + offs)
    lo = hi
    rest = hi
    if COSINE_TERMS >= 3:
        lo = tl.load(rows.lo + offs)
    if COSINE_TERMS == 4:
        rest = tl.load(rows.rest + offs)
    return hi, lo, rest


@triton.jit
def load_columns(rows, base, offs, WITH_LO: tl.constexpr):
    """Load the halves hi and lo of the columns of a tile; only `base` needs 64 bits."""
    hi = tl.load(rows.hi + base + offs)
    lo = hi
    if WITH_LO:
        lo = tl.load(rows.lo + base + offs)
    return hi, lo


@triton.jit
def cosines(row_halves, column_halves, COSINE_TERMS: tl.constexpr):
    """COSINE_SCALE * c of one tile, [BLOCK_M, BLOCK_N]."""
    row_hi, row_lo, row_rest = row_halves
    col_hi, col_lo = column_halves
    if COSINE_TERMS == 1:
        return tl.dot(row_hi, tl.trans(col_hi))
    else:
        x = tl.dot(row_lo, tl.trans(col_hi))
        if COSINE_TERMS == 4:
            x = tl.dot(row_rest, tl.trans(col_hi), x)
        x = tl.dot(row_hi, tl.trans(col_lo), x)
        return tl.dot(row_hi, tl.trans(col_hi), x)


@triton.jit
def add_force(force, coefficient, column_halves, FORCE_TERMS: tl.constexpr):
    """force + coefficient @ columns."""
    col_hi, col_lo = column_halves
    hi = coefficient.to(tl.float16)
    if FORCE_TERMS == 1:
        return tl.dot(hi, col_hi, force)
    else:
        lo = (coefficient - hi.to(tl.float32)).to(tl.float16)
        part = tl.dot(lo, col_hi)
        part = tl.dot(hi, col_lo, part)
        return force + tl.dot(hi, col_hi, part)


@triton.jit
def by_threads(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """View a tile as [BLOCK_M, BLOCK_N / 8, 4, 2], where the 4 are the threads of a row.

    In the accumulator layout of the tensor cores a reduction of the others moves no data. So row
    sums stay [BLOCK_M, 4] until after the loop.
    """
    return tl.reshape(tile, (BLOCK_M, BLOCK_N // 8, 4, 2))


@triton.jit
def row_sums(terms, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row sums of a tile, [BLOCK_M, 4]."""
    return tl.sum(tl.sum(by_threads(terms, BLOCK_M, BLOCK_N), axis=3), axis=1)


@triton.jit
def row_sums_of_log2(arguments, FAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row sums of log2 of a tile, [BLOCK_M, 4], one logarithm for a product of eight."""
    # the column bits 0, 3 and 4 that are multiplied together lie in one thread
    t = tl.reshape(arguments, (BLOCK_M, BLOCK_N // 32, 2, 2, 4, 2))
    a, b = tl.split(t)
    t = tl.permute(a * b, (0, 1, 4, 2, 3))
    a, b = tl.split(t)
    a, b = tl.split(a * b)
    return tl.sum(log2(a * b, FAST), axis=1)


@triton.jit
def row_energies(terms, pair, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row sums of a tile of raw energies, or of the logarithms of their arguments, [BLOCK_M, 4]."""
    if pair.sum_of_logs:
        return row_sums_of_log2(terms, pair.fast, BLOCK_M, BLOCK_N)
    else:
        return row_sums(terms, BLOCK_M, BLOCK_N)


@triton.jit
def largest_cosines(x, pair, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Largest x of each row of a tile, or |x| where c = -1 matters too, [BLOCK_M, 4]."""
    if pair.two_ended:
        x = tl.abs(x)
    return tl.max(tl.max(by_threads(x, BLOCK_M, BLOCK_N), axis=3), axis=1)


@triton.jit
def pairwise_kernel(
    rows,
    items_ptr,
    slots,
    pair,
    WITH_FORCE: tl.constexpr,
    COSINE_TERMS: tl.constexpr,
    FORCE_TERMS: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sweep the columns of an item: a block of rows against some of its set's tiles. Grid (items,).

    Per slot and row: force [K] and energy, raw but for `range_unit`, axial = 0, largest
    COSINE_SCALE * c.
    """
    row0, tile_begin, tile_end, end_row, slot, _ = load_item(items_ptr, tl.program_id(0))
    offs_m = row0 + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, WIDTH)
    row_offs = offs_m[:, None].to(tl.int64) * WIDTH + offs_k[None, :]
    col_offs = offs_n[:, None] * WIDTH + offs_k[None, :]
    row_halves = load_rows(rows, row_offs, COSINE_TERMS)
    split = split_tiles(row0, tile_begin, tile_end, end_row, BLOCK_M, BLOCK_N)
    num_clean, num_dirty = split[0], split[1]
    WITH_LO: tl.constexpr = (COSINE_TERMS >= 3) or (WITH_FORCE and FORCE_TERMS == 3)

    force = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
    energy = tl.zeros((BLOCK_M, 4), dtype=tl.float32)
    nearest = tl.full((BLOCK_M, 4), -3.0e38, dtype=tl.float32)
    for step in tl.range(0, num_dirty, num_stages=1):
        tile = column_tile(split, step, True)
        base = tile.to(tl.int64) * (BLOCK_N * WIDTH)
        columns = load_columns(rows, base, col_offs, WITH_LO)
        cols = tile * BLOCK_N + offs_n
        mask = cols[None, :] < end_row
        if WITH_FORCE:
            mask = mask & (cols[None, :] != offs_m[:, None])
        else:
            mask = mask & (cols[None, :] > offs_m[:, None])
        x = tl.where(mask, cosines(row_halves, columns, COSINE_TERMS), 0.0)
        nearest = tl.maximum(nearest, largest_cosines(x, pair, BLOCK_M, BLOCK_N))
        coefficient, terms = masked_terms(x, mask, pair)
        energy += row_sums(terms, BLOCK_M, BLOCK_N)
        if WITH_FORCE:
            force = add_force(force, coefficient, columns, FORCE_TERMS)

    lane = tl.arange(0, BLOCK_M)
    slot_ptr = slots.force + slot.to(tl.int64) * (BLOCK_M * K)
    if WITH_FORCE:
        slot_ptrs = slot_ptr + lane[:, None] * K + offs_k[None, :]
        tl.store(slot_ptrs, force * pair.range_unit, mask=(offs_k < K)[None, :])
    total_energy = energy
    for begin in range(0, num_clean, TILES_PER_SUM):
        force = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
        energy = tl.zeros((BLOCK_M, 4), dtype=tl.float32)
        for step in tl.range(
            begin, tl.minimum(begin + TILES_PER_SUM, num_clean), num_stages=STAGES
        ):
            tile = column_tile(split, step, False)
            base = tile.to(tl.int64) * (BLOCK_N * WIDTH)
            columns = load_columns(rows, base, col_offs, WITH_LO)
            x = cosines(row_halves, columns, COSINE_TERMS)
            nearest = tl.maximum(nearest, largest_cosines(x, pair, BLOCK_M, BLOCK_N))
            coefficient, terms = pair.tile(x, pair)
            energy += row_energies(terms, pair, BLOCK_M, BLOCK_N)
            if WITH_FORCE:
                force = add_force(force, coefficient, columns, FORCE_TERMS)
        if WITH_FORCE:
            # the total waits in memory: in registers it would halve the programs on a processor.
            # the barrier is for layouts in which another thread stored what this one loads
            tl.debug_barrier()
            slot_ptrs = slot_ptr + lane[:, None] * K + offs_k[None, :]
            before = tl.load(slot_ptrs, mask=(offs_k < K)[None, :], other=0.0)
            tl.store(slot_ptrs, before + force * pair.range_unit, mask=(offs_k < K)[None, :])
        total_energy += energy

    out = slot.to(tl.int64) * BLOCK_M + lane
    tl.store(slots.energy + out, tl.sum(total_energy, axis=1) * pair.range_unit)
    tl.store(slots.nearest + out, tl.max(nearest, axis=1))
    if WITH_FORCE:
        tl.store(slots.axial + out, tl.zeros((BLOCK_M,), dtype=tl.float32))


def pairwise(
    rows: UnitRows,
    k: int,
    plan: Plan,
    tiles: Tiles,
    pair: PairConstants,
    with_force: bool,
    terms: tuple[int, int],
) -> Slots:
    """Raw energies and forces of all work items.

    Args:
        rows: unit rows, [packed, width] fp16.
        k: columns of the points.
        plan: square tables with `with_force`, upper ones without.
        tiles: launch shape, the one the plan was made for.
        pair: the pair function.
        with_force: the energies alone need only the upper triangle.
        terms: products of the fp16 halves kept for the cosine (1, 3, or 4 where the rows have
            their `rest`) and for the force (1 or 3).
    """
    slots = Slots.empty(plan.num_items, tiles.block_m, k, with_force, rows.hi.device)
    options = {} if tiles.maxnreg is None else {"maxnreg": tiles.maxnreg}
    pairwise_kernel[(plan.num_items,)](
        rows,
        plan.items,
        slots,
        pair.arguments,
        WITH_FORCE=with_force,
        COSINE_TERMS=terms[0],
        FORCE_TERMS=terms[1],
        K=k,
        WIDTH=rows.hi.shape[1],
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
        **options,
    )
    return slots
