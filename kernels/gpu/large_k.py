"""The pairwise sweep for k > 128: blocks of the cosine matrix through the vendor's GEMM.

    S = V_rows V_cols^T   (GEMM)    F(S), F'(S)   (one kernel)    G += F' V_cols   (GEMM)

Blocks are as tall as the memory bound allows, so the products run at the GEMM's speed and the
elementwise kernel at the memory's; they are no deeper than what the tensor cores, which truncate,
sum without harm. Operands are the same fp16 pairs as in `pairwise`. Close pairs are left out by the
elementwise kernel and added by a second one, which returns at once for rows that have none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .near_pairs import close_terms, finite, push_apart
from .pair_function import (
    COSINE_SCALE,
    LOG,
    PairConstants,
    fast_terms,
    log2,
)
from .plan import NEAR_BLOCK, Plan, Slots
from .project_normalize import UnitRows

# rows of a tile of packed rows
ROW_TILE = 64
COEFFICIENT_ROWS = 16
COEFFICIENT_COLS = 128
# columns of G that one program of the near-pair kernel owns
NEAR_COLUMNS = 128
# elements of a block of S: at least the first number, at most the last, else those of the points
BLOCK_ELEMENTS = (1 << 20, 1 << 25)
# columns of a block, the depth of the second product: a multiple of the row tile
BLOCK_COLS = 512
# coordinates in one product of unit rows
BLOCK_DEPTH = 512


# numbers that change with N: a variant for each that is 1 or a multiple of 16 would help nobody
@triton.jit(do_not_specialize=["valid_cols", "diagonal"])
def coefficient_kernel(
    x_ptr,
    coefficient_ptr,
    energy_ptr,
    nearest_ptr,
    num_cols,
    valid_cols,
    diagonal,
    s,
    bits,
    near_cosine,
    range_unit,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    ANGLE: tl.constexpr,
    WITH_FORCE: tl.constexpr,
    FAST: tl.constexpr,
    FORCE_HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (row tiles of the block,). x [rows, cols] -> row sums of F for a slot, raw F' in fp16.

    coefficient [rows, 2, cols] takes its halves hi and lo, or [rows, 1, cols] the first.

    Both sides are padded to multiples of 64 by rows that are zero. Row i and column i + diagonal
    of the block are the same point.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_offs = offs_m.to(tl.int64) * num_cols
    halves = coefficient_ptr + row_offs[:, None] * FORCE_HALVES
    energy = tl.zeros((BLOCK_M,), dtype=tl.float32)
    nearest = tl.full((BLOCK_M,), -3.0e38, dtype=tl.float32)
    for begin in range(0, num_cols, BLOCK_N):
        offs_n = begin + tl.arange(0, BLOCK_N)
        inside = (offs_n < num_cols)[None, :]
        offs = row_offs[:, None] + offs_n[None, :]
        mask = (offs_n < valid_cols)[None, :]
        if WITH_FORCE:
            mask = mask & (offs_n[None, :] != offs_m[:, None] + diagonal)
        else:
            mask = mask & (offs_n[None, :] > offs_m[:, None] + diagonal)
        x = tl.where(mask, tl.load(x_ptr + offs, mask=inside, other=0.0), 0.0)
        closeness = x
        if HALF or ANGLE:
            closeness = tl.abs(x)
        nearest = tl.maximum(nearest, tl.max(closeness, axis=1))
        near = closeness > near_cosine * COSINE_SCALE
        coefficient, terms = fast_terms(tl.where(near, 0.0, x), s, bits, KIND, HALF, ANGLE, FAST)
        if KIND == LOG:
            terms = log2(terms, FAST)
        mask = mask & (near == 0)
        energy += tl.sum(tl.where(mask, terms, 0.0), axis=1)
        if WITH_FORCE:
            coefficient = tl.where(mask, coefficient, 0.0)
            hi = coefficient.to(tl.float16)
            tl.store(halves + offs_n[None, :], hi, mask=inside)
            if FORCE_HALVES == 2:
                lo = (coefficient - hi.to(tl.float32)).to(tl.float16)
                tl.store(halves + num_cols + offs_n[None, :], lo, mask=inside)
    tl.store(energy_ptr + offs_m, tl.load(energy_ptr + offs_m) + energy * range_unit)
    tl.store(nearest_ptr + offs_m, nearest)


@triton.jit(
    do_not_specialize=["valid_rows", "valid_cols", "diagonal", "first_row", "first_col", "shift"]
)
def near_block_kernel(
    x_ptr,
    points_ptr,
    inv_nu_ptr,
    deficit_ptr,
    force_ptr,
    energy_ptr,
    axial_ptr,
    nearest_ptr,
    num_cols,
    valid_rows,
    valid_cols,
    diagonal,
    first_row,
    first_col,
    shift,
    k,
    slot_width,
    near_cosine,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (row tiles of the block, column blocks of G). Adds the close pairs of the block."""
    lane = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = tl.program_id(1) * BLOCK_K
    mask_m = lane < valid_rows
    nearest = tl.max(tl.load(nearest_ptr + lane, mask=mask_m, other=-3.0e38), axis=0)
    if nearest > near_cosine * COSINE_SCALE:
        offs_m = first_row + lane
        sources_m = (offs_m - shift).to(tl.int64)
        inv_m = tl.load(inv_nu_ptr + offs_m, mask=mask_m, other=0.0)
        deficit_m = tl.load(deficit_ptr + offs_m, mask=mask_m, other=0.0)
        offs_k = tl.arange(0, BLOCK_K)
        force = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float64)
        energy = tl.zeros((BLOCK_M,), dtype=tl.float64)
        axial = tl.zeros((BLOCK_M,), dtype=tl.float64)
        for begin in range(0, valid_cols, BLOCK_N):
            col = begin + tl.arange(0, BLOCK_N)
            mask_n = col < valid_cols
            mask = mask_m[:, None] & mask_n[None, :]
            offs = lane[:, None].to(tl.int64) * num_cols + col[None, :]
            x = tl.load(x_ptr + offs, mask=mask, other=0.0)
            if WITH_FORCE:
                mask = mask & (col[None, :] != lane[:, None] + diagonal)
            else:
                mask = mask & (col[None, :] > lane[:, None] + diagonal)
            if HALF or ANGLE:
                near = mask & (tl.abs(x) > near_cosine * COSINE_SCALE)
            else:
                near = mask & (x > near_cosine * COSINE_SCALE)
            if tl.max(tl.max(near.to(tl.int32), axis=1), axis=0) > 0:
                offs_n = first_col + col
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
                        first_k + offs_k,
                        first_k,
                        tl.minimum(first_k + BLOCK_K, k),
                        k,
                    )
        if first_k == 0:
            before = tl.load(energy_ptr + lane, mask=mask_m, other=0.0)
            tl.store(energy_ptr + lane, (before + energy).to(tl.float32), mask=mask_m)
            if WITH_FORCE:
                before = tl.load(axial_ptr + lane, mask=mask_m, other=0.0)
                axial = before + axial * deficit_m
                tl.store(axial_ptr + lane, finite(axial), mask=mask_m)
        if WITH_FORCE:
            mask_k = mask_m[:, None] & (first_k + offs_k < k)[None, :]
            offs = lane[:, None].to(tl.int64) * slot_width + first_k + offs_k[None, :]
            before = tl.load(force_ptr + offs, mask=mask_k, other=0.0)
            tl.store(force_ptr + offs, finite(before + force), mask=mask_k)


