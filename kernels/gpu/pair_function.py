"""The pair function on the GPU: what it is to a kernel, and the device functions that evaluate it.

    f(t) = t^-s, or -log t for s = 0;  t = r (chord) or theta = 2 asin(r/2) (angle)
    r^2 = 2 - 2c,  4 - r^2 = 2 + 2c,  F(c) = f(c), or f(c) + f(-c) in half space
    F'(c) is what multiplies v_j in the gradient of row i

Two evaluations: `fast_terms` for the tensor-core tiles, where c is far from +-1, and `exact_terms`
for pairs whose r^2 and 4 - r^2 both are known to full relative accuracy, in float32 or float64; it
knows the tangent line below `min_distance` too. The fast one leaves constant factors out ("raw"
terms, `PairConstants`).

The forces of close pairs may be beyond float32 where the gradient, scaled by the number of pairs,
is not. For pair functions that reach so far all sums are held in units of 2^range_bits.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl

from ..pair_functions import PairFunction, Riesz

# how a kernel is told the exponent; any s that is not 0, 1 or 2 is a runtime number
LOG: tl.constexpr = tl.constexpr(0)
ONE: tl.constexpr = tl.constexpr(1)
TWO: tl.constexpr = tl.constexpr(2)
POWER: tl.constexpr = tl.constexpr(3)

# unit rows are held as fp16 pairs of 256 v: the low half of an entry of ordinary size stays normal
UNIT_SCALE: tl.constexpr = tl.constexpr(256.0)
COSINE_SCALE: tl.constexpr = tl.constexpr(256.0 * 256.0)

# the smallest distance that unit rows of 48 bits resolve (`direct`), and its square: what is nearer
# is rounding, of rows that are multiples of each other
SMALLEST_CHORD = 2.0**-46
COINCIDENT: tl.constexpr = tl.constexpr(2.0**-92)
# log2 of the largest F' that float32 sums take as it is, and of the unit of larger ones
PLAIN_BITS, RANGE_BITS = 100, 80
# the largest push f' that `direct` adds up, in that unit: over SMALLEST_CHORD still a float32.
# Longer ones end here; what is left of them in the gradient is infinite
LARGEST_PUSH = 2.0**72
# for float64 sums, and what of them goes into a slot
LARGEST: tl.constexpr = tl.constexpr(2.0**127)

# chord below which 2 - 2c (absolute error 2e-7) is not trusted and the near-pair kernel takes over:
# there F' of s = 2 is off by 1e-5, and random rows meet so closely only in some ten dimensions
NEAR_CHORD = 2.0**-2
# fp16 range kept for coefficients: they are at most 2^14 at the near chord, and the typical pair
# (r = sqrt 2) is at most 2^19 times smaller, so that its low half still resolves 2^-19 of it
COEFFICIENT_MAX_BITS = 14
COEFFICIENT_RANGE_BITS = 19


@dataclass(frozen=True)
class PairConstants:
    """A pair function as kernel arguments.

    The true value of a pair is `energy_unit` times the raw one plus `energy_offset`, its true F'
    is `force_unit` times the raw one. For s = 0 the raw value is log2 of `fast_terms`' energy. Sums
    over pairs, in the slots, are in units of 2^`range_bits`; so is what `exact_terms` makes of F',
    and of F where it takes an exponential (2^`value_bits`).
    """

    kind: int
    half_space: bool
    angular: bool
    s: float
    coefficient_bits: float
    energy_unit: float
    energy_offset: float
    force_unit: float
    range_bits: float
    value_bits: float
    near_cosine: float
    min_distance: float
    value_at_min: float
    slope_at_min: float
    push_at_min: float

    def branches(self, with_force: bool, fast: bool) -> dict[str, object]:
        """The constants of a launch that decide what its kernel computes."""
        return {
            "KIND": self.kind,
            "HALF": self.half_space,
            "ANGLE": self.angular,
            "WITH_FORCE": with_force,
            "FAST": fast,
        }

    @property
    def exact(self) -> tuple[float, float, float, float, float, float, float]:
        """What `exact_terms` takes: s, the units, and the tangent line."""
        push = min(self.push_at_min, LARGEST_PUSH)
        return *self.exact64[:-1], push

    @property
    def exact64(self) -> tuple[float, float, float, float, float, float, float]:
        """The same for float64."""
        factor = (self.s or 1.0) * self.value_unit
        tangent = self.min_distance, self.value_at_min, self.slope_at_min, self.push_at_min
        return self.s, self.value_bits, factor, *tangent

    @property
    def range_unit(self) -> float:
        """What turns sums of raw values into what the slots hold."""
        return 2.0**-self.range_bits

    @property
    def value_unit(self) -> float:
        """What turns F as `exact_terms` has it into what the slots hold, but for the raw unit."""
        return 2.0 ** (self.value_bits - self.range_bits)

    @property
    def to_raw(self) -> tuple[float, float, float]:
        """From `exact_terms` to the slots: per energy, offset of the energy, per force."""
        return self.value_unit / self.energy_unit, self.energy_offset, 1.0 / self.force_unit


@lru_cache(maxsize=256)
def pair_constants(pair: PairFunction) -> PairConstants:
    """The kernel arguments of a pair function."""
    assert isinstance(pair, Riesz)
    s, m, half_space, angular = pair.s, pair.min_distance, pair.half_space, pair.angular
    kind = {0.0: LOG, 1.0: ONE, 2.0: TWO}.get(s, POWER).value
    shortest = 2.0 * math.sin(m / 2.0) if angular else m
    # where F' is 2^COEFFICIENT_RANGE_BITS times that of the typical pair; 1/sin is about 1/theta
    reduced = 2.0 ** (-COEFFICIENT_RANGE_BITS / (s + 2.0))
    steep = 2.0 * math.sin(math.pi / 4.0 * reduced) if angular else math.sqrt(2.0) * reduced
    near_chord = max(NEAR_CHORD, steep, shortest)
    bits = 0.0
    energy_unit, energy_offset, force_unit = 1.0, 0.0, max(s, 1.0)
    if kind == LOG.value:
        energy_unit = -math.log(2.0) * (1.0 if angular else 0.5)
        if half_space and not angular:
            # the raw argument is 1 - c^2 = r^2 (4 - r^2) / 4
            energy_offset, force_unit = -math.log(2.0), 1.0
    elif kind == TWO.value and half_space and not angular:
        force_unit = 2.0
    elif kind == POWER.value:
        largest = -(s + 2.0) * math.log2(near_chord)
        if angular:
            theta = 2.0 * math.asin(min(near_chord / 2.0, 1.0))
            largest = -(s + 1.0) * math.log2(theta) - math.log2(max(math.sin(theta), 0.1))
        bits = math.floor(COEFFICIENT_MAX_BITS - largest)
        energy_unit, force_unit = 2.0**-bits, s * 2.0**-bits
    # f'(m), which no push is longer than
    push_bits = math.log2(s or 1.0) - (s + 1.0) * math.log2(m) if m > 0 else math.inf
    far_reaching = push_bits - math.log2(SMALLEST_CHORD) > PLAIN_BITS
    range_bits = float(RANGE_BITS if far_reaching else 0)
    value_bits = range_bits if kind == POWER.value else 0.0
    push = min(_float32_power(push_bits - range_bits), LARGEST.value)
    value = slope = 0.0
    if m > 0:
        value = -math.log(m) if s == 0 else _float32_power(-s * math.log2(m) - value_bits)
        slope = -_float32_power(push_bits - value_bits)
    return PairConstants(
        kind=kind,
        half_space=half_space,
        angular=angular,
        s=s,
        coefficient_bits=bits,
        energy_unit=energy_unit,
        energy_offset=energy_offset,
        force_unit=force_unit,
        range_bits=range_bits,
        value_bits=value_bits,
        near_cosine=1.0 - near_chord**2 / 2.0,
        min_distance=m,
        value_at_min=value,
        slope_at_min=slope,
        push_at_min=push,
    )


def _float32_power(bits: float) -> float:
    """2^bits, infinite where float32 has it so."""
    return 2.0**bits if bits < 128.0 else math.inf


@triton.jit
def rsqrt(x, FAST: tl.constexpr):
    """1/sqrt(x): one special-function instruction where FAST (NVIDIA), portable elsewhere."""
    if x.dtype == tl.float64:
        return 1.0 / tl.sqrt(x)
    elif FAST:
        return tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.rsqrt(x)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1/x, without the range reduction of a division where FAST."""
    if x.dtype == tl.float64:
        return 1.0 / x
    elif FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def log2(x, FAST: tl.constexpr):
    """log2(x); the portable one is about 20 instructions of software."""
    if x.dtype == tl.float64:
        return tl.log2(x)
    elif FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def angle(r2, q2):
    """theta = 2 asin(r/2), from the smaller of r^2 and q^2 = 4 - r^2: accurate at 0 and at pi."""
    z = 0.25 * tl.minimum(r2, q2)
    # asin(sqrt z) / sqrt z on [0, 1/2], within 2.6e-9
    p = 0.126604224 * z - 0.141247549
    p = p * z + 0.111685588
    p = p * z - 0.00881148499
    p = p * z + 0.0362279992
    p = p * z + 0.0440398399
    p = p * z + 0.0750307444
    p = p * z + 0.166666069
    p = p * z + 1.0
    half = tl.sqrt(z) * p
    return tl.where(r2 <= q2, 2.0 * half, 3.141592653589793 - 2.0 * half)


