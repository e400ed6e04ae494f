// The hyperspherical energy of sets of rows, and its gradient, in one sweep over the pairs i < j:
//
//     S = sum f(c_ij)      G_i = sum_j f'(c_ij) v_j      dS/dp_i = (G_i - v_i <v_i, G_i>) / nu_i
//
// with v_i = p_i / nu_i, nu_i = sqrt(|p_i|^2 + eps), c_ij = <v_i, v_j>. No N x N matrix: the rows of
// a set are cut into blocks, and two blocks that meet keep their R x R coefficients f'(c) in cache.
//
// Order of work. In round r block a meets block (r - a) mod n, so that every block is busy with
// exactly one other (or itself) and every two meet once. A block counts the stages it has been
// through, and a task waits until both its blocks have arrived at its stage. Hence each G is summed
// in the same order whatever the number of threads, without a copy of G per thread. Only sets that
// are a good part of all the work are shared in this way; the others go to one thread each.
//
// Read on in distance_functions-inl.h, pair_function-inl.h, rows-inl.h, blocks-inl.h (where nearly all
// the time goes), near_pairs-inl.h, hessian-inl.h and nearest-inl.h; here follows the order of work.
#pragma once
#include "blocks-inl.h"
#include "hessian-inl.h"
#include "moments-inl.h"
#include "nearest-inl.h"
#include "pair_function-inl.h"
#include "rows-inl.h"
#include "sweep-inl.h"

