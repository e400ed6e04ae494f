"""The pairwise sweep for k > 128: blocks of the cosine matrix through the vendor's GEMM.

    S = V_rows V_cols^T   (GEMM)    F(S), F'(S)   (one kernel)    G += F' V_cols   (GEMM)

Blocks are as large as the memory bound allows, so the products run at the GEMM's speed and the
elementwise kernel at the memory's. Operands are the same fp16 pairs as in `pairwise`. Close pairs
are left out by the elementwise kernel and added by a second one, which returns at once for rows
that have none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .near_pairs import load_unit, squared_difference
from .pair_function import (
    COSINE_SCALE,
    LOG,
    UNIT_SCALE,
    PairConstants,
    exact_terms,
    fast_terms,
    log2,
)
from .plan import NEAR_BLOCK, Plan, Slots
from .project_normalize import UnitRows

COEFFICIENT_ROWS = 16
COEFFICIENT_COLS = 128
# columns of G that one program of the near-pair kernel owns
NEAR_COLUMNS = 128
# elements of a block of S: at least the first number, at most the last, else those of the points
BLOCK_ELEMENTS = (1 << 20, 1 << 25)
BLOCK_COLS = 4096  # a multiple of the row tile


@triton.jit
def coefficient_kernel(
    x_ptr,
    hi_ptr,
    lo_ptr,
    energy_ptr,
    nearest_ptr,
    num_cols,
    valid_cols,
    diagonal,
    s,
    bits,
    near_cosine,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    ANGLE: tl.constexpr,
    WITH_FORCE: tl.constexpr,
    UPPER: tl.constexpr,
    FORCE_TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FAST: tl.constexpr,
):
    """Grid (row tiles of the block,). x [rows, cols] -> raw F' as fp16 hi + lo, row sums of raw F.

    Both sides are padded to multiples of 64 by rows that are zero. Row i and column i + diagonal
    of the block are the same point.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_offs = offs_m.to(tl.int64) * num_cols
    energy = tl.zeros((BLOCK_M,), dtype=tl.float32)
    nearest = tl.full((BLOCK_M,), -3.0e38, dtype=tl.float32)
    for begin in range(0, num_cols, BLOCK_N):
        offs_n = begin + tl.arange(0, BLOCK_N)
        inside = (offs_n < num_cols)[None, :]
        offs = row_offs[:, None] + offs_n[None, :]
        mask = (offs_n < valid_cols)[None, :]
        if UPPER:
            mask = mask & (offs_n[None, :] > offs_m[:, None] + diagonal)
        else:
            mask = mask & (offs_n[None, :] != offs_m[:, None] + diagonal)
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
            tl.store(hi_ptr + offs, hi, mask=inside)
            if FORCE_TERMS == 3:
                lo = (coefficient - hi.to(tl.float32)).to(tl.float16)
                tl.store(lo_ptr + offs, lo, mask=inside)
    tl.store(energy_ptr + offs_m, tl.load(energy_ptr + offs_m) + energy)
    tl.store(nearest_ptr + offs_m, nearest)


