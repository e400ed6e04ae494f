"""The energy of rows against columns, and of each row, with their derivatives in every mode.

Three functions of points, weights a of the rows and tangents t make all derivatives of
L = sum_i a_i E_i and of the row energies E_i:

    gradient         G(a) = dL/dp            linear in a; the sweep gives it
    slopes           S(t)_i = <dE_i/dp, t>   linear in t; G and S are each other's transposes
    Hessian product  H(a, t) = dG(a)/dp t    linear in both

The rest is as in `comhe_ext.operators.energy`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from comhe_ext.operators.library import (
    allow_missing_gradients,
    apply,
    differentiable_jvp,
    differentiated,
    final,
    forward_mode,
    leave_trace,
    over_batch,
)
from comhe_ext.operators.sweep import SweepOptions


@dataclass(frozen=True)
class _Settings:
    """The options as one argument: torch would look for tangents of a list's elements."""

    arguments: Sequence[Any]
    wanted: tuple[bool, bool]  # gradients, of rows and columns; for others there is an empty tensor


class _Energy(torch.autograd.Function):
    """Rows and columns -> energy [B]; the gradients are kept for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor,
        columns: Tensor,
        row_ids: Tensor | None,
        column_ids: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        energy, _, to_rows, to_columns = torch.ops.comhe_ext.cross_sweep(
            rows, columns, row_ids, column_ids, None, *settings.wanted, False, *settings.arguments
        )
        return energy, to_rows, to_columns

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *points, ctx.settings = inputs
        ctx.mark_non_differentiable(*output[1:])
        allow_missing_gradients(ctx)
        ctx.save_for_backward(*points, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_energy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_energy is None:
            return (None,) * 5
        *points, to_rows, to_columns = ctx.saved_tensors
        if torch.is_grad_enabled() or forward_mode():
            to_rows, to_columns = _Gradient.apply(*points, None, to_rows, to_columns, ctx.settings)
        factor = grad_energy[:, None, None]
        rows, columns = points[:2]
        of_rows, of_columns = ctx.settings.wanted
        return (
            (to_rows * factor).to(rows.dtype) if of_rows else None,
            (to_columns * factor).to(columns.dtype) if of_columns else None,
            None,
            None,
            None,
        )


class _EnergyWithTangents(_Energy):
    """The same in forward mode too; apart, because Dynamo refuses a Function that has a jvp."""

    generate_vmap_rule = False

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _Energy.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4], *output[1:])

    @staticmethod
    @differentiable_jvp
    def jvp(ctx: Any, *arguments: Any) -> tuple[Tensor, None, None]:
        *points, to_rows, to_columns = arguments[:6]
        gradients = _Gradient.apply(*points, None, to_rows, to_columns, ctx.settings)
        slopes = [
            (gradient * tangent).sum((1, 2))
            for gradient, tangent in zip(gradients, arguments[6:8], strict=True)
            if tangent is not None
        ]
        return sum(slopes[1:], slopes[0]), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        apply = _EnergyWithTangents.apply
        return over_batch(apply, info, in_dims, arguments[:4], arguments[4])


class _RowEnergies(torch.autograd.Function):
    """Rows and columns -> the energy E_i of each row, [B, N]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor,
        columns: Tensor,
        row_ids: Tensor | None,
        column_ids: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        energies: Tensor = torch.ops.comhe_ext.cross_sweep(
            rows, columns, row_ids, column_ids, None, False, False, True, *settings.arguments
        )[1]
        return energies

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *points, ctx.settings = inputs
        allow_missing_gradients(ctx)
        ctx.save_for_backward(*points)

    @staticmethod
    def backward(ctx: Any, weights: Tensor | None) -> tuple[Tensor | None, ...]:
        if weights is None:
            return (None,) * 5
        points = ctx.saved_tensors
        if torch.is_grad_enabled() or forward_mode():
            to_rows, to_columns = _Gradient.apply(*points, weights, None, None, ctx.settings)
        else:
            to_rows, to_columns = _gradient(points, weights, ctx.settings)
        of_rows, of_columns = ctx.settings.wanted
        return (
            to_rows.to(points[0].dtype) if of_rows else None,
            to_columns.to(points[1].dtype) if of_columns else None,
            None,
            None,
            None,
        )


