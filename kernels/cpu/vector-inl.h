// Vectors of this unit's instruction set, written with the compiler's vector extensions; intrinsics
// only where those have no operator. No standard library: a template shared between units could be
// merged by the linker and carry AVX-512 code to a processor without it.
#pragma once
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(NEON)
#include <arm_neon.h>
#endif

// The unit that includes this names its instruction set: it becomes a namespace.
#ifndef ISA
#define ISA baseline
#endif
#define INLINE inline __attribute__((always_inline))

namespace ISA {
namespace {

// Without AVX2 and NEON nothing here is one processor's: the baseline unit is built for any.

// A tile is MR rows x NV vectors of columns: its accumulators are most of the 16 registers, or 32.
#if defined(__AVX512F__)
constexpr int VL = 16, MR = 12;
#elif defined(__AVX2__)
constexpr int VL = 8, MR = 6;
#elif defined(NEON)
constexpr int VL = 4, MR = 12;
#else
constexpr int VL = 4, MR = 6;
#endif
constexpr int NV = 2, NR = NV * VL;

typedef float vf __attribute__((vector_size(4 * VL), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * VL), may_alias));

// half as many doubles, integers of their size, and floats of their number
typedef double vd __attribute__((vector_size(4 * VL), may_alias));
typedef int64_t vl __attribute__((vector_size(4 * VL), may_alias));
typedef float vh __attribute__((vector_size(2 * VL), may_alias));
typedef vh anywhere __attribute__((aligned(4)));

INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE void store(float *p, vf x) { *(vf *)p = x; }
INLINE vf all(float x) { return vf{} + x; }
INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

INLINE vd load(const double *p) { return *(const vd *)p; }
INLINE void store(double *p, vd x) { *(vd *)p = x; }
INLINE vd all(double x) { return vd{} + x; }

// Floats as doubles, and back; by name, because gcc would convert either half apart.
INLINE vd to_doubles(vh x) {
#if defined(__AVX512F__)
    return (vd)_mm512_maskz_cvtps_pd(-1, (__m256)x);
#elif defined(__AVX2__)
    return (vd)_mm256_cvtps_pd((__m128)x);
#else
    return __builtin_convertvector(x, vd);
#endif
}

INLINE vh to_floats(vd x) {
#if defined(__AVX512F__)
    return (vh)_mm512_maskz_cvtpd_ps(-1, (__m512d)x);
#elif defined(__AVX2__)
    return (vh)_mm256_cvtpd_ps((__m256d)x);
#else
    return __builtin_convertvector(x, vh);
#endif
}

// The halves of a vector of floats as doubles.
INLINE vd lower(vf x) { return to_doubles(*(vh *)&x); }
INLINE vd upper(vf x) { return to_doubles(*((vh *)&x + 1)); }

INLINE vi lanes(int first) {
    vi x;
    for (int l = 0; l < VL; l++) x[l] = first + l;
    return x;
}

// Floats as doubles: VL / 2 of them, or the first n where n is smaller and 0 in the other lanes.
INLINE vd widen(const float *p) { return to_doubles(*(const vh *)p); }
INLINE vd widen_anywhere(const float *p) { return to_doubles(*(const anywhere *)p); }
INLINE vd widen(const float *p, int n) {
    if (n >= VL / 2) return widen_anywhere(p);
#if defined(__AVX512F__)
    return to_doubles((vh)_mm256_maskz_loadu_ps(n > 0 ? (1 << n) - 1 : 0, p));
#else
    vd x = {};
    for (int l = 0; l < n; l++) x[l] = p[l];
    return x;
#endif
}

// And back.
INLINE void narrow(float *p, vd x) { *(vh *)p = to_floats(x); }
INLINE void narrow(float *p, vd x, int n) {
    if (n >= VL / 2) {
        *(anywhere *)p = to_floats(x);
        return;
    }
#if defined(__AVX512F__)
    _mm256_mask_storeu_ps(p, n > 0 ? (1 << n) - 1 : 0, (__m256)to_floats(x));
#else
    for (int l = 0; l < n; l++) p[l] = float(x[l]);
#endif
}

// The first halves of a and b lane by lane, a0 b0 a1 b1 ..., and the second ones.
#if defined(__AVX512F__)
#define FIRST_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SECOND_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define FIRST_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define SECOND_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FIRST_HALVES 0, 4, 1, 5
#define SECOND_HALVES 2, 6, 3, 7
#endif
#if defined(__clang__)
INLINE vf first_halves(vf a, vf b) { return __builtin_shufflevector(a, b, FIRST_HALVES); }
INLINE vf second_halves(vf a, vf b) { return __builtin_shufflevector(a, b, SECOND_HALVES); }
#else
INLINE vf first_halves(vf a, vf b) { return __builtin_shuffle(a, b, vi{FIRST_HALVES}); }
INLINE vf second_halves(vf a, vf b) { return __builtin_shuffle(a, b, vi{SECOND_HALVES}); }
#endif

// Transposes a matrix of ROWS rows, both of its sizes powers of two, which fills the vectors row by row.
template <int ROWS, int COUNT> INLINE void transpose(vf (&x)[COUNT]) {
    // of a place's number, the bits of its row stand first; each step moves one of them to the end
#pragma GCC unroll 4
    for (int rows = ROWS; rows > 1; rows /= 2) {
        vf y[COUNT];
#pragma GCC unroll 16
        for (int i = 0; i < COUNT / 2; i++) {
            y[2 * i] = first_halves(x[i], x[i + COUNT / 2]);
            y[2 * i + 1] = second_halves(x[i], x[i + COUNT / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < COUNT; i++) x[i] = y[i];
    }
}

// Asks for memory that will be wanted soon; harmless where there is none.
INLINE void prefetch(const float *p, int count) {
    for (int l = 0; l < count; l += 16) __builtin_prefetch(p + l);  // a cache line
}

INLINE double sum(vd x) {
    double total[VL / 2];
    for (int l = 0; l < VL / 2; l++) total[l] = x[l];
    for (int n = VL / 4; n; n /= 2)
        for (int l = 0; l < n; l++) total[l] += total[l + n];
    return total[0];
}

// The larger ones; x is left out where it is NaN.
INLINE vf maximum(vf x, vf y) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_max_ps(-1, (__m512)x, (__m512)y);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)x, (__m256)y);
#elif defined(NEON)
    return (vf)vmaxnmq_f32((float32x4_t)x, (float32x4_t)y);
#else
    return x > y ? x : y;
#endif
}

