"""The public functions: checks, layout, and one call of the operator."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

from comhe_ext import backends
from comhe_ext.checks import (
    check_backend,
    check_factor,
    check_flag,
    check_pairing,
    check_projection,
    check_weight,
    is_dtensor,
    quote,
)
from comhe_ext.groups import split_columns
from comhe_ext.kernels.pair_functions import PairFunction, Riesz
from comhe_ext.operators import angle_loss
from comhe_ext.operators.energy import energy
from comhe_ext.operators.library import compute_dtype
from comhe_ext.operators.rows import project, safe_sqrt
from comhe_ext.operators.sweep import SweepOptions
from comhe_ext.packing import set_energies, stack_parts
from comhe_ext.pairing import cross_energies, nearest_rows, row_energies
from comhe_ext.sampled.keywords import (
    Method,
    Sampling,
    check_sampling,
    check_sampling_of_pairs,
    sampled_energies,
)
from comhe_ext.sampled.plan import SamplingPlan
from comhe_ext.settings import (
    BackendName,
    PairReduction,
    Reduction,
    energy_settings,
    pair_settings,
)
from comhe_ext.sharded.pairs import like_rows, nearest_of_all
from comhe_ext.sharded.pairs import row_energies as row_energies_of_all
from comhe_ext.sharded.rows import dtensor_shard

AngleKind = Literal["cosine", "angle"]


def hyperspherical_energy(
    weight: Tensor,
    s: float = 2.0,
    *,
    half_space: bool = False,
    angular: bool = False,
    reduction: Reduction = "mean",
    eps: float = 0.0,
    min_distance: float = 1e-3,
    backend: BackendName | None = None,
    method: Method = "exact",
    samples: int = 1024,
    plan: SamplingPlan | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Compute how closely the rows of `weight` crowd on the sphere: the hyperspherical energy.

    Torch equivalent::

        r = torch.nn.functional.pdist(torch.nn.functional.normalize(weight))
        energy = (r**-s).mean()    # s = 0: -r.log().mean()

    with O(N d) memory and no N x N matrix, differentiable once and twice.

    Args:
        weight: [N, d], N neurons of d weights, or [B, N, d], B independent sets; float16, bfloat16,
            float32 or float64, any strides. A DTensor, whose ranks call together, is not gathered:
            see `comhe_ext.distributed`.
        s: exponent of the pair function r^-s, any finite s > -2; 0 means log(1/r), and s < 0
            -r^|s|, whose energy falls as the distances grow.
        half_space: energy of the 2N points {v_i} and {-v_i}, antipodal pairs included.
        angular: measure a pair by its angle in radians instead of the chord r.
        reduction: "mean" over the unordered pairs, or "sum" over the ordered ones (twice the
            unordered sum), as the papers write it.
        eps: added to the squared norms; the authors' code has 1e-4.
        min_distance: below it (in the unit of the distance) a pair's function continues along its
            tangent line, so near-duplicates are pushed apart with a finite force; 0 is the pure
            definition. At least 0, less than 2.
        backend: "triton", "cpu" or "torch"; None picks the best that works here.
        method: "exact", or "sampled": an unbiased estimate from random blocks, for very many rows.
        samples: rows of a block, for "sampled"; where one block holds all rows it is exact.
        plan: a `comhe_ext.sampled.SamplingPlan` of these rows, which takes most of the estimate's
            variance; needed where near-duplicates carry the energy.
        generator: source of the partition, on the device of `weight`; not under torch.compile. Of a
            DTensor that of the first rank counts, and the plan is the same on all ranks.

    Returns:
        The energy, [] or [B], float32 (float64 for float64 weights). 0 where there is no pair.

    Raises:
        TypeError: `weight` is not a dense floating-point tensor, or an option has the wrong type.
        ValueError: a shape or an option is out of range.
        RuntimeError: the backend asked for cannot run here.

    Note:
        A row of zero norm is a dead neuron: orthogonal to all others, zero gradient (eps = 0).
        Exact duplicates add a finite energy and no gradient, for they have no direction to part
        in. The authors' s = 0 is -log r^2, twice this one; their angle is arccos(c)/pi + 1e-4.

    Source: Liu et al. (2018): MHE; half space is its HS-MHE, the angle its A-MHE.
    """
    check_weight(weight, sharded=True)
    settings = energy_settings(s, half_space, angular, reduction, eps, min_distance, backend)
    sampling = check_sampling(method, samples, plan, generator)
    if is_dtensor(weight):
        return dtensor_shard(weight, sampling=sampling).energies(settings).view(weight.shape[:-2])
    return _energies_of_sets(weight, settings.options((weight,)), sampling)


