"""Compile every Triton kernel ahead of time for GPUs that need not be there, and check the result.

    python bench/compile_gpu.py                       the whole matrix
    python bench/compile_gpu.py --small               what `make test` runs
    python bench/compile_gpu.py --target sm_90 --kernel pairwise

One line a variant: registers, spill instructions (in the hot loop / in all), shared memory,
instructions a pair in the hot loop, matrix instruction found. The exit status is not zero if a hot
loop spills, if a product of the sweep does not use the tensor cores, or if sm_90 at k = 32, s = 2
takes more than 15 instructions a pair. But for --small, the lines also go to
bench/results/compile_gpu.csv, in place of those of an earlier run.
"""

import argparse
import csv
import importlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("TRITON_INTERPRET=1 replaces the compiler: unset it")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "HMMA"),
    "sm_90": (GPUTarget("cuda", 90, 32), "HGMMA"),
    "sm_100": (GPUTarget("cuda", 100, 32), "UTCHMMA"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "v_mfma"),
}
KINDS = {0: "s=0", 1: "s=1", 2: "s=2", 3: "any s"}
MAX_INSTRUCTIONS = 15.0
RESULTS = Path(__file__).parent / "results" / "compile_gpu.csv"

# types of the arguments that are no constants, by name; a pointer to points has the input's dtype
POINTERS = {
    "hi_ptr": "*fp16",
    "lo_ptr": "*fp16",
    "inv_nu_ptr": "*fp64",
    "scale_ptr": "*fp64",
    "offset_ptr": "*fp64",
    "tile_energy_ptr": "*fp64",
    "items_ptr": "*i32",
    "tiles_ptr": "*i32",
    "set_tiles_ptr": "*i32",
    "points_ptr": "*fp32",
    "sets_ptr": "*i64",
    "rest_ptr": "*fp16",
    "coefficient_ptr": "*fp16",
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "": {"WIDTH": 64, "COLUMNS": False, "WITH_REST": False},
    " rest": {"WIDTH": 16, "COLUMNS": False, "WITH_REST": True},
    " columns": {"WIDTH": 3, "COLUMNS": True, "WITH_REST": False},
}
# weights of a projection launch, after padding
NUM_WEIGHTS = 64
INTEGERS = {
    "k",
    "packed_rows",
    "slot_width",
    "num_cols",
    "valid_rows",
    "valid_cols",
    "diagonal",
    "first_row",
    "first_col",
    "shift",
}


@dataclass(frozen=True)
class Variant:
    """One kernel with its constants for one target."""

    module: str
    kernel: str
    target: str
    label: str
    constants: tuple[tuple[str, object], ...]
    options: tuple[tuple[str, object], ...] = ()
    pairs: int = 0  # pairs of rows that one turn of the hot loop handles
    matrix: bool = False  # has to use the tensor cores
    hot: bool = True
    limit: float | None = None
    points: str = "*fp32"


@dataclass
class Report:
    """What came out of the compiler."""

    variant: Variant
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
            "target": self.variant.target,
            "kernel": self.variant.kernel,
            "variant": self.variant.label,
            "registers": str(self.registers),
            "spills_hot_loop": str(self.spills_hot),
            "spills": str(self.spills),
            "shared_bytes": str(self.shared),
            "instructions_per_pair": "" if self.per_pair is None else f"{self.per_pair:.1f}",
            "matrix_instruction": self.matrix,
        }

    def line(self) -> str:
        v = self.variant
        per_pair = "-" if self.per_pair is None else f"{self.per_pair:.1f}"
        return (
            f"{v.target:7} {v.kernel:26} {v.label:42} regs {self.registers:3}  "
            f"spills {self.spills_hot}/{self.spills:<3} shared {self.shared:6}  "
            f"instr/pair {per_pair:>5}  {self.matrix:8} {self.seconds:5.1f} s"
            + "".join(f"\n    FAIL: {problem}" for problem in self.problems)
        )


