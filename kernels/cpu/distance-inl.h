// The distance of each row to one other, the column of its index, and the gradient of a weighted sum of
// these distances. All in double, from the difference d of the unit rows, so that near rows lose no
// digits:
//
//     v = p / nu_v,  w = q / nu_w,  nu = sqrt(|p|^2 + eps),  deficit = 1 - |v|^2 = eps / nu^2
//     d = v - side w,  x = 2 - 2 |c| = |d|^2 + deficit_v + deficit_w        side: the sign of c = <v, w>
//     dt/dp = g (d - x/2 v) / nu_v,  dt/dq = -g (side d + x/2 w) / nu_w     g = -dt/d|c|
//
// A row may be near to very many others. Therefore the gradient is made row by row, each the sum over all
// that have it for their nearest: nothing is shared, and the result does not depend on the threads.
#pragma once
#include "near_pairs-inl.h"
#include "rows-inl.h"
#include "sweep-inl.h"

namespace ISA {
namespace {

// What the threads share.
struct Distances {
    DistanceCall call;
    const char *columns;      // of the call, or the rows themselves
    int64_t others;           // how many they are
    int64_t *first, *chosen_by;  // rows chosen_by[first[j]] .. are those of index j
    int64_t next;             // the row, or column, to be worked on next
};

// One thread's memory.
struct DistanceScratch {
    float *row, *column;  // [k] as float32
    double *gradient;     // [k], to whole vectors
};

// A row and the other one.
struct Apart {
    const float *p, *q;
    double to_v, to_w;    // 1 / nu, 0 for a dead row
    double of_v, of_w;    // d = of_v v - of_w w
    double side, x, t, g;
};

const float *as_float(const DistanceCall &call, const char *rows, int64_t i, float *buffer) {
    if (call.dtype == FLOAT32) return (const float *)rows + i * call.k;
    const uint16_t *row = (const uint16_t *)rows + i * call.k;
    for (int64_t q = 0; q < call.k; q++)
        buffer[q] = call.dtype == FLOAT16 ? from_half(row[q]) : from_bits(uint32_t(row[q]) << 16);
    return buffer;
}

// Whether one row is a multiple of the other; of floats every product is exact.
bool are_multiples(const float *p, const float *q, int64_t k) {
    double x = 0, y = 0;  // the first entries that are not 0
    for (int64_t l = 0; l < k; l++) {
        if (x == 0 && y == 0) {
            x = p[l];
            y = q[l];
        }
        if (p[l] * y != q[l] * x) return false;
    }
    return true;
}

INLINE vd difference(const Apart &apart, vd v, vd w) { return apart.of_v * v - apart.of_w * w; }

// 1 / nu and 1 - |v|^2 of a row of this squared length.
INLINE double inverse_length(double squared, double eps, double &deficit) {
    const double nu = __builtin_sqrt(squared + eps);
    const bool dead = nu < __FLT_MIN__;  // NaN is not dead: it must come out
    deficit = dead ? 1 : eps / (nu * nu);
    return dead ? 0 : 1 / nu;
}

Apart compare(const Distances &all, DistanceScratch &scratch, int64_t i) {
    const DistanceCall &call = all.call;
    const int k = int(call.k);
    Apart apart;
    apart.p = as_float(call, (const char *)call.rows, i, scratch.row);
    apart.q = as_float(call, all.columns, call.index[i], scratch.column);
    vd pp = {}, qq = {}, pq = {};
    for (int q = 0; q < k; q += VL / 2) {
        const vd v = widen(apart.p + q, k - q), w = widen(apart.q + q, k - q);
        pp += v * v;
        qq += w * w;
        pq += v * w;
    }
    double v_deficit, w_deficit;
    apart.to_v = inverse_length(sum(pp), call.eps, v_deficit);
    apart.to_w = inverse_length(sum(qq), call.eps, w_deficit);
    apart.side = sum(pq) < 0 ? -1 : 1;
    apart.of_v = 1;
    apart.of_w = apart.side;
    vd squares = {};
    for (int q = 0; q < k; q += VL / 2) {
        const vd d =
            difference(apart, apart.to_v * widen(apart.p + q, k - q), apart.to_w * widen(apart.q + q, k - q));
        squares += d * d;
    }
    double squared = sum(squares);
    if (squared < MAYBE_MULTIPLES && are_multiples(apart.p, apart.q, k)) {
        // no direction but their own: |v| - |w| is all that is between them
        apart.of_v = (w_deficit - v_deficit) / 2;
        apart.of_w = 0;
        squared = apart.of_v * apart.of_v;
    }
    const double x = apart.x = squared + v_deficit + w_deficit;
    const bool folded = call.half_space || apart.side > 0;
    const double near = folded ? x : 4 - x, far = folded ? 4 - x : x;
    apart.t = __builtin_sqrt(near);
    if (call.angular) apart.t = 2 * __builtin_atan2(apart.t, __builtin_sqrt(far));
    const double square = call.angular ? x * (4 - x) / 4 : near;  // of the sine, or of the chord
    apart.g = square > 0 ? (folded ? 1 : -1) / __builtin_sqrt(square) : square;  // NaN stays NaN
    return apart;
}

// What row i, of index j, adds to its own gradient, and to that of row j.
void add_to_own(const Distances &all, DistanceScratch &scratch, int64_t i) {
    if (all.call.index[i] < 0) return;
    const Apart apart = compare(all, scratch, i);
    const double factor = all.call.weights[i] * apart.g * apart.to_v;
    if (apart.to_v == 0) return;
    const int k = int(all.call.k);
    for (int q = 0; q < k; q += VL / 2) {
        const vd v = apart.to_v * widen(apart.p + q, k - q), w = apart.to_w * widen(apart.q + q, k - q);
        double *to = scratch.gradient + q;
        store(to, load(to) + factor * (difference(apart, v, w) - apart.x / 2 * v));
    }
}

void add_to_chosen(const Distances &all, DistanceScratch &scratch, int64_t i) {
    const Apart apart = compare(all, scratch, i);
    const double factor = all.call.weights[i] * apart.g * apart.to_w;
    if (apart.to_w == 0) return;
    const int k = int(all.call.k);
    for (int q = 0; q < k; q += VL / 2) {
        const vd v = apart.to_v * widen(apart.p + q, k - q), w = apart.to_w * widen(apart.q + q, k - q);
        double *to = scratch.gradient + q;
        store(to, load(to) - factor * (apart.side * difference(apart, v, w) + apart.x / 2 * w));
    }
}

// The gradient in a row, of what it has chosen and of those that have chosen it.
void gradient_of_row(const Distances &all, DistanceScratch &scratch, int64_t row, bool own, bool chosen, float *out) {
    const int k = int(all.call.k);
    memset(scratch.gradient, 0, sizeof(double) * up(k, VL / 2));
    if (own) add_to_own(all, scratch, row);
    for (int64_t at = chosen ? all.first[row] : 0, end = chosen ? all.first[row + 1] : 0; at < end; at++)
        add_to_chosen(all, scratch, all.chosen_by[at]);
    for (int q = 0; q < k; q += VL / 2) narrow(out + row * k + q, load(scratch.gradient + q), k - q);
}

constexpr int64_t AT_ONCE = 64;  // rows that a thread takes

// Rows first, then columns; not inlined, like work() of schedule-inl.h.
__attribute__((noinline)) void work(Distances &all, DistanceScratch &scratch) {
    const DistanceCall &call = all.call;
    const int64_t count = call.distance || call.to_rows ? call.n : 0, end = count + (call.to_columns ? call.m : 0);
    for (int64_t at; (at = __atomic_fetch_add(&all.next, AT_ONCE, __ATOMIC_RELAXED)) < end;)
        for (int64_t task = at; task < at + AT_ONCE && task < end; task++) {
            if (task >= count)
                gradient_of_row(all, scratch, task - count, false, true, call.to_columns);
            else if (call.to_rows)
                gradient_of_row(all, scratch, task, true, !call.columns, call.to_rows);
            else
                call.distance[task] = call.index[task] < 0 ? __builtin_inff() : float(compare(all, scratch, task).t);
        }
}

// Lists for every column the rows that have chosen it, in their order.
void list_choices(Distances &all) {
    memset(all.first, 0, sizeof(int64_t) * (all.others + 2));
    int64_t *const end = all.first + 1;  // of a column's list, once it is full
    for (int64_t i = 0; i < all.call.n; i++)
        if (all.call.index[i] >= 0) end[all.call.index[i] + 1]++;
    for (int64_t j = 0; j < all.others; j++) end[j + 1] += end[j];
    for (int64_t i = 0; i < all.call.n; i++)
        if (all.call.index[i] >= 0) all.chosen_by[end[all.call.index[i]]++] = i;
}

__attribute__((noinline)) Status set_up_and_work(const DistanceCall &call) {
    Distances all = {};
    all.call = call;
    all.columns = (const char *)(call.columns ? call.columns : call.rows);
    all.others = call.columns ? call.m : call.n;
    // below about a millisecond of one core, waking the others costs more than it brings
    const int threads = double(call.n + call.m) * call.k < 1e6 || call.threads < 1 ? 1 : call.threads;
    const bool lists = call.to_columns || (call.to_rows && !call.columns);
    const size_t row = up(call.k, VL), bytes = row * (2 * sizeof(float) + sizeof(double));
    char *const memory = allocate<char>(bytes * threads);
    if (lists) {
        all.first = allocate<int64_t>(all.others + 2);
        all.chosen_by = allocate<int64_t>(call.n);
    }
    const bool enough = memory && (!lists || (all.first && all.chosen_by));
    if (enough) {
        if (lists) list_choices(all);
        int started = 0;
        const auto start = [&] {
            char *const mine = memory + bytes * __atomic_fetch_add(&started, 1, __ATOMIC_RELAXED);
            DistanceScratch scratch = {};
            scratch.gradient = (double *)mine;
            scratch.row = (float *)(scratch.gradient + row);
            scratch.column = scratch.row + row;
            work(all, scratch);
        };
        if (threads == 1) {
            start();
        } else {
#pragma omp parallel num_threads(threads)
            {
                StandardArithmetic standard;
                start();
            }
        }
    }
    release(memory);
    release(all.first);
    release(all.chosen_by);
    return enough ? OK : OUT_OF_MEMORY;
}

}  // namespace

Status run(const DistanceCall &call) {
    StandardArithmetic standard;
    return set_up_and_work(call);
}

}  // namespace ISA
