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
    """Compute u - v of unit rows [P, d], free of rounding for positive multiples of one row.

    The difference of such rows lies along them. What rounding leaves across would be a direction
    that the rows do not have, and a pair function would turn it into a large force.
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
    """Take the square root, with derivatives 0 at 0: a coincident pair has no direction."""
    # the inner where keeps sqrt'(0) = inf out of the graph
    return torch.where(x == 0, 0.0, torch.where(x == 0, 1.0, x).sqrt())


def _riesz(t: Tensor, s: float, shift: float = 0.0) -> Tensor:
    """Compute t^-s of the shifted distance; log(1/t) for s = 0, -t^|s| for s < 0."""
    # without a shift not by the square, which underflows first
    t = (shift + t.square()).sqrt() if shift else t
    return -t.log() if s == 0 else -(t**-s) if s < 0 else t**-s


def _pair_function(t: Tensor, s: float, min_distance: float, shift: float = 0.0) -> Tensor:
    """Compute Riesz' function; without a shift, below `min_distance`, its tangent line there."""
    if shift:
        return _riesz(t, s, shift)
    if min_distance == 0:
        at_zero = 0.0 if s < 0 else torch.inf
        return torch.where(t == 0, at_zero, _riesz(torch.where(t == 0, 1.0, t), s))
    m = torch.tensor(min_distance, dtype=t.dtype, device=t.device)
    slope = -(abs(s) or 1.0) * m ** -(s + 1)
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
    """Compute the energy in float64 of the rows of `weight` [N, d] -> [], or [B, N, d] -> [B]."""
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
    """Compute the energy by any elementwise `function` of the distance, chord or angle."""
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
    """Average the energy of the rows P_c w_i over the matrices P_c of `projection` [C, k, d]."""
    weight, projection = weight.double(), projection.double()
    energies = [hyperspherical_energy(weight @ p.mT, s, **options) for p in projection]
    return torch.stack(energies).mean(0)


def group_energy(
    weight: Tensor, groups: Sequence[Sequence[int]], s: float = 2.0, **options: Any
) -> Tensor:
    """Average the energy of the columns in each index list of `groups`."""
    energies = [hyperspherical_energy(weight[..., list(g)], s, **options) for g in groups]
    return torch.stack(energies).mean(0)


def angle_preserving_loss(weight: Tensor, projection: Tensor, kind: str = "cosine") -> Tensor:
    """Average |cos(P_c W) - cos(W)| over P_c, or the sum of squared differences of angles."""
    weight, projection = weight.double(), projection.double()
    sums = [angle_difference(weight, weight @ p.mT, kind) for p in projection]
    return torch.stack([_sqrt(x) for x in sums] if kind == "cosine" else sums).mean()


def angle_difference(rows: Tensor, projected: Tensor, kind: str = "cosine") -> Tensor:
    """Sum the squared differences of cosines or angles in two spaces over the ordered pairs."""
    i, j = torch.triu_indices(rows.shape[0], rows.shape[0], offset=1, device=rows.device)

    def compare(rows: Tensor) -> Tensor:
        norm = rows.double().norm(dim=1, keepdim=True)
        v = torch.where(norm > 0, rows / torch.where(norm > 0, norm, 1.0), 0.0)
        one = torch.ones((), dtype=v.dtype, device=v.device)
        dead = (norm == 0).double().sum(1)  # orthogonal to all, another dead row too
        near = _difference(v[i], v[j], one, one).square().sum(1) + dead[i] + dead[j]
        far = _difference(v[i], -v[j], one, one).square().sum(1) + dead[i] + dead[j]
        return (far - near) / 4 if kind == "cosine" else 2 * torch.atan2(_sqrt(near), _sqrt(far))

    return 2 * (compare(projected) - compare(rows)).square().sum()


# --- for large N ----------------------------------------------------------------------------------


