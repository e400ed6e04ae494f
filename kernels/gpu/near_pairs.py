"""Pairs too close for 2 - 2c: the work items that met one are done again exactly.

    D_ij = v_i - side v_j,  side = sign c_ij        m2 = |D_ij|^2 + deficit_i + deficit_j
    r^2 = m2 or 4 - m2                              F' v_j = side F' v_i - side F' D_ij

D comes from the raw rows in float64. The part of the gradient along v_i, side F', is large and
falls out in the tangent projection but for its deficit: it is summed apart ("axial", times that
deficit), so nothing cancels. Between multiples of one row D is rounding: they push along v_i alone.
The grid is that of `pairwise` in smaller row tiles; a program whose rows met no close pair
returns at once, and one that met some pays for differences only in the tiles that hold them. What
is done again is summed in float64.
"""

import triton
import triton.language as tl
from torch import Tensor

from .pair_function import (
    COSINE_SCALE,
    LARGEST,
    LOG,
    UNIT_SCALE,
    PairConstants,
    exact_terms,
    fast_terms,
    log2,
)
from .pairwise import add_force, cosines, load_rows
from .plan import NEAR_BLOCK, Plan, Slots, Tiles, load_item
from .project_normalize import UnitRows

# |D|^2 below which two rows may be multiples of one row: far above the rounding of their norms, and
# so small that few others have to be looked at
MAYBE_MULTIPLES: tl.constexpr = tl.constexpr(1e-18)
# what rounding leaves of an entry of D, against that of v_i, when its part along v_i is off
# (float32 rows that are no multiples keep 2^-49 at least, half the last bit of a product)
ROUNDING: tl.constexpr = tl.constexpr(2.0**-49)


@triton.jit
def load_unit(points_ptr, sources, mask, inv_nu, column, k):
    """Entry `column` of some unit rows in float64."""
    p = tl.load(points_ptr + sources * k + column, mask=mask, other=0.0)
    return p.to(tl.float64) * inv_nu


@triton.jit
def squared_difference(
    points_ptr,
    sources_m,
    mask_m,
    inv_m,
    sources_n,
    mask_n,
    inv_n,
    side,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """|v_i - side v_j|^2 of a tile, float64, and whether v_i and v_j are multiples of one row."""
    d2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float64)
    along = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float64)
    square = tl.zeros((BLOCK_M,), dtype=tl.float64)
    for column in range(0, k):
        a = load_unit(points_ptr, sources_m, mask_m, inv_m, column, k)
        b = load_unit(points_ptr, sources_n, mask_n, inv_n, column, k)
        d = a[:, None] - side * b[None, :]
        d2 += d * d
        along += d * a[:, None]
        square += a * a
    multiples = d2 < MAYBE_MULTIPLES
    if tl.max(tl.max(multiples.to(tl.int32), axis=1), axis=0) > 0:
        # the largest excess over rounding of what D has across v_i
        excess = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float64)
        along = along / square[:, None]
        for column in range(0, k):
            a = load_unit(points_ptr, sources_m, mask_m, inv_m, column, k)
            b = load_unit(points_ptr, sources_n, mask_n, inv_n, column, k)
            across = a[:, None] - side * b[None, :] - along * a[:, None]
            excess = tl.maximum(excess, tl.abs(across) - ROUNDING * tl.abs(a)[:, None])
        multiples = multiples & (excess <= 0.0)
    return tl.where(multiples, 0.0, d2), multiples


