// The pair function of a cosine: what distance_functions-inl.h gives of a distance, in full and half
// space, by chord and angle; in float32 on tiles of cosines, in double on near pairs and antipodes.
#pragma once
#include "distance_functions-inl.h"
#include "pairwise.h"
#include "vector-inl.h"

namespace ISA {
namespace {

template <class F, bool HALF, bool ANGULAR> struct PairFunction {
    static constexpr bool TWO_ENDED = HALF || ANGULAR;  // near pairs at c = -1, too
    using Energies = typename F::Energies;
    using OddPart = Odd<ANGULAR ? F::TERMS_OF_ANGLE : 4>;

    const F f;
    const Tangent &tangent;
    const double slope;
    const OddPart odd;

    explicit PairFunction(const Pair &pair)
        : f(pair), tangent(pair.tangent), slope(f.slope()), odd(odd_of(f)) {}

    // Energies and F'(c) / slope of VL pairs.
    INLINE vf evaluate(vf c, vf &e) const {
        if (!ANGULAR && !HALF) return f.of_square(2.0f - 2.0f * c, e);
        if constexpr (!ANGULAR) return f.both_ends(c, e, odd);
        vf inverse_sine, far_e;
        const vf t = arccos(c, inverse_sine), far_t = 3.14159265358979f - t;
        const vf x = t * t, y = far_t * far_t;
        vf first = f.of_square(x, e) * t;
        if (HALF) {
            first = odd(elevation(c, t), f.difference_of_angles(first, f.of_square(y, far_e) * far_t, x, y));
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
        if constexpr (!ANGULAR) {
            second = f.curve_of_both_ends(c);
            return f.both_ends(c, unused, odd);
        }
        // dt/dc = -1/sin, d2t/dc2 = -c/sin^3
        vf inverse_sine;
        const vf t = arccos(c, inverse_sine), far_t = 3.14159265358979f - t, x = t * t, y = far_t * far_t;
        const vf slope = f.of_square(x, unused);
        vf first = slope * t;
        second = f.second(t, x, slope);
        if (HALF) {
            const vf far_slope = f.of_square(y, unused);
            first = odd(elevation(c, t), f.difference_of_angles(first, far_slope * far_t, x, y));
            second += f.second(far_t, y, far_slope);
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
    static OddPart odd_of(const F &f) {
        if constexpr (!HALF)
            return {};
        else if constexpr (ANGULAR)
            return f.odd_in_angle();
        else
            return f.odd_in_cosine();
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
