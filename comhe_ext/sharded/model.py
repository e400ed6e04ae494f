"""The neurons of layers whose weights are DTensors, and the energies of a model's layers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from comhe_ext import packing
from comhe_ext.checks import is_dtensor
from comhe_ext.kernels.pair_functions import PairFunction
from comhe_ext.layers import CONVOLUTIONS, TRANSPOSED, Layer
from comhe_ext.packing import ROWS_OF_A_COLUMN, Part, Partitions
from comhe_ext.projections.draws import seed_of
from comhe_ext.projections.fixed import GroupProjection, Projection, RandomProjection
from comhe_ext.sampled.estimator import permutations
from comhe_ext.settings import Settings
from comhe_ext.sharded.collectives import Shards, total
from comhe_ext.sharded.energy import Sets, local_energies
from comhe_ext.sharded.rows import ShardedRows, dim_of, local_part, shards_along
from comhe_ext.sharded.sampled import CommonSampling, sampled_energies

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def sharded_rows(
    layer: Layer, weight: Tensor, projection: Projection | None
) -> tuple[Tensor, ShardedRows | None]:
    """Check the weight of a layer, and view its neurons as [V, n, d], for a projection or None.

    Those on this rank where the weight is a DTensor of which that is enough, and who has the others
    and what is not here of these; else all neurons, and None. Projections of users, which may look
    at the neurons, and learned ones that cannot do with shards, get all of them.
    """
    if not torch.compiler.is_compiling():
        layer.check(weight)
        if weight.is_inference() and not torch.is_inference_mode_enabled():
            weight = weight.clone()  # such a tensor cannot be kept for a backward
    if not is_dtensor(weight):
        return layer.rows(weight), None
    shard, learns = None, projection is not None and projection.learns_from_shards(layer)
    is_fixed = type(projection) is GroupProjection or _is_gaussian(projection)
    if projection is None or is_fixed or learns:
        shard = _shard_of(layer, weight)
    if shard is None:
        return layer.rows(weight.full_tensor()), None
    if learns or not shard.columns.groups:
        return shard.local, shard
    if _is_gaussian(projection):
        # it asks for the shape alone, and its matrices will be divided as the columns are
        sets, n, _ = shard.local.shape
        return shard.local.new_empty(1, 1, 1).expand(sets, n, layer.sizes[2]), shard
    shard = shard.with_all_columns()
    return shard.local, shard


def _is_gaussian(projection: Projection | None) -> bool:
    """Tell whether a projection gives matrices that depend on the shape of the neurons alone."""
    return type(projection) is RandomProjection and projection.kind == "gaussian"


def _shard_of(layer: Layer, weight: "DTensor") -> ShardedRows | None:
    """Take the part of a layer's neurons that is on this rank; None: the weight has to be whole."""
    convolution = isinstance(layer.module, (*CONVOLUTIONS, *TRANSPOSED))
    if convolution and getattr(layer.module, "groups", 1) > 1:
        return None  # a shard may begin in the middle of a group
    if weight.dim() == 3 and not convolution:
        return None  # a parameter of several sets
    row_dim = int(isinstance(layer.module, TRANSPOSED) or layer.transpose)
    column_dim = 1 - row_dim
    dims = [dim_of(x) for x in weight.placements if not x.is_replicate()]
    is_part = layer.first > 0 or layer.size is not None or layer.padding is not None
    if not set(dims) <= {row_dim, column_dim} or dims.count(column_dim) > 1:
        return None
    if is_part and dims.count(row_dim) > 1:
        return None  # which rows are where, only the mesh knows
    rows = local_part(weight).transpose(0, 1) if row_dim else local_part(weight)
    kernel = weight.shape[2:].numel()
    columns = shards_along(weight, column_dim).times(kernel)
    shard = ShardedRows(rows.flatten(1).unsqueeze(0), shards_along(weight, row_dim), columns)
    return _selected(shard, _neurons(layer, weight.shape[row_dim])) if is_part else shard


