"""What ranks tell each other, as differentiable functions.

A result that is the same on every rank is one value: its gradient is the same on every rank, too,
and is not to be added up over them. With that rule

    total(x)         sum over the ranks of x       backward: the gradient itself
    common(x)        x, the same on all ranks      backward: the sum over the ranks
    joined(x)        the parts of all ranks        backward: the part of this rank

are a sum, a tensor that ranks use for different rows, and a tensor that is put together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    Group: TypeAlias = dist.ProcessGroup
else:
    Group: TypeAlias = Any  # a torch without distributed has no such class


# its name since PyTorch 2.13
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))


@dataclass(frozen=True)
class Shards:
    """Who holds which rows of a whole.

    Args:
        groups: over which the rows are spread, from the innermost out: the rows of all ranks of
            the first group are what a rank of the second one has to give. None: all are here.
        sizes: rows that each rank of each group has to give.
    """

    groups: tuple[Group, ...] = ()
    sizes: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def exchanged(cls, count: int, groups: Sequence[Group], device: torch.device) -> "Shards":
        """Ask all ranks of the groups how many rows they hold."""
        sizes = []
        for group in groups:
            (counts,) = zip(*exchange([count], group, device), strict=True)
            sizes.append(counts)
            count = sum(counts)
        return cls(tuple(groups), tuple(sizes))

    @classmethod
    def chunks(cls, total: int, group: Group) -> "Shards":
        """Cut rows as `torch.chunk` does, and with it DTensor: even but for the last ranks."""
        ranks = dist.get_world_size(group)
        size = max(-(-total // ranks), 1)
        counts = tuple(max(min(size, total - rank * size), 0) for rank in range(ranks))
        return cls((group,), (counts,))

    def times(self, count: int) -> "Shards":
        """Say who has what, where `count` rows are made of each."""
        return Shards(self.groups, tuple(tuple(count * x for x in sizes) for sizes in self.sizes))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The rank of this process in each group."""
        return tuple(dist.get_rank(group) for group in self.groups)

    @property
    def total(self) -> int:
        """Rows of the whole."""
        return sum(self.sizes[-1])

    @property
    def first(self) -> int:
        """Number of the first row of this rank in the whole."""
        return sum(sum(sizes[:rank]) for sizes, rank in zip(self.sizes, self.ranks, strict=True))

    def of_numbers(self, numbers: Tensor) -> "Shards":
        """Say who has how many of some rows, whose numbers in the whole ascend."""
        begin, counts = self.first, []
        for sizes, rank in zip(self.sizes, self.ranks, strict=True):
            begin -= sum(sizes[:rank])
            ends = torch.tensor([begin, *sizes], device="cpu").cumsum(0).to(numbers.device)
            counts.append(tuple(torch.searchsorted(numbers, ends).diff().tolist()))
        return Shards(self.groups, tuple(counts))


