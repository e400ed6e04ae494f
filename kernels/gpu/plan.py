"""From the shapes of a packed batch of sets to the tiles and work items of a launch.

Sets lie one after another in the caller's [T, k] array. On the device every set starts at a
multiple of BLOCK_M ("packed rows"), so a tile never holds rows of two sets. A work item is one row
tile against a range of column tiles of its set and owns one slot of the results: nothing is shared,
so nothing needs an atomic operation and the order of every sum is fixed by the shapes alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# rows and columns of a tile of the near-pair kernel
NEAR_BLOCK = 32

# fields of a work item
ITEM_FIELDS: tl.constexpr = tl.constexpr(6)
# fields of a row tile
TILE_FIELDS: tl.constexpr = tl.constexpr(6)


@dataclass(frozen=True)
class Tiles:
    """Launch shape of a sweep.

    programs: how many share a multiprocessor, by the registers and the shared memory that the
        compiled forces take; energies alone take less.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 2
    maxnreg: int | None = None
    programs: int = 2


# width of the packed rows -> tiles for small sets, for large ones (twice the rows halve the traffic
# to the cache) and for angles, which need more registers; found by compiling every variant: the
# fewest instructions a pair without a spill in the loop
_AMPERE = {
    # at the 128 registers that the compiler would choose some loops spill
    16: (*(Tiles(64, 64, 4, maxnreg=168, programs=3),) * 2, Tiles(64, 64, 4)),
    32: (*(Tiles(64, 64, 4, programs=3),) * 2, Tiles(64, 64, 4, maxnreg=224)),
    64: (Tiles(64, 32, 4),) * 3,
    128: (Tiles(32, 32, 4),) * 3,
}
_HOPPER = {
    16: (*(Tiles(64, 64, 4, programs=4),) * 2, Tiles(64, 64, 4, programs=3)),
    # programs that share a processor overlap their products with the work between them: 128
    # registers let two of eight warps or four of four do so, 168 three of four. Two stages would
    # fetch nothing ahead: the wait for a tile would come before the next one is asked for
    32: (
        Tiles(64, 64, 4, 3, maxnreg=128, programs=4),
        Tiles(128, 64, 8, 3, maxnreg=128),
        Tiles(64, 64, 4),
    ),
    # for k = 33..48 too: products of 32 and 16 columns take a quarter less of the tensor cores, but
    # 16.5 instructions a pair in half space where these take 15.6, and wait twice as often
    64: (
        Tiles(64, 64, 4, 3, maxnreg=168, programs=3),
        Tiles(128, 64, 8, 3, maxnreg=128),
        Tiles(64, 64, 4),
    ),
    128: (Tiles(64, 32, 4), Tiles(128, 32, 8, programs=1), Tiles(64, 32, 4)),
}
_BLACKWELL = {
    # sums lie in tensor memory, of which a multiprocessor has 512 columns: tiles of 256 let two
    # programs share it; 128 x 64 would take all, and more instructions a pair
    16: (Tiles(64, 64, 4), Tiles(128, 32, 4), Tiles(64, 64, 4)),
    # a second stage of loads would spill for some pair functions, and below for most
    32: (Tiles(64, 64, 4), Tiles(128, 32, 4, 1), Tiles(64, 64, 4)),
    # tiles of 256 columns, 64 x 32 or 128 x 16, take a third more instructions than these of 512
    64: (
        Tiles(64, 64, 4, 1, programs=1),
        Tiles(128, 64, 8, 1, programs=1),
        Tiles(64, 64, 4, 1, programs=1),
    ),
    128: (Tiles(64, 32, 4, 1, programs=1),) * 3,
}
_CDNA3 = {
    16: (Tiles(64, 64, 4),) * 3,
    32: (Tiles(64, 64, 4),) * 3,
    64: (Tiles(64, 32, 4),) * 3,
    128: (Tiles(64, 32, 4, programs=1),) * 3,
}
TILE_TABLE = {
    "sm_80": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "sm_103": _BLACKWELL,
    "gfx942": _CDNA3,
}
LARGE_SET = 4096
# the last widths keep fewer sums in flight, for their registers
DIRECT_TILES = {k: Tiles(64, 16 if k <= 4 else 8, 4) for k in range(1, 9)}
MAX_DIRECT = 8
MAX_WIDTH = 128
# up to this k an error of fp16 hi + lo in a row would show in the gradient of 16,384 rows
MAX_WITH_REST = 24