INLINE float largest(vf x) {
#if defined(__AVX512F__)
    const __m256 half = _mm256_max_ps(*(__m256 *)&x, *((__m256 *)&x + 1));
#elif defined(__AVX2__)
    const __m256 half = (__m256)x;
#endif
#if defined(__AVX2__)
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
#else
    float most = x[0];
    for (int l = 1; l < VL; l++) most = x[l] > most ? x[l] : most;
    return most;
#endif
}

// A bit for each lane of a mask.
INLINE uint32_t bits(vi mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask);
#else
    uint32_t set = 0;
    for (int l = 0; l < VL; l++) set |= uint32_t(mask[l] & 1) << l;
    return set;
#endif
}

// Whether a mask has a lane set.
INLINE bool any(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask);
#elif defined(NEON)
    return vmaxvq_u32((uint32x4_t)mask);
#else
    int bits = 0;
    for (int l = 0; l < VL; l++) bits |= mask[l];
    return bits;
#endif
}

// 1/x and 1/sqrt(x): the processor's estimate and one step of Newton (AVX-512: 14 bits to start
// from), one of Halley (AVX2: 11.5 bits) or two of Newton (NEON: 8 bits), the last one in residual
// form so that only its rounding is left.
INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
    vf r = (vf)_mm512_maskz_rcp14_ps(-1, (__m512)x);
    return r + r * (1.0f - x * r);
#elif defined(__AVX2__)
    vf r = (vf)_mm256_rcp_ps((__m256)x), e = 1.0f - x * r;
    return r + r * (e + e * e);
#elif defined(NEON)
    vf r = (vf)vrecpeq_f32((float32x4_t)x);
    r *= (vf)vrecpsq_f32((float32x4_t)x, (float32x4_t)r);
    return r + r * (1.0f - x * r);
#else
    return 1.0f / x;
#endif
}

INLINE vf reciprocal_sqrt(vf x) {
#if defined(__AVX512F__)
    vf r = (vf)_mm512_maskz_rsqrt14_ps(-1, (__m512)x);
    return r + 0.5f * r * (1.0f - x * r * r);
#elif defined(__AVX2__)
    vf r = (vf)_mm256_rsqrt_ps((__m256)x), e = 1.0f - x * r * r;
    return r + r * e * (0.5f + 0.375f * e);
#elif defined(NEON)
    vf r = (vf)vrsqrteq_f32((float32x4_t)x);
    r *= (vf)vrsqrtsq_f32((float32x4_t)(x * r), (float32x4_t)r);
    return r + 0.5f * r * (1.0f - x * r * r);
#else
    for (int l = 0; l < VL; l++) x[l] = __builtin_sqrtf(x[l]);
    return 1.0f / x;
#endif
}

