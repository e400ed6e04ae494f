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

from torch import Tensor

from comhe_ext.checks import check_factor, check_flag, check_pairing, check_projection, check_weight
from comhe_ext.functional import backend_for_nearest, split_columns
from comhe_ext.kernels.pair_functions import PairFunction, Riesz
from comhe_ext.settings import (
    BackendName,
    PairReduction,
    Reduction,
    energy_settings,
    pair_settings,
)
from comhe_ext.sharded.energy import Strategy
from comhe_ext.sharded.pairs import Ids, nearest_of_all, pair_energies, row_energies
from comhe_ext.sharded.rows import plain_shard

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
    energies = plain_shard(rows, group).energies(settings, strategy=strategy)
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

    Returns, raises: see `hyperspherical_energy`.
    """
    settings = energy_settings(s, half_space, angular, reduction, eps, min_distance, backend)
    shard = plain_shard(rows, group)
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
) -> Tensor:
    """Compute the mean over groups of coordinates of the energy of the rows of all ranks.

    Torch equivalent::

        energy = comhe_ext.group_energy(torch.cat(rows_of_all_ranks), groups)

    Args:
        rows: [n, d], or [B, n, d], the rows of this rank.
        groups: of coordinates, see `comhe_ext.group_energy`.
        s, half_space, angular, reduction, eps, min_distance, backend, group, strategy: see
            `hyperspherical_energy`.

    Returns, raises: see `hyperspherical_energy`.
    """
    settings = energy_settings(s, half_space, angular, reduction, eps, min_distance, backend)
    shard = plain_shard(rows, group)
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
        pair, eps, backend: see `comhe_ext.pair_energy`. group: see `hyperspherical_energy`.

    Returns, raises: see `hyperspherical_energy`. With columns, and by rows, the gradients in what
    was gathered are summed over the ranks, and all is differentiable twice.
    """
    check_weight(rows, "rows")
    settings = pair_settings(pair, reduction, eps, backend, ("mean", "sum", "rows"))
    check_pairing(rows, columns, row_ids, column_ids)
    shard = plain_shard(rows, group)
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
