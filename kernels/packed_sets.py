"""Sets of rows that lie one after another in one [T, k] array.

Neighbours of equal size are taken together as a run, so that a thousand small sets cost as many
torch calls as one large set.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """`count` neighbouring sets of `size` rows each."""

    first_set: int
    count: int
    first_row: int
    size: int

    @property
    def sets(self) -> slice:
        """The numbers of the run's sets."""
        return slice(self.first_set, self.first_set + self.count)

    def view(self, rows: Tensor) -> Tensor:
        """Take the run's part of `rows` [T, ...] as [count, size, ...]."""
        end = self.first_row + self.count * self.size
        return rows[self.first_row : end].view(self.count, self.size, *rows.shape[1:])


def equal_runs(sizes: Sequence[int]) -> Iterator[Run]:
    """Yield neighbouring sets of equal, non-zero size as one run each."""
    first_set = first_row = 0
    for size, group in groupby(sizes):
        count = sum(1 for _ in group)
        if size:
            yield Run(first_set, count, first_row, size)
        first_set += count
        first_row += count * size


def spread_over_rows(per_set: Tensor, sizes: Sequence[int]) -> Tensor:
    """Repeat the value [B] of each set on each of its rows -> [T, 1]; differentiable."""
    lengths = [(size, sum(1 for _ in group)) for size, group in groupby(sizes)]
    parts = per_set.split([count for _, count in lengths])
    spread = [
        values.unsqueeze(1).expand(-1, size).flatten()
        for values, (size, _) in zip(parts, lengths, strict=True)
    ]
    return torch.cat([per_set[:0], *spread]).unsqueeze(1)


def sum_over_rows(per_row: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sum a value [T] of each row over the rows of each set -> [B]; differentiable."""
    lengths = [(size, sum(1 for _ in group)) for size, group in groupby(sizes)]
    parts = per_row.split([size * count for size, count in lengths])
    sums = [
        values.view(count, size).sum(1)
        for values, (size, count) in zip(parts, lengths, strict=True)
    ]
    return torch.cat([per_row[:0], *sums])