namespace ISA {
namespace {

template <class F> double antipode(const Sweep &sweep, double x, double y, double &first, double &second) {
    return F(sweep.call.pair).antipode(x, y, first, second);
}

template <class F, bool HALF, bool ANGULAR> Functions functions(const Pair &pair) {
    using Folded = PairFunction<F, HALF, ANGULAR>;
    return {F(pair).slope(), meet<Folded, false>, meet<Folded, true>, meet_twice<Folded>, antipode<Folded>};
}

template <class F> Functions functions_of_chord(const Pair &pair) {
    return pair.half_space ? functions<F, true, false>(pair) : functions<F, false, false>(pair);
}

template <class F> Functions functions(const Pair &pair) {
    if (pair.angular) return pair.half_space ? functions<F, true, true>(pair) : functions<F, false, true>(pair);
    return functions_of_chord<F>(pair);
}

// The one place that knows all functors.
Functions choose(const Pair &pair) {
    if (pair.function == GAUSSIAN) return functions<Gaussian>(pair);
    if (pair.function == LAPLACE) return functions<Laplace>(pair);
    const double s = pair.parameters[0];
    if (pair.parameters[1] > 0)
        return s == 0                    ? functions<Shifted<Logarithm>>(pair)
               : s == 1 && !pair.angular ? functions_of_chord<Shifted<Inverse>>(pair)
               : s == 2 && !pair.angular ? functions_of_chord<Shifted<InverseSquare>>(pair)
                                         : functions<Shifted<SignedPower>>(pair);
    return s == 0   ? functions<Logarithm>(pair)
           : s == 1 ? functions<Inverse>(pair)
           : s == 2 ? functions<InverseSquare>(pair)
           : s > 0  ? functions<Power>(pair)
                    : functions<SignedPower>(pair);
}

// --- all sets --------------------------------------------------------------------------------------

// What a block goes through without another: the first stage and the last one.
void perform_alone(const Sweep &sweep, Scratch &scratch, Block &block, int stage) {
    const bool nearest = sweep.call.nearest;
    if (stage) return (sweep.twice ? finish_twice : nearest ? finish_nearest : finish)(sweep, scratch, block);
    prepare(sweep, scratch, block);
    if (sweep.twice) prepare_twice(sweep, scratch, block);
    if (nearest) prepare_nearest(block);
    if (block.moment) prepare_moments(sweep, block);
}

// Task a of a stage: stage 0 prepares blocks, the last one finishes them, rounds are in between.
void perform(const Sweep &sweep, Scratch &scratch, const Set &set, int stage, int a) {
    const bool symmetric = set.col == set.row, meeting = stage > 0 && stage <= set.rounds;
    int b = a;
    if (meeting && symmetric) {
        const int first = a - a % set.rounds;  // of its part
        b = first + (stage - 1 - (a - first) + set.rounds) % set.rounds;
    } else if (meeting) {
        b = (stage - 1 + a) % set.rounds;
    }
    if (symmetric && b < a) return;  // block b sees to it
    Block *row = a < set.rows ? set.row + a : nullptr, *col = b < set.cols ? set.col + b : nullptr;
    if (row) row->stage.wait(stage);
    if (col) col->stage.wait(stage);
    if (set.moment && stage == 1 && a == 0) sum_moments(sweep, set);
    if (meeting) {
        if (row && col) sweep.meet(sweep, scratch, *row, *col);
    } else {
        if (set.moment && stage) add_polynomial(sweep, scratch, set, a);
        if (row) perform_alone(sweep, scratch, *row, stage);
        if (col && col != row) perform_alone(sweep, scratch, *col, stage);
    }
    if (row) row->stage.advance(stage);
    // once a block: a second time might come late, and take back what another thread has counted since
    if (col && col != row) col->stage.advance(stage);
}

// Memory of a block that will meet n rows.
void place(const Sweep &sweep, Block &block, int64_t n, Arena &arena) {
    const size_t capacity = block.capacity = capacity_of(block.n), padded = up(block.n, NR) + NEAR_ROWS;
    block.u = arena.take<float>(capacity * sweep.kp);
    block.ut = arena.take<float>(size_t(up(block.n, NR)) * sweep.k);
    const bool axial = n / sweep.k >= (sweep.call.pair.half_space ? MOSTLY_AXIAL_HALF : MOSTLY_AXIAL);
    block.lost = axial ? int64_t(capacity) * sweep.kp : 0;
    block.g = block.gradient ? arena.take<float>(capacity * sweep.kp + block.lost) : nullptr;
    block.inverse = arena.take<double>(padded);
    block.deficit = arena.take<double>(padded);
    block.axial = arena.take<double>(padded);
    if (block.by_row) {
        block.row_energy = arena.take<double>(padded);
        block.weight = arena.take<float>(padded);
    }
    if (block.given_ids) block.ids = arena.take<int32_t>(padded);
    if (sweep.call.nearest) {
        block.cosine = arena.take<float>(padded);
        block.squared = arena.take<double>(padded);
        block.cosine_index = arena.take<int32_t>(padded);
        block.squared_index = arena.take<int32_t>(padded);
    }
    if (sweep.moments) block.moment = arena.take<float>(moment_size(sweep));
    if (!sweep.twice) return;
    block.u_dot = arena.take<float>(capacity * sweep.kp);
    block.ut_dot = arena.take<float>(size_t(up(block.n, NR)) * sweep.k);
    block.tau = arena.take<double>(padded);
    block.outward = arena.take<double>(padded);
    block.axial_dot = arena.take<double>(padded);
}

void place(const Sweep &sweep, Scratch &scratch, int largest_block, Arena &arena) {
    const int rows = up(largest_block, NR) + NEAR_ROWS;
    scratch.c = arena.take<float>(size_t(rows) * R);
    scratch.raw = arena.take<float>(size_t(ROWS_BESIDE) * sweep.kp);
    scratch.g = arena.take<double>(sweep.kp);
    scratch.row_energies = arena.take<char>(sweep.by_row ? rows * MOST_ENERGIES : 0);
    scratch.patches = arena.take<NearPatch>((rows / NEAR_ROWS + 2) * (rows / NEAR_COLS));
    scratch.exact_rows = arena.take<Piece>(rows);
    scratch.exact_cols = arena.take<Piece>(rows);
    scratch.row_force = arena.take<Piece>(rows);
    scratch.col_force = arena.take<Piece>(rows);
    if (sweep.call.nearest) {
        scratch.row_bound = arena.take<float>(rows);
        scratch.other_bound = arena.take<float>(rows);
    }
    if (sweep.moments) {
        scratch.operand = arena.take<float>(operand_size(sweep));
        scratch.part = arena.take<double>(moment_size(sweep));
    }
    if (!sweep.twice) return;
    scratch.c_dot = arena.take<float>(size_t(rows) * R);
    scratch.row_sums = arena.take<float>(size_t(rows) * VL);
    scratch.col_sums = arena.take<float>(rows);
    scratch.dot_rows = arena.take<Piece>(rows);
    scratch.dot_cols = arena.take<Piece>(rows);
}

// Blocks of n rows. Where threads may be worth it there are enough blocks for a few, whatever their
// number: the result must not depend on it.
int block_count(const Sweep &sweep, int64_t n) {
    const int64_t fewest = (n + sweep.most_rows - 1) / sweep.most_rows, enough = n / 96 < 6 ? n / 96 : 6;
    const bool worth_threads = double(n) * n / 2 * (3 * sweep.k + 16) > 4e7;
    return worth_threads && enough > fewest ? int(enough) : fewest ? int(fewest) : 1;
}

// Where the rows' result goes, or null.
float *output(const Sweep &sweep) { return sweep.twice ? sweep.call.product : sweep.call.gradient; }

// Rows of the blocks that n rows are cut into.
int64_t rows_of_block(const Sweep &sweep, int64_t n) {
    const int count = block_count(sweep, n);
    return up((n + count - 1) / count, NR);
}

// Cuts n rows, from row `first` of a matrix on, into equal blocks; at least one, maybe empty.
int cut(const Sweep &sweep, Block *blocks, const void *points, float *gradient, const int32_t *ids,
        int64_t first, int64_t n, double scale) {
    const size_t row_bytes = (sweep.call.dtype == FLOAT32 ? 4 : 2) * sweep.k;
    const int64_t most = rows_of_block(sweep, n);
    int used = 0;
    int64_t i = 0;
    do {
        Block block = {};
        block.raw = (const char *)points + (first + i) * row_bytes;
        block.first = i;
        block.gradient = gradient ? gradient + (first + i) * sweep.k : nullptr;
        block.given_ids = ids ? ids + i : nullptr;
        if (sweep.twice) {
            block.tangent = sweep.call.tangents + (first + i) * sweep.k;
            block.known_gradient = sweep.call.known_gradient + (first + i) * sweep.k;
        }
        block.scale = scale;
        block.n = n - i < most ? int(n - i) : int(most);
        blocks[used++] = block;
        i += most;
    } while (i < n);
    return used;
}

// The most rows of a part of a sampled set of n rows.
int64_t largest_part(const Sample &sample, int64_t n) { return (n + sample.parts - 1) / sample.parts; }

// The number of pairs within the parts.
double pairs_in_parts(const Sample &sample, int64_t n) {
    const double size = double(n / sample.parts), longer = double(n % sample.parts);
    return (sample.parts * (size - 1) / 2 + longer) * size;
}

// Cuts each part of a set into as many blocks, the last ones maybe empty, and returns how many there are.
int cut_parts(const Sweep &sweep, Set &set, Block *blocks) {
    const Sample &sample = *sweep.call.sample;
    const int64_t largest = largest_part(sample, set.n), most = rows_of_block(sweep, largest);
    float *gradient = sweep.call.gradient;
    set.rounds = int((largest + most - 1) / most);
    set.row = set.col = blocks;
    const int64_t *order = sample.order + set.first;
    for (int64_t part = 0; part < sample.parts; part++) {
        int64_t left = set.n / sample.parts + (part < set.n % sample.parts);
        for (int b = 0; b < set.rounds; b++) {
            Block block = {};
            block.raw = (const char *)((const float *)sweep.call.points + set.index * sample.set_stride);
            block.gradient = gradient ? gradient + set.index * sample.gradient_set_stride : nullptr;
            block.order = order;
            block.ordered = sample.order + set.first + set.n - order;
            block.scale = set.scale;
            block.n = left < most ? int(left) : int(most);
            order += block.n;
            left -= block.n;
            *blocks++ = block;
        }
    }
    return set.rows = set.cols = int(sample.parts * set.rounds);
}

// Cuts a set into blocks, and returns how many.
int cut(const Sweep &sweep, Set &set, Block *blocks) {
    const Call &call = sweep.call;
    if (call.sample) return cut_parts(sweep, set, blocks);
    const double scale = set.scale;
    set.row = set.col = blocks;
    set.rows = set.cols = set.rounds =
        cut(sweep, blocks, call.points, output(sweep), call.row_ids, set.first, set.n, scale);
    for (int a = 0; a < set.rows; a++) {
        blocks[a].by_row = sweep.by_row;
        blocks[a].nearest = call.nearest ? call.nearest + set.first + blocks[a].first : nullptr;
    }
    if (!call.cross) return set.rows;
    set.col = blocks + set.rows;
    set.cols = cut(sweep, set.col, call.columns, call.columns_gradient, call.column_ids, 0, set.m, scale);
    if (set.cols > set.rounds) set.rounds = set.cols;
    return set.rows + set.cols;
}

void place(const Sweep &sweep, Set &set, Arena &arena) {
    const int64_t met = sweep.call.sample ? largest_part(*sweep.call.sample, set.m) : set.m;
    for (int a = 0; a < set.rows; a++) place(sweep, set.row[a], met, arena);
    for (int b = 0; b < set.cols && set.col != set.row; b++) place(sweep, set.col[b], set.n, arena);
    if (sweep.moments) set.moment = arena.take<double>(moment_size(sweep));
}

// How many tasks a stage has.
int tasks(const Set &set) { return set.rows > set.cols ? set.rows : set.cols; }

// A set for one thread alone: there is nobody to wait for, and its memory stays in this core's cache.
void perform_alone(const Sweep &sweep, Scratch &scratch, Set &set) {
    Arena arena = {scratch.memory, 0};
    place(sweep, set, arena);
    const int count = tasks(set), together = sweep.call.sample ? set.rounds : count;
    for (int a = 0; a < count; a++) perform(sweep, scratch, set, 0, a);
    // part by part, each to its end while it is in the nearest cache
    for (int first = 0; first < count; first += together)
        for (int stage = 1; stage <= set.rounds + 1; stage++)
            for (int a = first; a < first + together; a++) perform(sweep, scratch, set, stage, a);
}

// Every thread walks the same list of tasks and takes those whose number it has drawn. Tasks are
// drawn in the order of the list, which has what a task waits for before it: no deadlock.
// Not inlined: the compiler could move arithmetic to where it is not yet standard.
__attribute__((noinline)) void work(Sweep &sweep, Scratch &scratch) {
    int64_t task = 0, mine = __atomic_fetch_add(&sweep.next, 1, __ATOMIC_RELAXED);
    int most_rounds = 0;
    for (int64_t s = 0; s < sweep.shared_count; s++)
        if (sweep.sets[s].rounds > most_rounds) most_rounds = sweep.sets[s].rounds;
    for (int stage = 0; stage <= most_rounds + 1; stage++)
        for (int64_t s = 0; s < sweep.shared_count; s++) {
            const Set &set = sweep.sets[s];
            for (int a = 0; a < tasks(set) && stage <= set.rounds + 1; a++)
                if (task++ == mine) {
                    perform(sweep, scratch, set, stage, a);
                    mine = __atomic_fetch_add(&sweep.next, 1, __ATOMIC_RELAXED);
                }
        }
    for (int64_t s = sweep.shared_count; s < sweep.set_count; s++)
        if (task++ == mine) {
            perform_alone(sweep, scratch, sweep.sets[s]);
            mine = __atomic_fetch_add(&sweep.next, 1, __ATOMIC_RELAXED);
        }
}

// The sets that have pairs, largest first; the others are answered at once.
void list_sets(Sweep &sweep) {
    const Call &call = sweep.call;
    if (call.cross) {
        sweep.sets[sweep.set_count++] = {0, call.sizes[0], call.sizes[1], call.scales[0], 0};
        return;
    }
    int64_t first = 0;
    for (int64_t s = 0; s < call.sets; first += call.sizes[s++]) {
        const int64_t n = call.sizes[s];
        if (n > 1 || (n == 1 && call.pair.half_space && !call.nearest)) {
            sweep.sets[sweep.set_count++] = {first, n, n, call.scales[s], s};
            continue;
        }
        if (call.nearest && n) call.nearest[first] = -1;
        if (sweep.with_energy) call.energy[s] = 0;
        if (float *rows = output(sweep)) memset(rows + first * call.k, 0, sizeof(float) * n * call.k);
    }
    qsort(sweep.sets, sweep.set_count, sizeof(Set), [](const void *x, const void *y) {
        const int64_t n = ((const Set *)x)->n, m = ((const Set *)y)->n;
        return int(n < m) - int(n > m);
    });
}

double count_pairs(const Sweep &sweep, const Set &set) {
    if (sweep.call.sample) return pairs_in_parts(*sweep.call.sample, set.n);
    return double(set.n) * set.m / (sweep.call.cross ? 1 : 2);
}

// Sets up all that the threads share, and lets them work.
Status allocate_and_work(Sweep &sweep, Block *blocks, Scratch *scratch) {
    Set *const sets = sweep.sets, *const own = sets + sweep.shared_count, *const end = sets + sweep.set_count;
    int largest_block = 0;
    for (Set *set = sets; set < end; set++) {
        const int count = cut(sweep, *set, blocks);
        for (int b = 0; b < count; b++)
            if (blocks[b].n > largest_block) largest_block = blocks[b].n;
        blocks += count;
    }
    size_t own_memory = 0;
    for (Set *set = own; set < end; set++) {
        Arena probe = {};
        place(sweep, *set, probe);
        if (probe.used > own_memory) own_memory = probe.used;
    }
    Arena arena = {};
    for (int pass = 0; pass < 2; pass++) {  // to measure, then to hand out
        if (pass && !(arena.base = allocate<char>(arena.used))) return OUT_OF_MEMORY;
        arena.used = 0;
        for (Set *set = sets; set < own; set++) place(sweep, *set, arena);
        for (int t = 0; t < sweep.threads; t++) {
            place(sweep, scratch[t], largest_block, arena);
            scratch[t].memory = arena.take<char>(own_memory);
        }
    }
    int started = 0;
    if (sweep.threads == 1) {
        work(sweep, scratch[0]);
    } else {
#pragma omp parallel num_threads(sweep.threads)
        {
            StandardArithmetic standard;
            work(sweep, scratch[__atomic_fetch_add(&started, 1, __ATOMIC_RELAXED)]);
        }
    }
    for (const Set *set = sets; set < end && sweep.with_energy; set++) {
        double total = 0;
        for (int a = 0; a < set->rows; a++) total += set->row[a].energy;
        for (int b = 0; b < set->cols && set->col != set->row; b++) total += set->col[b].energy;
        if (sweep.call.sample)
            sweep.call.sample->energy[set->index] = set->scale * total;
        else
            sweep.call.energy[set->index] = float(set->scale * total);
    }
    release(arena.base);
    return sweep.out_of_memory ? OUT_OF_MEMORY : OK;
}

// Not inlined, like work().
__attribute__((noinline)) Status set_up_and_work(const Call &call) {
    Sweep sweep = {};
    sweep.call = call;
    sweep.twice = call.second_order;
    sweep.most_rows = sweep.twice ? R_TWICE : R;
    sweep.with_energy = !sweep.twice && !call.nearest;
    sweep.with_gradient = sweep.twice || call.gradient || call.columns_gradient;
    sweep.k = int(call.k);
    sweep.kp = up(call.k, LEAST);
    const Pair &pair = call.pair;
    sweep.near_cosine = near_cosine(pair, call.k);
    // negative floats are not ordered like integers: then every tile is looked at closely
    sweep.near_bits = INT32_MIN;
    if (sweep.near_cosine > 0) memcpy(&sweep.near_bits, &sweep.near_cosine, sizeof sweep.near_bits);
    sweep.closeness_mask = pair.half_space || pair.angular ? 0x7fffffff : -1;
    sweep.by_row = call.row_energies || call.row_weights;
    if (call.sample && call.sets) {
        const double n = double(call.sizes[0]);
        sweep.weight = n * (n - 1) / 2 / pairs_in_parts(*call.sample, call.sizes[0]);
        sweep.moments = call.sample->coefficients[0] != 0 || call.sample->coefficients[1] != 0;
    }
    sweep.functions = choose(pair);
    sweep.meet = call.nearest   ? choose_nearest(pair.half_space, !call.cross)
                 : sweep.twice  ? sweep.functions.meet_twice
                 : sweep.by_row ? sweep.functions.meet_by_row
                                : sweep.functions.meet;

    sweep.sets = allocate<Set>(call.sets);
    if (!sweep.sets) return OUT_OF_MEMORY;
    list_sets(sweep);
    double all_pairs = 0;
    size_t block_total = 0;
    for (const Set *set = sweep.sets; set < sweep.sets + sweep.set_count; set++) {
        all_pairs += count_pairs(sweep, *set);
        if (call.sample)
            block_total += call.sample->parts * block_count(sweep, largest_part(*call.sample, set->n));
        else
            block_total += block_count(sweep, set->n) + (call.cross ? block_count(sweep, set->m) : 0);
    }
    // below about a millisecond of one core, waking the others costs more than it brings
    const bool small = all_pairs * (3 * call.k + 16) < 4e7;
    sweep.threads = small || call.threads < 1 ? 1 : call.threads;
    // a set is shared if the others could wait long for the thread that has it alone
    while (sweep.threads > 1 && sweep.shared_count < sweep.set_count &&
           count_pairs(sweep, sweep.sets[sweep.shared_count]) * 8 * sweep.threads > all_pairs)
        sweep.shared_count++;

    Block *blocks = allocate<Block>(block_total);
    Scratch *scratch = allocate<Scratch>(sweep.threads);
    if (scratch) memset(scratch, 0, sizeof(Scratch) * sweep.threads);
    const Status status = blocks && scratch ? allocate_and_work(sweep, blocks, scratch) : OUT_OF_MEMORY;
    release(scratch);
    release(blocks);
    release(sweep.sets);
    return status;
}

}  // namespace

Status run(const Call &call) {
    StandardArithmetic standard;
    return set_up_and_work(call);
}

}  // namespace ISA
