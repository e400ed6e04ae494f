// The CPU kernel against float64 through its C interface, in one program without Python: for
// processors that are at hand as an emulator alone. Every derivative is worked out pair by pair in
// double; the second one by dual numbers, which carry the derivative along the tangents with them.
//
//     check_cpu ISA
//
// runs every case on one instruction set and prints a line for each: its name, the size of what
// float64 gives, and the relative error of the kernel; of energy, gradient and Hessian-vector product.
// `check_cpu ISA N K TIMES` sweeps N random rows of K columns, s = 2, and checks nothing: for counting
// instructions. Built with RECIPROCALS it measures those of the instruction set that it is compiled for instead.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmath>
#include <string>
#include <vector>

#include "../../kernels/cpu/pairwise.h"

#ifdef RECIPROCALS
#define ISA reciprocals
#include "../../kernels/cpu/vector-inl.h"

// The largest errors of 1/x and 1/sqrt(x), in units of the last place, over all floats from 1 to 4.
int main() {
    using namespace reciprocals;
    double worst = 0, worst_sqrt = 0;
    for (uint32_t bits = 0x3f800000; bits < 0x40800000; bits += VL) {
        alignas(64) float x[VL], r[VL], s[VL];
        for (int l = 0; l < VL; l++) {
            const uint32_t b = bits + l;
            memcpy(&x[l], &b, 4);
        }
        store(r, reciprocal(load(x)));
        store(s, reciprocal_sqrt(load(x)));
        for (int l = 0; l < VL; l++) {
            const double y = 1.0 / x[l], z = 1.0 / sqrt(double(x[l]));
            worst = fmax(worst, fabs(r[l] - y) / ldexp(1, ilogb(y) - 23));
            worst_sqrt = fmax(worst_sqrt, fabs(s[l] - z) / ldexp(1, ilogb(z) - 23));
        }
    }
    printf("%.3f %.3f\n", worst, worst_sqrt);
}
#else

extern "C" int comhe_sweep(const Call *call, int isa);
extern "C" int comhe_distance(const DistanceCall *call, int isa);

namespace {

using std::atan2, std::exp, std::log, std::pow, std::sqrt;

// A number and its derivative along the tangents.
struct Dual {
    double v, d;
    Dual(double v = 0, double d = 0) : v(v), d(d) {}
};
Dual operator-(Dual a) { return {-a.v, -a.d}; }
Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.d + b.d}; }
Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.d - b.d}; }
Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.d * b.v + a.v * b.d}; }
Dual operator/(Dual a, Dual b) { return {a.v / b.v, (a.d - a.v / b.v * b.d) / b.v}; }
Dual sqrt(Dual a) { return {sqrt(a.v), a.v > 0 ? a.d / (2 * sqrt(a.v)) : 0}; }
Dual log(Dual a) { return {log(a.v), a.d / a.v}; }
Dual exp(Dual a) { return {exp(a.v), exp(a.v) * a.d}; }
Dual pow(Dual a, double b) { return {pow(a.v, b), b * pow(a.v, b - 1) * a.d}; }
Dual atan2(Dual y, Dual x) { return {atan2(y.v, x.v), (y.d * x.v - x.d * y.v) / (x.v * x.v + y.v * y.v)}; }

double value(double x) { return x; }
double value(Dual x) { return x.v; }

// f of the distance t, and -f'(t) / t; of coincident points 0 where there is no direction.
template <class T> T pair_function(const Pair &pair, T t, T &slope) {
    const double p = pair.parameters[0], shift = pair.parameters[1];
    if (pair.function == GAUSSIAN) {
        const T e = exp(-p * (t * t));
        slope = 2 * p * e;
        return e;
    }
    if (pair.function == LAPLACE) {
        const T e = exp(-p * t);
        slope = value(t) > 0 ? p * e / t : T(0);
        return e;
    }
    if (value(t) < pair.tangent.at) {
        slope = value(t) > 0 ? -pair.tangent.slope / t : T(0);
        return pair.tangent.value + pair.tangent.slope * (t - pair.tangent.at);
    }
    const T u = shift > 0 ? sqrt(shift + t * t) : t;
    slope = (p == 0 ? 1 : fabs(p)) * pow(u, -p - 2);
    return p > 0 ? pow(u, -p) : p < 0 ? -pow(u, -p) : -log(u);
}

