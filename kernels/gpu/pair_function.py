"""The pair functions that the kernels know: a section each, and a line in `FORMULAS`.

    side(r^2 or t, pair)    raw F' and f of a chord, or raw -f' and f of an angle, in a tile
    exact(t, 1/t, pair)     -f' and f
    formula(pair)           which of these it takes, with what numbers, units and near chord

For a new one write these three; `pair_terms` does half space, angles and the tangent line.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..pair_functions import Gaussian, Laplace, PairFunction, Riesz
from .bounded_pairs import laplace, shifted_riesz
from .pair_terms import (
    COEFFICIENT_MAX_BITS,
    COEFFICIENT_RANGE_BITS,
    COSINE_SCALE,
    LARGEST,
    NEAR_CHORD,
    PLAIN_BITS,
    RANGE_BITS,
    SMALL_SET_NEAR_CHORD,
    SMALLEST_CHORD,
    Formula,
    PairArguments,
    PairConstants,
    Tangent,
    ToRaw,
    angle_tile,
    chord_tile,
    half_space_tile,
    odd_half_space_tile,
    odd_ratio,
)
from .special_functions import log2, negative_power, positive_reciprocal, reciprocal, rsqrt

# --- Riesz: t^-s, or -log t for s = 0 -------------------------------------------------------------


class RieszNumbers(NamedTuple):
    """s, its parts, bits that raw terms and exact values are scaled by, factor of exact forces."""

    s: float
    s_head: float
    s_tail: float
    coefficient_bits: float
    value_bits: float
    factor: float


@triton.jit
def log_chord(r2, pair):
    y = rsqrt(r2, pair.fast)
    return y * y, r2


@triton.jit
def one_chord(r2, pair):
    y = rsqrt(r2, pair.fast)
    return y * y * y, y


@triton.jit
def two_chord(r2, pair):
    e = positive_reciprocal(r2, pair.fast)
    return e * e, e


@triton.jit
def power_chord(r2, pair):
    n = pair.numbers
    coefficient = tl.exp2(log2(r2, pair.fast) * (-0.5 * n.s - 1.0) + n.coefficient_bits)
    return coefficient, coefficient * r2


@triton.jit
def log_angle(t, pair):
    return reciprocal(t, pair.fast), t


@triton.jit
def one_angle(t, pair):
    y = reciprocal(t, pair.fast)
    return y * y, y


@triton.jit
def two_angle(t, pair):
    y = reciprocal(t, pair.fast)
    e = y * y
    return e * y, e


@triton.jit
def power_angle(t, pair):
    n = pair.numbers
    slope = tl.exp2(log2(t, pair.fast) * (-n.s - 1.0) + n.coefficient_bits)
    return slope, slope * t


@triton.jit
def log_half_space_tile(x, pair):
    """Of 1 - c^2: f(c) + f(-c) = -log(1 - c^2)/2 - log 2, one special function for both sides."""
    c = x * (1.0 / COSINE_SCALE)
    w = 1.0 - c * c
    y = rsqrt(w, pair.fast)
    return c * (y * y), w


@triton.jit
def two_half_space_tile(x, pair):
    """Of 1 - c^2: f(c) + f(-c) = 1/(1 - c^2), one special function for both sides.

    The energy comes by 256 too small, so that x e^2 = c / (1 - c^2)^2 needs no factor.
    """
    w = 256.0 - x * x * (256.0 / (COSINE_SCALE * COSINE_SCALE))
    e = positive_reciprocal(w, pair.fast)
    return x * (e * e), e


@triton.jit
def log_exact(t, inverse, pair):
    return pair.numbers.factor * inverse, -0.6931471805599453 * log2(t, pair.fast)


@triton.jit
def one_exact(t, inverse, pair):
    return pair.numbers.factor * inverse * inverse, inverse


@triton.jit
def two_exact(t, inverse, pair):
    f = inverse * inverse
    return pair.numbers.factor * f * inverse, f


@triton.jit
def power_exact(t, inverse, pair):
    n = pair.numbers
    if t.dtype == tl.float64:
        f = tl.exp2(-n.s * log2(t, pair.fast) - n.value_bits)
    else:
        f = negative_power(t, n.s, n.s_head, n.s_tail, n.value_bits, pair.fast)
        # infinity of coincident rows, or NaN
        f = tl.where(t > 0.0, f, inverse)
    return n.factor * f * inverse, f


@triton.jit
def negative_exact(t, inverse, pair):
    """-t^|s|; on the tangent line its slope is that at the end, which may be more than its own."""
    n = pair.numbers
    if t.dtype == tl.float64:
        power = tl.exp2(-n.s * log2(t, pair.fast))
    else:
        power = negative_power(t, n.s, n.s_head, n.s_tail, 0.0, pair.fast)
        # 0 of coincident rows, or NaN
        power = tl.where(t > 0.0, power, t)
    slope = n.factor * power * inverse
    return tl.where(t < pair.tangent.at, -pair.tangent.slope, slope), -power


def riesz(pair: Riesz) -> Formula:
    """t^-s, or -t^|s|; any s that is not 0, 1 or 2 is a number of the launch."""
    if pair.shift:
        return shifted_riesz(pair)
    s, m, angular = pair.s, pair.min_distance, pair.angular
    sign, size = math.copysign(1.0, s), abs(s) or 1.0
    power = s / 2.0 + 1.0
    chord, of_angle, exact, half_space_short = {
        0.0: (log_chord, log_angle, log_exact, log_half_space_tile),
        1.0: (one_chord, one_angle, one_exact, None),
        2.0: (two_chord, two_angle, two_exact, two_half_space_tile),
    }.get(s, (power_chord, power_angle, power_exact if s > 0 else negative_exact, None))
    is_power = of_angle is power_angle
    tile = half_space_short if pair.half_space and not angular else None
    shortest = 2.0 * math.sin(m / 2.0) if angular else m
    # where F' is 2^COEFFICIENT_RANGE_BITS times that of the typical pair; 1/sin is about 1/theta
    reduced = 2.0 ** (-COEFFICIENT_RANGE_BITS / (s + 2.0))
    steep = 2.0 * math.sin(math.pi / 4.0 * reduced) if angular else math.sqrt(2.0) * reduced
    near_chord = max(NEAR_CHORD, steep, shortest)
    bits = 0.0
    energy_unit, energy_offset, force_unit = 1.0, 0.0, max(s, 1.0)
    if s == 0:
        energy_unit = -math.log(2.0) * (1.0 if angular else 0.5)
        if tile is not None:
            # the raw argument is 1 - c^2 = r^2 q^2 / 4
            energy_offset, force_unit = -math.log(2.0), 1.0
    elif s == 2 and tile is not None:
        energy_unit, force_unit = 256.0, 2.0
    elif is_power:
        largest = -(s + 2.0) * math.log2(near_chord)
        if angular:
            theta = 2.0 * math.asin(min(near_chord / 2.0, 1.0))
            # at one of the ends, where the sine is smallest
            largest = max(-(s + 1.0) * math.log2(t) for t in (theta, math.pi - theta))
            largest -= math.log2(max(math.sin(theta), 0.1))
        bits = math.floor(COEFFICIENT_MAX_BITS - largest)
        energy_unit, force_unit = sign * 2.0**-bits, size * 2.0**-bits
    # -f'(m), the largest there is for s > -1
    slope_bits = math.log2(size) - (s + 1.0) * math.log2(m) if m > 0 else math.inf
    far_reaching = s >= 0 and slope_bits - math.log2(SMALLEST_CHORD) > PLAIN_BITS
    range_bits = float(RANGE_BITS if far_reaching else 0)
    value_bits = range_bits if is_power else 0.0
    value = slope = 0.0
    if m > 0:
        value = -math.log(m) if s == 0 else sign * _float32_power(-s * math.log2(m) - value_bits)
        slope = -_float32_power(slope_bits - value_bits)
    steepest = min(_float32_power(slope_bits - range_bits), LARGEST.value)
    if s < 0:
        steepest = LARGEST.value
    factor = size * 2.0 ** (value_bits - range_bits)
    mantissa, exponent = math.frexp(s)
    head = math.ldexp(round(math.ldexp(mantissa, 16)), exponent - 16)
    return Formula(
        side=of_angle if angular else chord,
        exact=exact,
        numbers=RieszNumbers(s, head, s - head, bits, value_bits, factor),
        # F' is ((1 - c) 2)^-(s/2 + 1)
        odd=odd_ratio(power, power / 3.0, power / 5.0),
        # the chord's sides differ little at any cosine
        nearly_even=s < 0 and pair.half_space and not angular,
        near_chord=near_chord,
        energy_unit=energy_unit,
        energy_offset=energy_offset,
        force_unit=force_unit,
        tile=tile,
        sum_of_logs=s == 0,
        tangent=Tangent(m, value, slope, steepest),
        range_bits=range_bits,
        value_bits=value_bits,
    )


def _float32_power(bits: float) -> float:
    """2^bits, infinite where float32 has it so."""
    return 2.0**bits if bits < 128.0 else math.inf


# --- Gaussian: exp(-tau t^2) ----------------------------------------------------------------------


class GaussianNumbers(NamedTuple):
    """tau for powers of two, 2 tau, and the bits that raw terms are scaled by."""

    tau_log2e: float
    twice_tau: float
    bits: float


@triton.jit
def gaussian_chord(r2, pair):
    value = tl.exp2(pair.numbers.bits - pair.numbers.tau_log2e * r2)
    return value, value


@triton.jit
def gaussian_angle(t, pair):
    value = tl.exp2(pair.numbers.bits - pair.numbers.tau_log2e * t * t)
    return t * value, value


@triton.jit
def gaussian_exact(t, inverse, pair):
    f = tl.exp2(-pair.numbers.tau_log2e * t * t)
    return pair.numbers.twice_tau * t * f, f


def gaussian(pair: Gaussian) -> Formula:
    """exp(-tau t^2): nothing is near, but where the typical pair would be lost beside it in fp16.

    An angle's F' has 1/sin t, which is to be exact at both ends.
    """
    tau, log2e = pair.tau, math.log2(math.e)
    typical = math.pi / 2.0 if pair.angular else math.sqrt(2.0)
    # where f is 2^COEFFICIENT_RANGE_BITS times that of the typical pair
    near = math.sqrt(max(typical**2 - COEFFICIENT_RANGE_BITS / (tau * log2e), 0.0))
    near_chord = max(NEAR_CHORD, 2.0 * math.sin(near / 2.0)) if pair.angular else near
    largest = -tau * near**2 * log2e
    if pair.angular:
        end = 2.0 * math.asin(near_chord / 2.0)
        largest = max(math.log2(t / math.sin(t)) - tau * t**2 * log2e for t in (end, math.pi - end))
    # no more than what to_raw can undo in float32: pairs that this loses are less than 2^-120
    bits = min(math.floor(COEFFICIENT_MAX_BITS - largest), 100)
    return Formula(
        side=gaussian_angle if pair.angular else gaussian_chord,
        exact=gaussian_exact,
        numbers=GaussianNumbers(tau * log2e, 2.0 * tau, bits),
        # F' is exp(2 tau c) but for a factor
        odd=odd_ratio(2.0 * tau),
        nearly_even=tau < 1.0 and not pair.angular,
        near_chord=near_chord,
        energy_unit=2.0**-bits,
        force_unit=2.0 * tau * 2.0**-bits,
    )


FORMULAS: dict[type[PairFunction], Callable[[Any], Formula]] = {
    Riesz: riesz,
    Gaussian: gaussian,
    Laplace: laplace,
}


def is_known(pair: PairFunction) -> bool:
    """Whether the kernels know a pair function.

    Half space adds up two slopes of either sign. Where these hardly differ the sum is what rounding
    leaves of it, so such functions are left to backends that compute it without subtracting.
    """
    if isinstance(pair, Riesz) and pair.half_space:
        if pair.angular:
            return pair.s >= 0 and not pair.shift
        return pair.s >= -1
    if isinstance(pair, Laplace) and pair.half_space and pair.angular:
        return pair.tau >= 1
    return type(pair) in FORMULAS


@lru_cache(maxsize=256)
def pair_constants(
    pair: PairFunction, fast: bool = False, small_sets: bool = False, many_columns: bool = False
) -> PairConstants:
    """Make the kernel arguments of a pair function.

    Args:
        pair: one whose class `FORMULAS` knows.
        fast: use the approximate special functions of NVIDIA GPUs.
        small_sets: all sets have at most `SMALL_SET` rows.
        many_columns: so many that most cosines are small.
    """
    formula = FORMULAS[type(pair)](pair)
    near_chord = formula.near_chord
    if small_sets and near_chord > 0:
        near_chord = max(near_chord, SMALL_SET_NEAR_CHORD)
    tile = formula.tile
    if tile is None:
        with_odd = many_columns or formula.nearly_even
        half_space = odd_half_space_tile if with_odd else half_space_tile
        tile = angle_tile if pair.angular else half_space if pair.half_space else chord_tile
    value_unit = 2.0 ** (formula.value_bits - formula.range_bits)
    arguments = PairArguments(
        tile=tile,
        side=formula.side,
        exact=formula.exact,
        half_space=tl.constexpr(pair.half_space),
        angle=tl.constexpr(pair.angular),
        two_ended=tl.constexpr(pair.two_ended),
        sum_of_logs=tl.constexpr(formula.sum_of_logs),
        fast=tl.constexpr(fast),
        nearly_even=tl.constexpr(formula.nearly_even),
        numbers=formula.numbers,
        odd=formula.odd,
        # beyond any rounding of c = 1 where nothing is near
        near_cosine=1.0 - near_chord**2 / 2.0 if near_chord > 0 else 2.0,
        range_unit=2.0**-formula.range_bits,
        tangent=formula.tangent,
        to_raw=ToRaw(
            value_unit / formula.energy_unit, formula.energy_offset, 1.0 / formula.force_unit
        ),
    )
    return PairConstants(
        arguments=arguments,
        half_space=pair.half_space,
        angle=pair.angular,
        energy_unit=formula.energy_unit,
        energy_offset=formula.energy_offset,
        force_unit=formula.force_unit,
        range_bits=formula.range_bits,
        value_bits=formula.value_bits,
    )
