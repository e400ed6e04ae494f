// The pair functions as functions of the distance t, the chord or the angle; pair_function-inl.h makes
// functions of the cosine of them.
//
// Each is one functor. It is made of the caller's Pair and has
//
//     Energies                  how the energies of a tile add up
//     SMOOTH                    whether f is a smooth function of t^2 at t = 0, too
//     slope()                   the constant factor S that all derivatives leave out
//     of_square(x, e)           x = t^2 -> -2 df/dx / S; e becomes the energy, as Energies adds it
//     curve(x, slope)           4 d2f/dx2 / S, from that slope
//     of_square(x, t, r, ...)   f and both in double; r = 1/t
//     both_ends(c, e, odd)      of_square(2 - 2c) - of_square(2 + 2c), each energy included
//     curve_of_both_ends(c)     the sum of both curves
//     odd_in_cosine()           both_ends by powers of c, and
//     odd_in_angle()            the same of the angle by powers of arcsin c, see Odd
//     second(t, x, slope)       f''(t) / S, from that slope
//
// and difference(), difference_of_angles() where both ends need more than a subtraction. Of the chord,
// x = 2 - 2c: then these are F'(c) / S and F''(c) / S.
//
// To add one: its number in pairwise.h, a functor here, and a line in choose().
#pragma once
#include "pairwise.h"
#include "vector-inl.h"

namespace ISA {
namespace {

// Energies that are added up.
struct Sum {
    vf value = {};

    static INLINE vf nothing() { return vf{}; }
    static INLINE vf both(vf e, vf far_e) { return e + far_e; }
    INLINE void add(vf e) { value += e; }
    INLINE vf result() const { return value; }
};

// Energies -1/2 log(e). Logarithms are not taken pair by pair: mantissas are multiplied and exponents
// added. A tile has MR * NV vectors, so the product stays far below overflow.
struct SumOfLogarithms {
    vf value = all(1.0f);
    vi exponent = {};