def exchange(numbers: Sequence[int], group: Group, device: torch.device) -> list[list[int]]:
    """Tell all ranks of a group some whole numbers, and return those of every rank."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    everyone = mine.new_empty(dist.get_world_size(group) * len(numbers))
    _all_gather(everyone, mine, group=group)
    numbers_of: list[list[int]] = everyone.view(-1, len(numbers)).tolist()
    return numbers_of


class Gather:
    """An exchange on its way: the rows [V, n, k] of every rank of a group."""

    def __init__(self, rows: Tensor, group: Group, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        sets, n, width = rows.shape
        longest = max(sizes)
        # every rank has to send as much as the longest one
        sent = rows if n == longest else torch.nn.functional.pad(rows, (0, 0, 0, longest - n))
        self._sent = sent.contiguous()
        self._received = rows.new_empty(len(sizes) * sets, longest, width)
        self._work = None
        if self._sent.numel() > 0:
            self._work = _all_gather(self._received, self._sent, group=group, async_op=True)

    def wait(self) -> list[Tensor]:
        """Return the rows [V, n_r, k] of each rank."""
        if self._work is not None:
            self._work.wait()
        by_rank = self._received.unflatten(0, (len(self.sizes), -1))
        return [rows[:, :size] for rows, size in zip(by_rank, self.sizes, strict=True)]


class AllRows:
    """The rows of all ranks, in their order, on their way while something else is computed."""

    def __init__(self, rows: Tensor, shards: Shards) -> None:
        self._shards = shards
        self._innermost = Gather(rows, shards.groups[0], shards.sizes[0])

    def wait(self) -> Tensor:
        """Return them as [V, N, k]."""
        rows = torch.cat(self._innermost.wait(), 1)
        for group, sizes in zip(self._shards.groups[1:], self._shards.sizes[1:], strict=True):
            rows = torch.cat(Gather(rows, group, sizes).wait(), 1)
        return rows


class OtherRows:
    """The rows of all other ranks, on their way while something else is computed."""

    def __init__(self, rows: Tensor, shards: Shards) -> None:
        self._rows, self._shards = rows, shards
        self._innermost = Gather(rows, shards.groups[0], shards.sizes[0])

    def wait(self) -> Tensor:
        """Return them as [V, N - n, k]."""
        shards, gather = self._shards, self._innermost
        others = [self._rows[:, :0]]
        for level, rank in enumerate(shards.ranks):
            if level > 0:
                block = torch.cat([*others, self._rows], 1)
                gather = Gather(block, shards.groups[level], shards.sizes[level])
            parts = gather.wait()
            others += [*parts[:rank], *parts[rank + 1 :]]
        return torch.cat(others, 1)


class _Total(torch.autograd.Function):
    """The sum over all ranks of groups, from each rank's part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, groups: Sequence[Group]) -> Tensor:
        ctx.groups = groups
        return _summed(part, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return common(grad, ctx.groups), None


class _Common(torch.autograd.Function):
    """A tensor that is the same on all ranks, which use it for different rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, groups: Sequence[Group]) -> Tensor:
        ctx.groups = groups
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return total(grad, ctx.groups), None


class _Joined(torch.autograd.Function):
    """The columns of all ranks of a group, side by side."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, shards: Shards) -> Tensor:
        ctx.shards, ctx.width = shards, columns.shape[-1]
        (group,), (sizes,) = shards.groups, shards.sizes
        parts = Gather(columns.mT, group, sizes).wait()
        return torch.cat(parts, 1).mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Own.apply(grad, ctx.shards, ctx.width), None


class _Own(torch.autograd.Function):
    """The columns of this rank, of those that were joined."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, shards: Shards, width: int) -> Tensor:
        ctx.shards = shards
        return columns.narrow(-1, shards.first, width).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return joined(grad, ctx.shards), None, None


def total(part: Tensor, groups: Sequence[Group]) -> Tensor:
    """Sum the parts of all ranks of the groups."""
    return _Total.apply(part, groups) if groups else part


def common(tensor: Tensor, groups: Sequence[Group]) -> Tensor:
    """Mark a tensor of equal values on all ranks, whose gradients are to be added up."""
    return _Common.apply(tensor, groups) if groups else tensor


def joined(columns: Tensor, shards: Shards) -> Tensor:
    """Put the columns [V, n, d_r] of all ranks of one group side by side."""
    joint: Tensor = _Joined.apply(columns, shards)
    return joint


def _summed(part: Tensor, groups: Sequence[Group]) -> Tensor:
    whole = part.clone(memory_format=torch.contiguous_format)
    for group in groups:
        dist.all_reduce(whole, group=group)
    return whole


class Swap:
    """An exchange on its way: a tensor for one rank of a group, and one from another."""

    def __init__(
        self, sent: Tensor, to: int, shape: Sequence[int], source: int, group: Group
    ) -> None:
        self._sent = sent.contiguous()
        self._received = sent.new_empty(shape)
        operations = []
        if self._sent.numel() > 0:
            peer = dist.get_global_rank(group, to)
            operations.append(dist.P2POp(dist.isend, self._sent, peer, group))
        if self._received.numel() > 0:
            peer = dist.get_global_rank(group, source)
            operations.append(dist.P2POp(dist.irecv, self._received, peer, group))
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> Tensor:
        """Return what came."""
        for work in self._works:
            work.wait()
        return self._received