// The same of a pair with near = 2 - 2c and far = 2 + 2c, and its derivative in c.
template <class T> T one_end(const Pair &pair, T near, T far, T &first) {
    const T root = sqrt(near), sine = root * sqrt(far) / 2;
    const T t = pair.angular ? 2 * atan2(root, sqrt(far)) : root, e = pair_function(pair, t, first);
    if (pair.angular) first = value(sine) > 0 ? first * t / sine : T(0);
    return e;
}

template <class T> struct Rows {
    int64_t k;
    std::vector<T> v, inverse, deficit, gradient;  // unit rows, 1/nu, 1 - |v|^2

    Rows(const std::vector<T> &p, int64_t k, double eps) : k(k), v(p), gradient(p.size()) {
        for (size_t i = 0; i < p.size(); i += k) {
            T square = eps;
            for (int q = 0; q < k; q++) square = square + p[i + q] * p[i + q];
            const bool dead = value(square) == 0;
            inverse.push_back(dead ? T(0) : 1 / sqrt(square));
            deficit.push_back(dead ? T(1) : eps / square);
            for (int q = 0; q < k; q++) v[i + q] = v[i + q] * inverse.back();
        }
    }
    size_t count() const { return inverse.size(); }
};

// Adds coefficient * dc/dp_i, without the cancellation of v_j - c v_i.
template <class T>
void push(Rows<T> &rows, size_t i, const Rows<T> &others, size_t j, T coefficient, T close, double sign) {
    for (int q = 0; q < rows.k; q++) {
        const T v = rows.v[i * rows.k + q], other = others.v[j * rows.k + q];
        T &gradient = rows.gradient[i * rows.k + q];
        gradient = gradient + coefficient * rows.inverse[i] * (other - sign * v + sign * close / 2 * v);
    }
}

// near = 2 - 2c and far = 2 + 2c.
template <class T> void squares(const Rows<T> &a, size_t i, const Rows<T> &b, size_t j, T &near, T &far) {
    near = far = a.deficit[i] + b.deficit[j];
    for (int q = 0; q < a.k; q++) {
        const T v = a.v[i * a.k + q], w = b.v[j * a.k + q];
        near = near + (v - w) * (v - w);
        far = far + (v + w) * (v + w);
    }
}

template <class T> T meet(const Pair &pair, Rows<T> &a, size_t i, Rows<T> &b, size_t j, double scale) {
    T near, far, first, far_first = 0, e;
    squares(a, i, b, j, near, far);
    e = one_end(pair, near, far, first);
    if (pair.half_space) e = e + one_end(pair, far, near, far_first);
    const T coefficient = scale * (first - far_first);
    const bool close = value(near) < value(far);
    push(a, i, b, j, coefficient, close ? near : far, close ? 1 : -1);
    push(b, j, a, i, coefficient, close ? near : far, close ? 1 : -1);
    return scale * e;
}

// A row and its antipode.
template <class T> T meet_antipode(const Pair &pair, Rows<T> &rows, size_t i, double scale) {
    T first;
    const T energy = scale * one_end(pair, 4 - 2 * rows.deficit[i], 2 * rows.deficit[i], first);
    const T outward = -2 * scale * first * rows.deficit[i] * rows.inverse[i];
    for (int q = 0; q < rows.k; q++) {
        T &gradient = rows.gradient[i * rows.k + q];
        gradient = gradient + outward * rows.v[i * rows.k + q];
    }
    return energy;
}

// Of one set: the energy, and the gradient inside of `rows`.
template <class T> T energy_of_set(const Pair &pair, Rows<T> &rows, double scale) {
    T energy = 0;
    const double both = pair.half_space ? 2 * scale : scale;  // each pair and its mirror image
    for (size_t i = 0; i < rows.count(); i++) {
        for (size_t j = 0; j < i; j++) energy = energy + meet(pair, rows, j, rows, i, both);
        if (pair.half_space) energy = energy + meet_antipode(pair, rows, i, scale);
    }
    return energy;
}

