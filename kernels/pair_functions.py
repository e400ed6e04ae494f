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

from .half_space_tiles import (
    ClosedTile,
    gaussian_of_chord,
    laplace_of_angle,
    laplace_of_chord,
    riesz_of_angle,
    riesz_of_chord,
)


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

    @property
    def tangent_below(self) -> float:
        """The distance below which f is continued by its tangent line; 0 where it never is."""
        return 0.0

    @cached_property
    def tangent(self) -> Tangent | None:
        """The tangent line below `tangent_below`, computed once on the host."""
        if self.tangent_below <= 0:
            return None
        at = torch.tensor(self.tangent_below, dtype=torch.float64, device="cpu")
        value, slope, _ = self.of_distance(at)
        return Tangent(self.tangent_below, float(value), float(slope))

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
        """Convert a distance, as `tangent_below`, to the angle in radians."""
        return t if self.angular else 2.0 * math.asin(t / 2.0)

    def at_distance(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute f, f' and f'' at any distance `t` >= 0, with the tangent line."""
        bound = self.tangent_below
        if bound <= 0:
            return self.of_distance(t)
        # the line starts from f at the bound itself; clamp_min keeps NaN
        value, first, second = self.of_distance(t.clamp_min(bound))
        below = t < bound
        # only below: above, f' may be infinite, and 0 times it NaN
        value = torch.where(below, value + first * (t - bound), value)
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
            return self.tangent_below <= 2.0 * math.asin(math.sqrt(near) / 2.0)
        return self.tangent_below <= math.sqrt(near)

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
    """Riesz' function of the distance t, and with a shift a > 0 of sqrt(a + t^2).

        s > 0     t^-s           with a shift  (a + t^2)^(-s/2)
        s = 0     log(1/t)                     -1/2 log(a + t^2)
        s < 0     -t^|s|                       -(a + t^2)^(|s|/2)

    With s < 0, descent makes the mean distance to the power |s| large. Torch equivalent, s != 0::

        r = torch.nn.functional.pdist(torch.nn.functional.normalize(rows))
        energy = math.copysign(1, s) * ((shift + r**2) ** (-s / 2)).mean()

    Others' kernels are of this kind: 1/(1 + r^2) of TIMA is Riesz(2, shift=1); of KCL, -1/2
    log(1 + t r^2) is Riesz(0, shift=1/t) less log(t)/2, and c/sqrt(c^2 + r^2) is c times
    Riesz(1, shift=c^2).

    Args:
        s: the exponent, a finite number greater than -2.
        shift: a, a finite number, at least 0: it takes away the singularity, or the kink, at t = 0.
        min_distance: below it (in the unit of the distance) f continues along its tangent line, so
            that a near-duplicate is pushed away with a finite force; 0 is the pure definition.
            A shift has no use for it, and none of it then remains.

    Source: Liu et al. (2018), MHE; Liu et al. (2024), arXiv 2405.17678: TIMA; Koromilas et al.
    (2024), arXiv 2405.18045: KCL.
    """

    s: float = 2.0
    shift: float = 0.0
    min_distance: float = 1e-3

    name: ClassVar[str] = "riesz"
    number: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -2 < self.s < math.inf:
            raise ValueError(f"`s` must be finite and greater than -2, got {self.s}")
        if not 0 <= self.shift < math.inf:
            raise ValueError(f"`shift` must be finite and at least 0, got {self.shift}")
        if not 0 <= self.min_distance < 2:
            raise ValueError(
                f"`min_distance` must be at least 0 and less than 2, got {self.min_distance}"
            )

    @property
    def tangent_below(self) -> float:
        return 0.0 if self.shift else self.min_distance

    def of_distance(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.shift:
            x = t.square()
            value, first, second = self._of_shifted(self.shift + x)
            return value, 2.0 * t * first, 2.0 * first + 4.0 * x * second
        if self.s == 0:
            return -t.log(), -1.0 / t, t.square().reciprocal()
        value = self._signed(t.pow(-self.s))
        first = -self.s * value / t
        return value, first, -(self.s + 1) * first / t

    def of_square(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        return self._of_shifted(self.shift + x) if self.shift else None

    def _of_shifted(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute f and its derivatives as functions of x = shift + t^2."""
        if self.s == 0:
            return -0.5 * x.log(), -0.5 / x, 0.5 / x.square()
        value = self._signed(x.pow(-self.s / 2.0))
        first = -self.s / 2.0 * value / x
        return value, first, -(self.s / 2.0 + 1.0) * first / x

    def _signed(self, power: Tensor) -> Tensor:
        """Make f of the power of the distance."""
        return power.neg() if self.s < 0 else power

    @property
    def growth(self) -> float:
        return self.s + 2.0

    def closed_tile(self, x: Tensor) -> ClosedTile | None:
        if self.angular:
            # with a shift the slope t (shift + t^2)^(-s/2 - 1) may be almost the same at both ends
            return riesz_of_angle(x, self.s) if self.half_space and not self.shift else None
        if self.half_space:
            return riesz_of_chord(x, self.s, self.shift)
        if self.shift:
            x.add_(self.shift)
        if self.s == 2:
            value = x.reciprocal_()
            return value, value.square(), 2.0
        if self.s == 1:
            value = x.rsqrt_()
            return value, value.pow(3), 1.0
        if self.s == 0:
            return x.log().mul_(-0.5), x.reciprocal_(), 1.0
        power = x.pow(-self.s / 2.0)
        slope = power / x
        return self._signed(power), slope, abs(self.s)


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
            return gaussian_of_chord(x, self.tau)
        value = x.mul_(-self.tau).exp_()
        return value, value, 2.0 * self.tau


@dataclass(frozen=True)
class Laplace(PairFunction):
    """The Laplace potential exp(-tau t), bounded, but with a kink at t = 0.

    Torch equivalent::

        r = torch.nn.functional.pdist(torch.nn.functional.normalize(rows))
        energy = (-tau * r).exp().mean()

    The dispersion of LM-Dispersion, log mean exp(-theta / (pi tau')), is the logarithm of the mean
    of Laplace(1 / (pi tau'), angular=True).

    Args:
        tau: a finite number greater than 0.
    """

    tau: float = 1.0

    name: ClassVar[str] = "laplace"
    number: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau < math.inf:
            raise ValueError(f"`tau` must be finite and greater than 0, got {self.tau}")

    def of_distance(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = (-self.tau * t).exp()
        return value, -self.tau * value, self.tau**2 * value

    @property
    def growth(self) -> float:
        return 1.0

    def closed_tile(self, x: Tensor) -> ClosedTile | None:
        if self.half_space:
            return (laplace_of_angle if self.angular else laplace_of_chord)(x, self.tau)
        if self.angular:
            return None
        t = x.sqrt_()
        value = t.mul(-self.tau).exp_()
        return value, value / t, self.tau
