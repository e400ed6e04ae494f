"""The angle-preserving loss: how far a projection turns rows against each other.

    S   = sum_{i != j} phi(a_ij, b_ij)       a = <v_i, v_j>, b = <u_i, u_j> of the projected rows
    phi = (b - a)^2  or  (arccos b - arccos a)^2
    dS/dp_i = (G_i - v_i <v_i, G_i>) / nu_i,  G_i = 2 sum_j dphi/da v_j      likewise for u and b

Both Gram matrices exist only a tile at a time: O(N (d + k)) memory. Pairs that are near in either
space get their angles from the differences of the rows, in float64.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .near_pairs import NEAR, NearPairs, exact_dots, near_indices, near_pairs, push_apart
from .rows import normalize
from .tiles import Tile, block_of, cols_of, rows_of, symmetric_tiles


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
        self.force = torch.zeros_like(self.v)
        self.force_dot = torch.zeros_like(self.v)

    def d2(self, tile: Tile) -> Tensor:
        """Compute d2 = 2 - 2c of a tile; 2, which is harmless, on the diagonal."""
        d2 = torch.bmm(rows_of(self.v, tile), cols_of(self.v, tile).mT).mul_(-2.0).add_(2.0)
        if tile.diagonal:
            d2.diagonal(dim1=1, dim2=2).fill_(2.0)
        return d2

    def cosine_dot(self, tile: Tile) -> Tensor | float:
        """Differentiate the cosines of a tile along the tangents."""
        if self.v_dot is None:
            return 0.0
        dot = torch.bmm(rows_of(self.v_dot, tile), cols_of(self.v, tile).mT)
        return dot.baddbmm_(rows_of(self.v, tile), cols_of(self.v_dot, tile).mT)

    def exact_dots(self, pairs: NearPairs) -> tuple[Tensor | float, Tensor | float]:
        """Differentiate `apart` and the cosine of near pairs along the tangents."""
        if self.tangents is None:
            return 0.0, 0.0
        dot_i, dot_j = (exact_dots(self.points, self.tangents, x, 0.0)[0] for x in pairs[1:3])
        apart_dot = dot_i - pairs.side * dot_j
        return apart_dot, -pairs.side * (pairs.apart * apart_dot).sum(1, keepdim=True)

    def gradient(self) -> Tensor:
        """Compute the gradient: G without its part along v, over nu."""
        along = (self.v * self.force).sum(1, keepdim=True)
        return ((self.force - self.v * along) * (2.0 * self.inv_nu)).to(self.v.dtype)

    def gradient_dot(self) -> Tensor:
        """Differentiate `gradient` along the tangents; without any, the force does not matter."""
        along_dot = (self.v * self.force_dot).sum(1, keepdim=True)
        product = self.force_dot
        if self.v_dot is not None:
            along = (self.v * self.force).sum(1, keepdim=True)
            along_dot += (self.v_dot * self.force).sum(1, keepdim=True)
            gradient = self.force - self.v * along
            product = product - self.v_dot * along - gradient * self.tau * self.inv_nu
        return ((product - self.v * along_dot) * (2.0 * self.inv_nu)).to(self.v.dtype)


def _add_force(force: Tensor, slope: Tensor, v: Tensor, tile: Tile) -> None:
    """Add sum_j slope_ij v_j to G_i: the rows of a tile and, off the diagonal, its columns."""
    rows_of(force, tile).baddbmm_(slope, cols_of(v, tile))
    if not tile.diagonal:
        cols_of(force, tile).baddbmm_(slope.mT, rows_of(v, tile))


def _angle(d2: Tensor, far: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the angle and its derivatives in the cosine, 0 where no direction exists."""
    sine = (d2 * far).sqrt() / 2.0
    directionless = sine == 0
    inverse = sine.masked_fill(directionless, torch.inf).reciprocal_()
    second = (d2 - far) / 4.0 * inverse.pow(3)
    return 2.0 * torch.atan2(d2.sqrt(), far.sqrt()), -inverse, second