// The polynomial a c + b c^2 of a pair.
double meet_polynomial(const double (&coefficients)[2], Rows<double> &rows, size_t i, size_t j, double scale) {
    double near, far;
    squares(rows, i, rows, j, near, far);
    const double c = 1 - near / 2, slope = scale * (coefficients[0] + 2 * coefficients[1] * c);
    const bool close = near < far;
    push(rows, i, rows, j, slope, close ? near : far, close ? 1 : -1);
    push(rows, j, rows, i, slope, close ? near : far, close ? 1 : -1);
    return scale * (coefficients[0] + coefficients[1] * c) * c;
}

// --- rows ------------------------------------------------------------------------------------------

uint32_t state = 1;

double uniform() {
    state = state * 1664525 + 1013904223;
    return int32_t(state) * 0x1p-31;
}

enum Kind { RANDOM, PAIRED, CLUSTERED, COLLAPSED, KINDS };
const char *const KIND_NAMES[] = {"random", "paired", "clustered", "collapsed"};

// Random rows; or with close and nearly opposite twins, a duplicate and a dead row; or close to one of
// a few directions and their opposites; or all within about 0.2 radians, where few pairs are near ones.
std::vector<float> make_rows(int kind, int64_t n, int64_t k) {
    std::vector<float> x(n * k);
    for (int64_t i = 0; i < n; i++) {
        const double spread = kind == CLUSTERED ? 1e-3 : 0.2;
        for (int64_t q = 0; q < k; q++) {
            double y = uniform();
            if (kind == CLUSTERED) y = (q == i % 3) * (i % 5 < 2 ? 1 : -1) + spread * y;
            if (kind == COLLAPSED) y = 1 + spread * y;
            x[i * k + q] = float(y);
        }
        if (kind != PAIRED || i < n / 2 || i % 4) continue;
        const double angle = pow(10, -1 - i / 4 % 4), sign = i % 8 ? 1 : -1.5;
        const float *twin = &x[(i - n / 2) * k];
        for (int64_t q = 0; q < k; q++) x[i * k + q] = float(sign * (twin[q] + angle * uniform()));
    }
    if (kind == PAIRED && n > 20) {
        memset(&x[5 * k], 0, k * sizeof(float));
        memcpy(&x[7 * k], &x[9 * k], k * sizeof(float));
    }
    return x;
}

// Rows as the caller stores them; `x` becomes what they stand for.
std::vector<char> stored(std::vector<float> &x, int dtype) {
    std::vector<char> bytes(x.size() * (dtype == FLOAT32 ? 4 : 2));
    for (size_t i = 0; i < x.size(); i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], 4);
        if (dtype == FLOAT32) {
            memcpy(&bytes[4 * i], &bits, 4);
            continue;
        }
        // cut off, which is as good as rounded here; what is below float16's normal numbers is 0
        bits &= dtype == BFLOAT16 ? 0xffff0000 : 0xffffe000;
        const uint32_t sign = bits & 0x80000000, size = bits ^ sign;
        uint16_t half = bits >> 16;
        if (dtype == FLOAT16) {
            if (size < 0x38800000) bits = sign;
            half = sign >> 16 | (size < 0x38800000 ? 0 : (size - 0x38000000) >> 13);
        }
        memcpy(&x[i], &bits, 4);
        memcpy(&bytes[2 * i], &half, 2);
    }
    return bytes;
}

// --- the cases -------------------------------------------------------------------------------------

int isa;

void require(int status) {
    if (status == OK) return;
    fprintf(stderr, "refused: %d\n", status);
    exit(2);
}

void run(const Call &call) { require(comhe_sweep(&call, isa)); }

// Sizes and errors of a result's parts: Euclidean, of many sets the worst error.
struct Part {
    double squares, error;
    // where symmetry makes a derivative 0, `least` says what is small
    void add(const float *result, const std::vector<double> &truth, double least) {
        double off = 0, size = 0;
        for (size_t i = 0; i < truth.size(); i++) {
            off += (result[i] - truth[i]) * (result[i] - truth[i]);
            size += truth[i] * truth[i];
        }
        squares += size;
        error = fmax(error, sqrt(off) / (sqrt(size) + least));
    }
};

void report(const std::string &name, Part energy, Part gradient, Part product) {
    printf("%s", name.c_str());
    for (const Part &part : {energy, gradient, product}) printf(" %.12e", sqrt(part.squares));
    for (const Part &part : {energy, gradient, product}) printf(" %.2e", part.error);
    printf("\n");
}

