"""Compile every Triton kernel ahead of time for GPUs that need not be there, and check the result.

    python -m tools.compile_gpu             the variants of two pair functions, and the hot loops of
                                            those that need most registers; `--all`, hours: the rest
    python -m tools.compile_gpu --small     what `make test` runs
    python -m tools.compile_gpu --target sm_90 --only pairwise

One line a variant: registers, spill instructions in the hot loop and in all, shared memory,
instructions a pair in the hot loop, matrix instruction found. The exit status is not zero if a hot
loop spills, if a product of the sweep does not use the tensor cores, if fewer programs share a
multiprocessor than the tile table counts on, or if sm_90 takes more instructions a pair than
`LIMITS` allows. But for --small, the lines replace older ones in bench/results/compile_gpu.csv.
"""

import argparse
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("TRITON_INTERPRET=1 replaces the compiler: unset it")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pandas as pd
import triton
from pandas import DataFrame

from bench import RESULTS
from comhe_ext.kernels.gpu import plan
from tools.compile_gpu import machine_code
from tools.compile_gpu.launches import PAIRS, TARGETS, Launch, launches

TABLE = RESULTS / "compile_gpu.csv"
COUNTED, TENSOR_CORES = "instructions a pair are counted", "multiplies on tensor cores"
# a few variants of every kernel, which `make test` compiles, and what is asked of a fast loop
KERNELS: dict[str, tuple[str, set[str]]] = {
    "pairwise_kernel": (r"s=2 \d+x\d+x32 [34]\+3", {COUNTED, TENSOR_CORES}),
    "direct_kernel": (r"s=2 k=4", {COUNTED}),
    "near_pairs_kernel": (r"s=2 \d+x(16|32) \d", set()),
    "coefficient_kernel": (r"s=2 \d", {COUNTED}),
    "near_block_kernel": (r"s=2", set()),
    "cross_kernel": (r"s=2 64x64x32 3\+3( ids weights)?", {COUNTED, TENSOR_CORES}),
    "cross_near_kernel": (r"s=2 64x32 3", set()),
    "cross_direct_kernel": (r"s=2 k=4 ids weights", {COUNTED}),
    "cross_finish_kernel": (r"rows=64 each", set()),
    "nearest_kernel": (r"set 32x32", {COUNTED, TENSOR_CORES}),
    "nearest_choose_kernel": (r"columns ids half 32x32", set()),
    "difference_kernel": (r"angle rows projected", {COUNTED}),
    "near_difference_kernel": (r"sum force", set()),
    "difference_gradient_kernel": (r"shared", set()),
    "finish_kernel": (r"s=2 rows=\d+", set()),
    "total_kernel": (r"", set()),
    "normalize_kernel": (r"float32 rows=.*", set()),
    "project_normalize_kernel": (r"float32 rows=64 k=64 (tf32x3|bf16x6)", {TENSOR_CORES}),
}
# instructions a pair on sm_90, at most
LIMITS = {("pairwise_kernel", f"s=2 {rows}x64x32 3+3"): 12.5 for rows in (64, 128)}
LIMITS |= {("pairwise_kernel", f"s=2 half {rows}x64x64 3+3"): 16.0 for rows in (64, 128)}
LIMITS["nearest_kernel", "set 32x32"] = 12.5
# registers, columns of tensor memory and bytes of shared memory of a multiprocessor; a program
# takes registers by eights a thread, and a kilobyte of shared memory beside its own
REGISTERS, TENSOR_COLUMNS = 1 << 16, 512
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
SMALL_ON_ALL_TARGETS = ("pairwise_kernel", "direct_kernel")
# the pair functions of the papers' settings, compiled in every variant, and those of which only the
# hot loops are: they need most registers
MAIN_PAIRS = ("s=2", "s=2 half")
HEAVY_PAIRS = ("any s half", "any s half angle", "wide gaussian half")
KEY = ["target", "kernel", "variant"]
COLUMNS = [*KEY, "registers", "spills_hot_loop", "spills", "shared_bytes"]
COLUMNS += ["instructions_per_pair", "matrix_instruction"]
Row = dict[str, Any]


def is_small(launch: Launch) -> bool:
    """Tell whether a launch belongs to the part that `make test` compiles."""
    if launch.target not in ("sm_90", "gfx942") and launch.kernel not in SMALL_ON_ALL_TARGETS:
        return False
    return re.fullmatch(KERNELS[launch.kernel][0], launch.variant) is not None


def is_main(launch: Launch) -> bool:
    """Tell whether a launch belongs to the part that goes into the table."""
    heavy = launch.pair is not None and launch.pair not in MAIN_PAIRS
    return not heavy or (COUNTED in KERNELS[launch.kernel][1] and launch.constants["WITH_FORCE"])


def programs_wanted(launch: Launch) -> int:
    """Look up the programs a multiprocessor that `splits` counts on; 1 where it does not."""
    given = launch.constants
    if launch.kernel != "pairwise_kernel" or launch.pair not in MAIN_PAIRS:
        return 1
    shape = given["BLOCK_M"], given["BLOCK_N"], launch.num_warps, given["STAGES"]
    wanted = *shape, given.get("maxnreg")
    for tiles in plan.TILE_TABLE[launch.target][given["WIDTH"]]:
        known = tiles.block_m, tiles.block_n, tiles.num_warps, tiles.num_stages, tiles.maxnreg
        if known == wanted:
            return tiles.programs
    return 1


