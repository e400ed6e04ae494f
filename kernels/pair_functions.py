"""Pair functions: f of the distance of two points, and all that a sweep needs to know about it.

    t = r = sqrt(2 - 2c)       the chord, or
    t = theta = arccos c       the angle in radians, with `angular`
    F(c) = f(c)                or, in half space, f(c) + f(-c): each row stands for its antipode too

A pair is given as `near` = r^2 = 2 - 2c and `far` = 4 - r^2 = 2 + 2c. Both are arguments because
each loses its digits when it is computed from the other: near pairs are known by an exact `near`,
almost antipodal ones by an exact `far`.

To add a pair function, add a class here, with f, f' and f''. Every device computes it then, in
plain torch; a compiled backend that knows its `number` is faster.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

# F, F'/factor and the factor
ClosedTile = tuple[Tensor, Tensor, float]


class Tangent(NamedTuple):
    """The line that continues f below the distance `at`: value + slope (t - at)."""

    at: float
    value: float
    slope: float


@dataclass(frozen=True)
class PairFunction:
    """The base of all pair functions; frozen, and checked when it is made.

    Args:
        half_space: fold each pair with its mirror image, f(c) + f(-c).
        angular: measure by the angle in radians, not by the chord.
    """

    half_space: bool = field(default=False, kw_only=True)
    angular: bool = field(default=False, kw_only=True)

    # as operators and compiled kernels know it
    name: ClassVar[str]
    number: ClassVar[int]
    # distance below which f is continued by its tangent; 0 where f has no singularity
    min_distance = 0.0

    def __init_subclass__(cls) -> None:
        PAIR_FUNCTIONS[cls.name] = cls

    def __post_init__(self) -> None:
        for name in ("half_space", "angular"):
            if not isinstance(getattr(self, name), bool):
                kind = type(getattr(self, name)).__name__
                raise TypeError(f"`{name}` must be a bool, got {kind}")
        for x in fields(self)[2:]:
            value = getattr(self, x.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"`{x.name}` must be a number, got {type(value).__name__}")

    def of_distance(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute f, f' and f'' at distances `t` > 0, elementwise, without the tangent line."""
        raise NotImplementedError

    def of_square(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Compute f and its derivatives as functions of x = t^2 >= 0; None if not smooth at 0."""
        return None

    @property
    def growth(self) -> float:
        """The power of 1/t with which F'(c) grows towards t = 0; it magnifies errors of t."""
        return 0.0

    def closed_tile(self, x: Tensor) -> ClosedTile | None:
        """Compute F, F'/factor and the factor of a tile, in as few passes as torch allows.

        None where there is no short form. Not valid on the tangent line. Overwrites `x`.

        Args:
            x: r^2 = 2 - 2c; in half space the cosines c themselves. There F' is a difference that
                almost cancels for small c, which is why it has to be computed from c, without
                subtracting.
        """
        return None

    # --- what follows from f ----------------------------------------------------------------------

    @property
    def parameters(self) -> tuple[float, ...]:
        """The numbers that define it, as `pair_function` takes them."""
        return tuple(float(getattr(self, x.name)) for x in fields(self))

    @cached_property
    def tangent(self) -> Tangent | None:
        """The tangent line below `min_distance`, computed once on the host."""
        if self.min_distance <= 0:
            return None
        at = torch.tensor(self.min_distance, dtype=torch.float64, device="cpu")
        value, slope, _ = self.of_distance(at)
        return Tangent(self.min_distance, float(value), float(slope))

    @property
    def two_ended(self) -> bool:
        """Whether cosines near -1 need the same care as those near 1."""
        return self.half_space or self.angular

    @property
    def convex_in_cosine(self) -> bool:
        """Whether f is convex in c; by angle it is not, as it falls ever faster towards c = -1."""
        return not self.angular

    def distance_of_angle(self, theta: Tensor) -> Tensor:
        """Convert angles in radians to the distance that f is a function of."""
        return theta if self.angular else 2.0 * (theta / 2.0).sin()

    def angle_of_distance(self, t: float) -> float:
        """Convert a distance, as `min_distance`, to the angle in radians."""
        return t if self.angular else 2.0 * math.asin(t / 2.0)

    def at_distance(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute f, f' and f'' at any distance `t` >= 0, with the tangent line."""
        if self.min_distance <= 0:
            return self.of_distance(t)
        # the line starts from f at the bound itself; clamp_min keeps NaN
        value, first, second = self.of_distance(t.clamp_min(self.min_distance))
        below = t < self.min_distance
        # only below: above, f' may be infinite, and 0 times it NaN
        value = torch.where(below, value + first * (t - self.min_distance), value)
        return value, first, second.masked_fill(below, 0.0)

    def one_sided(self, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute f(c) and its first and second derivative in c, which are 0 at a kink of f."""
        smooth = None if self.angular else self.of_square(near)
        if smooth is not None:
            value, first, second = smooth
            return value, -2.0 * first, 4.0 * second
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
        value, first, second = self.at_distance(t)
        slope = (-first / sine).masked_fill(directionless, 0.0)
        curve = ((second - first * turn) / sine.square()).masked_fill(directionless, 0.0)
        return value, slope, curve

    def of_cosine(self, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute F(c), F'(c) and F''(c), folded in half space."""
        value, slope, curve = self.one_sided(near, far)
        if self.half_space:
            mirrored_value, mirrored_slope, mirrored_curve = self.one_sided(far, near)
            value = value + mirrored_value
            slope = slope - mirrored_slope
            curve = curve + mirrored_curve
        return value, slope, curve

    def clean_above(self, near: float) -> bool:
        """Tell whether all pairs with `near` and `far` above it are off the tangent line."""
        if self.angular:
            return self.min_distance <= 2.0 * math.asin(math.sqrt(near) / 2.0)
        return self.min_distance <= math.sqrt(near)

    def pair_count(self, n: int) -> int:
        """Count the unordered pairs among `n` rows, or in half space among their 2n points."""
        return n * (2 * n - 1) if self.half_space else n * (n - 1) // 2

    def scale(self, n: int, reduction: str) -> float:
        """Compute the factor from the sum over unordered pairs of `n` rows to their energy."""
        if reduction == "sum":
            return 2.0  # the papers sum over ordered pairs
        return 1.0 / max(self.pair_count(n), 1)


PAIR_FUNCTIONS: dict[str, type[PairFunction]] = {}


def pair_function(name: str, parameters: Sequence[float]) -> PairFunction:
    """Make the pair function of a name again from its `parameters`."""
    if name not in PAIR_FUNCTIONS:
        raise ValueError(f"`pair` must be one of {sorted(PAIR_FUNCTIONS)}, got {name!r}")
    kind = PAIR_FUNCTIONS[name]
    if len(parameters) != len(fields(kind)):
        raise ValueError(
            f"`parameters` of {name!r} must be {len(fields(kind))} numbers, got {len(parameters)}"
        )
    half_space, angular, *others = parameters
    names = [x.name for x in fields(kind)[2:]]
    values = dict(zip(names, others, strict=True))
    return kind(half_space=bool(half_space), angular=bool(angular), **values)


@dataclass(frozen=True)
class Riesz(PairFunction):
    """Riesz' function t^-s, and log(1/t) for s = 0.

    Args:
        s: the exponent, any finite s >= 0.
        min_distance: below it (in the unit of the distance) f continues along its tangent line, so
            that a near-duplicate is pushed away with a finite force; 0 is the pure definition.

    Source: Liu et al. (2018), MHE.
    """

    s: float = 2.0
    min_distance: float = 1e-3

    name: ClassVar[str] = "riesz"
    number: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.s < math.inf:
            raise ValueError(f"`s` must be finite and at least 0, got {self.s}")
        if not 0 <= self.min_distance < 2:
            raise ValueError(
                f"`min_distance` must be at least 0 and less than 2, got {self.min_distance}"
            )

    def of_distance(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.s == 0:
            return -t.log(), -1.0 / t, t.square().reciprocal()
        value = t.pow(-self.s)
        first = -self.s * value / t
        return value, first, -(self.s + 1) * first / t

    @property
    def growth(self) -> float:
        return self.s + 2.0

    def closed_tile(self, x: Tensor) -> ClosedTile | None:
        if self.half_space:
            return self._closed_ends(x)
        if self.angular:
            return None
        if self.s == 2:
            value = x.reciprocal_()
            return value, value.square(), 2.0
        if self.s == 1:
            value = x.rsqrt_()
            return value, value.pow(3), 1.0
        if self.s == 0:
            return x.log().mul_(-0.5), x.reciprocal_(), 1.0
        value = x.pow(-self.s / 2.0)
        return value, value / x, self.s

    def _closed_ends(self, c: Tensor) -> ClosedTile:
        """Compute `closed_tile` in half space, without subtracting.

        (1 - z)^-q - (1 + z)^-q = 2 (1 - z^2)^(-q/2) sinh(q artanh z), and with + the same of cosh.
        """
        factor = self.s or 1.0
        if self.angular:
            # t = pi/2 (1 - z), far t = pi/2 (1 + z)
            sine = torch.addcmul(c.new_ones(()), c, c, value=-1.0).sqrt_()
            z, unit, q = c.asin_().mul_(2.0 / math.pi), math.pi / 2.0, self.s + 1.0
        else:
            # r^2 = 2 (1 - c), far r^2 = 2 (1 + c)
            sine, z, unit, q = None, c, 2.0, self.s / 2.0 + 1.0
        product = torch.addcmul(z.new_ones(()), z, z, value=-1.0)
        if not self.angular and self.s == 2:
            value = product.reciprocal_()
            return value, z.mul_(value).mul_(value), 2.0
        if not self.angular and self.s == 0:
            value = product.mul(4.0).log_().mul_(-0.5)
            return value, z.div_(product), 1.0
        a = z.atanh_()
        if self.s == 0:
            value = product.mul(unit * unit).log_().mul_(-1.0)
        else:
            power = self.s if self.angular else self.s / 2.0
            value = (a * power).cosh_().mul_(product.pow(-power / 2.0)).mul_(2.0 * unit**-power)
        slope = a.mul_(q).sinh_().mul_(product.pow_(-q / 2.0))
        if sine is not None:
            slope.div_(sine)
        return value, slope, 2.0 * factor * unit**-q


@dataclass(frozen=True)
class Gaussian(PairFunction):
    """The Gaussian potential exp(-tau t^2), bounded: duplicates add 1 and are not pushed.

    Of the chord it is exp(2 tau c) up to a constant factor.

    Args:
        tau: a finite number greater than 0.

    Source: Wang and Isola (2020), whose uniformity is the logarithm of its mean.
    """

    tau: float = 1.0

    name: ClassVar[str] = "gaussian"
    number: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau < math.inf:
            raise ValueError(f"`tau` must be finite and greater than 0, got {self.tau}")

    def of_distance(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, twice = (-self.tau * t.square()).exp(), 2.0 * self.tau
        return value, -twice * t * value, twice * (twice * t.square() - 1.0) * value

    def of_square(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        value = (-self.tau * x).exp()
        return value, -self.tau * value, self.tau**2 * value

    def closed_tile(self, x: Tensor) -> ClosedTile | None:
        if self.angular:
            return None
        if self.half_space:
            # with m = |c|: exp(-2 tau (1 - m)) (1 +- exp(-4 tau m))
            sign = x.sign()
            larger = x.abs_().sub(1.0).mul_(2.0 * self.tau).exp_()
            ratio = x.mul_(-4.0 * self.tau)
            return (
                ratio.exp().add_(1.0).mul_(larger),
                ratio.expm1_().mul_(larger).mul_(sign),
                (-2.0 * self.tau),
            )
        value = x.mul_(-self.tau).exp_()
        return value, value, 2.0 * self.tau