@triton.jit
def fast_side(r2, s, bits, KIND: tl.constexpr, FAST: tl.constexpr):
    """Raw F' and f of one chord."""
    if KIND == ONE:
        y = rsqrt(r2, FAST)
        return y * y * y, y
    elif KIND == TWO:
        y = rsqrt(r2, FAST)
        e = y * y
        return e * e, e
    elif KIND == LOG:
        y = rsqrt(r2, FAST)
        return y * y, r2
    else:
        coefficient = tl.exp2(log2(r2, FAST) * (-0.5 * s - 1.0) + bits)
        return coefficient, coefficient * r2


@triton.jit
def fast_angle_side(t, s, bits, KIND: tl.constexpr, FAST: tl.constexpr):
    """Raw -f'(t) and f(t) of one angle; F' is the former over sin t."""
    if KIND == ONE:
        y = reciprocal(t, FAST)
        return y * y, y
    elif KIND == TWO:
        y = reciprocal(t, FAST)
        e = y * y
        return e * y, e
    elif KIND == LOG:
        return reciprocal(t, FAST), t
    else:
        push = tl.exp2(log2(t, FAST) * (-s - 1.0) + bits)
        return push, push * t


@triton.jit
def fast_terms(
    x,
    s,
    bits,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    ANGLE: tl.constexpr,
    FAST: tl.constexpr,
):
    """Raw F' and F of pairs with x = COSINE_SCALE * c; for LOG the argument of the log2."""
    if ANGLE:
        r2 = 2.0 - x * (2.0 / COSINE_SCALE)
        q2 = 2.0 + x * (2.0 / COSINE_SCALE)
        t = angle(r2, q2)
        cosecant = 2.0 * rsqrt(r2 * q2, FAST)
        push, energy = fast_angle_side(t, s, bits, KIND, FAST)
        if HALF:
            mirrored, mirrored_energy = fast_angle_side(3.141592653589793 - t, s, bits, KIND, FAST)
            push = push - mirrored
            if KIND == LOG:
                energy = energy * mirrored_energy
            else:
                energy = energy + mirrored_energy
        return push * cosecant, energy
    elif HALF and (KIND == LOG or KIND == TWO):
        # f(c) + f(-c) = 1/(1 - c^2), or -log(1 - c^2)/2 - log 2: one special function for both
        c = x * (1.0 / COSINE_SCALE)
        w = 1.0 - c * c
        y = rsqrt(w, FAST)
        e = y * y
        if KIND == LOG:
            return c * e, w
        else:
            return c * (e * e), e
    elif HALF:
        r2 = 2.0 - x * (2.0 / COSINE_SCALE)
        q2 = 2.0 + x * (2.0 / COSINE_SCALE)
        coefficient, energy = fast_side(r2, s, bits, KIND, FAST)
        mirrored, mirrored_energy = fast_side(q2, s, bits, KIND, FAST)
        return coefficient - mirrored, energy + mirrored_energy
    else:
        return fast_side(2.0 - x * (2.0 / COSINE_SCALE), s, bits, KIND, FAST)


