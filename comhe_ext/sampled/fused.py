"""The estimate in one call of a backend that offers it, without a list.

    comhe_ext::sampled_sweep   rows [S, n, k], permutation -> energies [S], gradient [S, n, k]

The sweep within the blocks, the permutation and the polynomial, up to the second degree, are one
pass over the rows, which makes the gradient along with the energies. Derivatives of that gradient
come from the estimate that is composed of operators.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from comhe_ext import backends
from comhe_ext.kernels.sweep import SampledRequest
from comhe_ext.operators.library import LIBRARY, apply, compute_dtype, define, forward_mode
from comhe_ext.operators.sweep import OPTIONS, SweepOptions
from comhe_ext.sampled.polynomials import Polynomial

# the moments of a block of m rows of k columns take k / m times the memory of the rows
MOST_COLUMNS_OF_A_ROW = 2


def offered(
    rows: Tensor, samples: int, polynomial: Polynomial | None, options: SweepOptions
) -> bool:
    """Tell whether the estimate can be made in one call, and is better made so.

    Under torch.compile and the transforms of torch.func it is composed.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    degree = polynomial.powers[-1] if polynomial is not None else 0
    if forward_mode() or degree > 2:
        return False
    if degree == 2 and rows.shape[2] > MOST_COLUMNS_OF_A_ROW * samples:
        return False
    return backends.load(_backend_of(rows, options)).OFFERS.sampled


def _backend_of(rows: Tensor, options: SweepOptions) -> str:
    if options.backend != backends.AUTO:
        return options.backend
    dtype, columns = compute_dtype(rows), rows.shape[2]
    return backends.choose(None, options.pair, rows.device, dtype, columns)


def fused_energies(
    rows: Tensor,
    permutation: Tensor,
    parts: int,
    polynomial: Polynomial | None,
    options: SweepOptions,
    composed: Callable[[Tensor], Tensor],
) -> Tensor:
    """Estimate the energies of sets of rows [S, n, k] -> [S], float64.

    Args:
        rows: float32.
        permutation: [S, n].
        parts: how many blocks.
        polynomial: None or of a degree of at most 2.
        options: of the energy, without factors.
        composed: the same as a function of the rows that is differentiable twice.
    """
    terms = {} if polynomial is None else dict(zip(*polynomial, strict=True))
    coefficients = [float(terms.get(power, 0.0)) for power in (1, 2)]
    settings = (parts, coefficients, *options.arguments)
    if torch.is_grad_enabled() and rows.requires_grad:
        energies: Tensor = apply(_Fused, rows, permutation, settings, composed)
        return energies
    return _swept(rows, permutation, False, settings)[0]


class _Fused(torch.autograd.Function):
    """Rows -> energies [S]; the gradient in the rows is kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        permutation: Tensor,
        settings: Sequence[Any],
        composed: Callable[[Tensor], Tensor],
    ) -> Tensor:
        energies, gradient = _swept(rows, permutation, True, settings)
        ctx.composed = composed
        ctx.save_for_backward(rows, gradient)
        return energies

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            # to be differentiated again
            energies = ctx.composed(rows)
            (to_rows,) = torch.autograd.grad(energies, rows, grad, create_graph=True)
            return to_rows, None, None, None
        return gradient * grad.to(gradient.dtype)[:, None, None], None, None, None


def _swept(
    rows: Tensor, permutation: Tensor, gradient: bool, settings: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.comhe_ext.sampled_sweep(
        rows, permutation, gradient, *settings
    )
    return result


@define(
    "sampled_sweep(Tensor rows, Tensor permutation, bool gradient, int parts, "
    f"float[] coefficients, {OPTIONS}) -> (Tensor, Tensor)"
)
def _sampled_sweep(
    rows: Tensor,
    permutation: Tensor,
    gradient: bool,
    parts: int,
    coefficients: Sequence[float],
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    options = SweepOptions.of(arguments)
    scale = options.pair.scale(rows.shape[1], options.reduction)
    request = SampledRequest(
        rows,
        permutation,
        parts,
        (coefficients[0], coefficients[1]),
        scale,
        options.pair,
        options.eps,
        gradient,
    )
    backend = backends.load(_backend_of(rows, options))
    energies, rows_gradient = backend.sampled(request)
    return energies, energies.new_empty(0) if rows_gradient is None else rows_gradient


@torch.library.register_fake("comhe_ext::sampled_sweep", lib=LIBRARY)
def _(rows: Tensor, permutation: Tensor, gradient: bool, *arguments: Any) -> tuple[Tensor, Tensor]:
    energies = rows.new_empty(rows.shape[0], dtype=torch.float64)
    return energies, torch.empty_like(rows) if gradient else energies.new_empty(0)
