// What the dispatcher hands to the kernel of one instruction set.
#pragma once
#include <stdint.h>

// To be raised with every change below that the caller has to know of, binding.py's own with it.
constexpr int ABI_VERSION = 9;

enum Status { OK = 0, BAD_ARGUMENT = 1, OUT_OF_MEMORY = 2, UNSUPPORTED = 3 };
enum DType { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

// The pair functions by their numbers, each with its parameters. t is the chord or the angle.
enum Function {
    RIESZ = 0,     // u^-s, -log u for s = 0, -u^|s| for s < 0, u^2 = a + t^2; parameters: s > -2, a
    GAUSSIAN = 1,  // exp(-tau t^2); parameters: tau
    LAPLACE = 2,   // exp(-tau t); parameters: tau
    FUNCTIONS      // how many there are
};

// The line value + slope (t - at) that continues f below the distance `at`; at = 0: there is none.
struct Tangent {
    double at, value, slope;
};

struct Pair {
    int32_t function;
    int32_t half_space;
    int32_t angular;
    double parameters[2];
    double growth;  // how many powers of 1/t f' has more than a constant
    Tangent tangent;
};

// How sets of rows, all of one size n, are sampled: each is cut into parts, and only rows of one part meet.
// What is computed instead of the sum over all pairs, and the gradient of that, is
//
//     sum p over all pairs + W (sum of F - p over the pairs within parts)
//
// for a polynomial p(c) = coefficients[0] c + coefficients[1] c^2, where W is the number of all pairs over
// that of the pairs within parts.
struct Sample {
    const int64_t *order;  // [sets, n] the rows of each set, part by part
    int64_t parts;         // of a set; the first n % parts of them have one row more
    int64_t stride, set_stride;  // of `points`, in floats, from row to row and from set to set
    int64_t gradient_stride, gradient_set_stride;
    double coefficients[2];
    double *energy;  // [sets], instead of the call's
};

struct Call {
    const void *points;     // [sum(sizes), k] raw rows, sets one after another
    const void *columns;    // cross form: `points` against these, sizes = {rows, columns}
    const int32_t *row_ids, *column_ids;  // cross form, both or neither: equals do not meet
    const float *row_weights;  // cross form: factors of the rows' sums, or null
    const int64_t *sizes;   // [sets]
    const double *scales;   // [sets]; cross form: [1]
    float *energy;          // [sets]; cross form: [1]
    float *gradient;        // of `points`, or null for the energy alone
    float *columns_gradient;
    float *row_energies;    // cross form: the sums of the rows, without factors, or null
    // second order, instead of energy and gradient: the derivative of the gradient along the tangents
    const float *tangents;        // [sum(sizes), k]
    const float *known_gradient;  // what the sweep gave
    float *product;               // where the result goes
    // instead of energy and gradient: the index in its set, or of the column, of the nearest of each row
    int64_t *nearest;  // [rows], or null
    int64_t sets;
    int64_t k;
    double eps;
    Pair pair;
    const Sample *sample;  // float32 sets against themselves alone, or null
    int32_t dtype;
    int32_t threads;
    int32_t cross;
    int32_t second_order;
};

// The difference of the cosines, or of the angles, of rows in two spaces; see angle_difference-inl.h.
struct AngleCall {
    const void *rows;       // [sets, n, d]
    const void *projected;  // [sets, projections, n, k]
    float *total;           // [sets, projections]
    float *to_rows;         // gradients: [sets, projections, n, d] and like `projected`, or null
    float *to_projected;
    int64_t sets;
    int64_t projections;  // of each set of rows
    int64_t n, d, k;
    int32_t rows_dtype, projected_dtype;
    int32_t angle;
    int32_t threads;
};

// Distances of rows to one other each, or the gradient of their weighted sum; see distance-inl.h.
struct DistanceCall {
    const void *rows;      // [n, k]
    const void *columns;   // [m, k], or null: the rows themselves
    const int64_t *index;  // [n] of the other row, or column; -1: none, at an infinite distance
    float *distance;       // [n], or null where gradients are wanted
    const float *weights;  // [n]
    float *to_rows;        // gradients, or null; without columns that of the rows is of both ends
    float *to_columns;
    int64_t n, m, k;  // m: 0 without columns
    double eps;
    int32_t dtype;
    int32_t half_space;
    int32_t angular;
    int32_t threads;
};

namespace avx512 { Status run(const Call &); Status run(const AngleCall &); Status run(const DistanceCall &); }
namespace avx2 { Status run(const Call &); Status run(const AngleCall &); Status run(const DistanceCall &); }
namespace neon { Status run(const Call &); Status run(const AngleCall &); Status run(const DistanceCall &); }
namespace baseline { Status run(const Call &); Status run(const AngleCall &); Status run(const DistanceCall &); }
