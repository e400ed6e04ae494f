"""How far a projection turns the rows of a set against each other, by tiles in plain torch.

    S   = sum_{i != j} phi(a_ij, b_ij)       a = <v_i, v_j>, b = <u_i, u_j> of the projected rows
    phi = (b - a)^2  or  (arccos b - arccos a)^2
    dS/dp_i = (G_i - v_i <v_i, G_i>) / nu_i,  G_i = 2 sum_j dphi/da v_j      likewise for u and b

Both Gram matrices exist a tile at a time only: O(N (d + k)) memory. Angles of pairs that almost
coincide or almost oppose each other, in either space, come from the differences of the rows, in
float64.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .portable import (
    CLOSE,
    ClosePairs,
    block_of,
    close_indices,
    close_pairs,
    cols_of,
    exact_dots,
    normalize,
    push_apart,
    rows_of,
)
from .work_table import Tile, symmetric_tiles


class Phi(NamedTuple):
    """phi and its derivatives in the two cosines."""

    value: Tensor
    a: Tensor
    b: Tensor
    aa: Tensor
    ab: Tensor
    bb: Tensor


class _Space:
    """The rows of all sets in one space, and what a sweep sums up for them."""

    def __init__(self, points: Tensor, tangents: Tensor | None, dtype: torch.dtype) -> None:
        self.points = points.flatten(0, 1)
        self.v, self.inv_nu, _ = normalize(self.points, 0.0, dtype)
        self.tangents = self.v_dot = None
        if tangents is not None:
            self.tangents = tangents.flatten(0, 1).to(dtype)
            self.tau = (self.v * self.tangents).sum(1, keepdim=True)
            self.v_dot = ((self.tangents - self.v * self.tau) * self.inv_nu).to(dtype)
        self.pull = torch.zeros_like(self.v)
        self.pull_dot = torch.zeros_like(self.v)

    def near(self, tile: Tile) -> Tensor:
        """r^2 = 2 - 2c of a tile, 2 (harmless) on the diagonal."""
        near = torch.bmm(rows_of(self.v, tile), cols_of(self.v, tile).mT).mul_(-2.0).add_(2.0)
        if tile.diagonal:
            near.diagonal(dim1=1, dim2=2).fill_(2.0)
        return near

    def cosine_dot(self, tile: Tile) -> Tensor | float:
        """Derivative of the cosines of a tile along the tangents."""
        if self.v_dot is None:
            return 0.0
        dot = torch.bmm(rows_of(self.v_dot, tile), cols_of(self.v, tile).mT)
        return dot.baddbmm_(rows_of(self.v, tile), cols_of(self.v_dot, tile).mT)

    def exact_dots(self, pairs: ClosePairs) -> tuple[Tensor | float, Tensor | float]:
        """Derivatives of `apart` and of the cosine of close pairs along the tangents."""
        if self.tangents is None:
            return 0.0, 0.0
        dot_i, dot_j = (exact_dots(self.points, self.tangents, x, 0.0)[0] for x in pairs[1:3])
        apart_dot = dot_i - pairs.side * dot_j
        return apart_dot, -pairs.side * (pairs.apart * apart_dot).sum(1, keepdim=True)

    def gradient(self) -> Tensor:
        """G without its part along v, over nu."""
        along = (self.v * self.pull).sum(1, keepdim=True)
        return ((self.pull - self.v * along) * (2.0 * self.inv_nu)).to(self.v.dtype)

    def gradient_dot(self) -> Tensor:
        """Derivative of `gradient` along the tangents."""
        along = (self.v * self.pull).sum(1, keepdim=True)
        along_dot = (self.v * self.pull_dot).sum(1, keepdim=True)
        product = self.pull_dot
        if self.v_dot is not None:
            along_dot += (self.v_dot * self.pull).sum(1, keepdim=True)
            gradient = self.pull - self.v * along
            product = product - self.v_dot * along - gradient * self.tau * self.inv_nu
        return ((product - self.v * along_dot) * (2.0 * self.inv_nu)).to(self.v.dtype)


def _add(pull: Tensor, slope: Tensor, v: Tensor, tile: Tile) -> None:
    """G_i += sum_j slope_ij v_j for the rows of a tile, and off the diagonal for its columns."""
    rows_of(pull, tile).baddbmm_(slope, cols_of(v, tile))
    if not tile.diagonal:
        cols_of(pull, tile).baddbmm_(slope.mT, rows_of(v, tile))


def _angle(near: Tensor, far: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The angle and its derivatives in the cosine, 0 where no direction exists."""
    sine = (near * far).sqrt() / 2.0
    directionless = sine == 0
    inverse = sine.masked_fill(directionless, torch.inf).reciprocal_()
    second = (near - far) / 4.0 * inverse.pow(3)
    return 2.0 * torch.atan2(near.sqrt(), far.sqrt()), -inverse, second