def _neurons(layer: Layer, count: int) -> list[range]:
    """List which of `count` rows of a weight are neurons of the layer."""
    last = count if layer.size is None else layer.first + layer.size
    if layer.padding is None:
        return [range(layer.first, last)]
    return [range(layer.first, layer.padding), range(layer.padding + 1, last)]


def _selected(shard: ShardedRows, neurons: Sequence[range]) -> ShardedRows:
    """Keep some rows of the whole, where one group at most shares them."""

    def overlaps(first: int, last: int) -> list[range]:
        return [range(max(x.start, first), max(min(x.stop, last), x.start, first)) for x in neurons]

    first, rows = 0, shard.rows
    if rows.groups:
        first = rows.first
        (sizes,) = rows.sizes
        firsts = [sum(sizes[:rank]) for rank in range(len(sizes))]
        kept = [
            sum(map(len, overlaps(begin, begin + size)))
            for begin, size in zip(firsts, sizes, strict=True)
        ]
        rows = Shards(rows.groups, (tuple(kept),))
    local = shard.local
    parts = [
        local.narrow(1, x.start - first, len(x))
        for x in overlaps(first, first + local.shape[1])
        if len(x) > 0
    ]
    return replace(shard, local=torch.cat([local[:, :0], *parts], 1), rows=rows)


class _Spread(NamedTuple):
    """Rows [V, n, k] of V sets, of which other ranks have others."""

    points: Tensor
    shards: Shards
    factor: float  # of the mean energy of the sets


def total_energy(parts: Sequence[tuple[Part, ShardedRows | None]], settings: Settings) -> Tensor:
    """Sum over at least one part of its factor times the mean energy of its sets -> [].

    Parts on this rank alone share sweeps, see `packing.total_energy`; those that the same ranks
    share have one sum over these ranks in common, those of which a sample is drawn one each.
    """
    here: list[Part] = []
    spread: dict[object, list[_Spread]] = {}
    totals: list[Tensor] = []
    for part, shard in parts:
        if shard is None:
            here.append(part)
            continue
        points = part.rows if part.matrices is None else shard.points(part.matrices)
        sampling = shard.sampling
        if shard.rows.groups and sampling is not None:
            sampled = settings.options([points], needs="cross")
            energy = sampled_energies(points, shard.rows, sampling, sampled).mean()
            totals.append(part.factor * energy)
        elif shard.rows.groups:
            key = (*map(id, shard.rows.groups), points.dtype, points.device)
            spread.setdefault(key, []).append(_Spread(points, shard.rows, part.factor))
        elif sampling is not None:
            sets, n = points.shape[:2]
            order = permutations(sets, n, points.device, sampling.on(points.device).generator)
            here.append(Part(points, None, part.factor, order, sampling.samples))
        else:
            here.append(Part(points, None, part.factor))
    if here:
        totals.append(packing.total_energy(here, settings))
    for pack in spread.values():
        options = [settings.options([x.points], needs="cross") for x in pack]
        energies = local_energies([Sets(x.points, x.shards) for x in pack], options[0])
        sums = [x.mean() * y.factor for x, y in zip(energies, pack, strict=True)]
        totals.append(total(torch.stack(sums).sum(), pack[0].shards.groups))
    return packing.add(totals)


def sampled_shard(
    shard: ShardedRows,
    part: Part,
    partitions: Partitions,
    pair: PairFunction,
    step: Tensor,
    stream: int,
) -> ShardedRows:
    """Let a layer be sampled, if its size asks for it.

    Args:
        shard, part: its neurons.
        partitions: which layers are sampled, and how.
        pair: of the energy.
        step: holds the number of the step, at each of which rows are drawn anew.
        stream: a number of its own for each layer.
    """
    neurons = shard.rows.total if shard.rows.groups else part.rows.shape[1]
    rows, width = part.rows, part.width
    # a plan of several ranks is of the second degree, however wide the rows are
    few = neurons <= ROWS_OF_A_COLUMN * width
    if few or not partitions.takes(neurons, width, pair, rows.device, rows.dtype):
        return shard
    # all ranks count the same steps: they have nothing to agree on
    seed = seed_of(int(step), stream)
    return replace(shard, sampling=CommonSampling(seed, partitions.samples_of(neurons)))