    static INLINE vf nothing() { return all(1.0f); }
    static INLINE vf both(vf e, vf far_e) { return e * far_e; }
    INLINE void add(vf e) {
        exponent += ((vi)e >> 23) - 127;
        value *= (vf)(((vi)e & 0x7fffff) | 0x3f800000);
    }
    INLINE vf result() const {
        return -0.34657359028f * (log2_of(value) + __builtin_convertvector(exponent, vf));
    }
};

constexpr double HALF_PI = 1.57079632679489662;

// The difference of both ends by powers of z, where z is small: there the ends almost cancel, and
// their rounding errors do not. Rows in many dimensions are nearly orthogonal, so that most pairs
// are of this kind.
template <int TERMS> struct Odd {
    float a[TERMS];  // of z, z^3, z^5, ...
    float bound;     // of |z|

    INLINE vf operator()(vf z, vf difference) const {
        const vf zz = z * z;
        vf sum = all(a[TERMS - 1]);
#pragma GCC unroll 8
        for (int n = TERMS - 2; n >= 0; n--) sum = a[n] + zz * sum;
        return magnitude(z) < bound ? z * sum : difference;
    }
};

// |z| up to which a series may be used that leaves out the term of z^9, `ratio` z^8 times the first.
inline float reach_of_series(double ratio) { return float(__builtin_pow(6e-8 / ratio, 0.125)); }

// scale ((1 - unit z)^-q - (1 + unit z)^-q), a binomial series.
inline Odd<4> odd_of_powers(double scale, double q, double unit) {
    Odd<4> odd;
    const double first = 2 * scale * q * unit;
    double ratio = 1;  // to the first, which may be 0
    for (int n = 0, m = 1; n < 4; n++, m += 2) {
        odd.a[n] = float(first * ratio);
        ratio *= (q + m) * (q + m + 1) / ((m + 1) * (m + 2)) * unit * unit;
    }
    odd.bound = reach_of_series(ratio);
    return odd;
}

// 2 scale sinh(rate z).
inline Odd<4> odd_of_sinh(double scale, double rate) {
    Odd<4> odd;
    double ratio = 1;
    for (int n = 0, m = 1; n < 4; n++, m += 2) {
        odd.a[n] = float(2 * scale * rate * ratio);
        ratio *= rate * rate / ((m + 1) * (m + 2));
    }
    odd.bound = reach_of_series(ratio);
    return odd;
}

// By the coefficients h of z, z^3, z^5, ... of an angle, the first TERMS and two more: any one may vanish.
template <int TERMS> Odd<TERMS> odd_of_angle(const double *h) {
    Odd<TERMS> odd;
    for (int n = 0; n < TERMS; n++) odd.a[n] = float(h[n]);
    // |z| is at most pi/2
    const double rest = __builtin_fabs(h[TERMS]) + HALF_PI * HALF_PI * __builtin_fabs(h[TERMS + 1]);
    const double first = __builtin_pow(6e-8 * __builtin_fabs(h[0]) / rest, 0.5 / TERMS);
    const double third = __builtin_pow(6e-8 * __builtin_fabs(h[1]) / rest, 0.5 / (TERMS - 1));
    odd.bound = float(first > third ? first : third);
    return odd;
}

// power - far, where power = far exp(w): by a series where both are almost the same.
INLINE vf difference_of_powers(vf power, vf far, vf w) {
    vf p = all(1.0f / 40320);
    p = p * w + 1.0f / 5040;
    p = p * w + 1.0f / 720;
    p = p * w + 1.0f / 120;
    p = p * w + 1.0f / 24;
    p = p * w + 1.0f / 6;
    p = p * w + 0.5f;
    p = p * w + 1.0f;
    return magnitude(w) < 0.5f ? far * (w * p) : power - far;
}

// What most functors take from here; F is the functor itself.
template <class F> struct Functor {
    using Energies = Sum;
    static constexpr bool SMOOTH = false;
    static constexpr int TERMS_OF_ANGLE = 4;  // of odd_in_angle()

    INLINE vf both_ends(vf c, vf &e, const Odd<4> &odd) const {
        const F &f = *(const F *)this;
        const vf x = 2.0f - 2.0f * c, y = 2.0f + 2.0f * c;
        vf far_e;
        const vf slope = f.of_square(x, e), far_slope = f.of_square(y, far_e);
        e = F::Energies::both(e, far_e);
        return odd(c, f.difference(slope, far_slope, x, y));
    }
    // The derivatives of the ends x = t^2 and y, where they are not small: in the cosine, and in the angle.
    static INLINE vf difference(vf slope, vf far_slope, vf, vf) { return slope - far_slope; }
    static INLINE vf difference_of_angles(vf first, vf far_first, vf, vf) { return first - far_first; }
    INLINE vf second(vf, vf x, vf slope) const { return x * ((const F *)this)->curve(x, slope) - slope; }
    INLINE vf curve_of_both_ends(vf c) const {
        const F &f = *(const F *)this;
        const vf x = 2.0f - 2.0f * c, y = 2.0f + 2.0f * c;
        vf unused;
        return f.curve(x, f.of_square(x, unused)) + f.curve(y, f.of_square(y, unused));
    }
};

// --- Riesz' functions, each of the usual exponents by its shortest form ----------------------------

// t^-s, or -t^|s|, whose slope in the angle is t^-(s + 1) and in the cosine t^-(s + 2).
template <class F> struct Riesz : Functor<F> {
    double s;

    explicit Riesz(const Pair &pair) : s(pair.parameters[0]) {}
    double slope() const { return s == 0 ? 1 : __builtin_fabs(s); }
    Odd<4> odd_in_cosine() const { return odd_of_powers(__builtin_exp2(-s / 2 - 1), s / 2 + 1, 1); }
    Odd<4> odd_in_angle() const { return odd_of_powers(__builtin_pow(HALF_PI, -s - 1), s + 1, 1 / HALF_PI); }
};

struct Logarithm : Riesz<Logarithm> {
    using Energies = SumOfLogarithms;