def _pair_functions() -> Iterator[tuple[str, dict[str, object]]]:
    for kind, half, angle in itertools.product(KINDS, (False, True), (False, True)):
        label = KINDS[kind] + (" half" if half else "") + (" angle" if angle else "")
        yield label, {"KIND": kind, "HALF": half, "ANGLE": angle}


def variants(target: str) -> Iterator[Variant]:
    """The kernel variants that the launchers ask for on a target."""
    plan = importlib.import_module("comhe_ext.kernels.gpu.plan")
    large = importlib.import_module("comhe_ext.kernels.gpu.large_k")
    finish = importlib.import_module("comhe_ext.kernels.gpu.finish")
    project = importlib.import_module("comhe_ext.kernels.gpu.project_normalize")
    fast = {"FAST": target.startswith("sm")}

    def make(
        kernel: str, label: str, constants: dict[str, object], num_warps: int = 4, **rest: object
    ) -> Variant:
        options = dict(rest.pop("options", {}))  # type: ignore[call-overload]
        options["num_warps"] = num_warps
        module, _, name = kernel.partition(".")
        return Variant(
            module=module,
            kernel=name,
            target=target,
            label=label,
            constants=tuple(constants.items()),
            options=tuple(options.items()),
            **rest,  # type: ignore[arg-type]
        )

    shapes: dict[tuple[int, bool, Any], None] = {}
    for k, largest, angular in itertools.product(
        (16, 32, 64, 128), (1, plan.LARGE_SET), (False, True)
    ):
        shapes[k, angular, plan.tiles_for(target, k, largest, angular)] = None
    for (k, angular, tiles), (name, pair) in itertools.product(shapes, _pair_functions()):
        if pair["ANGLE"] != angular:
            continue
        # the fourth product of the cosine comes with few columns
        exact = [(4, 24)] if k == 32 else [(4, k)] if k < 32 else []
        if k >= 32:
            exact.append((3, 40 if k == 64 else k))
        products = [(k_real, force, (cos, 3)) for cos, k_real in exact for force in (True, False)]
        if name == "s=2":
            # the cheaper products differ in nothing that depends on the pair function
            k_real = exact[-1][1]
            cheaper = [(True, (3, 1)), (True, (1, 1)), (False, (1, 1))]
            products += [(k_real, force, terms) for force, terms in cheaper]
        for k_real, force, terms in products:
            yield make(
                "pairwise.pairwise_kernel",
                f"{name} {tiles.block_m}x{tiles.block_n}x{k} {terms[0]}+{terms[1] * force}",
                {
                    **pair,
                    **fast,
                    "WITH_FORCE": force,
                    "COSINE_TERMS": terms[0],
                    "FORCE_TERMS": terms[1],
                    "K": k_real,
                    "WIDTH": k,
                    "BLOCK_M": tiles.block_m,
                    "BLOCK_N": tiles.block_n,
                    "STAGES": tiles.num_stages,
                },
                tiles.num_warps,
                options={} if tiles.maxnreg is None else {"maxnreg": tiles.maxnreg},
                pairs=tiles.block_m * tiles.block_n,
                matrix=True,
                limit=MAX_INSTRUCTIONS
                if (target, k, name, force) == ("sm_90", 32, "s=2", True)
                else None,
            )
    # of the sweep's tiles the near-pair kernel knows only the sides
    sides = {
        (k, angular, tiles.block_m, tiles.block_n): None
        for k, angular, tiles in shapes
        if tiles.block_m < 128
    }
    for (k, angular, item_m, item_n), (name, pair), force in itertools.product(
        sides, _pair_functions(), (True, False)
    ):
        if pair["ANGLE"] != angular:
            continue
        yield make(
            "near_pairs.near_pairs_kernel",
            f"{name} {item_m}x{item_n}x{k}" + ("" if force else " energy"),
            {
                **pair,
                **fast,
                "WITH_FORCE": force,
                "COSINE_TERMS": 4 if k == 16 else 3,
                "WIDTH": k,
                "ITEM_M": item_m,
                "BLOCK_M": plan.NEAR_BLOCK,
                "BLOCK_N": plan.NEAR_BLOCK,
                "TILES_RATIO": item_n // plan.NEAR_BLOCK,
            },
            hot=False,
        )
    # the first and the last width of each tile shape
    widths = [(k, tiles) for k, tiles in plan.DIRECT_TILES.items() if k in (1, 4, 5, 8)]
    for (k, tiles), (name, pair), force in itertools.product(
        widths, _pair_functions(), (True, False)
    ):
        yield make(
            "direct.direct_kernel",
            f"{name} k={k}" + ("" if force else " energy"),
            {
                **pair,
                **fast,
                "WITH_FORCE": force,
                "K": k,
                "BLOCK_M": tiles.block_m,
                "BLOCK_N": tiles.block_n,
            },
            tiles.num_warps,
            pairs=tiles.block_m * tiles.block_n,
        )
    heights = sorted({tiles.block_m for _, _, tiles in shapes} | {large.ROW_TILE})
    for (name, pair), force in itertools.product(_pair_functions(), (True, False)):
        both = {**pair, **fast, "WITH_FORCE": force}
        for halves in (2, 1) if force else (1,):
            yield make(
                "large_k.coefficient_kernel",
                name + (f" {halves}" if force else " energy"),
                {
                    **both,
                    "FORCE_HALVES": halves,
                    "BLOCK_M": large.COEFFICIENT_ROWS,
                    "BLOCK_N": large.COEFFICIENT_COLS,
                },
                pairs=large.COEFFICIENT_ROWS * large.COEFFICIENT_COLS,
            )
        yield make(
            "large_k.near_block_kernel",
            name + ("" if force else " energy"),
            {
                **both,
                "BLOCK_M": plan.NEAR_BLOCK,
                "BLOCK_N": plan.NEAR_BLOCK,
                "BLOCK_K": large.NEAR_COLUMNS,
            },
            hot=False,
        )
        for block_m in heights:
            yield make(
                "finish.finish_kernel",
                f"{name} rows={block_m}" + ("" if force else " energy"),
                {
                    **pair,
                    **fast,
                    "WITH_FORCE": force,
                    "BLOCK_M": block_m,
                    "BLOCK_K": 2048 // block_m,
                },
                hot=False,
            )
    yield make("finish.total_kernel", "", {"BLOCK": finish.TOTAL_BLOCK}, hot=False)
    for points, (form, layout), block_m in itertools.product(
        ("*fp32", "*fp16", "*bf16"), LAYOUTS.items(), heights
    ):
        yield make(
            "project_normalize.normalize_kernel",
            f"{points[1:]} rows={block_m}{form}",
            {**layout, "BLOCK_M": block_m, "BLOCK_K": triton.next_power_of_2(layout["WIDTH"])},
            hot=False,
            points=points,
        )
    # every width with every height of its tiles
    projected = {(k, tiles.block_m): None for k, _, tiles in shapes}
    projected |= {(k, plan.DIRECT_TILES[k].block_m): None for k in (3, 8)}
    precisions = ("tf32x3", "tf32") if target.startswith("sm") else ("bf16x6", "bf16x3")
    for dtype, (k, block_m), precision in itertools.product(
        ("*fp32", "*bf16"), projected, precisions
    ):
        yield make(
            "project_normalize.project_normalize_kernel",
            f"{dtype[1:]} rows={block_m} k={k} {precision}",
            {
                "PRECISION": precision,
                "WIDTH": k,
                "COLUMNS": k <= plan.MAX_DIRECT,
                "WITH_REST": plan.MAX_DIRECT < k <= plan.MAX_WITH_REST,
                "BLOCK_M": block_m,
                "BLOCK_K": max(16, triton.next_power_of_2(k)),
                "BLOCK_D": project.PROJECTION_BLOCK_D,
            },
            project.projection_warps(block_m, k),
            matrix=True,
            points=dtype,
        )


