"""Polynomials of the cosine: fitted to a pair function, and summed over all pairs by moments.

    sum_ij c_ij = |sum_i v_i|^2        sum_ij c_ij^2 = |V^T V|^2
    sum_ij c_ij^3 = |Q^T V|^2          sum_ij c_ij^4 = |Q^T Q|^2

where a row of Q has the products v_a v_b of a row of V, so that <Q_i, Q_j> = c_ij^2. No pair is
visited: O(N k^d) for degree d. There is no constant term, for the number of pairs is known.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from comhe_ext.kernels.pair_functions import PairFunction

MAX_DEGREE = 4
# of the polynomial where nothing is known of the rows
DEGREE = 2
# pairs beyond it do not count in a fit: the few near ones would bend the polynomial, and they are
# listed. c = 0.92 is the chord 0.4
LARGEST_COSINE = 0.92
# rows of V that are multiplied at a time
CHUNK = 8192


def powers_of(degree: int, half_space: bool) -> list[int]:
    """List the powers of a polynomial; in half space F is even, and odd ones would be 0."""
    return [m for m in range(1, degree + 1) if not (half_space and m % 2)]


def fit(pair: PairFunction, cosines: Tensor, weights: Tensor, degree: int) -> tuple[float, ...]:
    """Fit a polynomial to F by its slope, weighted by the square 1 - c^2 of a pair's lever.

    The slope makes the gradient, whose variance is what the polynomial is for: fitted to the values
    it gives a better energy and a worse gradient.

    Args:
        pair: the pair function.
        cosines: [P], float64, of typical pairs.
        weights: [P], how much each counts.
        degree: from 0, for no polynomial, to `MAX_DEGREE`.

    Returns:
        Coefficients of c, c^2, ..., c^degree.
    """
    powers = powers_of(degree, pair.half_space)
    coefficients = [0.0] * degree
    if not powers:
        return tuple(coefficients)
    c = cosines.double()
    lowest = -LARGEST_COSINE if pair.two_ended else -1.0
    _, slope, _ = pair.of_cosine(2.0 - 2.0 * c, 2.0 + 2.0 * c)
    counts = (c <= LARGEST_COSINE) & (c >= lowest) & slope.isfinite()
    root = (weights.double() * (1.0 - c.square()).clamp_min(0.0) * counts).sqrt()
    columns = torch.stack([m * c.pow(m - 1) for m in powers], 1) * root[:, None]
    target = torch.where(counts, slope, 0.0) * root
    solution = torch.linalg.lstsq(columns.cpu(), target[:, None].cpu(), driver="gelsd").solution
    for power, value in zip(powers, solution.squeeze(1).tolist(), strict=True):
        coefficients[power - 1] = value if math.isfinite(value) else 0.0
    return tuple(coefficients)


def fit_uniform(pair: PairFunction, dim: int, degree: int) -> tuple[float, ...]:
    """Fit to the cosines of independent random directions in `dim` dimensions."""
    theta = torch.linspace(0.0, math.pi, 4001, dtype=torch.float64, device="cpu")[1:-1]
    # the density of the angle is sin^(dim - 2)
    return fit(pair, theta.cos(), theta.sin().pow(max(dim - 2, 0)), degree)


def default_coefficients(pair: PairFunction, dim: int) -> tuple[float, ...]:
    """Fit to random directions: whatever the rows, the estimate is unbiased."""
    if torch.compiler.is_compiling():
        return fit_uniform(pair, dim, DEGREE)
    return _default_coefficients(pair, dim)


_default_coefficients = lru_cache(maxsize=256)(lambda pair, dim: fit_uniform(pair, dim, DEGREE))


def at_cosine(coefficients: Sequence[float], c: Tensor) -> Tensor:
    """Evaluate a polynomial, elementwise."""
    value = torch.zeros_like(c)
    for coefficient in reversed(coefficients):
        value = (value + coefficient) * c
    return value


def pair_sums(coefficients: Sequence[float], v: Tensor) -> Tensor:
    """Sum a polynomial of the cosines over unordered pairs of sets v [S, n, k] -> [S], float64."""
    length = v.square().sum(-1).double()
    total = length.new_zeros(v.shape[0])
    for power, coefficient in enumerate(coefficients, 1):
        if coefficient != 0.0:
            # a row meets itself at |v|^2
            own = length.pow(power).sum(-1)
            total = total + coefficient / 2.0 * (_sum_of_powers(v, power) - own)
    return total


def _sum_of_powers(v: Tensor, power: int) -> Tensor:
    """Sum c_ij^power over all ordered pairs, each row with itself included."""
    if power == 1:
        return v.sum(1, dtype=torch.float64).square().sum(-1)
    moment: Tensor | None = None
    for part in v.split(CHUNK, 1):
        if power == 2:
            product = part.mT @ part
        elif part.requires_grad and not torch.compiler.is_compiling():
            # the products of all rows would be kept for the backward
            product = checkpoint(_moment, part, power, use_reentrant=False)
        else:
            product = _moment(part, power)
        moment = product.double() if moment is None else moment + product.double()
    assert moment is not None
    return moment.square().sum((-2, -1))


def _moment(part: Tensor, power: int) -> Tensor:
    """Q^T V or Q^T Q of some rows."""
    i, j = torch.triu_indices(part.shape[-1], part.shape[-1], device=part.device)
    # off the diagonal each product stands for two
    q = part[..., i] * part[..., j] * torch.where(i == j, 1.0, math.sqrt(2.0)).to(part.dtype)
    return q.mT @ (part if power == 3 else q)
