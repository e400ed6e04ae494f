// How far the pairs of rows lie apart differently in two spaces, and the gradient in both, in one sweep
// over the pairs i < j:
//
//     S   = 2 sum phi(a_ij, b_ij)     a = <v_i, v_j> of the rows, b = <u_i, u_j> of the projected rows
//     phi = (b - a)^2  or  (arccos b - arccos a)^2
//     G_i = sum_j dphi/da v_j         dS/dp_i = 2 (G_i - v_i <v_i, G_i>) / nu_i,  likewise in u and b
//
// The rows of either space are blocks as in sweep-inl.h, with a Sweep of their own for what is asked of
// them alone: packing, cosines, pushes, the projection onto the tangent space. Two blocks meet in both
// spaces at once. Where one set of rows is projected several times, its cosines are computed once for
// all its projections: they are most of the work where rows are much wider than their projections.
//
// Here two blocks meet; the order of work follows in angle_schedule-inl.h.
#pragma once
#include "blocks-inl.h"
#include "near_pairs-inl.h"
#include "sweep-inl.h"

namespace ISA {
namespace {

// A block of rows in both spaces.
struct TwoSpaces {
    Block *rows;       // [projections], which share all but the forces; a single one where there are none
    Block *projected;  // [projections]
    Stage stage;
};

struct TwoScratches {
    Scratch rows, projected;
    float *slopes;  // [R_TWICE][R] dphi/da, where it is not the same as dphi/db
    bool *near;     // [tile] whether one of its pairs may be near in the rows' space
};

// What all threads share.
struct Differences {
    AngleCall call;
    Sweep rows, projected;
    void (*meet)(const Differences &, TwoScratches &, TwoSpaces &a, TwoSpaces &b);
    int block_rows, block_count;  // of a set
    TwoSpaces *blocks;            // [sets][block_count]
    bool shared;                  // all threads work on every set
    int threads;
    int64_t next;  // the task to be drawn next
};

// arcsin and the inverse of its cosine, for |c| < 1; Cephes' asinf.
INLINE vf arcsine(vf c, vf &inverse_cosine) {
    const vf a = magnitude(c), complement = 1.0f - a;
    const vi large = a > 0.5f;
    const vf half = 0.5f * complement, z = large ? half : a * a;
    const vf x = large ? half * reciprocal_sqrt(half) : a;
    vf p = all(4.2163199048e-2f);
    p = p * z + 2.4181311049e-2f;
    p = p * z + 4.5470025998e-2f;
    p = p * z + 7.4953002686e-2f;
    p = p * z + 1.6666752422e-1f;
    p = p * z * x + x;
    inverse_cosine = reciprocal_sqrt(complement * (1.0f + a));
    const vf arc = large ? 1.57079632679490f - 2.0f * p : p;
    return (vf)((vi)arc | ((vi)c & INT32_MIN));
}

// The two kinds of phi, of which evaluate() gives phi, and the slopes to_a and to_b up to a factor:
// dphi/da = FACTOR to_a / 2, dphi/db = -FACTOR to_b / 2.

struct OfCosines {
    static constexpr double FACTOR = -4;
    static constexpr bool HAS_NEAR = false, ONE_SLOPE = true;  // to_a = to_b
    static INLINE vf evaluate(vf a, vf b, vf &to_a, vf &to_b) {
        to_a = to_b = b - a;
        return to_b * to_b;
    }
};

// By arcsines: those of small cosines keep all digits, where the arccosines are all near pi / 2.
struct OfAngles {
    static constexpr double FACTOR = 4;
    static constexpr bool HAS_NEAR = true, ONE_SLOPE = false;
    static INLINE vf evaluate(vf a, vf b, vf &to_a, vf &to_b) {
        const vf difference = arcsine(a, to_a) - arcsine(b, to_b);
        to_a *= difference;
        to_b *= difference;
        return difference * difference;
    }
};

// --- near pairs: angles from the differences of the rows, in double ----------------------------------

// The angles of row m of a patch, and 1/sin; 0 where a pair coincides or is opposite in this space, for
// then it has no direction to turn in.
INLINE vd exact_angle(const Sweep &sweep, NearPatch &patch, int m, const Block &a, const Block &b,
                      vd &inverse_sine) {
    const vl pushed = apart(sweep, patch, m, a, b);
    const vd close = patch.x[m] + (a.deficit[patch.i + m] + load(b.deficit + patch.j)), far = 4.0 - close;
    const vd sine = 0.5 * square_root(close * far), angle = 2.0 * arctan(square_root(close), square_root(far));
    inverse_sine = pushed & (sine > 0.0) ? 1.0 / sine : vd{};
    return patch.sign[m] < 0.0 ? 3.14159265358979324 - angle : angle;
}

// In both spaces x becomes the coefficient of the force. Returns the sum of phi.
double near_differences(const Differences &all, TwoScratches &scratch, const TwoSpaces &a, const TwoSpaces &b,
                        int s) {
    vd total = {};
    for (int p = 0; p < scratch.rows.patch_count; p++) {
        NearPatch &row_patch = scratch.rows.patches[p], &patch = scratch.projected.patches[p];
        for (int m = 0; m < NEAR_ROWS; m++) {
            const vl near = patch.sign[m] != 0.0;
            vd to_a, to_b;
            const vd angle_a = exact_angle(all.rows, row_patch, m, *a.rows, *b.rows, to_a);
            const vd angle_b = exact_angle(all.projected, patch, m, a.projected[s], b.projected[s], to_b);
            const vd difference = near ? angle_b - angle_a : vd{};
            total += difference * difference;
            row_patch.x[m] = near ? difference * to_a : vd{};
            patch.x[m] = near ? difference * to_b : vd{};
        }
    }
    return sum(total);
}

void near_squares(const Sweep &sweep, Scratch &scratch, const Block &a, const Block &b) {
    for (int q = 0; q < sweep.kp; q += NR) {
        exact_rows(sweep, a, q, scratch.row_used, scratch.exact_rows);
        exact_rows(sweep, b, q, scratch.col_used, scratch.exact_cols);
        add_squares<false>(sweep, scratch, b, q);
    }
}

void near_forces(const Sweep &sweep, Scratch &scratch, Block &a, Block &b) {
    for (int q = 0; q < sweep.kp && sweep.with_gradient; q += NR) {
        exact_rows(sweep, a, q, scratch.row_used, scratch.exact_rows);
        exact_rows(sweep, b, q, scratch.col_used, scratch.exact_cols);
        clear_forces(scratch, a, b);
        add_forces<false>(scratch, scratch.exact_rows, scratch.exact_cols);
        push_near(sweep, a, q, scratch.row_used, scratch.row_force);
        push_near(sweep, b, q, scratch.col_used, scratch.col_force);
    }
    forget_near(scratch, a, b);
}

double repair(const Differences &all, TwoScratches &scratch, TwoSpaces &a, TwoSpaces &b, int s) {
    const int own = all.rows.with_gradient ? s : 0;
    near_squares(all.rows, scratch.rows, *a.rows, *b.rows);
    near_squares(all.projected, scratch.projected, a.projected[s], b.projected[s]);
    const double total = near_differences(all, scratch, a, b, s);
    near_forces(all.rows, scratch.rows, a.rows[own], b.rows[own]);
    near_forces(all.projected, scratch.projected, a.projected[s], b.projected[s]);
    return total;
}

// --- two blocks meet -----------------------------------------------------------------------------------

// Whether a tile's cosines `a` may be of near pairs, by its first row and column.
INLINE bool &near_flag(const TwoScratches &scratch, int i, int j) {
    return scratch.near[i / SHORT * (R_TWICE / NR) + j / NR];
}

// 1 and -1 where a pair is near.
INLINE vf sign_of(vi near, vf c) { return near ? (c < 0.0f ? all(-1.0f) : all(1.0f)) : vf{}; }

// Cosines of a tile become slopes, except those of the rows, which other projections may need. They are
// 0 where a pair does not count, and of near pairs, which are kept for repair().
template <class Phi, bool TO_ROWS, bool WHOLE>
void tile_of_slopes(const Differences &all, TwoScratches &scratch, const Block &a, const Block &b, int i, int j,
                    int rows, Energy &energy) {
    const int vectors = WHOLE ? NV : vectors_of_tile(b, j);
    alignas(64) float row_sign[MR][NR], sign[MR][NR];
    vi near_ones = {};
    vf total = {};
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const int64_t at = (i + m) * R + j + v * VL;
            vf x = load(scratch.rows.c + at), y = load(scratch.projected.c + at);
            vi counts;
            if (!WHOLE) {
                const vi lane = lanes(j + v * VL);
                counts = i + m < a.n ? vi(lane < b.n) : vi{};
                if (&a == &b) counts &= lane > i + m;
                if (Phi::HAS_NEAR) {
                    const vi near = counts & ((magnitude(x) > all.rows.near_cosine) |
                                              (magnitude(y) > all.projected.near_cosine));
                    near_ones |= near;
                    store(row_sign[m] + v * VL, sign_of(near, x));
                    store(sign[m] + v * VL, sign_of(near, y));
                    counts &= ~near;
                }
                x = counts ? x : vf{};
                y = counts ? y : vf{};
            }
            vf to_a, to_b;
            total += Phi::evaluate(x, y, to_a, to_b);  // 0 where both cosines are
            store(scratch.projected.c + at, to_b);
            if (TO_ROWS && !Phi::ONE_SLOPE) store(scratch.slopes + at, to_a);
        }
    energy.add(total);
    if (WHOLE || !Phi::HAS_NEAR || !any(near_ones)) return;
    keep_near(scratch.rows, i, j, rows, vectors * VL, row_sign);
    keep_near(scratch.projected, i, j, rows, vectors * VL, sign);
}

// Cosines of two blocks in one space, tile by tile: done(i, j, rows, near) after each.
template <class Done>
INLINE void each_tile_of_cosines(const Sweep &sweep, const Block &a, const Block &b, float *c, Done done) {
    for (int q = 0; q < sweep.k; q += KC) {
        const int end = sweep.k - q < KC ? sweep.k : q + KC;
        each_tile(a, b, [&](int i, int j, int rows, bool wide) {
            const bool near = tile_of_cosines(sweep, a, b, i, j, rows, wide, q, end, c + i * R + j);
            if (end == sweep.k) done(i, j, rows, near);
        });
    }
}

template <class Phi, bool TO_ROWS>
void meet_in_both(const Differences &all, TwoScratches &scratch, TwoSpaces &a, TwoSpaces &b) {
    each_tile_of_cosines(all.rows, *a.rows, *b.rows, scratch.rows.c,
                         [&](int i, int j, int, bool near) { near_flag(scratch, i, j) = near; });
    for (int s = 0; s < all.call.projections; s++) {
        Block &u = a.projected[s], &v = b.projected[s];
        Energy energy = {};
        each_tile_of_cosines(all.projected, u, v, scratch.projected.c, [&](int i, int j, int rows, bool near) {
            if (inside(u, v, i, j, rows) && !(Phi::HAS_NEAR && (near || near_flag(scratch, i, j))))
                tile_of_slopes<Phi, TO_ROWS, true>(all, scratch, u, v, i, j, rows, energy);
            else
                tile_of_slopes<Phi, TO_ROWS, false>(all, scratch, u, v, i, j, rows, energy);
        });
        u.energy += sum(energy.low + energy.high);
        if (Phi::HAS_NEAR && scratch.rows.patch_count) u.energy += repair(all, scratch, a, b, s);
        if (all.projected.with_gradient) push(all.projected, u, v, u.u, v.u, scratch.projected.c);
        if (TO_ROWS)
            push(all.rows, a.rows[s], b.rows[s], a.rows->u, b.rows->u,
                 Phi::ONE_SLOPE ? scratch.projected.c : scratch.slopes);
    }
}

}  // namespace
}  // namespace ISA
