// What the parts of a sweep share: its constants, and the blocks of rows that it is cut into.
#pragma once
#include <stdlib.h>
#include <string.h>
#if defined(_WIN32)
#include <malloc.h>
#endif

#include "pairwise.h"
#include "threads-inl.h"
#include "vector-inl.h"

namespace ISA {
namespace {

constexpr int R = 288;                         // most rows of a block
constexpr int R_TWICE = 192;                   // at second order and in two spaces, where there are more matrices of R x R
constexpr int LEAST = VL == 16 ? VL / 2 : VL;  // columns of the narrowest strip
constexpr int KC = 256;                        // columns that stay in cache while cosines are summed
// Of n random rows' G the projection leaves about 1 / sqrt(n / k) in half space, and a few times more in
// full space: from this n / k on the sum keeps its rounding errors
constexpr int MOSTLY_AXIAL = 600, MOSTLY_AXIAL_HALF = 100;
// near pairs are worked on by patches of a tile, their forces by as many rows as registers can hold
constexpr int NEAR_ROWS = 6, NEAR_COLS = VL / 2;
constexpr int FORCE_ROWS = MR / 2;
constexpr int ROWS_BESIDE = VL / 2;  // rows whose norms are computed at a time

constexpr int MOST_ENERGIES = 2 * sizeof(vf);  // bytes of an F::Energies

static_assert(R % NR == 0 && R_TWICE % NR == 0 && KC % NR == 0 && MR % NEAR_ROWS == 0, "tiles must divide blocks");

// Up to R rows of a set, packed. Matrices of row vectors (u, g) are cut into strips of columns,
// [strip][capacity][width]: NR wide, the last ones VL or LEAST. Columns are padded with zeros to kp.
struct Block {
    const char *raw;            // first row as the caller stores it; where there is an order, of the set
    const int64_t *order;       // of a sample: which rows of the set these are, else null
    int64_t ordered;            // how many there are from here to the end of the set
    int64_t first;              // its number in the set
    const int32_t *given_ids;   // cross form, where it has some, else null
    int32_t *ids;               // a copy, with room for whole tiles
    int32_t first_id, last_id;  // smallest and largest of them
    float *gradient;            // where the result goes, like raw, or null; at second order the product
    double scale;
    int n, capacity;  // rows, and rows there is room for
    float *u, *g;     // unit rows v, and G; null where no gradient is wanted of this side
    int64_t lost;     // g[i + lost] is what rounding took from g[i]; 0 where that is not kept
    double *near;     // the forces of near pairs, laid out like g; null while there are none
    float *ut;        // u again, as the other operand of the cosines: [panel of NR rows][k][NR]
    double *inverse;  // 1/nu, 0 for a dead row
    double *deficit;  // 1 - |v|^2
    double *axial;    // sum of the coefficients of repaired pairs, see near_pairs-inl.h
    double energy;    // of a sample as of all pairs, divided by their weight
    bool broken;  // some row has NaN or infinity in it
    Stage stage;

    // of a cross set, while its energies are kept row by row, else null
    bool by_row;
    double *row_energy;  // E_i
    float *weight;

    // of a sample
    float *moment;     // V^T V and the sum of the rows v, see moments-inl.h

    // nearest rows
    int64_t *nearest;                       // where the result goes, or null
    float *cosine;                          // the largest with a row that is not near
    double *squared;                        // the least squared distance from a near one
    int32_t *cosine_index, *squared_index;  // of these rows in the set

