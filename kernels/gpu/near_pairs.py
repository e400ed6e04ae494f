"""Pairs too near for 2 - 2c: the work items that met one are done again exactly.

    D_ij = v_i - side v_j,  side = sign c_ij        m2 = |D_ij|^2 + deficit_i + deficit_j
    r^2 = m2 or 4 - m2                              F' v_j = side F' v_i - side F' D_ij

D comes from the caller's rows in float64. The part of the force along v_i, side F', is large, and
the tangent projection leaves of it only the share of the deficit: it is summed separately
("axial", times the deficit), so nothing cancels. Between multiples of one row D is rounding, and
their force is axial alone. The grid is that of `pairwise` in smaller row tiles. A program whose
rows met no near pair returns at once; another computes differences only in the tiles that hold such
pairs, and sums in float64.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .pair_terms import COSINE_SCALE, LARGEST, UNIT_SCALE, PairConstants, exact_terms, masked_terms
from .pairwise import add_force, cosines, load_rows
from .plan import NEAR_BLOCK, Plan, Slots, Tiles, load_item
from .project_normalize import UnitRows

# |D|^2 below which two rows may be multiples of one row: far above the rounding of their norms, and
# so small that few others have to be looked at
MAYBE_MULTIPLES: tl.constexpr = tl.constexpr(1e-18)
# what rounding leaves of an entry of D, against that of v_i, when its part along v_i is off
# (float32 rows that are no multiples keep 2^-49 at least, half the last bit of a product)
ROUNDING: tl.constexpr = tl.constexpr(2.0**-49)


class SourceRows(NamedTuple):
    """Some rows as the caller gave them: v = points[sources] inv_nu, for exact differences."""

    points: Any
    sources: Any
    mask: Any
    inv_nu: Any
    deficit: Any


@triton.jit
def source_rows(points_ptr, rows, offs, shift, mask):
    """Find the caller's rows of some packed rows."""
    inv_nu = tl.load(rows.inv_nu + offs, mask=mask, other=0.0)
    deficit = tl.load(rows.deficit + offs, mask=mask, other=0.0)
    return SourceRows(points_ptr, (offs - shift).to(tl.int64), mask, inv_nu, deficit)


@triton.jit
def load_unit(source, column, k):
    """Entry `column` of some unit rows in float64."""
    p = tl.load(source.points + source.sources * k + column, mask=source.mask, other=0.0)
    return p.to(tl.float64) * source.inv_nu


@triton.jit
def squared_difference(m, n, side, k):
    """|v_i - side v_j|^2 of a tile, float64, and whether v_i and v_j are multiples of one row."""
    d2 = tl.zeros_like(side)
    along = tl.zeros_like(side)
    square = tl.zeros_like(m.inv_nu)
    for column in range(0, k):
        a = load_unit(m, column, k)
        b = load_unit(n, column, k)
        d = a[:, None] - side * b[None, :]
        d2 += d * d
        along += d * a[:, None]
        square += a * a
    multiples = d2 < MAYBE_MULTIPLES
    if tl.max(tl.max(multiples.to(tl.int32), axis=1), axis=0) > 0:
        # the largest excess over rounding of what D has across v_i
        excess = tl.zeros_like(side)
        along = along / square[:, None]
        for column in range(0, k):
            a = load_unit(m, column, k)
            b = load_unit(n, column, k)
            across = a[:, None] - side * b[None, :] - along * a[:, None]
            excess = tl.maximum(excess, tl.abs(across) - ROUNDING * tl.abs(a)[:, None])
        multiples = multiples & (excess <= 0.0)
    return tl.where(multiples, 0.0, d2), multiples


@triton.jit
def near_terms(m, n, x, k, pair):
    """side F' that multiplies v_i, the same for D_ij, F, and side, from the differences of a tile.

    All float64, in the units of the slots. The sign of x gives the side.
    """
    side = tl.where(x < 0.0, -1.0, 1.0).to(tl.float64)
    d2, multiples = squared_difference(m, n, side, k)
    m2 = d2 + (m.deficit[:, None] + n.deficit[None, :])
    r2 = tl.where(x < 0.0, 4.0 - m2, m2)
    q2 = tl.where(x < 0.0, m2, 4.0 - m2)
    coefficient, value = exact_terms(r2, q2, pair)
    coefficient = side * coefficient * pair.to_raw.per_force
    value = (value - pair.to_raw.energy_offset) * pair.to_raw.per_energy
    return coefficient, tl.where(multiples, 0.0, coefficient), value, side


@triton.jit
def is_near(x, mask, pair):
    """Which pairs of a tile the tensor cores cannot resolve."""
    if pair.two_ended:
        return mask & (tl.abs(x) > pair.near_cosine * COSINE_SCALE)
    else:
        return mask & (x > pair.near_cosine * COSINE_SCALE)


@triton.jit
def far_terms(x, mask, near, pair):
    """Raw F' and F of the pairs of a tile that are not near, NaN among them; 0 for the others."""
    return masked_terms(tl.where(near, 0.0, x), mask & (near == 0), pair)


