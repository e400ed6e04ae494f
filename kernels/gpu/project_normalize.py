"""Weights to projected rows, rows to unit rows.

    p_i = P w_i (or the row itself)
    nu_i = sqrt(|p_i|^2 + eps),  v_i = p_i / nu_i,  deficit_i = 1 - |v_i|^2 = eps / nu_i^2

The norms are summed in float64: its range needs no scaling by the largest entry, and 1/nu is then
exact enough for the differences of close rows. Unit rows go out packed by set (see `plan`), padding
zero, as pairs hi + lo: of fp16 numbers that hold 256 v for the tensor cores, or of float32 numbers
that hold v, a column after the other, for the differences of `direct`.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pair_function import UNIT_SCALE
from .plan import Plan, load_row_tile

# columns of the weights that one step of the projection takes
PROJECTION_BLOCK_D = 32
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
SMALLEST_NORMAL: tl.constexpr = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def store_norms(square, inv_nu_ptr, deficit_ptr, rows, eps):
    """1/nu and the deficit of rows with |p|^2 = square, float64; returns 1/nu."""
    nu2 = square + eps
    # NaN is not dead: it has to reach the result
    dead = nu2 < SMALLEST_NORMAL * SMALLEST_NORMAL
    nu2 = tl.where(dead, 1.0, nu2)
    inv_nu = tl.where(dead, 0.0, 1.0 / tl.sqrt(nu2))
    tl.store(inv_nu_ptr + rows, inv_nu)
    tl.store(deficit_ptr + rows, tl.where(dead, 1.0, eps / nu2).to(tl.float32))
    return inv_nu


@triton.jit
def store_unit_rows(
    v, hi_ptr, lo_ptr, rows, offs_k, packed_rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """The columns `offs_k` of some unit rows as pairs hi + lo."""
    if COLUMNS:
        hi = v.to(tl.float32)
        lo = (v - hi.to(tl.float64)).to(tl.float32)
        offs = rows[:, None] + offs_k[None, :].to(tl.int64) * packed_rows
    else:
        u = (v * UNIT_SCALE).to(tl.float32)
        hi = u.to(tl.float16)
        lo = (u - hi.to(tl.float32)).to(tl.float16)
        offs = rows[:, None] * WIDTH + offs_k[None, :]
    mask = (offs_k < WIDTH)[None, :]
    tl.store(hi_ptr + offs, hi, mask=mask)
    tl.store(lo_ptr + offs, lo, mask=mask)


@triton.jit
def normalize_kernel(
    points_ptr,
    tiles_ptr,
    hi_ptr,
    lo_ptr,
    inv_nu_ptr,
    deficit_ptr,
    k,
    packed_rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (row tiles,). inv_nu f64, deficit f32 [packed].

    hi, lo: [packed, WIDTH] fp16, or with COLUMNS [WIDTH, packed] float32.
    """
    row0, source0, valid, _, _, _ = load_row_tile(tiles_ptr, tl.program_id(0))
    lane = tl.arange(0, BLOCK_M)
    mask_m = lane < valid
    rows = row0.to(tl.int64) + lane
    sources = points_ptr + (source0.to(tl.int64) + lane) * k
    offs_k = tl.arange(0, BLOCK_K)

    square = tl.zeros((BLOCK_M,), dtype=tl.float64)
    for k0 in range(0, k, BLOCK_K):
        mask = mask_m[:, None] & (k0 + offs_k < k)[None, :]
        p = tl.load(sources[:, None] + (k0 + offs_k)[None, :], mask=mask, other=0.0)
        p = p.to(tl.float64)
        square += tl.sum(p * p, axis=1)
    inv_nu = store_norms(square, inv_nu_ptr, deficit_ptr, rows, eps)
    for k0 in range(0, WIDTH, BLOCK_K):
        mask = mask_m[:, None] & (k0 + offs_k < k)[None, :]
        p = tl.load(sources[:, None] + (k0 + offs_k)[None, :], mask=mask, other=0.0)
        v = p.to(tl.float64) * inv_nu[:, None]
        store_unit_rows(v, hi_ptr, lo_ptr, rows, k0 + offs_k, packed_rows, WIDTH, COLUMNS)


