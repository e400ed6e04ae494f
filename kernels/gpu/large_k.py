"""The pairwise sweep for k > 128: blocks of the cosine matrix through the vendor's GEMM.

    S = V_rows V_cols^T   (GEMM)    F(S), F'(S)   (one kernel)    G += F' V_cols   (GEMM)

Blocks are as tall as the memory bound allows, so the products run at the GEMM's speed and the
elementwise kernel at the memory's. Their depth is limited, because tensor cores truncate: a longer
sum would lose digits. Operands are the same fp16 pairs as in `pairwise`. Near pairs are left out by
the elementwise kernel and added by a second one, which returns at once for rows that have none.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .near_pairs import add_near_force, far_terms, finite, is_near, near_terms, source_rows
from .pair_terms import COSINE_SCALE, PairConstants
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
# columns of a block that one product takes, its depth: a multiple of the row tile
BLOCK_COLS = 512
# coordinates in one product of unit rows
BLOCK_DEPTH = 512


# numbers that change with N: a variant for each that is 1 or a multiple of 16 would help nobody
@triton.jit(do_not_specialize=["valid_cols", "diagonal"])
def coefficient_kernel(
    x_ptr,
    coefficient_ptr,
    slots,
    num_cols,
    valid_cols,
    diagonal,
    pair,
    WITH_FORCE: tl.constexpr,
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
        closeness = tl.abs(x) if pair.two_ended else x
        nearest = tl.maximum(nearest, tl.max(closeness, axis=1))
        coefficient, terms = far_terms(x, mask, is_near(x, mask, pair), pair)
        energy += tl.sum(terms, axis=1)
        if WITH_FORCE:
            hi = coefficient.to(tl.float16)
            tl.store(halves + offs_n[None, :], hi, mask=inside)
            if FORCE_HALVES == 2:
                lo = (coefficient - hi.to(tl.float32)).to(tl.float16)
                tl.store(halves + num_cols + offs_n[None, :], lo, mask=inside)
    before = tl.load(slots.energy + offs_m)
    tl.store(slots.energy + offs_m, before + energy * pair.range_unit)
    tl.store(slots.nearest + offs_m, nearest)


@triton.jit(
    do_not_specialize=["valid_rows", "valid_cols", "diagonal", "first_row", "first_col", "shift"]
)
def near_block_kernel(
    x_ptr,
    points_ptr,
    rows,
    slots,
    num_cols,
    valid_rows,
    valid_cols,
    diagonal,
    first_row,
    first_col,
    shift,
    k,
    slot_width,
    pair,
    WITH_FORCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (row tiles of the block, column blocks of G). Adds the near pairs of the block."""
    lane = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = tl.program_id(1) * BLOCK_K
    mask_m = lane < valid_rows
    nearest = tl.max(tl.load(slots.nearest + lane, mask=mask_m, other=-3.0e38), axis=0)
    if nearest > pair.near_cosine * COSINE_SCALE:
        m = source_rows(points_ptr, rows, first_row + lane, shift, mask_m)
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
            near = is_near(x, mask, pair)
            if tl.max(tl.max(near.to(tl.int32), axis=1), axis=0) > 0:
                n = source_rows(points_ptr, rows, first_col + col, shift, mask_n)
                along_v, along_d, value, side = near_terms(m, n, x, k, pair)
                energy += tl.sum(tl.where(near, value, 0.0), axis=1)
                if WITH_FORCE:
                    axial += tl.sum(tl.where(near, along_v, 0.0), axis=1)
                    along_d = tl.where(near, along_d, 0.0)
                    end_k = tl.minimum(first_k + BLOCK_K, k)
                    force = add_near_force(
                        force, m, n, along_d, side, first_k + offs_k, first_k, end_k, k
                    )
        if first_k == 0:
            before = tl.load(slots.energy + lane, mask=mask_m, other=0.0)
            tl.store(slots.energy + lane, (before + energy).to(tl.float32), mask=mask_m)
            if WITH_FORCE:
                before = tl.load(slots.axial + lane, mask=mask_m, other=0.0)
                axial = before + axial * m.deficit
                tl.store(slots.axial + lane, finite(axial), mask=mask_m)
        if WITH_FORCE:
            mask_k = mask_m[:, None] & (first_k + offs_k < k)[None, :]
            offs = lane[:, None].to(tl.int64) * slot_width + first_k + offs_k[None, :]
            before = tl.load(slots.force + offs, mask=mask_k, other=0.0)
            tl.store(slots.force + offs, finite(before + force), mask=mask_k)


