"""The operators of the angle-preserving loss, and their autograd.

    comhe_ext::angle_difference      rows [M, N, d], projected [M, N, k] -> S [M], gradients of both
    comhe_ext::angle_difference_hvp  rows, projected, tangents of both -> like rows, like projected

S is a number a set, so its gradient comes out of the forward sweep and the backward only scales;
the gradient is differentiable by closed-form Hessian-vector products, as in `comhe_ext.ops`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from comhe_ext.kernels import angles
from comhe_ext.ops import (
    LIBRARY,
    check_device,
    check_like,
    check_rows,
    compute_dtype,
    define,
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
    total, to_rows, to_projected = angles.sweep(rows, projected, angle, rows_gradient)
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
    return angles.hessian_vector_product(rows, projected, rows_tangents, projected_tangents, angle)


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


register_vmap("angle_difference", num_tensors=2, packed=False)
register_vmap("angle_difference_hvp", num_tensors=4, packed=False)


class _AngleDifference(torch.autograd.Function):
    """rows, projected -> S [M]; the gradients come out beside it to be kept for the backward."""

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
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, projected, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_total is None:
            return None, None, None, None
        # as in comhe_ext.ops: without grad mode the values are enough
        scale: Callable[..., Any] = _Gradient.forward
        if torch.is_grad_enabled():
            scale = _Gradient.apply
        grads = scale(grad_total, *ctx.saved_tensors, ctx.angle)
        return grads[0] if ctx.rows_gradient else None, grads[1], None, None


class _Gradient(torch.autograd.Function):
    """The kept gradients times grad_total, as functions of everything they came from."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_total: Tensor,
        rows: Tensor,
        projected: Tensor,
        to_rows: Tensor,
        to_projected: Tensor,
        angle: bool,
    ) -> tuple[Tensor, Tensor]:
        factor = grad_total[:, None, None]
        scaled = to_rows * factor if to_rows.dim() == 3 else to_rows.clone()
        return scaled.to(rows.dtype), (to_projected * factor).to(projected.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.angle = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_SecondOrder.apply(*tangents, *ctx.saved_tensors, ctx.angle), None, None, None


class _SecondOrder(torch.autograd.Function):
    """What `_Gradient` owes to grad_total, rows and projected."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows_tangents: Tensor | None,
        projected_tangents: Tensor | None,
        grad_total: Tensor,
        rows: Tensor,
        projected: Tensor,
        to_rows: Tensor,
        to_projected: Tensor,
        angle: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dots = torch.zeros_like(grad_total)
        for tangents, gradient in ((rows_tangents, to_rows), (projected_tangents, to_projected)):
            if tangents is not None and gradient.dim() == 3:
                dots = dots + (tangents * gradient).sum((1, 2)).to(dots.dtype)
        to_rows, to_projected = torch.ops.comhe_ext.angle_difference_hvp(
            rows, projected, rows_tangents, projected_tangents, angle
        )
        factor = grad_total[:, None, None]
        return dots, (to_rows * factor).to(rows.dtype), (to_projected * factor).to(projected.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "comhe_ext: the loss is differentiable twice; third derivatives are not implemented"
        )


def angle_difference(rows: Tensor, projected: Tensor, angle: bool) -> Tensor:
    """Squared differences of cosines or angles, summed over ordered pairs, of M sets -> [M]."""
    total: Tensor = _AngleDifference.apply(rows, projected, angle, rows.requires_grad)[0]
    return total