@triton.jit
def exact_side(
    r2,
    q2,
    s,
    bits,
    factor,
    m,
    value_at_m,
    slope_at_m,
    push_at_m,
    KIND: tl.constexpr,
    ANGLE: tl.constexpr,
    FAST: tl.constexpr,
):
    """F' and f of one side from r^2 and q^2 = 4 - r^2, in the units of `PairConstants.exact`.

    Below t = m the tangent line; where two rows coincide F' is 0.
    """
    if ANGLE:
        t = angle(r2, q2)
        inverse = reciprocal(t, FAST)
        sine2 = 0.25 * r2 * q2
    else:
        inverse = rsqrt(r2, FAST)
        # r^2 / r, and 0 where that is 0 / 0
        t = r2 * tl.minimum(inverse, 3.0e38)
        sine2 = r2
    if KIND == LOG:
        f = -0.6931471805599453 * log2(t, FAST)
        push = factor * inverse
    elif KIND == ONE:
        f = inverse
        push = factor * inverse * inverse
    elif KIND == TWO:
        f = inverse * inverse
        push = factor * f * inverse
    else:
        f = tl.exp2(-s * log2(t, FAST) - bits)
        push = factor * f * inverse
    f = tl.where(t < m, value_at_m + slope_at_m * (t - m), f)
    # f' is steepest on the tangent line; NaN comes out of the difference of the rows
    push = tl.minimum(push, push_at_m)
    # dt/dc = -1/r or -1/sin theta
    return tl.where(sine2 == 0.0, 0.0, push * rsqrt(sine2, FAST)), f


@triton.jit
def exact_terms(
    r2,
    q2,
    s,
    bits,
    factor,
    m,
    value_at_m,
    slope_at_m,
    push_at_m,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    ANGLE: tl.constexpr,
    FAST: tl.constexpr,
):
    """F' and F of pairs with exact r^2 and q^2 = 4 - r^2, in the units of `exact_side`."""
    slope, value = exact_side(
        r2, q2, s, bits, factor, m, value_at_m, slope_at_m, push_at_m, KIND, ANGLE, FAST
    )
    if HALF:
        mirrored, mirrored_value = exact_side(
            q2, r2, s, bits, factor, m, value_at_m, slope_at_m, push_at_m, KIND, ANGLE, FAST
        )
        slope -= mirrored
        value += mirrored_value
    return slope, value