class _RowEnergiesWithTangents(_RowEnergies):
    """The same in forward mode too; apart, because Dynamo refuses a Function that has a jvp."""

    generate_vmap_rule = False

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _RowEnergies.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    @differentiable_jvp
    def jvp(ctx: Any, *arguments: Any) -> Tensor:
        slopes: Tensor = _Slopes.apply(*arguments[:6], ctx.settings)
        return slopes

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        apply = _RowEnergiesWithTangents.apply
        return over_batch(apply, info, in_dims, arguments[:4], arguments[4])


def _gradient(
    points: Sequence[Any], weights: Tensor | None, settings: _Settings
) -> tuple[Tensor, Tensor]:
    _, _, to_rows, to_columns = torch.ops.comhe_ext.cross_sweep(
        *points, weights, *settings.wanted, False, *settings.arguments
    )
    return to_rows, to_columns


class _Gradient(torch.autograd.Function):
    """G as a function of rows, columns and weights; its values may be known from a sweep."""

    @staticmethod
    def forward(
        rows: Tensor,
        columns: Tensor,
        row_ids: Tensor | None,
        column_ids: Tensor | None,
        weights: Tensor | None,
        to_rows: Tensor | None,
        to_columns: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor]:
        if to_rows is None or to_columns is None:
            return _gradient((rows, columns, row_ids, column_ids), weights, settings)
        return to_rows.clone(), to_columns.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.settings = inputs[7]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        cotangents = tuple(
            x if wanted else None for x, wanted in zip(cotangents, ctx.settings.wanted, strict=True)
        )
        if all(x is None for x in cotangents):
            return (None,) * 8
        *points, weights = ctx.saved_tensors
        to_rows, to_columns = _HessianProducts.apply(
            *_final(points), _final_weights(weights), *cotangents, ctx.settings
        )
        to_weights = None
        if weights is not None:
            to_weights = _Slopes.apply(*points, *cotangents, ctx.settings).to(weights.dtype)
        return (
            to_rows.to(points[0].dtype),
            to_columns.to(points[1].dtype),
            None,
            None,
            to_weights,
            None,
            None,
            None,
        )

    @staticmethod
    @differentiable_jvp
    def jvp(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *points, weights = arguments[:5]
        row_tangents, column_tangents, _, _, weight_tangents = arguments[5:10]
        results: list[tuple[Tensor, ...]] = []
        if row_tangents is not None or column_tangents is not None:
            products = _HessianProducts.apply(
                *_final(points),
                _final_weights(weights),
                row_tangents,
                column_tangents,
                ctx.settings,
            )
            results.append(
                tuple(
                    x if wanted else x.new_zeros(x.shape[0], 0)
                    for x, wanted in zip(products, ctx.settings.wanted, strict=True)
                )
            )
        if weight_tangents is not None:
            results.append(_Gradient.apply(*points, weight_tangents, None, None, ctx.settings))
        to_rows, to_columns = results[0]
        if len(results) == 1:
            return to_rows, to_columns
        return to_rows + results[1][0], to_columns + results[1][1]

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        return over_batch(_Gradient.apply, info, in_dims, arguments[:7], arguments[7])


class _Slopes(torch.autograd.Function):
    """S: the derivative of each row's energy along tangents of rows and columns, [B, N]."""

    @staticmethod
    def forward(
        rows: Tensor,
        columns: Tensor,
        row_ids: Tensor | None,
        column_ids: Tensor | None,
        row_tangents: Tensor | None,
        column_tangents: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        slopes: Tensor = torch.ops.comhe_ext.cross_hessian_vector_product(
            rows,
            columns,
            row_ids,
            column_ids,
            None,
            row_tangents,
            column_tangents,
            *settings.arguments,
        )[2]
        return slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.settings = inputs[6]
        ctx.given = [x is not None for x in inputs[4:6]]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6])
        ctx.save_for_forward(*inputs[:6])

    @staticmethod
    def backward(ctx: Any, weights: Tensor | None) -> tuple[Tensor | None, ...]:
        if weights is None:
            return (None,) * 7
        *points, row_tangents, column_tangents = ctx.saved_tensors
        to_rows, to_columns = _HessianProducts.apply(
            *_final(points), _final_weights(weights), row_tangents, column_tangents, ctx.settings
        )
        of_tangents = replace(ctx.settings, wanted=tuple(ctx.given))
        to_tangents = _Gradient.apply(*points, weights, None, None, of_tangents)
        return (
            to_rows.to(points[0].dtype),
            to_columns.to(points[1].dtype),
            None,
            None,
            *[x if given else None for x, given in zip(to_tangents, ctx.given, strict=True)],
            None,
        )

    @staticmethod
    @differentiable_jvp
    def jvp(ctx: Any, *arguments: Any) -> Tensor:
        points, tangents = arguments[:4], arguments[6:]
        if tangents[0] is not None or tangents[1] is not None:
            raise NotImplementedError(
                "comhe_ext: row energies are differentiable twice, but not in forward mode of "
                "forward mode: take one of both derivatives in reverse mode"
            )
        slopes: Tensor = _Slopes.apply(*points, *tangents[4:6], ctx.settings)
        return slopes

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        return over_batch(_Slopes.apply, info, in_dims, arguments[:6], arguments[6])


