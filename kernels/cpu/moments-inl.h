// The polynomial p(c) = a c + b c^2 of a sample, over all pairs of a set and over those within its parts,
// without visiting a pair: by the sum s of the unit rows and M = V^T V,
//
//     sum p over i < j  =  (a |s|^2 + b |M|^2 - sum_i (a rho_i + b rho_i^2)) / 2,    rho_i = |v_i|^2
//
// and the force of all rows on v_i is a s + 2 b M v_i, but for its own, (a + 2 b rho_i) v_i. What a sample
// adds is the polynomial over all pairs less W times that over the pairs within parts. Energies and forces
// are divided by W here, for finish() multiplies them by it.
//
// The moments of a block are M, where b is not 0, and then s. M is symmetric: of VL columns there are the
// rows from the first of these columns on, [row][VL], and then those of the next VL columns.
#pragma once
#include "blocks-inl.h"
#include "sweep-inl.h"

namespace ISA {
namespace {

// rows of M that are summed at a time: as many as registers can hold
constexpr int MOMENT_ROWS = VL == 16 ? 8 : 4;
static_assert(LEAST % MOMENT_ROWS == 0, "they must not cross strips");

INLINE bool has_matrix(const Sweep &sweep) { return sweep.call.sample->coefficients[1] != 0; }
// Columns of whole vectors.
INLINE int moment_columns(const Sweep &sweep) { return up(sweep.k, VL); }

// Where the columns from q on begin; q is a multiple of VL, and the last one tells the size of M.
INLINE int64_t moment_place(const Sweep &sweep, int q) { return int64_t(q) * sweep.k - int64_t(q) * (q - VL) / 2; }
INLINE int64_t sum_place(const Sweep &sweep) {
    return has_matrix(sweep) ? moment_place(sweep, moment_columns(sweep)) : 0;
}
INLINE int64_t moment_size(const Sweep &sweep) { return sum_place(sweep) + moment_columns(sweep); }
INLINE int64_t operand_size(const Sweep &sweep) {
    return int64_t(has_matrix(sweep) ? moment_columns(sweep) : 0) * moment_columns(sweep) + moment_columns(sweep);
}

// Where a column of u begins; w becomes the distance to its next row.
INLINE const float *column_of(const Sweep &sweep, const Block &block, int column, int &w) {
    int q = 0;
    while (q + width(sweep.kp, q) <= column) q += width(sweep.kp, q);
    w = width(sweep.kp, q);
    return block.u + int64_t(q) * block.capacity + (column - q);
}

// As many columns of s as V has lanes, from q on.
template <class V> void sum_columns(const Sweep &sweep, const Block &block, int q) {
    int w;
    const float *u = column_of(sweep, block, q, w);
    V sums[4] = {};  // one alone would wait for itself at every step
    for (int i = 0; i < block.n; i += 4)
        for (int v = 0; v < 4 && i + v < block.n; v++) sums[v] += *(const V *)(u + (i + v) * w);
    *(V *)(block.moment + sum_place(sweep) + q) = (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Of the columns of M from q on, GROUPS times VL of them or half a vector, the rows from `row` on to `end`.
template <class V, int GROUPS>
void sum_products(const Sweep &sweep, const Block &block, int q, int row, int end) {
    int w, left_w;
    const float *u = column_of(sweep, block, q, w);
    for (; row < end; row += MOMENT_ROWS) {
        const float *left = column_of(sweep, block, row, left_w);
        V sums[MOMENT_ROWS][GROUPS] = {};
        for (int i = 0; i < block.n; i++) {
            V right[GROUPS];
#pragma GCC unroll 2
            for (int v = 0; v < GROUPS; v++) right[v] = *(const V *)(u + i * w + v * VL);
#pragma GCC unroll 8
            for (int m = 0; m < MOMENT_ROWS; m++)
#pragma GCC unroll 2
                for (int v = 0; v < GROUPS; v++) sums[m][v] += left[i * left_w + m] * right[v];
        }
        for (int v = 0; v < GROUPS; v++) {
            const int column = q + v * VL;
            float *to = block.moment + moment_place(sweep, column);
            for (int m = 0; m < MOMENT_ROWS && row + m < sweep.k; m++)
                *(V *)(to + (row + m - column) * VL) = sums[m][v];
        }
    }
}

void prepare_moments(const Sweep &sweep, const Block &block) {
    const int k = sweep.k, whole = sweep.kp / VL * VL;
    for (int q = 0; q < whole; q += VL) sum_columns<vf>(sweep, block, q);
    const bool half = whole < sweep.kp;  // a vector, of which the second half stays empty
    if (half) {
        memset(block.moment + sum_place(sweep) + whole, 0, sizeof(float) * VL);
        sum_columns<vh>(sweep, block, whole);
    }
    if (!has_matrix(sweep)) return;
    for (int q = 0, groups; q < whole; q += groups * VL) {
        groups = width(sweep.kp, q) / VL;
        if (groups == 1) {
            sum_products<vf, 1>(sweep, block, q, q, k);
            continue;
        }
        // rows above the second VL columns' own are of the first ones alone
        const int next = k < q + VL ? k : q + VL;
        sum_products<vf, 1>(sweep, block, q, q, next);
        sum_products<vf, NV>(sweep, block, q, next, k);
    }
    if (!half) return;
    float *last = block.moment + moment_place(sweep, whole);
    memset(last, 0, sizeof(float) * VL * (k - whole));
    sum_products<vh, 1>(sweep, block, whole, whole, k);
}

template <class Number> void add_moments(double *sums, const Number *moment, int64_t size) {
    for (int64_t x = 0; x < size; x++) sums[x] += moment[x];
}

// Sums those of all blocks, once they are prepared; always in the same order.
void sum_moments(const Sweep &sweep, const Set &set) {
    const int64_t size = moment_size(sweep);
    memset(set.moment, 0, sizeof(double) * size);
    for (int a = 0; a < set.rows; a++) {
        set.row[a].stage.wait(1);
        add_moments(set.moment, set.row[a].moment, size);
    }
}

INLINE vd as_doubles(const float *x) { return widen(x); }
INLINE vd as_doubles(const double *x) { return load(x); }

template <class Number> double sum_of_squares(const Number *numbers, int64_t count) {
    vd sums[4] = {};
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
    double squares = 0;
    for (int q = 0; q < sweep.k && has_matrix(sweep); q += VL) {
        const Number *columns = moment + moment_place(sweep, q);
        const int64_t rows = sweep.k - q, own = rows < VL ? rows : VL;
        // what is below the rows of these columns' own numbers stands for as much to the right of them
        squares += sum_of_squares(columns, own * VL) + 2 * sum_of_squares(columns + own * VL, (rows - own) * VL);
    }
    return coefficients[0] / 2 * sum_of_squares(moment + sum_place(sweep), moment_columns(sweep)) +
           coefficients[1] / 2 * squares;
}

// What the rows of a part are multiplied by, a matrix with all of its columns, and then what is added to them:
// factors of M and s, of all pairs' share less the part's.
template <class Number>
void make_operand(const Sweep &sweep, const Set &set, const Number *part, float *operand) {
    const double *coefficients = sweep.call.sample->coefficients;
    const double slope = sweep.functions.slope, share = 1 / sweep.weight;
    const int k = sweep.k, columns = moment_columns(sweep);
    const auto fill = [&](float *to, int64_t from, double factor) {
        for (int l = 0; l < VL; l += VL / 2)
            narrow(to + l, factor * (share * load(set.moment + from + l) - as_doubles(part + from + l)));
    };
    if (has_matrix(sweep)) {
        memset(operand + int64_t(k) * columns, 0, sizeof(float) * (columns - k) * columns);
        for (int q = 0; q < k; q += VL)
            for (int row = q; row < k; row++)
                fill(operand + int64_t(row) * columns + q, moment_place(sweep, q) + int64_t(row - q) * VL,
                     2 * coefficients[1] / slope);
        for (int q = 0; q < k; q += VL)
            for (int row = q + VL; row < k; row += VL)
                turn<VL>(operand + int64_t(row) * columns + q, columns, operand + int64_t(q) * columns + row, columns, VL);
        operand += int64_t(columns) * columns;
    }
    for (int q = 0; q < columns; q += VL) fill(operand + q, sum_place(sweep) + q, coefficients[0] / slope);
}

// G += s + M v.
void push_moments(const Sweep &sweep, const Block &block, const float *operand) {
    const int columns = moment_columns(sweep), n = has_matrix(sweep) ? sweep.k : 0;
    const float *start = operand + int64_t(has_matrix(sweep) ? columns : 0) * columns;
    for (int i = 0; i < block.n; i += NR)
        for (int q = 0, w; q < sweep.kp; q += w) {
            w = width(sweep.kp, q);
            float *g = block.g + int64_t(q) * block.capacity + i * w;
            for (int l = 0; l < w; l += BESIDE)
                (block.n - i > VL ? push_turned<NV> : push_turned<1>)(
                    operand + q + l, columns, block.ut + int64_t(i) * sweep.k, NR, n, start + q + l, g + l, w,
                    block.lost);
        }
}

// Adds to block a of a set what the polynomial is over all pairs less W times what it is within parts.
void add_polynomial(const Sweep &sweep, Scratch &scratch, const Set &set, int a) {
    Block &block = set.row[a];
    const double *coefficients = sweep.call.sample->coefficients, slope = sweep.functions.slope;
    const int first = a - a % set.rounds;  // of the part
    set.row[0].stage.wait(2);  // the set's moments are summed
    const double share = 1 / sweep.weight;
    if (a == 0) block.energy += share * energy_of_moments(sweep, set.moment);
    if (set.rounds == 1) {
        block.energy -= energy_of_moments(sweep, block.moment);
        if (sweep.with_gradient) make_operand(sweep, set, block.moment, scratch.operand);
    } else {
        memset(scratch.part, 0, sizeof(double) * moment_size(sweep));
        for (int b = first; b < first + set.rounds; b++) add_moments(scratch.part, set.row[b].moment, moment_size(sweep));
        if (a == first) block.energy -= energy_of_moments(sweep, scratch.part);
        if (sweep.with_gradient) make_operand(sweep, set, scratch.part, scratch.operand);
    }
    // a row and itself are no pair
    const double own[2] = {(1 - share) * coefficients[0], (1 - share) * coefficients[1]};
    for (int i = 0; i < block.n; i++) {
        const double rho = 1 - block.deficit[i];
        block.energy += (own[0] + own[1] * rho) * (rho / 2);
        block.axial[i] += own[0] * (1 / slope) + own[1] * (2 / slope) * rho;
    }
    if (sweep.with_gradient) push_moments(sweep, block, scratch.operand);
}

}  // namespace
}  // namespace ISA
