"""The energies of rows that live on several ranks of a process group.

For plain parameters that are different on each rank, as the heads of very many classes that stay
outside of DistributedDataParallel (PartialFC)::

    head = nn.Parameter(torch.randn(classes_of_this_rank, 512))
    energy = comhe_ext.distributed.compressive_energy(head, projection)
    energy.backward()    # the gradient of the energy of all classes, in those of this rank

All ranks of the group call together, with the same options, and get the same energy. The gradient
is whole: it is not to be averaged over the ranks. DTensors, as FSDP2 and tensor parallelism make
them, need none of this: `comhe_ext.hyperspherical_energy` and the others take them as they are.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Generator, Tensor

from comhe_ext.checks import (
    check_factor,
    check_flag,
    check_pairing,
    check_projection,
    check_weight,
    is_dtensor,
)
from comhe_ext.functional import backend_for_nearest
from comhe_ext.groups import split_columns
from comhe_ext.kernels.pair_functions import PairFunction, Riesz
from comhe_ext.sampled.keywords import Method, check_sampling, check_sampling_of_pairs
from comhe_ext.sampled.plan import SamplingPlan
from comhe_ext.settings import (
    BackendName,
    PairReduction,
    Reduction,
    energy_settings,
    pair_settings,
)
from comhe_ext.sharded.energy import Strategy
from comhe_ext.sharded.pairs import Ids, nearest_of_all, pair_energies, row_energies
from comhe_ext.sharded.plan import common_plan
from comhe_ext.sharded.rows import dtensor_shard, mesh_groups, plain_shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
else:
    ProcessGroup: TypeAlias = Any  # a torch without distributed has no such class

__all__ = [
    "compressive_energy",
    "group_energy",
    "hyperspherical_energy",
    "nearest",
    "pair_energy",
    "sampling_plan",
]


def hyperspherical_energy(
    rows: Tensor,
    s: float = 2.0,
    *,
    group: ProcessGroup | None = None,
    strategy: Strategy | None = None,
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
    """Compute the energy of the rows of all ranks together.

    Torch equivalent::

        energy = comhe_ext.hyperspherical_energy(torch.cat(rows_of_all_ranks))

    where each rank computes its share, and only rows travel.

    Args:
        rows: [n, d], or [B, n, d], the rows of this rank; n may differ from rank to rank, and be 0.
        s, half_space, angular, reduction, eps, min_distance, backend: see
            `comhe_ext.hyperspherical_energy`; the same on all ranks.
        group: the ranks that have rows; None is all of them.
        strategy: "gather", every rank sees all rows at once; "ring", the rows of one other rank at
            a time, in memory for a few ranks' rows; None takes "ring" from 8,192 rows of a rank on.
        method: "exact", or "sampled": an unbiased estimate in O(n samples) time, of which `samples`
            rows travel, and moments of k (k + 1) / 2 numbers.
        samples: drawn rows that each row meets, for "sampled"; exact where they are all rows.
        plan: made by `sampling_plan`, whose listed rows travel, too.
        generator: source of the draws; all ranks take what the one of the first rank gives.

    Returns:
        The energy, [] or [B], the same on all ranks, float32 (float64 for float64 rows).
        Differentiable once.

    Raises:
        TypeError, ValueError, RuntimeError: see `comhe_ext.hyperspherical_energy`; rows that do not
            fit together, on all ranks; no process group.

    Note:
        A rank that fails elsewhere is missed by the others: their exchange ends with an error at
        the latest after the timeout of the group.
    """
    settings = energy_settings(s, half_space, angular, reduction, eps, min_distance, backend)
    sampling = check_sampling(method, samples, plan, generator)
    energies = plain_shard(rows, group, sampling).energies(settings, strategy=strategy)
    return energies.view(rows.shape[:-2])


def compressive_energy(
    rows: Tensor,
    projection: Tensor,
    s: float = 2.0,
    *,
    group: ProcessGroup | None = None,
    strategy: Strategy | None = None,
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
    """Compute the mean energy of the rows of all ranks after each of several projections.

    Torch equivalent::

        energy = comhe_ext.compressive_energy(torch.cat(rows_of_all_ranks), projection)

    where the rows are projected before they travel: k numbers each, not d.

    Args:
        rows: [n, d], or [B, n, d], the rows of this rank.
        projection: [C, k, d], the same on all ranks; its gradient is, too.
        s, half_space, angular, reduction, eps, min_distance, backend, group, strategy: see
            `hyperspherical_energy`.
        method, samples, plan, generator: see there; of a plan the list of near pairs serves, and
            rows are drawn anew for each set.

    Returns, raises: see `hyperspherical_energy`.
    """
    settings = energy_settings(s, half_space, angular, reduction, eps, min_distance, backend)
    shard = plain_shard(rows, group, check_sampling(method, samples, plan, generator))
    check_projection(rows, projection)
    energies = shard.energies(settings, projection, strategy)
    return energies.view(*rows.shape[:-2], projection.shape[0]).mean(-1)


def group_energy(
    rows: Tensor,
    groups: int | Sequence[Sequence[int] | Tensor],
    s: float = 2.0,
    *,
    group: ProcessGroup | None = None,
    strategy: Strategy | None = None,
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
    """Compute the mean over groups of coordinates of the energy of the rows of all ranks.

    Torch equivalent::

        energy = comhe_ext.group_energy(torch.cat(rows_of_all_ranks), groups)

    Args:
        rows: [n, d], or [B, n, d], the rows of this rank.
        groups: of coordinates, see `comhe_ext.group_energy`.
        s, half_space, angular, reduction, eps, min_distance, backend, group, strategy: see
            `hyperspherical_energy`.
        method, samples, plan, generator: see there; of a plan the list of near pairs serves, and
            rows are drawn anew for each set.

    Returns, raises: see `hyperspherical_energy`.
    """
    settings = energy_settings(s, half_space, angular, reduction, eps, min_distance, backend)
    shard = plain_shard(rows, group, check_sampling(method, samples, plan, generator))
    parts = split_columns(shard.local, groups)
    return (
        shard.of_groups(parts)
        .energies(settings, strategy=strategy)
        .view(*rows.shape[:-2], -1)
        .mean(-1)
    )


def pair_energy(
    rows: Tensor,
    columns: Tensor | None = None,
    pair: PairFunction = Riesz(),  # noqa: B008 (frozen)
    *,
    group: ProcessGroup | None = None,
    strategy: Strategy | None = None,
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
    """Compute the energy of the rows of all ranks, among themselves or against all columns.

    Torch equivalent::

        energy = comhe_ext.pair_energy(torch.cat(rows_of_all_ranks), torch.cat(columns_of_all), ...)

    Args:
        rows: [n, d], or [B, n, d], the rows of this rank.
        columns: [m, d], or [B, m, d], the columns of this rank, or None on all ranks.
        row_ids, column_ids: of the rows and columns of this rank, see `comhe_ext.pair_energy`.
        reduction: "rows" gives the energies of the rows of this rank, [n] or [B, n].
        strategy: without columns and not by rows; see `hyperspherical_energy`.
        pair, eps, backend: see `comhe_ext.pair_energy`.
        group, method, samples, plan, generator: see `hyperspherical_energy`; "sampled" is for rows
            among themselves, and not for "rows".

    Returns, raises: see `hyperspherical_energy`. With columns, and by rows, the gradients in what
    was gathered are summed over the ranks, and all is differentiable twice.
    """
    check_weight(rows, "rows")
    settings = pair_settings(pair, reduction, eps, backend, ("mean", "sum", "rows"))
    check_pairing(rows, columns, row_ids, column_ids)
    sampling = check_sampling_of_pairs(method, samples, plan, generator, columns, reduction)
    shard = plain_shard(rows, group, sampling)
    if columns is not None:
        ids = None if row_ids is None or column_ids is None else Ids(row_ids, column_ids)
        energies = pair_energies(shard, plain_shard(columns, group), ids, settings)
    elif reduction == "rows":
        energies = row_energies(shard, settings)
    else:
        energies = shard.energies(settings, strategy=strategy)
    return energies if rows.dim() == 3 else energies.squeeze(0)


def nearest(
    rows: Tensor,
    *,
    group: ProcessGroup | None = None,
    half_space: bool = False,
    angular: bool = False,
    eps: float = 0.0,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor]:
    """Find, for each row of this rank, the nearest other row of all ranks, and its distance.

    Torch equivalent::

        distance, index = comhe_ext.nearest(torch.cat(rows_of_all_ranks))    # of this rank's rows

    Args:
        rows: [n, d], or [B, n, d], the rows of this rank.
        half_space, angular, eps, backend: see `comhe_ext.nearest`.
        group: see `hyperspherical_energy`.

    Returns:
        distance: [n] or [B, n]; index: the number of the nearest among the rows of all ranks, rank
        after rank. The gradients in rows of other ranks reach these.

    Raises: see `hyperspherical_energy`.
    """
    shard = plain_shard(rows, group)
    half_space, angular = check_flag("half_space", half_space), check_flag("angular", angular)
    eps, chosen = check_factor("eps", eps), backend_for_nearest(backend, rows)
    distance, index = nearest_of_all(shard, half_space, angular, eps, chosen)
    return (distance, index) if rows.dim() == 3 else (distance.squeeze(0), index.squeeze(0))


def sampling_plan(
    rows: Tensor,
    degree: int = 2,
    trees: int = 4,
    *,
    group: ProcessGroup | None = None,
    generator: Generator | None = None,
) -> SamplingPlan:
    """Make a plan for sampling the rows of all ranks, the same on all of them.

    Torch equivalent::

        plan = comhe_ext.sampled.SamplingPlan.from_rows(torch.cat(rows_of_all_ranks), degree, trees)

    where the rows are gathered, the first rank makes the plan, and the others get it from there. To
    be made anew every few dozen steps only, for the whole rows travel.

    Args:
        rows: [n, d], the rows of this rank; or a DTensor, whose ranks call together.
        degree, trees: see `comhe_ext.sampled.SamplingPlan.from_rows`.
        group: the ranks that have rows; None is all of them. Not for a DTensor.
        generator: source of the random numbers on the first rank, on the device of `rows`.

    Raises:
        TypeError, ValueError: see `comhe_ext.sampled.SamplingPlan.from_rows`.
    """
    check_weight(rows, "rows", sharded=True)
    if rows.dim() != 2:
        raise ValueError(f"`rows` must be 2-D, got shape {tuple(rows.shape)}")
    if is_dtensor(rows) and group is not None:
        raise ValueError("`group` must be None for a DTensor, whose mesh tells the ranks")
    with torch.no_grad():
        if is_dtensor(rows):
            shard, groups = dtensor_shard(rows, "rows"), mesh_groups(rows)
        else:
            shard = plain_shard(rows, group)
            groups = list(shard.rows.groups)
        return common_plan(shard, groups, degree, trees, generator)