@triton.jit
def project_normalize_kernel(
    sources_ptr,
    tiles_ptr,
    points_ptr,
    hi_ptr,
    lo_ptr,
    inv_nu_ptr,
    deficit_ptr,
    k,
    packed_rows,
    eps,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (row tiles of all projections of all weights,). points [T, k] f32, and as `normalize`.

    sources [sets, 4] int64: address of the weight [N, d] and of the matrix [k, d], d, first row of
    the set in `points`; so weights of any width share the launch.
    """
    row0, source0, valid, _, _, index = load_row_tile(tiles_ptr, tl.program_id(0))
    source = sources_ptr + index * 4
    weight_ptr = tl.load(source).to(tl.pointer_type(DTYPE))
    matrix_ptr = tl.load(source + 1).to(tl.pointer_type(DTYPE))
    d = tl.load(source + 2)
    lane = tl.arange(0, BLOCK_M)
    mask_m = lane < valid
    weight_rows = source0 - tl.load(source + 3) + lane
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_k = offs_k < k

    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for d0 in range(0, d, BLOCK_D):
        mask_d = d0 + offs_d < d
        w = tl.load(
            weight_ptr + weight_rows[:, None] * d + (d0 + offs_d)[None, :],
            mask=mask_m[:, None] & mask_d[None, :],
            other=0.0,
        )
        m = tl.load(
            matrix_ptr + offs_k[None, :] * d + (d0 + offs_d)[:, None],
            mask=mask_d[:, None] & mask_k[None, :],
            other=0.0,
        )
        acc = tl.dot(w.to(tl.float32), m.to(tl.float32), acc, input_precision=PRECISION)

    sources = (source0.to(tl.int64) + lane) * k
    mask = mask_m[:, None] & mask_k[None, :]
    tl.store(points_ptr + sources[:, None] + offs_k[None, :], acc, mask=mask)
    p = acc.to(tl.float64)
    rows = row0.to(tl.int64) + lane
    inv_nu = store_norms(tl.sum(p * p, axis=1), inv_nu_ptr, deficit_ptr, rows, eps)
    v = p * inv_nu[:, None]
    store_unit_rows(v, hi_ptr, lo_ptr, rows, offs_k, packed_rows, WIDTH, COLUMNS)


class UnitRows:
    """Packed unit rows: v as pairs hi + lo, 1/nu in float64, deficit = 1 - |v|^2 in float32."""

    def __init__(self, plan: Plan, width: int, columns: bool, device: torch.device) -> None:
        n = plan.packed_rows
        shape, dtype = ((width, n), torch.float32) if columns else ((n, width), torch.float16)
        self.hi = torch.empty(shape, dtype=dtype, device=device)
        self.lo = torch.empty(shape, dtype=dtype, device=device)
        self.inv_nu = torch.empty(n, dtype=torch.float64, device=device)
        self.deficit = torch.empty(n, dtype=torch.float32, device=device)


def normalize(
    points: Tensor, plan: Plan, block_m: int, width: int, eps: float, columns: bool
) -> UnitRows:
    """Unit rows of `points` [T, k]: [packed, width] in fp16, or with `columns` the other way."""
    rows = UnitRows(plan, width, columns, points.device)
    k = points.shape[1]
    normalize_kernel[(plan.num_row_tiles,)](
        points,
        plan.row_tiles,
        rows.hi,
        rows.lo,
        rows.inv_nu,
        rows.deficit,
        k,
        plan.packed_rows,
        eps,
        WIDTH=width,
        BLOCK_M=block_m,
        BLOCK_K=min(64, triton.next_power_of_2(k)),
        COLUMNS=columns,
    )
    return rows


def projection_warps(block_m: int, width: int) -> int:
    """Warps that hold a tile of projected rows without spilling."""
    return 8 if block_m * width > 64 * 64 else 4


# tables that captured graphs read at every replay, so they may not leave with the cache
_CAPTURED: list[object] = []


@lru_cache(maxsize=64)
def _source_table(
    fields: tuple[tuple[int, ...], ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Table of `project_normalize_kernel` on the device, and the host memory it is copied from.

    A CUDA graph repeats the copy, so the pinned memory lives as long as the table.
    """
    host = torch.tensor(fields, dtype=torch.int64)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True), host


def project_normalize(
    weights: Sequence[Tensor],
    matrices: Sequence[Tensor],
    plan: Plan,
    block_m: int,
    width: int,
    eps: float,
    columns: bool,
    precision: str,
) -> tuple[Tensor, UnitRows]:
    """Projected rows [T, k] float32 and their unit rows, all weights in one launch.

    Args:
        weights: [N_l, d_l] each, contiguous, of one dtype.
        matrices: [C_l, k, d_l] each, contiguous, of that dtype; sets are ordered weight by weight,
            matrix by matrix.
        plan, block_m, width, eps, columns: as for `normalize`.
        precision: Triton's name of the float32 product.
    """
    k, device, dtype = matrices[0].shape[1], weights[0].device, weights[0].dtype
    fields, row = [], 0
    for weight, matrix in zip(weights, matrices, strict=True):
        n, d = weight.shape
        for c in range(matrix.shape[0]):
            address = matrix.data_ptr() + c * k * d * matrix.element_size()
            fields.append((weight.data_ptr(), address, d, row))
            row += n
    table = _source_table(tuple(fields), device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _CAPTURED.append(table)
    sources, _ = table
    points = torch.empty(row, k, dtype=torch.float32, device=device)
    rows = UnitRows(plan, width, columns, device)
    project_normalize_kernel[(plan.num_row_tiles,)](
        sources,
        plan.row_tiles,
        points,
        rows.hi,
        rows.lo,
        rows.inv_nu,
        rows.deficit,
        k,
        plan.packed_rows,
        eps,
        DTYPE=TRITON_DTYPES[dtype],
        PRECISION=precision,
        WIDTH=width,
        BLOCK_M=block_m,
        BLOCK_K=max(16, triton.next_power_of_2(width)),
        BLOCK_D=PROJECTION_BLOCK_D,
        COLUMNS=columns,
        num_warps=projection_warps(block_m, width),
    )
    return points, rows