@triton.jit
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
    s,
    near_cosine,
    min_distance,
    value_at_min,
    slope_at_min,
    inv_energy_unit,
    energy_offset,
    inv_force_unit,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    ANGLE: tl.constexpr,
    WITH_FORCE: tl.constexpr,
    UPPER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FAST: tl.constexpr,
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
        force = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        energy = tl.zeros((BLOCK_M,), dtype=tl.float32)
        axial = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for begin in range(0, valid_cols, BLOCK_N):
            col = begin + tl.arange(0, BLOCK_N)
            mask_n = col < valid_cols
            mask = mask_m[:, None] & mask_n[None, :]
            offs = lane[:, None].to(tl.int64) * num_cols + col[None, :]
            x = tl.load(x_ptr + offs, mask=mask, other=0.0)
            if UPPER:
                mask = mask & (col[None, :] > lane[:, None] + diagonal)
            else:
                mask = mask & (col[None, :] != lane[:, None] + diagonal)
            if HALF or ANGLE:
                near = mask & (tl.abs(x) > near_cosine * COSINE_SCALE)
            else:
                near = mask & (x > near_cosine * COSINE_SCALE)
            if tl.max(tl.max(near.to(tl.int32), axis=1), axis=0) > 0:
                offs_n = first_col + col
                sources_n = (offs_n - shift).to(tl.int64)
                inv_n = tl.load(inv_nu_ptr + offs_n, mask=mask_n, other=0.0)
                deficit_n = tl.load(deficit_ptr + offs_n, mask=mask_n, other=0.0)
                side = tl.where(x < 0.0, -1.0, 1.0)
                side64 = side.to(tl.float64)
                d2 = squared_difference(
                    points_ptr,
                    sources_m,
                    mask_m,
                    inv_m,
                    sources_n,
                    mask_n,
                    inv_n,
                    side64,
                    k,
                    BLOCK_M,
                    BLOCK_N,
                )
                m2 = d2.to(tl.float32) + deficit_m[:, None] + deficit_n[None, :]
                r2 = tl.where(x < 0.0, 4.0 - m2, m2)
                q2 = tl.where(x < 0.0, m2, 4.0 - m2)
                slope, value = exact_terms(
                    r2,
                    q2,
                    s,
                    min_distance,
                    value_at_min,
                    slope_at_min,
                    KIND,
                    HALF,
                    ANGLE,
                    FAST,
                )
                value = (value - energy_offset) * inv_energy_unit
                energy += tl.sum(tl.where(near, value, 0.0), axis=1)
                if WITH_FORCE:
                    slope = tl.where(near, side * slope * inv_force_unit, 0.0)
                    axial += tl.sum(slope, axis=1)
                    slope64 = slope.to(tl.float64) * UNIT_SCALE
                    for column in range(first_k, tl.minimum(first_k + BLOCK_K, k)):
                        a = load_unit(points_ptr, sources_m, mask_m, inv_m, column, k)
                        b = load_unit(points_ptr, sources_n, mask_n, inv_n, column, k)
                        d = a[:, None] - side64 * b[None, :]
                        push = tl.sum(slope64 * d, axis=1).to(tl.float32)
                        force -= tl.where(offs_k[None, :] == column - first_k, push[:, None], 0.0)
        if first_k == 0:
            before = tl.load(energy_ptr + lane, mask=mask_m, other=0.0)
            tl.store(energy_ptr + lane, before + energy, mask=mask_m)
            if WITH_FORCE:
                before = tl.load(axial_ptr + lane, mask=mask_m, other=0.0)
                tl.store(axial_ptr + lane, before + axial, mask=mask_m)
        if WITH_FORCE:
            mask_k = mask_m[:, None] & (first_k + offs_k < k)[None, :]
            offs = lane[:, None].to(tl.int64) * slot_width + first_k + offs_k[None, :]
            before = tl.load(force_ptr + offs, mask=mask_k, other=0.0)
            tl.store(force_ptr + offs, before + force, mask=mask_k)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of fp16 matrices, summed and returned in float32."""
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    # elsewhere no GEMM returns more digits than it takes
    return a.float() @ b.float()


def block_cosines(rows: UnitRows, i: slice, j: slice, terms: int) -> Tensor:
    """COSINE_SCALE * c of rows i and j; three terms are one GEMM of three times the depth."""
    if terms == 1:
        return product(rows.hi[i], rows.hi[j].mT)
    left = torch.cat([rows.hi[i], rows.hi[i], rows.lo[i]], 1)
    right = torch.cat([rows.hi[j], rows.lo[j], rows.hi[j]], 1)
    return product(left, right.mT)


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
            for col in range(0, n, cols):
                i = slice(first + row, first + min(row + step, padded))
                j = slice(first + col, first + min(col + cols, padded))
                if not with_force and j.stop <= i.start:
                    continue
                valid = (min(i.stop, first + n) - i.start, min(j.stop, first + n) - j.start)
                _block(
                    points, rows, slots, i, j, valid, first - source, pair, with_force, terms, fast
                )
        source += n
    return slots


def _block(
    points: Tensor,
    rows: UnitRows,
    slots: Slots,
    i: slice,
    j: slice,
    valid: tuple[int, int],
    shift: int,
    pair: PairConstants,
    with_force: bool,
    terms: tuple[int, int],
    fast: bool,
) -> None:
    """Add what the columns j do to the rows i, both padded; `valid` of them are real."""
    k = points.shape[1]
    x = block_cosines(rows, i, j, terms[0])
    num_rows, num_cols = x.shape
    halves = x.new_empty((terms[1] > 1) + 1, *x.shape, dtype=torch.float16) if with_force else x
    hi, lo = halves[0], halves[-1]
    # row i of the block is column i + diagonal of it
    diagonal = i.start - j.start
    force, axial = (slots.force[i], slots.axial[i]) if with_force else (slots.force, slots.axial)
    coefficient_kernel[(triton.cdiv(num_rows, COEFFICIENT_ROWS),)](
        x,
        hi,
        lo,
        slots.energy[i],
        slots.nearest[i],
        num_cols,
        valid[1],
        diagonal,
        pair.s,
        pair.coefficient_bits,
        pair.near_cosine,
        KIND=pair.kind,
        HALF=pair.half_space,
        ANGLE=pair.angular,
        WITH_FORCE=with_force,
        UPPER=not with_force,
        FORCE_TERMS=terms[1],
        BLOCK_M=COEFFICIENT_ROWS,
        BLOCK_N=COEFFICIENT_COLS,
        FAST=fast,
        num_warps=4,
    )
    if with_force:
        force += product(hi, rows.hi[j])
        if terms[1] == 3:
            force += product(hi, rows.lo[j])
            force += product(lo, rows.hi[j])
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
        pair.s,
        pair.near_cosine,
        pair.min_distance,
        pair.value_at_min,
        pair.slope_at_min,
        1.0 / pair.energy_unit,
        pair.energy_offset,
        1.0 / pair.force_unit,
        KIND=pair.kind,
        HALF=pair.half_space,
        ANGLE=pair.angular,
        WITH_FORCE=with_force,
        UPPER=not with_force,
        BLOCK_M=NEAR_BLOCK,
        BLOCK_N=NEAR_BLOCK,
        BLOCK_K=NEAR_COLUMNS,
        FAST=fast,
        num_warps=4,
    )
