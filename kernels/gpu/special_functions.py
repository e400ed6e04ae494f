"""The special functions that pair functions are made of, on the GPU.

Each takes float32 or float64. FAST: one instruction of NVIDIA's special-function units, right to
about 22 bits; elsewhere, and in float64, the portable form.
"""

import triton
import triton.language as tl


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
def positive_reciprocal(x, FAST: tl.constexpr):
    """1/x of float32 x > 0: elsewhere the square of rsqrt, which costs less than a division."""
    if FAST:
        return reciprocal(x, FAST)
    else:
        y = rsqrt(x, FAST)
        return y * y


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
def negative_power(x, s, s_head, s_tail, bits, FAST: tl.constexpr):
    """x^-s 2^-bits of x > 0, float32, right to s times what `log2` is right to between 1 and 2.

    x^-s = 2^(-s log2 x) would lose what the logarithm has before its point: of a distance of 1e-4
    four bits. So the exponent of x = 2^e m is multiplied by s apart, without error: s = s_head +
    s_tail where s_head has 16 bits, and `bits` is a whole number.
    """
    representation = x.to(tl.int32, bitcast=True)
    e = ((representation >> 23) - 127).to(tl.float32)
    m = ((representation & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    above = s_head * e
    below = s_tail * e + s * log2(m, FAST)
    # rounded up: the first factor then overflows only where the result does
    whole = tl.ceil(above + below)
    return tl.exp2(-whole - bits) * tl.exp2((whole - above) - below)


@triton.jit
def arcsine_ratio(z):
    """asin(sqrt z) / sqrt z on [0, 1/2], within 2.6e-9."""
    p = 0.126604224 * z - 0.141247549
    p = p * z + 0.111685588
    p = p * z - 0.00881148499
    p = p * z + 0.0362279992
    p = p * z + 0.0440398399
    p = p * z + 0.0750307444
    p = p * z + 0.166666069
    return p * z + 1.0


@triton.jit
def angle(r2, q2):
    """theta = 2 asin(r/2), from the smaller of r^2 and q^2 = 4 - r^2: accurate at 0 and at pi."""
    z = 0.25 * tl.minimum(r2, q2)
    half = tl.sqrt(z) * arcsine_ratio(z)
    return tl.where(r2 <= q2, 2.0 * half, 3.141592653589793 - 2.0 * half)


@triton.jit
def arcsine(c):
    """asin c, pi/2 less the angle of the cosine: accurate at 0, where pi/2 would cost digits."""
    size = tl.abs(c)
    steep = size > 0.70710678
    z = tl.where(steep, 0.5 - 0.5 * size, size * size)
    value = tl.where(steep, tl.sqrt(z), size) * arcsine_ratio(z)
    value = tl.where(steep, 1.5707963267948966 - 2.0 * value, value)
    return tl.where(c < 0.0, -value, value)
