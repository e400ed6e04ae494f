// Two blocks meet: cosines, coefficients f'(c), and the two products that push both. All three go by
// tiles of MR x NR in registers, the last rows by shorter ones.
#pragma once
#include "near_pairs-inl.h"
#include "sweep-inl.h"

namespace ISA {
namespace {

constexpr int SHORT = MR / 3;
static_assert(VL % SHORT == 0, "tiles must divide the room for rows");
INLINE int tile_rows(int left) { return left > 2 * SHORT ? MR : SHORT; }

// acc += u ut over n columns of a strip of width W.
template <int M, int V, int W> INLINE void multiply(vf (&acc)[M][V], const float *u, const float *ut, int n) {
    for (int q = 0; q < n; q++) {
        vf b[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) b[v] = load(ut + q * NR + v * VL);
#pragma GCC unroll 12
        for (int m = 0; m < M; m++)
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) acc[m][v] += u[m * W + q] * b[v];
    }
}

// acc += u ut, rows i0.. of one and columns j0.. of the other, summed over q0 <= q < q1; u is of `block`.
template <int M, int V>
INLINE void multiply(const Sweep &sweep, vf (&acc)[M][V], const Block &block, const float *u, const float *ut,
                     int i0, int j0, int q0, int q1) {
    ut += int64_t(j0 / NR * NR) * sweep.k + j0 % NR;
    for (int q = q0, w; q < q1; q += w) {
        w = width(sweep.kp, q);
        const int n = q1 - q < w ? q1 - q : w;
        const float *strip = u + int64_t(q) * block.capacity + i0 * w;
        prefetch(strip + M * w, M * w);  // the next tile's
        if (w == NR)
            multiply<M, V, NR>(acc, strip, ut + int64_t(q) * NR, n);
        else if (w == VL)
            multiply<M, V, VL>(acc, strip, ut + int64_t(q) * NR, n);
        else
            multiply<M, V, LEAST>(acc, strip, ut + int64_t(q) * NR, n);
    }
}

template <int M, int V> INLINE void load_tile(vf (&acc)[M][V], const float *c) {
#pragma GCC unroll 12
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) acc[m][v] = c ? load(c + m * R + v * VL) : vf{};
}

// A tile of cosines, rows i0.. of `a` and columns j0.. of `b`, summed over q0 <= q < q1. Returns whether
// one may be of a near pair.
template <int M, int V>
bool cosines(const Sweep &sweep, const Block &a, const Block &b, int i0, int j0, int q0, int q1, float *c) {
    vf acc[M][V];
    load_tile(acc, q0 ? c : nullptr);
    multiply(sweep, acc, a, a.u, b.ut, i0, j0, q0, q1);
    // integers have a maximum in one instruction, and are ordered like positive floats
    const vi mask = vi{} + sweep.closeness_mask;  // here: it would be read again after every store
    vi highest = {};
#pragma GCC unroll 12
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
            const vi bits = (vi)acc[m][v] & mask;
            highest = bits > highest ? bits : highest;
            store(c + m * R + v * VL, acc[m][v]);
        }
    return any(highest > sweep.near_bits);
}

// *p += x, where what rounding takes from the sum is kept, too, if there is a place for it.
template <class V> INLINE void accumulate(V *p, V x, int64_t lost) {
    const V old = *p, sum = old + x, added = sum - old;
    *p = sum;
    if (lost) *(V *)((float *)p + lost) += (old - (sum - added)) + (x - added);
}

// M rows of g += the same rows of c times u, WV vectors V wide, over n columns of c. Summed from zero:
// this is the first level of a sum that keeps the error of G small at large N.
template <class V, int WV, int M, bool TRANSPOSED>
INLINE void push(const float *c, const float *u, float *g, int64_t lost, int n) {
    constexpr int LANES = sizeof(V) / sizeof(float);
    prefetch(g, M * WV * LANES);
    if (lost) prefetch(g + lost, M * WV * LANES);
    V acc[M][WV];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int v = 0; v < WV; v++) acc[m][v] = V{};
    for (int t = 0; t < n; t++) {
        V b[WV];
#pragma GCC unroll 2
        for (int v = 0; v < WV; v++) b[v] = *(const V *)(u + (t * WV + v) * LANES);
#pragma GCC unroll 12
        for (int m = 0; m < M; m++)
#pragma GCC unroll 2
            for (int v = 0; v < WV; v++) acc[m][v] += (TRANSPOSED ? c[t * R + m] : c[m * R + t]) * b[v];
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int v = 0; v < WV; v++) {
            accumulate((V *)(g + (m * WV + v) * LANES), acc[m][v], lost);
        }
}