// log2 of a positive normal number: exponent, and Cephes' logf polynomial on [sqrt(1/2), sqrt(2)).
INLINE vf log2_of(vf x) {
    vi exponent = ((vi)x - 0x3f3504f3) >> 23;
    vf t = (vf)((vi)x - (exponent << 23)) - 1.0f, z = t * t;
    vf p = all(7.0376836292e-2f);
    p = p * t - 1.1514610310e-1f;
    p = p * t + 1.1676998740e-1f;
    p = p * t - 1.2420140846e-1f;
    p = p * t + 1.4249322787e-1f;
    p = p * t - 1.6668057665e-1f;
    p = p * t + 2.0000714765e-1f;
    p = p * t - 2.4999993993e-1f;
    p = p * t + 3.3333331174e-1f;
    vf ln = t * z * p - 0.5f * z + t;
    return __builtin_convertvector(exponent, vf) + ln * 1.44269504088896341f;
}

// 2^x, infinite from 128 on; Cephes' exp2f.
INLINE vf exp2_of(vf x) {
    x = x < -126.0f ? all(-126.0f) : x;
    x = x > 128.0f ? all(128.0f) : x;
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
    vf shifted = x + ROUND;
    vi n = (vi)shifted - 0x4b400000;
    vf t = x - (shifted - ROUND);
    vf p = all(1.535336188319500e-4f);
    p = p * t + 1.339887440266574e-3f;
    p = p * t + 9.618437357674640e-3f;
    p = p * t + 5.550332471162809e-2f;
    p = p * t + 2.402264791363012e-1f;
    p = p * t + 6.931472028550421e-1f;
    p = p * t + 1.0f;
    return (vf)((vi)p + (n << 23));
}

// arccos and 1/sin of the angle, for |c| < 1; Abramowitz and Stegun 4.4.46, error 2e-8.
INLINE vf arccos(vf c, vf &inverse_sine) {
    vf a = magnitude(c), p = all(-0.0012624911f);
    p = p * a + 0.0066700901f;
    p = p * a - 0.0170881256f;
    p = p * a + 0.0308918810f;
    p = p * a - 0.0501743046f;
    p = p * a + 0.0889789874f;
    p = p * a - 0.2145988016f;
    p = p * a + 1.5707963050f;
    vf r = reciprocal_sqrt(1.0f - a), angle = (1.0f - a) * r * p;
    inverse_sine = r * reciprocal_sqrt(1.0f + a);
    return c < 0.0f ? 3.14159265358979f - angle : angle;
}

// The same for doubles, to about 1e-10: near pairs end up in float32.

INLINE vd square_root(vd x) {
#if defined(__AVX512F__)
    return (vd)_mm512_maskz_sqrt_pd(-1, (__m512d)x);
#elif defined(__AVX2__)
    return (vd)_mm256_sqrt_pd((__m256d)x);
#elif defined(NEON)
    return (vd)vsqrtq_f64((float64x2_t)x);
#else
    for (int l = 0; l < VL / 2; l++) x[l] = __builtin_sqrt(x[l]);
    return x;
#endif
}

// z + w z / 3 + w^2 z / 5 + ...: artanh z for w = z^2, arctan z for w = -z^2.
template <int TERMS> INLINE vd odd_series(vd z, vd w) {
    vd p = all(1.0 / (2 * TERMS - 1));
#pragma GCC unroll 12
    for (int n = TERMS - 1; n; n--) p = p * w + 1.0 / (2 * n - 1);
    return p * z;
}

// log2 of a normal number, -infinity of 0: exponent, and artanh on [sqrt(1/2), sqrt(2)).
INLINE vd log2_of(vd x) {
    constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52: in its last bits stands an integer
    vl exponent = ((vl)x - 0x3fe6a09e667f3bcd) >> 52;
    vd m = (vd)((vl)x - (exponent << 52)), z = (m - 1.0) / (m + 1.0);
    vd whole = (vd)((vl)all(ROUND) + exponent) - ROUND;
    vd result = whole + 2.8853900817779268 * odd_series<7>(z, z * z);
    return x > 0.0 ? result : all(-__builtin_inf());
}

// 2^x, infinite from 1024 on: the exponential series on [-1/2, 1/2].
INLINE vd exp2_of(vd x) {
    constexpr double ROUND = 6755399441055744.0;
    x = x < -1022.0 ? all(-1022.0) : x;
    x = x > 1024.0 ? all(1024.0) : x;
    vd shifted = x + ROUND, t = (x - (shifted - ROUND)) * 0.69314718055994531, p = all(1.0);
#pragma GCC unroll 10
    for (int n = 10; n; n--) p = p * t * (1.0 / n) + 1.0;
    return (vd)((vl)p + (((vl)shifted - (vl)all(ROUND)) << 52));
}

// arctan of y / x for 0 <= y <= x, x > 0.
INLINE vd arctan(vd y, vd x) {
    const vl large = y > 0.41421356237309505 * x;  // tan(pi/8)
    const vd z = (large ? y - x : y) / (large ? y + x : x);
    return (large ? all(0.78539816339744831) : vd{}) + odd_series<12>(z, -z * z);
}

}  // namespace
}  // namespace ISA