def small(variant: Variant) -> bool:
    """Whether a variant belongs to the part that `make test` compiles."""
    constants = dict(variant.constants)
    default = (
        constants.get("KIND", 2) == 2 and not constants.get("HALF") and not constants.get("ANGLE")
    )
    full = constants.get("WITH_FORCE", True)
    if variant.kernel == "pairwise_kernel":
        return bool(default and constants["WIDTH"] == 32 and constants["FORCE_TERMS"] == 3 and full)
    if variant.kernel == "project_normalize_kernel":
        return (
            variant.target in ("sm_90", "gfx942")
            and re.match("fp32 rows=64 k=64 (tf32x3|bf16x6)", variant.label) is not None
        )
    if variant.kernel == "direct_kernel":
        return bool(default and constants["K"] == 4 and full)
    wanted = default and full and variant.target in ("sm_90", "gfx942")
    return bool(wanted and constants.get("WIDTH", 32) != 128 and variant.points == "*fp32")


def build(variant: Variant) -> triton.compiler.CompiledKernel:
    """Compile one variant, as a launch with 16-byte aligned arrays would."""
    module = importlib.import_module(f"comhe_ext.kernels.gpu.{variant.module}")
    kernel = getattr(module, variant.kernel)
    constants = dict(variant.constants)
    signature: dict[str, object] = {}
    attributes: dict[tuple[int, ...], object] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("weights", "matrices"):
            # launches take a tuple of pointers each
            pointer = variant.points if name == "weights" else "*fp32"
            signature[name] = (pointer,) * NUM_WEIGHTS
            attributes |= {(index, i): [["tt.divisibility", 16]] for i in range(NUM_WEIGHTS)}
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*fp32")
            if variant.kernel == "normalize_kernel" and name == "points_ptr":
                signature[name] = variant.points
            columns = constants.get("COLUMNS") or variant.kernel == "direct_kernel"
            if columns and name in ("hi_ptr", "lo_ptr", "rest_ptr"):
                signature[name] = "*fp32"
            attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if name in INTEGERS else "fp32"
            if name in ("packed_rows", "num_cols"):
                # multiples of the row tile
                attributes[index,] = [["tt.divisibility", 16]]
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=TARGETS[variant.target][0], options=dict(variant.options))


INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


def sass(kernel: triton.compiler.CompiledKernel) -> tuple[list[tuple[int, str, str]], int]:
    """Instructions (address, opcode, operands) of a cubin and its register count."""
    binary = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        run = [str(binary), cubin.name]
        text = subprocess.run([*run, "-sass"], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [*run, "-res-usage"], capture_output=True, text=True, check=True
        ).stdout
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return [(int(a, 16), op, rest) for a, op, rest in INSTRUCTION.findall(text)], int(registers[1])


def amdgcn(text: str) -> list[tuple[int, str, str]]:
    """Instructions of an assembly file as `sass` gives them, numbered; a branch's operand is the
    number that it jumps to.
    """
    code: list[tuple[int, str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line = line.partition(";")[0].strip()
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(
            r"([sv]_\w+|ds_\w+|buffer_\w+|global_\w+|scratch_\w+)(.*)", line
        ):
            code.append((len(code), instruction[1], instruction[2]))
    return [
        (i, "BRA", hex(labels[rest.strip()]))
        if op.startswith(("s_cbranch", "s_branch"))
        else (i, op, rest)
        for i, op, rest in code
    ]


def hot_loop(code: list[tuple[int, str, str]], matrix: str | None) -> tuple[int, int] | None:
    """Innermost loop that does the work: the shortest one with matrix instructions.

    The masked loop over the diagonal has them too, and is longer. Without matrix instructions a
    loop does the work if it is at least half as long as the longest.
    """
    loops = []
    for address, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        # a branch to itself is the trap at the end of every kernel
        if target is not None and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    if matrix is not None:
        inner = [a for a in inner if any(matrix in op for i, op, _ in code if a[0] <= i <= a[1])]
    else:
        longest = max((end - begin for begin, end in inner), default=0)
        inner = [a for a in inner if 2 * (a[1] - a[0]) >= longest]
    return min(inner, key=lambda a: a[1] - a[0], default=None)


def check(variant: Variant) -> Report:
    """Compile a variant and look at its machine code."""
    start = time.perf_counter()
    report = Report(variant)
    kernel = build(variant)
    wanted = TARGETS[variant.target][1]
    report.shared = kernel.metadata.shared
    nvidia = variant.target.startswith("sm")
    if nvidia:
        code, report.registers = sass(kernel)
        spill = ("LDL", "STL")
    else:
        text = kernel.asm["amdgcn"]
        code = amdgcn(text)
        registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
        report.registers = int(registers[1]) if registers else 0
        spill = ("scratch_load", "scratch_store")
    spilled = [address for address, op, _ in code if op.startswith(spill)]
    report.spills = len(spilled)
    found = any(wanted in op for _, op, _ in code)
    other = next((op.split(".")[0] for _, op, _ in code if "HMMA" in op), "-")
    loop = hot_loop(code, wanted if variant.matrix else None)
    if loop is not None:
        inside = [a for a, _, _ in code if loop[0] <= a <= loop[1]]
        report.spills_hot = sum(loop[0] <= a <= loop[1] for a in spilled)
        # the compiler restructures loops for sm_100, and without matrix instructions for gfx942:
        # a count of one of them says nothing
        countable = nvidia or variant.matrix
        if variant.pairs and countable and variant.target != "sm_100":
            threads = (32 if nvidia else 64) * int(str(dict(variant.options)["num_warps"]))
            report.per_pair = len(inside) * threads / variant.pairs
    elif variant.hot and variant.target != "sm_100":
        report.problems.append("no hot loop was found")
    report.matrix = wanted if found else other
    if variant.matrix and not found:
        report.problems.append(f"no {wanted} instruction")
    if variant.hot and report.spills_hot:
        report.problems.append(f"{report.spills_hot} spill instructions in the hot loop")
    if variant.limit is not None and report.per_pair is not None:
        if report.per_pair > variant.limit:
            report.problems.append(f"more than {variant.limit} instructions a pair")
    report.seconds = time.perf_counter() - start
    return report


def save(rows: list[dict[str, str]]) -> None:
    """Put rows in place of older ones of the same variants, and drop variants that are no more."""

    def key(row: dict[str, str]) -> tuple[str, str, str]:
        return row["target"], row["kernel"], row["variant"]

    known = {}
    if RESULTS.exists():
        with RESULTS.open() as file:
            known = {key(row): row for row in csv.DictReader(file)}
    known |= {key(row): row for row in rows}
    order = [(v.target, v.kernel, v.label) for target in TARGETS for v in variants(target)]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(known[name] for name in order if name in known)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few variants of every kernel")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--label", default="", help="only variants that match this expression")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    chosen = [
        variant
        for target in options.target or TARGETS
        for variant in variants(target)
        if options.kernel in variant.kernel
        and re.search(options.label, variant.label)
        and (small(variant) or not options.small)
    ]
    start = time.perf_counter()
    failed = 0
    rows: list[dict[str, str]] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for report in pool.map(check, chosen):
            failed += bool(report.problems)
            rows.append(report.row())
            print(report.line(), flush=True)
    print(
        f"triton {triton.__version__}: {len(chosen)} variants, {failed} failed, "
        f"{time.perf_counter() - start:.0f} s"
    )
    if rows and not options.small:
        save(rows)
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