// One strip of both forces, as far as they are wanted: G_a += C u_b and G_b += C^T u_a.
template <class V, int WV>
void push_strip(const Block &a, const Block &b, const float *ua, const float *ub, const float *c, int64_t strip) {
    constexpr int W = WV * sizeof(V) / sizeof(float);
    ua += strip * a.capacity;
    ub += strip * b.capacity;
    for (int i = 0, rows; a.g && i < a.n; i += rows) {
        float *ga = a.g + strip * a.capacity;
        rows = tile_rows(a.n - i);
        if (rows == MR)
            push<V, WV, MR, false>(c + i * R, ub, ga + i * W, a.lost, b.n);
        else
            push<V, WV, SHORT, false>(c + i * R, ub, ga + i * W, a.lost, b.n);
    }
    for (int j = 0, rows; b.g && j < b.n; j += rows) {
        float *gb = b.g + strip * b.capacity;
        rows = tile_rows(b.n - j);
        if (rows == MR)
            push<V, WV, MR, true>(c + j, ua, gb + j * W, b.lost, a.n);
        else
            push<V, WV, SHORT, true>(c + j, ua, gb + j * W, b.lost, a.n);
    }
}

// --- a block and itself ----------------------------------------------------------------------------

// Columns of G that are summed at a time, VL rows side by side: so any number of columns fills the vectors.
constexpr int BESIDE = VL == 4 ? VL : VL / 2;
typedef float vg __attribute__((vector_size(4 * BESIDE), may_alias));
static_assert(LEAST % BESIDE == 0, "they must not cross strips");

// BESIDE columns of V vectors of rows of g += (left right)^T, summed over n: `left` has these columns, `step`
// apart, and `right` these rows, `spacing` apart. The sum begins with `start` in each row, where that is given.
template <int V>
INLINE void push_turned(const float *left, int step, const float *right, int spacing, int n, const float *start,
                        float *g, int w, int64_t lost) {
    vf acc[BESIDE][V];
#pragma GCC unroll 8
    for (int q = 0; q < BESIDE; q++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) acc[q][v] = start ? all(start[q]) : vf{};
    for (int t = 0; t < n; t++) {
        vf b[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) b[v] = load(right + t * spacing + v * VL);
#pragma GCC unroll 8
        for (int q = 0; q < BESIDE; q++)
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) acc[q][v] += left[t * step + q] * b[v];
    }
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
        vf x[BESIDE];
#pragma GCC unroll 8
        for (int q = 0; q < BESIDE; q++) x[q] = acc[q][v];
        transpose<BESIDE>(x);
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++)
            accumulate((vg *)(g + (v * VL + i) * w), *((const vg *)x + i), lost);
    }
}

// The coefficients of a block with itself, which stand above the diagonal, below it, too.
void mirror(float *c, int n) {
    for (int i = 0; i < n; i += VL) {
        vf x[VL];
        float *const diagonal = c + i * R + i;
#pragma GCC unroll 16
        for (int m = 0; m < VL; m++) x[m] = load(diagonal + m * R);
        transpose<VL>(x);
#pragma GCC unroll 16
        for (int m = 0; m < VL; m++) store(diagonal + m * R, lanes(0) > m ? load(diagonal + m * R) : x[m]);
        for (int j = i + VL; j < n; j += VL) turn<VL>(c + i * R + j, R, c + j * R + i, R, VL);
    }
}

// G += C u.
void push_itself(const Sweep &sweep, const Block &block, const float *u, const float *c) {
    for (int i = 0; i < block.n; i += NR)
        for (int q = 0, w; q < sweep.kp; q += w) {
            w = width(sweep.kp, q);
            const float *left = u + int64_t(q) * block.capacity;
            float *g = block.g + int64_t(q) * block.capacity + i * w;
            for (int l = 0; l < w; l += BESIDE)
                (block.n - i > VL ? push_turned<NV> : push_turned<1>)(left + l, w, c + i, R, block.n, nullptr,
                                                                      g + l, w, block.lost);
        }
}

