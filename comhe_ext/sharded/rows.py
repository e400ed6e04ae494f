"""Rows that are spread over ranks, as plain shards or as DTensors, and what is computed of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from comhe_ext.checks import check_weight
from comhe_ext.operators.energy import energy
from comhe_ext.operators.library import DTYPES
from comhe_ext.operators.rows import project
from comhe_ext.packing import stack_parts
from comhe_ext.sampled import keywords
from comhe_ext.sampled.keywords import Sampling
from comhe_ext.settings import Settings
from comhe_ext.sharded.collectives import Group, Shards, common, exchange, joined, total
from comhe_ext.sharded.energy import Sets, check_strategy, local_energies
from comhe_ext.sharded.sampled import (
    CommonSampling,
    agreed,
    agreed_over,
    proposal,
    sampled_energies,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


# all is here
UNDIVIDED = Shards()


@dataclass(frozen=True)
class ShardedRows:
    """The part of V sets of rows that is on this rank.

    Args:
        local: [V, n, d], of some of the sets, of their rows or of the columns.
        rows: who has which rows.
        columns: who has which columns of these rows; one group at most.
        sets: who has which sets; one group at most.
        sampling: how their energies are to be sampled; None: they are exact.
    """

    local: Tensor
    rows: Shards = UNDIVIDED
    columns: Shards = UNDIVIDED
    sets: Shards = UNDIVIDED
    sampling: CommonSampling | None = None

    def points(self, matrices: Tensor | None = None) -> Tensor:
        """Make the rows of these sets, projected by each of [C, k, d] -> [V C, n, k].

        Ranks that share the columns tell each other k numbers a row, d only without matrices.
        """
        if matrices is None:
            return joined(self.local, self.columns) if self.columns.groups else self.local
        if matrices.requires_grad:
            groups = *self.rows.groups, *self.columns.groups, *self.sets.groups
            matrices = common(matrices, groups)
        if not self.columns.groups:
            return project(self.local, matrices).flatten(0, 1)
        part = matrices.narrow(2, self.columns.first, self.local.shape[2])
        return total(project(self.local, part).flatten(0, 1), self.columns.groups)

    def energies(
        self, settings: Settings, matrices: Tensor | None = None, strategy: str | None = None
    ) -> Tensor:
        """Compute the energies of the whole, [V C] of all sets, the same on all ranks."""
        check_strategy(strategy, self.rows)
        if strategy is not None and self.sampling is not None:
            raise ValueError(f"`strategy` is for method='exact', got {strategy!r}")
        points = self.points(matrices)
        if self.sampling is not None:
            sampling = self.sampling if matrices is None else self.sampling.of_other_rows()
            energies = self._sampled(points, sampling, settings)
        elif self.rows.groups:
            energies = self._exact(points, settings, strategy)
        else:
            energies = energy([points], [None], settings.options([points]))
        if not self.sets.groups:
            return energies
        count = 1 if matrices is None else matrices.shape[0]
        return joined(energies.view(1, 1, -1), self.sets.times(count)).flatten()

    def _exact(self, points: Tensor, settings: Settings, strategy: str | None = None) -> Tensor:
        options = settings.options([points], needs="cross")
        (parts,) = local_energies([Sets(points, self.rows)], options, strategy)
        return total(parts, self.rows.groups)

    def _sampled(self, points: Tensor, sampling: CommonSampling, settings: Settings) -> Tensor:
        if not self.rows.groups:
            options, here = settings.options([points]), sampling.on(points.device)
            return keywords.sampled_energies(points, options, here, as_planned=sampling.as_planned)
        if sampling.samples >= self.rows.total or len(points) == 0:
            return self._exact(points, settings)
        options = settings.options([points], needs="cross")
        return sampled_energies(points, self.rows, sampling, options)

    def with_all_columns(self) -> "ShardedRows":
        """Put the columns of all ranks together."""
        return replace(self, local=self.points(), columns=UNDIVIDED)

    def of_groups(self, parts: Sequence[Tensor]) -> "ShardedRows":
        """Make sets [V G, n, k] of G parts of the columns of `points`."""
        stacked = stack_parts(parts)
        sets = self.sets.times(len(parts)) if self.sets.groups else self.sets
        sampling = self.sampling and self.sampling.of_other_rows()
        local = stacked.flatten(0, 1)
        return replace(self, local=local, columns=UNDIVIDED, sets=sets, sampling=sampling)


def plain_shard(rows: Tensor, group: Group | None, sampling: Sampling | None = None) -> ShardedRows:
    """Take the rows [n, d] or [B, n, d] of this rank, and ask the others of the group for theirs.

    Raises:
        ValueError: on every rank, where they do not fit together, or are sampled differently.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "rows on several ranks need a process group: call "
            "`torch.distributed.init_process_group` first"
        )
    if group is None:
        group = dist.distributed_c10d._get_default_group()
    check_weight(rows, "rows")
    local = rows if rows.dim() == 3 else rows.unsqueeze(0)
    sets, n, width = local.shape
    form = [n, sets, width, DTYPES.index(rows.dtype)]
    told = exchange([*form, *proposal(sampling)], group, rows.device)
    numbers = [one[: len(form)] for one in told]
    forms = {(*form,) for _, *form in numbers}
    if len(forms) > 1:
        shapes = ", ".join(
            f"[{sets}, {n}, {width}] of {DTYPES[dtype]}" for n, sets, width, dtype in numbers
        )
        raise ValueError(
            f"`rows` must have as many sets and columns, and one dtype, on all ranks, got {shapes}"
        )
    common_sampling = agreed(sampling, [one[len(form) :] for one in told])
    shards = Shards((group,), (tuple(n for n, *_ in numbers),))
    return ShardedRows(local, shards, sampling=common_sampling)


