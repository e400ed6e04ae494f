"""What a pair function is to a kernel, and the device functions that evaluate any.

    f(t),  t = r (chord) or theta = 2 asin(r/2) (angle)
    r^2 = 2 - 2c,  q^2 = 4 - r^2 = 2 + 2c,  F(c) = f(c), or f(c) + f(-c) in half space
    F'(c) is what multiplies v_j in the gradient of row i

A kernel takes one `PairArguments`: device functions and the numbers they need. There are two
evaluations: `pair.tile` for the tiles of the tensor cores, where c is far from +-1, and
`exact_terms` for pairs whose r^2 and q^2 both are known to full relative accuracy, in float32 or
float64; it knows the tangent line below `min_distance` too. The first leaves constant factors out
("raw" terms, `PairConstants`).

The forces of near pairs may be beyond float32 where the gradient, scaled by the number of pairs,
is not. For pair functions that reach so far all sums are held in units of 2^range_bits.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .special_functions import angle, log2, reciprocal, rsqrt

# unit rows are held as fp16 pairs of 256 v: the low half of an entry of ordinary size stays normal
UNIT_SCALE: tl.constexpr = tl.constexpr(256.0)
COSINE_SCALE: tl.constexpr = tl.constexpr(256.0 * 256.0)

# the smallest distance that unit rows of 48 bits resolve (`direct`), and its square: what is nearer
# is rounding, of rows that are multiples of each other
SMALLEST_CHORD = 2.0**-46
COINCIDENT: tl.constexpr = tl.constexpr(2.0**-92)
# log2 of the largest F' that float32 sums take as it is, and of the unit of larger ones
PLAIN_BITS, RANGE_BITS = 100, 80
# the largest f' that `direct` adds up, in that unit: over SMALLEST_CHORD still a float32. Larger
# ones end here; what is left of them in the gradient is infinite
LARGEST_DIRECT_SLOPE = 2.0**72
# for float64 sums, and what of them goes into a slot
LARGEST: tl.constexpr = tl.constexpr(2.0**127)

# chord below which 2 - 2c (absolute error 2e-7) is not trusted and the near-pair kernel takes over:
# there F' of s = 2 is off by 1e-5, and random rows come so near only in ten dimensions or so
NEAR_CHORD = 2.0**-2
# the same where all sets are small, so that the error of one pair shows in the energy of its set
SMALL_SET = 256
SMALL_SET_NEAR_CHORD = 2.0**-1
# fp16 range kept for coefficients: they are at most 2^14 at the near chord, and the typical pair
# (r = sqrt 2) is at most 2^19 times smaller, so that its low half still resolves 2^-19 of it
COEFFICIENT_MAX_BITS = 14
COEFFICIENT_RANGE_BITS = 19


class Tangent(NamedTuple):
    """The line that continues f below t = at, and the steepest -f' there is."""

    at: float
    value: float
    slope: float
    steepest: float


class ToRaw(NamedTuple):
    """From the units of `exact_terms` to those of the slots."""

    per_energy: float
    energy_offset: float
    per_force: float


class OddRatio(NamedTuple):
    """(h(x) - h(-x)) / (h(x) + h(-x)) of a side h, where |x| < below: x (a1 + a3 x^2 + a5 x^4)."""

    below: float
    a1: float
    a3: float
    a5: float


class PairArguments(NamedTuple):
    """A pair function as a kernel takes it.

    The device functions and the flags are constants of the launch, the others are numbers:

        tile(x, pair)           raw F' and F of a tile, x = COSINE_SCALE c
        side(r^2 or t, pair)    of one side: raw F' and f of a chord, or raw -f' and f of an angle
        exact(t, 1/t, pair)     -f' and f of exact distances, scaled as `PairConstants` says
        sum_of_logs             `tile` and `side` give arguments of a log2 in place of F
        numbers                 what these functions know of the pair function
        odd                     of its F' of the chord, for `side_difference`
        nearly_even             the sides differ little at any c
    """

    tile: Any
    side: Any
    exact: Any
    half_space: Any
    angle: Any
    two_ended: Any
    sum_of_logs: Any
    fast: Any
    nearly_even: Any
    numbers: Any
    odd: OddRatio
    near_cosine: float
    range_unit: float
    tangent: Tangent
    to_raw: ToRaw


@dataclass(frozen=True)
class PairConstants:
    """A pair function as the launchers take it: the arguments of kernels, and its units.

    The true value of a pair is `energy_unit` times the raw one plus `energy_offset`, its true F'
    is `force_unit` times the raw one. With `sum_of_logs` the raw value is log2 of what the tile
    gives. Sums over pairs, in the slots, are in units of 2^`range_bits`; so is what `exact_terms`
    makes of F', and of F where it takes an exponential (2^`value_bits`).
    """

    arguments: PairArguments
    half_space: bool
    angle: bool
    energy_unit: float
    energy_offset: float
    force_unit: float
    range_bits: float
    value_bits: float

    @property
    def value_unit(self) -> float:
        """What turns F as `exact_terms` has it into what the slots hold, but for the raw unit."""
        return 2.0 ** (self.value_bits - self.range_bits)

    @property
    def float32_arguments(self) -> PairArguments:
        """The arguments of a kernel that adds up exact pairs in float32."""
        steepest = min(self.arguments.tangent.steepest, LARGEST_DIRECT_SLOPE)
        tangent = self.arguments.tangent._replace(steepest=steepest)
        return self.arguments._replace(tangent=tangent)


