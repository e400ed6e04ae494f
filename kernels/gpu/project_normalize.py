"""Weights to projected rows, rows to unit rows.

    p_i = P w_i (or the row itself)
    nu_i = sqrt(|p_i|^2 + eps),  v_i = p_i / nu_i,  deficit_i = 1 - |v_i|^2 = eps / nu_i^2

The norms are summed in float64: its range needs no scaling by the largest entry, and 1/nu is then
exact enough for the differences of near rows. Unit rows go out packed by set (see `plan`), padding
zero, as pairs hi + lo: of fp16 numbers that hold 256 v for the tensor cores (and in few dimensions
a third one, `rest`), or of float32 numbers that hold v, a column after the other, for the
differences of `direct`.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pair_terms import UNIT_SCALE
from .plan import Plan, load_row_tile, upload

# columns of the weights that one step of the projection takes
PROJECTION_BLOCK_D = 32
# weights of one launch: their addresses are arguments of the kernel, which may take 4 KB in all
MAX_WEIGHTS = 128
SET_FIELDS: tl.constexpr = tl.constexpr(5)
# columns of a weight that one load takes: 16 bytes of half precision
VECTOR: tl.constexpr = tl.constexpr(8)
SMALLEST_NORMAL: tl.constexpr = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def store_norms(rows, offs, square, eps):
    """1/nu and the deficit of rows with |p|^2 = square, float64; returns 1/nu."""
    nu2 = square + eps
    # NaN is not dead: it has to reach the result
    dead = nu2 < SMALLEST_NORMAL * SMALLEST_NORMAL
    nu2 = tl.where(dead, 1.0, nu2)
    inv_nu = tl.where(dead, 0.0, 1.0 / tl.sqrt(nu2))
    tl.store(rows.inv_nu + offs, inv_nu)
    tl.store(rows.deficit + offs, tl.where(dead, 1.0, eps / nu2).to(tl.float32))
    return inv_nu


@triton.jit
def store_unit_rows(
    rows,
    offs_m,
    offs_k,
    v,
    packed_rows,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    WITH_REST: tl.constexpr,
):
    """Split the columns `offs_k` of some unit rows, float64, into halves."""
    mask = (offs_k < WIDTH)[None, :]
    if COLUMNS:
        hi = v.to(tl.float32)
        lo = (v - hi.to(tl.float64)).to(tl.float32)
        offs = offs_m[:, None] + offs_k[None, :].to(tl.int64) * packed_rows
    else:
        u = v * UNIT_SCALE
        hi = u.to(tl.float32).to(tl.float16)
        lo = (u - hi.to(tl.float64)).to(tl.float32).to(tl.float16)
        offs = offs_m[:, None] * WIDTH + offs_k[None, :]
        if WITH_REST:
            rest = (u - hi.to(tl.float64) - lo.to(tl.float64)).to(tl.float32).to(tl.float16)
            tl.store(rows.rest + offs, rest, mask=mask)
    tl.store(rows.hi + offs, hi, mask=mask)
    tl.store(rows.lo + offs, lo, mask=mask)


@triton.jit
def normalize_kernel(
    points_ptr,
    tiles_ptr,
    rows,
    k,
    packed_rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    WITH_REST: tl.constexpr,
):
    """Grid (row tiles,). inv_nu f64, deficit f32 [packed].

    hi, lo, rest: [packed, WIDTH] fp16, or with COLUMNS hi, lo: [WIDTH, packed] float32.
    """
    row0, source0, valid, _, _, _ = load_row_tile(tiles_ptr, tl.program_id(0))
    lane = tl.arange(0, BLOCK_M)
    mask_m = lane < valid
    offs_m = row0.to(tl.int64) + lane
    sources = points_ptr + (source0.to(tl.int64) + lane) * k
    offs_k = tl.arange(0, BLOCK_K)

    square = tl.zeros((BLOCK_M,), dtype=tl.float64)
    for k0 in range(0, k, BLOCK_K):
        mask = mask_m[:, None] & (k0 + offs_k < k)[None, :]
        p = tl.load(sources[:, None] + (k0 + offs_k)[None, :], mask=mask, other=0.0)
        p = p.to(tl.float64)
        square += tl.sum(p * p, axis=1)
    inv_nu = store_norms(rows, offs_m, square, eps)
    for k0 in range(0, WIDTH, BLOCK_K):
        mask = mask_m[:, None] & (k0 + offs_k < k)[None, :]
        p = tl.load(sources[:, None] + (k0 + offs_k)[None, :], mask=mask, other=0.0)
        v = p.to(tl.float64) * inv_nu[:, None]
        store_unit_rows(rows, offs_m, k0 + offs_k, v, packed_rows, WIDTH, COLUMNS, WITH_REST)


@triton.jit
def project(
    weight_ptr,
    weight_rows,
    mask_m,
    stride,
    matrix_ptr,
    matrix_rows,
    mask_k,
    d,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Multiply some rows of a weight by some rows of a matrix, [BLOCK_M, BLOCK_K] float32.

    ALIGNED: d and the stride are multiples of VECTOR, which lets loads be 16 bytes wide.
    """
    if ALIGNED:
        d = d // VECTOR * VECTOR
        stride = stride // VECTOR * VECTOR
    weight_ptrs = weight_ptr + weight_rows[:, None] * stride
    matrix_ptrs = matrix_ptr + matrix_rows[None, :] * d
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    acc = tl.zeros((weight_rows.shape[0], matrix_rows.shape[0]), dtype=tl.float32)
    for d0 in range(0, d, BLOCK_D):
        mask_d = d0 + offs_d < d
        w = tl.load(
            weight_ptrs + (d0 + offs_d)[None, :],
            mask=mask_m[:, None] & mask_d[None, :],
            other=0.0,
        )
        m = tl.load(
            matrix_ptrs + (d0 + offs_d)[:, None],
            mask=mask_d[:, None] & mask_k[None, :],
            other=0.0,
        )
        # a limit on inexact accumulation: the compiler is to leave this sum to the float32
        # units, for tensor cores truncate
        acc += tl.dot(w.to(tl.float32), m, input_precision=PRECISION, max_num_imprecise_acc=BLOCK_D)
    return acc


