"""How many work items a row tile is split into, from the processors of the device.

A device runs `slots` programs at once: its multiprocessors, times the programs that share one
(`Tiles.programs`). Few long items leave some of them idle at the end; many short ones spend
their time on what every item does once. So the items of every number of splits are put on the
slots as the hardware's scheduler would, and the number that ends first is taken. It follows from
the shapes and the device alone, and so does the order of every sum.
"""

from functools import lru_cache
from heapq import heappop, heappush

import torch

from ..sweep import Numbers
from .plan import Tiles, count_row_tiles, part_length

# what an item does once, in tiles: loads its rows, totals its sums, writes a slot that `finish`
# reads
ITEM_OVERHEAD = 2
# more would only be asked for by sets so small that the rest of a call takes longer
MAX_SPLITS = 64
# so many items a slot are even enough without splits
MANY_ITEMS = 16
# working memory: so many times the points (as float32), but a small problem may take SMALL_BYTES
MEMORY_FACTOR = 7.5
SMALL_BYTES = 4 << 20
# of the device in mind where there is none: an H100's
MULTIPROCESSORS = 132


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Count the multiprocessors, or compute units, of a device."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def splits_for(
    sizes: Numbers, tiles: Tiles, k: int, row_bytes: int, with_force: bool, processors: int
) -> int:
    """Work items a row tile: the fastest number within the bound on working memory.

    Args:
        sizes: rows of each set.
        tiles: launch shape.
        k: columns of the points.
        row_bytes: of a packed row.
        with_force: without forces only the upper triangle is visited.
        processors: multiprocessors of the device.
    """
    rows = count_row_tiles(sizes, tiles.block_m) * tiles.block_m
    most = _affordable(rows, k, row_bytes, with_force)
    slots = processors * tiles.programs
    return _fastest(sizes, tiles.block_m, tiles.block_n, not with_force, slots, most)


@lru_cache(maxsize=512)
def splits_of_columns(
    num_rows: int,
    num_columns: int,
    tiles: Tiles,
    k: int,
    row_bytes: int,
    with_force: bool,
    processors: int,
) -> int:
    """Work items a row tile, likewise, of rows that meet columns of their own."""
    row_tiles, column_tiles = -(-num_rows // tiles.block_m), -(-num_columns // tiles.block_n)
    slots = processors * tiles.programs
    if row_tiles >= MANY_ITEMS * slots:
        return 1
    most = _affordable(row_tiles * tiles.block_m, k, row_bytes, with_force)
    return min(
        range(1, min(most, max(column_tiles, 1)) + 1),
        key=lambda splits: _duration({column_tiles: row_tiles}, splits, slots),
    )


def _affordable(rows: int, k: int, row_bytes: int, with_force: bool) -> int:
    """Work items a row tile within the bound on working memory."""
    # a row of unit rows and gradient, and of one slot: force, energy, nearest, axial
    fixed, slot = row_bytes + 4 * k, 4 * k + 12
    if not with_force:
        fixed, slot = row_bytes, 8
    affordable = max(
        int((MEMORY_FACTOR * 4 * k - fixed) // slot), SMALL_BYTES // max(rows * slot, 1), 1
    )
    return min(affordable, MAX_SPLITS)


@lru_cache(maxsize=512)
def _fastest(sizes: Numbers, block_m: int, block_n: int, upper: bool, slots: int, most: int) -> int:
    if count_row_tiles(sizes, block_m) >= MANY_ITEMS * slots:
        return 1
    # column tiles of a row tile -> how many row tiles have so many
    lengths: dict[int, int] = {}
    for n in sizes:
        column_tiles = -(-n // block_n)
        for row in range(0, n, block_m):
            length = column_tiles - row // block_n if upper else column_tiles
            lengths[length] = lengths.get(length, 0) + 1
    most = min(most, max(lengths, default=1))
    return min(range(1, most + 1), key=lambda splits: _duration(lengths, splits, slots))


def _duration(lengths: dict[int, int], splits: int, slots: int) -> int:
    """Tell when the last item of so many splits ends, in tiles: a free slot takes the longest."""
    items: dict[int, int] = {}
    for length, count in lengths.items():
        part = part_length(length, splits)
        whole, rest = divmod(length, part)
        items[part] = items.get(part, 0) + count * whole
        if rest:
            items[rest] = items.get(rest, 0) + count
    # when slots are free next -> how many
    free, times = {0: slots}, [0]
    for part in sorted(items, reverse=True):
        left = items[part]
        while left:
            time = times[0]
            taken = min(left, free[time])
            left -= taken
            free[time] -= taken
            if not free[time]:
                del free[heappop(times)]
            end = time + part + ITEM_OVERHEAD
            if end not in free:
                heappush(times, end)
            free[end] = free.get(end, 0) + taken
    return max(free)
