// Second order: the derivative H t of the gradient along tangents t, by the same walk over the pairs.
// With a dot for the derivative along the tangents, and tau_i = <v_i, t_i>:
//
//     v.  = (t - v tau) / nu          c.  = <v_i., v_j> + <v_i, v_j.>
//     G_i. = sum_j F''(c) c. v_j + F'(c) v_j.
//     (H t)_i = (G_i. + o_i v_i. + o_i. v_i) / nu_i - gradient_i tau_i / nu_i,     o_i = -<v_i, G_i>
//
// G itself is not needed but for o, a sum over cosines, because the caller knows the gradient: seven
// products of k columns a pair, where the gradient takes three.
#pragma once
#include "blocks-inl.h"
#include "near_pairs-inl.h"
#include "rows-inl.h"
#include "sweep-inl.h"

namespace ISA {
namespace {

// Columns q.. of v. of row i.
struct Dot {
    const float *raw, *tangent;
    double inverse, tau;
    int k;
    INLINE vd operator()(int q) const {
        const vd v = inverse * widen(raw + q, k - q);
        return inverse * (widen(tangent + q, k - q) - tau * v);
    }
};

INLINE Dot dot_of(const Sweep &sweep, const Block &block, int i, const float *raw) {
    return {raw, block.tangent + int64_t(i) * sweep.k, block.inverse[i], block.tau[i], sweep.k};
}

// After prepare().
void prepare_twice(const Sweep &sweep, Scratch &scratch, Block &block) {
    const int k = sweep.k;
    for (int i = 0; i < block.n; i++) {
        const float *raw = raw_row(sweep, block, i, 0, k, scratch.raw), *tangent = block.tangent + int64_t(i) * k;
        vd along = {};
        for (int q = 0; q < k; q += VL / 2) along += widen(raw + q, k - q) * widen(tangent + q, k - q);
        block.tau[i] = block.inverse[i] * sum(along);
        block.outward[i] = block.axial_dot[i] = 0;
        const Dot dot = dot_of(sweep, block, i, raw);
        pack(sweep, block, block.u_dot, i, [&](int q, int) { return dot(q); });
    }
    transpose(sweep, block, block.u_dot, block.ut_dot);
}

// A tile of c., summed over q0 <= q < q1.
template <int M, int V>
void cosine_dots(const Sweep &sweep, const Block &a, const Block &b, int i0, int j0, int q0, int q1, float *c) {
    vf acc[M][V];
    load_tile(acc, q0 ? c : nullptr);
    multiply(sweep, acc, a, a.u_dot, b.ut, i0, j0, q0, q1);
    multiply(sweep, acc, a, a.u, b.ut_dot, i0, j0, q0, q1);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) store(c + m * R + v * VL, acc[m][v]);
}

// Cosines become F', their derivatives F'' c., and both sides keep the sums of F' c.
template <class F, bool WHOLE>
bool tile_twice(const F &f, const Sweep &sweep, Scratch &scratch, const Block &a, const Block &b, int i, int j,
                int rows) {
    const int vectors = WHOLE ? NV : vectors_of_tile(b, j);
    alignas(64) float sign[MR][NR] = {};
    vi near_ones = {}, others = {};
    vf col_sums[NV] = {};
    for (int m = 0; m < rows; m++) {
        float *c = scratch.c + (i + m) * R + j, *c_dot = scratch.c_dot + (i + m) * R + j;
        vf row_sum = {};
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const vf x = load(c + v * VL);
            const vi counts =
                WHOLE ? vi{} : counted<F>(sweep, a, b, i + m, j + v * VL, x, sign[m] + v * VL, near_ones);
            vf second, first = f.derivatives(WHOLE || counts ? x : vf{}, second);
            second *= load(c_dot + v * VL);
            if (!WHOLE) {
                others |= counts;
                first = counts ? first : vf{};
                second = counts ? second : vf{};
            }
            store(c + v * VL, first);
            store(c_dot + v * VL, second);
            const vf axial = first * x;
            row_sum += axial;
            col_sums[v] += axial;
        }
        float *sums = scratch.row_sums + (i + m) * VL;
        store(sums, load(sums) + row_sum);
    }
    for (int v = 0; v < vectors; v++) {
        float *sums = scratch.col_sums + j + v * VL;
        store(sums, load(sums) + col_sums[v]);
    }
    if (!WHOLE && any(near_ones)) keep_near(scratch, i, j, rows, vectors * VL, sign);
    return WHOLE || any(others);
}