void sweep_random_rows(Call call, int64_t n, int times) {
    const std::vector<float> points = make_rows(RANDOM, n, call.k);
    std::vector<float> gradient(points.size());
    float energy;
    const double scale = 1;
    call.points = points.data();
    call.sets = 1;
    call.sizes = &n;
    call.scales = &scale;
    call.energy = &energy;
    call.gradient = gradient.data();
    for (int i = 0; i < times; i++) run(call);
}

void check_sets(std::string name, Call call, int kind, std::vector<int64_t> sizes) {
    int64_t n = 0;
    std::vector<double> scales;
    for (int64_t size : sizes) {
        n += size;
        scales.push_back(2.0 / (size * (size - 1.0) + 1));
    }
    std::vector<float> x = make_rows(kind, n, call.k), tangents = make_rows(RANDOM, n, call.k);
    // Two rows alone: if they are nearly orthogonal, the force in half space is as small as their
    // cosine c, of which float32 knows 3e-8 / c.
    for (size_t s = 0, first = 0; s < sizes.size(); first += sizes[s++] * call.k)
        for (int q = 0; q < call.k && sizes[s] == 2; q++) x[first + call.k + q] += x[first + q] / 2;
    const std::vector<char> points = stored(x, call.dtype);
    std::vector<float> energy(sizes.size()), gradient(x.size()), product(x.size());
    call.points = points.data();
    call.sets = sizes.size();
    call.sizes = sizes.data();
    call.scales = scales.data();
    call.energy = energy.data();
    call.gradient = gradient.data();
    run(call);
    Call twice = call;
    twice.second_order = 1;
    twice.tangents = tangents.data();
    twice.known_gradient = gradient.data();
    twice.product = product.data();
    run(twice);
    Part energies = {}, gradients = {}, products = {};
    for (size_t s = 0, first = 0; s < sizes.size(); first += sizes[s++] * call.k) {
        const size_t count = sizes[s] * call.k;
        std::vector<Dual> p;
        for (size_t i = 0; i < count; i++) p.push_back({x[first + i], tangents[first + i]});
        Rows<Dual> rows(p, call.k, call.eps);
        const double e = sizes[s] > 1 || call.pair.half_space ? energy_of_set(call.pair, rows, scales[s]).v : 0;
        std::vector<double> g, h;
        for (const Dual &d : rows.gradient) {
            g.push_back(d.v);
            h.push_back(d.d);
        }
        const double least = 1e-6 * fabs(e) + 1e-30;
        energies.add(&energy[s], {e}, 1e-30);
        gradients.add(&gradient[first], g, least);
        products.add(&product[first], h, least);
    }
    report(name, energies, gradients, products);
}

void check_cross(std::string name, Call call, int kind, int64_t n, int64_t m) {
    const int64_t sizes[] = {n, m};
    const double scale = 1.0 / (n * m);
    std::vector<float> x = make_rows(kind, n, call.k), y = make_rows(kind, m, call.k);
    const std::vector<char> points = stored(x, call.dtype), columns = stored(y, call.dtype);
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < n + m; i++) ids.push_back(int32_t(i < n ? i : 2 * (i - n)));
    std::vector<float> energy(1), gradient(x.size()), columns_gradient(y.size()), row_energies(n), weights;
    for (int64_t i = 0; i < n; i++) weights.push_back(0.5f + i % 3);
    call.points = points.data();
    call.columns = columns.data();
    call.row_ids = ids.data();
    call.column_ids = ids.data() + n;
    call.cross = 1;
    call.sets = 2;
    call.sizes = sizes;
    call.scales = &scale;
    call.energy = energy.data();
    call.gradient = gradient.data();
    call.columns_gradient = columns_gradient.data();
    call.row_weights = weights.data();
    call.row_energies = row_energies.data();
    run(call);
    Rows<double> a({x.begin(), x.end()}, call.k, call.eps), b({y.begin(), y.end()}, call.k, call.eps);
    double e = 0;
    std::vector<double> sums;
    for (int64_t i = 0; i < n; i++) {
        double sum = 0;
        for (int64_t j = 0; j < m; j++)
            if (ids[i] != ids[n + j]) sum += meet(call.pair, a, i, b, j, scale * weights[i]);
        e += sum;
        sums.push_back(sum / (scale * weights[i]));
    }
    const double least = 1e-6 * fabs(e) + 1e-30;
    Part energies = {}, gradients = {};
    energies.add(energy.data(), {e}, 1e-30);
    energies.add(row_energies.data(), sums, 1e-30);
    gradients.add(gradient.data(), a.gradient, least);
    gradients.add(columns_gradient.data(), b.gradient, least);
    report(name, energies, gradients, {});
}

