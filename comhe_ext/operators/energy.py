"""The energy of many sets, with its derivatives in every mode.

The energy of a set is one number, so the forward sweep makes the gradient along with it: the
backward only scales it, and the derivative along tangents (forward mode) is its product with them.
Nothing keeps the projected rows for the backward. The gradient is a differentiable function too, in
both modes, by a closed-form Hessian-vector product; a third derivative raises instead of being
silently wrong.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    product,
)
from comhe_ext.operators.rows import count_of, points_of
from comhe_ext.operators.sweep import SweepOptions


def _swept(
    weights: Sequence[Tensor], matrices: Sequence[Tensor | None], gradient: bool, arguments: Any
) -> tuple[Tensor, Tensor]:
    """Call the operator, which takes [V, N, d], for a lone [N, d] too."""
    if weights[0].dim() == 3:
        return torch.ops.comhe_ext.sweep(weights, matrices, gradient, *arguments)
    sets = [weights[0].unsqueeze(0)]
    energy, gradient_rows = torch.ops.comhe_ext.sweep(sets, matrices, gradient, *arguments)
    # no view for autograd: what a Function returns may be changed in place then
    return torch.ops.aten._unsafe_view.default(energy, []), gradient_rows


# where a copy costs more than a call: elsewhere weights of one shape share the products of backward
ONE_BY_ONE_ON = ("cpu",)


class _Energy(torch.autograd.Function):
    """Weights and matrices -> energy [B]; the gradient in the rows is kept for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(num_weights: int, arguments: Sequence[Any], *tensors: Any) -> tuple[Tensor, Tensor]:
        return _swept(tensors[:num_weights], tensors[num_weights:], True, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.num_weights, ctx.arguments, *tensors = inputs
        gradient = output[1]
        ctx.mark_non_differentiable(gradient)
        allow_missing_gradients(ctx)
        ctx.save_for_backward(gradient, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_energy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_energy is None:
            return None, None, *[None] * (len(ctx.needs_input_grad) - 2)
        gradient, *tensors = ctx.saved_tensors
        weights, matrices = tensors[: ctx.num_weights], tensors[ctx.num_weights :]
        factors: Tensor | None = grad_energy
        # nobody differentiates what runs without grad mode or tangents: then the values will do,
        # also because Dynamo (2.13) cannot trace a setup_context Function inside a backward
        if torch.is_grad_enabled() or forward_mode():
            # to be differentiated again: as a function of the rows, and they of both tensors
            points, sizes = points_of(weights, matrices)
            sets = _Sets(sizes, ctx.arguments)
            gradient = _Gradient.apply(points, gradient.view(points.shape), sets)
            gradient = torch.ops.comhe_ext.scale_rows(gradient, grad_energy.reshape(-1), sizes)
            gradient, factors = gradient.reshape(-1, gradient.shape[-1]), None
        needed = ctx.needs_input_grad[2:]
        return None, None, *_pull_back(gradient, factors, weights, matrices, needed)


class _EnergyWithTangents(torch.autograd.Function):
    """Points -> energy [B] in forward mode too; apart, because Dynamo refuses what has a jvp."""

    @staticmethod
    def forward(points: Tensor, sets: "_Sets") -> tuple[Tensor, Tensor]:
        weights = sets.weights(points)
        nothing = [None] * len(weights)
        energy, gradient = torch.ops.comhe_ext.sweep(weights, nothing, True, *sets.arguments)
        return energy, gradient.view(points.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        points, ctx.sets = inputs
        gradient = output[1]
        ctx.mark_non_differentiable(gradient)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(points, gradient)
        ctx.save_for_forward(points, gradient)

    @staticmethod
    def backward(ctx: Any, grad_energy: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        if grad_energy is None:
            return None, None
        points, gradient = ctx.saved_tensors
        gradient = _Gradient.apply(points, gradient, ctx.sets)
        scaled = torch.ops.comhe_ext.scale_rows(gradient, grad_energy, ctx.sets.sizes)
        return scaled.to(points.dtype), None

    @staticmethod
    @differentiable_jvp
    def jvp(
        ctx: Any, points: Tensor, gradient: Tensor, tangents: Tensor, _: None
    ) -> tuple[Tensor, None]:
        gradient = _Gradient.apply(points, gradient, ctx.sets)
        return torch.ops.comhe_ext.dot_rows(gradient, tangents, ctx.sets.sizes), None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], points: Tensor, sets: "_Sets") -> tuple[Any, Any]:
        sets = sets.repeated(info.batch_size)
        return over_batch(_EnergyWithTangents.apply, info, in_dims, [points], sets)


def _pull_back(
    gradient: Tensor,
    factors: Tensor | None,
    weights: Sequence[Tensor],
    projections: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """From the gradient in the projected rows [T, k] to those in the weights and the projections.

    Args:
        gradient: weight by weight, set by set, matrix by matrix.
        factors: what each set's part is to be multiplied with, [B], or None.
        weights, projections: what was projected.
        needed: whether each of them wants its gradient.
    """
    if len(weights) == 1 and projections[0] is None:
        (weight,) = weights
        gradient = gradient.view(weight.shape)
        if factors is not None:
            gradient = gradient * (factors.view(-1, 1, 1) if factors.dim() else factors)
        return [gradient.to(weight.dtype), None]
    together = gradient.device.type not in ONE_BY_ONE_ON
    # that of a sum or a mean is one number, spread over the sets without being copied
    if together and factors is not None and factors.stride(0) == 0 < factors.shape[0]:
        gradient, factors = gradient * factors[0], None
    grads: list[Tensor | None] = [None] * (2 * len(weights))
    # those of one shape share a product, those of one number of matrices the copy before it
    by_count: dict[int, dict[Any, list[_Projected]]] = {}
    row = first = 0
    for index, (weight, matrices) in enumerate(zip(weights, projections, strict=True)):
        sets, n, d = weight.shape
        count = count_of(matrices)
        part = gradient[row : row + sets * count * n].view(sets, count, n, gradient.shape[1])
        if factors is not None:
            part = part * factors[first : first + sets * count].view(sets, count, 1, 1)
        row, first = row + sets * count * n, first + sets * count
        if matrices is None:
            grads[index] = part[:, 0, :, :d].to(weight.dtype)
            continue
        if not together:
            _pull_back_projected([[_Projected(index, part, weight, matrices)]], needed, grads)
            continue
        wanted = needed[index], needed[len(weights) + index]
        like = weight.shape, weight.dtype, matrices.dtype, wanted
        groups = by_count.setdefault(count, {})
        groups.setdefault(like, []).append(_Projected(index, part, weight, matrices))
    for groups in by_count.values():
        _pull_back_projected(groups.values(), needed, grads)
    return grads


class _Projected(NamedTuple):
    """A weight, the matrices that project it, and the gradient in its projected rows."""

    position: int  # among the weights
    part: Tensor  # [V, C, N, k]
    weight: Tensor
    matrices: Tensor


def _pull_back_projected(
    groups: Collection[Sequence[_Projected]], needed: Sequence[bool], grads: list[Tensor | None]
) -> None:
    """Fill in the gradients of weights and matrices, of one number C, in groups of one shape.

    sum_c g_c P_c and g_c^T W are one product each for all of a group, once the gradients g_c of a
    row lie side by side. On a GPU launches for each weight would take longer than their work.
    """
    parts = [one.part.transpose(1, 2) for group in groups for one in group]
    by_row = torch.cat([rows for part in parts for rows in part])  # [sum V N, C, k]
    begin, num_weights = 0, len(grads) // 2
    for group in groups:
        position, _, weight, matrices = group[0]
        n, width = weight.shape[0] * weight.shape[1], by_row.shape[1] * by_row.shape[2]
        rows = by_row[begin : begin + len(group) * n].view(len(group), n, width)
        begin += len(group) * n
        if needed[position]:
            stacked = _stack([one.matrices.flatten(0, 1) for one in group])
            to_weights = product(rows, stacked.to(rows.dtype)).to(weight.dtype)
            for one, grad in zip(group, to_weights, strict=True):
                grads[one.position] = grad.view(weight.shape)
        if needed[num_weights + position]:
            stacked = _stack([one.weight.flatten(0, 1) for one in group])
            to_matrices = product(rows.mT, stacked.to(rows.dtype)).to(matrices.dtype)
            for one, grad in zip(group, to_matrices, strict=True):
                grads[num_weights + one.position] = grad.view(matrices.shape)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)) if len(parts) > 1 else parts[0].unsqueeze(0)


@dataclass(frozen=True)
class _Sets:
    """Sizes and options as one argument: torch would look for tangents of a list's elements."""

    sizes: Sequence[int]
    arguments: Sequence[Any]

    def weights(self, points: Tensor) -> list[Tensor]:
        """Split points into these sets, as `sweep` takes them."""
        if points.dim() == 3:
            return [points]
        return [rows.unsqueeze(0) for rows in points.split(list(self.sizes))]

    def repeated(self, batch: int) -> "_Sets":
        """Repeat the sets for all elements of a batch."""
        options = SweepOptions.of(self.arguments).repeated(batch)
        return _Sets(list(self.sizes) * batch, options.arguments)


class _Gradient(torch.autograd.Function):
    """The gradient that a sweep has made, as a function of the points."""

    @staticmethod
    def forward(points: Tensor, gradient: Tensor, sets: _Sets) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        points, gradient, ctx.sets = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(points, gradient)
        ctx.save_for_forward(points, gradient)

    @staticmethod
    def backward(ctx: Any, cotangents: Tensor | None) -> tuple[Tensor | None, None, None]:
        if cotangents is None:
            return None, None, None
        points, gradient = ctx.saved_tensors
        points = final(points, "energy")
        product = _HessianProduct.apply(points, cotangents, gradient, ctx.sets)
        return product.to(points.dtype), None, None

    @staticmethod
    @differentiable_jvp
    def jvp(ctx: Any, points: Tensor, gradient: Tensor, tangents: Tensor, *_: None) -> Tensor:
        points = final(points, "energy")
        return _HessianProduct.apply(points, tangents.to(gradient.dtype), gradient, ctx.sets)

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[Any], points: Tensor, gradient: Tensor, sets: _Sets
    ) -> tuple[Any, Any]:
        sets = sets.repeated(info.batch_size)
        return over_batch(_Gradient.apply, info, in_dims, [points, gradient], sets)