def splits(device: torch.device) -> bool:
    """Whether GEMMs take the fp16 halves: where they return float32; else they take float32."""
    return device.type != "cuda" or torch.version.hip is None


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, of matrices given as fp16 halves: [M, H, D] and [H, D, N]."""
    if not splits(left.device):
        return left.float().sum(1) @ right.float().sum(0)
    total = _mm(left[:, 0], right[0])
    if left.shape[1] == 2:
        # hi lo + lo hi as one GEMM of twice the depth
        total += _mm(left.flatten(1), right.flip(0).flatten(0, 1))
    return total


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def block_cosines(left: Tensor, right: Tensor) -> Tensor:
    """COSINE_SCALE * c of rows given as fp16 halves: [M, H, width] and [H, N, width]."""
    parts = zip(left.split(BLOCK_DEPTH, 2), right.split(BLOCK_DEPTH, 2), strict=True)
    rows, cols = next(parts)
    x = product(rows, cols.mT)
    for rows, cols in parts:
        x += product(rows, cols.mT)
    return x


def large_k(
    points: Tensor,
    rows: UnitRows,
    sizes: tuple[int, ...],
    plan: Plan,
    block_m: int,
    pair: PairConstants,
    with_force: bool,
    terms: tuple[int, int],
    fast: bool,
) -> Slots:
    """Raw energies, forces and axial sums; one slot a row tile, so slots are packed rows."""
    width = rows.hi.shape[1]
    slots = Slots(plan.num_row_tiles, block_m, width, with_force, points.device)
    for result in (slots.energy, slots.force, slots.axial):
        result.zero_()
    low, high = BLOCK_ELEMENTS
    elements = min(max(points.numel(), low), high)
    source = 0
    for n, first in zip(sizes, plan.first_packed_row, strict=True):
        padded = -(-n // block_m) * block_m
        cols = min(BLOCK_COLS, padded)
        step = max(elements // max(cols * block_m, 1), 1) * block_m
        for row in range(0, n, step):
            i = slice(first + row, first + min(row + step, padded))
            left = _halves(rows, i, terms[0], 1)
            for col in range(0, n, cols):
                j = slice(first + col, first + min(col + cols, padded))
                if not with_force and j.stop <= i.start:
                    continue
                x = block_cosines(left, _halves(rows, j, terms[0], 0))
                columns = _halves(rows, j, terms[1], 0) if with_force else None
                valid = (min(i.stop, first + n) - i.start, min(j.stop, first + n) - j.start)
                _add_block(points, rows, slots, x, columns, i, j, valid, first - source, pair, fast)
        source += n
    return slots


def _halves(rows: UnitRows, which: slice, terms: int, dim: int) -> Tensor:
    """The fp16 halves of some rows that a product of so many terms takes, stacked along `dim`."""
    return torch.stack([rows.hi[which], rows.lo[which]][: 2 if terms == 3 else 1], dim)


def _add_block(
    points: Tensor,
    rows: UnitRows,
    slots: Slots,
    x: Tensor,
    columns: Tensor | None,
    i: slice,
    j: slice,
    valid: tuple[int, int],
    shift: int,
    pair: PairConstants,
    fast: bool,
) -> None:
    """Add what the columns j do to the rows i, both padded, of cosines x.

    columns: the halves of the rows j, [H, cols, width], or None for energies alone.
    valid: numbers of rows and columns that are real.
    shift: from a packed row to the caller's row.
    """
    k = points.shape[1]
    num_rows, num_cols = x.shape
    with_force = columns is not None
    force, axial, coefficient = slots.force, slots.axial, x
    if columns is not None:
        force, axial = force[i], axial[i]
        coefficient = x.new_empty(num_rows, len(columns), num_cols, dtype=torch.float16)
    # row i of the block is column i + diagonal of it
    diagonal = i.start - j.start
    coefficient_kernel[(triton.cdiv(num_rows, COEFFICIENT_ROWS),)](
        x,
        coefficient,
        slots.energy[i],
        slots.nearest[i],
        num_cols,
        valid[1],
        diagonal,
        pair.s,
        pair.coefficient_bits,
        pair.near_cosine,
        pair.range_unit,
        **pair.branches(with_force, fast),
        FORCE_HALVES=coefficient.shape[1] if with_force else 1,
        BLOCK_M=COEFFICIENT_ROWS,
        BLOCK_N=COEFFICIENT_COLS,
        num_warps=4,
    )
    if columns is not None:
        force.add_(product(coefficient, columns), alpha=pair.range_unit)
    near_blocks = triton.cdiv(k, NEAR_COLUMNS) if with_force else 1
    near_block_kernel[(triton.cdiv(num_rows, NEAR_BLOCK), near_blocks)](
        x,
        points,
        rows.inv_nu,
        rows.deficit,
        force,
        slots.energy[i],
        axial,
        slots.nearest[i],
        num_cols,
        *valid,
        diagonal,
        i.start,
        j.start,
        shift,
        k,
        slots.force.shape[1],
        pair.near_cosine,
        *pair.exact64,
        *pair.to_raw,
        **pair.branches(with_force, fast),
        BLOCK_M=NEAR_BLOCK,
        BLOCK_N=NEAR_BLOCK,
        BLOCK_K=NEAR_COLUMNS,
        num_warps=4,
    )
