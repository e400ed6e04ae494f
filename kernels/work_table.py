"""From the shapes of a packed batch of sets to the tiles that a sweep visits.

Sets lie one after another in one [T, k] array. Neighbours of equal size are taken together, so a
sweep over a thousand small sets costs as many torch calls as one over a large set.
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
        return slice(self.first_set, self.first_set + self.count)

    def view(self, rows: Tensor) -> Tensor:
        """The run's part of `rows` [T, ...] as [count, size, ...]."""
        end = self.first_row + self.count * self.size
        return rows[self.first_row : end].view(self.count, self.size, *rows.shape[1:])


@dataclass(frozen=True)
class Tile:
    """Rows against columns, the same block, on or above the diagonal, in every set of a run."""

    run: Run
    rows: slice
    cols: slice

    @property
    def diagonal(self) -> bool:
        return self.rows.start == self.cols.start


def equal_runs(sizes: Sequence[int]) -> Iterator[Run]:
    """Neighbouring sets of equal, non-zero size as one run each."""
    first_set = first_row = 0
    for size, group in groupby(sizes):
        count = sum(1 for _ in group)
        if size:
            yield Run(first_set, count, first_row, size)
        first_set += count
        first_row += count * size


def symmetric_tiles(sizes: Sequence[int], block: int) -> Iterator[Tile]:
    """Tiles that meet every unordered pair of every set once, of at most block x block elements."""
    for run in equal_runs(sizes):
        side = min(block, run.size)
        together = block * block // (side * side)
        for begin in range(0, run.count, together):
            part = Run(
                run.first_set + begin,
                min(together, run.count - begin),
                run.first_row + begin * run.size,
                run.size,
            )
            blocks = [slice(b, min(b + side, run.size)) for b in range(0, run.size, side)]
            for position, rows in enumerate(blocks):
                for cols in blocks[position:]:
                    yield Tile(part, rows, cols)


def spread_over_rows(per_set: Tensor, sizes: Sequence[int]) -> Tensor:
    """The value [B] of each set on each of its rows, [T, 1]; differentiable."""
    lengths = [(size, sum(1 for _ in group)) for size, group in groupby(sizes)]
    parts = per_set.split([count for _, count in lengths])
    spread = [
        values.unsqueeze(1).expand(-1, size).flatten()
        for values, (size, _) in zip(parts, lengths, strict=True)
    ]
    return torch.cat([per_set[:0], *spread]).unsqueeze(1)


def sum_over_rows(per_row: Tensor, sizes: Sequence[int]) -> Tensor:
    """The sum over the rows of each set of a value [T] of each row, [B]; differentiable."""
    lengths = [(size, sum(1 for _ in group)) for size, group in groupby(sizes)]
    parts = per_row.split([size * count for size, count in lengths])
    sums = [
        values.view(count, size).sum(1)
        for values, (size, count) in zip(parts, lengths, strict=True)
    ]
    return torch.cat([per_row[:0], *sums])
