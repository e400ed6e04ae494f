"""The operators of the angle-preserving loss, and their autograd.

    comhe_ext::angle_difference      rows [M, N, d], projected [M, N, k] -> S [M], gradients of both
    comhe_ext::angle_difference_hvp  rows, projected, tangents of both -> like rows, like projected

S is a number a set, so its gradient comes out of the forward sweep, and the backward only scales
it; both modes and the second derivatives are made as in `comhe_ext.operators.energy`. A gradient
that nobody asks for is left out; where it would be, there is an empty tensor.

Rows may be one set, expanded to M: its cosines are then computed once for all of its projections.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from comhe_ext import backends
from comhe_ext.kernels.portable import angle_loss, angle_moments
from comhe_ext.kernels.sweep import DifferenceRequest
from comhe_ext.operators.library import (
    LIBRARY,
    allow_missing_gradients,
    apply,
    check_device,
    check_like,
    check_rows,
    compute_dtype,
    define,
    differentiable_jvp,
    differentiated,
    final,
    forward_mode,
    leave_trace,
    over_batch,
    register_vmap,
)
from comhe_ext.verdicts import trusted


def _check(rows: Tensor, projected: Tensor) -> None:
    check_rows("rows", rows, (3,))
    check_rows("projected", projected, (3,))
    if rows.shape[:2] != projected.shape[:2]:
        raise ValueError(
            f"`projected` must have as many sets and rows as `rows`, got {tuple(projected.shape)} "
            f"and {tuple(rows.shape)}"
        )
    check_device("projected", projected, "rows", rows)
    backends.check_float64(rows.device)


def _check_tangents(
    rows: Tensor, projected: Tensor, rows_tangents: Tensor | None, projected_tangents: Tensor | None
) -> None:
    _check(rows, projected)
    if rows_tangents is not None:
        check_like("rows_tangents", rows_tangents, "rows", rows)
    if projected_tangents is not None:
        check_like("projected_tangents", projected_tangents, "projected", projected)


def _by_moments(rows: Tensor, projected: Tensor, angle: bool, compiled: bool) -> bool:
    """Whether second moments are the shorter way; never of float64, see `angle_moments`."""
    n, d, k = *rows.shape[1:], projected.shape[2]
    if angle or compute_dtype(rows, projected) == torch.float64:
        return False
    # which way is shorter has been measured on processors alone
    return rows.device.type == "cpu" and angle_moments.is_less_work(n, d, k, compiled)


def _set_by_set(
    function: Callable[..., Sequence[Tensor | None]],
    tensors: Sequence[Tensor | None],
    *rest: bool,
) -> Sequence[Tensor | None]:
    """Call a function of M sets, of one set at a time where all have the same rows, expanded.

    The portable tiles would make a copy of them for each of its projections.
    """
    rows = tensors[0]
    assert rows is not None
    if rows.shape[0] < 2 or rows.stride(0) != 0:
        return function(*tensors, *rest)
    sets = [[None] * len(rows) if x is None else x.split(1) for x in tensors]
    results = [function(*one, *rest) for one in zip(*sets, strict=True)]
    return [None if x[0] is None else torch.cat(x) for x in zip(*results, strict=True)]


@define(
    "angle_difference(Tensor rows, Tensor projected, bool angle, bool rows_gradient, "
    "bool projected_gradient=True) -> (Tensor, Tensor, Tensor)"
)
def _angle_difference(
    rows: Tensor,
    projected: Tensor,
    angle: bool,
    rows_gradient: bool,
    projected_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(rows, projected)
    columns, dtype = max(rows.shape[2], projected.shape[2]), compute_dtype(rows, projected)
    name = backends.choose(None, None, rows.device, dtype, columns, needs="angle_difference")
    arguments = angle, rows_gradient, projected_gradient
    if name == "triton" and not trusted(DifferenceRequest(rows, projected, *arguments)):
        name = "torch"
    total: Tensor | None
    gradients: Sequence[Tensor | None]
    if _by_moments(rows, projected, angle, name == "cpu"):
        total, *gradients = angle_moments.sweep(rows, projected, *arguments[1:])
    elif name == "torch":
        total, *gradients = _set_by_set(angle_loss.sweep, (rows, projected), *arguments)
    else:
        total, *gradients = backends.load(name).angle_difference(rows, projected, *arguments)
    assert total is not None
    to_rows, to_projected = (total.new_empty(0) if x is None else x for x in gradients)
    return total, to_rows, to_projected


@define(
    "angle_difference_hvp(Tensor rows, Tensor projected, Tensor? rows_tangents, "
    "Tensor? projected_tangents, bool angle) -> (Tensor, Tensor)"
)
def _angle_difference_hvp(
    rows: Tensor,
    projected: Tensor,
    rows_tangents: Tensor | None,
    projected_tangents: Tensor | None,
    angle: bool,
) -> tuple[Tensor, Tensor]:
    _check_tangents(rows, projected, rows_tangents, projected_tangents)
    tensors = (rows, projected, rows_tangents, projected_tangents)
    if _by_moments(rows, projected, angle, False):
        return angle_moments.hessian_vector_product(*tensors)
    to_rows, to_projected = _set_by_set(angle_loss.hessian_vector_product, tensors, angle)
    assert to_rows is not None
    assert to_projected is not None
    return to_rows, to_projected


@torch.library.register_fake("comhe_ext::angle_difference", lib=LIBRARY)
def _(
    rows: Tensor,
    projected: Tensor,
    angle: bool,
    rows_gradient: bool,
    projected_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(rows, projected)
    dtype = compute_dtype(rows, projected)
    return (
        rows.new_empty(rows.shape[0], dtype=dtype),
        rows.new_empty(rows.shape if rows_gradient else (0,), dtype=dtype),
        projected.new_empty(projected.shape if projected_gradient else (0,), dtype=dtype),
    )


@torch.library.register_fake("comhe_ext::angle_difference_hvp", lib=LIBRARY)
def _(
    rows: Tensor,
    projected: Tensor,
    rows_tangents: Tensor | None,
    projected_tangents: Tensor | None,
    angle: bool,
) -> tuple[Tensor, Tensor]:
    _check_tangents(rows, projected, rows_tangents, projected_tangents)
    dtype = compute_dtype(rows, projected)
    return (
        rows.new_empty(rows.shape, dtype=dtype),
        projected.new_empty(projected.shape, dtype=dtype),
    )


register_vmap("angle_difference", num_tensors=2)
register_vmap("angle_difference_hvp", num_tensors=4)


class _AngleDifference(torch.autograd.Function):
    """rows, projected -> S [M]; the gradients come out beside it to be kept for the derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor, projected: Tensor, angle: bool, rows_gradient: bool, projected_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, to_rows, to_projected = torch.ops.comhe_ext.angle_difference(
            rows, projected, angle, rows_gradient, projected_gradient
        )
        return total, to_rows, to_projected

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, projected, ctx.angle, *ctx.wanted = inputs
        ctx.mark_non_differentiable(*output[1:])
        allow_missing_gradients(ctx)
        ctx.save_for_backward(rows, projected, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_total is None:
            return None, None, None, None, None
        rows, projected, to_rows, to_projected = ctx.saved_tensors
        # as for an energy: without grad mode or tangents the values are enough
        if torch.is_grad_enabled() or forward_mode():
            gradients = to_rows, to_projected
            to_rows, to_projected = _Gradient.apply(rows, projected, *gradients, ctx.angle)
        factor = grad_total[:, None, None]
        return (
            (to_rows * factor).to(rows.dtype) if ctx.wanted[0] else None,
            (to_projected * factor).to(projected.dtype) if ctx.wanted[1] else None,
            None,
            None,
            None,
        )


class _AngleDifferenceWithTangents(_AngleDifference):
    """The same in forward mode too; apart, because Dynamo refuses a Function that has a jvp."""

    generate_vmap_rule = False

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _AngleDifference.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2], *output[1:])

    @staticmethod
    @differentiable_jvp
    def jvp(
        ctx: Any,
        rows: Tensor,
        projected: Tensor,
        to_rows: Tensor,
        to_projected: Tensor,
        *tangents: Tensor | None,
    ) -> tuple[Tensor, None, None]:
        gradients = _Gradient.apply(rows, projected, to_rows, to_projected, ctx.angle)
        slopes = [
            (gradient * tangent).sum((1, 2))
            for gradient, tangent in zip(gradients, tangents[:2], strict=True)
            if tangent is not None
        ]
        return sum(slopes[1:], slopes[0]), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        apply = _AngleDifferenceWithTangents.apply
        return over_batch(apply, info, in_dims, arguments[:2], *arguments[2:])


