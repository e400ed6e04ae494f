"""Pairs of rows that are near, found by random trees in O(N k) memory.

A tree splits the rows at the median of their products with the difference of two random rows, and
so on, until a leaf holds few. Near rows mostly end in one leaf; what one tree misses another finds.
A row and the antipode of another count as near, too: they are in half space.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from comhe_ext.operators.library import no_autocast
from comhe_ext.operators.rows import unit_rows

# rows of a leaf, at most
LEAF = 256
# size of the cosine above which a pair is listed
NEAR_COSINE = 0.9
# listed pairs, the nearest ones: so many for each row at most, on the average
PAIRS_OF_ROW = 8
# elements of the cosines of leaves that exist at a time
CHUNK = 1 << 22


class NearList(NamedTuple):
    """Pairs i < j of rows, each once, and how many trees have found it."""

    i: Tensor  # [P] int64
    j: Tensor
    trees: Tensor  # [P] int64


@torch.no_grad()
def find_near(
    rows: Tensor,
    trees: int,
    generator: Generator | None = None,
    advance: Callable[[], object] = lambda: None,
) -> NearList:
    """List pairs of rows [N, k] whose cosine is in size above `NEAR_COSINE`, the nearest 8 N.

    Args:
        rows: of any length.
        trees: how many; each misses other pairs.
        generator: source of the random splits, on the device of `rows`.
        advance: called after each tree.
    """
    n, most = rows.shape[0], PAIRS_OF_ROW * rows.shape[0]
    known = _Pairs.none(rows.device)
    with no_autocast(rows.device.type):
        v = unit_rows(rows)
        for _ in range(trees if n > 1 else 0):
            # of a row and its antipode the same one, unless it is nearly orthogonal to the pole
            pole = torch.randn(v.shape[1], 1, generator=generator, device=v.device, dtype=v.dtype)
            leaves = _leaves(torch.where(v @ pole < 0, -v, v), generator)
            found = [known]
            for some in _pairs_in(v, leaves):
                found.append(some)
                if sum(len(x.number) for x in found) > 2 * most:
                    found = [_merged(found, most)]
            known = _merged(found, most)
            advance()
    order = known.number.argsort()
    number, counts = known.number[order], known.trees[order]
    return NearList(number // max(n, 1), number % max(n, 1), counts)


class _Pairs(NamedTuple):
    """Pairs i < j as numbers i N + j, the trees that have found each, and sizes of cosines."""

    number: Tensor
    trees: Tensor
    size: Tensor

    @classmethod
    def none(cls, device: torch.device) -> "_Pairs":
        number = torch.empty(0, dtype=torch.int64, device=device)
        return cls(number, number, torch.empty(0, dtype=torch.float32, device=device))


def _merged(parts: Sequence[_Pairs], most: int) -> _Pairs:
    """Join pairs of which some are the same, and keep the nearest."""
    number, place = torch.cat([x.number for x in parts]).unique(return_inverse=True)
    trees = torch.zeros_like(number).index_add_(0, place, torch.cat([x.trees for x in parts]))
    size = torch.empty_like(number, dtype=torch.float32)
    # the same pair has the same cosine but for rounding
    size[place] = torch.cat([x.size for x in parts])
    if len(number) > most:
        nearest = size.topk(most).indices
        number, trees, size = number[nearest], trees[nearest], size[nearest]
    return _Pairs(number, trees, size)


def _leaves(v: Tensor, generator: Generator | None) -> Tensor:
    """Split rows [N, k] into leaves of numbers of rows, [L, at most LEAF]; -1 fills up."""
    n = v.shape[0]
    depth = max(math.ceil(math.log2(n / LEAF)), 0)
    size = math.ceil(n / 2**depth)
    nodes = torch.full((1, size << depth), -1, dtype=torch.int64, device=v.device)
    nodes[0, :n] = torch.arange(n, device=v.device)
    for _ in range(depth):
        count, width = nodes.shape
        # two rows of each node; what fills a node up stands last
        filled = (nodes >= 0).sum(1, keepdim=True).clamp_min(1)
        draws = torch.rand(count, 2, generator=generator, device=v.device)
        ends = nodes.gather(1, (draws * filled).long().clamp_max(width - 1)).clamp_min(0)
        directions = v[ends[:, 0]] - v[ends[:, 1]]
        scores = torch.empty(count, width, dtype=v.dtype, device=v.device)
        chunk = max(CHUNK // (width * v.shape[1]), 1)
        for begin in range(0, count, chunk):
            part = slice(begin, begin + chunk)
            rows = _rows_at(v, nodes[part])
            scores[part] = torch.bmm(rows, directions[part, :, None]).squeeze(2)
        # what fills up goes to the end
        scores.masked_fill_(nodes < 0, torch.inf)
        nodes = nodes.gather(1, scores.argsort(dim=1)).view(2 * count, width // 2)
    return nodes


def _rows_at(v: Tensor, numbers: Tensor) -> Tensor:
    """Select rows [N, k] by their numbers [L, n] -> [L, n, k], any row where the number is -1."""
    # whole rows at a time, which an index in brackets would take entry by entry
    return v.index_select(0, numbers.flatten().clamp_min(0)).unflatten(0, numbers.shape)


def _pairs_in(v: Tensor, leaves: Tensor) -> Iterator[_Pairs]:
    """Yield the near pairs within leaves."""
    n, width = v.shape[0], leaves.shape[1]
    upper = torch.ones(width, width, dtype=torch.bool, device=v.device).triu(1)
    for part in leaves.split(max(CHUNK // (width * max(width, v.shape[1])), 1)):
        rows = _rows_at(v, part)
        sizes = torch.bmm(rows, rows.mT).abs_()
        alive = part >= 0
        near = (sizes > NEAR_COSINE) & upper & alive[:, :, None] & alive[:, None, :]
        leaf, a, b = near.nonzero().unbind(1)
        first, second = part[leaf, a], part[leaf, b]
        number = torch.minimum(first, second) * n + torch.maximum(first, second)
        yield _Pairs(number, torch.ones_like(number), sizes[leaf, a, b].float())
