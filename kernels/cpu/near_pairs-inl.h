// Pairs whose cosine is too close to 1 or -1 to be trusted: all of it again in double, from the
// differences d = v_i - v_j of the unit rows. They are kept as patches of a tile and worked on a strip
// of columns at a time, in registers like everything else, so that a set of nothing but near pairs
// costs a small multiple of an ordinary one.
//
// Their forces are f' d, not f' v_j, so that nothing cancels. The f' v_i that is left out has no
// tangent part but deficit_i of its length, which finish() adds from `pull`. A pair near -1 is the
// same with the other row's sign turned. The forces are summed in double, for they may be beyond
// float32 where what the projection and the scale leave of them is not.
//
// Between multiples of one row d is the rounding of their norms, and its direction means nothing.
#pragma once
#include "rows-inl.h"
#include "sweep-inl.h"

namespace ISA {
namespace {

// Keeps the near pairs of the tile at rows i0.., columns j0..; `sign` is 0 where a pair is not near.
void keep_near(Scratch &scratch, int i0, int j0, int rows, int cols, const float (&sign)[MR][NR]) {
    for (int i = 0; i < rows; i += NEAR_ROWS)
        for (int j = 0; j < cols; j += NEAR_COLS) {
            NearPatch &patch = scratch.patches[scratch.patch_count];
            vl some = {}, turned = {};
            for (int m = 0; m < NEAR_ROWS; m++) {
                const bool inside = i + m < rows;
                patch.sign[m] = inside ? __builtin_convertvector(*(vh *)&sign[i + m][j], vd) : vd{};
                patch.x[m] = vd{};
                some |= patch.sign[m] != 0.0;
                turned |= patch.sign[m] < 0.0;
            }
            if (!any((vi)some)) continue;
            patch.i = i0 + i;
            patch.j = j0 + j;
            patch.turned = any((vi)turned);
            memset(scratch.row_used + patch.i, 1, NEAR_ROWS);
            memset(scratch.col_used + patch.j, 1, NEAR_COLS);
            scratch.patch_count++;
        }
}

// Patches end behind the last row of a block, but not here.
INLINE int reach(const Block &block) { return block.n + NR; }

// Columns q.. of the unit rows that are used, in double, and zeros behind the last row and column.
void exact_rows(const Sweep &sweep, const Block &block, int q, const bool *used, Piece *rows) {
    float buffer[NR];
    const int n = sweep.k - q < NR ? sweep.k - q : NR;
    for (int i = 0; i < reach(block); i++) {
        if (!used[i]) continue;
        memset(rows[i], 0, sizeof rows[i]);
        if (i >= block.n) continue;
        const float *raw = raw_row(sweep, block, i, q, n, buffer);
        for (int l = 0; l < n; l++) rows[i][l] = raw[l] * block.inverse[i];
    }
}

// Adds |d|^2 over n columns to x; `cols` stand transposed.
template <bool TURNED>
INLINE void add_squares(NearPatch &patch, const Piece *rows, const double (*cols)[NEAR_COLS], int n) {
    vd x[NEAR_ROWS], sign[NEAR_ROWS];
    for (int m = 0; m < NEAR_ROWS; m++) {
        x[m] = patch.x[m];
        sign[m] = patch.sign[m];
    }
    for (int l = 0; l < n; l++) {
        const vd col = load(cols[l]);
#pragma GCC unroll 6
        for (int m = 0; m < NEAR_ROWS; m++) {
            const vd d = (TURNED ? sign[m] * col : col) - rows[m][l];
            x[m] += d * d;
        }
    }
    for (int m = 0; m < NEAR_ROWS; m++) patch.x[m] = x[m];
}

void add_squares(const Sweep &sweep, Scratch &scratch, const Block &b, int q) {
    // the forces' memory is still free
    double(*transposed)[NR][NEAR_COLS] = (double(*)[NR][NEAR_COLS])scratch.row_force;
    for (int j = 0; j < reach(b); j++)
        for (int l = 0; l < NR && scratch.col_used[j]; l++)
            transposed[j / NEAR_COLS][l][j % NEAR_COLS] = scratch.exact_cols[j][l];
    const int n = sweep.k - q < NR ? sweep.k - q : NR;
    for (int p = 0; p < scratch.patch_count; p++) {
        NearPatch &patch = scratch.patches[p];
        const Piece *rows = scratch.exact_rows + patch.i;
        if (patch.turned)
            add_squares<true>(patch, rows, transposed[patch.j / NEAR_COLS], n);
        else
            add_squares<false>(patch, rows, transposed[patch.j / NEAR_COLS], n);
    }
}

// Whether one row is a multiple of the other, neither of them 0. No rounding is in the way: the
// product of two floats is a double.
bool multiples(const Sweep &sweep, const Block &a, int i, const Block &b, int j) {
    float first[NR], second[NR];
    double x = 0, y = 0;  // the first entries that are not 0
    for (int q = 0; q < sweep.k; q += NR) {
        const int n = sweep.k - q < NR ? sweep.k - q : NR;
        const float *u = raw_row(sweep, a, i, q, n, first), *v = raw_row(sweep, b, j, q, n, second);
        for (int l = 0; l < n; l++) {
            if (x == 0 && y == 0) {
                x = u[l];
                y = v[l];
            }
            if (u[l] * y != v[l] * x) return false;
        }
    }
    return true;
}

// What the differences of unit rows leave for the multiples of one row: some rounding errors of a
// norm. Pairs this close are few, so that it costs nothing to ask whether they are multiples.
constexpr double MAYBE_MULTIPLES = 1e-18;

// x becomes the coefficient of the force, 0 where a pair is not near. Returns the energy.
template <class F> double near_function(const F &f, const Sweep &sweep, Scratch &scratch, Block &a, Block &b) {
    vd energy = {};
    for (int p = 0; p < scratch.patch_count; p++) {
        NearPatch &patch = scratch.patches[p];
        for (int m = 0; m < NEAR_ROWS; m++) {
            const int i = patch.i + m, j = patch.j;
            const vd sign = patch.sign[m];
            const vl near = sign != 0.0, turned = sign < 0.0;
            vl apart = near;
            const vl ask = near & (patch.x[m] > 0.0) & (patch.x[m] < MAYBE_MULTIPLES);
            if (any((vi)ask))
                for (int l = 0; l < NEAR_COLS; l++)
                    if (ask[l] && multiples(sweep, a, i, b, j + l)) patch.x[m][l] = apart[l] = 0;
            const vd close = patch.x[m] + (a.deficit[i] + load(b.deficit + j)), far = 4.0 - close;
            vd coefficient;
            const vd e = f.near(turned ? far : close, turned ? close : far, coefficient);
            energy += near ? e : vd{};
            patch.x[m] = apart ? coefficient : vd{};
            if (sweep.call.eps == 0) continue;  // and no deficit
            const vd pull = near ? sign * coefficient : vd{};
            a.pull[i] += sum(pull);
            store(b.pull + j, load(b.pull + j) + pull);
        }
    }
    return sum(energy);
}

// Forces of the differences in one strip of columns, FORCE_ROWS rows at a time.
template <bool TURNED>
INLINE void add_forces(const NearPatch &patch, const Piece *rows, const Piece *cols, Piece *row_force,
                       Piece *col_force) {
    for (int m0 = 0; m0 < NEAR_ROWS; m0 += FORCE_ROWS)
        for (int q = 0; q < NR; q += VL / 2) {
            vd v[FORCE_ROWS], force[FORCE_ROWS];
            for (int m = 0; m < FORCE_ROWS; m++) {
                v[m] = load(rows[m0 + m] + q);
                force[m] = load(row_force[m0 + m] + q);
            }
            for (int l = 0; l < NEAR_COLS; l++) {
                const vd col = load(cols[l] + q);
                vd back = load(col_force[l] + q);
#pragma GCC unroll 6
                for (int m = 0; m < FORCE_ROWS; m++) {
                    const double coefficient = patch.x[m0 + m][l];
                    const double sign = TURNED ? patch.sign[m0 + m][l] : 1;
                    const vd d = v[m] - (TURNED ? sign * col : col);
                    back += coefficient * d;
                    force[m] -= sign * coefficient * d;
                }
                store(col_force[l] + q, back);
            }
            for (int m = 0; m < FORCE_ROWS; m++) store(row_force[m0 + m] + q, force[m]);
        }
}

void add_forces(Scratch &scratch, const Block &a, const Block &b) {
    for (int i = 0; i < reach(a); i++)
        if (scratch.row_used[i]) memset(scratch.row_force[i], 0, sizeof(Piece));
    for (int j = 0; j < reach(b); j++)
        if (scratch.col_used[j]) memset(scratch.col_force[j], 0, sizeof(Piece));
    for (int p = 0; p < scratch.patch_count; p++) {
        const NearPatch &patch = scratch.patches[p];
        const int i = patch.i, j = patch.j;
        const Piece *rows = scratch.exact_rows + i, *cols = scratch.exact_cols + j;
        if (patch.turned)
            add_forces<true>(patch, rows, cols, scratch.row_force + i, scratch.col_force + j);
        else
            add_forces<false>(patch, rows, cols, scratch.row_force + i, scratch.col_force + j);
    }
}

void push_near(const Sweep &sweep, Block &block, int q0, const bool *used, const Piece *force) {
    const size_t size = size_t(block.capacity) * sweep.kp;
    // few blocks need it, and those only until they are finished
    if (!block.near && (block.near = allocate<double>(size))) memset(block.near, 0, sizeof(double) * size);
    if (!block.near) {
        __atomic_store_n(&sweep.out_of_memory, true, __ATOMIC_RELAXED);
        return;
    }
    for (int q = q0, w; q < sweep.kp && q < q0 + NR; q += w) {
        w = width(sweep.kp, q);
        for (int i = 0; i < block.n; i++) {
            if (!used[i]) continue;
            double *near = block.near + long(q) * block.capacity + i * w;
            for (int l = 0; l < w; l++) near[l] += force[i][q - q0 + l];
        }
    }
}

template <class F> double repair(const F &f, const Sweep &sweep, Scratch &scratch, Block &a, Block &b) {
    for (int q = 0; q < sweep.kp; q += NR) {
        exact_rows(sweep, a, q, scratch.row_used, scratch.exact_rows);
        exact_rows(sweep, b, q, scratch.col_used, scratch.exact_cols);
        add_squares(sweep, scratch, b, q);
    }
    const double energy = near_function(f, sweep, scratch, a, b);
    for (int q = 0; q < sweep.kp && sweep.with_gradient; q += NR) {
        exact_rows(sweep, a, q, scratch.row_used, scratch.exact_rows);
        exact_rows(sweep, b, q, scratch.col_used, scratch.exact_cols);
        add_forces(scratch, a, b);
        push_near(sweep, a, q, scratch.row_used, scratch.row_force);
        push_near(sweep, b, q, scratch.col_used, scratch.col_force);
    }
    scratch.patch_count = 0;
    memset(scratch.row_used, 0, reach(a));
    memset(scratch.col_used, 0, reach(b));
    return energy;
}

}  // namespace
}  // namespace ISA
