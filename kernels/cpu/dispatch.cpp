// The C interface of the library: checks, and the choice of instruction set.
#include "pairwise.h"

namespace {

// Those of this architecture, the better ones last.
#if defined(__x86_64__)
enum Isa { BASELINE, AVX2, AVX512, ISAS };
#elif defined(__aarch64__)
enum Isa { BASELINE, NEON, ISAS };
#else
enum Isa { BASELINE, ISAS };
#endif

bool supported(int isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (isa == AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__aarch64__)
    if (isa == NEON) return true;  // every processor of this architecture has it
#endif
    return isa == BASELINE;
}

bool known(const Pair &pair) {
    const double p = pair.parameters[0], shift = pair.parameters[1];
    if (!(pair.tangent.at >= 0 && pair.tangent.at < 2)) return false;
    if (pair.function == RIESZ) return p > -2 && shift >= 0;
    return (pair.function == GAUSSIAN || pair.function == LAPLACE) && p > 0;
}

bool valid(int64_t columns, int32_t dtype) {
    return columns >= 1 && columns <= (1 << 24) && dtype >= FLOAT32 && dtype <= BFLOAT16;
}

bool valid(const Call &call, const Sample &sample) {
    if (call.cross || call.second_order || call.nearest || call.dtype != FLOAT32) return false;
    const int64_t n = call.sets ? call.sizes[0] : 0;
    // every part has a pair
    if (call.sets && !(sample.order && sample.energy && sample.parts >= 1 && sample.parts <= n / 2)) return false;
    for (int64_t s = 0; s < call.sets; s++) {
        if (call.sizes[s] != n) return false;
        for (int64_t i = s * n; i < (s + 1) * n; i++)
            if (sample.order[i] < 0 || sample.order[i] >= n) return false;
    }
    return true;
}

bool valid(const Call &call) {
    const Pair &pair = call.pair;
    if (call.sets < 0 || !valid(call.k, call.dtype)) return false;
    if (!known(pair) || !(call.eps >= 0)) return false;
    const bool wanted = call.energy || call.sample || call.second_order || call.nearest;
    if (call.sets && !(call.sizes && call.scales && wanted)) return false;
    if (call.nearest && (call.second_order || call.row_weights || call.row_energies)) return false;
    if (call.cross && (call.sets != 2 || call.second_order)) return false;
    int64_t rows = 0;
    for (int64_t s = 0; s < call.sets; s++) {
        if (call.sizes[s] < 0 || (call.nearest && call.sizes[s] > INT32_MAX)) return false;
        rows += call.sizes[s];
    }
    if (call.sample && !valid(call, *call.sample)) return false;
    if (call.second_order && rows && !(call.tangents && call.known_gradient && call.product)) return false;
    if (!call.cross) return (call.points || !rows) && !call.row_weights && !call.row_energies;
    const int64_t n = call.sizes[0], m = call.sizes[1];
    return (call.points || !n) && (call.columns || !m) && (!n || !m || !call.row_ids == !call.column_ids);
}

bool valid(const AngleCall &call) {
    return valid(call.d, call.rows_dtype) && valid(call.k, call.projected_dtype) && call.n >= 2 && call.sets >= 1 &&
           call.projections >= 1 && call.rows && call.projected && call.total;
}

bool valid(const DistanceCall &call) {
    if (!valid(call.k, call.dtype) || !(call.eps >= 0) || call.n < 0 || call.m < 0) return false;
    if (call.n && !(call.rows && call.index)) return false;
    if (!call.columns && (call.m || call.to_columns)) return false;
    const bool gradient = call.to_rows || call.to_columns;
    if (!call.distance == !gradient || (gradient && call.n && !call.weights)) return false;
    const int64_t others = call.columns ? call.m : call.n;
    for (int64_t i = 0; i < call.n; i++)
        if (call.index[i] < -1 || call.index[i] >= others) return false;
    return true;
}

// The kernel of an instruction set that is here.
template <class AnyCall> Status run(const AnyCall &call, int isa) {
    if (!supported(isa)) return UNSUPPORTED;
#if defined(__x86_64__)
    if (isa == AVX512) return avx512::run(call);
    if (isa == AVX2) return avx2::run(call);
#elif defined(__aarch64__)
    if (isa == NEON) return neon::run(call);
#endif
    return baseline::run(call);
}

}  // namespace

extern "C" {

// What a caller compares with its own before anything else.
__attribute__((visibility("default"))) int comhe_abi_version() { return ABI_VERSION; }
__attribute__((visibility("default"))) int comhe_call_bytes() { return sizeof(Call); }

// Whether a pair function of this number is known.
__attribute__((visibility("default"))) int comhe_supports(int function) {
    return function >= 0 && function < FUNCTIONS;
}

// The best instruction set this processor has.
__attribute__((visibility("default"))) int comhe_best_isa() {
    int isa = ISAS - 1;
    while (!supported(isa)) isa--;
    return isa;
}

__attribute__((visibility("default"))) int comhe_sweep(const Call *call, int isa) {
    return call && valid(*call) ? run(*call, isa) : BAD_ARGUMENT;
}

__attribute__((visibility("default"))) int comhe_angle_difference(const AngleCall *call, int isa) {
    return call && valid(*call) ? run(*call, isa) : BAD_ARGUMENT;
}

__attribute__((visibility("default"))) int comhe_distance(const DistanceCall *call, int isa) {
    return call && valid(*call) ? run(*call, isa) : BAD_ARGUMENT;
}
}
