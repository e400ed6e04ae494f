"""Pair functions of the hyperspherical energy, with first and second derivatives in the cosine.

    chord    t = r = sqrt(2 - 2c)            angle    t = theta = arccos c
    s > 0    f(t) = t^-s                     s = 0    f(t) = log(1/t)
    fold     F(c) = f(c) + f(-c)             half space: each row also stands for its antipode

Below `min_distance` f goes on along its tangent line, so a near-duplicate is pushed away with a
finite force. An exact duplicate has no direction to be pushed in: its derivatives are zero.

A pair is given as `near` = r^2 = 2 - 2c and `far` = 4 - r^2 = 2 + 2c. Both are arguments because
each loses its digits when it is computed from the other: close pairs are known by an exact `near`,
almost antipodal ones by an exact `far`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def pair_count(n: int, half_space: bool) -> int:
    """Unordered pairs among `n` rows, or among the 2n points of their half-space doubling."""
    return n * (2 * n - 1) if half_space else n * (n - 1) // 2


@dataclass(frozen=True)
class Potential:
    """One pair function; the four fields are all that a kernel needs to know of it.

    Args:
        s: exponent of Riesz' energy, any finite s >= 0; 0 is the logarithm.
        half_space: fold each pair with its mirror image, f(c) + f(-c).
        angular: measure by the angle in radians, not by the chord.
        min_distance: where the tangent line takes over, in the unit of the distance used.
    """

    s: float = 2.0
    half_space: bool = False
    angular: bool = False
    min_distance: float = 1e-3

    def scale(self, n: int, reduction: str) -> float:
        """The factor from the sum over unordered pairs of a set of `n` rows to its energy."""
        if reduction == "sum":
            return 2.0  # the papers sum over ordered pairs
        return 1.0 / max(pair_count(n, self.half_space), 1)

    def of_distance(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f, f' and f'' at the distance `t` > 0 (chord or angle), any shape, elementwise."""
        # the tangent line starts from f at the bound itself; clamp_min lets NaN through
        bound = t.clamp_min(self.min_distance) if self.min_distance > 0 else t
        if self.s == 0:
            value, first = -bound.log(), -1.0 / bound
            second = first.square()
        else:
            value = bound.pow(-self.s)
            first = -self.s * value / bound
            second = -(self.s + 1) * first / bound
        if self.min_distance > 0:
            below = t < self.min_distance
            # not everywhere: where f' is infinite, 0 times it is NaN
            value = torch.where(below, value + first * (t - bound), value)
            second = second.masked_fill(below, 0.0)
        return value, first, second

    def one_sided(self, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f(c) and its first and second derivative in c; zero derivatives at a coincident pair."""
        if self.angular:
            t = 2.0 * torch.atan2(near.sqrt(), far.sqrt())
            sine = (near * far).sqrt() / 2.0
            # dt/dc = -1/sin, d2t/dc2 = -cos/sin^3; at c = +-1 the angle has a kink: no direction
            directionless = sine == 0
            sine = sine.masked_fill(directionless, 1.0)
            turn = (far - near) / 4.0 / sine
        else:
            t = near.sqrt()
            # dr/dc = -1/r, d2r/dc2 = -1/r^3
            directionless = t == 0
            sine = t.masked_fill(directionless, 1.0)
            turn = 1.0 / sine
        value, first, second = self.of_distance(t)
        slope = (-first / sine).masked_fill(directionless, 0.0)
        curve = ((second - first * turn) / sine.square()).masked_fill(directionless, 0.0)
        return value, slope, curve

    def of_cosine(self, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """F(c), F'(c) and F''(c), folded where `half_space` says so."""
        value, slope, curve = self.one_sided(near, far)
        if self.half_space:
            mirrored_value, mirrored_slope, mirrored_curve = self.one_sided(far, near)
            value = value + mirrored_value
            slope = slope - mirrored_slope
            curve = curve + mirrored_curve
        return value, slope, curve

    def clean_above(self, near: float) -> bool:
        """Whether no pair with both `near` and `far` above the bound reaches the tangent line."""
        if self.angular:
            return self.min_distance <= 2.0 * math.asin(math.sqrt(near) / 2.0)
        return self.min_distance <= math.sqrt(near)

    def has_closed_tile(self) -> bool:
        """Whether `closed_tile` knows this function: chord, and one short formula for s."""
        return not self.angular and (not self.half_space or self.s in (0.0, 1.0, 2.0))

    def closed_tile(self, near: Tensor) -> tuple[Tensor, Tensor, float]:
        """F and F'/factor of a tile of r^2, with the factor, in as few passes as torch allows.

        Valid where the tangent line is out of reach (`clean_above`). Uses up `near`.
        """
        if self.half_space:
            if self.s == 1:
                left, right = near.rsqrt(), (4.0 - near).rsqrt_()
                value = left + right
                return value, left.pow_(3).sub_(right.pow_(3)), 1.0
            product = (4.0 - near).mul_(near)  # r^2 (4 - r^2) = 4 (1 - c^2)
            twice_cosine = near.neg_().add_(2.0)
            if self.s == 0:
                value = product.log().mul_(-0.5)
                return value, twice_cosine.div_(product), 2.0
            value = product.reciprocal_().mul_(4.0)
            return value, twice_cosine.mul_(value).mul_(value), 1.0
        if self.s == 2:
            value = near.reciprocal_()
            return value, value.square(), 2.0
        if self.s == 1:
            value = near.rsqrt_()
            return value, value.pow(3), 1.0
        if self.s == 0:
            return near.log().mul_(-0.5), near.reciprocal_(), 1.0
        value = near.pow(-self.s / 2.0)
        return value, value / near, self.s