# --- DTensors -------------------------------------------------------------------------------------


def dtensor_shard(
    weight: "DTensor", name: str = "weight", sampling: Sampling | None = None
) -> ShardedRows:
    """Take the part of rows [N, d] or [B, N, d] that is on this rank, and who has the others.

    Nothing is asked, unless several dimensions of a mesh share the rows, or their energies are to
    be sampled, from one seed on all ranks. The gradient of the part becomes one of the placements
    of the DTensor.

    Raises:
        ValueError: placements that cannot be taken; on every rank, where they sample differently.
    """
    check_placements(name, weight)
    local = local_part(weight)
    rows, columns = (shards_along(weight, dim) for dim in (weight.dim() - 2, weight.dim() - 1))
    sets = shards_along(weight, 0) if weight.dim() == 3 else UNDIVIDED
    common_sampling = agreed_over(sampling, mesh_groups(weight), local.device)
    local = local if weight.dim() == 3 else local.unsqueeze(0)
    return ShardedRows(local, rows, columns, sets, common_sampling)


def mesh_groups(tensor: "DTensor") -> list[Group]:
    """List the groups of this rank along all dimensions of a DTensor's mesh."""
    mesh = tensor.device_mesh
    return [mesh.get_group(dim) for dim in range(mesh.ndim)]


def local_part(tensor: "DTensor") -> Tensor:
    """Take the part of this rank, whose gradient becomes one of the placements of the DTensor."""
    return tensor.to_local(grad_placements=tensor.placements)


def shards_along(tensor: "DTensor", dim: int) -> Shards:
    """Find out who has which part of a dimension of a DTensor; asks if several groups share it."""
    mesh = tensor.device_mesh
    groups = [
        mesh.get_group(mesh_dim)
        for mesh_dim, placement in enumerate(tensor.placements)
        if dim_of(placement) == dim
    ]
    if not groups:
        return UNDIVIDED
    if len(groups) == 1:
        return Shards.chunks(tensor.shape[dim], groups[0])
    part = tensor.to_local()
    return Shards.exchanged(part.shape[dim], groups[::-1], part.device)


def refusal(name: str, tensor: "DTensor") -> str | None:
    """Say why the placements of a DTensor cannot be taken, or None."""
    dims = [dim_of(x) for x in tensor.placements if not x.is_replicate()]
    # rows may be shared by several dimensions of a mesh
    others = [x for x in dims if x != tensor.dim() - 2]
    if None not in dims and len(set(others)) == len(others):
        return None
    return (
        f"`{name}` must be replicated, or sharded, by rows over any dimensions of the mesh, by "
        f"columns over one, got placements {tensor.placements}: pass {name}.full_tensor()"
    )


def check_placements(name: str, tensor: "DTensor") -> None:
    """Refuse a DTensor whose parts are no rows, columns or sets."""
    reason = refusal(name, tensor)
    if reason is not None:
        raise ValueError(reason)


def dim_of(placement: Any) -> int | None:
    """Return the dimension that a placement shards, or None."""
    # FSDP2 over tensor parallelism has a private kind of shard, which is no Shard to PyTorch
    is_shard = placement.is_shard() or type(placement).__name__ == "_StridedShard"
    return placement.dim if is_shard else None
