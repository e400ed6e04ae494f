// The pair functions: in float32 on tiles of cosines, in double on near pairs and antipodes.
//
// A pair function is one functor. It is made of the caller's Pair and has
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
//
// Of the chord, x = 2 - 2c: then these are F'(c) / S and F''(c) / S.
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

// The difference of both ends by powers of z, where z is small: there the ends almost cancel, and
// their rounding errors do not. Rows in many dimensions are nearly orthogonal, so that most pairs
// are of this kind.
struct Odd {
    float a[4];   // of z, z^3, z^5, z^7
    float bound;  // of |z|

    INLINE vf operator()(vf z, vf difference) const {
        const vf zz = z * z;
        return magnitude(z) < bound ? z * (a[0] + zz * (a[1] + zz * (a[2] + zz * a[3]))) : difference;
    }
};

// |z| up to which a series may be used that leaves out the term of z^9, `ratio` z^8 times the first.
inline float reach_of_series(double ratio) { return float(__builtin_pow(6e-8 / ratio, 0.125)); }

// scale ((1 - unit z)^-q - (1 + unit z)^-q), a binomial series.
inline Odd odd_of_powers(double scale, double q, double unit) {
    Odd odd;
    const double first = 2 * scale * q * unit;
    double term = first;
    for (int n = 0, m = 1; n < 4; n++, m += 2) {
        odd.a[n] = float(term);
        term *= (q + m) * (q + m + 1) / ((m + 1) * (m + 2)) * unit * unit;
    }
    odd.bound = reach_of_series(term / first);
    return odd;
}

constexpr double HALF_PI = 1.57079632679489662;

// What most functors take from here; F is the functor itself.
template <class F> struct Functor {
    using Energies = Sum;
    static constexpr bool SMOOTH = false;

    INLINE vf both_ends(vf c, vf &e, const Odd &odd) const {
        const F &f = *(const F *)this;
        vf far_e;
        const vf slope = f.of_square(2.0f - 2.0f * c, e), far_slope = f.of_square(2.0f + 2.0f * c, far_e);
        e = F::Energies::both(e, far_e);
        return odd(c, slope - far_slope);
    }
    INLINE vf curve_of_both_ends(vf c) const {
        const F &f = *(const F *)this;
        const vf x = 2.0f - 2.0f * c, y = 2.0f + 2.0f * c;
        vf unused;
        return f.curve(x, f.of_square(x, unused)) + f.curve(y, f.of_square(y, unused));
    }
};

// --- Riesz' functions, each of the usual exponents by its shortest form ----------------------------

