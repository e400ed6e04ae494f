// The sweep over two spaces, see angle_difference-inl.h: memory, blocks, and the order of work. That is
// the one of schedule-inl.h, so results do not depend on the number of threads; but all sets here are
// of one size.
#pragma once
#include "angle_difference-inl.h"
#include "rows-inl.h"
#include "schedule-inl.h"

namespace ISA {
namespace {

INLINE TwoSpaces *blocks_of(const Differences &all, int64_t set) { return all.blocks + set * all.block_count; }
INLINE int64_t row_forces(const Differences &all) { return all.rows.with_gradient ? all.call.projections : 1; }

void prepare(const Differences &all, TwoScratches &scratch, TwoSpaces &block) {
    Block &first = *block.rows;
    prepare(all.rows, scratch.rows, first);
    for (int s = 0; s < all.call.projections; s++) prepare(all.projected, scratch.projected, block.projected[s]);
    for (int s = 1; s < row_forces(all); s++) {
        Block &other = block.rows[s];
        other.u = first.u;
        other.ut = first.ut;
        other.inverse = first.inverse;
        other.deficit = first.deficit;
        other.axial = first.axial;
        memset(other.g, 0, sizeof(float) * (int64_t(other.capacity) * all.rows.kp + other.lost));
    }
}

void finish(const Differences &all, TwoScratches &scratch, TwoSpaces &block) {
    for (int s = 0; s < row_forces(all); s++) finish(all.rows, scratch.rows, block.rows[s]);
    for (int s = 0; s < all.call.projections; s++) finish(all.projected, scratch.projected, block.projected[s]);
}

// Task a of a stage of a set, as perform() of schedule-inl.h.
void perform(const Differences &all, TwoScratches &scratch, TwoSpaces *blocks, int stage, int a) {
    const int rounds = all.block_count;
    const bool meeting = stage > 0 && stage <= rounds;
    const int b = meeting ? (stage - 1 - a + rounds) % rounds : a;
    if (b < a) return;  // block b sees to it
    TwoSpaces &row = blocks[a], &col = blocks[b];
    row.stage.wait(stage);
    col.stage.wait(stage);
    if (meeting)
        all.meet(all, scratch, row, col);
    else if (stage)
        finish(all, scratch, row);
    else
        prepare(all, scratch, row);
    row.stage.advance(stage);
    if (a != b) col.stage.advance(stage);
}

// Memory of a block's rows, and of the forces on them.
void place_rows(const Sweep &sweep, Block &block, Arena &arena) {
    block.u = arena.take<float>(size_t(block.capacity) * sweep.kp);
    block.ut = arena.take<float>(size_t(up(block.n, NR)) * sweep.k);
    const size_t padded = up(block.n, NR) + NEAR_ROWS;
    block.inverse = arena.take<double>(padded);
    block.deficit = arena.take<double>(padded);
    block.axial = arena.take<double>(padded);
}

void place_forces(const Differences &all, const Sweep &sweep, Block &block, Arena &arena) {
    if (!sweep.with_gradient) return;
    const size_t count = size_t(block.capacity) * sweep.kp;
    // G is mostly along the row, as in half space
    block.lost = all.call.n / sweep.k >= MOSTLY_AXIAL_HALF ? int64_t(count) : 0;
    block.g = arena.take<float>(count + block.lost);
}

void place(const Differences &all, TwoSpaces *blocks, Arena &arena) {
    for (TwoSpaces *block = blocks; block < blocks + all.block_count; block++) {
        place_rows(all.rows, *block->rows, arena);
        for (int s = 0; s < row_forces(all); s++) place_forces(all, all.rows, block->rows[s], arena);
        for (int s = 0; s < all.call.projections; s++) {
            place_rows(all.projected, block->projected[s], arena);
            place_forces(all, all.projected, block->projected[s], arena);
        }
    }
}

void place(const Differences &all, TwoScratches &scratch, Arena &arena) {
    place(all.rows, scratch.rows, all.block_rows, arena);
    place(all.projected, scratch.projected, all.block_rows, arena);
    scratch.slopes = arena.take<float>(size_t(up(all.block_rows, NR) + NEAR_ROWS) * R);
    scratch.near = arena.take<bool>(size_t(R_TWICE / SHORT + 1) * (R_TWICE / NR));
}

// Every thread walks the same list of tasks and takes those whose number it has drawn; not inlined; both
// as work() of schedule-inl.h.
__attribute__((noinline)) void work(Differences &all, TwoScratches &scratch) {
    int64_t task = 0, mine = __atomic_fetch_add(&all.next, 1, __ATOMIC_RELAXED);
    const int stages = all.block_count + 2;
    if (!all.shared) {
        for (; mine < all.call.sets; mine = __atomic_fetch_add(&all.next, 1, __ATOMIC_RELAXED)) {
            TwoSpaces *const blocks = blocks_of(all, mine);
            Arena arena = {scratch.rows.memory, 0};
            place(all, blocks, arena);
            for (int stage = 0; stage < stages; stage++)
                for (int a = 0; a < all.block_count; a++) perform(all, scratch, blocks, stage, a);
        }
        return;
    }
    for (int stage = 0; stage < stages; stage++)
        for (int64_t set = 0; set < all.call.sets; set++)
            for (int a = 0; a < all.block_count; a++)
                if (task++ == mine) {
                    perform(all, scratch, blocks_of(all, set), stage, a);
                    mine = __atomic_fetch_add(&all.next, 1, __ATOMIC_RELAXED);
                }
}

// The block of set `set` whose first row is `first`, in one space; its gradient is that of set `result`.
Block cut(const Differences &all, const Sweep &sweep, int64_t set, int64_t first, float *gradient, int64_t result,
          double scale) {
    Block block = {};
    const int64_t n = all.call.n - first;
    block.n = n < all.block_rows ? int(n) : all.block_rows;
    block.capacity = capacity_of(block.n);
    const int64_t row = (set * all.call.n + first) * sweep.k;
    block.raw = (const char *)sweep.call.points + (sweep.call.dtype == FLOAT32 ? 4 : 2) * row;
    block.gradient = gradient ? gradient + (result * all.call.n + first) * sweep.k : nullptr;
    block.scale = scale;
    return block;
}

void cut(const Differences &all, double factor, Block *storage) {
    const AngleCall &call = all.call;
    for (int64_t set = 0; set < call.sets; set++)
        for (int b = 0; b < all.block_count; b++) {
            TwoSpaces &block = blocks_of(all, set)[b];
            const int64_t first = int64_t(b) * all.block_rows, projection = set * call.projections;
            block.stage = {};
            block.rows = storage;
            for (int64_t s = projection; s < projection + row_forces(all); s++)
                *storage++ = cut(all, all.rows, set, first, call.to_rows, s, factor);
            block.projected = storage;
            for (int64_t s = projection; s < projection + call.projections; s++)
                *storage++ = cut(all, all.projected, s, first, call.to_projected, s, -factor);
        }
}

// Sums up the blocks' parts of S, each of which is of pairs i < j.
void total(const Differences &all) {
    for (int64_t set = 0; set < all.call.sets; set++)
        for (int s = 0; s < all.call.projections; s++) {
            double total = 0;
            for (const TwoSpaces *block = blocks_of(all, set); block < blocks_of(all, set + 1); block++)
                total += block->projected[s].energy + block->rows->energy;  // the rows' own is 0, or NaN
            all.call.total[set * all.call.projections + s] = float(2 * total);
        }
}

Status allocate_and_work(Differences &all, TwoScratches *scratch) {
    Arena arena = {};
    for (int pass = 0; pass < 2; pass++) {  // to measure, then to hand out
        if (pass && !(arena.base = allocate<char>(arena.used))) return OUT_OF_MEMORY;
        arena.used = 0;
        size_t own_memory = 0;
        if (all.shared) {
            for (int64_t set = 0; set < all.call.sets; set++) place(all, blocks_of(all, set), arena);
        } else {
            Arena probe = {};
            place(all, all.blocks, probe);
            own_memory = probe.used;
        }
        for (int t = 0; t < all.threads; t++) {
            place(all, scratch[t], arena);
            scratch[t].rows.memory = arena.take<char>(own_memory);
        }
    }
    int started = 0;
    if (all.threads == 1) {
        work(all, scratch[0]);
    } else {
#pragma omp parallel num_threads(all.threads)
        {
            StandardArithmetic standard;
            work(all, scratch[__atomic_fetch_add(&started, 1, __ATOMIC_RELAXED)]);
        }
    }
    total(all);
    release(arena.base);
    return all.rows.out_of_memory || all.projected.out_of_memory ? OUT_OF_MEMORY : OK;
}

// One space as a sweep of its own.
Sweep space(const void *points, int64_t width, int32_t dtype, bool with_gradient) {
    Sweep sweep = {};
    sweep.call.points = points;
    sweep.call.k = width;
    sweep.call.dtype = dtype;
    sweep.k = int(width);
    sweep.kp = up(width, LEAST);
    sweep.with_gradient = with_gradient;
    sweep.most_rows = R_TWICE;
    sweep.near_cosine = 1 - 0x1p-7f;  // d^2 < 1/64
    memcpy(&sweep.near_bits, &sweep.near_cosine, sizeof sweep.near_bits);
    sweep.closeness_mask = 0x7fffffff;
    sweep.functions.slope = 1;
    return sweep;
}

// Not inlined, like work().
__attribute__((noinline)) Status set_up_and_work(const AngleCall &call) {
    Differences all = {};
    all.call = call;
    all.rows = space(call.rows, call.d, call.rows_dtype, call.to_rows);
    all.projected = space(call.projected, call.k, call.projected_dtype, call.to_projected);
    if (call.angle)
        all.meet = call.to_rows ? meet_in_both<OfAngles, true> : meet_in_both<OfAngles, false>;
    else
        all.meet = call.to_rows ? meet_in_both<OfCosines, true> : meet_in_both<OfCosines, false>;
    all.block_count = block_count(all.rows, call.n);
    all.block_rows = up((call.n + all.block_count - 1) / all.block_count, NR);
    all.block_count = int((call.n + all.block_rows - 1) / all.block_rows);

    // below about a millisecond of one core, waking the others costs more than it brings
    const double pairs = double(call.n) * call.n / 2 * call.sets;
    const double pushed = 3.0 * call.k + 16 + (call.to_rows ? 2.0 * call.d : 0);
    all.threads = pairs * (call.d + call.projections * pushed) < 4e7 || call.threads < 1 ? 1 : call.threads;
    // or each thread has sets of its own, whose memory stays in its core's cache
    all.shared = all.threads > 1 && call.sets < 8 * int64_t(all.threads);

    const int64_t blocks = call.sets * all.block_count;
    all.blocks = allocate<TwoSpaces>(blocks);
    Block *storage = allocate<Block>(blocks * (row_forces(all) + call.projections));
    TwoScratches *scratch = allocate<TwoScratches>(all.threads);
    Status status = OUT_OF_MEMORY;
    if (all.blocks && storage && scratch) {
        memset(scratch, 0, sizeof(TwoScratches) * all.threads);
        cut(all, call.angle ? OfAngles::FACTOR : OfCosines::FACTOR, storage);
        status = allocate_and_work(all, scratch);
    }
    release(scratch);
    release(storage);
    release(all.blocks);
    return status;
}

}  // namespace

Status run(const AngleCall &call) {
    StandardArithmetic standard;
    return set_up_and_work(call);
}

}  // namespace ISA
