"""The operator of the nearest rows.

    comhe_ext::nearest   rows [B, N, k], columns [B, M, k] or None -> index [B, N], int64

The index has no derivative; `comhe_ext.operators.distance` makes the distance of it. As for
torch.argmax, NaN is larger than everything: a row that meets a row of NaN or infinity is nearest to
the first of these, so that its distance is NaN.
"""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from comhe_ext import backends
from comhe_ext.kernels.portable.near_pairs import answers_at_once
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
    found = [module.nearest(request) for request in requests]
    index = (found[0] if sets == 1 else torch.cat(found)).view(sets, n)
    if all(_known_finite(x) for x in (rows, columns) if x is not None):
        return index
    return _nan_first(index, rows, columns, row_ids, column_ids)


def _known_finite(rows: Tensor) -> bool:
    """Tell whether there is no NaN and no infinity, which only a processor is asked."""
    return answers_at_once(rows.device) and all(math.isfinite(x.item()) for x in rows.aminmax())


def _nan_first(
    index: Tensor,
    rows: Tensor,
    columns: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
) -> Tensor:
    """Let rows of NaN or infinity be nearest to anybody, and others to the first of these."""
    row_broken = ~rows.isfinite().all(-1)
    broken = row_broken if columns is None else ~columns.isfinite().all(-1)
    count = broken.shape[1]
    numbers = torch.arange(count, device=rows.device)
    if columns is None:
        row_ids = column_ids = numbers.expand_as(broken)

    def first_met(among: Tensor) -> Tensor:
        """Find the number of the first of some columns that each row meets, else `count`."""
        places = torch.where(among, numbers, count)
        first = places.amin(1, keepdim=True)
        if row_ids is None or column_ids is None:
            return first.expand_as(index)
        its_id = column_ids.gather(1, first.clamp_max(count - 1))
        another = torch.where(column_ids == its_id, count, places).amin(1, keepdim=True)
        return torch.where(row_ids == its_id, another, first)

    anybody, nan = first_met(torch.ones_like(broken)), first_met(broken)
    index = torch.where(row_broken & (anybody < count), anybody, index)
    return torch.where(nan < count, nan, index)


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