    // second order alone; _dot is the derivative along the tangents
    const float *tangent, *known_gradient;  // the block's part of the caller's
    float *u_dot, *ut_dot;                  // v. as u and ut have v
    double *tau;                            // <v, tangent>
    double *outward;                        // -<v, G>
    double *axial_dot;
};

// Rows first <= i < first + n against themselves or, in the cross form, against m columns.
struct Set {
    int64_t first, n, m;
    double scale;
    int64_t index;     // as the caller counts
    Block *row, *col;  // the same where a set meets itself
    int rows, cols;
    int rounds;        // how many others each block meets, itself included: of a sample, those of its part
    double *moment;    // of a sample: the sum of the blocks'
};

// Pairs that have to be repaired, among NEAR_ROWS x NEAR_COLS neighbours.
struct NearPatch {
    int i, j;     // the first row and column
    bool turned;  // some sign is -1
    vd x[NEAR_ROWS];     // |d|^2 of d = v_i - sign v_j, then the coefficient of d
    vd y[NEAR_ROWS];     // second order: <d, d.>, then the coefficient of d.
    vd sign[NEAR_ROWS];  // 1, -1 where the pair is nearly antipodal, 0 where it is not near
};

typedef double Piece[NR];  // of a row: its columns in one strip

// One thread's memory.
struct Scratch {
    float *c;            // [R][R] cosines, then coefficients
    float *c_dot;        // [R][R] second order: the same of their derivatives
    float *row_sums;     // [R][VL] second order: sums over the columns, vector by vector
    float *col_sums;     // [R]
    float *raw;          // [ROWS_BESIDE][kp] rows
    double *g;           // [kp] G of a row
    char *memory;        // for the blocks of a set that this thread sees to alone
    // nearest rows: what the cosines of a meeting have to exceed; a block with itself has one for both
    float *row_bound, *col_bound, *other_bound;
    char *row_energies;  // of the rows of a block with the columns that it meets, each one F::Energies
    NearPatch *patches;  // as many as two blocks can have
    int patch_count;
    bool row_used[R + NR], col_used[R + NR];  // touched by a patch
    // a strip of the unit rows of both blocks, and of the forces on them
    Piece *exact_rows, *exact_cols, *row_force, *col_force;
    Piece *dot_rows, *dot_cols;  // second order
    float *operand;  // of a sample, see moments-inl.h
    double *part;    // the moments of a part of several blocks
};

typedef void Meet(const struct Sweep &, Scratch &, Block &a, Block &b);

// What depends on the pair function.
struct Functions {
    double slope;  // F' is slope times the coefficients
    Meet *meet;
    Meet *meet_by_row;  // the energies of each row apart, and weighted
    Meet *meet_twice;   // second order
    double (*antipode)(const struct Sweep &, double x, double y, double &first, double &second);
};

struct Sweep {
    Call call;
    int k, kp;
    bool with_energy, with_gradient;
    bool twice;   // second order
    bool by_row;  // the energies of a cross set are kept row by row
    bool moments;   // of a sample with a polynomial
    double weight;  // of a sample: the number of all pairs over that of the pairs within parts
    int most_rows;  // of a block
    float near_cosine;
    int32_t near_bits, closeness_mask;  // for integers: near where (bits of c & mask) > near_bits
    Functions functions;
    Meet *meet;
    Set *sets;                     // largest first
    int64_t set_count, shared_count;  // the first ones are shared by all threads
    int threads;
    int64_t next;                // the task to be drawn next
    mutable bool out_of_memory;  // a thread was
};

// Memory by cache lines.
template <class T> T *allocate(size_t count) {
    const size_t bytes = (count * sizeof(T) + 64) / 64 * 64;
#if defined(_WIN32)
    return (T *)_aligned_malloc(bytes, 64);
#else
    return (T *)aligned_alloc(64, bytes);
#endif
}

INLINE void release(void *memory) {
#if defined(_WIN32)
    _aligned_free(memory);
#else
    free(memory);
#endif
}

// Hands out memory in cache lines; with a null base it only counts.
struct Arena {
    char *base;
    size_t used;
    template <class T> T *take(size_t count) {
        T *p = base ? (T *)(base + used) : nullptr;
        used += (count * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

INLINE int width(int kp, int q) { return kp - q >= NR ? NR : kp - q >= VL ? VL : LEAST; }
INLINE int up(int64_t x, int step) { return int((x + step - 1) / step * step); }
// Rows that a block of n has room for: whole vectors of them, and whole tiles.
INLINE int capacity_of(int n) { return up(n, VL); }

}  // namespace
}  // namespace ISA
