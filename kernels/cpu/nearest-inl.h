// The nearest other row of each row: of the largest cosine, in half space of the largest |cosine|.
//
// The same walk over the tiles of cosines as for an energy. Of a tile only the largest cosine of each
// row and column is taken, and compared with a bound: what the row has found so far. Most tiles hold
// nothing larger, and never leave the registers; the others are looked at once more. Near pairs are told apart by their exact squared
// distances, and are always nearer than others.
//
// Among equals the lowest index wins. Inside of a meeting tiles come in the order of both indices, so
// that only what is larger counts; but blocks meet in another order. Where what a row has found comes
// from a later block, its bound is the next smaller float, and an equal cosine exceeds it.
#pragma once
#include "blocks-inl.h"
#include "near_pairs-inl.h"
#include "sweep-inl.h"

namespace ISA {
namespace {

constexpr float NOBODY = -2;  // less than any cosine

void prepare_nearest(Block &block) {
    for (int i = 0; i < block.n; i++) {
        block.cosine[i] = NOBODY;
        block.squared[i] = __builtin_inf();
        block.cosine_index[i] = block.squared_index[i] = -1;
    }
}

void finish_nearest(const Sweep &, Scratch &, Block &block) {
    for (int i = 0; block.nearest && i < block.n; i++)
        block.nearest[i] = block.squared_index[i] >= 0 ? block.squared_index[i] : block.cosine_index[i];
}

// Offers a row a near one, of this index in the set.
INLINE void offer_near(Block &block, int i, double squared, int32_t index) {
    const bool equal = squared == block.squared[i];
    if (!(squared < block.squared[i] || (equal && index < block.squared_index[i]))) return;
    block.squared[i] = squared;
    block.squared_index[i] = index;
}

INLINE float next_below(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = x > 0 ? bits - 1 : x < 0 ? bits + 1 : int32_t(0x80000001);
    memcpy(&x, &bits, sizeof bits);
    return x;
}

// What a cosine with a row of `other` has to exceed; nothing exceeds it behind the last row.
void set_bounds(const Block &block, const Block &other, float *bound) {
    for (int i = 0; i < up(block.n, NR); i++) {
        const bool later = i < block.n && block.cosine_index[i] >= other.first;
        bound[i] = i >= block.n ? -NOBODY : later ? next_below(block.cosine[i]) : block.cosine[i];
    }
}

// Takes the cosines of VL columns from j on where they exceed their bounds; `top` are the largest of the
// tile's rows, which begin at row i.
template <int M>
INLINE void take_columns(const Scratch &scratch, const Block &a, Block &b, int i, int j, const float *c, vf top) {
    vi row = {};
#pragma GCC unroll 12
    for (int m = M - 1; m >= 0; m--) row = load(c + m * R) == top ? vi{} + m : row;
    float *cosine = b.cosine + j, *bound = scratch.col_bound + j;
    vi *index = (vi *)(b.cosine_index + j);
    const vf old = load(bound);
    const vi larger = top > old;
    store(bound, larger ? top : old);
    store(cosine, larger ? top : load(cosine));
    *index = larger ? int32_t(a.first) + i + row : *index;
}

INLINE void take_row(const Scratch &scratch, Block &a, const Block &b, int i, int j, int vectors, const float *c) {
    vf most = all(NOBODY);
    for (int v = 0; v < vectors; v++) most = maximum(load(c + v * VL), most);
    const float cosine = largest(most);
    if (!(cosine > scratch.row_bound[i])) return;  // of a block with itself: found as a column since
    uint64_t equal = 0;
    for (int v = 0; v < vectors; v++) equal |= uint64_t(bits(load(c + v * VL) == cosine)) << v * VL;
    a.cosine[i] = scratch.row_bound[i] = cosine;
    a.cosine_index[i] = int32_t(b.first) + j + __builtin_ctzll(equal);
}

// What counted() asks a pair function.
template <bool HALF> struct Ends {
    static constexpr bool TWO_ENDED = HALF;
};

// Takes the largest cosines of a tile where they exceed their bounds; those of the columns only where a
// set meets itself, and first: they have the lower indices.
template <bool HALF, bool SYMMETRIC, bool WHOLE, int M>
void nearest_of_tile(const Sweep &sweep, Scratch &scratch, Block &a, Block &b, int i, int j, float *c) {
    const int vectors = WHOLE ? NV : vectors_of_tile(b, j);
    alignas(64) float sign[MR][NR] = {};
    vi near_ones = {};
    uint32_t larger = 0;  // which rows find a larger one
    vf top[NV];
    for (int v = 0; v < NV; v++) top[v] = all(NOBODY);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
        vf most = all(NOBODY);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            float *p = c + m * R + v * VL;
            const vf given = load(p);
            vf x = HALF ? magnitude(given) : given;
            if (!WHOLE) {
                float *signs = sign[m] + v * VL;
                const vi counts = counted<Ends<HALF>>(sweep, a, b, i + m, j + v * VL, given, signs, near_ones);
                x = counts ? x : all(NOBODY);
            }
            if (HALF || !WHOLE) store(p, x);
            top[v] = maximum(x, top[v]);
            most = maximum(x, most);
        }
        larger |= uint32_t(any(most > scratch.row_bound[i + m])) << m;
    }
    for (int v = 0; SYMMETRIC && v < vectors; v++)
        if (any(top[v] > load(scratch.col_bound + j + v * VL)))
            take_columns<M>(scratch, a, b, i, j + v * VL, c + v * VL, top[v]);
    for (; larger; larger &= larger - 1) {
        const int m = __builtin_ctz(larger);
        take_row(scratch, a, b, i + m, j, vectors, c + m * R);
    }
    if (!WHOLE && any(near_ones)) keep_near(scratch, i, j, M, vectors * VL, sign);
}

