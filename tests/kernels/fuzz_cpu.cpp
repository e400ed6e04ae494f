// Random shapes, offsets, options and rows through the C interface of the CPU kernel, for libFuzzer:
// `make fuzz`. Inputs and outputs have exactly their size, so that AddressSanitizer sees one step
// too far; every output must be written, and rows without NaN and infinity give no NaN.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../../kernels/cpu/pairwise.h"

extern "C" int comhe_best_isa();
extern "C" int comhe_sweep(const Call *call, int isa);
extern "C" int comhe_distance(const DistanceCall *call, int isa);

namespace {

// The input's bytes, then, for ever, numbers that depend on all of them.
struct Bytes {
    const uint8_t *data;
    size_t left;
    uint32_t state;
    unsigned next(unsigned bound) {
        for (int i = 0; i < 2; i++) {
            state = state * 16777619 + 97;
            if (!left) continue;
            state ^= *data++;
            left--;
        }
        return (state >> 8) % bound;
    }
};

void require(bool holds) {
    if (!holds) abort();
}

// Random rows; or all close; or axes, their opposites and dead rows; or huge; or close to one of a few
// directions and their opposites; or any bits (`wild`).
void fill(Bytes &bytes, void *points, int64_t rows, int64_t k, int dtype, bool wild) {
    uint32_t state = bytes.next(65536) + 1;
    const int kind = bytes.next(5);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t q = 0; q < k; q++) {
            state = state * 1664525 + 1013904223;
            float x = int32_t(state) * 0x1p-31f;
            if (kind == 1) x = q == 0 ? 1 : x * 1e-4f;
            if (kind == 2) x = i % 3 ? (q == i % k) * (i % 2 ? 1.f : -1.f) : 0;
            if (kind == 3) x *= 1e30f;
            if (kind == 4) x = (q == i % 3) * (i % 5 < 2 ? 1.f : -1.f) + x * 1e-4f;
            uint32_t bits;
            memcpy(&bits, &x, 4);
            if (wild) bits = state;
            if (dtype == FLOAT32) memcpy((char *)points + 4 * (i * k + q), &bits, 4);
            const uint16_t half = dtype == BFLOAT16 ? bits >> 16 : wild ? state >> 16 : 0x3000 + (state >> 20) % 0x800 + (state >> 16 & 0x8000);
            if (dtype != FLOAT32) memcpy((char *)points + 2 * (i * k + q), &half, 2);
        }
}

// A copy on the heap of exactly this size.
template <class T> T *exact(const T *from, size_t count) {
    T *to = (T *)malloc(count * sizeof(T) + !count);
    if (count) memcpy(to, from, count * sizeof(T));
    return to;
}

float *poisoned(size_t count) {
    float *p = (float *)malloc(count * sizeof(float) + !count);
    memset(p, 0xaa, count * sizeof(float));  // no result is -3.0316488e-13
    return p;
}

void written(const float *p, size_t count, bool finite) {
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, p + i, 4);
        require(bits != 0xaaaaaaaa && !(finite && isnan(p[i])));
    }
}

// Whether second derivatives, too, stay in the range of float32.
bool bounded(const float *p, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (!(fabsf(p[i]) < 1e15f)) return false;
    return true;
}