class _HessianProduct(torch.autograd.Function):
    """H t of each set, linear in the tangents t; the points have to be `final`."""

    @staticmethod
    def forward(points: Tensor, tangents: Tensor, gradient: Tensor, sets: _Sets) -> Tensor:
        result: Tensor = torch.ops.comhe_ext.hessian_vector_product(
            points, tangents, gradient, sets.sizes, *sets.arguments
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        points, _, gradient, ctx.sets = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(points, gradient)
        ctx.save_for_forward(points, gradient)

    @staticmethod
    def backward(ctx: Any, cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if cotangents is None:
            return None, None, None, None
        points, gradient = ctx.saved_tensors
        to_tangents = _HessianProduct.apply(points, cotangents, gradient, ctx.sets)
        return torch.zeros_like(points), to_tangents, None, None

    @staticmethod
    @differentiable_jvp
    def jvp(
        ctx: Any, points: Tensor, gradient: Tensor, _: None, tangents: Tensor, *__: None
    ) -> Tensor:
        return _HessianProduct.apply(points, tangents, gradient, ctx.sets)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Sequence[Any],
        points: Tensor,
        tangents: Tensor,
        gradient: Tensor,
        sets: _Sets,
    ) -> tuple[Any, Any]:
        sets = sets.repeated(info.batch_size)
        return over_batch(_HessianProduct.apply, info, in_dims, [points, tangents, gradient], sets)


def energy(
    weights: Sequence[Tensor], matrices: Sequence[Tensor | None], options: SweepOptions
) -> Tensor:
    """Compute the energies [B] of the sets of rows of weights [V, N, d], projected by matrices.

    In one sweep; differentiable twice in all tensors, in both modes; see the top of this file. A
    weight that is alone and not projected may be [N, d]: its energy is [].
    """
    if forward_mode():
        leave_trace()
        # torch's own products carry the tangents of weights and matrices to the rows
        points, sizes = points_of(weights, matrices)
        energies: Tensor = _EnergyWithTangents.apply(points, _Sets(sizes, options.arguments))[0]
        return energies if weights[0].dim() == 3 else energies.squeeze(0)
    tensors = [*weights, *matrices]
    if differentiated(*tensors):
        return apply(_Energy, len(weights), options.arguments, *tensors)[0]
    return _swept(weights, matrices, False, options.arguments)[0]
