"""Rows against columns of their own: the pairwise sweep of a cross set.

    E_i = sum_j F(c_ij),  energy = scale sum_i weight_i E_i      over the columns j of another id
    G_i = weight_i sum_j F'(c_ij) v_j,   H_j = sum_i weight_i F'(c_ij) v_i

One kernel twice, the sides swapped: each launch sums forces for its own rows, so nothing is shared
and every sum has a fixed order. It is built as `pairwise` is: tensor cores, forces of a few tiles
in registers and totals in memory, near pairs left to a second launch that does their work items
again. Above 128 columns a program takes a product in parts of 128 and owns 128 columns of the
force; the cosines are then computed once for each such part. Up to 8 columns, `cross_direct` takes
the place of this.

The weights of columns multiply F' before it is rounded to fp16, divided by the largest of them.
"""

import triton
import triton.language as tl

from .near_pairs import add_near_force, far_terms, finite, is_near, near_terms, source_rows
from .pair_terms import COSINE_SCALE, PairConstants, masked_terms
from .pairwise import (
    TILES_PER_SUM,
    add_force,
    cosines,
    largest_cosines,
    load_columns,
    load_rows,
    row_energies,
    row_sums,
)
from .plan import NEAR_BLOCK, Plan, Slots, Tiles, load_item
from .sides import CHUNK, Side, load_ids, met_pairs


@triton.jit
def tile_cosines(
    row_halves,
    m,
    n,
    row_offs,
    base,
    col_offs,
    COSINE_TERMS: tl.constexpr,
    WITH_LO: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
):
    """COSINE_SCALE c of a tile, and the first STEP columns of its columns."""
    columns = load_columns(n.rows, base, col_offs, WITH_LO)
    x = cosines(row_halves, columns, COSINE_TERMS)
    if WIDTH > STEP:
        for k0 in range(STEP, WIDTH, STEP):
            left = load_rows(m.rows, row_offs + k0, COSINE_TERMS)
            x += cosines(left, load_columns(n.rows, base + k0, col_offs, WITH_LO), COSINE_TERMS)
    return x, columns


