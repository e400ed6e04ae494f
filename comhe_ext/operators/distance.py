"""The distance of each row to one other, and its derivatives.

    comhe_ext::distance           rows [B, N, k], columns [B, M, k] or None, index [B, N] -> [B, N]
    comhe_ext::distance_gradient  the same and weights [B, N] -> the gradients of the weighted sum
                                  of the distances, in rows and columns

Without columns the others are the rows of the same set. Both operators take each row once, and
compute in float64 from the difference of the two, so that near rows lose no digits. The gradient of
the gradient, and the forward mode, are those of torch's own operators on the same formulas.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from comhe_ext import backends
from comhe_ext.kernels.pair_functions import PairFunction
from comhe_ext.kernels.portable.near_pairs import MAYBE_MULTIPLES, are_multiples
from comhe_ext.kernels.sweep import DistanceRequest
from comhe_ext.operators.cross_sweep import check_columns
from comhe_ext.operators.library import (
    LIBRARY,
    allow_missing_gradients,
    apply,
    check_device,
    check_rows,
    compute_dtype,
    define,
    differentiated,
    forward_mode,
    leave_trace,
    register_vmap,
)
from comhe_ext.operators.rows import safe_sqrt

# --- raw operators --------------------------------------------------------------------------------

_ARGUMENTS = "Tensor rows, Tensor? columns, Tensor index"
_OPTIONS = "bool half_space, bool angular, float eps, str backend"


def _check(rows: Tensor, columns: Tensor | None, index: Tensor) -> None:
    if columns is None:
        check_rows("rows", rows, (3,))
    else:
        check_columns(rows, columns, None, None)
    check_device("index", index, "rows", rows)
    if index.dtype != torch.int64 or index.shape != rows.shape[:2]:
        raise ValueError(
            f"`index` must be int64 of shape {tuple(rows.shape[:2])}, got {index.dtype} "
            f"{tuple(index.shape)}"
        )
    backends.check_float64(rows.device)


def _request(
    rows: Tensor,
    columns: Tensor | None,
    index: Tensor,
    half_space: bool,
    angular: bool,
    eps: float,
    backend: str,
) -> tuple[Any, DistanceRequest]:
    """Choose the backend, and make what it is asked: all sets as one, of consecutive numbers."""
    dtype = rows.dtype
    if columns is not None and columns.dtype != dtype:
        dtype = compute_dtype(rows, columns)
    others = rows.shape[1] if columns is None else columns.shape[1]
    if rows.shape[0] != 1:
        first = torch.arange(rows.shape[0], device=index.device).unsqueeze(1) * others
        index = torch.where(index < 0, index, index + first)
    rows = rows.to(dtype).flatten(0, 1).contiguous()
    columns = None if columns is None else columns.to(dtype).flatten(0, 1).contiguous()
    # Triton has no kernel of its own for it, whoever has found the index
    if backend != "torch":
        backend = backends.choose(None, None, rows.device, dtype, rows.shape[1], "distance")
    index = index.flatten().contiguous()
    return backends.load(backend), DistanceRequest(rows, columns, index, half_space, angular, eps)


@define(f"distance({_ARGUMENTS}, {_OPTIONS}) -> Tensor")
def _distance(rows: Tensor, columns: Tensor | None, index: Tensor, *options: Any) -> Tensor:
    _check(rows, columns, index)
    if rows.shape[1] == 0 or (columns is not None and columns.shape[1] == 0):
        return _like_index(rows, columns, index).fill_(torch.inf)
    backend, request = _request(rows, columns, index, *options)
    result: Tensor = backend.distance(request)
    return result.view(index.shape)


@define(
    f"distance_gradient({_ARGUMENTS}, Tensor weights, bool rows_gradient, bool columns_gradient, "
    f"{_OPTIONS}) -> (Tensor, Tensor)"
)
def _distance_gradient(
    rows: Tensor,
    columns: Tensor | None,
    index: Tensor,
    weights: Tensor,
    rows_gradient: bool,
    columns_gradient: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    _check_weights(rows, columns, index, weights)
    outputs = _empty(rows, columns, rows_gradient, columns_gradient)
    if rows.shape[1] == 0 or (columns is not None and columns.shape[1] == 0):
        return tuple(x.zero_() for x in outputs)
    backend, request = _request(rows, columns, index, *options)
    weights = weights.to(compute_dtype(rows, columns)).flatten()
    gradients = backend.distance_gradient(request, weights, rows_gradient, columns_gradient)
    return tuple(
        empty if x is None else x.view(empty.shape)
        for x, empty in zip(gradients, outputs, strict=True)
    )


def _check_weights(rows: Tensor, columns: Tensor | None, index: Tensor, weights: Tensor) -> None:
    _check(rows, columns, index)
    check_device("weights", weights, "rows", rows)
    if weights.shape != index.shape or not weights.is_floating_point():
        raise ValueError(
            f"`weights` must be floating-point of shape {tuple(index.shape)}, got "
            f"{weights.dtype} {tuple(weights.shape)}"
        )


def _like_index(rows: Tensor, columns: Tensor | None, index: Tensor) -> Tensor:
    return rows.new_empty(index.shape, dtype=compute_dtype(rows, columns))


def _empty(
    rows: Tensor, columns: Tensor | None, rows_gradient: bool, columns_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Make what gradients are written to; one that is left out has no element."""
    sets, dtype = rows.shape[0], compute_dtype(rows, columns)
    of_columns = columns_gradient and columns is not None
    return (
        rows.new_empty(rows.shape if rows_gradient else (sets, 0), dtype=dtype),
        rows.new_empty(
            columns.shape if of_columns and columns is not None else (sets, 0), dtype=dtype
        ),
    )