def exact_energy_and_gradient(
    points: Tensor,
    s: float = 2.0,
    *,
    half_space: bool = False,
    angular: bool = False,
    reduction: str = "mean",
    eps: float = 0.0,
    min_distance: float = 1e-3,
    function: Callable[[Tensor], Tensor] | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the energy [] of `points` [N, k] and its gradient [N, k] in float64, for large N.

    The same numbers as `hyperspherical_energy`, or as `pair_energy` where a `function` of the
    distance is given in place of Riesz', a chunk of rows at a time: O(N chunk) memory.
    Distances come from differences of rows, too, and the pair function's slope from autograd.
    Summing with matrix products costs the gradient of a pair at t radians about 1e-16 / t, so the
    nearest pairs, multiples of one row among them, are summed one by one.
    """
    p = points.detach().double().requires_grad_()
    squared_norm = p.square().sum(1, keepdim=True) + eps
    alive = squared_norm > 0
    squared_norm = torch.where(alive, squared_norm, 1.0)
    v = torch.where(alive, p / squared_norm.sqrt(), 0.0)
    deficit = torch.where(alive, eps / squared_norm, 1.0)  # 1 - |v|^2

    def pair_function(near: Tensor, far: Tensor) -> Tensor:
        root = _sqrt(near)
        distance = 2 * torch.atan2(root, _sqrt(far)) if angular else root
        return function(distance) if function else _pair_function(distance, s, min_distance)

    n = p.shape[0]
    count = n * (2 * n - 1) if half_space else n * (n - 1) // 2
    scale = 2.0 if reduction == "sum" else 1.0 / max(count, 1)
    energy = torch.zeros((), dtype=torch.float64, device=p.device)
    x, force, force_deficit = v.detach(), torch.zeros_like(v), torch.zeros_like(deficit)
    length = (1.0 - deficit.detach()).sqrt()
    sides = (1.0, -1.0) if half_space or angular else (1.0,)
    chunk = chunk or max((1 << 20) // max(n, 1), 1)
    for begin in range(0, n, chunk):
        rows, cols = slice(begin, begin + chunk), slice(begin, n)
        both = deficit.detach()[rows] + deficit.detach()[cols].mT
        above = torch.ones_like(both, dtype=torch.bool).triu(1)
        distances, nearest = [], []
        for side in sides:
            squared = _distance(x[rows], side * x[cols]).square()
            i, j = ((squared > 0) & (squared < 1e-18) & above).nonzero(as_tuple=True)
            apart = _difference(x[rows][i], side * x[cols][j], length[rows][i], length[cols][j])
            squared[i, j] = apart.square().sum(1)
            distances.append((squared + both).requires_grad_())
            nearest.append((i, j, apart))
        # a pair left out must not poison the derivatives of the others
        inside, across = (torch.where(above, distances[k], 2.0) for k in (0, -1))
        values = pair_function(inside, across)
        if half_space:
            values = 2 * (values + pair_function(across, inside))
        part = torch.where(above, values, 0.0).sum()
        energy += part.detach()
        slopes = torch.autograd.grad(part, distances)
        for side, slope, (i, j, apart) in zip(sides, slopes, nearest, strict=True):
            force_deficit[rows] += slope.sum(1, keepdim=True)
            force_deficit[cols] += slope.sum(0).unsqueeze(1)
            # d |v_i - side v_j|^2 = 2 (v_i - side v_j) (dv_i - side dv_j)
            push = 2 * slope[i, j].unsqueeze(1) * apart
            force[rows].index_add_(0, i, push)
            force[cols].index_add_(0, j, -side * push)
            slope[i, j] = 0.0
            row_sums, column_sums = slope.sum(1, keepdim=True), slope.sum(0).unsqueeze(1)
            force[rows] += 2 * (row_sums * x[rows] - side * (slope @ x[cols]))
            force[cols] += 2 * (column_sums * x[cols] - side * (slope.mT @ x[rows]))
    outputs, forces = [v, deficit], [force, force_deficit]
    if half_space:
        antipodes = pair_function(4 - 2 * deficit, 2 * deficit).sum()
        energy += antipodes.detach()
        outputs, forces = [*outputs, antipodes], [*forces, torch.ones_like(antipodes)]
    (gradient,) = torch.autograd.grad(outputs, p, forces)
    return scale * energy, scale * gradient


def _distance(left: Tensor, right: Tensor) -> Tensor:
    """Compute distances by difference, without the cancellation of a matrix product."""
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")


# --- comparison -----------------------------------------------------------------------------------


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Compute |actual - expected| / max(|expected|, floor), undivided where that is 0."""
    expected = expected.detach().double()
    difference = actual.detach().to(expected) - expected
    scale = max(float(torch.linalg.vector_norm(expected)), floor)
    return float(torch.linalg.vector_norm(difference)) / (scale or 1.0)


# --- rows against columns -------------------------------------------------------------------------


def _unit(points: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalize rows in float64 -> v [T, d] and the deficits 1 - |v|^2 [T, 1]."""
    p = points.double()
    squared_norm = p.square().sum(1, keepdim=True) + eps
    alive = squared_norm > 0
    squared_norm = torch.where(alive, squared_norm, 1.0)
    v = torch.where(alive, p / squared_norm.sqrt(), 0.0)
    return v, torch.where(alive, eps / squared_norm, 1.0)


def _cross_squares(rows: Tensor, columns: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute r^2 = 2 - 2c and 4 - r^2 of all rows with all columns, [N, M] each."""
    (u, u_deficit), (v, v_deficit) = _unit(rows, eps), _unit(columns, eps)
    i = torch.arange(len(u), device=u.device).repeat_interleave(len(v))
    j = torch.arange(len(v), device=u.device).repeat(len(u))
    both = (u_deficit[i] + v_deficit[j]).squeeze(1)
    lengths = (1.0 - u_deficit).sqrt()[i], (1.0 - v_deficit).sqrt()[j]
    near = _difference(u[i], v[j], *lengths).square().sum(1) + both
    far = _difference(u[i], -v[j], *lengths).square().sum(1) + both
    return near.view(len(u), len(v)), far.view(len(u), len(v))


def cross_energy(
    rows: Tensor,
    columns: Tensor,
    function: Callable[[Tensor], Tensor],
    *,
    half_space: bool = False,
    angular: bool = False,
    eps: float = 0.0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute sum_i weight_i E_i [] and E_i [N] in float64, E_i = sum_j f over the other ids."""
    squares = _cross_squares(rows, columns, eps)
    met = torch.ones_like(squares[0], dtype=torch.bool)
    if row_ids is not None and column_ids is not None:
        met = row_ids[:, None] != column_ids[None]
    # a pair left out must not poison the derivatives of the others
    near, far = (torch.where(met, x, 2.0) for x in squares)
    ends = [(near, far), (far, near)] if half_space else [(near, far)]
    values = torch.stack(
        [function(2 * torch.atan2(_sqrt(a), _sqrt(b)) if angular else _sqrt(a)) for a, b in ends]
    )
    row_energies = torch.where(met, values.sum(0), 0.0).sum(1)
    weights = torch.ones_like(row_energies) if row_weights is None else row_weights.double()
    return (weights * row_energies).sum(), row_energies


def nearest(
    rows: Tensor,
    columns: Tensor | None = None,
    *,
    half_space: bool = False,
    eps: float = 0.0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the nearest other row of a set, or the nearest column of another id, of each row.

    Returns:
        The chord [N] in float64, to the antipode where that is nearer in half space, and the index
        [N], the lowest of those that are equal but for rounding; inf and -1 where a row meets
        nobody.
    """
    if columns is None:
        columns, row_ids = rows, torch.arange(len(rows), device=rows.device)
        column_ids = row_ids
    near, far = _cross_squares(rows, columns, eps)
    distance = (torch.minimum(near, far) if half_space else near).sqrt()
    if row_ids is not None and column_ids is not None:
        distance = distance.masked_fill(row_ids[:, None] == column_ids[None], torch.inf)
    if not len(columns):
        distance = distance.new_full((len(rows), 1), torch.inf)
    least = distance.amin(1)
    equal = distance <= (least + (least / 2).clamp_max(ROUNDING * 8)).unsqueeze(1)
    index = equal.to(torch.uint8).argmax(1)
    return least, torch.where(least.isfinite(), index, -1)