class _Gradient(torch.autograd.Function):
    """The gradients that a sweep has made, as functions of the rows in both spaces."""

    @staticmethod
    def forward(
        rows: Tensor, projected: Tensor, to_rows: Tensor, to_projected: Tensor, angle: bool
    ) -> tuple[Tensor, Tensor]:
        return to_rows.clone(), to_projected.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        rows, projected, to_rows, to_projected, ctx.angle = inputs
        # which are not left out
        ctx.made = to_rows.dim() == rows.dim(), to_projected.dim() == projected.dim()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, projected)
        ctx.save_for_forward(rows, projected)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        cotangents = tuple(
            x if made else None for x, made in zip(cotangents, ctx.made, strict=True)
        )
        points = ctx.saved_tensors
        products = _HessianProducts.apply(*_final(points), *cotangents, ctx.angle)
        to_rows, to_projected = (
            product.to(x.dtype) for product, x in zip(products, points, strict=True)
        )
        return to_rows, to_projected, None, None, None

    @staticmethod
    @differentiable_jvp
    def jvp(
        ctx: Any, rows: Tensor, projected: Tensor, *tangents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        products = _HessianProducts.apply(*_final((rows, projected)), *tangents[:2], ctx.angle)
        to_rows, to_projected = (
            product if made else product.new_zeros(0)
            for product, made in zip(products, ctx.made, strict=True)
        )
        return to_rows, to_projected

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        return over_batch(_Gradient.apply, info, in_dims, arguments[:4], arguments[4])


class _HessianProducts(torch.autograd.Function):
    """H t in both spaces, linear in the tangents t of both; the rows have to be `final`."""

    @staticmethod
    def forward(
        rows: Tensor,
        projected: Tensor,
        rows_tangents: Tensor | None,
        projected_tangents: Tensor | None,
        angle: bool,
    ) -> tuple[Tensor, Tensor]:
        to_rows, to_projected = torch.ops.comhe_ext.angle_difference_hvp(
            rows, projected, rows_tangents, projected_tangents, angle
        )
        return to_rows, to_projected

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        rows, projected, *tangents, ctx.angle = inputs
        ctx.given = [tangent is not None for tangent in tangents]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, projected)
        ctx.save_for_forward(rows, projected)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        points = ctx.saved_tensors
        products = _HessianProducts.apply(*points, *cotangents, ctx.angle)
        return (
            *[torch.zeros_like(x) for x in points],
            *[
                product if given else None
                for product, given in zip(products, ctx.given, strict=True)
            ],
            None,
        )

    @staticmethod
    @differentiable_jvp
    def jvp(
        ctx: Any, rows: Tensor, projected: Tensor, _: None, __: None, *tangents: Any
    ) -> tuple[Tensor, Tensor]:
        return _HessianProducts.apply(rows, projected, *tangents[:2], ctx.angle)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        return over_batch(_HessianProducts.apply, info, in_dims, arguments[:4], arguments[4])


def _final(points: Sequence[Tensor]) -> list[Tensor]:
    return [final(x, "loss") for x in points]


def angle_difference(rows: Tensor, projected: Tensor, angle: bool) -> Tensor:
    """Squared differences of cosines or angles, summed over ordered pairs, of M sets -> [M]."""
    if forward_mode():
        leave_trace()
        return _AngleDifferenceWithTangents.apply(rows, projected, angle, True, True)[0]
    wanted = differentiated(rows), differentiated(projected)
    return apply(_AngleDifference, rows, projected, angle, *wanted)[0]
