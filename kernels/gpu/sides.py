"""Rows and columns of a cross set as kernels take them, and who meets whom.

Both are packed as single sets, so a packed row is the caller's row of the same number. A work item
is a row tile against a range of column tiles, as in `plan`; its last field is the end of the rows.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import ITEM_FIELDS, MAX_WIDTH, TILE_FIELDS, Plan, Tiles, upload
from .project_normalize import UnitRows, normalize

# columns of the unit rows in one product, and of the force in one program
CHUNK = 128


class Side(NamedTuple):
    """The rows, or the columns: the caller's array, unit rows, ids and weights.

    ids int32 [N] and weights float32 [N] are any tensor where a launch goes without.
    """

    points: Tensor
    rows: UnitRows
    ids: Tensor
    weights: Tensor


def padded_width(k: int) -> int:
    """Columns of packed unit rows for the tensor cores: a power of two, or a multiple of CHUNK."""
    return max(16, triton.next_power_of_2(k)) if k <= MAX_WIDTH else -(-k // CHUNK) * CHUNK


def make_side(
    points: Tensor,
    plan: Plan,
    block_m: int,
    eps: float,
    ids: Tensor | None,
    weights: Tensor | None,
    *,
    columns: bool = False,
    with_rest: bool = False,
) -> Side:
    """Normalize points [N, k] and pack them, by column for differences or for tensor cores."""
    k = points.shape[1]
    width = k if columns else padded_width(k)
    rows = UnitRows.empty(plan.packed_rows, width, columns, with_rest, points.device)
    normalize(points, rows, plan, block_m, eps)
    ids = rows.deficit if ids is None else ids.to(torch.int32).contiguous()
    weights = rows.deficit if weights is None else weights.float().contiguous()
    return Side(points, rows, ids, weights)


@lru_cache(maxsize=512)
def cross_plan(
    num_rows: int, num_columns: int, tiles: Tiles, splits: int, device: torch.device
) -> Plan:
    """Tables for rows against columns; see `Plan`.

    items [I, 6]: first row, first and last+1 column tile, last+1 column, slot, last+1 row.
    """
    block_m, block_n = tiles.block_m, tiles.block_n
    packed_rows, packed_columns = (-(-n // block_m) * block_m for n in (num_rows, num_columns))
    if max(packed_rows, packed_columns) + block_m >= 2**31:
        raise ValueError(
            f"a cross set may have at most 2^31 rows and columns, got {num_rows} and {num_columns}"
        )
    end_tile = -(-num_columns // block_n)
    length = max(-(-end_tile // splits), 1)
    parts = [(start, min(start + length, end_tile)) for start in range(0, end_tile, length)]
    items: list[tuple[int, ...]] = []
    row_tiles: list[tuple[int, ...]] = []
    for row in range(0, num_rows, block_m):
        slot = len(items)
        row_tiles.append((row, row, min(block_m, num_rows - row), slot, len(parts), 0))
        for index, part in enumerate(parts):
            items.append((row, *part, num_columns, slot + index, num_rows))
    return Plan(
        items=upload(items, (ITEM_FIELDS.value,), torch.int32, device),
        row_tiles=upload(row_tiles, (TILE_FIELDS.value,), torch.int32, device),
        set_tiles=upload([0, len(row_tiles)], (), torch.int32, device),
        num_items=len(items),
        num_row_tiles=len(row_tiles),
        packed_rows=packed_rows,
        first_packed_row=(0,),
    )


@triton.jit
def load_ids(side, offs, end, WITH_IDS: tl.constexpr):
    """Ids of some rows; without ids nothing that matters."""
    ids = offs
    if WITH_IDS:
        ids = tl.load(side.ids + offs, mask=offs < end, other=0)
    return ids


@triton.jit
def met_pairs(row_ids, column_ids, offs_n, end_column, WITH_IDS: tl.constexpr):
    """Which pairs of a tile count: those of columns that are there and of another id, [M, N]."""
    mask = (offs_n < end_column)[None, :] & (row_ids == row_ids)[:, None]
    if WITH_IDS:
        mask = mask & (row_ids[:, None] != column_ids[None, :])
    return mask
