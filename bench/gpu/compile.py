"""Compile every Triton kernel ahead of time for GPUs that need not be there, and check the result.

    python -m bench.gpu.compile                       the variants of two pair functions, and the
                                                      hot loops of those that need most registers
    python -m bench.gpu.compile --all                 every variant, hours on two cores
    python -m bench.gpu.compile --small               what `make test` runs
    python -m bench.gpu.compile --target sm_90 --kernel pairwise

One line a variant: registers, spill instructions (in the hot loop / in all), shared memory,
instructions a pair in the hot loop, matrix instruction found. The exit status is not zero if a hot
loop spills, if a product of the sweep does not use the tensor cores, if fewer programs share a
multiprocessor than the tile table counts on, or if sm_90 takes more instructions a pair than
`LIMITS` allows. But for --small, the lines also go to bench/results/compile_gpu.csv, in place of
those of an earlier run.
"""

import argparse
import csv
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("TRITON_INTERPRET=1 replaces the compiler: unset it")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton

from bench import RESULTS
from bench.gpu import machine_code
from bench.gpu.launches import PAIRS, TARGETS, Launch, launches
from comhe_ext.kernels.gpu import plan

TABLE = RESULTS / "compile_gpu.csv"
# kernels with one loop over pairs that has to be fast, and those that multiply on tensor cores
COUNTED = (
    "pairwise_kernel",
    "direct_kernel",
    "coefficient_kernel",
    "cross_kernel",
    "cross_direct_kernel",
    "nearest_kernel",
    "difference_kernel",
)
HOT = (*COUNTED, "project_normalize_kernel")
ON_TENSOR_CORES = ("pairwise_kernel", "cross_kernel", "nearest_kernel", "project_normalize_kernel")
# instructions a pair, at most
LIMITS = {
    ("sm_90", "pairwise_kernel", "s=2 64x64x32 3+3"): 12.5,
    ("sm_90", "pairwise_kernel", "s=2 128x64x32 3+3"): 12.5,
    ("sm_90", "pairwise_kernel", "s=2 half 64x64x64 3+3"): 16.0,
    ("sm_90", "pairwise_kernel", "s=2 half 128x64x64 3+3"): 16.0,
    ("sm_90", "nearest_kernel", "set 32x32"): 12.5,
}
# registers, columns of tensor memory and bytes of shared memory of a multiprocessor; a program
# takes registers by eights a thread, and a kilobyte of shared memory beside its own
REGISTERS, TENSOR_COLUMNS = 1 << 16, 512
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
# the part that `make test` compiles: a few variants of every kernel
SMALL = {
    "pairwise_kernel": r"s=2 \d+x\d+x32 [34]\+3",
    "direct_kernel": r"s=2 k=4",
    "near_pairs_kernel": r"s=2 \d+x(16|32) \d",
    "coefficient_kernel": r"s=2 \d",
    "near_block_kernel": r"s=2",
    "cross_kernel": r"s=2 64x64x32 3\+3( ids weights)?",
    "cross_near_kernel": r"s=2 64x32 3",
    "cross_direct_kernel": r"s=2 k=4 ids weights",
    "cross_finish_kernel": r"rows=64 each",
    "nearest_kernel": r"set 32x32",
    "nearest_choose_kernel": r"columns ids half 32x32",
    "difference_kernel": r"angle rows projected",
    "near_difference_kernel": r"sum force",
    "difference_gradient_kernel": r"shared",
    "finish_kernel": r"s=2 rows=\d+",
    "total_kernel": r"",
    "normalize_kernel": r"float32 rows=.*",
    "project_normalize_kernel": r"float32 rows=64 k=64 (tf32x3|bf16x6)",
}
SMALL_ON_ALL_TARGETS = ("pairwise_kernel", "direct_kernel")
# the pair functions of the papers' settings, compiled in every variant, and those of which only the
# hot loops are: they need most registers
MAIN_PAIRS = ("s=2", "s=2 half")
HEAVY_PAIRS = ("any s half", "any s half angle", "wide gaussian half")


@dataclass
class Report:
    """What came out of the compiler."""

    launch: Launch
    registers: int = 0
    spills_hot: int = 0
    spills: int = 0
    shared: int = 0
    per_pair: float | None = None
    matrix: str = "-"
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def row(self) -> dict[str, str]:
        """The line of the table in bench/results."""
        return {
            "target": self.launch.target,
            "kernel": self.launch.kernel,
            "variant": self.launch.variant,
            "registers": str(self.registers),
            "spills_hot_loop": str(self.spills_hot),
            "spills": str(self.spills),
            "shared_bytes": str(self.shared),
            "instructions_per_pair": "" if self.per_pair is None else f"{self.per_pair:.1f}",
            "matrix_instruction": self.matrix,
        }

    def line(self) -> str:
        per_pair = "-" if self.per_pair is None else f"{self.per_pair:.1f}"
        return (
            f"{self.launch.target:7} {self.launch.kernel:26} {self.launch.variant:38} "
            f"regs {self.registers:3}  spills {self.spills_hot}/{self.spills:<3} "
            f"shared {self.shared:6}  instr/pair {per_pair:>5}  {self.matrix:8} "
            f"{self.seconds:5.1f} s"
            + "".join(f"\n    FAIL: {problem}" for problem in self.problems)
        )


def is_small(launch: Launch) -> bool:
    """Whether a launch belongs to the part that `make test` compiles."""
    if launch.target not in ("sm_90", "gfx942") and launch.kernel not in SMALL_ON_ALL_TARGETS:
        return False
    return re.fullmatch(SMALL[launch.kernel], launch.variant) is not None


