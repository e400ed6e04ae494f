"""What the energy of a set may be compared with: random directions, and the least there can be.

The pair functions r^-s, log(1/r) and those of the angle are sums of non-negative powers of the
cosine c, hence convex in c, and in half space f(c) + f(-c) is convex in c^2. So Jensen's inequality
turns the least mean of c, -1/(N - 1) (the simplex), and of c^2, (N - d)/(d (N - 1)) (Welch 1974),
into lower bounds of the mean energy.
"""

import math

import torch


def random_energy(
    n: int, d: int, s: float = 2.0, *, half_space: bool = False, angular: bool = False
) -> float:
    """Expected mean energy of `n` independent uniform directions in `d` dimensions.

    Infinite where s >= d - 1. By chord r^2/4 has the Beta distribution of a = b = (d - 1)/2; by
    angle the integral over sin^(d - 2) is done numerically.
    """
    if n < 2:
        pair = 0.0
    elif d < 2 or s >= d - 1:
        pair = math.inf
    elif angular:
        pair = _mean_over_angles(d, s)
    else:
        a = (d - 1) / 2
        if s == 0:
            psi = torch.digamma(torch.tensor([a, 2 * a], dtype=torch.float64))
            pair = -(math.log(4) + float(psi[0] - psi[1])) / 2
        else:
            gammas = [a - s / 2, 2 * a, a, 2 * a - s / 2]
            signs = [1, 1, -1, -1]
            log = sum(sign * math.lgamma(x) for sign, x in zip(signs, gammas, strict=True))
            pair = 2.0**-s * math.exp(log)
    return _with_antipodes(n, 2 * pair, s, angular) if half_space else pair


def lowest_energy(
    n: int, d: int, s: float = 2.0, *, half_space: bool = False, angular: bool = False
) -> float:
    """Lower bound of the mean energy of `n` directions in `d` dimensions.

    Reached by the simplex, where n <= d + 1; in half space by orthogonal rows, where n <= d, and
    by equiangular tight frames.
    """
    if n < 2:
        both = 0.0
    elif not half_space:
        return _pair(-1.0 / (n - 1), s, angular)
    else:
        c = math.sqrt(max(n - d, 0) / (d * (n - 1)))
        both = _pair(c, s, angular) + _pair(-c, s, angular)
    return _with_antipodes(n, both, s, angular) if half_space else both


def _pair(c: float, s: float, angular: bool) -> float:
    """f at the cosine c."""
    t = math.acos(c) if angular else math.sqrt(2 - 2 * c)
    if t == 0:
        return math.inf
    return -math.log(t) if s == 0 else t**-s


def _with_antipodes(n: int, both: float, s: float, angular: bool) -> float:
    """Mean over the pairs of 2n points, of which n are antipodal and the others mean both/2."""
    if n == 0:
        return 0.0
    return (n * (n - 1) * both + n * _pair(-1.0, s, angular)) / (n * (2 * n - 1))


def _mean_over_angles(d: int, s: float) -> float:
    """Mean of the pair function of the angle, by the tanh-sinh rule: 0 may be singular."""
    u = torch.linspace(-6.0, 6.0, 2001, dtype=torch.float64)
    # the distances of the nodes from both ends, each exact where it is small
    theta = math.pi / (1 + torch.exp(-math.pi * torch.sinh(u)))
    # in logarithms: at the ends the density may vanish faster than a float, and the energy explode
    sine = torch.minimum(theta, theta.flip(0)).sin()
    log_density = theta.log() + theta.flip(0).log() + torch.cosh(u).log() + (d - 2) * sine.log()
    total = log_density.exp().sum()
    if s == 0:
        return float((-theta.log() * log_density.exp()).sum() / total)
    return float((log_density - s * theta.log()).exp().sum() / total)