void push(const Sweep &sweep, const Block &a, const Block &b, const float *ua, const float *ub, float *c) {
    if (&a == &b) {
        mirror(c, a.n);
        return push_itself(sweep, a, ua, c);
    }
    for (int q = 0, w; q < sweep.kp; q += w) {
        w = width(sweep.kp, q);
        if (w == NR)
            push_strip<vf, NV>(a, b, ua, ub, c, q);
        else if (w == VL)
            push_strip<vf, 1>(a, b, ua, ub, c, q);
        else
            push_strip<vh, 1>(a, b, ua, ub, c, q);
    }
}

// Energies in double, VL sums side by side.
struct Energy {
    vd low, high;
    INLINE void add(vf x) {
        low += lower(x);
        high += upper(x);
    }
};

// What a block keeps of each of its rows while it meets another, from some row on.
template <class F> struct ByRow {
    typename F::Energies *energies;
    const float *weight;
};

// Cosines become coefficients where every pair of a tile counts and none is near.
template <class F, bool BY_ROW>
INLINE void whole_tile(const F &f, float *c, int rows, Energy &energy, ByRow<F> by_row) {
    typename F::Energies total;
    for (int m = 0; m < rows; m++) {
        if (BY_ROW) total = by_row.energies[m];
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) {
            vf e;
            const vf coefficient = f.evaluate(load(c + m * R + v * VL), e);
            store(c + m * R + v * VL, BY_ROW ? by_row.weight[m] * coefficient : coefficient);
            total.add(e);
        }
        if (BY_ROW) by_row.energies[m] = total;
    }
    if (!BY_ROW) energy.add(total.result());
}

// How many vectors of columns the tile from j on has: of `b`, and not of the next tile.
INLINE int vectors_of_tile(const Block &b, int j) { return j % NR == 0 && b.n - j > VL ? NV : 1; }

// Which pairs count of row i and the columns from j on, whose cosines are x: those inside of the
// blocks, above the diagonal, of different ids, and not near. Near ones get their sign, the others keep their 0.
template <class F>
INLINE vi counted(const Sweep &sweep, const Block &a, const Block &b, int i, int j, vf x, float *sign,
                  vi &near_ones) {
    const vi lane = lanes(j);
    vi counts = lane < b.n;
    if (&a == &b) counts &= lane > i;
    if (b.ids) counts &= *(const vi *)(b.ids + j) != a.ids[i];
    if (i >= a.n) counts = vi{};
    const vi near = counts & ((F::TWO_ENDED ? magnitude(x) : x) > sweep.near_cosine);
    near_ones |= near;
    if (any(near)) store(sign, near ? (F::TWO_ENDED && x < 0.0f ? all(-1.0f) : all(1.0f)) : vf{});
    return counts & ~near;
}

// The same for any tile: coefficients are 0 where a pair does not count, and near pairs are kept for
// repair(). Returns whether any coefficient is not 0.
template <class F, bool BY_ROW>
bool ragged_tile(const F &f, const Sweep &sweep, Scratch &scratch, const Block &a, const Block &b, int i, int j,
                 int rows, float *c, Energy &energy, ByRow<F> by_row) {
    const int vectors = vectors_of_tile(b, j);
    alignas(64) float sign[MR][NR] = {};
    vi near_ones = {}, others = {};
    typename F::Energies total;
    for (int m = 0; m < rows; m++) {
        if (BY_ROW) total = by_row.energies[m];
        for (int v = 0; v < vectors; v++) {
            float *p = c + m * R + v * VL;
            const vf x = load(p);
            const vi counts = counted<F>(sweep, a, b, i + m, j + v * VL, x, sign[m] + v * VL, near_ones);
            others |= counts;
            if (!any(counts)) {
                store(p, vf{});
                continue;
            }
            vf e;
            const vf coefficient = f.evaluate(counts ? x : vf{}, e);
            store(p, counts ? BY_ROW ? by_row.weight[m] * coefficient : coefficient : vf{});
            total.add(counts ? e : F::Energies::nothing());
        }
        if (BY_ROW) by_row.energies[m] = total;
    }
    if (!BY_ROW) energy.add(total.result());
    if (any(near_ones)) keep_near(scratch, i, j, rows, vectors * VL, sign);
    return any(others);
}