// As exact_rows(), of v.
void exact_dots(const Sweep &sweep, Scratch &scratch, const Block &block, int q, const bool *used, Piece *rows) {
    for (int i = 0; i < reach(block); i++) {
        if (!used[i]) continue;
        memset(rows[i], 0, sizeof rows[i]);
        if (i >= block.n) continue;
        const Dot dot = dot_of(sweep, block, i, raw_row(sweep, block, i, 0, sweep.k, scratch.raw));
        for (int l = 0; l < NR && q + l < sweep.kp; l += VL / 2) store(rows[i] + l, dot(q + l));
    }
}

void exact_pieces(const Sweep &sweep, Scratch &scratch, const Block &a, const Block &b, int q) {
    exact_rows(sweep, a, q, scratch.row_used, scratch.exact_rows);
    exact_rows(sweep, b, q, scratch.col_used, scratch.exact_cols);
    exact_dots(sweep, scratch, a, q, scratch.row_used, scratch.dot_rows);
    exact_dots(sweep, scratch, b, q, scratch.col_used, scratch.dot_cols);
}

// x becomes the coefficient F'' c. of d, y that of d., which is F'.
template <class F>
void near_function_twice(const F &f, const Sweep &sweep, Scratch &scratch, Block &a, Block &b) {
    for (int p = 0; p < scratch.patch_count; p++) {
        NearPatch &patch = scratch.patches[p];
        for (int m = 0; m < NEAR_ROWS; m++) {
            const int i = patch.i + m, j = patch.j;
            const vd sign = patch.sign[m], inverse = load(b.inverse + j), tau = load(b.tau + j);
            const vl near = sign != 0.0, turned = sign < 0.0, pushed = apart(sweep, patch, m, a, b);
            const double deficit = a.deficit[i];
            const vd close = patch.x[m] + (deficit + load(b.deficit + j)), far = 4.0 - close;
            // half of the derivative of `close`: <d, d.>, and -2 deficit tau / nu of either row
            const vd half_dot = patch.y[m] - (deficit * a.tau[i] * a.inverse[i] + load(b.deficit + j) * tau * inverse);
            vd first, second;
            f.near(turned ? far : close, turned ? close : far, first, second);
            first = near ? first : vd{};
            const vd first_dot = near ? -sign * second * half_dot : vd{};
            // of -F' c the sign F' falls out with the force's part along the row, which is left out
            add_to_rows(a.outward + i, b.outward + j, near ? sign * first * close / 2.0 : vd{});
            add_to_rows(a.axial + i, b.axial + j, sign * first);
            add_to_rows(a.axial_dot + i, b.axial_dot + j, sign * first_dot);
            patch.x[m] = pushed ? first_dot : vd{};
            patch.y[m] = first;
        }
    }
}

template <class F> void repair_twice(const F &f, const Sweep &sweep, Scratch &scratch, Block &a, Block &b) {
    for (int q = 0; q < sweep.kp; q += NR) {
        exact_pieces(sweep, scratch, a, b, q);
        add_squares<true>(sweep, scratch, b, q);
    }
    near_function_twice(f, sweep, scratch, a, b);
    for (int q = 0; q < sweep.kp; q += NR) {
        exact_pieces(sweep, scratch, a, b, q);
        clear_forces(scratch, a, b);
        add_forces<false>(scratch, scratch.exact_rows, scratch.exact_cols);
        add_forces<true>(scratch, scratch.dot_rows, scratch.dot_cols);
        push_near(sweep, a, q, scratch.row_used, scratch.row_force);
        push_near(sweep, b, q, scratch.col_used, scratch.col_force);
    }
    forget_near(scratch, a, b);
}

