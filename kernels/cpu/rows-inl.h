// Rows in and out: normalized and packed before the sweep, G projected to the gradient after it.
#pragma once
#include "sweep-inl.h"

namespace ISA {
namespace {

INLINE float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float from_half(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
    if (rest >= 0x0f800000) return from_bits(sign | rest | 0x7f800000);  // inf, nan
    return from_bits(sign | 0x3f800000) * (from_bits(rest) * 0x1p112f);  // subnormals come out exact
}

// Where row i of a block begins in the caller's arrays, counted from the block's pointers into them.
INLINE int64_t place_of(const Sweep &sweep, const Block &block, int i) {
    return block.order ? block.order[i] * sweep.call.sample->stride : int64_t(i) * sweep.k;
}
INLINE int64_t gradient_place_of(const Sweep &sweep, const Block &block, int i) {
    return block.order ? block.order[i] * sweep.call.sample->gradient_stride : int64_t(i) * sweep.k;
}

// Columns q0 <= q < q0 + n of row i as float32, in place where they are.
INLINE const float *raw_row(const Sweep &sweep, const Block &block, int i, int q0, int n, float *buffer) {
    const int64_t first = place_of(sweep, block, i) + q0;
    if (sweep.call.dtype == FLOAT32) return (const float *)block.raw + first;
    const uint16_t *row = (const uint16_t *)block.raw + first;
    if (sweep.call.dtype == FLOAT16)
        for (int q = 0; q < n; q++) buffer[q] = from_half(row[q]);
    else
        for (int q = 0; q < n; q++) buffer[q] = from_bits(uint32_t(row[q]) << 16);
    return buffer;
}

// Asks for a row that will be wanted soon, where no order of addresses tells the processor so, and for the
// place of its gradient: of the next part, too.
constexpr int ROWS_AHEAD = 12;
INLINE void prefetch_row(const Sweep &sweep, const Block &block, int i, float *gradient) {
    if (!block.order || i >= block.ordered) return;
    prefetch((const float *)block.raw + place_of(sweep, block, i), sweep.k);
    if (gradient) prefetch(gradient + gradient_place_of(sweep, block, i), sweep.k);
}

// Calls each(q, place, n) for all pieces of VL / 2 columns: their first one, where it stands in row i of a
// matrix like u, and how many columns the caller's rows have from there on.
template <class Each> INLINE void each_piece(const Sweep &sweep, const Block &block, int i, Each each) {
    // read once: to the compiler, what is stored on the way could be anything
    const int k = sweep.k, kp = sweep.kp;
    const int64_t capacity = block.capacity;
    int q = 0;
    for (; q + NR <= k; q += NR)
#pragma GCC unroll 4
        for (int l = 0; l < NR; l += VL / 2) each(q + l, q * capacity + i * NR + l, VL / 2);
    for (int w; q < kp; q += w) {
        w = width(kp, q);
        for (int l = 0; l < w; l += VL / 2) each(q + l, q * capacity + i * w + l, k - q - l);
    }
}

// Stores row i of u, of which row(q, n) are VL / 2 columns, or the n that are left of them.
template <class Row> INLINE void pack(const Sweep &sweep, const Block &block, float *u, int i, Row row) {
    each_piece(sweep, block, i, [=](int q, int64_t place, int n) { narrow(u + place, row(q, n)); });
}

// Transposes VL rows of COUNT columns, `spacing` apart; n of the columns are wanted, `apart` from each other.
template <int COUNT> INLINE void turn(const float *rows, int spacing, float *columns, int apart, int n) {
    vf x[COUNT];
#pragma GCC unroll 16
    for (int v = 0; v < COUNT; v++) x[v] = load(rows + v * spacing);
    transpose<VL>(x);
#pragma GCC unroll 16
    for (int q = 0; q < COUNT; q++)
        if (q < n) store(columns + q * apart, x[q]);
}

// Fills u up with rows of zeros, and lays it out as the other operand of a product.
void transpose(const Sweep &sweep, const Block &block, float *u, float *ut) {
    const int k = sweep.k, kp = sweep.kp, whole = block.n / NR * NR;
    if (whole < block.n) memset(ut + int64_t(whole) * k, 0, sizeof(float) * NR * k);
    for (int q = 0, w; q < kp; q += w) {
        w = width(kp, q);
        float *strip = u + int64_t(q) * block.capacity;
        memset(strip + block.n * w, 0, sizeof(float) * (block.capacity - block.n) * w);
        for (int i = 0; i < block.n; i += VL) {
            const float *rows = strip + int64_t(i) * w;
            float *to = ut + int64_t(i / NR * NR) * k + q * NR + i % NR;
            if (w < VL)
                turn<LEAST>(rows, VL, to, NR, k - q);
            else
                for (int l = 0; l < w; l += VL) turn<VL>(rows + l, w, to + l * NR, NR, k - q - l);
        }
    }
}

void prepare(const Sweep &sweep, Scratch &scratch, Block &block) {
    const int k = sweep.k, kp = sweep.kp;
    const double eps = sweep.call.eps;
    for (int first = 0; first < block.n; first += ROWS_BESIDE) {
        const int rows = block.n - first < ROWS_BESIDE ? block.n - first : ROWS_BESIDE;
        const float *raw[ROWS_BESIDE];
        alignas(vd) double square[ROWS_BESIDE] = {};
        for (int m = 0; m < rows; m++) {
            prefetch_row(sweep, block, first + m + ROWS_AHEAD, nullptr);
            raw[m] = raw_row(sweep, block, first + m, 0, k, scratch.raw + m * kp);
            vd squares = {};
            int q = 0;
            for (; q + VL / 2 <= k; q += VL / 2) {
                const vd x = widen_anywhere(raw[m] + q);
                squares += x * x;
            }
            const vd x = widen(raw[m] + q, k - q);
            square[m] = sum(squares + x * x);
        }
        const vd squares = load(square), nu = square_root(squares + eps), lost = squares - squares;
        const vl dead = nu < double(__FLT_MIN__);  // NaN is not dead: it must come out
        const vd inverse = dead ? vd{} : 1.0 / nu;
        block.energy += sum(lost);  // NaN in a row of NaN or infinity: logarithms lose it
        block.broken |= any((vi)(lost != 0.0));
        store(block.inverse + first, inverse);
        store(block.deficit + first, dead ? all(1.0) : eps / (nu * nu));
        store(block.axial + first, vd{});
        for (int m = 0; m < rows; m++) {
            const float *const row = raw[m];
            const double factor = block.inverse[first + m];
            pack(sweep, block, block.u, first + m, [=](int q, int n) { return factor * widen(row + q, n); });
        }
    }
    transpose(sweep, block, block.u, block.ut);
    if (block.g) memset(block.g, 0, sizeof(float) * (int64_t(block.capacity) * kp + block.lost));
    if (block.row_energy) {
        memset(block.row_energy, 0, sizeof(double) * block.n);
        const float *given = sweep.call.row_weights;
        for (int i = 0; i < block.n; i++) block.weight[i] = given ? given[block.first + i] : 1;
    }
    if (block.ids && block.n) {
        memcpy(block.ids, block.given_ids, sizeof(int32_t) * block.n);
        block.first_id = block.last_id = block.ids[0];
        for (int i = 1; i < block.n; i++) {
            if (block.ids[i] < block.first_id) block.first_id = block.ids[i];
            if (block.ids[i] > block.last_id) block.last_id = block.ids[i];
        }
    }
}

// Whether a row has NaN or infinity in it.
INLINE bool broken(const Block &block, int i) { return !(block.inverse[i] > 0) && block.deficit[i] != 1; }

// G of a row, in double and in order, into scratch.g; returns <v, G>. `raw` is that row.
INLINE double gather_force(const Sweep &sweep, Scratch &scratch, const Block &block, int i, const float *raw) {
    const int64_t lost = block.lost;
    const float *const g = block.g;
    const double *const near = block.near, inverse = block.inverse[i];
    double *const sums = scratch.g;
    vd along = {};
    const auto gather = [&](int q, int64_t place, int n, bool plain) {
        vd force = widen(g + place);
        if (!plain && lost) force += widen(g + place + lost);
        if (!plain && near) force += load(near + place);
        along += force * (inverse * widen(raw + q, n));
        store(sums + q, force);
    };
    if (lost || near)
        each_piece(sweep, block, i, [&](int q, int64_t place, int n) { gather(q, place, n, false); });
    else
        each_piece(sweep, block, i, [&](int q, int64_t place, int n) { gather(q, place, n, true); });
    return sum(along);
}

// What is left once every pair is in: the antipodal pairs of half space, and the projection of G onto
// the tangent space, in double: G can be nearly radial, and then the rounding of v would be much of
// what is left.
void finish(const Sweep &sweep, Scratch &scratch, Block &block) {
    const int k = sweep.k;
    // of a cross set every pair counts once, in half space too
    const bool antipodes = sweep.call.pair.half_space && !sweep.call.cross;
    const double factor = block.scale * sweep.functions.slope, weight = sweep.call.sample ? sweep.weight : 1;
    const double both = antipodes ? 2 * weight : weight;
    block.energy *= both;
    // mostly all rows have one deficit
    double known_deficit = -1, antipode_energy = 0, antipode = 0;
    for (int i = 0; i < block.n; i++) {
        prefetch_row(sweep, block, i + ROWS_AHEAD, block.gradient);
        const double deficit = block.deficit[i], inverse = block.inverse[i];
        if (antipodes && deficit != known_deficit) {
            double unused;
            antipode_energy = sweep.functions.antipode(sweep, 4 - 2 * deficit, 2 * deficit, antipode, unused);
            known_deficit = deficit;
        }
        block.energy += antipode_energy;
        if (block.row_energy) {
            block.energy += block.weight[i] * block.row_energy[i];
            if (sweep.call.row_energies) sweep.call.row_energies[block.first + i] = float(block.row_energy[i]);
        }
        if (!block.gradient) continue;
        const float *raw = raw_row(sweep, block, i, 0, k, scratch.raw);
        const double along = both * (block.axial[i] * deficit - gather_force(sweep, scratch, block, i, raw)) -
                             2 * antipode * deficit;
        float *out = block.gradient + gradient_place_of(sweep, block, i);
        const double *const sums = scratch.g, outer = factor * inverse;
        const auto project = [&](int q, int n) {
            // the sum first: one of its terms alone may leave the range
            const vd g = both * load(sums + q) + along * (inverse * widen(raw + q, n));
            narrow(out + q, outer * g, n);
        };
        int q = 0;
        for (; q + VL / 2 <= k; q += VL / 2) project(q, VL / 2);
        if (q < k) project(q, k - q);
    }
    release(block.near);
    block.near = nullptr;
}

}  // namespace
}  // namespace ISA
