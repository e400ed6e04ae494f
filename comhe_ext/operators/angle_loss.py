"""The operators of the angle-preserving loss, and their autograd.

    comhe_ext::angle_difference      rows [M, N, d], projected [M, N, k] -> S [M], gradients of both
    comhe_ext::angle_difference_hvp  rows, projected, tangents of both -> like rows, like projected

S is a number a set, so its gradient comes out of the forward sweep, and the backward only scales
it; both modes and the second derivatives are made as in `comhe_ext.operators.energy`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from comhe_ext import backends
from comhe_ext.kernels.portable import angle_loss
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


@define(
    "angle_difference(Tensor rows, Tensor projected, bool angle, bool rows_gradient) "
    "-> (Tensor, Tensor, Tensor)"
)
def _angle_difference(
    rows: Tensor, projected: Tensor, angle: bool, rows_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check(rows, projected)
    total, to_rows, to_projected = angle_loss.sweep(rows, projected, angle, rows_gradient)
    return total, to_projected.new_empty(0) if to_rows is None else to_rows, to_projected


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
    return angle_loss.hessian_vector_product(
        rows, projected, rows_tangents, projected_tangents, angle
    )


@torch.library.register_fake("comhe_ext::angle_difference", lib=LIBRARY)
def _(
    rows: Tensor, projected: Tensor, angle: bool, rows_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check(rows, projected)
    dtype = compute_dtype(rows, projected)
    return (
        rows.new_empty(rows.shape[0], dtype=dtype),
        rows.new_empty(rows.shape if rows_gradient else (0,), dtype=dtype),
        projected.new_empty(projected.shape, dtype=dtype),
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
        rows: Tensor, projected: Tensor, angle: bool, rows_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, to_rows, to_projected = torch.ops.comhe_ext.angle_difference(
            rows, projected, angle, rows_gradient
        )
        return total, to_rows, to_projected

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, projected, ctx.angle, ctx.rows_gradient = inputs
        ctx.mark_non_differentiable(*output[1:])
        allow_missing_gradients(ctx)
        ctx.save_for_backward(rows, projected, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_total is None:
            return None, None, None, None
        rows, projected, to_rows, to_projected = ctx.saved_tensors
        # as for an energy: without grad mode or tangents the values are enough
        if torch.is_grad_enabled() or forward_mode():
            gradients = to_rows, to_projected
            to_rows, to_projected = _Gradient.apply(rows, projected, *gradients, ctx.angle)
        factor = grad_total[:, None, None]
        return (
            (to_rows * factor).to(rows.dtype) if ctx.rows_gradient else None,
            (to_projected * factor).to(projected.dtype),
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
        rows, projected, to_rows, _, ctx.angle = inputs
        # left out where the rows are constant
        ctx.rows_gradient = to_rows.dim() == rows.dim()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, projected)
        ctx.save_for_forward(rows, projected)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.rows_gradient:
            cotangents = (None, cotangents[1])
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
        to_rows, to_projected = _HessianProducts.apply(
            *_final((rows, projected)), *tangents[:2], ctx.angle
        )
        return to_rows if ctx.rows_gradient else to_rows.new_zeros(0), to_projected

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
        return _AngleDifferenceWithTangents.apply(rows, projected, angle, True)[0]
    return apply(_AngleDifference, rows, projected, angle, differentiated(rows))[0]
