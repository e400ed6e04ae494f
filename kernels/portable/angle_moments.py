"""The angle-preserving loss of cosines by second moments: no pair is visited.

    S = |U U^T - V V^T|^2 = |U^T U|^2 - 2 |U^T V|^2 + |V^T V|^2     of unit rows, less the diagonal
    G = 2 (U U^T U - V V^T U)     the force on the rows; likewise on the projected ones

This takes O(N (d + k)^2) in place of O(N^2 (d + k)). The three terms cancel where both spaces have
almost the same cosines. In float64, where they are about N^2 / d, they leave an error of 1e-16 / d
in the mean squared difference: less than the 1e-14 that the rounding of float32 cosines adds to it.
Of equal rows they leave 0, for then every term is the same product. The forces cancel as little.
Rows that are float64 have more digits than that in tiles.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .rows import normalize

# how many times (d^2 + d k + k^2) / (d + k) N must be, for moments to be less work than tiles of
# the compiled kernel, or than those of torch: measured on a processor
COMPILED, PORTABLE = 12, 3
# below, calling so many operators of torch takes longer than a compiled sweep
FEWEST = 1024


class _Space(NamedTuple):
    """Unit rows of some sets in one space, in float64."""

    v: Tensor  # [M, N, d]; [1, N, d] where all sets have the same rows
    inv_nu: Tensor  # [M, N, 1]


class _Dot(NamedTuple):
    """What belongs to the derivatives of a `_Space` along the tangents."""

    v: Tensor
    tau: Tensor  # [M, N, 1] <v, tangent>


def is_less_work(n: int, d: int, k: int, compiled: bool) -> bool:
    """Tell whether moments are less work than tiles, of the compiled kernel or of torch."""
    least = (COMPILED if compiled else PORTABLE) * (d * d + d * k + k * k) / (d + k)
    return n >= max(least, FEWEST if compiled else 0)


def _space(points: Tensor) -> _Space:
    if points.shape[0] > 1 and points.stride(0) == 0:
        points = points[:1]
    rows = normalize(points.flatten(0, 1), 0.0, torch.float64)
    return _Space(rows.v.view(points.shape), rows.inv_nu.view(*points.shape[:2], 1))


def _dot(space: _Space, tangents: Tensor | None) -> _Dot:
    if tangents is None:
        return _Dot(torch.zeros_like(space.v), torch.zeros_like(space.inv_nu))
    t = tangents.double()
    tau = (space.v * t).sum(2, keepdim=True)
    return _Dot((t - space.v * tau) * space.inv_nu, tau)


def sweep(
    rows: Tensor, projected: Tensor, rows_gradient: bool, projected_gradient: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute S and its gradients; see `angle_loss.sweep`, of which this is the case of cosines."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(rows.dtype, projected.dtype))
    a, b = _space(rows), _space(projected)
    aa, ab, bb = a.v.mT @ a.v, a.v.mT @ b.v, b.v.mT @ b.v
    total = _squares(aa) - 2.0 * _squares(ab) + _squares(bb)
    # the diagonal: 1 for a row that is dead in one space only
    total = total - ((a.inv_nu > 0) != (b.inv_nu > 0)).sum((1, 2))
    gradients = [
        _gradient(space, space.v @ own - other.v @ mixed).to(dtype) if wanted else None
        for space, other, own, mixed, wanted in (
            (a, b, aa, ab.mT, rows_gradient),
            (b, a, bb, ab, projected_gradient),
        )
    ]
    return total.clamp_min(0.0).to(dtype), gradients[0], gradients[1]


def hessian_vector_product(
    rows: Tensor,
    projected: Tensor,
    rows_tangents: Tensor | None,
    projected_tangents: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Differentiate both gradients along tangents; see `angle_loss.hessian_vector_product`."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(rows.dtype, projected.dtype))
    a, b = _space(rows), _space(projected)
    a_dot, b_dot = _dot(a, rows_tangents), _dot(b, projected_tangents)
    ab, ab_dot = a.v.mT @ b.v, a_dot.v.mT @ b.v + a.v.mT @ b_dot.v
    products = []
    for space, dot, other, other_dot, mixed, mixed_dot in (
        (a, a_dot, b, b_dot, ab.mT, ab_dot.mT),
        (b, b_dot, a, a_dot, ab, ab_dot),
    ):
        own, own_dot = space.v.mT @ space.v, dot.v.mT @ space.v
        own_dot = own_dot + own_dot.mT
        force = space.v @ own - other.v @ mixed
        force_dot = dot.v @ own + space.v @ own_dot - other_dot.v @ mixed - other.v @ mixed_dot
        products.append(_gradient_dot(space, dot, force, force_dot).to(dtype))
    return products[0], products[1]


def _squares(matrices: Tensor) -> Tensor:
    return matrices.square().sum((1, 2))


def _gradient(space: _Space, force: Tensor) -> Tensor:
    """Compute the gradient from half the force: G without its part along v, over nu."""
    along = (space.v * force).sum(2, keepdim=True)
    return (force - space.v * along) * (4.0 * space.inv_nu)


def _gradient_dot(space: _Space, dot: _Dot, force: Tensor, force_dot: Tensor) -> Tensor:
    """Differentiate `_gradient` along the tangents."""
    v, inv_nu = space
    along = (v * force).sum(2, keepdim=True)
    along_dot = (dot.v * force).sum(2, keepdim=True) + (v * force_dot).sum(2, keepdim=True)
    product = force_dot - dot.v * along - v * along_dot - (force - v * along) * dot.tau * inv_nu
    return product * (4.0 * inv_nu)