def _phi(angle: bool, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Phi:
    """Compute phi of pairs whose (d2, 4 - d2) is `a` in the one space and `b` in the other."""
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
    """Compute phi of a tile, and a mask of the pairs that are near in either space.

    phi and its first derivatives are 0 on the diagonal and in those pairs.
    """
    d2s = [space.d2(tile) for space in spaces]
    near = None
    if angle:
        bound = NEAR[d2s[0].dtype]
        near = torch.zeros_like(d2s[0], dtype=torch.bool)
        for d2 in d2s:
            near |= (d2 < bound) | (d2 > 4.0 - bound)
        for d2 in d2s:
            d2.masked_fill_(near, 2.0)
    a, b = ((d2, 4.0 - d2) for d2 in d2s)
    return _phi(angle, a, b), near


def _near(
    near: Tensor | None, tile: Tile, spaces: Sequence[_Space]
) -> Iterator[tuple[Phi, list[NearPairs]]]:
    """Yield the near pairs of a tile in both spaces, in chunks, and phi of them."""
    if near is None or not bool(near.any()):
        return
    if tile.diagonal:
        near = near.triu(1)
    for index in near_indices(near, tile, max(space.points.shape[1] for space in spaces)):
        pairs = [near_pairs(space.points, *index, 0.0) for space in spaces]
        yield _phi(True, *[(p.d2, p.far) for p in pairs]), pairs


def sweep(
    rows: Tensor,
    projected: Tensor,
    angle: bool,
    rows_gradient: bool,
    projected_gradient: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum phi over the ordered pairs of each set, and compute its gradient in both arguments.

    Args:
        rows: [M, N, d], M sets of raw rows.
        projected: [M, N, k], the same rows projected.
        angle: compare angles, not cosines.
        rows_gradient, projected_gradient: which of both are wanted. That in `rows` is the larger
            part of the work.

    Returns:
        [M], [M, N, d] and [M, N, k], float32, float64 where an argument is; None for a gradient
        that is not wanted.
    """
    dtype = torch.promote_types(torch.float32, torch.promote_types(rows.dtype, projected.dtype))
    spaces = [_Space(points, None, dtype) for points in (rows, projected)]
    wanted = (rows_gradient, projected_gradient)
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    for tile in symmetric_tiles([rows.shape[1]] * rows.shape[0], block_of(rows)):
        phi, near = _tile(tile, spaces, angle)
        total[tile.run.sets] += phi.value.sum((1, 2)).double() * (1.0 if tile.diagonal else 2.0)
        for space, slope, in_demand in zip(spaces, (phi.a, phi.b), wanted, strict=True):
            if in_demand:
                _add_force(space.force, slope, space.v, tile)
        for exact, pairs in _near(near, tile, spaces):
            total.index_put_((pairs[0].set,), 2.0 * exact.value.squeeze(1), accumulate=True)
            for space, slope, pair in zip(spaces, (exact.a, exact.b), pairs, strict=True):
                push_apart(space.force, pair, slope * pair.apart)
    to_rows = spaces[0].gradient().view(rows.shape) if rows_gradient else None
    to_projected = spaces[1].gradient().view(projected.shape) if projected_gradient else None
    return total.to(dtype), to_rows, to_projected


def hessian_vector_product(
    rows: Tensor,
    projected: Tensor,
    rows_tangents: Tensor | None,
    projected_tangents: Tensor | None,
    angle: bool,
) -> tuple[Tensor, Tensor]:
    """Differentiate both gradients of `sweep` along tangents (None: zero), in closed form.

    With a dot for the derivative along the tangents,

        G_i. = 2 sum_j (phi_aa a. + phi_ab b.) v_j + phi_a v_j.        likewise for u
    """
    dtype = torch.promote_types(torch.float32, torch.promote_types(rows.dtype, projected.dtype))
    spaces = [
        _Space(points, tangents, dtype)
        for points, tangents in ((rows, rows_tangents), (projected, projected_tangents))
    ]
    for tile in symmetric_tiles([rows.shape[1]] * rows.shape[0], block_of(rows)):
        phi, near = _tile(tile, spaces, angle)
        a_dot, b_dot = (space.cosine_dot(tile) for space in spaces)
        slope_dots = (phi.aa * a_dot + phi.ab * b_dot, phi.ab * a_dot + phi.bb * b_dot)
        for space, slope, slope_dot in zip(spaces, (phi.a, phi.b), slope_dots, strict=True):
            if tile.diagonal:
                slope_dot.diagonal(dim1=1, dim2=2).zero_()
            if near is not None:
                slope_dot.masked_fill_(near, 0.0)
            _add_force(space.force_dot, slope_dot, space.v, tile)
            if space.v_dot is not None:
                _add_force(space.force_dot, slope, space.v_dot, tile)
                _add_force(space.force, slope, space.v, tile)
        for exact, pairs in _near(near, tile, spaces):
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
                push_apart(space.force, pair, slope * pair.apart)
                push_apart(space.force_dot, pair, slope_dot * pair.apart + slope * apart_dot)
    products = [space.gradient_dot() for space in spaces]
    return products[0].view(rows.shape), products[1].view(projected.shape)