// t^-s, whose slope in the angle is t^-(s + 1) and in the cosine t^-(s + 2).
template <class F> struct Riesz : Functor<F> {
    double s;

    explicit Riesz(const Pair &pair) : s(pair.parameters[0]) {}
    double slope() const { return s > 0 ? s : 1; }
    Odd odd_in_cosine() const { return odd_of_powers(__builtin_exp2(-s / 2 - 1), s / 2 + 1, 1); }
    Odd odd_in_angle() const { return odd_of_powers(__builtin_pow(HALF_PI, -s - 1), s + 1, 1 / HALF_PI); }
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
    INLINE vf both_ends(vf c, vf &e, const Odd &) const {
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
    INLINE vf both_ends(vf c, vf &e, const Odd &) const {
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

// --- the others ------------------------------------------------------------------------------------

struct Gaussian : Functor<Gaussian> {
    static constexpr bool SMOOTH = true;
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
    Odd odd_in_cosine() const {
        Odd odd;
        const double first = 4 * tau * __builtin_exp(-2 * tau);
        double term = first;
        for (int n = 0, m = 1; n < 4; n++, m += 2) {
            odd.a[n] = float(term);
            term *= 4 * tau * tau / ((m + 1) * (m + 2));
        }
        odd.bound = reach_of_series(term / first);
        return odd;
    }

    // With t = pi/2 -+ z: 2 exp(-tau (pi^2/4 + z^2)) (pi/2 sinh(pi tau z) - z cosh(pi tau z))
    Odd odd_in_angle() const {
        Odd odd;
        const double w = 2 * HALF_PI * tau;
        double bell[4], waves[4], bell_term = 2 * __builtin_exp(-tau * HALF_PI * HALF_PI), power = 1;
        for (int n = 0, m = 0; n < 4; n++, m += 2) {
            bell[n] = bell_term;
            waves[n] = power * (HALF_PI * w / (m + 1) - 1);
            bell_term *= -tau / (n + 1);
            power *= w * w / ((m + 1) * (m + 2));
        }
        for (int n = 0; n < 4; n++) {
            double sum = 0;
            for (int m = 0; m <= n; m++) sum += bell[n - m] * waves[m];
            odd.a[n] = float(sum);
        }
        odd.bound = float(0.4 / w < 0.7 ? 0.4 / w : 0.7);
        return odd;
    }
};

// --- the pair function of a cosine -----------------------------------------------------------------

template <class F, bool HALF, bool ANGULAR> struct PairFunction {
    static constexpr bool TWO_ENDED = HALF || ANGULAR;  // near pairs at c = -1, too
    using Energies = typename F::Energies;

    const F f;
    const Tangent &tangent;
    const double slope;
    const Odd odd;

    explicit PairFunction(const Pair &pair)
        : f(pair), tangent(pair.tangent), slope(f.slope()), odd(odd_of(f)) {}

    // Energies and F'(c) / slope of VL pairs.
    INLINE vf evaluate(vf c, vf &e) const {
        if (!ANGULAR && !HALF) return f.of_square(2.0f - 2.0f * c, e);
        if (!ANGULAR) return f.both_ends(c, e, odd);
        vf inverse_sine, far_e;
        const vf t = arccos(c, inverse_sine), far_t = 3.14159265358979f - t;
        vf first = f.of_square(t * t, e) * t;
        if (HALF) {
            first = odd(elevation(c, t), first - f.of_square(far_t * far_t, far_e) * far_t);
            e = Energies::both(e, far_e);
        }
        return first * inverse_sine;
    }

    // F'(c) / slope and F''(c) / slope of VL pairs.
    INLINE vf derivatives(vf c, vf &second) const {
        vf unused;
        if (!ANGULAR && !HALF) {
            const vf x = 2.0f - 2.0f * c, first = f.of_square(x, unused);
            second = f.curve(x, first);
            return first;
        }
        if (!ANGULAR) {
            second = f.curve_of_both_ends(c);
            return f.both_ends(c, unused, odd);
        }
        // dt/dc = -1/sin, d2t/dc2 = -c/sin^3; f'' = t^2 curve - slope
        vf inverse_sine;
        const vf t = arccos(c, inverse_sine), far_t = 3.14159265358979f - t, x = t * t, y = far_t * far_t;
        const vf slope = f.of_square(x, unused);
        vf first = slope * t;
        second = x * f.curve(x, slope) - slope;
        if (HALF) {
            const vf far_slope = f.of_square(y, unused);
            first = odd(elevation(c, t), first - far_slope * far_t);
            second += y * f.curve(y, far_slope) - far_slope;
        }
        first *= inverse_sine;
        second = (second + first * c) * (inverse_sine * inverse_sine);
        return first;
    }

    // Energy, F' / slope and F'' / slope in double, from x = 2 - 2c and y = 2 + 2c, each exact where it is small.
    // Where two directions coincide there is no way to push: derivatives of what has a kink there are 0.
    // Where they almost do they may be infinite, which times 0 would be NaN: so they end far beyond
    // what float32 shows of them.
    INLINE vd exact(vd x, vd y, bool both_ends, vd &first, vd &second) const {
        const vd root = square_root(x), far_root = square_root(y);
        vd e, far_first, far_second;
        if (ANGULAR) {
            const vl close = x < y;
            const vd angle = 2.0 * arctan(close ? root : far_root, close ? far_root : root);
            const vd t = close ? angle : 3.14159265358979324 - angle;
            const vd far_t = close ? 3.14159265358979324 - angle : angle, sine = root * far_root / 2.0;
            e = at_distance(t * t, t, first, second);
            second = t * t * second - first;
            first *= t;
            if (both_ends) {
                e += at_distance(far_t * far_t, far_t, far_first, far_second);
                second += far_t * far_t * far_second - far_first;
                first -= far_first * far_t;
            }
            first /= sine;
            second = (second + first * ((y - x) / 4.0)) / (sine * sine);
            first = sine > 0.0 ? first : vd{};
            second = sine > 0.0 ? second : vd{};
        } else {
            e = at_distance(x, root, first, second);
            first = F::SMOOTH || root > 0.0 ? first : vd{};
            second = F::SMOOTH || root > 0.0 ? second : vd{};
            if (both_ends) {
                e += at_distance(y, far_root, far_first, far_second);
                first -= F::SMOOTH || far_root > 0.0 ? far_first : vd{};
                second += F::SMOOTH || far_root > 0.0 ? far_second : vd{};
            }
        }
        first = bounded(first);
        second = bounded(second);
        return e;
    }

    INLINE vd near(vd x, vd y, vd &first, vd &second) const { return exact(x, y, HALF, first, second); }

    // f alone, between a row and its antipode.
    double antipode(double x, double y, double &first, double &second) const {
        vd slope, curve;
        const vd e = exact(all(x), all(y), false, slope, curve);
        first = slope[0];
        second = curve[0];
        return e[0];
    }

  private:
    static Odd odd_of(const F &f) {
        if (!HALF) return {};
        return ANGULAR ? f.odd_in_angle() : f.odd_in_cosine();
    }

    // arcsin c for t = arccos c: by its series where the difference has lost its digits.
    static INLINE vf elevation(vf c, vf t) {
        const vf cc = c * c;
        const vf series = c * (1.0f + cc * (1.0f / 6 + cc * (3.0f / 40 + cc * (5.0f / 112))));
        return magnitude(c) < 0.125f ? series : 1.57079632679489662f - t;
    }

    static INLINE vd bounded(vd x) {
        constexpr double MOST = 0x1p990;  // with room for sums
        return x > MOST ? all(MOST) : x < -MOST ? all(-MOST) : x;
    }

    // f and its derivatives in x = t^2, as the functor gives them, the tangent included.
    INLINE vd at_distance(vd x, vd t, vd &first, vd &second) const {
        const vd r = 1.0 / t;
        const vd e = f.of_square(x, t, r, first, second);
        const vl below = t < tangent.at;
        const vd line = -tangent.slope / slope * r;
        first = below ? line : first;
        second = below ? line * r * r : second;
        return below ? tangent.value + tangent.slope * (t - tangent.at) : e;
    }
};

}  // namespace
}  // namespace ISA
