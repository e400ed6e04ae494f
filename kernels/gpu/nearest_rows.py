"""The nearest other row of each row of a set, or its nearest column, at any k.

    argmax_j c_ij, in half space argmax_j |c_ij|; of those that are equal but for rounding the first

The first kernel is the sweep of `pairwise` without forces: a running maximum, the tile it came from
and the runner-up, each [BLOCK_M, BLOCK_N] in registers, for a reduction in the loop would cost
shuffles. Where the runner-up comes so near to the largest cosine that fp16 halves cannot tell them
apart, the second kernel compares all candidates of the row by the differences of the rows, in
float64. That takes in near pairs, whose cosines are all about 1, and multiples of one row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sweep import NearestRequest, Numbers
from . import backend
from .cross import tile_cosines
from .near_pairs import source_rows, squared_difference
from .pairwise import load_rows
from .plan import (
    NEAR_BLOCK,
    Plan,
    Tiles,
    column_tile,
    hold,
    load_item,
    load_row_tile,
    make_plan,
    split_tiles,
)
from .sides import CHUNK, Side, cross_plan, load_ids, make_side, padded_width
from .splits import multiprocessors, splits_for, splits_of_columns

TILES = Tiles(64, 32, 4, 3)
# products of the fp16 halves in a cosine, whatever precision is asked for: an index is right or not
COSINE_TERMS = 3
# cosines that differ by less may be equal: more than the error of their products
RIVAL: tl.constexpr = tl.constexpr(2.0**-18 * 65536.0)
# x of a pair that does not count, and of one that is not a number
NOBODY: tl.constexpr = tl.constexpr(-3.0e38)
NOT_A_NUMBER: tl.constexpr = tl.constexpr(-1.0e30)
# by how much distances may differ that are equal but for rounding
ROUNDING: tl.constexpr = tl.constexpr(2.0**-48)
LAST: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def closeness(x, HALF_SPACE: tl.constexpr):
    """COSINE_SCALE c as it is compared: |c| in half space, and what is not a number the last."""
    if HALF_SPACE:
        x = tl.abs(x)
    return tl.where(x == x, x, NOT_A_NUMBER)


@triton.jit
def met_columns(row_ids, n, offs_m, offs_n, end_column, SELF: tl.constexpr, WITH_IDS: tl.constexpr):
    """Which columns of a tile a row meets, [M, N]: those of another number, or of another id."""
    mask = (offs_n < end_column)[None, :] & (offs_m == offs_m)[:, None]
    if SELF:
        mask = mask & (offs_n[None, :] != offs_m[:, None])
    elif WITH_IDS:
        column_ids = load_ids(n, offs_n, end_column, True)
        mask = mask & (row_ids[:, None] != column_ids[None, :])
    return mask


@triton.jit
def take_columns(
    found,
    tile,
    row,
    m,
    n,
    offs_m,
    col_offs,
    end_column,
    MASKED: tl.constexpr,
    SELF: tl.constexpr,
    WITH_IDS: tl.constexpr,
    HALF_SPACE: tl.constexpr,
    TERMS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Let the columns of a tile compete: the largest x, the second, and the tile of the first."""
    best, second, best_tile = found
    row_halves, row_offs, row_ids = row
    base = tile.to(tl.int64) * (BLOCK_N * WIDTH)
    x, _ = tile_cosines(row_halves, m, n, row_offs, base, col_offs, TERMS, True, WIDTH, STEP)
    x = closeness(x, HALF_SPACE)
    if MASKED:
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = met_columns(row_ids, n, offs_m, offs_n, end_column, SELF, WITH_IDS)
        x = tl.where(mask, x, NOBODY)
    best_tile = tl.where(x > best, tile, best_tile)
    second = tl.maximum(second, tl.minimum(best, x))
    return tl.maximum(best, x), second, best_tile


