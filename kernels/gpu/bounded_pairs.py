"""Pair functions that are bounded where rows coincide, each as `pair_function` describes."""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from ..pair_functions import Laplace, Riesz
from .pair_terms import (
    COEFFICIENT_MAX_BITS,
    COEFFICIENT_RANGE_BITS,
    NEAR_CHORD,
    Formula,
    odd_ratio,
)
from .special_functions import log2, reciprocal, rsqrt

LOG2E = math.log2(math.e)

# --- Riesz with a shift: (a + t^2)^(-s/2), or -log(a + t^2) / 2 for s = 0 -------------------------


class ShiftedNumbers(NamedTuple):
    """a, s/2, the bits that raw terms are scaled by, |s| and the sign of f."""

    shift: float
    half_s: float
    bits: float
    size: float
    sign: float


@triton.jit
def shifted_log_chord(r2, pair):
    x = pair.numbers.shift + r2
    return reciprocal(x, pair.fast), log2(x, pair.fast)


@triton.jit
def shifted_power_chord(r2, pair):
    n = pair.numbers
    x = n.shift + r2
    coefficient = tl.exp2(log2(x, pair.fast) * (-n.half_s - 1.0) + n.bits)
    return coefficient, coefficient * x


@triton.jit
def shifted_log_angle(t, pair):
    slope, energy = shifted_log_chord(t * t, pair)
    return t * slope, energy


@triton.jit
def shifted_power_angle(t, pair):
    slope, energy = shifted_power_chord(t * t, pair)
    return t * slope, energy


@triton.jit
def shifted_log_exact(t, inverse, pair):
    x = pair.numbers.shift + t * t
    return t * reciprocal(x, pair.fast), -0.34657359027997264 * log2(x, pair.fast)


@triton.jit
def shifted_power_exact(t, inverse, pair):
    n = pair.numbers
    x = n.shift + t * t
    power = tl.exp2(-n.half_s * log2(x, pair.fast))
    return n.size * t * power * reciprocal(x, pair.fast), n.sign * power


def shifted_riesz(pair: Riesz) -> Formula:
    """Without singularity: near is what 2 - 2c loses of a + t^2, and what fp16 has no range for."""
    s, a, angular = pair.s, pair.shift, pair.angular
    power = s / 2.0 + 1.0
    typical = a + (math.pi / 2.0 if angular else math.sqrt(2.0)) ** 2
    # where F' is 2^COEFFICIENT_RANGE_BITS times that of the typical pair
    steep = typical * 2.0 ** (-COEFFICIENT_RANGE_BITS / power) - a
    near = math.sqrt(max(NEAR_CHORD**2 - a, steep, 0.0))
    # an angle's F' has 1/sin t, which is to be exact at both ends
    near_chord = max(NEAR_CHORD, 2.0 * math.sin(near / 2.0)) if angular else near
    largest = -power * math.log2(a + near_chord**2)
    if angular:
        end = 2.0 * math.asin(near_chord / 2.0)
        steps = [end + (math.pi - 2.0 * end) * i / 64.0 for i in range(65)]
        largest = max(math.log2(t / math.sin(t)) - power * math.log2(a + t**2) for t in steps)
    bits = float(math.floor(COEFFICIENT_MAX_BITS - largest)) if s else 0.0
    sign, size = math.copysign(1.0, s), abs(s)
    return Formula(
        side=(
            (shifted_power_angle if angular else shifted_power_chord)
            if s
            else (shifted_log_angle if angular else shifted_log_chord)
        ),
        exact=shifted_power_exact if s else shifted_log_exact,
        numbers=ShiftedNumbers(a, s / 2.0, bits, size, sign),
        # F' is ((1 - z) (a + 2))^-power, z = c / width
        odd=odd_ratio(power, power / 3.0, power / 5.0, (a + 2.0) / 2.0),
        nearly_even=not angular,
        near_chord=near_chord,
        energy_unit=sign * 2.0**-bits if s else -math.log(2.0) / 2.0,
        force_unit=size * 2.0**-bits if s else 1.0,
    )


# --- Laplace: exp(-tau t) -------------------------------------------------------------------------


class LaplaceNumbers(NamedTuple):
    """tau for powers of two, tau, and the bits that raw terms are scaled by."""

    tau_log2e: float
    tau: float
    bits: float


@triton.jit
def laplace_chord(r2, pair):
    y = rsqrt(r2, pair.fast)
    value = tl.exp2(pair.numbers.bits - pair.numbers.tau_log2e * (r2 * y))
    return value * y, value


@triton.jit
def laplace_angle(t, pair):
    value = tl.exp2(pair.numbers.bits - pair.numbers.tau_log2e * t)
    return value, value


@triton.jit
def laplace_exact(t, inverse, pair):
    f = tl.exp2(-pair.numbers.tau_log2e * t)
    return pair.numbers.tau * f, f


def laplace(pair: Laplace) -> Formula:
    """exp(-tau t), whose F' grows as 1/t towards the kink at t = 0."""
    tau, rate = pair.tau, pair.tau * LOG2E
    typical = math.pi / 2.0 if pair.angular else math.sqrt(2.0)
    # where f is 2^COEFFICIENT_RANGE_BITS times that of the typical pair
    near = max(typical - COEFFICIENT_RANGE_BITS / rate, 0.0)
    near_chord = max(NEAR_CHORD, 2.0 * math.sin(near / 2.0) if pair.angular else near)
    largest = -rate * near_chord - math.log2(near_chord)
    if pair.angular:
        end = 2.0 * math.asin(near_chord / 2.0)
        largest = -rate * end - math.log2(math.sin(end))
    # no more than what to_raw can undo in float32: pairs that this loses are less than 2^-120
    bits = float(min(math.floor(COEFFICIENT_MAX_BITS - largest), 100))
    root = tau * math.sqrt(2.0)
    return Formula(
        side=laplace_angle if pair.angular else laplace_chord,
        exact=laplace_exact,
        numbers=LaplaceNumbers(rate, tau, bits),
        # log F' is -tau sqrt(2) sqrt(1 - c) - log(1 - c) / 2 but for a constant
        odd=odd_ratio(root / 2.0 + 0.5, root / 16.0 + 1.0 / 6.0, 7.0 * root / 256.0 + 0.1),
        nearly_even=pair.half_space and not pair.angular,
        near_chord=near_chord,
        energy_unit=2.0**-bits,
        force_unit=tau * 2.0**-bits,
    )