def pair_energy(
    rows: Tensor,
    columns: Tensor | None = None,
    pair: PairFunction = Riesz(),  # noqa: B008 (frozen)
    *,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    reduction: PairReduction = "mean",
    eps: float = 0.0,
    backend: BackendName | None = None,
    method: Method = "exact",
    samples: int = 1024,
    plan: SamplingPlan | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Compute the energy of `rows`, among themselves or against `columns`, by any pair function.

    Torch equivalent, of `Riesz(s)`::

        r = torch.cdist(torch.nn.functional.normalize(rows), torch.nn.functional.normalize(columns))
        energy = (r**-s)[row_ids[:, None] != column_ids].mean()    # without columns: pdist

    with O((N + M) d) memory, and gradients to both sides. `hyperspherical_energy` is this function
    of `Riesz` without columns, with its parameters as keywords.

    Args:
        rows: [N, d], or [B, N, d] for B independent sets; see `hyperspherical_energy`. A DTensor
            without columns only; energies of rows are one, too.
        columns: [M, d] or [B, M, d] on the device of `rows`; None: each row meets all others once.
        pair: a pair function of `comhe_ext`; half space, the angle and the rest are its own.
        row_ids, column_ids: integers [N] and [M], or of each set [B, N] and [B, M], given together,
            with columns; a row and a column of equal ids do not meet. Row i and column i of one
            tensor that is given twice are kept apart by `torch.arange(N)`, labels by the labels.
        reduction: "mean" over the pairs that count; "sum" over them, without columns over ordered
            pairs (twice the unordered sum); "rows": each row's sum over all that it meets, [N].
            In half space a row meets the antipodes, too, without columns its own as well.
        eps: added to the squared norms.
        backend: "triton", "cpu" or "torch"; None picks the best that works here.
        method, samples, plan, generator: see `hyperspherical_energy`; "sampled" is for rows among
            themselves, and not for "rows".

    Returns:
        The energy, [] or [B]; with "rows" [N] or [B, N]. float32 (float64 if a tensor is).
        Differentiable twice; with "rows" not in forward mode of forward mode.

    Raises:
        TypeError, ValueError, RuntimeError: see `hyperspherical_energy`.

    Source: the sums of Liu et al. (2018), and of SphereFace+ there, for any function.
    """
    check_weight(rows, "rows", sharded=columns is None)
    settings = pair_settings(pair, reduction, eps, backend, ("mean", "sum", "rows"))
    sampling = check_sampling_of_pairs(method, samples, plan, generator, columns, reduction)
    check_pairing(rows, columns, row_ids, column_ids)
    if is_dtensor(rows):
        shard = dtensor_shard(rows, "rows", sampling)
        if reduction == "rows":
            return like_rows(row_energies_of_all(shard, settings), rows)
        return shard.energies(settings).view(rows.shape[:-2])
    if columns is not None:
        options = settings.options((rows, columns), needs="cross")
        return cross_energies(rows, columns, row_ids, column_ids, options)
    if reduction == "rows":
        return row_energies(rows, settings.options((rows,), needs="cross"))
    return _energies_of_sets(rows, settings.options((rows,)), sampling)


def nearest(
    rows: Tensor,
    columns: Tensor | None = None,
    *,
    half_space: bool = False,
    angular: bool = False,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    eps: float = 0.0,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the nearest other row, or the nearest of `columns`, of each row, and its distance.

    Torch equivalent::

        c = normalize(rows) @ normalize(rows).T
        index = c.fill_diagonal_(-torch.inf).argmax(1)    # with columns: against all of them
        distance = (normalize(rows) - normalize(rows)[index]).norm(dim=1)

    with O((N + M) d) memory. The distance is exact where rows are near, and differentiable twice in
    both rows of a pair; the index is a constant. Of columns that are equally near, the index is
    the lowest.

    Args:
        rows: [N, d], or [B, N, d] for B independent sets; see `hyperspherical_energy`. A DTensor
            without columns only; the results are DTensors, too.
        columns: [M, d] or [B, M, d], what the rows are compared with instead of each other.
        half_space: take an antipode for the row itself: the nearest has the largest |cosine|.
        angular: measure by the angle in radians, not by the chord.
        row_ids, column_ids: see `pair_energy`.
        eps: added to the squared norms.
        backend: "triton", "cpu" or "torch"; None picks the best that works here.

    Returns:
        distance: [N] or [B, N], float32 (float64 if a tensor is); infinite where a row meets
            nobody, NaN where it is NaN or meets a row of NaN.
        index: int64, of the row in its set, or of the column; -1 where a row meets nobody.

    Raises:
        TypeError, ValueError, RuntimeError: see `hyperspherical_energy`.

    Note:
        Rows that coincide are at distance 0, which has no direction: no gradient. A dead row is
        orthogonal to all others.

    Source: Wang et al. (2020), MMA; Oquab et al. (2024), the KoLeo loss of DINOv2.
    """
    check_weight(rows, "rows", sharded=columns is None)
    check_pairing(rows, columns, row_ids, column_ids)
    half_space, angular = check_flag("half_space", half_space), check_flag("angular", angular)
    eps = check_factor("eps", eps)
    chosen = backend_for_nearest(backend, rows, columns)
    if is_dtensor(rows):
        shard = dtensor_shard(rows, "rows")
        distance, index = nearest_of_all(shard, half_space, angular, eps, chosen)
        return like_rows(distance, rows), like_rows(index, rows)
    return nearest_rows(rows, columns, row_ids, column_ids, half_space, angular, eps, chosen)


def compressive_energy(
    weight: Tensor,
    projection: Tensor,
    s: float = 2.0,
    *,
    half_space: bool = False,
    angular: bool = False,
    reduction: Reduction = "mean",
    eps: float = 0.0,
    min_distance: float = 1e-3,
    backend: BackendName | None = None,
    method: Method = "exact",
    samples: int = 1024,
    plan: SamplingPlan | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Compute the mean energy of the rows of `weight` after each of several projections (CoMHE).

    Torch equivalent::

        energies = [hyperspherical_energy(weight @ p.T, s) for p in projection]
        energy = torch.stack(energies).mean(0)

    with one matrix product for all projections and one sweep over all projected rows.

    Args:
        weight: [N, d], or [B, N, d] for B independent sets; see `hyperspherical_energy`.
        projection: [C, k, d], C matrices P_c on the device of `weight`; see `random_projection`.
        s, half_space, angular, reduction, eps, min_distance, backend: see `hyperspherical_energy`.
        method, samples, plan, generator: see there; of a plan the list of near pairs serves, and
            each set is partitioned anew.

    Returns:
        The energy, [] or [B], float32 (float64 if either argument is). Differentiable in both.

    Raises:
        TypeError, ValueError, RuntimeError: see `hyperspherical_energy`.

    Note:
        The projection is computed in float32 (float64 if either argument is), autocast or not.

    Source: Lin et al. (2020), RP-CoMHE.
    """
    check_weight(weight, sharded=True)
    sampling = check_sampling(method, samples, plan, generator)
    if is_dtensor(weight):
        whole = projection.full_tensor() if is_dtensor(projection) else projection
        check_projection(weight, whole)
        settings = energy_settings(s, half_space, angular, reduction, eps, min_distance, backend)
        energies = dtensor_shard(weight, sampling=sampling).energies(settings, whole)
        return energies.view(*weight.shape[:-2], whole.shape[0]).mean(-1)
    check_projection(weight, projection)
    settings = energy_settings(s, half_space, angular, reduction, eps, min_distance, backend)
    options = settings.options((weight, projection), projection.shape[1])
    sets = weight if weight.dim() == 3 else weight.unsqueeze(0)
    if sampling is None:
        energies = energy([sets], [projection], options)
    else:
        projected = project(sets, projection).flatten(0, 1)
        energies = sampled_energies(projected, options, sampling, as_planned=False)
    return energies.view(*weight.shape[:-2], projection.shape[0]).mean(-1)


def group_energy(
    weight: Tensor,
    groups: int | Sequence[Sequence[int] | Tensor],
    s: float = 2.0,
    *,
    half_space: bool = False,
    angular: bool = False,
    reduction: Reduction = "mean",
    eps: float = 0.0,
    min_distance: float = 1e-3,
    backend: BackendName | None = None,
    method: Method = "exact",
    samples: int = 1024,
    plan: SamplingPlan | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Compute the mean over groups of coordinates of the energy of the sub-vectors (group CoMHE).

    Torch equivalent::

        energies = [hyperspherical_energy(part, s) for part in weight.tensor_split(groups, -1)]
        energy = torch.stack(energies).mean(0)

    Args:
        weight: [N, d], or [B, N, d] for B independent sets; see `hyperspherical_energy`.
        groups: how many groups of neighbouring coordinates, as even as they can be; or the
            coordinates of each group, which may overlap.
        s, half_space, angular, reduction, eps, min_distance, backend: see `hyperspherical_energy`.
        method, samples, plan, generator: see there; of a plan the list of near pairs serves, and
            each set is partitioned anew.

    Returns:
        The energy, [] or [B], float32 (float64 for float64 weights).

    Raises:
        TypeError, ValueError, RuntimeError: see `hyperspherical_energy`.

    Source: Lin et al. (2020): projections that select coordinates.
    """
    check_weight(weight, sharded=True)
    settings = energy_settings(s, half_space, angular, reduction, eps, min_distance, backend)
    sampling = check_sampling(method, samples, plan, generator)
    if is_dtensor(weight):
        shard = dtensor_shard(weight, sampling=sampling)
        energies = shard.of_groups(split_columns(shard.points(), groups)).energies(settings)
        return energies.view(*weight.shape[:-2], -1).mean(-1)
    parts = stack_parts(split_columns(weight, groups))
    options = settings.options((weight,), parts.shape[-1])
    sets = parts if parts.dim() == 3 else parts.flatten(0, 1)
    if sampling is None:
        energies = set_energies(sets, options)
    else:
        energies = sampled_energies(sets, options, sampling, as_planned=False)
    return energies.view(parts.shape[:-2]).mean(-1)


def angle_preserving_loss(
    weight: Tensor, projection: Tensor, *, kind: AngleKind = "cosine"
) -> Tensor:
    """Compute how far projections turn the rows of `weight` against each other.

    Torch equivalent::

        unit, projected = normalize(weight, dim=-1), normalize(weight @ p.T, dim=-1)
        loss = torch.linalg.norm(projected @ projected.T - unit @ unit.T)    # mean over p

    for kind "cosine", and the sum over i != j of (angle(w_i, w_j) - angle(P w_i, P w_j))^2, in
    radians, for kind "angle"; by tiles, O(N (d + k)) memory, differentiable once and twice.

    Args:
        weight: [N, d], or [B, N, d] for B independent sets; float16, bfloat16, float32 or float64.
        projection: [C, k, d], C matrices P_c on the device of `weight`.
        kind: "cosine" as in the authors' code, "angle" as in the paper.

    Returns:
        The mean over the C matrices, [] or [B], float32 (float64 if either argument is).

    Raises:
        TypeError: an argument is not a dense floating-point tensor.
        ValueError: a shape does not fit, or `kind` is unknown.

    Note:
        A dead row (zero norm) is orthogonal to all others in both spaces. Pairs that coincide or
        oppose each other have no direction to turn in: their angle adds no gradient.

    Source: Lin et al. (2020), AP-CoMHE.
    """
    check_weight(weight)
    check_projection(weight, projection)
    if kind not in ("cosine", "angle"):
        raise ValueError(f"`kind` must be 'cosine' or 'angle', got {quote(kind)}")
    sets = weight if weight.dim() == 3 else weight.unsqueeze(0)
    total = angle_differences(sets, projection, kind)
    if kind == "cosine":
        total = safe_sqrt(total)
    loss = total.mean(-1)
    return loss if weight.dim() == 3 else loss.squeeze(0)


# --- pieces that learned projections and rows on several ranks share ------------------------------


def backend_for_nearest(
    backend: BackendName | None, rows: Tensor, columns: Tensor | None = None
) -> str:
    """Choose the backend that finds nearest rows, or raise if the one asked for cannot."""
    if backend is None:
        return backends.AUTO
    check_backend(backend)
    dtype, width = compute_dtype(rows, columns), rows.shape[-1]
    return backends.choose(backend, None, rows.device, dtype, width, "nearest")


def angle_differences(sets: Tensor, projection: Tensor, kind: str) -> Tensor:
    """Squared differences summed over ordered pairs, of sets [V, N, d] -> [V, C]."""
    rows = sets.to(compute_dtype(sets, projection))
    projected = project(sets, projection)
    count, angle = projection.shape[0], kind == "angle"
    # all projections of a set share its cosines; many sets are worth fewer calls
    by_set = 0 < rows.shape[0] <= count
    if by_set:
        pairs = [(x.expand(count, *x.shape), y) for x, y in zip(rows, projected, strict=True)]
    else:
        pairs = [(rows, y) for y in projected.unbind(1)]
    totals = [angle_loss.angle_difference(x, y, angle) for x, y in pairs]
    return torch.stack(totals, 0 if by_set else 1)


def _energies_of_sets(rows: Tensor, options: SweepOptions, sampling: Sampling | None) -> Tensor:
    """Energy of [N, d] -> [], or of each set of [B, N, d] -> [B], exact or sampled."""
    if sampling is None:
        return set_energies(rows, options)
    sets = rows if rows.dim() == 3 else rows.unsqueeze(0)
    energies = sampled_energies(sets, options, sampling, as_planned=True)
    return energies if rows.dim() == 3 else energies.squeeze(0)