def is_main(launch: Launch) -> bool:
    """Whether a launch belongs to the part that goes into the table."""
    heavy = launch.pair is not None and launch.pair not in MAIN_PAIRS
    return not heavy or (launch.kernel in COUNTED and launch.constants["WITH_FORCE"])


def programs_wanted(launch: Launch) -> int:
    """Programs a multiprocessor that `splits` counts on; 1 where it does not."""
    given = launch.constants
    if launch.kernel != "pairwise_kernel" or launch.pair not in MAIN_PAIRS:
        return 1
    shape = (given["BLOCK_M"], given["BLOCK_N"], launch.num_warps, given["STAGES"])
    for tiles in plan.TILE_TABLE[launch.target][given["WIDTH"]]:
        known = (tiles.block_m, tiles.block_n, tiles.num_warps, tiles.num_stages)
        if known == shape and tiles.maxnreg == given.get("maxnreg"):
            return tiles.programs
    return 1


def programs_that_fit(launch: Launch, report: Report, tensor_columns: int) -> int:
    """Programs that the registers, shared and tensor memory of a multiprocessor hold."""
    registers = -(-report.registers // 8) * 8 * 32 * launch.num_warps
    return min(
        REGISTERS // registers,
        SHARED[launch.target] // (report.shared + 1024),
        TENSOR_COLUMNS // max(tensor_columns, 1),
    )


def check(launch: Launch) -> Report:
    """Compile a launch and look at its machine code."""
    start = time.perf_counter()
    report = Report(launch)
    kernel = launch.compile()
    report.shared = kernel.metadata.shared
    gpu, matrix = TARGETS[launch.target]
    nvidia = gpu.backend == "cuda"
    code = (machine_code.nvidia if nvidia else machine_code.amd)(kernel, matrix)
    report.registers, report.spills, report.matrix = (
        code.registers,
        code.spills(),
        code.matrix_found,
    )
    on_tensor_cores = launch.kernel in ON_TENSOR_CORES
    loop = code.hot_loop(on_tensor_cores)
    if loop is not None:
        report.spills_hot = code.spills(*loop)
        # the compiler restructures loops for sm_100, and without matrix instructions for gfx942:
        # a count of one of them says nothing
        countable = launch.target != "sm_100" and (nvidia or on_tensor_cores)
        if launch.kernel in COUNTED and countable:
            pairs = launch.constants["BLOCK_M"] * launch.constants["BLOCK_N"]
            threads = gpu.warp_size * launch.num_warps
            inside = sum(loop[0] <= address <= loop[1] for address, _, _ in code.instructions)
            report.per_pair = inside * threads / pairs
    elif launch.kernel in HOT and launch.target != "sm_100":
        report.problems.append("no hot loop was found")
    if on_tensor_cores and report.matrix != matrix:
        report.problems.append(f"no {matrix} instruction")
    if launch.kernel in HOT and report.spills_hot:
        report.problems.append(f"{report.spills_hot} spill instructions in the hot loop")
    if nvidia:
        fit = programs_that_fit(launch, report, getattr(kernel.metadata, "tmem_size", 0))
        if fit < (wanted := programs_wanted(launch)):
            report.problems.append(f"{fit} programs fit a multiprocessor, not {wanted}")
    limit = LIMITS.get(launch.key)
    if limit is not None and (report.per_pair is None or report.per_pair > limit):
        report.problems.append(f"more than {limit} instructions a pair")
    report.seconds = time.perf_counter() - start
    return report


# what a forked process compiles: a kernel cannot be pickled
_chosen: list[Launch] = []


def check_number(number: int) -> Report:
    report = check(_chosen[number])
    report.launch = None  # type: ignore[assignment]
    return report


def reports(chosen: list[Launch], jobs: int) -> Iterable[Report]:
    """What the compiler makes of some launches, in their order."""
    _chosen[:] = chosen
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        for launch, report in zip(chosen, pool.map(check_number, range(len(chosen))), strict=True):
            report.launch = launch
            yield report


def save(rows: list[dict[str, str]], every: list[Launch]) -> None:
    """Put rows in place of older ones, and drop those of the same targets that `every` lacks."""

    def key(row: dict[str, str]) -> tuple[str, str, str]:
        return row["target"], row["kernel"], row["variant"]

    known = {}
    if TABLE.exists():
        with TABLE.open() as file:
            known = {key(row): row for row in csv.DictReader(file)}
    known |= {key(row): row for row in rows}
    current = dict.fromkeys(launch.key for launch in every)
    others = [name for name in known if name[0] not in {name[0] for name in current}]
    order = sorted([*current, *others], key=lambda name: list(TARGETS).index(name[0]))
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(known[name] for name in order if name in known)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few variants of every kernel")
    parser.add_argument("--all", action="store_true", help="every variant of every kernel")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--variant", default="", help="only variants that match this expression")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    pairs: tuple[str, ...] = MAIN_PAIRS + HEAVY_PAIRS
    if options.small or options.all:
        pairs = ("s=2",) if options.small else tuple(PAIRS)
    every = [
        launch
        for target in options.target or TARGETS
        for launch in launches(target, pairs)
        if options.all or is_main(launch)
    ]
    chosen = [
        launch
        for launch in every
        if options.kernel in launch.kernel
        and re.search(options.variant, launch.variant)
        and (is_small(launch) or not options.small)
    ]
    start = time.perf_counter()
    failed = 0
    rows: list[dict[str, str]] = []
    for report in reports(chosen, options.jobs):
        failed += bool(report.problems)
        rows.append(report.row())
        print(report.line(), flush=True)
    print(
        f"triton {triton.__version__}: {len(chosen)} variants, {failed} failed, "
        f"{time.perf_counter() - start:.0f} s"
    )
    if rows and not options.small:
        save(rows, every)
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