enum Look { NOTHING, LARGER, NEAR };

// Sums up the cosines of a tile whose pairs all count. Where some are larger than their bounds, or may be
// of near pairs, the tile is stored.
template <bool HALF, bool SYMMETRIC, int M>
Look look_at_tile(const Sweep &sweep, const Scratch &scratch, const Block &a, const Block &b, int i, int j, int q,
                  float *c) {
    vf acc[M][NV], top[NV], excess = {};
    load_tile(acc, q ? c : nullptr);
    multiply(sweep, acc, a, a.u, b.ut, i, j, q, sweep.k);
    for (int v = 0; v < NV; v++) top[v] = all(NOBODY);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
        vf most = all(NOBODY);
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) {
            const vf x = HALF ? magnitude(acc[m][v]) : acc[m][v];
            top[v] = maximum(x, top[v]);
            most = maximum(x, most);
        }
        excess = maximum(most - scratch.row_bound[i + m], excess);
    }
    vi larger = excess > 0.0f, near = {};
    for (int v = 0; v < NV; v++) {
        near |= top[v] > sweep.near_cosine;
        if (SYMMETRIC) larger |= top[v] > load(scratch.col_bound + j + v * VL);
    }
    if (!any(larger | near)) return NOTHING;
#pragma GCC unroll 12
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) store(c + m * R + v * VL, acc[m][v]);
    return any(near) ? NEAR : LARGER;
}

template <bool SYMMETRIC> void offer_near_pairs(const Sweep &sweep, Scratch &scratch, Block &a, Block &b) {
    for (int p = 0; p < scratch.patch_count; p++) {
        NearPatch &patch = scratch.patches[p];
        for (int m = 0; m < NEAR_ROWS; m++) {
            const int i = patch.i + m, j = patch.j;
            const vl near = patch.sign[m] != 0.0;
            if (!any((vi)near)) continue;
            apart(sweep, patch, m, a, b);  // multiples of one row have no distance
            const vd squared = patch.x[m] + (a.deficit[i] + load(b.deficit + j));
            vl wanted = squared <= a.squared[i];
            if (SYMMETRIC) wanted |= squared <= load(b.squared + j);
            if (!any((vi)(wanted & near))) continue;
            for (int l = 0; l < NEAR_COLS; l++) {
                if (!near[l]) continue;
                offer_near(a, i, squared[l], int32_t(b.first) + j + l);
                if (SYMMETRIC) offer_near(b, j + l, squared[l], int32_t(a.first) + i);
            }
        }
    }
}

template <bool HALF, bool SYMMETRIC> void meet_nearest(const Sweep &sweep, Scratch &scratch, Block &a, Block &b) {
    const bool ids_overlap = b.ids && a.first_id <= b.last_id && b.first_id <= a.last_id;
    set_bounds(a, b, scratch.row_bound);
    scratch.col_bound = &a == &b ? scratch.row_bound : scratch.other_bound;
    if (SYMMETRIC && &a != &b) set_bounds(b, a, scratch.col_bound);
    for (int q = 0; q < sweep.k; q += KC) {
        const int end = sweep.k - q < KC ? sweep.k : q + KC;
        each_tile(a, b, [&](int i, int j, int rows, bool wide) {
            float *c = sweep.k > KC ? scratch.c + i * R + j : scratch.c;  // one tile's memory is in cache
            bool whole = end == sweep.k && !ids_overlap && inside(a, b, i, j, rows);
            if (whole) {
                const auto look = rows == MR ? look_at_tile<HALF, SYMMETRIC, MR> : look_at_tile<HALF, SYMMETRIC, SHORT>;
                const Look found = look(sweep, scratch, a, b, i, j, q, c);
                if (found == NOTHING) return;
                whole = found == LARGER;
            } else {
                tile_of_cosines(sweep, a, b, i, j, rows, wide, q, end, c);
                if (end < sweep.k) return;
            }
            const auto of_tile = rows == MR ? whole ? nearest_of_tile<HALF, SYMMETRIC, true, MR>
                                                    : nearest_of_tile<HALF, SYMMETRIC, false, MR>
                                 : whole    ? nearest_of_tile<HALF, SYMMETRIC, true, SHORT>
                                            : nearest_of_tile<HALF, SYMMETRIC, false, SHORT>;
            of_tile(sweep, scratch, a, b, i, j, c);
        });
    }
    if (!scratch.patch_count) return;
    add_squares(sweep, scratch, a, b);
    offer_near_pairs<SYMMETRIC>(sweep, scratch, a, b);
    forget_near(scratch, a, b);
}

Meet *choose_nearest(bool half_space, bool symmetric) {
    if (half_space) return symmetric ? meet_nearest<true, true> : meet_nearest<true, false>;
    return symmetric ? meet_nearest<false, true> : meet_nearest<false, false>;
}

}  // namespace
}  // namespace ISA
