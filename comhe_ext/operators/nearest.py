"""The operator of the nearest rows, and the differentiable distance to them.

    comhe_ext::nearest   rows [B, N, k], columns [B, M, k] or None -> index [B, N], int64

The index has no derivative. The distance is computed from the two rows in float64 by torch's own
operators, so it has all derivatives, and near rows lose no digits.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from comhe_ext import backends
from comhe_ext.kernels.pair_functions import PairFunction
from comhe_ext.kernels.portable.near_pairs import MAYBE_MULTIPLES, are_multiples
from comhe_ext.kernels.sweep import NearestRequest
from comhe_ext.operators.cross_sweep import check_columns
from comhe_ext.operators.library import (
    LIBRARY,
    check_rows,
    compute_dtype,
    define,
    forward_mode,
    leave_trace,
    register_vmap,
)
from comhe_ext.operators.rows import safe_sqrt
from comhe_ext.operators.sweep import refuse_capture
from comhe_ext.verdicts import trusted


def _check(
    rows: Tensor,
    columns: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    backend: str,
) -> None:
    if columns is not None:
        check_columns(rows, columns, row_ids, column_ids)
    else:
        check_rows("rows", rows, (3,))
        if row_ids is not None or column_ids is not None:
            raise ValueError("`row_ids` and `column_ids` need `columns`")
    if backend not in ("torch", backends.AUTO):
        error = backends.misfit(backend, None, rows.dtype, rows.shape[2], "nearest")
        if error is not None:
            raise error


@define(
    "nearest(Tensor rows, Tensor? columns, Tensor? row_ids, Tensor? column_ids, bool half_space, "
    "float eps, str backend) -> Tensor"
)
def _nearest(
    rows: Tensor,
    columns: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    half_space: bool,
    eps: float,
    backend: str,
) -> Tensor:
    _check(rows, columns, row_ids, column_ids, backend)
    sets, n, width = rows.shape
    others = n if columns is None else columns.shape[1]
    if sets == 0 or n == 0 or others == 0:
        return rows.new_full((sets, n), -1, dtype=torch.int64)
    dtype = rows.dtype
    if columns is not None and columns.dtype != rows.dtype:
        dtype = compute_dtype(rows, columns)
    rows = rows.to(dtype).contiguous()
    if columns is None:
        requests = [NearestRequest(rows.flatten(0, 1), (n,) * sets, half_space, eps)]
    else:
        columns = columns.to(dtype).contiguous()
        requests = [
            NearestRequest(
                rows[index],
                (n,),
                half_space,
                eps,
                columns[index],
                None if row_ids is None else row_ids[index].contiguous(),
                None if column_ids is None else column_ids[index].contiguous(),
            )
            for index in range(sets)
        ]
    if backend == backends.AUTO:
        backend = backends.choose(None, None, rows.device, dtype, width, "nearest")
        if backend == "triton" and not trusted(requests[0]):
            backend = "torch"
    if backend == "torch":
        refuse_capture(rows.device)
    module = backends.load(backend)
    return torch.cat([module.nearest(request) for request in requests]).view(sets, n)


@torch.library.register_fake("comhe_ext::nearest", lib=LIBRARY)
def _(
    rows: Tensor,
    columns: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    half_space: bool,
    eps: float,
    backend: str,
) -> Tensor:
    _check(rows, columns, row_ids, column_ids, backend)
    return rows.new_empty(rows.shape[:2], dtype=torch.int64)


register_vmap("nearest", num_tensors=4)


def nearest_index(
    rows: Tensor,
    columns: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    half_space: bool,
    eps: float,
    backend: str,
) -> Tensor:
    """Find the nearest other row, or column, of each of rows [B, N, k] -> [B, N]; -1: none."""
    without_tangents: Any = contextlib.nullcontext()
    if forward_mode():
        leave_trace()
        without_tangents = forward_ad._set_fwd_grad_enabled(False)
    with torch.no_grad(), without_tangents:
        index: Tensor = torch.ops.comhe_ext.nearest(
            rows, columns, row_ids, column_ids, half_space, eps, backend
        )
    return index


def distance_to(
    rows: Tensor,
    columns: Tensor,
    index: Tensor,
    half_space: bool,
    angular: bool,
    eps: float,
) -> Tensor:
    """Compute the distance of each of rows [B, N, k] to a column [B, M, k], in float64 -> [B, N].

    Infinite where the index is -1. Where two directions coincide it has derivatives 0.
    """
    chosen = index.clamp_min(0).unsqueeze(-1).expand(-1, -1, columns.shape[-1])
    near, far = _squares(rows, columns.gather(1, chosen), half_space, angular, eps)
    distance = safe_sqrt(near)
    if far is not None:
        distance = 2.0 * torch.atan2(distance, safe_sqrt(far))
    return distance.squeeze(-1).masked_fill(index < 0, torch.inf)


def squared_distances(
    rows: Tensor, others: Tensor, half_space: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute 2 - 2c and 2 + 2c, in half space of |c|, row by row [..., P, k], in float64."""
    near, far = _squares(rows, others, half_space, True, eps)
    assert far is not None
    return near.squeeze(-1), far.squeeze(-1)


def antipode_energies(rows: Tensor, pair: PairFunction, eps: float) -> Tensor:
    """Compute f of each row and its own antipode, [..., N, k] -> [..., N], in float64."""
    # 2 + 2 |v|^2 = 4 - 2 deficit
    short = 2.0 * _normalize(rows, eps)[1].squeeze(-1)
    if eps == 0:
        short = 2.0 * (short > 1.0).double()  # no function of the rows then: 2 of dead ones, else 0
    return pair.one_sided(4.0 - short, short)[0]


def _squares(
    rows: Tensor, others: Tensor, half_space: bool, with_far: bool, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Compute 2 - 2c of rows and others, each exact where it is small, and 2 + 2c."""
    v, v_deficit = _normalize(rows, eps)
    w, w_deficit = _normalize(others, eps)
    if half_space:
        w = torch.where((v * w).sum(-1, keepdim=True) < 0, -w, w)
    both = v_deficit + w_deficit
    squared = _squared_length(v - w, v, w)
    # |v| - |w| is what is left of the difference of multiples of one row
    longer = ((w_deficit - v_deficit) / 2.0).square()
    near = torch.where(squared == 0, longer, squared) + both
    return near, _squared_length(v + w, v, w) + both if with_far else None


def _normalize(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Divide rows by nu = sqrt(|p|^2 + eps), and compute 1 - |v|^2 of them, in float64."""
    p = rows.double()
    # divided by its largest entry first, a row of 1e-200 or 1e200 neither vanishes nor overflows
    largest = p.detach().abs().amax(-1, keepdim=True)
    largest = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    p = p / largest
    squared = p.square().sum(-1, keepdim=True)
    rest = eps / largest.square()
    # NaN is not dead: it has to reach the result
    alive = ~((squared + rest).detach().sqrt() * largest < torch.finfo(compute_dtype(rows)).tiny)
    nu = torch.where(alive, squared + rest, 1.0).sqrt()
    v = torch.where(alive, p / nu, 0.0)
    deficit = torch.where(alive, rest / nu.square(), 1.0)
    return v, deficit


def _squared_length(combined: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Compute |v - w|^2 or |v + w|^2; 0 for multiples of one row, as rounding has no direction."""
    squared = combined.square().sum(-1, keepdim=True)
    multiples = (squared < MAYBE_MULTIPLES) & are_multiples(v.detach(), w.detach()).unsqueeze(-1)
    return squared.masked_fill(multiples, 0.0)