    explicit Logarithm(const Pair &pair) : Riesz(pair) {}

    INLINE vf of_square(vf x, vf &e) const {
        e = x;
        return reciprocal(x);
    }
    INLINE vf curve(vf, vf slope) const { return 2.0f * slope * slope; }
    INLINE vd of_square(vd, vd t, vd r, vd &slope, vd &curve) const {
        slope = r * r;
        curve = 2.0 * slope * slope;
        return -0.69314718055994531 * log2_of(t);
    }

    // both ends share a factor: (2 - 2c)(2 + 2c) = 4 (1 - c^2)
    INLINE vf both_ends(vf c, vf &e, const Odd<4> &) const {
        const vf w = 1.0f - c * c;
        e = 4.0f * w;
        return c * reciprocal(w);
    }
    INLINE vf curve_of_both_ends(vf c) const {
        const vf r = reciprocal(1.0f - c * c), cr = c * r;
        return r + 2.0f * cr * cr;
    }
};

struct Inverse : Riesz<Inverse> {
    explicit Inverse(const Pair &pair) : Riesz(pair) {}

    INLINE vf of_square(vf x, vf &e) const {
        e = reciprocal_sqrt(x);
        return e * e * e;
    }
    INLINE vf curve(vf x, vf slope) const { return 3.0f * slope * reciprocal(x); }
    INLINE vd of_square(vd, vd, vd r, vd &slope, vd &curve) const {
        slope = r * r * r;
        curve = 3.0 * slope * r * r;
        return r;
    }
};

struct InverseSquare : Riesz<InverseSquare> {
    explicit InverseSquare(const Pair &pair) : Riesz(pair) {}

    INLINE vf of_square(vf x, vf &e) const {
        e = reciprocal(x);
        return e * e;
    }
    INLINE vf curve(vf x, vf slope) const { return 4.0f * slope * reciprocal(x); }
    INLINE vd of_square(vd, vd, vd r, vd &slope, vd &curve) const {
        const vd e = r * r;
        slope = e * e;
        curve = 4.0 * slope * e;
        return e;
    }

    // 1/(2 - 2c) + 1/(2 + 2c) = 1/(1 - c^2)
    INLINE vf both_ends(vf c, vf &e, const Odd<4> &) const {
        e = reciprocal(1.0f - c * c);
        return c * e * e;
    }
    INLINE vf curve_of_both_ends(vf c) const {
        const vf r = reciprocal(1.0f - c * c), cr = c * r;
        return r * r + 4.0f * cr * cr * r;
    }
};

struct Power : Riesz<Power> {
    float half_s, growth;

    explicit Power(const Pair &pair) : Riesz(pair), half_s(float(s / 2)), growth(float(s + 2)) {}

    INLINE vf of_square(vf x, vf &e) const {
        e = exp2_of(-half_s * log2_of(x));
        return e * reciprocal(x);
    }
    INLINE vf curve(vf x, vf slope) const { return growth * slope * reciprocal(x); }
    INLINE vd of_square(vd, vd t, vd r, vd &slope, vd &curve) const {
        const vd e = exp2_of(-s * log2_of(t));
        slope = e * r * r;
        curve = (s + 2) * slope * r * r;
        return e;
    }
};

// Any power, of either sign. With s near -2, or by angle near -1, it is nearly constant what a pair
// pushes with: then the ends are almost the same at all cosines, not only at small ones.
struct SignedPower : Riesz<SignedPower> {
    float half_s, growth, sign, rate, rate_of_angle;

    explicit SignedPower(const Pair &pair)
        : Riesz(pair), half_s(float(s / 2)), growth(float(s + 2)), sign(s < 0 ? -1 : 1),
          rate(float(0.69314718055994531 * (s / 2 + 1))), rate_of_angle(float(0.34657359027997265 * (s + 1))) {}