// Squared distances of the rows that are called nearest, beside the least ones. A set, or n rows and m others.
void check_nearest(std::string name, Call call, int kind, int64_t n, int64_t m) {
    const int64_t sizes[] = {n, m};
    const double scales[] = {1, 1};
    std::vector<float> x = make_rows(kind, n, call.k), y = make_rows(kind, m, call.k);
    const std::vector<char> points = stored(x, call.dtype), columns = stored(y, call.dtype);
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < n + m; i++) ids.push_back(int32_t(i < n ? i : 2 * (i - n)));
    std::vector<int64_t> nearest(n);
    call.points = points.data();
    call.sets = m ? 2 : 1;
    call.cross = m > 0;
    if (m) {
        call.columns = columns.data();
        call.row_ids = ids.data();
        call.column_ids = ids.data() + n;
    }
    call.sizes = sizes;
    call.scales = scales;
    call.nearest = nearest.data();
    run(call);
    const std::vector<float> &others = m ? y : x;
    Rows<double> a({x.begin(), x.end()}, call.k, call.eps), b({others.begin(), others.end()}, call.k, call.eps);
    std::vector<float> found;
    std::vector<double> least;
    for (int64_t i = 0; i < n; i++) {
        double best = INFINITY, at_index = NAN;
        for (int64_t j = 0; j < (m ? m : n); j++) {
            if (m ? ids[i] == ids[n + j] : i == j) continue;
            double near, far;
            squares(a, i, b, j, near, far);
            if (call.pair.half_space) near = fmin(near, far);
            best = fmin(best, near);
            if (j == nearest[i]) at_index = near;
        }
        found.push_back(float(at_index));
        least.push_back(best);
    }
    Part distances = {};
    distances.add(found.data(), least, 1e-30);
    report(name, distances, {}, {});
}

// Two sets side by side, of which rows meet within parts alone.
void check_sampled(std::string name, Call call, int kind, int64_t n, int64_t parts, double a, double b) {
    const int64_t sets = 2, k = call.k, sizes[] = {n, n};
    const double scale = 2.0 / (n * (n - 1.0)), scales[] = {scale, scale};
    std::vector<float> x(sets * n * k), gradient(x.size());
    std::vector<int64_t> order;
    for (int64_t s = 0; s < sets; s++) {
        const std::vector<float> some = make_rows(kind, n, k);
        for (int64_t i = 0; i < n; i++) memcpy(&x[(i * sets + s) * k], &some[i * k], k * sizeof(float));
        for (int64_t i = 0; i < n; i++) {  // each to a random place among those before it
            order.push_back(i);
            std::swap(order.back(), order[s * n + int64_t((uniform() + 1) / 2 * i)]);
        }
    }
    double energy[2];
    const Sample sample = {order.data(), parts, sets * k, k, sets * k, k, {a, b}, energy};
    call.points = x.data();
    call.sets = sets;
    call.sizes = sizes;
    call.scales = scales;
    call.gradient = gradient.data();
    call.sample = &sample;
    call.dtype = FLOAT32;
    run(call);
    double pairs = 0;
    for (int64_t part = 0; part < parts; part++) {
        const double size = n / parts + (part < n % parts);
        pairs += size * (size - 1) / 2;
    }
    const double both = call.pair.half_space ? 2 * scale : scale, weight = n * (n - 1.0) / 2 / pairs;
    Part energies = {}, gradients = {};
    for (int64_t s = 0; s < sets; s++) {
        std::vector<double> p;
        std::vector<float> result;
        for (int64_t i = 0; i < n; i++)
            for (int64_t q = 0; q < k; q++) {
                p.push_back(x[(i * sets + s) * k + q]);
                result.push_back(gradient[(i * sets + s) * k + q]);
            }
        Rows<double> rows(p, k, call.eps);
        double e = 0;
        for (int64_t i = 0; i < n; i++) {
            for (int64_t j = 0; j < i; j++) e += meet_polynomial(sample.coefficients, rows, j, i, both);
            if (call.pair.half_space) e += meet_antipode(call.pair, rows, i, scale);
        }
        for (int64_t part = 0, first = 0, end; part < parts; part++, first = end) {
            end = first + n / parts + (part < n % parts);
            for (int64_t at = first; at < end; at++)
                for (int64_t before = first; before < at; before++) {
                    const int64_t i = order[s * n + before], j = order[s * n + at];
                    e += meet(call.pair, rows, i, rows, j, both * weight);
                    e += meet_polynomial(sample.coefficients, rows, i, j, -both * weight);
                }
        }
        const float found = float(energy[s]);
        energies.add(&found, {e}, 1e-30);
        gradients.add(result.data(), rows.gradient, 1e-6 * fabs(e) + 1e-30);
    }
    report(name, energies, gradients, {});
}