class Formula(NamedTuple):
    """A pair function as `pair_function` writes it; see `PairArguments` and `PairConstants`."""

    side: Any
    exact: Any
    numbers: Any
    near_chord: float  # 0: the tile resolves every pair
    energy_unit: float = 1.0
    energy_offset: float = 0.0
    force_unit: float = 1.0
    tile: Any = None  # a short form of a whole tile
    odd: OddRatio = OddRatio(*[0.0] * 4)
    nearly_even: bool = False  # the sides differ little at any c, so use `odd` at any k
    sum_of_logs: bool = False
    tangent: Tangent = Tangent(0.0, 0.0, 0.0, LARGEST.value)
    range_bits: float = 0.0
    value_bits: float = 0.0


def odd_ratio(u1: float, u3: float = 0.0, u5: float = 0.0, width: float = 1.0) -> OddRatio:
    """Make the ratio tanh u from u, the odd part of log h, as a series in z = c / width."""
    # tanh u = u - u^3 / 3 + 2 u^5 / 15 - ..., of u = u1 z + u3 z^3 + u5 z^5 + ...
    a1, a3 = u1, u3 - u1**3 / 3.0
    a5 = u5 - u1**2 * u3 + 2.0 * u1**5 / 15.0
    # there the next term is 2e-7 of the first, and the sides differ by an eighth of their sum; the
    # series of u itself goes no further than z = 1/8
    below = 0.125 / max(u1, 1.0 if u3 else 0.0)
    scale = COSINE_SCALE.value * width
    return OddRatio(below * scale, a1 / scale, a3 / scale**3, a5 / scale**5)


@triton.jit
def chord_tile(x, pair):
    """Raw F' and F of a tile, of the chord."""
    return pair.side(2.0 - x * (2.0 / COSINE_SCALE), pair)


@triton.jit
def half_space_tile(x, pair):
    """Raw F' and F of a tile, of the chord in half space."""
    coefficient, energy = pair.side(2.0 - x * (2.0 / COSINE_SCALE), pair)
    mirrored, mirrored_energy = pair.side(2.0 + x * (2.0 / COSINE_SCALE), pair)
    return coefficient - mirrored, energy + mirrored_energy


@triton.jit
def side_difference(coefficient, mirrored, x, odd):
    """Subtract F' of one side from F' of the other without losing digits where c is small.

    It costs some seven instructions a pair, so it serves where most cosines are small, in many
    dimensions, and where the sides differ little at any cosine.
    """
    z = x * x
    ratio = x * (odd.a1 + z * (odd.a3 + z * odd.a5))
    small = tl.abs(x) < odd.below
    return tl.where(small, (coefficient + mirrored) * ratio, coefficient - mirrored)


@triton.jit
def odd_half_space_tile(x, pair):
    """Compute the same by `side_difference`."""
    coefficient, energy = pair.side(2.0 - x * (2.0 / COSINE_SCALE), pair)
    mirrored, mirrored_energy = pair.side(2.0 + x * (2.0 / COSINE_SCALE), pair)
    return side_difference(coefficient, mirrored, x, pair.odd), energy + mirrored_energy


@triton.jit
def angle_tile(x, pair):
    """Raw F' and F of a tile, of the angle."""
    r2 = 2.0 - x * (2.0 / COSINE_SCALE)
    q2 = 2.0 + x * (2.0 / COSINE_SCALE)
    t = angle(r2, q2)
    cosecant = 2.0 * rsqrt(r2 * q2, pair.fast)
    slope, energy = pair.side(t, pair)
    if pair.half_space:
        mirrored, mirrored_energy = pair.side(3.141592653589793 - t, pair)
        slope = slope - mirrored
        if pair.sum_of_logs:
            energy = energy * mirrored_energy
        else:
            energy = energy + mirrored_energy
    return slope * cosecant, energy


@triton.jit
def masked_terms(x, mask, pair):
    """Raw F' and F, logarithms taken, of the pairs that `mask` chooses; 0 for the others."""
    coefficient, terms = pair.tile(x, pair)
    if pair.sum_of_logs:
        terms = log2(terms, pair.fast)
    return tl.where(mask, coefficient, 0.0), tl.where(mask, terms, 0.0)


@triton.jit
def exact_side(r2, q2, pair):
    """F' and f of one side from exact r^2 and q^2 = 4 - r^2, in the units of `PairConstants`.

    Below the tangent's end the tangent line; where two rows coincide F' is 0.
    """
    if pair.angle:
        t = angle(r2, q2)
        inverse = reciprocal(t, pair.fast)
        sine2 = 0.25 * r2 * q2
    else:
        inverse = rsqrt(r2, pair.fast)
        # r^2 / r, and 0 where that is 0 / 0
        t = r2 * tl.minimum(inverse, 3.0e38)
        sine2 = r2
    slope, f = pair.exact(t, inverse, pair)
    line = pair.tangent
    f = tl.where(t < line.at, line.value + line.slope * (t - line.at), f)
    # f' is steepest on the tangent line; NaN comes out of the difference of the rows
    slope = tl.minimum(slope, line.steepest)
    # dt/dc = -1/r or -1/sin theta
    return tl.where(sine2 == 0.0, 0.0, slope * rsqrt(sine2, pair.fast)), f


@triton.jit
def exact_terms(r2, q2, pair):
    """F' and F of pairs with exact r^2 and q^2 = 4 - r^2, in the units of `exact_side`."""
    coefficient, value = exact_side(r2, q2, pair)
    if pair.half_space:
        mirrored, mirrored_value = exact_side(q2, r2, pair)
        if pair.nearly_even:
            x = (q2 - r2) * (0.25 * COSINE_SCALE)
            coefficient = side_difference(coefficient, mirrored, x, pair.odd)
        else:
            coefficient -= mirrored
        value += mirrored_value
    return coefficient, value
