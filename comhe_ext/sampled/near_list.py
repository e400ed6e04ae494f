"""Pairs of rows that are near, found by random trees in O(N k) memory.

A tree splits the rows at the median of their products with the difference of two random rows, and
so on, until a leaf holds few. Near rows mostly end in one leaf; what one tree misses another finds.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from comhe_ext.operators.rows import unit_rows

# rows of a leaf, at most
LEAF = 256
# cosine above which a pair is listed
NEAR_COSINE = 0.9
# elements of the cosines of leaves that exist at a time
CHUNK = 1 << 24


class NearList(NamedTuple):
    """Pairs i < j of rows, each once, and how many trees have found it."""

    i: Tensor  # [P] int64
    j: Tensor
    trees: Tensor  # [P] int64


def find_near(
    rows: Tensor,
    trees: int,
    half_space: bool,
    generator: Generator | None = None,
    advance: Callable[[], object] = lambda: None,
) -> NearList:
    """List pairs of rows [N, k] whose cosine, in half space its size, is above `NEAR_COSINE`.

    Args:
        rows: of any length.
        trees: how many; each misses other pairs.
        half_space: whether near antipodes count, too.
        generator: source of the random splits, on the device of `rows`.
        advance: called after each tree.
    """
    v, n = unit_rows(rows.detach()), rows.shape[0]
    found = [rows.new_empty(0, dtype=torch.int64)]
    for _ in range(trees if n > 1 else 0):
        points = v
        if half_space:
            # of a row and its antipode the same one, unless it is nearly orthogonal to the pole
            pole = torch.randn(v.shape[1], 1, generator=generator, device=v.device, dtype=v.dtype)
            points = torch.where(v @ pole < 0, -v, v)
        leaves = _leaves(points, generator)
        found.append(_pairs_in(v, leaves, half_space))
        advance()
    pairs, counts = torch.cat(found).unique(return_counts=True)
    return NearList(pairs // max(n, 1), pairs % max(n, 1), counts)


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
            rows = v[nodes[part].clamp_min(0)]
            scores[part] = torch.bmm(rows, directions[part, :, None]).squeeze(2)
        # what fills up goes to the end
        scores.masked_fill_(nodes < 0, torch.inf)
        nodes = nodes.gather(1, scores.argsort(dim=1)).view(2 * count, width // 2)
    return nodes


def _pairs_in(v: Tensor, leaves: Tensor, half_space: bool) -> Tensor:
    """List the near pairs i < j within each leaf, as numbers i N + j."""
    n, found = v.shape[0], []
    width = leaves.shape[1]
    upper = torch.ones(width, width, dtype=torch.bool, device=v.device).triu(1)
    for part in leaves.split(max(CHUNK // (width * max(width, v.shape[1])), 1)):
        rows = v[part.clamp_min(0)]
        cosines = torch.bmm(rows, rows.mT)
        near = (cosines.abs() if half_space else cosines) > NEAR_COSINE
        alive = part >= 0
        near &= upper & alive[:, :, None] & alive[:, None, :]
        leaf, a, b = near.nonzero().unbind(1)
        first, second = part[leaf, a], part[leaf, b]
        found.append(torch.minimum(first, second) * n + torch.maximum(first, second))
    return torch.cat(found)
