"""Pairs whose cosine is near 1, or near -1 where that matters too, computed again in float64.

2 - 2c has an absolute error of about 2e-7 in float32, which is most of a small squared distance.
Such pairs are masked out of their tile, and their distance comes from the difference of the rows:

    apart = v_i - side v_j                            side = -1 for a nearly antipodal pair, else 1
    2 - 2 side c = |apart|^2 + deficit_i + deficit_j

v_j = side (v_i - apart), so the force F' v_j on row i is -side F' apart plus side F' v_i. The
second part is large and lies along v_i; the gradient projects it away but for the factor deficit_i.
Therefore only -side F' apart goes into the force, and side F' is summed apart, as `axial`.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..pair_functions import PairFunction
from .rows import Rows, normalize
from .tiles import Tile, equal_ids

# d2 = 2 - 2c below which a tile is not trusted: its absolute error is 2e-7, in float64 4e-16. Where
# cosines near -1 matter too, the same holds of 4 - d2. The distance at the bound, sqrt(d2), is
# larger than the default min_distance of 1e-3, so tiles need not know of the tangent line
NEAR = {torch.float32: 2.0**-6, torch.float64: 2.0**-16}
# log2 of the largest F' that a tile may hold: sums of them must stay finite
RANGE_BITS = {torch.float32: 60, torch.float64: 900}
# |apart|^2 below which two rows may be multiples of one row: far above the rounding of their norms,
# and so small that few other pairs have to be looked at
MAYBE_MULTIPLES = 1e-18
# relative difference of v_iq v_jr and v_ir v_jq up to which rows count as multiples: rounding in
# float64 leaves less, and rows of float32 that are no multiples differ by 2^-48 at least, the last
# bit of a product
MULTIPLES = 2.0**-49
# float64 elements of an array of differences: near pairs are worked on in chunks of that size
CHUNK = 1 << 18


class NearPairs(NamedTuple):
    """Some near pairs, in float64."""

    set: Tensor  # [P] number of the set
    i: Tensor  # [P] rows of the packed array
    j: Tensor
    side: Tensor  # [P, 1] 1, or -1 where the rows are nearly antipodal
    apart: Tensor  # [P, k] v_i - side v_j; along v_i where both are multiples of one row
    d2: Tensor  # [P, 1] 2 - 2c
    far: Tensor  # [P, 1] 4 - d2 = 2 + 2c


def near_below(pair: PairFunction, dtype: torch.dtype) -> float:
    """Choose the d2 below which a pair is near; the exponent magnifies the error of d2."""
    trusted = min(NEAR[dtype] * max(pair.growth / 4.0, 1.0), 1.0)
    # F' is about d^-growth
    in_range = 2.0 ** (-2.0 * RANGE_BITS[dtype] / pair.growth) if pair.growth > 0 else 0.0
    return max(trusted, in_range)


def mask_out(
    x: Tensor, tile: Tile, pair: PairFunction, bound: float, ids: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Find the elements of a tile that do not count, and the near pairs to compute again.

    `x` is 2 - 2c, in half space c. It becomes that of c = 0, which is harmless, in all of them, so
    what follows stays finite.

    Returns:
        Masks: elements that do not count in a tile (the diagonal, pairs of equal ids and near
        pairs), and near pairs, each once.
        None where there are none, which only a processor is asked.
    """
    if pair.half_space:
        harmless, low, high = 0.0, bound / 2.0 - 1.0, 1.0 - bound / 2.0
    else:
        harmless, low, high = 2.0, bound, 4.0 - bound if pair.two_ended else math.inf
    left_out = None
    if tile.diagonal:
        x.diagonal(dim1=1, dim2=2).fill_(harmless)
        left_out = torch.eye(x.shape[1], dtype=torch.bool, device=x.device).expand_as(x)
    if ids is not None:
        same = equal_ids(ids, tile)
        if not answers_at_once(x.device) or bool(same.any()):
            x.masked_fill_(same, harmless)
            left_out = same if left_out is None else left_out | same
    if answers_at_once(x.device):
        lowest, highest = torch.aminmax(x)
        if bool(lowest >= low) and bool(highest <= high):  # neither is true of NaN
            return left_out, None
    near = x < low
    if high < math.inf:
        near |= x > high
    x.masked_fill_(near, harmless)
    left_out = near if left_out is None else near | left_out
    return left_out, near.triu(1) if tile.diagonal else near


def find_above(x: Tensor, bound: float) -> Tensor | None:
    """Find elements above a bound; None where there are none, which only a processor is asked."""
    if answers_at_once(x.device) and not bool(x.amax() > bound):
        return None
    return x > bound


def answers_at_once(device: torch.device) -> bool:
    """Tell whether a tensor's content can be looked at without waiting for other work."""
    return device.type == "cpu"