// Sets of one size, with gaps between their rows, of which rows meet within parts alone.
void sample(Bytes &bytes, Call call, bool wild, bool finite) {
    const int64_t n = 2 + (bytes.next(6) ? bytes.next(90) : 700 + bytes.next(200)), sets = bytes.next(4);
    const bool beside = bytes.next(2), gradient = bytes.next(4);
    const int64_t gap = bytes.next(4), set_stride = beside ? call.k : n * (call.k + gap);
    const int64_t stride = beside ? sets * call.k + gap : call.k + gap;
    const size_t count = sets ? (sets - 1) * set_stride + (n - 1) * stride + call.k : 0;
    float *points = (float *)malloc(count * sizeof(float) + !count);
    fill(bytes, points, count, 1, FLOAT32, wild);
    int64_t *order = (int64_t *)malloc(sets * n * sizeof(int64_t) + !sets);
    int64_t *sizes = (int64_t *)malloc(sets * sizeof(int64_t) + !sets);
    double *scales = (double *)malloc(sets * sizeof(double) + !sets);
    double *energy = (double *)malloc(sets * sizeof(double) + !sets);
    for (int64_t s = 0; s < sets; s++) {
        sizes[s] = n;
        scales[s] = 1e-6;
        for (int64_t i = 0; i < n; i++) {  // each to a random place among those before it
            const int64_t other = s * n + bytes.next(unsigned(i + 1));
            order[s * n + i] = order[other];
            order[other] = i;
        }
    }
    const double values[] = {0, 0.3, -0.7}, a = values[bytes.next(3)], b = values[bytes.next(3)];
    const int64_t parts = 1 + bytes.next(bytes.next(2) ? unsigned(n / 2) : 2) % (n / 2);
    const Sample sample = {order, parts, stride, set_stride, stride, set_stride, {a, b}, energy};
    call.points = points;
    call.sets = sets;
    call.sizes = sizes;
    call.scales = scales;
    call.sample = &sample;
    for (int isa = 0; isa <= comhe_best_isa(); isa++) {
        call.gradient = gradient ? poisoned(count) : nullptr;
        for (int64_t s = 0; s < sets; s++) energy[s] = NAN;
        require(comhe_sweep(&call, isa) == OK);
        for (int64_t s = 0; s < sets; s++) {
            require(!finite || !isnan(energy[s]));
            for (int64_t i = 0; gradient && i < n; i++)
                written(call.gradient + s * set_stride + i * stride, call.k, finite);
        }
        free(call.gradient);
    }
    free(points);
    free(order);
    free(sizes);
    free(scales);
    free(energy);
}