// Walks over the tiles of two blocks, of a block with itself over those that reach above the diagonal, and
// over half of them where the other half does not: tile(i, j, rows, wide).
template <class Tile> INLINE void each_tile(const Block &a, const Block &b, Tile tile) {
    for (int j = 0; j < b.n; j += NR)
        for (int i = 0, rows; i < a.n && !(&a == &b && i >= j + NR); i += rows) {
            rows = tile_rows(a.n - i);
            const int first = &a == &b && i >= j + VL ? j + VL : j;
            tile(i, first, rows, vectors_of_tile(b, first) > 1);
        }
}

// Whether all pairs of a tile lie in the blocks and above the diagonal.
INLINE bool inside(const Block &a, const Block &b, int i, int j, int rows) {
    return i + rows <= a.n && j + NR <= b.n && !(&a == &b && i + rows > j);
}

INLINE bool tile_of_cosines(const Sweep &sweep, const Block &a, const Block &b, int i, int j, int rows,
                            bool wide, int q, int end, float *c) {
    return (rows == MR ? wide ? cosines<MR, NV> : cosines<MR, 1>
            : wide     ? cosines<SHORT, NV>
                       : cosines<SHORT, 1>)(sweep, a, b, i, j, q, end, c);
}

// What a's rows have met becomes part of their sums. Rows of NaN or infinity make the sums of all that
// they meet NaN, which logarithms lose.
template <class F> void add_row_energies(const typename F::Energies *energies, Block &a, const Block &b) {
    for (int i = 0; i < a.n; i++) {
        const vf e = energies[i].result();
        a.row_energy[i] += sum(lower(e) + upper(e));
    }
    if (!a.broken && !b.broken) return;
    for (int i = 0; i < a.n; i++)
        for (int j = 0; j < b.n; j++) {
            const bool meet = !b.ids || a.ids[i] != b.ids[j];
            if (meet && (broken(a, i) || broken(b, j))) a.row_energy[i] = __builtin_nan("");
        }
}

template <class F, bool BY_ROW> void meet(const Sweep &sweep, Scratch &scratch, Block &a, Block &b) {
    const F f(sweep.call.pair);
    const bool ids_overlap = b.ids && a.first_id <= b.last_id && b.first_id <= a.last_id;
    bool to_push = false;
    Energy energy = {};
    static_assert(sizeof(typename F::Energies) <= MOST_ENERGIES, "they must fit");
    typename F::Energies *const row_energies = (typename F::Energies *)scratch.row_energies;
    for (int i = 0; BY_ROW && i < up(a.n, SHORT); i++) row_energies[i] = {};
    for (int q = 0; q < sweep.k; q += KC) {
        const int end = sweep.k - q < KC ? sweep.k : q + KC;
        each_tile(a, b, [&](int i, int j, int rows, bool wide) {
            float *c = scratch.c + i * R + j;
            const bool near = tile_of_cosines(sweep, a, b, i, j, rows, wide, q, end, c);
            if (end < sweep.k) return;
            ByRow<F> by_row = {};
            if (BY_ROW) by_row = {row_energies + i, a.weight + i};
            if (inside(a, b, i, j, rows) && !near && !ids_overlap) {
                whole_tile<F, BY_ROW>(f, c, rows, energy, by_row);
                to_push = true;
            } else {
                to_push |= ragged_tile<F, BY_ROW>(f, sweep, scratch, a, b, i, j, rows, c, energy, by_row);
            }
        });
    }
    if (BY_ROW)
        add_row_energies<F>(row_energies, a, b);
    else
        a.energy += sum(energy.low + energy.high);
    if (scratch.patch_count) a.energy += repair(f, sweep, scratch, a, b);
    if (to_push && sweep.with_gradient) push(sweep, a, b, a.u, b.u, scratch.c);
}

}  // namespace
}  // namespace ISA
