"""Short ways to call what lies below the public functions: operators and backends."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from comhe_ext.kernels.pair_functions import PairFunction, Riesz
from comhe_ext.kernels.sweep import Backend, Projected, SweepRequest
from comhe_ext.operators.energy import energy
from comhe_ext.operators.sweep import SweepOptions


def options_of(
    s: float = 2.0,
    *,
    reduction: str = "mean",
    eps: float = 0.0,
    backend: str = "torch",
    factors: Sequence[float] = (),
    **of_the_pair: Any,
) -> SweepOptions:
    """Make what the operators take from the keywords of the public functions."""
    return SweepOptions(Riesz(s, **of_the_pair), reduction, eps, backend, factors)


def packed_energy(points: Tensor, sizes: Sequence[int], options: SweepOptions) -> Tensor:
    """Compute the energies [B] of sets of rows that lie one after another, [T, k]."""
    weights = [part.unsqueeze(0) for part in points.split(list(sizes))]
    # of no set at all there still is a dtype and a device
    weights = weights if sizes else [points.view(0, 1, points.shape[1])]
    return energy(weights, [None] * len(weights), options)


def sweep_of(
    backend: Backend,
    points: Tensor,
    sizes: Sequence[int],
    scales: Sequence[float],
    pair: PairFunction,
    eps: float,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Let a backend compute the energies and the gradient of packed rows."""
    result = backend.sweep(SweepRequest(points, sizes, scales, pair, eps, gradient))
    return result.energy, result.gradient


def sweep_projected(
    backend: Backend,
    weights: Sequence[Tensor],
    projections: Sequence[Tensor | None],
    scales: Sequence[float],
    pair: PairFunction,
    eps: float,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Let a backend project weights [N, d], and compute the energies and the gradient."""
    sizes = [
        weight.shape[0]
        for weight, matrices in zip(weights, projections, strict=True)
        for _ in range(1 if matrices is None else matrices.shape[0])
    ]
    source = Projected(weights, projections)
    result = backend.sweep(SweepRequest(source, sizes, scales, pair, eps, gradient))
    return result.energy, result.gradient


def sweep_columns(
    backend: Backend,
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    scale: float,
    pair: PairFunction,
    eps: float,
    gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Let a backend compute the energy [] of rows against columns, and both gradients."""
    result = backend.sweep(
        SweepRequest(rows, [len(rows)], [scale], pair, eps, gradient, columns, row_ids, column_ids)
    )
    return result.energy.squeeze(0), result.gradient, result.columns_gradient


def riesz(
    s: float = 2.0, half_space: bool = False, by_angle: bool = False, min_distance: float = 1e-3
) -> Riesz:
    """Make Riesz' pair function by position."""
    return Riesz(s, min_distance=min_distance, half_space=half_space, angular=by_angle)
