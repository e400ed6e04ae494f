"""The energy of rows that are spread over ranks, and the gradient in the rows of each.

The sum over all pairs is the sum over ranks of what each rank computes:

    gather   its rows against themselves, and against those of all other ranks: half of each such
             pair is its own. The gradient in its rows is whole, so none is sent.
    ring     its rows against themselves, and against those of half of the other ranks, one after
             another; the gradients in these are sent back. No rank ever holds more than two blocks
             of other rows, and each pair is computed once.

Either way rows are sent while the sweep before is running.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from comhe_ext.checks import quote
from comhe_ext.operators.library import compute_dtype, differentiated, forward_mode, leave_trace
from comhe_ext.operators.sweep import SweepOptions
from comhe_ext.sharded.collectives import OtherRows, Shards, Swap

Strategy: TypeAlias = Literal["gather", "ring"]

# rows of the largest shard, from which on a visit takes longer than the exchange and the launches
RING_ROWS = 8192
# sets are gathered several at a time, if they are small
BATCH_BYTES = 2**26


class Sets(NamedTuple):
    """Rows [V, n, k] that this rank has of V sets, and who has the others."""

    points: Tensor
    shards: Shards


def check_strategy(strategy: str | None, shards: Shards) -> None:
    """Refuse what is not the name of a strategy, or one that the ranks cannot follow."""
    if strategy not in (None, "gather", "ring"):
        raise ValueError(f"`strategy` must be 'gather', 'ring' or None, got {quote(strategy)}")
    if strategy == "ring" and len(shards.groups) > 1:
        raise ValueError(
            "`strategy` must be 'gather' for rows that are spread over several dimensions of a "
            "mesh, got 'ring'"
        )


def local_energies(
    sets: Sequence[Sets], options: SweepOptions, strategy: str | None = None
) -> list[Tensor]:
    """Compute this rank's part of the energies [V] of each of some tensors' sets.

    The energies are the sums of the parts of all ranks, see `collectives.total`; the gradient of a
    part in the rows of this rank is that of the whole energy. Its derivative raises.
    """
    leave_trace()
    points = [x.points for x in sets]
    plan = _Plan(tuple(x.shards for x in sets), options, strategy)
    # where a tangent comes, torch says that there is no forward mode
    if differentiated(*points) or forward_mode():
        return list(_Energies.apply(plan, *points))
    return plan.run(points, gradient=False)[0]


class _Plan(NamedTuple):
    """How sets are swept."""

    shards: tuple[Shards, ...]
    options: SweepOptions
    strategy: str | None

    def run(self, points: Sequence[Tensor], gradient: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parts of the energies, and the gradients in `points` if they are wanted."""
        sums = [
            _Sum(x, shards, self.options, gradient)
            for x, shards in zip(points, self.shards, strict=True)
        ]
        under_way: _Gathered | _Ring | None = None
        for piece in self._pieces(sums):
            # the rows of this piece are sent while the one before is swept
            following = self._start(piece)
            if under_way is not None:
                under_way.finish()
            piece.add_own()
            under_way = following
        if under_way is not None:
            under_way.finish()
        return [x.energies for x in sums], [x.gradient for x in sums if x.gradient is not None]

    def _pieces(self, sums: "Sequence[_Sum]") -> "Iterator[_Sum]":
        for whole in sums:
            x = whole.points
            size = whole.shards.total * x.shape[2] * x.element_size()
            step = max(BATCH_BYTES // max(size, 1), 1)
            for first in range(0, whole.points.shape[0], step):
                yield whole.part(slice(first, first + step))

    def _start(self, piece: "_Sum") -> "_Gathered | _Ring":
        strategy = self.strategy
        if strategy is None:
            is_large = max(piece.shards.sizes[0]) >= RING_ROWS
            strategy = "ring" if is_large and len(piece.shards.groups) == 1 else "gather"
        return _Ring(piece) if strategy == "ring" else _Gathered(piece)


class _Sum:
    """The energies and gradients of some sets, as they are added up."""

    def __init__(
        self,
        points: Tensor,
        shards: Shards,
        options: SweepOptions,
        with_gradient: bool,
        energies: Tensor | None = None,
        gradient: Tensor | None = None,
    ) -> None:
        self.points, self.shards, self.options = points, shards, options
        self.with_gradient = with_gradient
        dtype = compute_dtype(points)
        if energies is None:
            energies = points.new_zeros(points.shape[0], dtype=dtype)
            gradient = points.new_zeros(points.shape, dtype=dtype) if with_gradient else None
        self.energies, self.gradient = energies, gradient
        # means are swept: a sum of very many pairs might not fit into float32
        self._arguments = replace(options, reduction="mean", factors=()).arguments

    def part(self, sets: slice) -> "_Sum":
        """Select some of the sets, which are added up in place."""
        return _Sum(
            self.points[sets],
            self.shards,
            self.options,
            self.with_gradient,
            self.energies[sets],
            None if self.gradient is None else self.gradient[sets],
        )

    def add_own(self) -> None:
        """Add the pairs of rows that are both here."""
        energies, gradient = torch.ops.comhe_ext.sweep(
            [self.points], [None], self.with_gradient, *self._arguments
        )
        share = self.options.pair.pair_count(self.points.shape[1]) * self._scale
        self.energies.add_(energies, alpha=share)
        if self.gradient is not None:
            self.gradient.add_(gradient.view(self.gradient.shape), alpha=share)

    def add_others(self, columns: Tensor, first: int = 0, twice: bool = False) -> Tensor:
        """Add the pairs of these rows from `first` on with rows of other ranks.

        Args:
            columns: [V, m, k].
            first: row of this rank to begin with.
            twice: the other ranks leave these pairs to this one; else half of each is theirs.

        Returns:
            The gradient in the columns of pairs that are left to this rank, else nothing.
        """
        rows = self.points[:, first:]
        energies, _, to_rows, to_columns = torch.ops.comhe_ext.cross_sweep(
            *(rows, columns, None, None, None),
            *(self.with_gradient, self.with_gradient and twice, False),
            *self._arguments,
        )
        # a pair of rows is four pairs of points in half space
        pairs = rows.shape[1] * columns.shape[1] * (4 if self.options.pair.half_space else 1)
        share = pairs * self._scale
        self.energies.add_(energies, alpha=share if twice else share / 2)
        if self.gradient is not None:
            self.gradient[:, first:].add_(to_rows, alpha=share)
        return to_columns.mul_(share)

    @property
    def _scale(self) -> float:
        return self.options.pair.scale(self.shards.total, self.options.reduction)


class _Gathered:
    """All other rows, on their way."""

    def __init__(self, piece: _Sum) -> None:
        self._piece, self._others = piece, OtherRows(piece.points, piece.shards)

    def finish(self) -> None:
        self._piece.add_others(self._others.wait())


class _Ring:
    """The rows of half of the other ranks, of which the first are on their way.

    In step t the rows of rank r - t visit rank r. If the number of ranks is even, two ranks visit
    each other in the last step: the lower one takes the first half of the higher one's rows.
    """

    def __init__(self, piece: _Sum) -> None:
        self._piece = piece
        ((self._sizes,), (self._rank,)) = piece.shards.sizes, piece.shards.ranks
        (self._group,) = piece.shards.groups
        self._visit = self._send(1)

    def finish(self) -> None:
        piece, rank, ranks = self._piece, self._rank, len(self._sizes)
        returning: tuple[int, Swap] | None = None
        for step in range(1, ranks // 2 + 1):
            assert self._visit is not None
            visitor, self._visit = self._visit.wait(), self._send(step + 1)
            source, host = (rank - step) % ranks, (rank + step) % ranks
            first, rows_back = 0, self._sizes[rank]
            if 2 * step == ranks and rank < source:
                visitor = visitor[:, : self._sizes[source] // 2]
            elif 2 * step == ranks:
                first = rows_back = self._sizes[rank] // 2
            gradient = piece.add_others(visitor, first, twice=True)
            if returning is not None:
                self._add_returned(*returning)
                returning = None
            if piece.gradient is not None:
                shape = (*piece.points.shape[:1], rows_back, piece.points.shape[2])
                returning = rows_back, Swap(gradient, source, shape, host, self._group)
        if returning is not None:
            self._add_returned(*returning)

    def _send(self, step: int) -> Swap | None:
        """Send the rows of this rank `step` ranks ahead."""
        rank, ranks, points = self._rank, len(self._sizes), self._piece.points
        if step > ranks // 2:
            return None
        source = (rank - step) % ranks
        shape = (points.shape[0], self._sizes[source], points.shape[2])
        return Swap(points, (rank + step) % ranks, shape, source, self._group)

    def _add_returned(self, rows: int, swap: Swap) -> None:
        assert self._piece.gradient is not None
        self._piece.gradient[:, :rows].add_(swap.wait())


class _Energies(torch.autograd.Function):
    """Rows of this rank -> its parts of the energies; the gradients are kept for the backward."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *points: Tensor) -> tuple[Tensor, ...]:
        energies, gradients = plan.run(points, gradient=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients, *points)
        return tuple(energies)

    @staticmethod
    def backward(ctx: Any, *grad_energies: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients, points = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        results: list[Tensor | None] = []
        for grad, gradient, x in zip(grad_energies, gradients, points, strict=True):
            if grad is None:
                results.append(None)
                continue
            if torch.is_grad_enabled():
                gradient = _Once.apply(gradient, x)
            results.append((gradient * grad[:, None, None]).to(x.dtype))
        return None, *results


def differentiable_once(points: Tensor) -> Tensor:
    """Return the points as they are; the derivative of a gradient in them raises."""
    same: Tensor = _Points.apply(points)
    return same


class _Points(torch.autograd.Function):
    """Points whose gradient is no function of them."""

    @staticmethod
    def forward(ctx: Any, points: Tensor) -> Tensor:
        ctx.save_for_backward(points)
        return points.view_as(points)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (points,) = ctx.saved_tensors
        return _Once.apply(gradient, points) if torch.is_grad_enabled() else gradient


class _Once(torch.autograd.Function):
    """A gradient in some rows, whose derivative in them raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, points: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(
            "comhe_ext: the energy of rows on several ranks is differentiable once: for second "
            "derivatives compute that of the gathered rows, as `weight.full_tensor()`"
        )