@triton.jit
def project_normalize_kernel(
    weights,
    matrices,
    sets_ptr,
    tiles_ptr,
    points_ptr,
    rows,
    k,
    packed_rows,
    eps,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    WITH_REST: tl.constexpr,
):
    """Grid (row tiles of all sets of these weights,). points [T, k] f32, and as `normalize`.

    weights, matrices: as many pointers each, to weights [N, d] and to their matrices [C, k, d] f32;
    sets [sets, 5] int64: number of the weight, number of the matrix or -1 for the rows as they are,
    d, stride of the weight's rows, first row of the set in `points`.
    """
    row0, source0, valid, _, _, index = load_row_tile(tiles_ptr, tl.program_id(0))
    which = tl.load(sets_ptr + index * SET_FIELDS)
    matrix = tl.load(sets_ptr + index * SET_FIELDS + 1)
    d = tl.load(sets_ptr + index * SET_FIELDS + 2)
    stride = tl.load(sets_ptr + index * SET_FIELDS + 3)
    weight_ptr = weights[0]
    matrix_ptr = matrices[0]
    for i in tl.static_range(1, len(weights)):
        if which == i:
            weight_ptr = weights[i]
            matrix_ptr = matrices[i]
    lane = tl.arange(0, BLOCK_M)
    mask_m = lane < valid
    weight_rows = source0 - tl.load(sets_ptr + index * SET_FIELDS + 4) + lane
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < k
    matrix_rows = matrix * k + offs_k

    if matrix < 0:
        weight_ptrs = weight_ptr + weight_rows[:, None] * stride
        mask = mask_m[:, None] & (offs_k < d)[None, :]
        acc = tl.load(weight_ptrs + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    elif (d | stride) % VECTOR == 0:
        acc = project(
            weight_ptr,
            weight_rows,
            mask_m,
            stride,
            matrix_ptr,
            matrix_rows,
            mask_k,
            d,
            True,
            PRECISION,
            BLOCK_D,
        )
    else:
        acc = project(
            weight_ptr,
            weight_rows,
            mask_m,
            stride,
            matrix_ptr,
            matrix_rows,
            mask_k,
            d,
            False,
            PRECISION,
            BLOCK_D,
        )

    sources = (source0.to(tl.int64) + lane) * k
    mask = mask_m[:, None] & mask_k[None, :]
    tl.store(points_ptr + sources[:, None] + offs_k[None, :], acc, mask=mask)
    p = acc.to(tl.float64)
    offs_m = row0.to(tl.int64) + lane
    inv_nu = store_norms(rows, offs_m, tl.sum(p * p, axis=1), eps)
    v = p * inv_nu[:, None]
    store_unit_rows(rows, offs_m, offs_k, v, packed_rows, WIDTH, COLUMNS, WITH_REST)


class UnitRows(NamedTuple):
    """Packed unit rows: v as halves, 1/nu in float64, deficit = 1 - |v|^2 in float32.

    The halves are float16 [rows, width], or float32 [width, rows] ("columns"); rows that need no
    third half have `lo` again for it.
    """

    hi: Tensor
    lo: Tensor
    rest: Tensor
    inv_nu: Tensor
    deficit: Tensor

    @classmethod
    def empty(
        cls, num_rows: int, width: int, columns: bool, with_rest: bool, device: torch.device
    ) -> "UnitRows":
        """Room for so many rows of `width` columns, those of the padding included."""
        shape, dtype = (num_rows, width), torch.float16
        if columns:
            shape, dtype = (width, num_rows), torch.float32
        hi, lo = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        rest = torch.empty(shape, dtype=dtype, device=device) if with_rest else lo
        inv_nu = torch.empty(num_rows, dtype=torch.float64, device=device)
        deficit = torch.empty(num_rows, dtype=torch.float32, device=device)
        return cls(hi, lo, rest, inv_nu, deficit)

    @property
    def layout(self) -> dict[str, object]:
        """The constants of a launch that fills them."""
        columns = self.hi.dtype == torch.float32
        width = self.hi.shape[0 if columns else 1]
        return {"WIDTH": width, "COLUMNS": columns, "WITH_REST": self.rest is not self.lo}


def normalize(points: Tensor, rows: UnitRows, plan: Plan, block_m: int, eps: float) -> None:
    """Fill `rows` from `points` [T, k]."""
    k = points.shape[1]
    normalize_kernel[(plan.num_row_tiles,)](
        points,
        plan.row_tiles,
        rows,
        k,
        plan.packed_rows,
        eps,
        **rows.layout,
        BLOCK_M=block_m,
        BLOCK_K=min(64, triton.next_power_of_2(k)),
    )


def projection_warps(block_m: int, width: int) -> int:
    """Warps that hold a tile of projected rows without spilling."""
    return 8 if block_m * width > 64 * 64 else 4


@lru_cache(maxsize=64)
def set_table(sets: tuple[tuple[int, int, int, int], ...], device: torch.device) -> Tensor:
    """Lay out `sets` for the kernel: N, C (0: rows as they are), d, row stride of each weight."""
    fields, row = [], 0
    for index, (n, count, d, stride) in enumerate(sets):
        for c in range(count) if count else (-1,):
            fields.append((index % MAX_WEIGHTS, c, d, stride, row))
            row += n
    return upload(fields, (SET_FIELDS.value,), torch.int64, device)


def project_normalize(
    weights: Sequence[Tensor],
    matrices: Sequence[Tensor | None],
    points: Tensor,
    rows: UnitRows,
    plan: Plan,
    block_m: int,
    eps: float,
    precision: str,
    options: Mapping[str, int],
) -> Tensor:
    """Fill `points` [T, k] with the projected rows and `rows` with their unit rows.

    Args:
        weights: [N_l, d_l] each, of one dtype, with contiguous columns.
        matrices: [C_l, k, d_l] each, float32, contiguous; None takes the rows of the weight as they
            are. Sets are ordered weight by weight, matrix by matrix.
        points, rows, plan, block_m, eps: as for `normalize`.
        precision: Triton's name of the float32 product.
        options: of the launch, by `backend.registers`.

    Returns:
        The table of the sets, which the kernel reads.
    """
    counts = [0 if m is None else m.shape[0] for m in matrices]
    table = set_table(
        tuple(
            (*w.shape[:1], count, *w.shape[1:], w.stride(0))
            for w, count in zip(weights, counts, strict=True)
        ),
        points.device,
    )
    k = points.shape[1]
    tile = 0
    for begin in range(0, len(weights), MAX_WEIGHTS):
        some = list(weights[begin : begin + MAX_WEIGHTS])
        theirs = [points if m is None else m for m in matrices[begin : begin + MAX_WEIGHTS]]
        num_tiles = sum(
            max(count, 1) * -(-w.shape[0] // block_m)
            for w, count in zip(some, counts[begin : begin + MAX_WEIGHTS], strict=True)
        )
        # powers of two: models with about as many layers share a compiled kernel
        padding = triton.next_power_of_2(len(some)) - len(some)
        project_normalize_kernel[(num_tiles,)](
            tuple(some + some[:1] * padding),
            tuple(theirs + theirs[:1] * padding),
            table,
            plan.row_tiles[tile:],
            points,
            rows,
            k,
            plan.packed_rows,
            eps,
            PRECISION=precision,
            **rows.layout,
            BLOCK_M=block_m,
            BLOCK_K=max(16, triton.next_power_of_2(k)),
            BLOCK_D=PROJECTION_BLOCK_D,
            num_warps=projection_warps(block_m, triton.next_power_of_2(k)),
            **options,
        )
        tile += num_tiles
    return table