def programs_that_fit(launch: Launch, registers: int, metadata: Any) -> int:
    """Count the programs that the registers, shared and tensor memory of a multiprocessor hold."""
    registers = -(-registers // 8) * 8 * 32 * launch.num_warps
    fit = min(REGISTERS // registers, SHARED[launch.target] // (metadata.shared + 1024))
    return min(fit, TENSOR_COLUMNS // max(getattr(metadata, "tmem_size", 0), 1))


def check(launch: Launch) -> tuple[Row, list[str]]:
    """Compile a launch and look at its machine code; its line of the table, and what is wrong."""
    kernel = launch.compile()
    gpu, matrix = TARGETS[launch.target]
    nvidia = gpu.backend == "cuda"
    code = (machine_code.nvidia if nvidia else machine_code.amd)(kernel, matrix)
    wanted = KERNELS[launch.kernel][1]
    on_tensor_cores = TENSOR_CORES in wanted
    loop, spills_hot, per_pair = code.hot_loop(on_tensor_cores), 0, None
    problems = []
    if loop is not None:
        spills_hot = code.spills(*loop)
        # the compiler restructures loops for sm_100, and without matrix instructions for gfx942:
        # a count of one of them says nothing
        countable = launch.target != "sm_100" and (nvidia or on_tensor_cores)
        if COUNTED in wanted and countable:
            pairs = launch.constants["BLOCK_M"] * launch.constants["BLOCK_N"]
            inside = sum(loop[0] <= address <= loop[1] for address, _, _ in code.instructions)
            per_pair = inside * gpu.warp_size * launch.num_warps / pairs
    elif wanted and launch.target != "sm_100":
        problems.append("no hot loop was found")
    if on_tensor_cores and code.matrix_found != matrix:
        problems.append(f"no {matrix} instruction")
    if wanted and spills_hot:
        problems.append(f"{spills_hot} spill instructions in the hot loop")
    if nvidia:
        fit = programs_that_fit(launch, code.registers, kernel.metadata)
        if fit < (most := programs_wanted(launch)):
            problems.append(f"{fit} programs fit a multiprocessor, not {most}")
    limit = LIMITS.get(launch.key[1:]) if launch.target == "sm_90" else None
    if limit is not None and (per_pair is None or per_pair > limit):
        problems.append(f"more than {limit} instructions a pair")
    per_pair_text = "" if per_pair is None else f"{per_pair:.1f}"
    figures = code.registers, spills_hot, code.spills(), kernel.metadata.shared, per_pair_text
    values = [*launch.key, *map(str, figures), code.matrix_found]
    return dict(zip(COLUMNS, values, strict=True)), problems


_chosen: list[Launch] = []  # what a forked process compiles: a kernel cannot be pickled


def check_number(number: int) -> tuple[Row, list[str]]:
    """Check one of the launches that were chosen, in a process of its own."""
    return check(_chosen[number])


def save(rows: list[Row], every: list[Launch]) -> None:
    """Put rows in place of older ones, and drop those of the same targets that `every` lacks."""
    new = DataFrame(rows)
    old = pd.read_csv(TABLE, dtype=str, keep_default_na=False) if TABLE.exists() else new[:0]
    known = pd.concat([old, new]).drop_duplicates(KEY, keep="last").set_index(KEY)
    current = list(dict.fromkeys(launch.key for launch in every))
    others = [key for key in known.index if key[0] not in {target for target, _, _ in current}]
    order = sorted([*current, *others], key=lambda key: list(TARGETS).index(key[0]))
    table = known.reindex([key for key in order if key in known.index]).reset_index()
    table[new.columns].to_csv(TABLE, index=False)


def main() -> int:
    """Compile what is asked for, and say whether all of it is right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few variants of every kernel")
    parser.add_argument("--all", action="store_true", help="every variant of every kernel")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--only", default="", metavar="REGEX", help="of a kernel and its variant")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    pairs = ("s=2",) if options.small else MAIN_PAIRS + HEAVY_PAIRS
    every = [
        launch
        for target in options.target or TARGETS
        for launch in launches(target, tuple(PAIRS) if options.all else pairs)
        if options.all or is_main(launch)
    ]
    chosen = [x for x in every if re.search(options.only, f"{x.kernel} {x.variant}")]
    chosen = [x for x in chosen if is_small(x) or not options.small]
    start, failed, rows = time.perf_counter(), 0, []
    _chosen[:] = chosen
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool:
        for row, problems in pool.map(check_number, range(len(chosen))):
            failed += bool(problems)
            rows.append(row)
            print(*row.values(), *(f"\n    FAIL: {problem}" for problem in problems), flush=True)
    seconds = time.perf_counter() - start
    print(f"triton {triton.__version__}: {len(chosen)} variants, {failed} failed, {seconds:.0f} s")
    if rows and not options.small:
        save(rows, every)
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
