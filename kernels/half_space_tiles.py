"""Tiles of half space, F(c) = f(c) + f(-c), whose F' is computed without subtracting.

F'(c) is the difference of the slopes at the two ends c and -c. Rows in many dimensions are nearly
orthogonal: there it almost cancels, and what is left of it in float32 is rounding. Each function
here takes the cosines c of a tile, which it overwrites, and returns F, F'/factor and the factor.
"""

import math

import torch
from torch import Tensor

# F, F'/factor and the factor
ClosedTile = tuple[Tensor, Tensor, float]


def riesz_of_chord(c: Tensor, s: float, shift: float) -> ClosedTile:
    """Fold Riesz' function of the chord: shift + r^2 = unit (1 - z), and far unit (1 + z)."""
    unit = 2.0 + shift
    z = c.mul_(2.0 / unit) if shift else c
    product = _one_minus_square(z)
    if s == 2:
        value = product.reciprocal_()
        slope = z.mul_(value).mul_(value)
        return value.mul_(2.0 / unit) if shift else value, slope, 8.0 / unit**2
    if s == 0:
        value = product.mul(unit * unit).log_().mul_(-0.5)
        return value, z.div_(product), 2.0 / unit
    power, q = s / 2.0, s / 2.0 + 1.0
    value, slope = _powers(z, product, power, q)
    return value.mul_(_sign(s) * unit**-power), slope, abs(s) * unit**-q


def riesz_of_angle(c: Tensor, s: float) -> ClosedTile:
    """Fold Riesz' function of the angles pi/2 (1 - z) and pi/2 (1 + z)."""
    sine = _one_minus_square(c).sqrt_()
    z, unit = c.asin_().mul_(2.0 / math.pi), math.pi / 2.0
    product = _one_minus_square(z)
    if s == 0:
        value = product.mul(unit * unit).log_().mul_(-1.0)
        return value, z.div_(product).div_(sine), 2.0 / unit
    value, slope = _powers(z, product, s, s + 1.0)
    return value.mul_(_sign(s) * unit**-s), slope.div_(sine), abs(s) * unit ** -(s + 1.0)


def gaussian_of_chord(c: Tensor, tau: float) -> ClosedTile:
    """Fold exp(-tau r^2): with m = |c| it is exp(-2 tau (1 - m)) (1 + exp(-4 tau m))."""
    sign = c.sign()
    larger = c.abs_().sub(1.0).mul_(2.0 * tau).exp_()
    ratio = c.mul_(-4.0 * tau)
    value = ratio.exp().add_(1.0).mul_(larger)
    return value, ratio.expm1_().mul_(larger).mul_(sign), -2.0 * tau


def laplace_of_chord(c: Tensor, tau: float) -> ClosedTile:
    """Fold exp(-tau r): the chords of the ends are half - part and half + part, part = c / half."""
    near, far = (1.0 - c).mul_(2.0).sqrt_(), (1.0 + c).mul_(2.0).sqrt_()
    half = torch.add(near, far).mul_(0.5)
    part = c.div_(half)
    sign = part.sign()
    # the larger end exp(-tau min(near, far)), and exp(-2 tau |part|) of it at the other
    larger = torch.minimum(near, far).mul_(-tau).exp_()
    exponent = part.abs_().mul(-2.0 * tau)
    both = exponent.exp().add_(1.0)
    slope = exponent.expm1_().neg_().mul_(half).addcmul_(part, both)
    slope.mul_(larger).mul_(sign).div_(near.mul_(far))
    return both.mul_(larger), slope, tau


def laplace_of_angle(c: Tensor, tau: float) -> ClosedTile:
    """Fold exp(-tau t) of the angles pi/2 - z and pi/2 + z."""
    sine = _one_minus_square(c).sqrt_()
    z = c.asin_()
    sign, size = z.sign(), z.abs_()
    larger = size.sub(math.pi / 2.0).mul_(tau).exp_()
    exponent = size.mul_(-2.0 * tau)
    value = exponent.exp().add_(1.0).mul_(larger)
    return value, exponent.expm1_().neg_().mul_(larger).mul_(sign).div_(sine), tau


def _one_minus_square(z: Tensor) -> Tensor:
    """Compute 1 - z^2 in one pass."""
    return torch.addcmul(z.new_ones(()), z, z, value=-1.0)


def _sign(s: float) -> float:
    return -1.0 if s < 0 else 1.0


def _powers(z: Tensor, product: Tensor, p: float, q: float) -> tuple[Tensor, Tensor]:
    """Sum (1 -+ z)^-p, and subtract (1 + z)^-q from (1 - z)^-q; product = 1 - z^2.

    (1 - z)^-q - (1 + z)^-q = 2 (1 - z^2)^(-q/2) sinh(q artanh z), and with + the same of cosh.
    Overwrites both arguments.
    """
    a = z.atanh_()
    value = (a * p).cosh_().mul_(product.pow(-p / 2.0)).mul_(2.0)
    return value, a.mul_(q).sinh_().mul_(product.pow_(-q / 2.0)).mul_(2.0)