@triton.jit
def close_terms(
    points_ptr,
    sources_m,
    mask_m,
    inv_m,
    deficit_m,
    sources_n,
    mask_n,
    inv_n,
    deficit_n,
    x,
    k,
    s,
    value_bits,
    factor,
    min_distance,
    value_at_min,
    slope_at_min,
    push_at_min,
    inv_energy_unit,
    energy_offset,
    inv_force_unit,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    ANGLE: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of a tile from differences, as the slots hold them: side F', F, and side. x gives the side.

    side F' comes twice: as it multiplies v_i, and as it multiplies D_ij. All float64.
    """
    side = tl.where(x < 0.0, -1.0, 1.0).to(tl.float64)
    d2, multiples = squared_difference(
        points_ptr, sources_m, mask_m, inv_m, sources_n, mask_n, inv_n, side, k, BLOCK_M, BLOCK_N
    )
    m2 = d2 + (deficit_m[:, None] + deficit_n[None, :])
    r2 = tl.where(x < 0.0, 4.0 - m2, m2)
    q2 = tl.where(x < 0.0, m2, 4.0 - m2)
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
    slope = side * slope * inv_force_unit
    push = tl.where(multiples, 0.0, slope)
    return slope, push, (value - energy_offset) * inv_energy_unit, side


@triton.jit
def finite(x):
    """x in float32, the largest number for one beyond: infinity times 0 would be NaN."""
    x = tl.where(x > LARGEST, LARGEST, x)
    return tl.where(x < -LARGEST, -LARGEST, x).to(tl.float32)


@triton.jit
def push_apart(
    force,
    points_ptr,
    sources_m,
    mask_m,
    inv_m,
    sources_n,
    mask_n,
    inv_n,
    slope,
    side,
    offs_k,
    begin,
    end,
    k,
):
    """force - sum_j slope_ij D_ij in the columns [begin, end) of `offs_k`, float64, raw."""
    for column in range(begin, end):
        a = load_unit(points_ptr, sources_m, mask_m, inv_m, column, k)
        b = load_unit(points_ptr, sources_n, mask_n, inv_n, column, k)
        push = tl.sum(slope * (a[:, None] - side * b[None, :]), axis=1) * UNIT_SCALE
        force -= tl.where(offs_k[None, :] == column, push[:, None], 0.0)
    return force


@triton.jit
def near_pairs_kernel(
    points_ptr,
    hi_ptr,
    lo_ptr,
    rest_ptr,
    inv_nu_ptr,
    deficit_ptr,
    items_ptr,
    force_ptr,
    energy_ptr,
    nearest_ptr,
    axial_ptr,
    k,
    bits,
    near_cosine,
    range_unit,
    s,
    value_bits,
    factor,
    min_distance,
    value_at_min,
    slope_at_min,
    push_at_min,
    inv_energy_unit,
    energy_offset,
    inv_force_unit,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    ANGLE: tl.constexpr,
    WITH_FORCE: tl.constexpr,
    FAST: tl.constexpr,
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
    nearest = tl.max(tl.load(nearest_ptr + out), axis=0)
    if nearest > near_cosine * COSINE_SCALE:
        offs_m = item_row0 + lane
        mask_m = offs_m < end_row
        sources_m = (offs_m - shift).to(tl.int64)
        offs_k = tl.arange(0, WIDTH)
        row_offs = offs_m[:, None].to(tl.int64) * WIDTH + offs_k[None, :]
        row_hi, row_lo, row_rest = load_rows(hi_ptr, lo_ptr, rest_ptr, row_offs, COSINE_TERMS)
        inv_m = tl.load(inv_nu_ptr + offs_m)
        deficit_m = tl.load(deficit_ptr + offs_m)
        force = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float64)
        energy = tl.zeros((BLOCK_M,), dtype=tl.float64)
        axial = tl.zeros((BLOCK_M,), dtype=tl.float64)

        for tile in range(tile_begin * TILES_RATIO, tile_end * TILES_RATIO):
            offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            mask_n = offs_n < end_row
            col_offs = offs_n[:, None].to(tl.int64) * WIDTH + offs_k[None, :]
            col_hi = tl.load(hi_ptr + col_offs, mask=mask_n[:, None], other=0.0)
            col_lo = tl.load(lo_ptr + col_offs, mask=mask_n[:, None], other=0.0)
            if WITH_FORCE:
                mask = mask_n[None, :] & (offs_n[None, :] != offs_m[:, None])
            else:
                mask = mask_n[None, :] & (offs_n[None, :] > offs_m[:, None])
            mask = mask & mask_m[:, None]
            x = cosines(row_hi, row_lo, row_rest, col_hi, col_lo, COSINE_TERMS)
            x = tl.where(mask, x, 0.0)
            if HALF or ANGLE:
                near = mask & (tl.abs(x) > near_cosine * COSINE_SCALE)
            else:
                near = mask & (x > near_cosine * COSINE_SCALE)

            # the pairs of the tile that are not near, NaN among them
            coefficient, terms = fast_terms(
                tl.where(near, 0.0, x), s, bits, KIND, HALF, ANGLE, FAST
            )
            if KIND == LOG:
                terms = log2(terms, FAST)
            far = mask & (near == 0)
            energy += tl.sum(tl.where(far, terms, 0.0), axis=1).to(tl.float64) * range_unit
            if WITH_FORCE:
                coefficient = tl.where(far, coefficient, 0.0)
                nothing = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
                force += (
                    add_force(nothing, coefficient, col_hi, col_lo, 3).to(tl.float64) * range_unit
                )

            if tl.max(tl.max(near.to(tl.int32), axis=1), axis=0) > 0:
                sources_n = (offs_n - shift).to(tl.int64)
                inv_n = tl.load(inv_nu_ptr + offs_n, mask=mask_n, other=0.0)
                deficit_n = tl.load(deficit_ptr + offs_n, mask=mask_n, other=0.0)
                slope, push, value, side = close_terms(
                    points_ptr,
                    sources_m,
                    mask_m,
                    inv_m,
                    deficit_m,
                    sources_n,
                    mask_n,
                    inv_n,
                    deficit_n,
                    x,
                    k,
                    s,
                    value_bits,
                    factor,
                    min_distance,
                    value_at_min,
                    slope_at_min,
                    push_at_min,
                    inv_energy_unit,
                    energy_offset,
                    inv_force_unit,
                    KIND,
                    HALF,
                    ANGLE,
                    FAST,
                    BLOCK_M,
                    BLOCK_N,
                )
                energy += tl.sum(tl.where(near, value, 0.0), axis=1)
                if WITH_FORCE:
                    axial += tl.sum(tl.where(near, slope, 0.0), axis=1)
                    force = push_apart(
                        force,
                        points_ptr,
                        sources_m,
                        mask_m,
                        inv_m,
                        sources_n,
                        mask_n,
                        inv_n,
                        tl.where(near, push, 0.0),
                        side,
                        offs_k,
                        0,
                        k,
                        k,
                    )

        tl.store(energy_ptr + out, energy.to(tl.float32))
        if WITH_FORCE:
            slot_ptrs = force_ptr + out[:, None] * k + offs_k[None, :]
            tl.store(slot_ptrs, finite(force), mask=(offs_k < k)[None, :])
            tl.store(axial_ptr + out, finite(axial * deficit_m))


def near_pairs(
    points: Tensor,
    rows: UnitRows,
    slots: Slots,
    plan: Plan,
    tiles: Tiles,
    pair: PairConstants,
    with_force: bool,
    cosine_terms: int,
    fast: bool,
) -> None:
    """Correct `slots` of `pairwise` in place wherever its rows met a close pair."""
    near_kernel_grid = (plan.num_items, tiles.block_m // NEAR_BLOCK)
    near_pairs_kernel[near_kernel_grid](
        points,
        rows.hi,
        rows.lo,
        rows.rest,
        rows.inv_nu,
        rows.deficit,
        plan.items,
        slots.force,
        slots.energy,
        slots.nearest,
        slots.axial,
        points.shape[1],
        pair.coefficient_bits,
        pair.near_cosine,
        pair.range_unit,
        *pair.exact64,
        *pair.to_raw,
        **pair.branches(with_force, fast),
        COSINE_TERMS=cosine_terms,
        WIDTH=rows.hi.shape[1],
        ITEM_M=tiles.block_m,
        BLOCK_M=NEAR_BLOCK,
        BLOCK_N=NEAR_BLOCK,
        TILES_RATIO=tiles.block_n // NEAR_BLOCK,
        num_warps=4,
    )
