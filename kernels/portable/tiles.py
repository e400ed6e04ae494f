"""The tiles of a sweep: a block of rows against a block of columns, both parts of one packed array.

Within a set, tiles below the diagonal are left out: a pair (i, j) is computed once, and pushes both
its rows. The columns of a cross set are packed behind its rows, and its tiles cover the rectangle
of rows against columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..packed_sets import Run, equal_runs


@dataclass(frozen=True)
class Tile:
    """Rows against columns, on or above the diagonal, the same block in every set of a run."""

    run: Run
    rows: slice
    cols: slice

    @property
    def diagonal(self) -> bool:
        """Whether its rows are its columns, so that it meets each of its pairs twice."""
        return self.rows.start == self.cols.start


def symmetric_tiles(sizes: Sequence[int], block: int) -> Iterator[Tile]:
    """Yield tiles of at most block x block elements that cover every pair of every set once."""
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


def cross_tiles(rows: int, columns: int, block: int) -> Iterator[Tile]:
    """Yield tiles of at most block x block elements that cover `rows` x `columns`, row by row."""
    run = Run(0, 1, 0, rows + columns)
    for i in range(0, rows, block):
        for j in range(rows, rows + columns, block):
            upper, left = slice(i, min(i + block, rows)), slice(j, min(j + block, rows + columns))
            yield Tile(run, upper, left)


def block_of(points: Tensor) -> int:
    """Choose the rows of a tile: it should fit a processor's cache, or fill an accelerator."""
    return 512 if points.device.type == "cpu" else 4096


def rows_of(x: Tensor, tile: Tile) -> Tensor:
    """View the rows of a tile in `x` [T, ...] as [sets, rows, ...]."""
    return tile.run.view(x)[:, tile.rows]


def cols_of(x: Tensor, tile: Tile) -> Tensor:
    """View the columns of a tile in `x` [T, ...] as [sets, columns, ...]."""
    return tile.run.view(x)[:, tile.cols]


def equal_ids(ids: Tensor, tile: Tile) -> Tensor:
    """Find the pairs of a tile whose ids [T] are equal -> bool [sets, rows, columns]."""
    return rows_of(ids, tile).unsqueeze(2) == cols_of(ids, tile).unsqueeze(1)
