"""The distance of each row to one other row, or column, in float64 from their difference.

    c = <v, w>,  side = the sign of c,  d = v - side w
    x = 2 - 2 |c| = |d|^2 + deficit_v + deficit_w
    t = sqrt(x), in full space sqrt(4 - x) where c < 0; or the angle
    dt/dp = g (d - x/2 v) / nu_v     dt/dq = -g (side d + x/2 w) / nu_w     g = -dt/d|c|

Rows are taken in chunks, so that little is float64 at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..sweep import DistanceRequest
from .near_pairs import CHUNK, MAYBE_MULTIPLES, are_multiples
from .rows import Rows, normalize, result_dtype


class _Apart(NamedTuple):
    """Some rows and the one other of each, in float64."""

    v: Rows
    w: Rows
    side: Tensor  # [P, 1] 1, or -1 where c < 0
    d: Tensor  # [P, k] v - side w; along v where both are multiples of one row
    x: Tensor  # [P, 1] 2 - 2 |c|
    folded: Tensor  # [P, 1] whether the distance is that of |c|


def _chunks(request: DistanceRequest) -> Iterator[tuple[slice, Tensor, _Apart]]:
    """Yield rows, their index, and how they lie apart; where there is no other, of anything."""
    rows, columns = request.rows, request.columns
    n, k = rows.shape
    others = rows if columns is None else columns
    # few chunks on a GPU, which would wait for many small launches
    step = max(CHUNK // k, -(-n // 8), 1)
    for part in (slice(first, first + step) for first in range(0, n, step)):
        index = request.index[part].clamp_min(0)
        v = normalize(rows[part], request.eps, torch.float64)
        w = normalize(others[index], request.eps, torch.float64)
        yield part, index, _apart(v, w, request.half_space)


def _apart(v: Rows, w: Rows, half_space: bool) -> _Apart:
    side = torch.where((v.v * w.v).sum(1, keepdim=True) < 0, -1.0, 1.0).double()
    d = torch.addcmul(v.v, side, w.v, value=-1.0)
    squared = d.square().sum(1, keepdim=True)
    multiples = (squared < MAYBE_MULTIPLES) & are_multiples(v.v, w.v).unsqueeze(1)
    # of multiples nothing but |v| - |w|, where |v| is almost 1
    longer = (w.deficit - v.deficit) / 2.0
    d = torch.where(multiples, longer * v.v, d)
    squared = torch.where(multiples, longer.square(), squared)
    folded = torch.ones_like(multiples) if half_space else side > 0
    return _Apart(v, w, side, d, squared + v.deficit + w.deficit, folded)


def distance(request: DistanceRequest) -> Tensor:
    """Compute the distance of each row to the other one of its index.

    Returns:
        [N], float32, float64 for float64 rows.
    """
    result = request.rows.new_empty(len(request.rows), dtype=result_dtype(request.rows))
    for part, _, apart in _chunks(request):
        x, folded = apart.x, apart.folded
        t = torch.where(folded, x, 4.0 - x).sqrt_()
        if request.angular:
            t = 2.0 * torch.atan2(t, torch.where(folded, 4.0 - x, x).sqrt_())
        result[part] = t.squeeze(1)
    return result.masked_fill_(request.index < 0, torch.inf)


def distance_gradient(
    request: DistanceRequest, weights: Tensor, rows_gradient: bool, columns_gradient: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of sum_i weight_i distance_i, see `kernels.sweep.Backend`."""
    rows, columns, dtype = request.rows, request.columns, result_dtype(request.rows)
    to_rows = torch.zeros_like(rows, dtype=torch.float64) if rows_gradient else None
    to_others = to_rows
    if columns is not None:
        to_others = torch.zeros_like(columns, dtype=torch.float64) if columns_gradient else None
    none = (request.index < 0).unsqueeze(1)
    for part, index, (v, w, side, d, x, folded) in _chunks(request):
        sine2 = torch.where(folded, x, 4.0 - x)
        if request.angular:
            sine2 = x * (4.0 - x) / 4.0
        zero = sine2 == 0
        g = torch.where(folded, 1.0, -1.0) * sine2.masked_fill_(zero, torch.inf).rsqrt_()
        factor = g * weights[part].unsqueeze(1)
        if to_rows is not None:
            push = torch.addcmul(d, x, v.v, value=-0.5).mul_(factor * v.inv_nu)
            to_rows[part] += push.masked_fill_(none[part], 0.0)
        if to_others is not None:
            push = torch.addcmul(side * d, x, w.v, value=0.5).mul_(-factor * w.inv_nu)
            push.masked_fill_(none[part], 0.0)
            # adds in a fixed order on every device
            to_others.index_put_((index,), push, accumulate=True)
    if columns is None:
        to_others = None
    return (
        None if to_rows is None else to_rows.to(dtype),
        None if to_others is None else to_others.to(dtype),
    )