@torch.library.register_fake("comhe_ext::distance", lib=LIBRARY)
def _(rows: Tensor, columns: Tensor | None, index: Tensor, *options: Any) -> Tensor:
    _check(rows, columns, index)
    return _like_index(rows, columns, index)


@torch.library.register_fake("comhe_ext::distance_gradient", lib=LIBRARY)
def _(
    rows: Tensor,
    columns: Tensor | None,
    index: Tensor,
    weights: Tensor,
    rows_gradient: bool,
    columns_gradient: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    _check_weights(rows, columns, index, weights)
    return _empty(rows, columns, rows_gradient, columns_gradient)


register_vmap("distance", num_tensors=3)
register_vmap("distance_gradient", num_tensors=4)


# --- autograd -------------------------------------------------------------------------------------


class _Distance(torch.autograd.Function):
    """Rows, columns and index -> distance [B, N]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor,
        columns: Tensor | None,
        index: Tensor,
        half_space: bool,
        angular: bool,
        eps: float,
        backend: str,
    ) -> Tensor:
        distance: Tensor = torch.ops.comhe_ext.distance(
            rows, columns, index, half_space, angular, eps, backend
        )
        return distance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.half_space, ctx.angular, ctx.eps, ctx.backend = inputs
        allow_missing_gradients(ctx)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, weights: Tensor | None) -> tuple[Tensor | None, ...]:
        if weights is None:
            return (None,) * 7
        rows, columns, index = ctx.saved_tensors
        wanted, options = ctx.needs_input_grad[:2], (ctx.half_space, ctx.angular, ctx.eps)
        if torch.is_grad_enabled() or forward_mode():
            to_rows, to_columns = _gradient(rows, columns, index, weights, *options)
        else:
            to_rows, to_columns = torch.ops.comhe_ext.distance_gradient(
                rows, columns, index, weights, *wanted, *options, ctx.backend
            )
        return (
            to_rows.to(rows.dtype) if wanted[0] else None,
            to_columns.to(columns.dtype) if wanted[1] else None,
            *(None,) * 5,
        )


def distance_to(
    rows: Tensor,
    columns: Tensor | None,
    index: Tensor,
    half_space: bool,
    angular: bool,
    eps: float,
    backend: str,
) -> Tensor:
    """Compute the distance of each of rows [B, N, k] to a column [B, M, k], or to another row.

    Returns:
        [B, N], float32 (float64 if a tensor is); infinite where the index is -1. Differentiable
        twice, in every mode. Where two directions coincide it has derivatives 0.
    """
    options = half_space, angular, eps
    if forward_mode():
        leave_trace()
        return _formula(rows, columns, index, *options)
    if differentiated(rows, columns):
        distance: Tensor = apply(_Distance, rows, columns, index, *options, backend)
        return distance
    distance = torch.ops.comhe_ext.distance(rows, columns, index, *options, backend)
    return distance


# --- the formulas, by torch's own operators -------------------------------------------------------


class _Unit(NamedTuple):
    """Unit rows v = p / nu [..., k], 1 - |v|^2 and 1 / nu [..., 1], in float64."""

    v: Tensor
    deficit: Tensor
    inv_nu: Tensor


def _chosen(rows: Tensor, columns: Tensor | None, index: Tensor) -> tuple[Tensor, Tensor]:
    """Pick the other row of each row, and its number for each of its coordinates."""
    others = rows if columns is None else columns
    numbers = index.clamp_min(0).unsqueeze(-1).expand(*index.shape, others.shape[-1])
    return others.gather(-2, numbers), numbers


def _formula(
    rows: Tensor,
    columns: Tensor | None,
    index: Tensor,
    half_space: bool,
    angular: bool,
    eps: float,
) -> Tensor:
    """Compute what the operator `distance` does."""
    if rows.shape[-2] == 0 or (columns is not None and columns.shape[-2] == 0):
        return _like_index(rows, columns, index).fill_(torch.inf)
    near, far = _squares(rows, _chosen(rows, columns, index)[0], half_space, angular, eps)
    distance = safe_sqrt(near)
    if far is not None:
        distance = 2.0 * torch.atan2(distance, safe_sqrt(far))
    distance = distance.squeeze(-1).masked_fill(index < 0, torch.inf)
    return distance.to(compute_dtype(rows, columns))


def _gradient(
    rows: Tensor,
    columns: Tensor | None,
    index: Tensor,
    weights: Tensor,
    half_space: bool,
    angular: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute what the operator `distance_gradient` does, see `kernels.portable.distance`."""
    other, numbers = _chosen(rows, columns, index)
    v, w = _normalize(rows, eps), _normalize(other, eps)
    side = torch.where((v.v * w.v).detach().sum(-1, keepdim=True) < 0, -1.0, 1.0).double()
    d = v.v - side * w.v
    squared = d.square().sum(-1, keepdim=True)
    multiples = _are_multiples(squared, v.v, w.v)
    longer = (w.deficit - v.deficit) / 2.0
    d = torch.where(multiples, longer * v.v, d)
    x = torch.where(multiples, longer.square(), squared) + v.deficit + w.deficit
    sign = torch.ones_like(side) if half_space else side
    sine2 = x * (4.0 - x) / 4.0 if angular else torch.where(sign > 0, x, 4.0 - x)
    zero = sine2 == 0
    g = sign * sine2.masked_fill(zero, 1.0).rsqrt().masked_fill(zero, 0.0)
    factor = (g * weights.unsqueeze(-1)).masked_fill((index < 0).unsqueeze(-1), 0.0)
    to_rows = factor * v.inv_nu * (d - x / 2.0 * v.v)
    to_other = -factor * w.inv_nu * (side * d + x / 2.0 * w.v)
    others = rows if columns is None else columns
    to_others = torch.zeros_like(others, dtype=torch.float64).scatter_add(-2, numbers, to_other)
    return (to_rows + to_others if columns is None else to_rows), to_others


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
    short = 2.0 * _normalize(rows, eps).deficit.squeeze(-1)
    if eps == 0:
        short = 2.0 * (short > 1.0).double()  # no function of the rows then: 2 of dead ones, else 0
    return pair.one_sided(4.0 - short, short)[0]


def _squares(
    rows: Tensor, others: Tensor, half_space: bool, with_far: bool, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Compute 2 - 2c of rows and others, each exact where it is small, and 2 + 2c."""
    v, v_deficit, _ = _normalize(rows, eps)
    w, w_deficit, _ = _normalize(others, eps)
    if half_space:
        w = torch.where((v * w).sum(-1, keepdim=True) < 0, -w, w)
    both = v_deficit + w_deficit
    squared = _squared_length(v - w, v, w)
    # |v| - |w| is what is left of the difference of multiples of one row
    longer = ((w_deficit - v_deficit) / 2.0).square()
    near = torch.where(squared == 0, longer, squared) + both
    return near, _squared_length(v + w, v, w) + both if with_far else None


def _normalize(rows: Tensor, eps: float) -> _Unit:
    """Divide rows by nu = sqrt(|p|^2 + eps), in float64."""
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
    return _Unit(v, deficit, torch.where(alive, 1.0 / (nu * largest), 0.0))


def _squared_length(combined: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Compute |v - w|^2 or |v + w|^2; 0 for multiples of one row, as rounding has no direction."""
    squared = combined.square().sum(-1, keepdim=True)
    return squared.masked_fill(_are_multiples(squared, v, w), 0.0)


def _are_multiples(squared: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Tell which rows, so far apart, are multiples of one row, [..., 1]."""
    return (squared < MAYBE_MULTIPLES) & are_multiples(v.detach(), w.detach()).unsqueeze(-1)