# whether a GEMM can add the product of fp16 matrices to a float32 one: older versions refuse
ADDS_TO_FLOAT32 = torch.__version__ >= "2.10"


def takes_halves(device: torch.device) -> bool:
    """Whether GEMMs take the fp16 halves: where they return float32; else they take float32."""
    return device.type != "cuda" or torch.version.hip is None


def add_product(total: Tensor | None, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """total + scale left @ right, in place, in float32; without `total` a new matrix."""
    if not left.is_cuda or left.dtype == torch.float32:
        left, right = left.float(), right.float()
        return left @ right if total is None else total.addmm_(left, right, alpha=scale)
    if total is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    if ADDS_TO_FLOAT32:
        return torch.addmm(total, left, right, out_dtype=torch.float32, alpha=scale, out=total)
    return total.add_(torch.mm(left, right, out_dtype=torch.float32), alpha=scale)


class Operands(NamedTuple):
    """Unit rows as the GEMMs take them, made once for all blocks.

    cosines: pairs of [packed, depth]. COSINE_SCALE c_ij = sum over the pairs of <left_i, right_j>.
    columns: [packed, width] each, by which `coefficient_halves` are multiplied in turn.
    """

    cosines: list[tuple[Tensor, Tensor]]
    columns: list[Tensor]

    @classmethod
    def of(cls, rows: UnitRows, terms: tuple[int, int]) -> "Operands":
        """Arrange unit rows for so many terms of each product, small terms first."""
        if not takes_halves(rows.hi.device):
            whole = rows.hi.float() + rows.lo
            return cls([(part, part) for part in whole.split(BLOCK_DEPTH, 1)], [whole])
        cosines = []
        parts = zip(rows.hi.split(BLOCK_DEPTH, 1), rows.lo.split(BLOCK_DEPTH, 1), strict=True)
        for hi, lo in parts:
            if terms[0] == 3:
                # hi lo + lo hi as one GEMM of twice the depth
                depth = hi.shape[1]
                both = torch.cat([hi, lo, hi], 1)
                cosines.append((both[:, : 2 * depth], both[:, depth:]))
            cosines.append((hi, hi))
        return cls(cosines, [rows.hi, rows.lo, rows.hi] if terms[1] == 3 else [rows.hi])

    def cosine_block(self, rows: slice, cols: slice) -> Tensor:
        """COSINE_SCALE c of some packed rows and columns, float32 [rows, cols]."""
        x = None
        for left, right in self.cosines:
            x = add_product(x, left[rows], right[cols].mT)
        assert x is not None
        return x

    def add_force(self, force: Tensor, coefficient: Tensor, cols: slice, scale: float) -> None:
        """force [rows, width] += scale coefficient [rows, H, cols] columns, the packed `cols`."""
        for begin in range(0, coefficient.shape[2], BLOCK_COLS):
            some = slice(begin, begin + BLOCK_COLS)
            parts = coefficient_halves(coefficient[:, :, some])
            for part, columns in zip(parts, self.columns, strict=True):
                add_product(force, part, columns[cols][some], scale)


def coefficient_halves(coefficient: Tensor) -> list[Tensor]:
    """Matrices [rows, cols] of coefficients [rows, H, cols], for the `Operands.columns`."""
    if not takes_halves(coefficient.device):
        return [coefficient.float().sum(1)]
    if coefficient.shape[1] == 1:
        return [coefficient[:, 0]]
    hi, lo = coefficient.unbind(1)
    return [lo, hi, hi]


@dataclass(frozen=True)
class Block:
    """A block of the cosine matrix: packed rows against packed columns of one set, both padded."""

    rows: slice
    cols: slice
    valid_rows: int
    valid_cols: int
    shift: int  # from a packed row to the caller's row

    @property
    def diagonal(self) -> int:
        """Row i of the block is column i + diagonal of it."""
        return self.rows.start - self.cols.start


def blocks(
    sizes: tuple[int, ...], plan: Plan, block_m: int, elements: int, upper: bool
) -> Iterator[Block]:
    """List the blocks of all sets, of about so many elements; `upper`: none below the diagonal.

    The blocks that share their rows follow one another.
    """
    source = 0
    for n, first in zip(sizes, plan.first_packed_row, strict=True):
        padded = -(-n // block_m) * block_m
        # several products deep where all rows fit
        num_cols = min(max(elements // max(padded * BLOCK_COLS, 1), 1) * BLOCK_COLS, padded)
        num_rows = max(elements // max(num_cols * block_m, 1), 1) * block_m
        for row in range(0, n, num_rows):
            rows = slice(first + row, first + min(row + num_rows, padded))
            for col in range(0, n, num_cols):
                cols = slice(first + col, first + min(col + num_cols, padded))
                if upper and cols.stop <= rows.start:
                    continue
                valid_rows = min(rows.stop, first + n) - rows.start
                valid_cols = min(cols.stop, first + n) - cols.start
                yield Block(rows, cols, valid_rows, valid_cols, first - source)
        source += n


def large_k(
    points: Tensor,
    rows: UnitRows,
    sizes: tuple[int, ...],
    plan: Plan,
    block_m: int,
    pair: PairConstants,
    with_force: bool,
    terms: tuple[int, int],
    options: Mapping[str, int],
) -> Slots:
    """Raw energies, forces and axial sums; one slot a row tile, so slots are packed rows.

    options: of the launch of the coefficients, by `backend.registers`.
    """
    width = rows.hi.shape[1]
    slots = Slots.empty(plan.num_row_tiles, block_m, width, with_force, points.device)
    for result in (slots.energy, slots.force, slots.axial):
        result.zero_()
    low, high = BLOCK_ELEMENTS
    elements = min(max(points.numel(), low), high)
    operands = Operands.of(rows, terms)
    halves = (2 if terms[1] == 3 else 1) if with_force else 0
    for block in blocks(sizes, plan, block_m, elements, not with_force):
        _add_block(points, rows, operands, slots, block, halves, pair, options)
    return slots


def _add_block(
    points: Tensor,
    rows: UnitRows,
    operands: Operands,
    slots: Slots,
    block: Block,
    halves: int,
    pair: PairConstants,
    options: Mapping[str, int],
) -> None:
    """Add what the columns of a block do to its rows.

    halves: how many fp16 numbers hold a coefficient, 0 without forces.
    """
    x = operands.cosine_block(block.rows, block.cols)
    k = points.shape[1]
    num_rows, num_cols = x.shape
    with_force = halves > 0
    slot_width = slots.force.shape[1]
    coefficient, near_blocks = x, 1
    # without forces their arrays are empty, and so is this part of them
    slots = Slots(*(part[block.rows] for part in slots))
    if with_force:
        coefficient = x.new_empty(num_rows, halves, num_cols, dtype=torch.float16)
        near_blocks = triton.cdiv(k, NEAR_COLUMNS)
    coefficient_kernel[(triton.cdiv(num_rows, COEFFICIENT_ROWS),)](
        x,
        coefficient,
        slots,
        num_cols,
        block.valid_cols,
        block.diagonal,
        pair.arguments,
        WITH_FORCE=with_force,
        FORCE_HALVES=max(halves, 1),
        BLOCK_M=COEFFICIENT_ROWS,
        BLOCK_N=COEFFICIENT_COLS,
        num_warps=4,
        **options,
    )
    if with_force:
        operands.add_force(slots.force, coefficient, block.cols, pair.arguments.range_unit)
    near_block_kernel[(triton.cdiv(num_rows, NEAR_BLOCK), near_blocks)](
        x,
        points,
        rows,
        slots,
        num_cols,
        block.valid_rows,
        block.valid_cols,
        block.diagonal,
        block.rows.start,
        block.cols.start,
        block.shift,
        k,
        slot_width,
        pair.arguments,
        WITH_FORCE=with_force,
        BLOCK_M=NEAR_BLOCK,
        BLOCK_N=NEAR_BLOCK,
        BLOCK_K=NEAR_COLUMNS,
        num_warps=4,
    )