// Each row's distance from one other, or from a column, and the gradient of their weighted sum.
void measure(Bytes &bytes, const Call &settings, const void *rows, int64_t n, const void *columns, int64_t m,
             const float *weights, bool finite) {
    const int64_t others = columns ? m : n;
    int64_t *index = (int64_t *)malloc(n * sizeof(int64_t) + !n);
    for (int64_t i = 0; i < n; i++) index[i] = int64_t(bytes.next(unsigned(others + 1))) - 1;
    DistanceCall call = {};
    call.rows = rows;
    call.columns = columns;
    call.index = index;
    call.n = n;
    call.m = columns ? m : 0;
    call.k = settings.k;
    call.eps = settings.eps;
    call.dtype = settings.dtype;
    call.half_space = settings.pair.half_space;
    call.angular = settings.pair.angular;
    call.threads = settings.threads;
    for (int isa = 0; isa <= comhe_best_isa(); isa++) {
        DistanceCall forward = call, backward = call;
        forward.distance = poisoned(n);
        require(comhe_distance(&forward, isa) == OK);
        written(forward.distance, n, finite);
        backward.weights = weights;
        backward.to_rows = poisoned(n * call.k);
        backward.to_columns = columns ? poisoned(m * call.k) : nullptr;
        require(comhe_distance(&backward, isa) == OK);
        written(backward.to_rows, n * call.k, finite);
        if (columns) written(backward.to_columns, m * call.k, finite);
        free(forward.distance);
        free(backward.to_rows);
        free(backward.to_columns);
    }
    free(index);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Bytes bytes = {data, size, 2166136261u};
    Call call = {};
    const bool cross = bytes.next(4) == 0, wild = bytes.next(8) == 0, gradient = bytes.next(4);
    const bool with_ids = bytes.next(4), weighted = bytes.next(2), by_row = bytes.next(2);
    call.sets = cross ? 2 : bytes.next(5);
    call.k = bytes.next(8) ? 1 + bytes.next(70) : 250 + bytes.next(60);
    call.dtype = bytes.next(3);
    call.threads = 1 + bytes.next(3);
    const double exponents[] = {0, 1, 2, 0.5, 3.7, 30, -0.5, -1.9}, distances[] = {1e-3, 0, 0.5, 1.99};
    const double s = exponents[bytes.next(8)], at = distances[bytes.next(4)];
    const int function = bytes.next(8) ? RIESZ : bytes.next(2) ? GAUSSIAN : LAPLACE;
    const double shift = function == RIESZ && bytes.next(3) == 0 ? 0.01 : 0;
    call.pair.function = function;
    call.pair.parameters[0] = function == RIESZ ? s : s * s + 0.01;
    call.pair.parameters[1] = shift;
    call.pair.growth = function == RIESZ ? s + 2 : function == LAPLACE;
    const bool has_tangent = function == RIESZ && shift == 0 && at > 0;
    const double value = s == 0 ? -log(at) : s > 0 ? pow(at, -s) : -pow(at, -s);
    if (has_tangent) call.pair.tangent = {at, value, -(s == 0 ? 1 : fabs(s)) * pow(at, -s - 1)};
    call.pair.half_space = bytes.next(2);
    call.pair.angular = bytes.next(2);
    call.eps = bytes.next(2) * 1e-4;
    int64_t sizes[4], rows = 0;
    double scales[4];
    for (int s = 0; s < call.sets; s++) {
        // the largest are enough work for several threads
        sizes[s] = bytes.next(6) ? bytes.next(60) : bytes.next(6) ? bytes.next(420) : 800 + bytes.next(300);
        scales[s] = 1e-6;
        rows += sizes[s];
    }
    const int64_t first = cross ? sizes[0] : rows, second = rows - first;
    const size_t width = call.dtype == FLOAT32 ? 4 : 2;
    void *points = malloc(first * call.k * width + !first), *columns = nullptr;
    fill(bytes, points, first, call.k, call.dtype, wild);
    int32_t *ids = nullptr;
    if (cross) {
        columns = malloc(second * call.k * width + !second);
        fill(bytes, columns, second, call.k, call.dtype, wild);
        ids = (int32_t *)malloc(rows * sizeof(int32_t) + !rows);
        for (int64_t i = 0; i < rows; i++) ids[i] = i < first ? int32_t(i) : int32_t(i - bytes.next(300));
    }
    call.points = points;
    call.cross = cross;
    call.columns = columns;
    if (cross && with_ids) {
        call.row_ids = exact(ids, first);
        call.column_ids = exact(ids + first, second);
    }
    float *weights = (float *)malloc(first * sizeof(float) + !first);
    for (int64_t i = 0; i < first; i++) weights[i] = int(bytes.next(5)) - 1;
    if (cross && weighted) call.row_weights = weights;
    call.sizes = exact(sizes, call.sets);
    call.scales = exact(scales, cross ? 1 : call.sets);
    const size_t energies = cross ? 1 : call.sets;
    // an infinite energy has no useful gradient, and large powers of close pairs are infinite
    const bool finite = !wild && (function != RIESZ || ((has_tangent || shift > 0) && s < 4));
    float *tangents = (float *)malloc(first * call.k * sizeof(float) + !first);
    fill(bytes, tangents, first, call.k, FLOAT32, wild);
    for (int isa = 0; isa <= comhe_best_isa(); isa++) {
        call.energy = poisoned(energies);
        call.gradient = gradient ? poisoned(first * call.k) : nullptr;
        call.columns_gradient = gradient && cross ? poisoned(second * call.k) : nullptr;
        call.row_energies = cross && by_row ? poisoned(first) : nullptr;
        require(comhe_sweep(&call, isa) == OK);
        written(call.energy, energies, finite);
        if (call.row_energies) written(call.row_energies, first, finite);
        if (gradient) written(call.gradient, first * call.k, finite);
        if (gradient && cross) written(call.columns_gradient, second * call.k, finite);
        Call closest = call;
        closest.row_weights = nullptr;
        closest.row_energies = nullptr;
        closest.nearest = (int64_t *)poisoned(2 * first);
        require(!first || comhe_sweep(&closest, isa) == OK);
        for (int64_t i = 0, s = 0, end = sizes[0]; i < first; i++) {
            while (!cross && i == end) end += sizes[++s];
            require(closest.nearest[i] >= -1 && closest.nearest[i] < (cross ? second : sizes[s]));
        }
        free(closest.nearest);
        if (gradient && !cross) {
            Call twice = call;
            twice.second_order = 1;
            twice.tangents = tangents;
            twice.known_gradient = call.gradient;
            twice.product = poisoned(first * call.k);
            require(comhe_sweep(&twice, isa) == OK);
            written(twice.product, first * call.k, finite && bounded(call.gradient, first * call.k));
            free(twice.product);
        }
        free(call.energy);
        free(call.gradient);
        free(call.columns_gradient);
        free(call.row_energies);
    }
    measure(bytes, call, points, first, columns, second, weights, !wild);
    if (call.dtype == FLOAT32 && !cross) sample(bytes, call, wild, finite);
    free(points);
    free(columns);
    free(ids);
    free(weights);
    free((void *)call.row_ids);
    free((void *)call.column_ids);
    free(tangents);
    free((void *)call.sizes);
    free((void *)call.scales);
    return 0;
}