@triton.jit
def add_columns(
    sums,
    tile,
    row,
    m,
    n,
    col_offs,
    end_column,
    first_k,
    pair,
    MASKED: tl.constexpr,
    WITH_FORCE: tl.constexpr,
    WITH_IDS: tl.constexpr,
    WITH_WEIGHTS: tl.constexpr,
    COSINE_TERMS: tl.constexpr,
    FORCE_TERMS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add one column tile to force, energy, largest cosine and number of pairs of a row tile."""
    force, energy, nearest, count = sums
    row_halves, row_offs, row_ids = row
    WITH_LO: tl.constexpr = (COSINE_TERMS >= 3) or (WITH_FORCE and FORCE_TERMS == 3)
    base = tile.to(tl.int64) * (BLOCK_N * WIDTH)
    x, columns = tile_cosines(
        row_halves, m, n, row_offs, base, col_offs, COSINE_TERMS, WITH_LO, WIDTH, STEP
    )
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if MASKED:
        column_ids = load_ids(n, offs_n, end_column, WITH_IDS)
        mask = met_pairs(row_ids, column_ids, offs_n, end_column, WITH_IDS)
        x = tl.where(mask, x, 0.0)
        coefficient, terms = masked_terms(x, mask, pair)
        energy += row_sums(terms, BLOCK_M, BLOCK_N)
    else:
        coefficient, terms = pair.tile(x, pair)
        energy += row_energies(terms, pair, BLOCK_M, BLOCK_N)
    if pair.sum_of_logs:
        count += tl.sum(mask.to(tl.float32), axis=1) if MASKED else BLOCK_N
    nearest = tl.maximum(nearest, largest_cosines(x, pair, BLOCK_M, BLOCK_N))
    if WITH_FORCE:
        if WITH_WEIGHTS:
            weights = tl.load(n.weights + offs_n, mask=offs_n < end_column, other=0.0)
            coefficient = coefficient * weights[None, :]
        if WIDTH > STEP:
            columns = load_columns(n.rows, base + first_k, col_offs, FORCE_TERMS == 3)
        force = add_force(force, coefficient, columns, FORCE_TERMS)
    return force, energy, nearest, count


@triton.jit
def cross_kernel(
    m,
    n,
    items_ptr,
    slots,
    k,
    pair,
    WITH_FORCE: tl.constexpr,
    WITH_IDS: tl.constexpr,
    WITH_WEIGHTS: tl.constexpr,
    COSINE_TERMS: tl.constexpr,
    FORCE_TERMS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sweep the columns of an item. Grid (items, parts of STEP columns of the force).

    Per slot and row: force [k] and energy, raw but for `range_unit`, axial = 0, largest
    COSINE_SCALE * c.
    """
    row0, tile_begin, tile_end, end_column, slot, end_row = load_item(items_ptr, tl.program_id(0))
    first_k = tl.program_id(1) * STEP
    lane = tl.arange(0, BLOCK_M)
    offs_m = row0 + lane
    offs_k = tl.arange(0, STEP)
    row_offs = offs_m[:, None].to(tl.int64) * WIDTH + offs_k[None, :]
    col_offs = tl.arange(0, BLOCK_N)[:, None] * WIDTH + offs_k[None, :]
    row_halves = load_rows(m.rows, row_offs, COSINE_TERMS)
    row = (row_halves, row_offs, load_ids(m, offs_m, end_row, WITH_IDS))

    force = tl.zeros((BLOCK_M, STEP), dtype=tl.float32)
    energy = tl.zeros((BLOCK_M, 4), dtype=tl.float32)
    nearest = tl.full((BLOCK_M, 4), -3.0e38, dtype=tl.float32)
    count = tl.zeros((BLOCK_M,), dtype=tl.float32)
    ragged = tl.maximum(tl.minimum(end_column // BLOCK_N, tile_end), tile_begin)
    for step in tl.range(0, tile_end - ragged, num_stages=1):
        force, energy, nearest, count = add_columns(
            (force, energy, nearest, count),
            ragged + step,
            row,
            m,
            n,
            col_offs,
            end_column,
            first_k,
            pair,
            True,
            WITH_FORCE,
            WITH_IDS,
            WITH_WEIGHTS,
            COSINE_TERMS,
            FORCE_TERMS,
            WIDTH,
            STEP,
            BLOCK_M,
            BLOCK_N,
        )
    out = slot.to(tl.int64) * BLOCK_M + lane
    slot_ptrs = slots.force + out[:, None] * k + (first_k + offs_k)[None, :]
    mask_k = (first_k + offs_k < k)[None, :]
    if WITH_FORCE:
        tl.store(slot_ptrs, force * pair.range_unit, mask=mask_k)
    total_energy = energy
    num_clean = ragged - tile_begin
    for begin in range(0, num_clean, TILES_PER_SUM):
        force = tl.zeros((BLOCK_M, STEP), dtype=tl.float32)
        energy = tl.zeros((BLOCK_M, 4), dtype=tl.float32)
        for step in tl.range(
            begin, tl.minimum(begin + TILES_PER_SUM, num_clean), num_stages=STAGES
        ):
            force, energy, nearest, count = add_columns(
                (force, energy, nearest, count),
                tile_begin + step,
                row,
                m,
                n,
                col_offs,
                end_column,
                first_k,
                pair,
                WITH_IDS,
                WITH_FORCE,
                WITH_IDS,
                WITH_WEIGHTS,
                COSINE_TERMS,
                FORCE_TERMS,
                WIDTH,
                STEP,
                BLOCK_M,
                BLOCK_N,
            )
        if WITH_FORCE:
            # as in `pairwise`: the total waits in memory, and another thread may have stored it
            tl.debug_barrier()
            before = tl.load(slot_ptrs, mask=mask_k, other=0.0)
            tl.store(slot_ptrs, before + force * pair.range_unit, mask=mask_k)
        total_energy += energy
    if first_k == 0:
        total = tl.sum(total_energy, axis=1) * pair.range_unit
        tl.store(slots.energy + out, total + count_offset(count, pair))
        tl.store(slots.nearest + out, tl.max(nearest, axis=1))
        if WITH_FORCE:
            tl.store(slots.axial + out, tl.zeros((BLOCK_M,), dtype=tl.float32))


@triton.jit
def count_offset(count, pair):
    """Add up the constant that logarithms leave out of the energy of so many pairs."""
    if pair.sum_of_logs:
        return count * (pair.to_raw.energy_offset * pair.to_raw.per_energy)
    else:
        return 0.0


@triton.jit
def cross_near_kernel(
    m,
    n,
    items_ptr,
    slots,
    k,
    pair,
    WITH_FORCE: tl.constexpr,
    WITH_IDS: tl.constexpr,
    WITH_WEIGHTS: tl.constexpr,
    COSINE_TERMS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    ITEM_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES_RATIO: tl.constexpr,
):
    """Grid (items, ITEM_M / BLOCK_M, parts of the force). Does rows with near pairs again."""
    row0, tile_begin, tile_end, end_column, slot, end_row = load_item(items_ptr, tl.program_id(0))
    lane = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = tl.program_id(2) * STEP
    out = slot.to(tl.int64) * ITEM_M + lane
    nearest = tl.max(tl.load(slots.nearest + out), axis=0)
    if nearest > pair.near_cosine * COSINE_SCALE:
        offs_m = row0 + lane
        mask_m = offs_m < end_row
        offs_k = tl.arange(0, STEP)
        row_offs = offs_m[:, None].to(tl.int64) * WIDTH + offs_k[None, :]
        col_offs = tl.arange(0, BLOCK_N)[:, None] * WIDTH + offs_k[None, :]
        row_halves = load_rows(m.rows, row_offs, COSINE_TERMS)
        row_ids = load_ids(m, offs_m, end_row, WITH_IDS)
        source_m = source_rows(m.points, m.rows, offs_m, 0, mask_m)
        force = tl.zeros((BLOCK_M, STEP), dtype=tl.float64)
        energy = tl.zeros((BLOCK_M,), dtype=tl.float64)
        axial = tl.zeros((BLOCK_M,), dtype=tl.float64)
        count = tl.zeros((BLOCK_M,), dtype=tl.float32)

        # tiles beyond the last column hold no packed rows
        first_tile = tile_begin * TILES_RATIO
        end_tile = tl.minimum(tile_end * TILES_RATIO, tl.cdiv(end_column, BLOCK_N))
        for step in range(0, end_tile - first_tile):
            tile = first_tile + step
            offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            mask_n = offs_n < end_column
            base = tile.to(tl.int64) * (BLOCK_N * WIDTH)
            x, columns = tile_cosines(
                row_halves, m, n, row_offs, base, col_offs, COSINE_TERMS, True, WIDTH, STEP
            )
            column_ids = load_ids(n, offs_n, end_column, WITH_IDS)
            mask = met_pairs(row_ids, column_ids, offs_n, end_column, WITH_IDS) & mask_m[:, None]
            x = tl.where(mask, x, 0.0)
            near = is_near(x, mask, pair)
            coefficient, terms = far_terms(x, mask, near, pair)
            energy += tl.sum(terms, axis=1).to(tl.float64) * pair.range_unit
            count += tl.sum(mask.to(tl.float32), axis=1)
            weights = tl.full((BLOCK_N,), 1.0, dtype=tl.float32)
            if WITH_WEIGHTS:
                weights = tl.load(n.weights + offs_n, mask=mask_n, other=0.0)
            if WITH_FORCE:
                if WIDTH > STEP:
                    columns = load_columns(n.rows, base + first_k, col_offs, True)
                nothing = tl.zeros((BLOCK_M, STEP), dtype=tl.float32)
                part = add_force(nothing, coefficient * weights[None, :], columns, 3)
                force += part.to(tl.float64) * pair.range_unit

            if tl.max(tl.max(near.to(tl.int32), axis=1), axis=0) > 0:
                source_n = source_rows(n.points, n.rows, offs_n, 0, mask_n)
                along_v, along_d, value, side = near_terms(source_m, source_n, x, k, pair)
                energy += tl.sum(tl.where(near, value, 0.0), axis=1)
                if WITH_FORCE:
                    axial += tl.sum(tl.where(near, along_v, 0.0) * weights[None, :], axis=1)
                    along_d = tl.where(near, along_d, 0.0) * weights[None, :]
                    force = add_near_force(
                        force,
                        source_m,
                        source_n,
                        along_d,
                        side,
                        first_k + offs_k,
                        first_k,
                        tl.minimum(first_k + STEP, k),
                        k,
                    )
        if first_k == 0:
            tl.store(slots.energy + out, (energy + count_offset(count, pair)).to(tl.float32))
            if WITH_FORCE:
                tl.store(slots.axial + out, finite(axial * source_m.deficit))
        if WITH_FORCE:
            slot_ptrs = slots.force + out[:, None] * k + (first_k + offs_k)[None, :]
            tl.store(slot_ptrs, finite(force), mask=(first_k + offs_k < k)[None, :])


def cross(
    m: Side,
    n: Side,
    k: int,
    plan: Plan,
    tiles: Tiles,
    pair: PairConstants,
    terms: tuple[int, int],
    *,
    with_force: bool,
    with_ids: bool,
    with_weights: bool,
) -> Slots:
    """Raw energies and forces of all work items, near pairs included.

    Args:
        m, n: rows and columns, [packed, width] fp16.
        k: columns of the points.
        plan: of rows against columns.
        tiles: launch shape, the one the plan was made for.
        pair: the pair function.
        terms: products of the fp16 halves kept for the cosine and for the force, as in `pairwise`.
        with_force: else the energies alone.
        with_ids: leave out pairs of equal ids.
        with_weights: multiply the forces by the weights of the columns.
    """
    slots = Slots.empty(plan.num_items, tiles.block_m, k, with_force, m.points.device)
    width = m.rows.hi.shape[1]
    step = min(width, CHUNK)
    parts = width // step if with_force else 1
    flags = {"WITH_FORCE": with_force, "WITH_IDS": with_ids, "WITH_WEIGHTS": with_weights}
    options = {} if tiles.maxnreg is None else {"maxnreg": tiles.maxnreg}
    cross_kernel[(plan.num_items, parts)](
        m,
        n,
        plan.items,
        slots,
        k,
        pair.arguments,
        **flags,
        COSINE_TERMS=terms[0],
        FORCE_TERMS=terms[1],
        WIDTH=width,
        STEP=step,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
        **options,
    )
    # this kernel has no cheaper product
    cross_near_kernel[(plan.num_items, tiles.block_m // NEAR_BLOCK, parts)](
        m,
        n,
        plan.items,
        slots,
        k,
        pair.arguments,
        **flags,
        COSINE_TERMS=max(terms[0], 3),
        WIDTH=width,
        STEP=step,
        ITEM_M=tiles.block_m,
        BLOCK_M=NEAR_BLOCK,
        BLOCK_N=NEAR_BLOCK,
        TILES_RATIO=tiles.block_n // NEAR_BLOCK,
        num_warps=4,
        num_stages=1,
    )
    return slots