class Repairs:
    """Repairs tiles that have near pairs: each at once, or on a GPU all of them at the end.

    A question to a GPU waits for all of its work, so that it is asked once for all tiles; those
    that have near pairs are then computed again.

    Args:
        masked_tile: makes a tile and the two masks of `mask_out`.
        repair: adds what the near pairs of a tile contribute.
        device: where the tiles are.
    """

    def __init__(
        self,
        masked_tile: Callable[[Tile], tuple[Tensor, Tensor | None, Tensor | None]],
        repair: Callable[[Tile, Tensor], None],
        device: torch.device,
    ) -> None:
        self.masked_tile, self.repair = masked_tile, repair
        self.at_once = answers_at_once(device)
        self.later: list[tuple[Tile, Tensor]] = []

    def add(self, tile: Tile, near: Tensor | None) -> None:
        """Take the near pairs of a tile, or None where there are none."""
        if near is None:
            return
        if self.at_once:
            self.repair(tile, near)
        else:
            self.later.append((tile, near.any()))

    def finish(self) -> None:
        """Repair what has been put off."""
        if not self.later:
            return
        found = torch.stack([has_near for _, has_near in self.later]).tolist()
        for (tile, _), has_near in zip(self.later, found, strict=True):
            if has_near:
                _, _, near = self.masked_tile(tile)
                assert near is not None
                self.repair(tile, near)


def near_indices(near: Tensor, tile: Tile, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield set, row i and row j (packed) of the pairs marked in a tile, in chunks.

    Args:
        near: mask of the tile.
        tile: where it lies.
        width: columns of the rows.
    """
    run = tile.run
    chunk = max(CHUNK // width, 1)
    for which, i, j in (part.unbind(1) for part in near.nonzero().split(chunk)):
        first = run.first_row + which * run.size
        yield run.first_set + which, first + tile.rows.start + i, first + tile.cols.start + j


def near_pairs(points: Tensor, set: Tensor, i: Tensor, j: Tensor, eps: float) -> NearPairs:
    """Compute some pairs of packed rows exactly, from the raw rows."""
    rows_i, rows_j = _exact_rows(points, i, eps), _exact_rows(points, j, eps)
    side = torch.where((rows_i.v * rows_j.v).sum(1, keepdim=True) < 0, -1.0, 1.0)
    apart = rows_i.v - side * rows_j.v
    squared = apart.square().sum(1, keepdim=True)
    suspects = (squared < MAYBE_MULTIPLES).squeeze(1).nonzero().squeeze(1)
    if len(suspects):
        multiples = suspects[are_multiples(rows_i.v[suspects], rows_j.v[suspects])]
        # |v_i| - |v_j|, where |v| is almost 1
        longer = (rows_j.deficit[multiples] - rows_i.deficit[multiples]) / 2.0
        apart[multiples] = longer * rows_i.v[multiples]
        squared[multiples] = longer.square()
    short = squared + rows_i.deficit + rows_j.deficit
    d2 = torch.where(side > 0, short, 4.0 - short)
    far = torch.where(side > 0, 4.0 - short, short)
    return NearPairs(set, i, j, side, apart, d2, far)


def exact_dots(
    points: Tensor, tangents: Tensor, index: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute v. and deficit., the derivatives of some rows along their tangents, in float64."""
    v, inv_nu, deficit = _exact_rows(points, index, eps)
    t = tangents[index].double()
    tau = (v * t).sum(1, keepdim=True)
    return (t - v * tau) * inv_nu, -2.0 * deficit * tau * inv_nu


def push_apart(
    force: Tensor, pairs: NearPairs, push: Tensor, push_of_j: Tensor | None = None
) -> None:
    """Add the part of the force that does not lie along the rows: `push` is F' apart.

    `push_of_j`: what pushes row j where the pair has another weight there.
    """
    push_of_j = push if push_of_j is None else push_of_j
    force.index_put_((pairs.i,), (-pairs.side * push).to(force.dtype), accumulate=True)
    force.index_put_((pairs.j,), push_of_j.to(force.dtype), accumulate=True)


def add_to_both(
    x: Tensor, pairs: NearPairs, value: Tensor, value_of_j: Tensor | None = None
) -> None:
    """Add a pair's value to both its rows; index_put_ adds in a fixed order on every device."""
    both = torch.cat([value, value if value_of_j is None else value_of_j])
    x.index_put_((torch.cat([pairs.i, pairs.j]),), both.to(x.dtype), accumulate=True)


def _exact_rows(points: Tensor, index: Tensor, eps: float) -> Rows:
    return normalize(points[index], eps, torch.float64)


def are_multiples(u: Tensor, v: Tensor) -> Tensor:
    """Tell whether unit rows [..., k] are equal up to the sign and to the rounding of either."""
    pivot = u.abs().argmax(-1, keepdim=True)
    left, right = u * v.gather(-1, pivot), v * u.gather(-1, pivot)
    return ((left - right).abs() <= MULTIPLES * left.abs()).all(-1)