@triton.jit
def finite(x):
    """x in float32, the largest number for one beyond: infinity times 0 would be NaN."""
    x = tl.where(x > LARGEST, LARGEST, x)
    return tl.where(x < -LARGEST, -LARGEST, x).to(tl.float32)


@triton.jit
def add_near_force(force, m, n, coefficient, side, offs_k, begin, end, k):
    """force - sum_j coefficient_ij D_ij in the columns [begin, end) of `offs_k`, float64, raw."""
    for column in range(begin, end):
        a = load_unit(m, column, k)
        b = load_unit(n, column, k)
        entry = tl.sum(coefficient * (a[:, None] - side * b[None, :]), axis=1) * UNIT_SCALE
        force -= tl.where(offs_k[None, :] == column, entry[:, None], 0.0)
    return force


@triton.jit
def near_pairs_kernel(
    points_ptr,
    rows,
    items_ptr,
    slots,
    k,
    pair,
    WITH_FORCE: tl.constexpr,
    COSINE_TERMS: tl.constexpr,
    WIDTH: tl.constexpr,
    ITEM_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES_RATIO: tl.constexpr,
):
    """Grid (items, ITEM_M / BLOCK_M). Overwrites the results of the rows it does again."""
    item_row0, tile_begin, tile_end, end_row, slot, shift = load_item(items_ptr, tl.program_id(0))
    lane = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = slot.to(tl.int64) * ITEM_M + lane
    nearest = tl.max(tl.load(slots.nearest + out), axis=0)
    if nearest > pair.near_cosine * COSINE_SCALE:
        offs_m = item_row0 + lane
        mask_m = offs_m < end_row
        offs_k = tl.arange(0, WIDTH)
        row_offs = offs_m[:, None].to(tl.int64) * WIDTH + offs_k[None, :]
        row_halves = load_rows(rows, row_offs, COSINE_TERMS)
        m = source_rows(points_ptr, rows, offs_m, shift, mask_m)
        force = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float64)
        energy = tl.zeros((BLOCK_M,), dtype=tl.float64)
        axial = tl.zeros((BLOCK_M,), dtype=tl.float64)

        for tile in range(tile_begin * TILES_RATIO, tile_end * TILES_RATIO):
            offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            mask_n = offs_n < end_row
            col_offs = offs_n[:, None].to(tl.int64) * WIDTH + offs_k[None, :]
            col_hi = tl.load(rows.hi + col_offs, mask=mask_n[:, None], other=0.0)
            col_lo = tl.load(rows.lo + col_offs, mask=mask_n[:, None], other=0.0)
            columns = (col_hi, col_lo)
            if WITH_FORCE:
                mask = mask_n[None, :] & (offs_n[None, :] != offs_m[:, None])
            else:
                mask = mask_n[None, :] & (offs_n[None, :] > offs_m[:, None])
            mask = mask & mask_m[:, None]
            x = tl.where(mask, cosines(row_halves, columns, COSINE_TERMS), 0.0)
            near = is_near(x, mask, pair)
            coefficient, terms = far_terms(x, mask, near, pair)
            energy += tl.sum(terms, axis=1).to(tl.float64) * pair.range_unit
            if WITH_FORCE:
                nothing = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
                part = add_force(nothing, coefficient, columns, 3)
                force += part.to(tl.float64) * pair.range_unit

            if tl.max(tl.max(near.to(tl.int32), axis=1), axis=0) > 0:
                n = source_rows(points_ptr, rows, offs_n, shift, mask_n)
                along_v, along_d, value, side = near_terms(m, n, x, k, pair)
                # chosen here, not there: the compiler then needs fewer registers
                energy += tl.sum(tl.where(near, value, 0.0), axis=1)
                if WITH_FORCE:
                    axial += tl.sum(tl.where(near, along_v, 0.0), axis=1)
                    along_d = tl.where(near, along_d, 0.0)
                    force = add_near_force(force, m, n, along_d, side, offs_k, 0, k, k)

        tl.store(slots.energy + out, energy.to(tl.float32))
        if WITH_FORCE:
            slot_ptrs = slots.force + out[:, None] * k + offs_k[None, :]
            tl.store(slot_ptrs, finite(force), mask=(offs_k < k)[None, :])
            tl.store(slots.axial + out, finite(axial * m.deficit))


def near_pairs(
    points: Tensor,
    rows: UnitRows,
    slots: Slots,
    plan: Plan,
    tiles: Tiles,
    pair: PairConstants,
    with_force: bool,
    cosine_terms: int,
) -> None:
    """Correct `slots` of `pairwise` in place wherever its rows met a near pair."""
    near_pairs_kernel[(plan.num_items, tiles.block_m // NEAR_BLOCK)](
        points,
        rows,
        plan.items,
        slots,
        points.shape[1],
        pair.arguments,
        WITH_FORCE=with_force,
        COSINE_TERMS=cosine_terms,
        WIDTH=rows.hi.shape[1],
        ITEM_M=tiles.block_m,
        BLOCK_M=NEAR_BLOCK,
        BLOCK_N=NEAR_BLOCK,
        TILES_RATIO=tiles.block_n // NEAR_BLOCK,
        num_warps=4,
    )