@triton.jit
def nearest_kernel(
    m,
    n,
    items_ptr,
    best_ptr,
    rival_ptr,
    index_ptr,
    SELF: tl.constexpr,
    WITH_IDS: tl.constexpr,
    HALF_SPACE: tl.constexpr,
    TERMS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (items,). Per slot and row: the largest x, its packed column, and the runner-up."""
    row0, tile_begin, tile_end, end_column, slot, end_row = load_item(items_ptr, tl.program_id(0))
    lane = tl.arange(0, BLOCK_M)
    offs_m = row0 + lane
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, STEP)
    row_offs = offs_m[:, None].to(tl.int64) * WIDTH + offs_k[None, :]
    col_offs = offs_n[:, None] * WIDTH + offs_k[None, :]
    row = (
        load_rows(m.rows, row_offs, TERMS),
        row_offs,
        load_ids(m, offs_m, end_row, WITH_IDS),
    )
    # columns of their own have no diagonal
    diagonal = row0 if SELF else row0 * 0 - 2 * BLOCK_M
    split = split_tiles(diagonal, tile_begin, tile_end, end_column, BLOCK_M, BLOCK_N)
    best = tl.full((BLOCK_M, BLOCK_N), NOBODY, dtype=tl.float32)
    second = best
    best_tile = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for step in tl.range(0, split[1], num_stages=1):
        best, second, best_tile = take_columns(
            (best, second, best_tile),
            column_tile(split, step, True),
            row,
            m,
            n,
            offs_m,
            col_offs,
            end_column,
            True,
            SELF,
            WITH_IDS,
            HALF_SPACE,
            TERMS,
            WIDTH,
            STEP,
            BLOCK_N,
        )
    for step in tl.range(0, split[0], num_stages=STAGES):
        best, second, best_tile = take_columns(
            (best, second, best_tile),
            column_tile(split, step, False),
            row,
            m,
            n,
            offs_m,
            col_offs,
            end_column,
            WITH_IDS,
            SELF,
            WITH_IDS,
            HALF_SPACE,
            TERMS,
            WIDTH,
            STEP,
            BLOCK_N,
        )
    largest = tl.max(best, axis=1)
    columns = tl.where(best == largest[:, None], best_tile * BLOCK_N + offs_n[None, :], LAST)
    index = tl.min(columns, axis=1)
    others = tl.where(columns == index[:, None], second, best)
    out = slot.to(tl.int64) * BLOCK_M + lane
    tl.store(best_ptr + out, largest)
    tl.store(rival_ptr + out, tl.max(others, axis=1))
    tl.store(index_ptr + out, index)


@triton.jit
def unit_distance(m, n, x, k, eps):
    """|v_i - side v_j|, the deficits included, of a tile of packed rows, float64."""
    side = tl.where(x < 0.0, -1.0, 1.0).to(tl.float64)
    d2, _ = squared_difference(m, n, side, k)
    # in float64, for it decides between near rows of different lengths
    deficit_m = tl.where(m.inv_nu == 0.0, 1.0, m.inv_nu * m.inv_nu * eps)
    deficit_n = tl.where(n.inv_nu == 0.0, 1.0, n.inv_nu * n.inv_nu * eps)
    distance = tl.sqrt(d2 + (deficit_m[:, None] + deficit_n[None, :]))
    return tl.where(distance == distance, distance, 1.0e30)


@triton.jit(do_not_specialize=["num_columns"])
def nearest_choose_kernel(
    m,
    n,
    tiles_ptr,
    set_tiles_ptr,
    best_ptr,
    rival_ptr,
    index_ptr,
    out_ptr,
    num_columns,
    k,
    eps,
    SELF: tl.constexpr,
    WITH_IDS: tl.constexpr,
    HALF_SPACE: tl.constexpr,
    TERMS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    TILE_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (row tiles, TILE_M / BLOCK_M). Index int64 [T], of rows with rivals by differences."""
    row0, source0, valid, slot0, num_slots, index_of_set = load_row_tile(
        tiles_ptr, tl.program_id(0)
    )
    lane = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = lane < valid
    first = slot0.to(tl.int64) * TILE_M + lane
    best = tl.full((BLOCK_M,), NOBODY, dtype=tl.float32)
    rival = best
    index = tl.full((BLOCK_M,), -1, dtype=tl.int32)
    for slot in range(0, num_slots):
        offs = first + slot * TILE_M
        x = tl.load(best_ptr + offs)
        rival = tl.maximum(tl.maximum(rival, tl.load(rival_ptr + offs)), tl.minimum(best, x))
        index = tl.where(x > best, tl.load(index_ptr + offs), index)
        best = tl.maximum(best, x)

    begin, end, shift = row0 * 0, num_columns, 0
    if SELF:
        tile = tl.load(set_tiles_ptr + index_of_set)
        begin = load_row_tile(tiles_ptr, tile)[0]
        last = load_row_tile(tiles_ptr, tl.load(set_tiles_ptr + index_of_set + 1) - 1)
        end = last[0] + last[2]
        shift = row0 - source0
    within = rival >= best - RIVAL
    doubtful = mask_m & within & (rival > NOBODY)
    if tl.max(doubtful.to(tl.int32), axis=0) > 0:
        offs_m = row0 + lane
        offs_k = tl.arange(0, STEP)
        row_offs = offs_m[:, None].to(tl.int64) * WIDTH + offs_k[None, :]
        col_offs = tl.arange(0, BLOCK_N)[:, None] * WIDTH + offs_k[None, :]
        row_halves = load_rows(m.rows, row_offs, TERMS)
        row_ids = load_ids(m, offs_m, row0 + valid, WITH_IDS)
        source_m = source_rows(m.points, m.rows, offs_m, shift, mask_m)
        least = tl.full((BLOCK_M,), 1.0e38, dtype=tl.float64)
        # sets begin at a multiple of the tile
        for step in range(0, tl.cdiv(end - begin, BLOCK_N)):
            offs_n = begin + step * BLOCK_N + tl.arange(0, BLOCK_N)
            base = (begin + step * BLOCK_N).to(tl.int64) * WIDTH
            signed, _ = tile_cosines(
                row_halves, m, n, row_offs, base, col_offs, TERMS, True, WIDTH, STEP
            )
            mask = met_columns(row_ids, n, offs_m, offs_n, end, SELF, WITH_IDS)
            x = tl.where(mask, closeness(signed, HALF_SPACE), NOBODY)
            candidate = mask & doubtful[:, None] & (x >= (best - RIVAL)[:, None])
            if tl.max(tl.max(candidate.to(tl.int32), axis=1), axis=0) > 0:
                source_n = source_rows(n.points, n.rows, offs_n, shift, offs_n < end)
                sign = signed if HALF_SPACE else tl.abs(signed)
                distance = unit_distance(source_m, source_n, sign, k, eps)
                distance = tl.where(candidate, distance, 1.0e38)
                nearest = tl.min(distance, axis=1)
                # beside very small distances rounding is smaller, too
                bound = nearest + tl.minimum(nearest * 0.5, ROUNDING)
                columns = tl.where(distance <= bound[:, None], offs_n[None, :], LAST)
                nearer = least > bound
                index = tl.where(nearer, tl.min(columns, axis=1), index)
                least = tl.where(nearer, nearest, least)
    index = tl.where(index >= 0, index - begin, -1)
    tl.store(out_ptr + source0.to(tl.int64) + lane, index.to(tl.int64), mask=mask_m)


def nearest(request: NearestRequest) -> Tensor:
    """Index within the set, or of the column, int64 [T]; -1 where a row meets nobody."""
    rows, columns = request.points, request.columns
    backend.check(rows)
    if columns is not None:
        backend.check(columns, "columns")
    num_rows, k = rows.shape
    if num_rows == 0 or (columns is not None and len(columns) == 0):
        return torch.full((num_rows,), -1, dtype=torch.int64, device=rows.device)
    if k == 0:
        # dead rows, all equal
        rows = rows.new_zeros(num_rows, 1)
        columns = None if columns is None else columns.new_zeros(len(columns), 1)
    with backend.on_device(rows.device):
        return _nearest(request, rows.contiguous(), columns)


def _nearest(request: NearestRequest, rows: Tensor, columns: Tensor | None) -> Tensor:
    k, device = rows.shape[1], rows.device
    block_m, block_n = TILES.block_m, TILES.block_n
    width = padded_width(k)
    row_bytes = 4 * width + 12
    if columns is None:
        sizes = tuple(request.sizes)
        # each row meets all others, as with forces
        splits = splits_for(Numbers.of(sizes), TILES, k, row_bytes, True, multiprocessors(device))
        plan = back = make_plan(sizes, block_m, block_n, splits, False, device)
        m = n = make_side(rows, plan, block_m, request.eps, None, None)
    else:
        columns = columns.contiguous()
        splits = splits_of_columns(
            len(rows), len(columns), TILES, k, row_bytes, False, multiprocessors(device)
        )
        plan = cross_plan(len(rows), len(columns), TILES, splits, device)
        back = cross_plan(len(columns), 1, TILES, 1, device)
        m = make_side(rows, plan, block_m, request.eps, request.row_ids, None)
        n = make_side(columns, back, block_m, request.eps, request.column_ids, None)
    out = torch.empty(len(rows), dtype=torch.int64, device=device)
    _launch(request, m, n, plan, out, request.columns is None)
    hold([plan.items, plan.row_tiles, plan.set_tiles, back.row_tiles])
    return out


def _warps(device: torch.device, whole: bool) -> int:
    """Warps of a program; a product in parts takes more registers, of which AMD's warps have more.

    On gfx942 eight of them share what four have, and spill in the loop.
    """
    doubled = not whole and not backend.target_of(device).startswith("gfx")
    return TILES.num_warps * (1 + doubled)


def _launch(request: NearestRequest, m: Side, n: Side, plan: Plan, out: Tensor, own: bool) -> None:
    block_m, block_n = TILES.block_m, TILES.block_n
    width, k = m.rows.hi.shape[1], m.points.shape[1]
    step = min(width, CHUNK)
    slots = plan.num_items * block_m
    best, rival = (torch.empty(slots, dtype=torch.float32, device=out.device) for _ in range(2))
    index = torch.empty(slots, dtype=torch.int32, device=out.device)
    flags = {
        "SELF": own,
        "WITH_IDS": request.row_ids is not None,
        "HALF_SPACE": request.half_space,
        "TERMS": COSINE_TERMS,
        "WIDTH": width,
        "STEP": step,
    }
    nearest_kernel[(plan.num_items,)](
        m,
        n,
        plan.items,
        best,
        rival,
        index,
        **flags,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STAGES=TILES.num_stages if width == step else 1,
        # a product in parts takes more registers
        num_warps=_warps(m.points.device, width == step),
    )
    nearest_choose_kernel[(plan.num_row_tiles, block_m // NEAR_BLOCK)](
        m,
        n,
        plan.row_tiles,
        plan.set_tiles,
        best,
        rival,
        index,
        out,
        len(n.points),
        k,
        request.eps,
        **flags,
        TILE_M=block_m,
        BLOCK_M=NEAR_BLOCK,
        BLOCK_N=NEAR_BLOCK,
        num_warps=4,
        num_stages=1,
    )
