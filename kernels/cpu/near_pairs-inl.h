// Pairs whose cosine is too close to 1 or -1 to be trusted: all of it again in double, from the
// differences d = v_i - v_j of the unit rows. They are kept as patches of a tile and worked on a strip
// of columns at a time, in registers like everything else, so that a set of nothing but near pairs
// costs a small multiple of an ordinary one.
//
// Their forces are f' d, not f' v_j, so that nothing cancels. The f' v_i that is left out has no
// tangent part but deficit_i of its length, which finish() adds from `axial`. A pair near -1 is the
// same with the other row's sign turned. The forces are summed in double, for they may be beyond
// float32 where the gradient, which is scaled and has lost its part along the row, is not.
//
// Between multiples of one row d is the rounding of their norms, and its direction means nothing.
#pragma once
#include "rows-inl.h"
#include "sweep-inl.h"

namespace ISA {
namespace {

// Beyond this cosine the error of a float32 cosine shows in the result: r^2 < 1/64. In few dimensions
// close pairs are many and weigh more; there the bound is r^2 < 1/8. A large exponent multiplies that
// error, and takes the coefficients out of float32's range; but not at r > 1.
// Pairs on the tangent line must be found as well, with room for the error of the cosine.
float near_cosine(const Pair &pair, int64_t k) {
    const double squared = (k > 16 ? 0x1p-6 : 0x1p-3) * (pair.growth > 4 ? pair.growth / 4 : 1);
    const double trusted = squared < 1 ? 1 - squared / 2 : 0.5, d = pair.tangent.at;
    const double reach = (pair.angular ? __builtin_cos(d) : 1 - d * d / 2) - 1e-5;
    return float(reach < trusted ? reach : trusted);
}

// Keeps the near pairs of the tile at rows i0.., columns j0..; `sign` is 0 where a pair is not near.
void keep_near(Scratch &scratch, int i0, int j0, int rows, int cols, const float (&sign)[MR][NR]) {
    for (int i = 0; i < rows; i += NEAR_ROWS)
        for (int j = 0; j < cols; j += NEAR_COLS) {
            NearPatch &patch = scratch.patches[scratch.patch_count];
            vl some = {}, turned = {};
            for (int m = 0; m < NEAR_ROWS; m++) {
                const bool inside = i + m < rows;
                patch.sign[m] = inside ? __builtin_convertvector(*(vh *)&sign[i + m][j], vd) : vd{};
                patch.x[m] = patch.y[m] = vd{};
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

// Adds to x |d|^2 over n columns, and at second order to y <d, d.>; `cols` stand transposed.
template <bool TURNED, bool TWICE>
INLINE void add_squares(NearPatch &patch, const Piece *rows, const double (*cols)[NEAR_COLS],
                        const Piece *dot_rows, const double (*dot_cols)[NEAR_COLS], int n) {
    vd x[NEAR_ROWS], y[NEAR_ROWS], sign[NEAR_ROWS];
    for (int m = 0; m < NEAR_ROWS; m++) {
        x[m] = patch.x[m];
        y[m] = patch.y[m];
        sign[m] = patch.sign[m];
    }
    for (int l = 0; l < n; l++) {
        const vd col = load(cols[l]), dot_col = TWICE ? load(dot_cols[l]) : vd{};
#pragma GCC unroll 6
        for (int m = 0; m < NEAR_ROWS; m++) {
            const vd d = (TURNED ? sign[m] * col : col) - rows[m][l];
            x[m] += d * d;
            if (TWICE) y[m] += d * ((TURNED ? sign[m] * dot_col : dot_col) - dot_rows[m][l]);
        }
    }
    for (int m = 0; m < NEAR_ROWS; m++) {
        patch.x[m] = x[m];
        if (TWICE) patch.y[m] = y[m];
    }
}

typedef double Transposed[NR][NEAR_COLS];

void transpose(const Scratch &scratch, const Block &b, const Piece *cols, Transposed *transposed) {
    for (int j = 0; j < reach(b); j++)
        for (int l = 0; l < NR && scratch.col_used[j]; l++)
            transposed[j / NEAR_COLS][l][j % NEAR_COLS] = cols[j][l];
}

template <bool TWICE> void add_squares(const Sweep &sweep, Scratch &scratch, const Block &b, int q) {
    // the forces' memory is still free
    Transposed *cols = (Transposed *)scratch.row_force, *dot_cols = (Transposed *)scratch.col_force;
    transpose(scratch, b, scratch.exact_cols, cols);
    if (TWICE) transpose(scratch, b, scratch.dot_cols, dot_cols);
    const int n = sweep.k - q < NR ? sweep.k - q : NR;
    for (int p = 0; p < scratch.patch_count; p++) {
        NearPatch &patch = scratch.patches[p];
        const int j = patch.j / NEAR_COLS;
        const Piece *rows = scratch.exact_rows + patch.i;
        const Piece *dot_rows = TWICE ? scratch.dot_rows + patch.i : nullptr;
        if (patch.turned)
            add_squares<true, TWICE>(patch, rows, cols[j], dot_rows, dot_cols[j], n);
        else
            add_squares<false, TWICE>(patch, rows, cols[j], dot_rows, dot_cols[j], n);
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

// Which pairs of a row of a patch lie apart; of multiples |d|^2 becomes 0.
INLINE vl apart(const Sweep &sweep, NearPatch &patch, int m, const Block &a, const Block &b) {
    vl apart = patch.sign[m] != 0.0;
    const vl ask = apart & (patch.x[m] > 0.0) & (patch.x[m] < MAYBE_MULTIPLES);
    if (any((vi)ask))
        for (int l = 0; l < NEAR_COLS; l++)
            if (ask[l] && multiples(sweep, a, patch.i + m, b, patch.j + l)) patch.x[m][l] = apart[l] = 0;
    return apart;
}

// Adds to what the rows i and the columns j.. keep.
INLINE void add_to_rows(double *row, double *cols, vd x) {
    *row += sum(x);
    store(cols, load(cols) + x);
}

// x becomes the coefficient of the force, 0 where a pair is not near. Returns the energy, but for what
// is kept row by row.
template <class F> double near_function(const F &f, const Sweep &sweep, Scratch &scratch, Block &a, Block &b) {
    vd energy = {};
    for (int p = 0; p < scratch.patch_count; p++) {
        NearPatch &patch = scratch.patches[p];
        for (int m = 0; m < NEAR_ROWS; m++) {
            const int i = patch.i + m, j = patch.j;
            const vd sign = patch.sign[m];
            const vl near = sign != 0.0, turned = sign < 0.0, pushed = apart(sweep, patch, m, a, b);
            const vd close = patch.x[m] + (a.deficit[i] + load(b.deficit + j)), far = 4.0 - close;
            vd first, second;
            const vd e = f.near(turned ? far : close, turned ? close : far, first, second);
            const vd e_near = near ? e : vd{};
            if (a.row_energy) {
                a.row_energy[i] += sum(e_near);
                first *= double(a.weight[i]);
            } else {
                energy += e_near;
            }
            patch.x[m] = pushed ? first : vd{};
            if (sweep.call.eps == 0) continue;  // and no deficit
            add_to_rows(a.axial + i, b.axial + j, near ? sign * first : vd{});
        }
    }
    return sum(energy);
}

// Forces of the differences in one strip of columns, FORCE_ROWS rows at a time; x has their coefficients.
template <bool TURNED>
INLINE void add_forces(const NearPatch &patch, const vd *x, const Piece *rows, const Piece *cols,
                       Piece *row_force, Piece *col_force) {
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
                    const double coefficient = x[m0 + m][l];
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

void clear_forces(Scratch &scratch, const Block &a, const Block &b) {
    for (int i = 0; i < reach(a); i++)
        if (scratch.row_used[i]) memset(scratch.row_force[i], 0, sizeof(Piece));
    for (int j = 0; j < reach(b); j++)
        if (scratch.col_used[j]) memset(scratch.col_force[j], 0, sizeof(Piece));
}

// Of the differences of `rows` and `cols`, with the patches' y as coefficients or with their x.
template <bool OF_Y> void add_forces(Scratch &scratch, const Piece *rows, const Piece *cols) {
    for (int p = 0; p < scratch.patch_count; p++) {
        const NearPatch &patch = scratch.patches[p];
        const int i = patch.i, j = patch.j;
        const vd *x = OF_Y ? patch.y : patch.x;
        if (patch.turned)
            add_forces<true>(patch, x, rows + i, cols + j, scratch.row_force + i, scratch.col_force + j);
        else
            add_forces<false>(patch, x, rows + i, cols + j, scratch.row_force + i, scratch.col_force + j);
    }
}

void push_near(const Sweep &sweep, Block &block, int q0, const bool *used, const Piece *force) {
    if (!block.g) return;
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
            double *near = block.near + int64_t(q) * block.capacity + i * w;
            for (int l = 0; l < w; l++) near[l] += force[i][q - q0 + l];
        }
    }
}

void forget_near(Scratch &scratch, const Block &a, const Block &b) {
    scratch.patch_count = 0;
    memset(scratch.row_used, 0, reach(a));
    memset(scratch.col_used, 0, reach(b));
}

// |d|^2 of all near pairs.
void add_squares(const Sweep &sweep, Scratch &scratch, const Block &a, const Block &b) {
    for (int q = 0; q < sweep.kp; q += NR) {
        exact_rows(sweep, a, q, scratch.row_used, scratch.exact_rows);
        exact_rows(sweep, b, q, scratch.col_used, scratch.exact_cols);
        add_squares<false>(sweep, scratch, b, q);
    }
}

template <class F> double repair(const F &f, const Sweep &sweep, Scratch &scratch, Block &a, Block &b) {
    add_squares(sweep, scratch, a, b);
    const double energy = near_function(f, sweep, scratch, a, b);
    for (int q = 0; q < sweep.kp && sweep.with_gradient; q += NR) {
        exact_rows(sweep, a, q, scratch.row_used, scratch.exact_rows);
        exact_rows(sweep, b, q, scratch.col_used, scratch.exact_cols);
        clear_forces(scratch, a, b);
        add_forces<false>(scratch, scratch.exact_rows, scratch.exact_cols);
        push_near(sweep, a, q, scratch.row_used, scratch.row_force);
        push_near(sweep, b, q, scratch.col_used, scratch.col_force);
    }
    forget_near(scratch, a, b);
    return energy;
}

}  // namespace
}  // namespace ISA