    INLINE vf of_square(vf x, vf &e) const {
        const vf power = exp2_of(-half_s * log2_of(x));
        e = sign * power;
        return power * reciprocal(x);
    }
    INLINE vf curve(vf x, vf slope) const { return growth * slope * reciprocal(x); }
    INLINE vd of_square(vd, vd t, vd r, vd &slope, vd &curve) const {
        // by way of f', which is exactly 1 where s = -1, so that by angle both ends cancel exactly
        const vd first = exp2_of(-(s + 1) * log2_of(t));
        slope = first * r;
        curve = (s + 2) * slope * r * r;
        return t > 0.0 ? double(sign) * first * t : vd{};
    }
    INLINE vf difference(vf slope, vf far_slope, vf x, vf y) const {
        return difference_of_powers(slope, far_slope, rate * (log2_of(y) - log2_of(x)));
    }
    INLINE vf difference_of_angles(vf first, vf far_first, vf x, vf y) const {
        return difference_of_powers(first, far_first, rate_of_angle * (log2_of(y) - log2_of(x)));
    }
    INLINE vf second(vf, vf, vf slope) const { return float(s + 1) * slope; }
};

// One of the above of the distance sqrt(a + t^2).
template <class F> struct Shifted : Functor<Shifted<F>> {
    using Energies = typename F::Energies;
    static constexpr bool SMOOTH = true;
    // for some a the terms of z, or even of z^3, vanish: the others have to be good
    static constexpr int TERMS_OF_ANGLE = 8;
    F f;
    double shift;
    float a;

    explicit Shifted(const Pair &pair) : f(pair), shift(pair.parameters[1]), a(float(shift)) {}
    double slope() const { return f.slope(); }

    INLINE vf of_square(vf x, vf &e) const { return f.of_square(a + x, e); }
    INLINE vf curve(vf x, vf slope) const { return f.curve(a + x, slope); }
    INLINE vd of_square(vd x, vd, vd, vd &slope, vd &curve) const {
        const vd t = square_root(shift + x);
        return f.of_square(shift + x, t, 1.0 / t, slope, curve);
    }
    INLINE vf difference(vf slope, vf far_slope, vf x, vf y) const {
        return f.difference(slope, far_slope, a + x, a + y);
    }

    Odd<4> odd_in_cosine() const {
        const double m = 2 + shift, q = f.s / 2 + 1;
        return odd_of_powers(__builtin_pow(m, -q), q, 2 / m);
    }

    // With t = pi/2 - z: h(z) - h(-z) of h(z) = (pi/2 - z) p^-q, p = a + pi^2/4 - pi z + z^2. The powers
    // of p follow from p (p^-q)' = -q p' p^-q, coefficient by coefficient.
    Odd<TERMS_OF_ANGLE> odd_in_angle() const {
        constexpr int COUNT = TERMS_OF_ANGLE + 2;
        const double p = shift + HALF_PI * HALF_PI, q = f.s / 2 + 1;
        double b[2 * COUNT] = {__builtin_pow(p, -q)}, h[COUNT];
        for (int n = 1; n < 2 * COUNT; n++) {
            b[n] = (2 * HALF_PI * (q + n - 1) * b[n - 1] - (n > 1 ? (2 * q + n - 2) * b[n - 2] : 0)) / (n * p);
            if (n % 2) h[n / 2] = 2 * (HALF_PI * b[n] - b[n - 1]);
        }
        return odd_of_angle<TERMS_OF_ANGLE>(h);
    }
};

// --- the others ------------------------------------------------------------------------------------

struct Gaussian : Functor<Gaussian> {
    static constexpr bool SMOOTH = true;
    static constexpr int TERMS_OF_ANGLE = 8;  // for some tau that of z vanishes, as with a shift
    double tau;
    float rate, twice_tau;  // exp(-tau x) = 2^(rate x)

