// The polynomial p(c) = a c + b c^2 of a sample, over all pairs of a set and over those within its parts,
// without visiting a pair: by the sum s of the unit rows and M = V^T V,
//
//     sum p over i < j  =  (a |s|^2 + b |M|^2 - sum_i (a rho_i + b rho_i^2)) / 2,    rho_i = |v_i|^2
//
// and the force of all rows on v_i is a s + 2 b M v_i, but for its own, (a + 2 b rho_i) v_i. What a sample
// adds is the polynomial over all pairs less W times that over the pairs within parts. Energies and forces
// are divided by W here, for finish() multiplies them by it.
//
// The moments of a block are M, cut into the strips of columns that rows are cut into, [strip][k][width],
// where b is not 0, and then s.
#pragma once
#include "blocks-inl.h"
#include "sweep-inl.h"

namespace ISA {
namespace {

// rows of M that are summed at a time: as many as registers can hold
constexpr int MOMENT_ROWS = VL == 16 ? 8 : 4;
static_assert(LEAST % MOMENT_ROWS == 0, "they must not cross strips");

INLINE int64_t matrix_size(const Sweep &sweep) {
    return sweep.call.sample->coefficients[1] != 0 ? int64_t(sweep.k) * sweep.kp : 0;
}
// Where s begins: at a whole vector, with a gap of which nothing is used.
INLINE int64_t sum_place(const Sweep &sweep) { return (matrix_size(sweep) + VL - 1) / VL * VL; }
INLINE int64_t moment_size(const Sweep &sweep) { return sum_place(sweep) + sweep.kp; }

// The first column of the strip that holds a column.
INLINE int strip_of(const Sweep &sweep, int column) {
    int q = 0;
    while (q + width(sweep.kp, q) <= column) q += width(sweep.kp, q);
    return q;
}

template <class V, int WV> void sum_strip(const Sweep &sweep, const Block &block, int strip) {
    constexpr int LANES = sizeof(V) / sizeof(float), W = WV * LANES;
    const float *u = block.u + int64_t(strip) * block.capacity;
    V sums[WV] = {};
    for (int i = 0; i < block.n; i++)
        for (int v = 0; v < WV; v++) sums[v] += *(const V *)(u + i * W + v * LANES);
    for (int v = 0; v < WV; v++) *(V *)(block.moment + sum_place(sweep) + strip + v * LANES) = sums[v];
}

// The columns of M that stand in one strip, from the first row of that number on: M is symmetric.
template <class V, int WV> void moment_strip(const Sweep &sweep, const Block &block, int strip) {
    constexpr int LANES = sizeof(V) / sizeof(float), W = WV * LANES;
    const float *u = block.u + int64_t(strip) * block.capacity;
    float *moment = block.moment + int64_t(strip) * sweep.k;
    for (int q = strip; q < sweep.kp; q += MOMENT_ROWS) {
        const int first = strip_of(sweep, q), w = width(sweep.kp, first);
        const float *left = block.u + int64_t(first) * block.capacity + (q - first);
        V sums[MOMENT_ROWS][WV] = {};
        for (int i = 0; i < block.n; i++) {
            V right[WV];
#pragma GCC unroll 2
            for (int v = 0; v < WV; v++) right[v] = *(const V *)(u + i * W + v * LANES);
#pragma GCC unroll 8
            for (int m = 0; m < MOMENT_ROWS; m++)
#pragma GCC unroll 2
                for (int v = 0; v < WV; v++) sums[m][v] += left[i * w + m] * right[v];
        }
        for (int m = 0; m < MOMENT_ROWS && q + m < sweep.k; m++)
            for (int v = 0; v < WV; v++) *(V *)(moment + (q + m) * W + v * LANES) = sums[m][v];
    }
}

// Copies what M has below a strip to the right of it.
void mirror_strip(const Sweep &sweep, const Block &block, int strip) {
    const int w = width(sweep.kp, strip);
    const float *below = block.moment + int64_t(strip) * sweep.k;
    for (int q = strip + w, n; q < sweep.kp; q += n) {
        n = width(sweep.kp, q);
        float *right = block.moment + int64_t(q) * sweep.k;
        for (int c = strip; c < strip + w; c++)
            for (int r = 0; r < n; r++) right[c * n + r] = q + r < sweep.k ? below[(q + r) * w + c - strip] : 0;
    }
}

void prepare_moments(const Sweep &sweep, const Block &block) {
    const bool matrix = matrix_size(sweep);
    for (int q = 0, w; q < sweep.kp; q += w) {
        w = width(sweep.kp, q);
        (w == NR ? sum_strip<vf, NV> : w == VL ? sum_strip<vf, 1> : sum_strip<vh, 1>)(sweep, block, q);
        if (!matrix) continue;
        (w == NR ? moment_strip<vf, NV> : w == VL ? moment_strip<vf, 1> : moment_strip<vh, 1>)(sweep, block, q);
        mirror_strip(sweep, block, q);
    }
}

// Sums those of all blocks, once they are prepared; always in the same order.
void sum_moments(const Sweep &sweep, const Set &set) {
    const int64_t size = moment_size(sweep);
    memset(set.moment, 0, sizeof(double) * size);
    for (int a = 0; a < set.rows; a++) {
        set.row[a].stage.wait(1);
        const float *moment = set.row[a].moment;
        for (int64_t x = 0; x < size; x++) set.moment[x] += moment[x];
    }
}

INLINE vd as_doubles(const float *x) { return widen(x); }
INLINE vd as_doubles(const double *x) { return load(x); }

template <class Number> double sum_of_squares(const Number *numbers, int64_t count) {
    vd sums[4] = {};  // one alone would wait for itself at every step
    for (int64_t x = 0; x < count; x += 2 * VL)
        for (int v = 0; v < 4; v++) {
            const int64_t place = x + v * (VL / 2);
            const vd some = place < count ? as_doubles(numbers + place) : vd{};
            sums[v] += some * some;
        }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// (a |s|^2 + b |M|^2) / 2.
template <class Number> double energy_of_moments(const Sweep &sweep, const Number *moment) {
    const double *coefficients = sweep.call.sample->coefficients;
    return coefficients[0] / 2 * sum_of_squares(moment + sum_place(sweep), sweep.kp) +
           coefficients[1] / 2 * sum_of_squares(moment, matrix_size(sweep));
}

// M rows of one strip of g += s + v M.
template <class V, int WV, int M>
INLINE void push_rows(const Sweep &sweep, const Block &block, const float *moment, int i, int strip) {
    constexpr int LANES = sizeof(V) / sizeof(float), W = WV * LANES;
    const float *total = moment + sum_place(sweep) + strip, *columns = moment + int64_t(strip) * sweep.k;
    V acc[M][WV];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int v = 0; v < WV; v++) acc[m][v] = *(const V *)(total + v * LANES);
    const int k = matrix_size(sweep) ? sweep.k : 0;
    for (int q = 0, w; q < k; q += w) {
        w = width(sweep.kp, q);
        const float *u = block.u + int64_t(q) * block.capacity + i * w;
        const int n = k - q < w ? k - q : w;
        for (int l = 0; l < n; l++) {
            V row[WV];
#pragma GCC unroll 2
            for (int v = 0; v < WV; v++) row[v] = *(const V *)(columns + (q + l) * W + v * LANES);
#pragma GCC unroll 12
            for (int m = 0; m < M; m++)
#pragma GCC unroll 2
                for (int v = 0; v < WV; v++) acc[m][v] += u[m * w + l] * row[v];
        }
    }
    float *g = block.g + int64_t(strip) * block.capacity + i * W;
#pragma GCC unroll 12
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int v = 0; v < WV; v++) accumulate((V *)(g + m * W + v * LANES), acc[m][v], block.lost);
}

template <class V, int WV>
void push_moments(const Sweep &sweep, const Block &block, const float *moment, int strip) {
    for (int i = 0, rows; i < block.n; i += rows) {
        rows = tile_rows(block.n - i);
        if (rows == MR)
            push_rows<V, WV, MR>(sweep, block, moment, i, strip);
        else
            push_rows<V, WV, SHORT>(sweep, block, moment, i, strip);
    }
}

// Adds to block a of a set what the polynomial is over all pairs less W times what it is within parts.
void add_polynomial(const Sweep &sweep, Scratch &scratch, const Set &set, int a) {
    Block &block = set.row[a];
    const double *coefficients = sweep.call.sample->coefficients, slope = sweep.functions.slope;
    const int first = a - a % set.rounds;  // of the part
    const int64_t matrix = matrix_size(sweep), size = moment_size(sweep);
    set.row[0].stage.wait(2);  // the set's moments are summed
    const float *part = block.moment;
    float *const operand = scratch.operand;
    if (set.rounds > 1) {
        memset(operand, 0, sizeof(float) * size);
        for (int b = first; b < first + set.rounds; b++)
            for (int64_t x = 0; x < size; x++) operand[x] += set.row[b].moment[x];
        part = operand;
    }
    const double share = 1 / sweep.weight;
    if (a == 0) block.energy += share * energy_of_moments(sweep, set.moment);
    if (a == first) block.energy -= energy_of_moments(sweep, part);
    // a row and itself are no pair
    const double own[2] = {(1 - share) * coefficients[0], (1 - share) * coefficients[1]};
    for (int i = 0; i < block.n; i++) {
        const double rho = 1 - block.deficit[i];
        block.energy += (own[0] + own[1] * rho) * (rho / 2);
    }
    if (!sweep.with_gradient) return;
    for (int i = 0; i < block.n; i++)
        block.axial[i] += own[0] * (1 / slope) + own[1] * (2 / slope) * (1 - block.deficit[i]);
    const double factor = 2 * coefficients[1] / slope, factor_of_sum = coefficients[0] / slope;
    for (int64_t x = 0; x < matrix; x++) operand[x] = float(factor * (share * set.moment[x] - part[x]));
    for (int64_t x = matrix; x < size; x++)
        operand[x] = float(factor_of_sum * (share * set.moment[x] - part[x]));
    for (int q = 0, w; q < sweep.kp; q += w) {
        w = width(sweep.kp, q);
        (w == NR ? push_moments<vf, NV> : w == VL ? push_moments<vf, 1> : push_moments<vh, 1>)(sweep, block, operand, q);
    }
}

}  // namespace
}  // namespace ISA