// Distances from one other row each, or of m others, and the gradient of their weighted sum.
void check_distance(std::string name, const Call &settings, int kind, int64_t n, int64_t m) {
    const int64_t k = settings.k, others = m ? m : n;
    std::vector<float> x = make_rows(kind, n, k), y = make_rows(kind, m, k);
    const std::vector<char> rows = stored(x, settings.dtype), columns = stored(y, settings.dtype);
    std::vector<int64_t> index;
    std::vector<float> weights, distance(n), to_rows(x.size()), to_columns(y.size());
    for (int64_t i = 0; i < n; i++) {
        // of `paired` rows the second half has twins in the first one
        const int64_t other = i < n / 2 ? i + 1 + int64_t((uniform() + 1) / 2 * (n / 2 - 1)) : i - n / 2;
        index.push_back(i % 7 ? other % others : -1);
        weights.push_back(0.5f + i % 3);
    }
    DistanceCall call = {};
    call.rows = rows.data();
    call.columns = m ? columns.data() : nullptr;
    call.index = index.data();
    call.n = n;
    call.m = m;
    call.k = k;
    call.eps = settings.eps;
    call.dtype = settings.dtype;
    call.half_space = settings.pair.half_space;
    call.angular = settings.pair.angular;
    call.threads = settings.threads;
    DistanceCall backward = call;
    call.distance = distance.data();
    require(comhe_distance(&call, isa));
    backward.weights = weights.data();
    backward.to_rows = to_rows.data();
    backward.to_columns = m ? to_columns.data() : nullptr;
    require(comhe_distance(&backward, isa));
    Rows<double> a({x.begin(), x.end()}, k, call.eps), b({y.begin(), y.end()}, k, call.eps), &c = m ? b : a;
    std::vector<float> found;
    std::vector<double> truth;
    for (int64_t i = 0; i < n; i++) {
        if (index[i] < 0) {
            found.push_back(distance[i] == INFINITY ? 1 : NAN);
            truth.push_back(1);
            continue;
        }
        const size_t j = index[i];
        double near, far;
        squares(a, i, c, j, near, far);
        const bool close = near <= far, from_row = close || !call.half_space;  // orthogonal rows as the kernel does
        const double x = from_row ? near : far, sine = sqrt(near * far) / 2;
        const double t = call.angular ? 2 * atan2(sqrt(x), sqrt(4 - x)) : sqrt(x);
        found.push_back(distance[i]);
        truth.push_back(t);
        const double slope = call.angular ? sine : t, first = slope > 0 ? (from_row ? -1 : 1) / slope : 0;
        push(a, i, c, j, weights[i] * first, close ? near : far, close ? 1 : -1);
        push(c, j, a, i, weights[i] * first, close ? near : far, close ? 1 : -1);
    }
    Part distances = {}, gradients = {};
    distances.add(found.data(), truth, 1e-30);
    gradients.add(to_rows.data(), a.gradient, 1e-30);
    gradients.add(to_columns.data(), b.gradient, 1e-30);
    report(name, distances, gradients, {});
}

