"""phi of the pairs of rows in two spaces, and its derivatives in both cosines.

    phi = (b - a)^2  or  (arccos b - arccos a)^2,      a = <v_i, v_j>, b = <u_i, u_j>

The first kernel takes blocks of both matrices of cosines. It leaves out angles of pairs that are
near or nearly antipodal in either space, which a cosine does not tell well. The second one adds
them from the differences of the rows, in float64, and returns at once for rows that have none.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .near_pairs import add_near_force, source_rows, squared_difference
from .pair_terms import COSINE_SCALE
from .project_normalize import UnitRows
from .special_functions import angle, arcsine, rsqrt

# |c| above which 2 - 2 |c| < 2^-6 has lost too many digits for an angle
NEAR_COSINE: tl.constexpr = tl.constexpr((1.0 - 2.0**-7) * 65536.0)
# the derivatives of pairs that are not near are at most 4 pi / 0.125: times this they fit into fp16
SLOPE_SCALE: tl.constexpr = tl.constexpr(1024.0)


@triton.jit
def inverse_sine(c, FAST: tl.constexpr):
    """1 / sqrt(1 - c^2) of a pair that is not near: less the slope of the angle in the cosine."""
    return rsqrt((1.0 - c) * (1.0 + c), FAST)


@triton.jit
def phi_and_slopes(a, b, ANGLE: tl.constexpr, FAST: tl.constexpr):
    """phi and its derivatives in both cosines."""
    if ANGLE:
        # the angle of b less that of a
        difference = arcsine(a) - arcsine(b)
        twice = 2.0 * difference
        return (
            difference * difference,
            twice * inverse_sine(a, FAST),
            -twice * inverse_sine(b, FAST),
        )
    else:
        difference = b - a
        return difference * difference, -2.0 * difference, 2.0 * difference


@triton.jit
def is_near(a, b, mask):
    """Which pairs of a tile are near or nearly antipodal in either space."""
    return mask & ((tl.abs(a) > NEAR_COSINE) | (tl.abs(b) > NEAR_COSINE))


@triton.jit
def store_slopes(halves, slope, num_cols, offs_n, inside):
    """Store SLOPE_SCALE times a derivative as fp16 hi and lo."""
    scaled = slope * SLOPE_SCALE
    hi = scaled.to(tl.float16)
    lo = (scaled - hi.to(tl.float32)).to(tl.float16)
    tl.store(halves + offs_n[None, :], hi, mask=inside)
    tl.store(halves + num_cols + offs_n[None, :], lo, mask=inside)


# numbers that change with N: a variant for each that is 1 or a multiple of 16 would help nobody
@triton.jit(do_not_specialize=["valid_cols", "diagonal"])
def difference_kernel(
    a_ptr,
    b_ptr,
    a_slopes_ptr,
    b_slopes_ptr,
    sums_ptr,
    near_ptr,
    num_cols,
    valid_cols,
    diagonal,
    ANGLE: tl.constexpr,
    A_SLOPES: tl.constexpr,
    B_SLOPES: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (row tiles of the block,). a, b [rows, cols] -> sums of phi f64 and near i32 [rows].

    slopes [rows, 2, cols] fp16: the derivatives in a and in b that are wanted. near: whether a row
    has near pairs, which count for nothing here. Rows and columns that fill up a block are zero,
    and so is their phi; but NaN times zero is NaN.

    Row i and column i + diagonal of the block are the same point.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_offs = offs_m.to(tl.int64) * num_cols
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    has_near = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for begin in range(0, num_cols, BLOCK_N):
        offs_n = begin + tl.arange(0, BLOCK_N)
        inside = (offs_n < num_cols)[None, :]
        offs = row_offs[:, None] + offs_n[None, :]
        mask = (offs_n < valid_cols)[None, :] & (offs_n[None, :] != offs_m[:, None] + diagonal)
        a = tl.load(a_ptr + offs, mask=inside, other=0.0)
        b = tl.load(b_ptr + offs, mask=inside, other=0.0)
        if ANGLE:
            near = is_near(a, b, mask)
            has_near = tl.maximum(has_near, tl.max(near.to(tl.int32), axis=1))
            mask = mask & (near == 0)
        # perpendicular in both spaces, a pair that does not count has no phi and no derivatives
        a = tl.where(mask, a * (1.0 / COSINE_SCALE), 0.0)
        b = tl.where(mask, b * (1.0 / COSINE_SCALE), 0.0)
        phi, a_slope, b_slope = phi_and_slopes(a, b, ANGLE, FAST)
        total += tl.sum(phi, axis=1)
        if A_SLOPES:
            store_slopes(a_slopes_ptr + 2 * row_offs[:, None], a_slope, num_cols, offs_n, inside)
        if B_SLOPES:
            store_slopes(b_slopes_ptr + 2 * row_offs[:, None], b_slope, num_cols, offs_n, inside)
    before = tl.load(sums_ptr + offs_m)
    tl.store(sums_ptr + offs_m, before + total.to(tl.float64))
    tl.store(near_ptr + offs_m, has_near)


class SpaceRows(NamedTuple):
    """The caller's rows of one space and what turns them into unit rows."""

    points: Tensor
    rows: UnitRows