def tiles_for(target: str, k: int, largest: int, angle: bool) -> Tiles:
    """Launch shape of a sweep.

    Of NVIDIA's GPUs those that the table does not know get the most conservative row, of AMD's
    those with the matrix instructions of gfx942 its row.

    Args:
        target: "sm_80", "sm_90", "gfx942", ...
        k: columns of the points.
        largest: rows of the largest set.
        angle: whether the pair function is one of angles.

    Raises:
        RuntimeError: the kernels do not compile for the target.
    """
    if (reason := unknown_target(target)) is not None:
        raise RuntimeError(reason)
    if k <= MAX_DIRECT:
        return DIRECT_TILES[k]
    others = _CDNA3 if target.startswith("gfx9") else _AMPERE
    small, large, of_angles = TILE_TABLE.get(target, others)[row_width(k)]
    return of_angles if angle else large if largest >= LARGE_SET else small


def unknown_target(target: str) -> str | None:
    """Why the kernels cannot run on a target, and the remedy; None if they can."""
    if target.startswith("gfx") and not target.startswith("gfx9"):
        return f"backend 'triton' runs on AMD's gfx9 GPUs, not on {target}: use backend='torch'"
    return None


def row_width(k: int) -> int:
    """Columns of the packed unit rows: k padded for the tensor cores."""
    return max(16, triton.next_power_of_2(k)) if k <= MAX_WIDTH else -(-k // 16) * 16


@lru_cache(maxsize=512)
def count_row_tiles(sizes: tuple[int, ...], block_m: int) -> int:
    """Count the row tiles of sets of these sizes."""
    return sum(-(-n // block_m) for n in sizes)


def part_length(length: int, splits: int) -> int:
    """Column tiles of a work item of a row tile that meets `length` of them."""
    return max(-(-length // splits), 1)


@dataclass(frozen=True)
class Plan:
    """Tables of one batch of shapes, on the device; all int32.

    items [I, 6]: first packed row, first and last+1 column tile, last+1 valid row of the set,
        slot, distance from a packed row to the caller's row.
    row_tiles [M, 6]: first packed row, its row in the caller's array, number of valid rows, first
        slot, number of slots, set.
    set_tiles [B + 1]: first row tile of each set.
    """

    items: Tensor
    row_tiles: Tensor
    set_tiles: Tensor
    num_items: int
    num_row_tiles: int
    packed_rows: int
    first_packed_row: tuple[int, ...]


@lru_cache(maxsize=512)
def make_plan(
    sizes: tuple[int, ...],
    block_m: int,
    block_n: int,
    splits: int,
    upper: bool,
    device: torch.device,
) -> Plan:
    """Tables for sets of these sizes.

    Args:
        sizes: rows of each set.
        block_m, block_n: the tile; block_n divides block_m.
        splits: the column tiles of a row tile go to about so many work items.
        upper: only tiles on or above the diagonal, each unordered pair once.
        device: where the tables live.
    """
    total_tiles = count_row_tiles(sizes, block_m)
    packed_rows = total_tiles * block_m
    if packed_rows + block_m >= 2**31:
        raise ValueError(f"the sets hold {sum(sizes)} rows together; at most 2^31 are possible")
    items: list[tuple[int, ...]] = []
    row_tiles: list[tuple[int, ...]] = []
    set_tiles = [0]
    first_packed_row = []
    begin = row = slot = 0
    for index, n in enumerate(sizes):
        first_packed_row.append(begin)
        first_tile, end_tile = begin // block_n, -(-(begin + n) // block_n)
        for tile_row in range(begin, begin + n, block_m):
            start = tile_row // block_n if upper else first_tile
            length = part_length(end_tile - start, splits)
            parts = range(start, end_tile, length)
            row_tiles.append(
                (
                    tile_row,
                    row + tile_row - begin,
                    min(block_m, begin + n - tile_row),
                    slot,
                    len(parts),
                    index,
                )
            )
            for part in parts:
                stop = min(part + length, end_tile)
                items.append((tile_row, part, stop, begin + n, slot, begin - row))
                slot += 1
        set_tiles.append(len(row_tiles))
        begin += -(-n // block_m) * block_m
        row += n
    # the long ones first: the hardware's scheduler then balances the rest
    items.sort(key=lambda item: item[1] - item[2])

    return Plan(
        items=upload(items, (ITEM_FIELDS.value,), torch.int32, device),
        row_tiles=upload(row_tiles, (TILE_FIELDS.value,), torch.int32, device),
        set_tiles=upload(set_tiles, (), torch.int32, device),
        num_items=len(items),
        num_row_tiles=len(row_tiles),
        packed_rows=packed_rows,
        first_packed_row=tuple(first_packed_row),
    )


def upload(
    rows: Sequence[Any], fields: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Upload a table [rows, *fields], complete for every stream when this returns.

    Raises:
        RuntimeError: a CUDA graph is being captured, which could not repeat the copy.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend 'triton' met new shapes while a CUDA graph was captured: call it once with "
            "tensors of these shapes before the capture"
        )
    return torch.tensor(rows, dtype=dtype).reshape(-1, *fields).to(device)


# tables that captured graphs read at every replay, by address: they may not leave with the cache
_CAPTURED: dict[int, Tensor] = {}


def hold(tables: Iterable[Tensor]) -> None:
    """Keep the memory of cached tables until what was just launched has read them.

    Another stream may be current than the one they were made on, and a captured graph reads them
    at every replay.
    """
    for table in tables:
        if table.device.type != "cuda":
            continue
        if torch.cuda.is_current_stream_capturing():
            _CAPTURED[table.data_ptr()] = table
        else:
            table.record_stream(torch.cuda.current_stream())


class Slots(NamedTuple):
    """What the work items leave behind, one slot of BLOCK_M rows each, in raw units.

    energy [S]; nearest [S]: the largest cosine (either sign where c = -1 matters too), times
    COSINE_SCALE; force [S, width]; axial [S]: deficit_i times the sum of side F' over near pairs,
    what `finish` multiplies by v_i. Without forces, the last two are empty.
    """

    energy: Tensor
    nearest: Tensor
    force: Tensor
    axial: Tensor

    @classmethod
    def empty(
        cls, num_slots: int, block_m: int, width: int, with_force: bool, device: torch.device
    ) -> "Slots":
        """Room for so many slots."""
        rows = num_slots * block_m
        force_rows = rows if with_force else 0
        shapes = ((rows,), (rows,), (force_rows, width), (force_rows,))
        return cls(*(torch.empty(s, dtype=torch.float32, device=device) for s in shapes))


@lru_cache(maxsize=512)
def set_constants(
    sizes: tuple[int, ...], scales: tuple[float, ...], pair_offset: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Per set, float64: the factor of its energy, and what its pairs add to the scaled energy."""
    pairs = [n * (n - 1) // 2 for n in sizes]
    table = [scales, [c * pair_offset * n for c, n in zip(scales, pairs, strict=True)]]
    factor, offset = upload(table, (len(sizes),), torch.float64, device).unbind(0)
    return factor, offset


@triton.jit
def load_item(items_ptr, item):
    """Fields of a work item: row0, tile_begin, tile_end, end_row, slot, shift."""
    base = items_ptr + item * ITEM_FIELDS
    return (
        tl.load(base),
        tl.load(base + 1),
        tl.load(base + 2),
        tl.load(base + 3),
        tl.load(base + 4),
        tl.load(base + 5),
    )


@triton.jit
def split_tiles(row0, tile_begin, tile_end, end_row, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """How a work item's column tiles divide: [tile_begin, tile_end) = clean|diagonal|clean|ragged.

    Returns the numbers of clean and of dirty tiles, then what `column_tile` needs.
    """
    diagonal_begin = tl.minimum(tl.maximum(row0 // BLOCK_N, tile_begin), tile_end)
    diagonal_end = tl.minimum(tl.maximum((row0 + BLOCK_M) // BLOCK_N, tile_begin), tile_end)
    ragged_begin = tl.maximum(tl.minimum(end_row // BLOCK_N, tile_end), diagonal_end)
    num_diagonal = diagonal_end - diagonal_begin
    num_clean = diagonal_begin - tile_begin + ragged_begin - diagonal_end
    num_dirty = num_diagonal + tile_end - ragged_begin
    return num_clean, num_dirty, tile_begin, diagonal_begin, num_diagonal, ragged_begin


@triton.jit
def column_tile(split, step, DIRTY: tl.constexpr):
    """Find the tile of a step of the loop over the dirty tiles, or over the clean ones."""
    _, _, tile_begin, diagonal_begin, num_diagonal, ragged_begin = split
    if DIRTY:
        return tl.where(
            step < num_diagonal, diagonal_begin + step, ragged_begin + step - num_diagonal
        )
    else:
        tile = tile_begin + step
        return tl.where(tile >= diagonal_begin, tile + num_diagonal, tile)


@triton.jit
def load_row_tile(tiles_ptr, tile):
    """Fields of a row tile: packed row, caller's row, valid rows, first slot, slots, set."""
    base = tiles_ptr + tile * TILE_FIELDS
    return (
        tl.load(base),
        tl.load(base + 1),
        tl.load(base + 2),
        tl.load(base + 3),
        tl.load(base + 4),
        tl.load(base + 5),
    )