template <class F> void meet_twice(const Sweep &sweep, Scratch &scratch, Block &a, Block &b) {
    const F f(sweep.call.pair);
    bool to_push = false;
    memset(scratch.row_sums, 0, sizeof(float) * VL * up(a.n, SHORT));
    memset(scratch.col_sums, 0, sizeof(float) * up(b.n, NR));
    for (int q = 0; q < sweep.k; q += KC) {
        const int end = sweep.k - q < KC ? sweep.k : q + KC;
        each_tile(a, b, [&](int i, int j, int rows, bool wide) {
            const bool near = tile_of_cosines(sweep, a, b, i, j, rows, wide, q, end, scratch.c + i * R + j);
            (rows == MR ? wide ? cosine_dots<MR, NV> : cosine_dots<MR, 1>
             : wide     ? cosine_dots<SHORT, NV>
                        : cosine_dots<SHORT, 1>)(sweep, a, b, i, j, q, end, scratch.c_dot + i * R + j);
            if (end < sweep.k) return;
            if (inside(a, b, i, j, rows) && !near)
                to_push |= tile_twice<F, true>(f, sweep, scratch, a, b, i, j, rows);
            else
                to_push |= tile_twice<F, false>(f, sweep, scratch, a, b, i, j, rows);
        });
    }
    for (int i = 0; i < a.n; i++) {
        const vf sums = load(scratch.row_sums + i * VL);
        a.outward[i] -= sum(lower(sums) + upper(sums));
    }
    for (int j = 0; j < b.n; j++) b.outward[j] -= scratch.col_sums[j];
    if (scratch.patch_count) repair_twice(f, sweep, scratch, a, b);
    if (!to_push) return;
    push(sweep, a, b, a.u, b.u, scratch.c_dot);
    push(sweep, a, b, a.u_dot, b.u_dot, scratch.c);
}

// As finish(): what is left once every pair is in.
void finish_twice(const Sweep &sweep, Scratch &scratch, Block &block) {
    const int k = sweep.k;
    const bool half = sweep.call.pair.half_space;
    const double scale = block.scale * sweep.functions.slope * (half ? 2 : 1);
    for (int i = 0; i < block.n; i++) {
        const double deficit = block.deficit[i], inverse = block.inverse[i], tau = block.tau[i];
        const double deficit_dot = -2 * deficit * tau * inverse;
        const float *raw = raw_row(sweep, block, i, 0, k, scratch.raw);
        const float *known = block.known_gradient + int64_t(i) * k;
        const Dot dot = dot_of(sweep, block, i, raw);
        const double along = gather_force(sweep, scratch, block, i, raw);
        vd with_dot = {}, with_known = {};
        for (int q = 0; q < k; q += VL / 2) {
            with_dot += dot(q) * (inverse * widen(raw + q, k - q));
            with_known += dot(q) * widen(known + q, k - q);
        }
        double outward = block.outward[i];
        double outward_dot = block.axial_dot[i] * deficit + block.axial[i] * deficit_dot - along;
        if (half) {
            double first, second;
            sweep.functions.antipode(sweep, 4 - 2 * deficit, 2 * deficit, first, second);
            outward -= first * deficit;
            outward_dot -= (second * deficit + first) * deficit_dot;
        }
        outward_dot += outward * sum(with_dot);
        const double known_along = sum(with_known);
        float *out = block.gradient + int64_t(i) * k;
        for (int q = 0; q < k; q += VL / 2) {
            const vd v = inverse * widen(raw + q, k - q);
            const vd sum = load(scratch.g + q) + outward * dot(q) + outward_dot * v;
            const vd product = scale * inverse * sum - known_along * v - tau * inverse * widen(known + q, k - q);
            narrow(out + q, product, k - q);
        }
    }
    release(block.near);
    block.near = nullptr;
}

}  // namespace
}  // namespace ISA