@triton.jit
def exact_angle(m, n, x, k):
    """Compute the angles of a tile, their slopes in the cosine and the side, float64.

    The slope is 0 where no direction exists: between multiples of one row.
    """
    side = tl.where(x < 0.0, -1.0, 1.0).to(tl.float64)
    d2, _ = squared_difference(m, n, side, k)
    m2 = d2 + (m.deficit[:, None] + n.deficit[None, :])
    r2 = tl.where(x < 0.0, 4.0 - m2, m2)
    q2 = tl.where(x < 0.0, m2, 4.0 - m2)
    sine = tl.sqrt(r2 * q2) * 0.5
    slope = tl.where(sine == 0.0, 0.0, -1.0 / sine)
    return angle(r2, q2), slope, side


@triton.jit(
    do_not_specialize=[
        "valid_rows",
        "valid_cols",
        "diagonal",
        "first_row",
        "first_col",
        "own_begin",
        "own_shift",
        "other_begin",
        "other_shift",
    ]
)
def near_difference_kernel(
    own_ptr,
    other_ptr,
    own,
    other,
    sums_ptr,
    force_ptr,
    near_ptr,
    num_cols,
    valid_rows,
    valid_cols,
    diagonal,
    first_row,
    first_col,
    own_begin,
    own_shift,
    other_begin,
    other_shift,
    own_k,
    other_k,
    slot_width,
    WITH_SUM: tl.constexpr,
    WITH_FORCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (row tiles of the block, column blocks of the force). Adds the near pairs of the block.

    phi is the same whichever space comes first, so a launch adds the forces in its own space, and
    one of two adds phi.

    own, other [rows, cols]: cosines. begin: where the set begins among the packed rows of a space;
    shift: from a packed row to the caller's row.
    """
    lane = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = tl.program_id(1) * BLOCK_K
    mask_m = lane < valid_rows
    if tl.max(tl.load(near_ptr + lane, mask=mask_m, other=0), axis=0) > 0:
        offs_m = first_row + lane
        own_m = source_rows(own.points, own.rows, own_begin + offs_m, own_shift, mask_m)
        other_m = source_rows(other.points, other.rows, other_begin + offs_m, other_shift, mask_m)
        offs_k = tl.arange(0, BLOCK_K)
        force = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float64)
        total = tl.zeros((BLOCK_M,), dtype=tl.float64)
        for begin in range(0, valid_cols, BLOCK_N):
            col = begin + tl.arange(0, BLOCK_N)
            mask_n = col < valid_cols
            mask = mask_m[:, None] & mask_n[None, :]
            offs = lane[:, None].to(tl.int64) * num_cols + col[None, :]
            x = tl.load(own_ptr + offs, mask=mask, other=0.0)
            y = tl.load(other_ptr + offs, mask=mask, other=0.0)
            near = is_near(x, y, mask & (col[None, :] != lane[:, None] + diagonal))
            if tl.max(tl.max(near.to(tl.int32), axis=1), axis=0) > 0:
                offs_n = first_col + col
                own_n = source_rows(own.points, own.rows, own_begin + offs_n, own_shift, mask_n)
                other_n = source_rows(
                    other.points, other.rows, other_begin + offs_n, other_shift, mask_n
                )
                theta, slope, side = exact_angle(own_m, own_n, x, own_k)
                other_theta, _, _ = exact_angle(other_m, other_n, y, other_k)
                difference = tl.where(near, theta - other_theta, 0.0)
                if WITH_SUM:
                    total += tl.sum(difference * difference, axis=1)
                if WITH_FORCE:
                    # the part of the force along v_i, side times the slope, is projected away
                    coefficient = tl.where(near, 2.0 * side * slope * difference, 0.0)
                    end_k = tl.minimum(first_k + BLOCK_K, own_k)
                    force = add_near_force(
                        force,
                        own_m,
                        own_n,
                        coefficient,
                        side,
                        first_k + offs_k,
                        first_k,
                        end_k,
                        own_k,
                    )
        if WITH_SUM and first_k == 0:
            before = tl.load(sums_ptr + lane, mask=mask_m, other=0.0)
            tl.store(sums_ptr + lane, before + total, mask=mask_m)
        if WITH_FORCE:
            mask_k = mask_m[:, None] & (first_k + offs_k < own_k)[None, :]
            offs = lane[:, None].to(tl.int64) * slot_width + first_k + offs_k[None, :]
            before = tl.load(force_ptr + offs, mask=mask_k, other=0.0)
            tl.store(force_ptr + offs, (before + force).to(tl.float32), mask=mask_k)
