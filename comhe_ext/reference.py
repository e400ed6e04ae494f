"""The dense definition in float64: every pair written out, derivatives by autograd.

Slow and O(N^2 d) in memory on purpose. It is what the tests and the benchmark call the truth, and
it is meant to be read beside Liu et al., "Learning towards minimum hyperspherical energy" (2018),
and Lin et al., "Regularizing neural networks via minimizing hyperspherical energy" (2020).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# what the roundings of multiples of one row leave of v_iq v_jr - v_ir v_jq, relatively
ROUNDING = 2.0**-49


def _difference(u: Tensor, v: Tensor, u_length: Tensor, v_length: Tensor) -> Tensor:
    """u - v of unit rows [P, d]; along them, exactly, where they are positive multiples of one row.

    What rounding left across would be a direction that the rows do not have, and a pair function
    makes a large force of it.
    """
    difference = u - v
    with torch.no_grad():
        pivot = u.abs().argmax(1, keepdim=True)
        u_pivot, v_pivot = u.gather(1, pivot), v.gather(1, pivot)
        off = (u * v_pivot - v * u_pivot).abs()
        multiples = (off <= ROUNDING * (u * v_pivot).abs()).all(1, keepdim=True)
        multiples &= u_pivot * v_pivot > 0  # a dead row is not one
        exact = u * (1.0 - v_length / u_length)
        rounding = torch.where(multiples, difference - exact, 0.0)
    # a constant, so that derivatives are those of u - v
    return difference - rounding


def _sqrt(x: Tensor) -> Tensor:
    """Square root whose derivatives at 0 are 0: a coincident pair has no direction."""
    # the inner where keeps sqrt'(0) = inf out of the graph
    return torch.where(x == 0, 0.0, torch.where(x == 0, 1.0, x).sqrt())


def _riesz(t: Tensor, s: float) -> Tensor:
    return -t.log() if s == 0 else t**-s


def _pair_function(t: Tensor, s: float, min_distance: float) -> Tensor:
    """f(t) = t^-s, or log(1/t) for s = 0; below `min_distance` the tangent line of f there."""
    if min_distance == 0:
        return torch.where(t == 0, torch.inf, _riesz(torch.where(t == 0, 1.0, t), s))
    m = torch.tensor(min_distance, dtype=t.dtype, device=t.device)
    slope = -1 / m if s == 0 else -s * m ** -(s + 1)
    below = t < m
    return torch.where(below, _riesz(m, s) + slope * (t - m), _riesz(torch.where(below, m, t), s))


def hyperspherical_energy(
    weight: Tensor,
    s: float = 2.0,
    *,
    half_space: bool = False,
    angular: bool = False,
    reduction: str = "mean",
    eps: float = 0.0,
    min_distance: float = 1e-3,
) -> Tensor:
    """Energy in float64 of the rows of `weight` [N, d] -> [], or of [B, N, d] -> [B]."""
    return pair_energy(
        weight,
        lambda t: _pair_function(t, s, min_distance),
        half_space=half_space,
        angular=angular,
        reduction=reduction,
        eps=eps,
    )


def pair_energy(
    weight: Tensor,
    function: Callable[[Tensor], Tensor],
    *,
    half_space: bool = False,
    angular: bool = False,
    reduction: str = "mean",
    eps: float = 0.0,
) -> Tensor:
    """The same for any `function` of the distance (chord or angle) of two points, elementwise."""
    if weight.dim() == 3:
        options = {"half_space": half_space, "angular": angular}
        sets = [pair_energy(w, function, **options, reduction=reduction, eps=eps) for w in weight]
        return torch.stack(sets) if sets else weight.new_zeros(0, dtype=torch.float64)

    p = weight.double()
    squared_norm = p.square().sum(1, keepdim=True) + eps
    alive = squared_norm > 0
    squared_norm = torch.where(alive, squared_norm, 1.0)
    v = torch.where(alive, p / squared_norm.sqrt(), 0.0)
    deficit = torch.where(alive, eps / squared_norm, 1.0)  # 1 - |v|^2
    if half_space:  # the 2N points, antipodes included, as the papers draw them
        v, deficit = torch.cat([v, -v]), torch.cat([deficit, deficit])

    n = v.shape[0]
    i, j = torch.triu_indices(n, n, offset=1, device=v.device)
    # r^2 = 2 - 2c without its cancellation, and 4 - r^2 = 2 + 2c likewise
    length, both = (1.0 - deficit).sqrt(), (deficit[i] + deficit[j]).squeeze(1)
    near = _difference(v[i], v[j], length[i], length[j]).square().sum(1) + both
    far = _difference(v[i], -v[j], length[i], length[j]).square().sum(1) + both
    distance = 2 * torch.atan2(_sqrt(near), _sqrt(far)) if angular else _sqrt(near)
    total = function(distance).sum()
    return 2 * total if reduction == "sum" else total / max(i.numel(), 1)


def compressive_energy(
    weight: Tensor, projection: Tensor, s: float = 2.0, **options: Any
) -> Tensor:
    """Mean over the matrices P_c of `projection` [C, k, d] of the energy of the rows P_c w_i."""
    weight, projection = weight.double(), projection.double()
    energies = [hyperspherical_energy(weight @ p.mT, s, **options) for p in projection]
    return torch.stack(energies).mean(0)


def group_energy(
    weight: Tensor, groups: Sequence[Sequence[int]], s: float = 2.0, **options: Any
) -> Tensor:
    """Mean over the index lists of `groups` of the energy of the rows restricted to them."""
    energies = [hyperspherical_energy(weight[..., list(g)], s, **options) for g in groups]
    return torch.stack(energies).mean(0)


def angle_preserving_loss(weight: Tensor, projection: Tensor, kind: str = "cosine") -> Tensor:
    """Mean over P_c of |cos(P_c W) - cos(W)|, or of the sum of squared differences of angles."""
    weight, projection = weight.double(), projection.double()
    i, j = torch.triu_indices(weight.shape[0], weight.shape[0], offset=1, device=weight.device)

    def compare(rows: Tensor) -> Tensor:
        norm = rows.norm(dim=1, keepdim=True)
        v = torch.where(norm > 0, rows / torch.where(norm > 0, norm, 1.0), 0.0)
        one = torch.ones((), dtype=v.dtype, device=v.device)
        near = _difference(v[i], v[j], one, one).square().sum(1)
        far = _difference(v[i], -v[j], one, one).square().sum(1)
        return (far - near) / 4 if kind == "cosine" else 2 * torch.atan2(_sqrt(near), _sqrt(far))

    sums = [2 * (compare(weight @ p.mT) - compare(weight)).square().sum() for p in projection]
    return torch.stack([_sqrt(x) for x in sums] if kind == "cosine" else sums).mean()