Pair pair_of(int function, double parameter, double shift, double at, bool half_space, bool angular) {
    Pair pair = {};
    pair.function = function;
    pair.parameters[0] = parameter;
    pair.parameters[1] = shift;
    pair.half_space = half_space;
    pair.angular = angular;
    if (function == GAUSSIAN) return pair;
    const double s = parameter;
    pair.growth = function == LAPLACE ? 1 : s + 2;
    if (function == LAPLACE || shift > 0) return pair;
    const double value = s == 0 ? -log(at) : s > 0 ? pow(at, -s) : -pow(at, -s);
    pair.tangent = {at, value, -(s == 0 ? 1 : fabs(s)) * pow(at, -s - 1)};
    return pair;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 2 && argc != 5) return 2;
    isa = atoi(argv[1]);
    Call usual = {};
    usual.pair = pair_of(RIESZ, 2, 0, 1e-3, false, false);
    if (argc == 5) {
        usual.k = atoi(argv[3]);
        sweep_random_rows(usual, atoi(argv[2]), atoi(argv[4]));
        return 0;
    }
    const struct { int function; double parameter, shift; } functions[] = {
        {RIESZ, 0, 0}, {RIESZ, 1, 0}, {RIESZ, 2, 0}, {RIESZ, 0.7, 0}, {RIESZ, 4, 0}, {GAUSSIAN, 2, 0},
        {LAPLACE, 1.5, 0}, {LAPLACE, 0.01, 0}, {RIESZ, -1, 0}, {RIESZ, -1.8, 0}, {RIESZ, 0, 0.5}, {RIESZ, 1, 4},
        {RIESZ, 2, 1}, {RIESZ, 0.7, 0.3}, {RIESZ, -1.5, 0.2}};
    const char *const function_names[] = {"riesz", "gaussian", "laplace"};
    const int64_t widths[] = {2, 5, 24, 30, 41};
    const char *const dtypes[] = {"float32", "float16", "bfloat16"};
    const std::vector<int64_t> sizes_of_blocks = {330, 67}, sizes_of_sets = {101, 1, 0, 2, 31};
    int number = 0;
    for (const auto &f : functions)
        for (int form = 0; form < 4; form++)
            for (int kind = 0; kind < KINDS; kind++)
                for (int with_eps = 0; with_eps < 2; with_eps++, number++) {
                    state = number + 1;  // the rows of a case are its own, whatever is added before it
                    Call call = {};
                    call.k = widths[number % 5];
                    call.eps = with_eps * 1e-4;
                    call.dtype = number % 4 == 3 ? number / 4 % 2 + 1 : FLOAT32;
                    call.threads = number % 7 == 0 ? 2 : 1;
                    call.pair = pair_of(f.function, f.parameter, f.shift, number % 3 ? 1e-3 : 0.3, form & 1, form & 2);
                    char text[200];
                    snprintf(text, sizeof text, "%s-%g-shift%g%s%s-%s-k%d-eps%g-%s",
                             function_names[f.function], f.parameter, f.shift, form & 1 ? "-half" : "",
                             form & 2 ? "-angular" : "", KIND_NAMES[kind], int(call.k), call.eps,
                             dtypes[call.dtype]);
                    const std::string name = text;
                    const bool blocks = kind == RANDOM;  // 330 rows make two
                    check_sets(name, call, kind, blocks ? sizes_of_blocks : sizes_of_sets);
                    check_cross("cross-" + name, call, kind, 57, 90);
                    if (call.dtype == FLOAT32)
                        check_sampled("sampled-" + name, call, kind, 131, 1 + number / 8 % 4, number / 3 % 3 * 0.2,
                                      number / 5 % 3 * 0.3);
                    if (f.function != RIESZ || f.parameter) continue;
                    check_distance("distance-" + name, call, kind, 130, 0);
                    check_distance("distance-cross-" + name, call, kind, 57, 90);
                    if (form & 2) continue;
                    check_nearest("nearest-" + name, call, kind, 330, 0);
                    check_nearest("nearest-cross-" + name, call, kind, 57, 90);
                }
    usual.k = 300;  // columns are summed in parts, and rows are shared by threads
    usual.threads = 2;
    check_sets("large", usual, RANDOM, {400});
    usual.k = 37;
    check_sampled("sampled-large", usual, RANDOM, 620, 2, 0.2, 0.5);  // parts of two blocks
}
#endif