def _phi(angle: bool, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Phi:
    """phi of pairs with r^2 and 4 - r^2 = `a` in the one space, `b` in the other."""
    if not angle:
        difference = (a[0] - b[0]) / 2.0  # of the cosines, b - a
        two = torch.full_like(difference, 2.0)
        slope = 2.0 * difference
        return Phi(difference.square(), -slope, slope, two, -two, two)
    angle_a, da, daa = _angle(*a)
    angle_b, db, dbb = _angle(*b)
    difference = angle_b - angle_a
    twice = 2.0 * difference
    return Phi(
        difference.square(),
        -twice * da,
        twice * db,
        2.0 * da.square() - twice * daa,
        -2.0 * da * db,
        2.0 * db.square() + twice * dbb,
    )


def _tile(tile: Tile, spaces: Sequence[_Space], angle: bool) -> tuple[Phi, Tensor | None]:
    """phi of a tile, and a mask of the pairs that have to be done exactly.

    phi and its first derivatives are 0 on the diagonal and in those pairs.
    """
    nears = [space.near(tile) for space in spaces]
    close = None
    if angle:
        bound = CLOSE[nears[0].dtype]
        close = torch.zeros_like(nears[0], dtype=torch.bool)
        for near in nears:
            close |= (near < bound) | (near > 4.0 - bound)
        for near in nears:
            near.masked_fill_(close, 2.0)
    a, b = ((near, 4.0 - near) for near in nears)
    return _phi(angle, a, b), close


def _close(
    close: Tensor | None, tile: Tile, spaces: Sequence[_Space]
) -> Iterator[tuple[Phi, list[ClosePairs]]]:
    """The marked pairs, a chunk at a time, in both spaces."""
    if close is None or not bool(close.any()):
        return
    if tile.diagonal:
        close = close.triu(1)
    for index in close_indices(close, tile, max(space.points.shape[1] for space in spaces)):
        pairs = [close_pairs(space.points, *index, 0.0) for space in spaces]
        yield _phi(True, *[(p.near, p.far) for p in pairs]), pairs


def sweep(
    rows: Tensor, projected: Tensor, angle: bool, rows_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Sum of phi over the ordered pairs of each set, and its gradient in both arguments.

    Args:
        rows: [M, N, d], M sets of raw rows.
        projected: [M, N, k], the same rows projected.
        angle: compare angles, not cosines.
        rows_gradient: without it the larger part of the work, the gradient in `rows`, is left out.

    Returns:
        [M], [M, N, d] (or None) and [M, N, k], float32, float64 where an argument is.
    """
    dtype = torch.promote_types(torch.float32, torch.promote_types(rows.dtype, projected.dtype))
    spaces = [_Space(points, None, dtype) for points in (rows, projected)]
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    for tile in symmetric_tiles([rows.shape[1]] * rows.shape[0], block_of(rows)):
        phi, close = _tile(tile, spaces, angle)
        total[tile.run.sets] += phi.value.sum((1, 2)).double() * (1.0 if tile.diagonal else 2.0)
        if rows_gradient:
            _add(spaces[0].pull, phi.a, spaces[0].v, tile)
        _add(spaces[1].pull, phi.b, spaces[1].v, tile)
        for exact, pairs in _close(close, tile, spaces):
            total.index_put_((pairs[0].set,), 2.0 * exact.value.squeeze(1), accumulate=True)
            for space, slope, pair in zip(spaces, (exact.a, exact.b), pairs, strict=True):
                push_apart(space.pull, pair, slope * pair.apart)
    to_rows = spaces[0].gradient().view(rows.shape) if rows_gradient else None
    return total.to(dtype), to_rows, spaces[1].gradient().view(projected.shape)


def hessian_vector_product(
    rows: Tensor,
    projected: Tensor,
    rows_tangents: Tensor | None,
    projected_tangents: Tensor | None,
    angle: bool,
) -> tuple[Tensor, Tensor]:
    """Derivatives of both of `sweep`'s gradients along the tangents (None: zero), in closed form.

    With a dot for them, G_i. = sum_j (phi_aa a. + phi_ab b.) v_j + phi_a v_j., and so for u.
    """
    dtype = torch.promote_types(torch.float32, torch.promote_types(rows.dtype, projected.dtype))
    spaces = [
        _Space(points, tangents, dtype)
        for points, tangents in ((rows, rows_tangents), (projected, projected_tangents))
    ]
    for tile in symmetric_tiles([rows.shape[1]] * rows.shape[0], block_of(rows)):
        phi, close = _tile(tile, spaces, angle)
        a_dot, b_dot = (space.cosine_dot(tile) for space in spaces)
        slope_dots = (phi.aa * a_dot + phi.ab * b_dot, phi.ab * a_dot + phi.bb * b_dot)
        for space, slope, slope_dot in zip(spaces, (phi.a, phi.b), slope_dots, strict=True):
            if tile.diagonal:
                slope_dot.diagonal(dim1=1, dim2=2).zero_()
            if close is not None:
                slope_dot.masked_fill_(close, 0.0)
            _add(space.pull, slope, space.v, tile)
            _add(space.pull_dot, slope_dot, space.v, tile)
            if space.v_dot is not None:
                _add(space.pull_dot, slope, space.v_dot, tile)
        for exact, pairs in _close(close, tile, spaces):
            aparts, dots = zip(
                *[s.exact_dots(p) for s, p in zip(spaces, pairs, strict=True)], strict=True
            )
            slopes = (exact.a, exact.b)
            slope_dots = (
                exact.aa * dots[0] + exact.ab * dots[1],
                exact.ab * dots[0] + exact.bb * dots[1],
            )
            for space, pair, slope, slope_dot, apart_dot in zip(
                spaces, pairs, slopes, slope_dots, aparts, strict=True
            ):
                push_apart(space.pull, pair, slope * pair.apart)
                push_apart(space.pull_dot, pair, slope_dot * pair.apart + slope * apart_dot)
    products = [space.gradient_dot() for space in spaces]
    return products[0].view(rows.shape), products[1].view(projected.shape)
