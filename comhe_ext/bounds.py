"""Energies to compare that of a set with: that of random directions, and a lower bound.

Why there is a bound: the pair function F of the cosine c grows with c and, by chord, is convex. The
Riesz functions are sums of non-negative powers of c, and the tangent line in the distance that
takes over below `min_distance` is convex in c as well. In half space F(c) + F(-c) is convex in c^2.
So Jensen's inequality turns the least mean of c, -1/(n - 1) (the simplex), and of c^2,
(n - d)/(d (n - 1)) (Welch 1974), into lower bounds of the mean energy.

Rows need not be unit vectors: rho = |v|^2 is 0 for a dead row, and below 1 for all where eps > 0.
A pair still is a function of c = <v_i, v_j> alone, as if of unit vectors of more dimensions, so the
bound of full space holds as it is. In half space shorter rows are nearer to orthogonal, but nearer
to their antipodes too, at r^2 = 2 + 2 rho: the bound is the least over the sums of rho.

By angle F is not convex in c everywhere, as it falls ever faster towards c = -1;
`_lowest_of_full_space` says what is used instead.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from comhe_ext.kernels.pair_functions import Laplace, PairFunction, Riesz


def random_energy(n: int, d: int, pair: PairFunction) -> float:
    """Give the expected mean energy of `n` independent uniform directions in `d` dimensions.

    A layer of random initial weights has about this energy; with less, its rows are spread better
    than by chance. The directions are unit vectors (eps = 0, none dead).

    Args:
        n: number of rows.
        d: number of columns.
        pair: the pair function; its tangent line matters where near pairs do, for s near d - 1 or
            above.

    Returns:
        The mean over pairs; 0 without pairs; infinite where min_distance = 0 and s >= d - 1.

    Source: by chord r^2/4 has the Beta distribution of a = b = (d - 1)/2; by angle, and with a
    tangent line, the integral over sin^(d - 2) is done numerically.
    """
    mean = _mean_of_random_pairs(d, replace(pair, half_space=False)) if n > 1 else 0.0
    if not pair.half_space or n == 0:
        return mean
    return (n * (n - 1) * 2 * mean + n * _value(pair, -1.0)) / (n * (2 * n - 1))


def _mean_of_random_pairs(d: int, pair: PairFunction) -> float:
    """Compute the expected f of two random directions."""
    if d == 1:
        return (_value(pair, 1.0) + _value(pair, -1.0)) / 2
    if not isinstance(pair, Riesz) or pair.shift > 0:
        return _mean_over_angles(d, pair)
    s = pair.s
    if pair.min_distance == 0 and s >= d - 1:
        return math.inf
    if pair.min_distance > 0 or not pair.convex_in_cosine:
        return _mean_over_angles(d, pair)
    a = (d - 1) / 2
    if s == 0:
        psi = torch.digamma(torch.tensor([a, 2 * a], dtype=torch.float64, device="cpu"))
        return -(math.log(4) + float(psi[0] - psi[1])) / 2
    gammas = [a - s / 2, 2 * a, a, 2 * a - s / 2]
    signs = [1, 1, -1, -1]
    log = sum(sign * math.lgamma(x) for sign, x in zip(signs, gammas, strict=True))
    mean: float = 2.0**-s * math.exp(log)
    return -mean if s < 0 else mean


def lowest_energy(
    n: int, d: int, pair: PairFunction, *, eps: float = 0.0, dead: int | None = None
) -> float:
    """Give a lower bound of the mean energy of `n` rows in `d` dimensions, whatever they are.

    The simplex reaches it where n <= d + 1 (by angle for s from about 1 on), in half space
    orthogonal rows where n <= d and, if no row is dead, equiangular tight frames.

    Args:
        n: number of rows.
        d: number of columns.
        pair: the pair function.
        eps: see `comhe_ext.hyperspherical_energy`.
        dead: how many of the rows are zero; None allows any number. In half space dead rows, which
            are orthogonal to all others, lower the bound where n > d. Ignored where eps > 0, as the
            bound then allows rows of any length.

    Returns:
        The bound; 0 without pairs.
    """
    single, folded = replace(pair, half_space=False), pair
    if not pair.half_space:
        return _lowest_of_full_space(n, single) if n > 1 else 0.0
    if n == 0:
        return 0.0
    orthogonal = folded.of_cosine(_number(2.0), _number(2.0))[0]
    welch = max(n - d, 0) / (d * (n - 1)) if n > 1 else 0.0
    convex = _has_supporting_line(welch, folded)
    if not (pair.convex_in_cosine or _convex_in_angle(pair)):
        # the sum of both ends is least where c = 0 or where c = 1
        ends = folded.of_cosine(_number(0.0), _number(4.0))[0]
        orthogonal, convex = torch.minimum(orthogonal, ends), False

    def of_squares(squares: Tensor) -> Tensor:
        """Bound the mean of f(c) + f(-c) where the mean of c^2 is at least `squares`."""
        if not convex:
            return orthogonal.expand_as(squares)
        c = squares.clamp(min=0).sqrt()
        return folded.of_cosine(2 - 2 * c, 2 + 2 * c)[0]

    def of_lengths(total: Tensor) -> Tensor:
        """Bound the sum where all rho add up to `total`: sum c^2 >= total^2/d - sum rho^2."""
        mean = (total / n).clamp(max=1)
        # the angle between a row and its antipode, or a line above it where f is not convex in c
        angle = (-mean).acos() if pair.convex_in_cosine else math.pi / 2 * (1 + mean)
        if not (pair.convex_in_cosine or _convex_in_angle(pair)):
            angle = torch.full_like(mean, math.pi)
        antipodes = n * single.at_distance(single.distance_of_angle(angle))[0]
        if n == 1:
            return antipodes
        squares = (total.square() / d - total) / (n * (n - 1))
        return n * (n - 1) * of_squares(squares) + antipodes

    def of_live_rows(live: Tensor) -> Tensor:
        """Bound the sum where `live` rows are unit vectors and the others are dead."""
        pairs = live * (live - 1)
        squares = (live - d) / (d * (live - 1).clamp(min=1))
        # a single live row has no pair, and in one dimension its bound would be infinite
        apart = torch.where(pairs > 0, pairs * of_squares(squares), 0.0)
        antipodes = live * _value(single, -1.0) + (n - live) * _value(single, 0.0)
        return apart + (n * (n - 1) - pairs) * orthogonal + antipodes

    if eps > 0:
        total = _least_on_interval(of_lengths, 0.0, float(n))
    elif dead is not None:
        total = float(of_live_rows(_number(n - dead)))
    else:
        # d live rows can be orthogonal, as dead ones are, and have a lower energy: try d or more
        live = torch.arange(min(n, d), n + 1, dtype=torch.float64)
        total = float(of_live_rows(live).min())
    return total / (n * (2 * n - 1))


def _number(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64, device="cpu")


def _value(pair: PairFunction, c: float) -> float:
    """Compute f at the cosine c."""
    return float(pair.one_sided(_number(2 - 2 * c), _number(2 + 2 * c))[0])


def _convex_in_angle(pair: PairFunction) -> bool:
    """Tell whether f is a convex function of the angle, the tangent line included."""
    if isinstance(pair, Riesz):
        return pair.s >= -1 and not pair.shift
    return isinstance(pair, Laplace)


def _lowest_of_full_space(n: int, pair: PairFunction) -> float:
    """Bound the mean of f over the pairs of `n` rows from below."""
    c = -1.0 / (n - 1)
    value, slope, curve = (float(x) for x in pair.one_sided(_number(2 - 2 * c), _number(2 + 2 * c)))
    if pair.convex_in_cosine:
        return value
    # the tangent of F at c lies below all of F if F is convex at c, and with it beyond c, if the
    # tangent line of the pair function only takes over at positive cosines, and if F(-1) is above
    supported = (
        pair.tangent_below <= math.pi / 2
        and curve >= 0
        and _value(pair, -1.0) >= value - slope * (1 + c)
    )
    if not _convex_in_angle(pair):
        return max(value, _value(pair, -1.0)) if supported else _value(pair, -1.0)
    # f is convex in the angle, so the largest possible mean angle gives a bound. A random plane
    # through the origin separates two rows with probability angle/pi, and at most `most` pairs
    most = (n // 2) * (n - n // 2)
    mean_angle = math.pi * most / (n * (n - 1) / 2)
    by_angle = float(pair.at_distance(_number(mean_angle))[0])
    return max(value, by_angle) if supported else by_angle


def _has_supporting_line(squares: float, folded: PairFunction) -> bool:
    """Tell whether f(c) + f(-c), as a function of c^2, lies above its tangent at `squares`.

    Its power series in c^2 has no negative coefficients, so it is convex up to the cosine b where
    the tangent line of the pair function takes over. Beyond, it is convex in c, so its derivative
    in c is at least that at b, and its slope in c^2 at least half of that.
    """
    bound = folded.tangent_below
    if bound == 0 or squares == 0:
        return True
    near = 4 * math.sin(folded.angle_of_distance(bound) / 2) ** 2
    b, c = 1 - near / 2, math.sqrt(squares)
    if not c < b:
        return False
    at_bound = folded.of_cosine(_number(near), _number(4 - near))[1]
    at_squares = folded.of_cosine(_number(2 - 2 * c), _number(2 + 2 * c))[1]
    return bool(at_bound >= at_squares / c)


def _least_on_interval(function: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    """Find the minimum of a convex function on an interval, by ever finer grids."""
    for _ in range(5):
        grid = torch.linspace(low, high, 1001, dtype=torch.float64, device="cpu")
        values = function(grid)
        at = int(values.argmin())
        low, high = float(grid[max(at - 1, 0)]), float(grid[min(at + 1, 1000)])
    return float(values.min())


def _mean_over_angles(d: int, pair: PairFunction) -> float:
    """Average f over random directions by the tanh-sinh rule, which allows a singularity at 0.

    Once below and once above the angle where the tangent line takes over, for f has a kink there.
    """
    bound = pair.tangent_below
    kink = pair.angle_of_distance(bound)
    u = torch.linspace(-6.0, 6.0, 2001, dtype=torch.float64, device="cpu")
    # the distances of the nodes from the lower end; flipped, from the upper one
    x = 1 / (1 + torch.exp(-math.pi * torch.sinh(u)))
    log_weight = x.log() + x.flip(0).log() + torch.cosh(u).log()
    total = mean = 0.0
    for begin, end in ((0.0, kink), (kink, math.pi)):
        if begin == end:
            continue
        theta, rest = begin + (end - begin) * x, math.pi - end + (end - begin) * x.flip(0)
        # in logarithms, because at the ends the density may underflow where f overflows
        log_density = math.log(end - begin) + log_weight
        log_density += (d - 2) * torch.minimum(theta, rest).sin().log()
        t = pair.distance_of_angle(theta)
        if isinstance(pair, Riesz) and not pair.shift:
            reach = t.clamp(min=bound)
            beyond = 1 - t / reach  # how far along the tangent line
            if pair.s == 0:
                part = (beyond - reach.log()) * log_density.exp()
            else:
                part = (log_density - pair.s * reach.log()).exp() * (1 + pair.s * beyond)
                part = -part if pair.s < 0 else part
        else:  # bounded
            part = pair.of_distance(t)[0] * log_density.exp()
        total += float(log_density.exp().sum())
        mean += float(part.sum())
    return mean / total