class _HessianProducts(torch.autograd.Function):
    """H of weights and tangents, linear in the tangents; points and weights have to be `final`."""

    @staticmethod
    def forward(
        rows: Tensor,
        columns: Tensor,
        row_ids: Tensor | None,
        column_ids: Tensor | None,
        weights: Tensor | None,
        row_tangents: Tensor | None,
        column_tangents: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor]:
        to_rows, to_columns, _ = torch.ops.comhe_ext.cross_hessian_vector_product(
            rows,
            columns,
            row_ids,
            column_ids,
            weights,
            row_tangents,
            column_tangents,
            *settings.arguments,
        )
        return to_rows, to_columns

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.settings = inputs[7]
        ctx.given = [x is not None for x in inputs[5:7]]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(x is None for x in cotangents):
            return (None,) * 8
        points = ctx.saved_tensors
        to_tangents = _HessianProducts.apply(*points, *cotangents, ctx.settings)
        rows, columns, _, _, weights = points
        return (
            torch.zeros_like(rows),
            torch.zeros_like(columns),
            None,
            None,
            None if weights is None else torch.zeros_like(weights),
            *[x if given else None for x, given in zip(to_tangents, ctx.given, strict=True)],
            None,
        )

    @staticmethod
    @differentiable_jvp
    def jvp(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        products: tuple[Tensor, Tensor] = _HessianProducts.apply(
            *arguments[:5], *arguments[10:12], ctx.settings
        )
        return products

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        return over_batch(_HessianProducts.apply, info, in_dims, arguments[:7], arguments[7])


def _final(points: Sequence[Any]) -> list[Any]:
    rows, columns, *ids = points
    return [final(rows, "energy"), final(columns, "energy"), *ids]


def _final_weights(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else final(weights, "energy")


def cross_energy(
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    options: SweepOptions,
) -> Tensor:
    """Compute the energy of rows [B, N, k] against columns [B, M, k].

    Args:
        rows, columns: of one width and device.
        row_ids, column_ids: int32 [B, N] and [B, M], or None; pairs of equal ids do not count.
        options: with reduction "rows" for E_i, "sum", or "mean", which is the sum over N M,
            whatever the ids leave out.

    Returns:
        [B], or [B, N] with reduction "rows". Differentiable twice, see the top of this file.
    """
    points, by_row = (rows, columns, row_ids, column_ids), options.reduction == "rows"
    if forward_mode():
        leave_trace()
        settings = _Settings(options.arguments, (True, True))
        if by_row:
            energies: Tensor = _RowEnergiesWithTangents.apply(*points, settings)
            return energies
        return _EnergyWithTangents.apply(*points, settings)[0]
    wanted = differentiated(rows), differentiated(columns)
    if any(wanted):
        settings = _Settings(options.arguments, wanted)
        result = apply(_RowEnergies if by_row else _Energy, *points, settings)
        return result if by_row else result[0]
    results = torch.ops.comhe_ext.cross_sweep(
        *points, None, False, False, by_row, *options.arguments
    )
    return results[1] if by_row else results[0]
