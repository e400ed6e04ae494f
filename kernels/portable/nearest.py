"""The nearest row of each row: of the largest cosine, in half space of the largest |cosine|.

Tiles of cosines are float64, so that rounding hardly ever decides. It still would among near pairs,
whose cosines are almost 1: these are compared by their distance, computed from the difference of
the rows. A near pair is nearer than every other pair.

Multiples of one row are equally near to a third, but for the rounding of either. Therefore what
differs by less than rounding counts as equal, and the lowest index wins. The tiles of a row come in
the order of its partners, so that a later partner has to be nearer.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..sweep import NearestRequest
from .near_pairs import NEAR, Repairs, find_above, near_indices, near_pairs
from .rows import normalize
from .tiles import Tile, block_of, cols_of, cross_tiles, equal_ids, rows_of, symmetric_tiles

# by how much cosines, or distances of near pairs, may differ that are equal but for rounding
COSINE_ROUNDING, DISTANCE_ROUNDING = 2.0**-46, 2.0**-49
# an index that is larger than every other
NONE = torch.iinfo(torch.int64).max


class _Best(NamedTuple):
    """The nearest partner that rows have met up to now."""

    by: Tensor  # [T] float64 its cosine, or distance
    partner: Tensor  # [T] int64 its index within the set, -1 where there is none

    def rows_of(self, tile: Tile) -> "_Best":
        return _Best(*(rows_of(x, tile) for x in self))

    def cols_of(self, tile: Tile) -> "_Best":
        return _Best(*(cols_of(x, tile) for x in self))

    def replace(self, where: Tensor, by: Tensor, partner: Tensor) -> None:
        """Take another partner in some of the rows."""
        self.by.copy_(torch.where(where, by, self.by))
        self.partner.copy_(torch.where(where, partner, self.partner))


def nearest(request: NearestRequest) -> Tensor:
    """Find the nearest other row of each row within its set, or its nearest column.

    Returns:
        int64 [T]: the index within the set, or of the column; -1 where a row meets nobody.
    """
    points, sizes, ids, block = request.points, request.sizes, None, block_of(request.points)
    if request.columns is None:
        tiles, first_partner = symmetric_tiles(sizes, block), 0
    else:
        n, m = points.shape[0], request.columns.shape[0]
        tiles, first_partner = cross_tiles(n, m, block), n
        points = torch.cat([points, request.columns])
        if request.row_ids is not None and request.column_ids is not None:
            ids = torch.cat([request.row_ids, request.column_ids])
    v = normalize(points, request.eps, torch.float64).v
    # rows of NaN take part as dead ones, so that every index is in range
    v.masked_fill_(~v.isfinite().all(1, keepdim=True), 0.0)
    none = torch.full((v.shape[0],), -1, device=v.device)
    far = _Best(torch.full_like(v[:, 0], -torch.inf), none)
    near = _Best(torch.full_like(v[:, 0], torch.inf), none.clone())
    bound = 1.0 - NEAR[torch.float64] / 2.0

    def masked_tile(tile: Tile) -> tuple[Tensor, Tensor | None, Tensor | None]:
        cosines = torch.bmm(rows_of(v, tile), cols_of(v, tile).mT)
        if request.half_space:
            cosines.abs_()
        if tile.diagonal:
            cosines.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        if ids is not None:
            cosines.masked_fill_(equal_ids(ids, tile), -torch.inf)
        return cosines, None, find_above(cosines, bound)

    def meets_back(tile: Tile) -> bool:
        """Tell whether the columns of a tile meet its rows in this tile only."""
        return request.columns is None and not tile.diagonal

    def repair(tile: Tile, mask: Tensor) -> None:
        first_row = tile.run.first_row
        for index in near_indices(mask, tile, points.shape[1]):
            pairs = near_pairs(points, *index, request.eps)
            distance = torch.where(pairs.side > 0, pairs.d2, pairs.far).squeeze(1).sqrt()
            row, col = pairs.i - first_row, pairs.j - first_row
            _meet_near(near.rows_of(tile), distance, row - tile.rows.start, col % tile.run.size)
            if meets_back(tile):
                _meet_near(near.cols_of(tile), distance, col - tile.cols.start, row)

    repairs = Repairs(masked_tile, repair, v.device)
    for tile in tiles:
        cosines, _, mask = masked_tile(tile)
        _meet(far.rows_of(tile), cosines, tile.cols.start)
        if meets_back(tile):
            _meet(far.cols_of(tile), cosines.mT, tile.rows.start)
        repairs.add(tile, mask)
    repairs.finish()

    partner = torch.where(near.partner >= 0, near.partner, far.partner)[: request.points.shape[0]]
    return torch.where(partner >= 0, partner - first_partner, -1)


def _meet(best: _Best, cosines: Tensor, first: int) -> None:
    """Let rows [S, R] meet partners of the set, from number `first` on, by cosines [S, R, C]."""
    largest = cosines.amax(2)
    equal = cosines >= (largest - COSINE_ROUNDING).unsqueeze(2)
    count = cosines.shape[2]
    index = torch.arange(count, dtype=torch.int32, device=cosines.device)
    lowest = torch.where(equal, index, count).amin(2)
    best.replace(largest > best.by + COSINE_ROUNDING, largest, lowest.long() + first)


def _meet_near(best: _Best, distance: Tensor, row: Tensor, partner: Tensor) -> None:
    """Let rows of a tile, by their number in it, meet partners that are near to them.

    Args:
        best: [S, R], of the rows of the tile.
        distance: [P] of the pairs.
        row: [P] number of the row among S R.
        partner: [P] index within the set.
    """
    best = _Best(*(x.view(-1) for x in best))
    least = torch.full_like(best.by, torch.inf).scatter_reduce_(0, row, distance, "amin")
    # beside very small distances rounding is smaller, too: an exact duplicate is nearer than any
    bound = least + (least / 2.0).clamp_max_(DISTANCE_ROUNDING)
    equal = torch.where(distance <= bound[row], partner, NONE)
    lowest = torch.full_like(best.partner, NONE).scatter_reduce_(0, row, equal, "amin")
    best.replace(best.by > bound, least, lowest)