    explicit Gaussian(const Pair &pair)
        : tau(pair.parameters[0]), rate(float(-1.4426950408889634 * tau)), twice_tau(float(2 * tau)) {}
    double slope() const { return 2 * tau; }

    INLINE vf of_square(vf x, vf &e) const { return e = exp2_of(rate * x); }
    INLINE vf curve(vf, vf slope) const { return twice_tau * slope; }
    INLINE vd of_square(vd x, vd, vd, vd &slope, vd &curve) const {
        slope = exp2_of(-1.4426950408889634 * tau * x);
        curve = 2.0 * tau * slope;
        return slope;
    }

    // 2 exp(-2 tau) sinh(2 tau c)
    Odd<4> odd_in_cosine() const { return odd_of_sinh(__builtin_exp(-2 * tau), 2 * tau); }

    // With t = pi/2 -+ z: 2 exp(-tau (pi^2/4 + z^2)) (pi/2 sinh(pi tau z) - z cosh(pi tau z))
    Odd<TERMS_OF_ANGLE> odd_in_angle() const {
        constexpr int COUNT = TERMS_OF_ANGLE + 2;
        const double w = 2 * HALF_PI * tau;
        double bell[COUNT], waves[COUNT], h[COUNT];
        double bell_term = 2 * __builtin_exp(-tau * HALF_PI * HALF_PI), power = 1;
        for (int n = 0, m = 0; n < COUNT; n++, m += 2) {
            bell[n] = bell_term;
            waves[n] = power * (HALF_PI * w / (m + 1) - 1);
            bell_term *= -tau / (n + 1);
            power *= w * w / ((m + 1) * (m + 2));
        }
        for (int n = 0; n < COUNT; n++) {
            h[n] = 0;
            for (int m = 0; m <= n; m++) h[n] += bell[n - m] * waves[m];
        }
        return odd_of_angle<TERMS_OF_ANGLE>(h);
    }
};

struct Laplace : Functor<Laplace> {
    double tau;
    float rate, steepness;  // exp(-tau t) = 2^(rate t)

    explicit Laplace(const Pair &pair)
        : tau(pair.parameters[0]), rate(float(-1.4426950408889634 * tau)), steepness(float(tau)) {}
    double slope() const { return tau; }

    INLINE vf of_square(vf x, vf &e) const {
        const vf r = reciprocal_sqrt(x);
        e = exp2_of(rate * (x * r));
        return e * r;
    }
    INLINE vf curve(vf x, vf slope) const {
        const vf r = reciprocal_sqrt(x);
        return slope * r * (steepness + r);
    }
    INLINE vd of_square(vd, vd t, vd r, vd &slope, vd &curve) const {
        const vd e = exp2_of(-1.4426950408889634 * tau * t);
        slope = e * r;
        curve = slope * r * (tau + r);
        return e;
    }
    INLINE vf second(vf t, vf, vf slope) const { return steepness * t * slope; }

    // y(c) = exp(-tau r) / tau has (2 - 2c) y'' = y' + tau^2 y, and y' is the slope
    Odd<4> odd_in_cosine() const {
        Odd<4> odd;
        const double start = __builtin_exp(-1.41421356237309505 * tau);
        double y[11] = {0, start * 0.70710678118654752};
        for (int n = 0; n < 9; n++) {
            const double square = n ? tau * tau * y[n] : tau * start;
            y[n + 2] = ((n + 1) * (2 * n + 1) * y[n + 1] + square) / (2 * (n + 1) * (n + 2));
        }
        for (int n = 0, m = 1; n < 4; n++, m += 2) odd.a[n] = float(2 * (m + 1) * y[m + 1]);
        odd.bound = reach_of_series(10 * y[10] / (2 * y[2]));
        return odd;
    }

    // 2 exp(-tau pi/2) sinh(tau z)
    Odd<4> odd_in_angle() const { return odd_of_sinh(__builtin_exp(-HALF_PI * tau), tau); }
};

}  // namespace
}  // namespace ISA
