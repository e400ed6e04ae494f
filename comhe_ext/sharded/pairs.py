"""Rows of this rank against the rows, or columns, of all ranks, one result for each row or in all.

Every rank gathers the other side. Its gradient is summed over the ranks, unlike that of an energy
of rows among themselves (`comhe_ext.sharded.energy`), for each rank has a share of it.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from comhe_ext.operators.cross import cross_energy
from comhe_ext.operators.distance import antipode_energies
from comhe_ext.operators.library import leave_trace
from comhe_ext.pairing import NumberedIds, count_met, nearest_rows, tensors_of
from comhe_ext.settings import Settings
from comhe_ext.sharded.collectives import AllRows, Shards, total
from comhe_ext.sharded.rows import ShardedRows, dim_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Ids(NamedTuple):
    """The ids of the rows and columns of this rank, [n] or [V, n] and [m] or [V, m]."""

    rows: Tensor
    columns: Tensor


def pair_energies(
    rows: ShardedRows, columns: ShardedRows, ids: Ids | None, settings: Settings
) -> Tensor:
    """Compute the energies [V] of rows against columns, or, by rows, [V, n] of this rank's."""
    leave_trace()
    points, others = rows.points(), gathered(columns.points(), columns.rows)
    row_ids = column_ids = None
    if ids is not None:
        row_ids = ids.rows.expand(points.shape[:2])
        own = ids.columns.expand(points.shape[0], -1)
        column_ids = gathered(own.unsqueeze(2), columns.rows).squeeze(2)
    options = settings.options((points, others), needs="cross")
    numbered = NumberedIds.of(row_ids, column_ids, points, others)
    energies = cross_energy(points, others, *tensors_of(numbered), options)
    if settings.reduction == "rows":
        return energies
    if settings.reduction == "mean":
        # the operator has divided by the number of all pairs of this rank
        pairs = points.shape[1] * others.shape[1]
        of_all = _total_count(count_met(numbered, points, others), rows.rows)
        energies = energies * (pairs / of_all.clamp_min(1.0)).to(energies.dtype)
    return total(energies, rows.rows.groups)


def row_energies(rows: ShardedRows, settings: Settings) -> Tensor:
    """Sum over all others of each of this rank's rows, [V, n]."""
    rows = rows.with_all_columns()
    ids = _numbers(rows)
    energies = pair_energies(rows, rows, ids, settings)
    if not settings.pair.half_space:
        return energies
    antipodes = antipode_energies(rows.local, settings.pair, settings.eps)
    return energies + antipodes.to(energies.dtype)


def nearest_of_all(
    rows: ShardedRows, half_space: bool, angular: bool, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Distance and number, in the whole, of the row nearest to each of this rank's, [V, n]."""
    leave_trace()
    points, ids = rows.points(), _numbers(rows)
    others = gathered(points, rows.rows)
    everyone = torch.arange(others.shape[1], device=points.device)
    return nearest_rows(points, others, ids.rows, everyone, half_space, angular, eps, backend)


def _numbers(rows: ShardedRows) -> Ids:
    """List the numbers that the rows of this rank have when they are gathered."""
    if len(rows.rows.groups) > 1:
        raise ValueError(
            "results of single rows must be asked for rows that are spread over one dimension of a "
            f"mesh, got rows over {len(rows.rows.groups)}"
        )
    n, first = rows.local.shape[1], rows.rows.first if rows.rows.groups else 0
    numbers = torch.arange(first, first + n, device=rows.local.device)
    return Ids(numbers, numbers)


def like_rows(result: Tensor, rows: "DTensor") -> "DTensor":
    """Make a DTensor [N] or [B, N] of what there is for each row of this rank."""
    from torch.distributed.tensor import DTensor, Replicate

    shape = rows.shape[:-1]
    # what was made of whole rows is the same where ranks share the columns
    placements = [Replicate() if dim_of(x) == len(shape) else x for x in rows.placements]
    stride = torch.empty(shape, device="meta").stride()
    local = result if rows.dim() == 3 else result.squeeze(0)
    return DTensor.from_local(
        local, rows.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )


def _total_count(counts: Tensor, shards: Shards) -> Tensor:
    """Sum counts over the ranks."""
    counts = counts.clone()
    for group in shards.groups:
        dist.all_reduce(counts, group=group)
    return counts


def gathered(rows: Tensor, shards: Shards) -> Tensor:
    """Put the rows [V, n, k] of all ranks one after another, for each to use for its own."""
    if not shards.groups:
        return rows
    everyone: Tensor = _Gathered.apply(rows, shards)
    return everyone


class _Gathered(torch.autograd.Function):
    """The rows of all ranks, which each of them uses for something else."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return AllRows(rows, shards).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Collected.apply(grad, ctx.shards), None


class _Collected(torch.autograd.Function):
    """What the ranks have for the rows of this one, summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        (group,), (sizes,), (rank,) = shards.groups, shards.sizes, shards.ranks
        whole = rows.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=group)
        return whole.narrow(1, shards.first, sizes[rank]).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gathered(grad, ctx.shards), None
