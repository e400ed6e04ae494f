"""Everything there is to know about the Triton backend on the GPU of this machine, in one command.

    python bench/gpu_suite.py                  all stages; goes on where an earlier run stopped
    python bench/gpu_suite.py --minutes 10     stops in time, a later run does the rest
    python bench/gpu_suite.py --fresh          forgets earlier results
    TRITON_INTERPRET=1 python bench/gpu_suite.py --dry-run     tiny sizes, no GPU

Stages: environment, tests of what only a GPU shows (graphs, streams, addresses above 2^31, ...),
accuracy, speed beside peers and beside the bound of the machine, launches, memory, sanitizer, all
other tests, and last the benchmark of all methods, whose rows go where `python -m bench` keeps
them. Results go to bench/results/<gpu>.json after every single stage. A stage that fails says so in
the file and in the exit status, and is tried again by the next run; one that runs into the limit is
left to it: two runs of ten minutes see the most of it.
"""

import argparse
import csv
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from comhe_ext.kernels import gpu
from comhe_ext.kernels.gpu import backend, plan
from comhe_ext.kernels.pair_functions import Riesz
from comhe_ext.kernels.sweep import Projected, SweepRequest
from comhe_ext.testing import (
    exact_energy_and_gradient,
    paired_rows,
    random_rows,
    relative_error,
)
from comhe_ext.testing.architectures import neuron_shapes, resnet50

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
Result = dict[str, Any]

# rows of the goals: sizes of the sets, k, half space, microseconds to reach
SPEED: list[tuple[list[int], int, bool, float | None]] = [
    ([1024], 32, False, None),
    ([4096], 32, False, None),
    ([16384], 32, False, 250.0),
    ([16384], 32, True, None),
    ([4096] * 20, 32, False, 300.0),
    ([131072], 64, False, 22_000.0),
    ([1_000_000], 64, False, 2_000_000.0),
    ([16384], 3, False, None),
    ([16384], 9, False, None),
    ([16384], 4096, False, None),
]
ACCURACY = (
    *((n, k) for n in (1000, 4096, 16384) for k in (3, 9, 16, 30, 64, 128)),
    (16384, 256),
)
TINY: list[tuple[list[int], int, bool, float | None]] = [
    ([70], 32, False, None),
    ([40] * 2, 20, True, None),
    ([70], 3, False, None),
    ([40], 140, False, None),
]
# what one processor of an SXM H100 or H200 does in a clock: fp16 products with float32 sums, and
# instructions of a thread
PRODUCTS_PER_CLOCK = 2048
INSTRUCTIONS_PER_CLOCK = 128


class Suite:
    """Runs stages one result at a time and keeps what it has in a file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.dry = options.dry_run
        self.deadline = time.monotonic() + 60.0 * options.minutes
        self.device = "cpu" if self.dry else "cuda"
        name = "dry-run" if self.dry else torch.cuda.get_device_name()
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        folder = Path(options.results)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"gpu-{slug}.json"
        self.results: dict[str, Result] = {}
        if self.file.exists() and not options.fresh:
            self.results = json.loads(self.file.read_text())
        self.failed = self.left = 0

    def do(self, name: str, stage: Callable[[], Result]) -> None:
        """Run a stage unless an earlier run has its result; never lose what came before."""
        if self.results.get(name, {}).get("ok"):
            return
        if time.monotonic() > self.deadline:
            self.left += 1
            return
        start = time.monotonic()
        try:
            result = {"ok": True, **stage()}
        except subprocess.TimeoutExpired:
            self.left += 1
            return
        except Exception as error:  # a failed stage is a result too
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        result["seconds"] = round(time.monotonic() - start, 2)
        self.failed += not result["ok"]
        self.results[name] = result
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1) + "\n")
        part.replace(self.file)
        shown = {key: value for key, value in result.items() if key != "output"}
        print(f"{'ok  ' if result['ok'] else 'FAIL'} {name}: {json.dumps(shown)}", flush=True)

    def seconds_left(self) -> float:
        return max(self.deadline - time.monotonic(), 30.0)

    def time_graph(self, call: Callable[[], object]) -> float | None:
        """Median microseconds of a call on the GPU alone: replayed from a CUDA graph."""
        if self.dry:
            return None
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()
        result = self.time(graph.replay)
        del kept
        return result

    def time(self, call: Callable[[], object], least: float = 0.5) -> float:
        """Median microseconds of a call, by events on the GPU, launches included; the cache is not
        flushed.
        """
        call()
        if self.dry:
            start = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - start)
        torch.cuda.synchronize()
        times: list[float] = []
        stop = time.monotonic() + least
        while len(times) < 5 or (time.monotonic() < stop and len(times) < 200):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end))
        return statistics.median(times)


def sweep(
    points: Tensor, sizes: list[int], half_space: bool = False, with_gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    pair = Riesz(2.0, half_space=half_space)
    scales = [pair.scale(n, "mean") for n in sizes]
    result = gpu.sweep(SweepRequest(points, sizes, scales, pair, gradient=with_gradient))
    return result.energy, result.gradient


def naive(points: Tensor, sizes: list[int], half_space: bool) -> Tensor:
    """What people write: the dense formula, differentiated by autograd."""
    energies = []
    for rows in points.split(sizes):
        u = torch.nn.functional.normalize(rows)
        if half_space:
            u = torch.cat([u, -u])
        r2 = 2.0 - 2.0 * u @ u.mT
        i = torch.arange(len(u), device=u.device)
        energies.append(r2.index_put((i, i), r2.new_tensor(torch.inf)).reciprocal().mean())
    return torch.stack(energies).sum()


def backward(loss: Callable[..., Tensor], points: Tensor, *rest: object) -> None:
    points = points.detach().requires_grad_()
    torch.autograd.grad(loss(points, *rest), points)


def keops(points: Tensor, sizes: list[int], half_space: bool) -> Tensor:
    from pykeops.torch import LazyTensor

    u = torch.nn.functional.normalize(points)
    i, j = LazyTensor(u[:, None, :]), LazyTensor(u[None, :, :])
    a = LazyTensor(torch.arange(len(u), device=u.device, dtype=u.dtype)[:, None, None])
    b = LazyTensor(torch.arange(len(u), device=u.device, dtype=u.dtype)[None, :, None])
    same = (0.5 - (a - b).abs()).step()
    return ((1.0 - same) / (((i - j) ** 2).sum(-1) + same)).sum(1).sum()


def environment(suite: Suite) -> Result:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    result: Result = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if not suite.dry:
        properties = torch.cuda.get_device_properties(0)
        result |= {
            "gpu": properties.name,
            "processors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "clock_mhz": clock_mhz(),
            "runtime": torch.version.cuda or torch.version.hip,
        }
    return result


def clock_mhz() -> float | None:
    """The most the processors can run at; torch would ask for a package of NVIDIA's to tell."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return float(answer) if answer.isdigit() else None


def run_tests(suite: Suite, which: str) -> Result:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not long", "-p", "no:cacheprovider", which],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=suite.seconds_left(),
    )
    if run.returncode == 5:
        return {"summary": "no test"}
    last = run.stdout.strip().splitlines()[-1:] or [run.stderr[-300:]]
    if run.returncode:
        raise RuntimeError(run.stdout[-1800:] + run.stderr[-200:])
    return {"summary": last[0]}


def sanitize(suite: Suite, tool: str) -> Result:
    binary = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(binary).exists():
        raise RuntimeError("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    code = (
        "import sys; sys.path.insert(0, 'bench'); import gpu_suite as g; "
        "[g.sweep(g.paired_rows(n, k, 1e-3, device='cuda'), [n - 65, 65], half) "
        "for n, k in ((200, 3), (333, 12), (333, 40), (200, 200)) for half in (False, True)]; "
        "g.projected(*g.layers([(70, 50), (33, 27), (9, 20)], 2, 40, 'cuda'), 40)"
    )
    run = subprocess.run(
        [binary, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=suite.seconds_left(),
        # its allocator would hide writes beyond the end of a tensor
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    if run.returncode:
        raise RuntimeError(run.stdout[-1800:] + run.stderr[-200:])
    return {"summary": run.stdout.strip().splitlines()[-1]}


def benchmark(suite: Suite, command: str, *arguments: str) -> Result:
    """A part of `python -m bench`, which keeps its own results, in the time that is left."""
    minutes = f"{suite.seconds_left() / 60.0:.1f}"
    line = [sys.executable, "-m", "bench", command, *arguments, "--device", "cuda"]
    run = subprocess.run([*line, "--budget-minutes", minutes, "--resume"], cwd=ROOT)
    if run.returncode == 3:
        raise subprocess.TimeoutExpired(line, suite.seconds_left())
    if run.returncode:
        raise RuntimeError(f"exit status {run.returncode}")
    return {}


def accuracy(suite: Suite, n: int, k: int, angle: float | None, half_space: bool) -> Result:
    if angle is None:
        points, bound = random_rows(n, k, device=suite.device), 2e-6
    else:
        points = paired_rows(n, k, angle, antipodal=half_space, device=suite.device)
        bound = 1e-5
    expected, expected_gradient = exact_energy_and_gradient(
        points, 2.0, half_space=half_space, min_distance=0.0
    )
    pair = Riesz(2.0, 0.0, half_space=half_space)
    energy, gradient, *_ = gpu.sweep(SweepRequest(points, [n], [pair.scale(n, "mean")], pair))
    assert gradient is not None
    errors = {
        "energy_error": relative_error(energy[0], expected),
        "gradient_error": relative_error(gradient, expected_gradient),
    }
    if not (errors["energy_error"] <= 1e-6 and errors["gradient_error"] <= bound):
        raise AssertionError(f"beyond 1e-6 and {bound}: {errors}")
    return errors


def layers(
    shapes: list[tuple[int, int]], count: int, k: int, device: str
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Random weights, and matrices for those that are wider than k."""
    weights = [torch.randn(n, d, device=device) for n, d in shapes]
    matrices = [torch.randn(count, k, d, device=device) if d > k else None for _, d in shapes]
    return weights, matrices


def projected(
    weights: list[Tensor], matrices: list[Tensor | None], k: int
) -> tuple[Tensor, Tensor | None]:
    pair = Riesz(2.0, half_space=True)
    sizes = [
        w.shape[0]
        for w, m in zip(weights, matrices, strict=True)
        for _ in range(1 if m is None else m.shape[0])
    ]
    scales = [pair.scale(n, "mean") for n in sizes]
    result = gpu.sweep(SweepRequest(Projected(weights, matrices), sizes, scales, pair))
    return result.energy, result.gradient


def bound_us(sizes: list[int], k: int, half_space: bool) -> float | None:
    """The time that instructions or products alone take on this GPU; None where it is not known.

    Instructions a pair are those that `bench.gpu.compile` counted.
    """
    clock = clock_mhz()
    table = RESULTS / "compile_gpu.csv"
    if clock is None or not plan.MAX_DIRECT < k <= plan.MAX_WIDTH or not table.exists():
        return None
    target, width = backend.target_of(torch.device("cuda")), plan.row_width(k)
    tiles = plan.tiles_for(target, k, max(sizes), False)
    cosine_terms = 4 if k <= plan.MAX_WITH_REST else 3
    name = "s=2 half" if half_space else "s=2"
    variant = f"{name} {tiles.block_m}x{tiles.block_n}x{width} {cosine_terms}+3"
    with table.open() as file:
        counts = [
            row["instructions_per_pair"]
            for row in csv.DictReader(file)
            if (row["target"], row["kernel"], row["variant"])
            == (target, "pairwise_kernel", variant)
        ]
    if not counts or not counts[0]:
        return None
    clocks = torch.cuda.get_device_properties(0).multi_processor_count * clock
    pairs = sum(n * n for n in sizes)
    issue = pairs * float(counts[0]) / INSTRUCTIONS_PER_CLOCK / clocks
    return max(issue, pairs * (cosine_terms + 3) * width / PRODUCTS_PER_CLOCK / clocks)


def speed(suite: Suite, sizes: list[int], k: int, half_space: bool, goal: float | None) -> Result:
    points = torch.randn(sum(sizes), k, device=suite.device)
    result: Result = {
        "us": suite.time(lambda: sweep(points, sizes, half_space)),
        "us_graph": suite.time_graph(lambda: sweep(points, sizes, half_space)),
        "us_energy_only": suite.time(lambda: sweep(points, sizes, half_space, False)),
        "goal_us": goal,
    }
    bound = bound_us(sizes, k, half_space)
    if bound is not None and result["us_graph"] is not None:
        result["bound_us"] = bound
        result["share_of_bound"] = bound / result["us_graph"]
    pairs = sum(n * n for n in sizes)
    # autograd holds about six matrices of each set
    dense = 24 * pairs * (4 if half_space else 1)
    room = 2**30 if suite.dry else torch.cuda.mem_get_info()[0]
    result["naive_us"] = None  # would need more memory than there is
    if dense < room:
        result["naive_us"] = suite.time(lambda: backward(naive, points, sizes, half_space))
        if not suite.dry and len(sizes) == 1:
            compiled = torch.compile(naive)
            result["compiled_us"] = suite.time(
                lambda: backward(compiled, points, sizes, half_space)
            )
    result["keops_us"] = None
    try:
        import pykeops  # noqa: F401
    except ImportError:
        pass
    else:
        if len(sizes) == 1 and not half_space and pairs < 1e11:
            result["keops_us"] = suite.time(lambda: backward(keops, points, sizes, half_space))
    for peer in ("naive", "compiled", "keops"):
        if result.get(f"{peer}_us"):
            result[f"times_{peer}"] = result[f"{peer}_us"] / result["us"]
    if goal is not None and result["us"] > goal:
        result["missed"] = f"{result['us'] / goal:.2f} times the goal"
    return result


def speed_projected(suite: Suite) -> Result:
    """The hidden layers of a ResNet-50 with C = 20 matrices to k = 40, and the backward GEMMs."""
    shapes, count = ([(20, 50), (7, 30)], 2) if suite.dry else (neuron_shapes(resnet50), 20)
    weights, matrices = layers(shapes, count, 40, suite.device)

    def backward_gemms() -> None:
        _, gradient = projected(weights, matrices, 40)
        assert gradient is not None
        first = 0
        for weight, matrix in zip(weights, matrices, strict=True):
            sets = 1 if matrix is None else matrix.shape[0]
            part = gradient[first : first + sets * len(weight)]
            first += sets * len(weight)
            if matrix is not None:
                part = part.view(sets, len(weight), 40).transpose(0, 1).reshape(len(weight), -1)
                part @ matrix.flatten(0, 1)

    return {
        "us": suite.time(lambda: projected(weights, matrices, 40)),
        "us_graph": suite.time_graph(lambda: projected(weights, matrices, 40)),
        "us_with_backward": suite.time(backward_gemms),
    }


def launches(suite: Suite) -> Result:
    """A ResNet-50 in at most five launches, copies counted too."""
    weights, matrices = layers(
        [(20, 50), (7, 30)] if suite.dry else neuron_shapes(resnet50), 2, 40, suite.device
    )
    projected(weights, matrices, 40)
    if suite.dry:
        return {}
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        projected(weights, matrices, 40)
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type.name == "CUDA"]
    if not 0 < len(events) <= 5:
        raise AssertionError(f"{len(events)} launches: {[e.name for e in events]}")
    return {"kernels_us": {e.name: e.device_time_total for e in events}}


def memory(suite: Suite, n: int, k: int) -> Result:
    points = random_rows(n, k, device=suite.device)
    sweep(points, [n])
    if suite.dry:
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sweep(points, [n])
    used = torch.cuda.max_memory_allocated() - before
    result = {"bytes": used, "times_the_points": used / (4 * n * k)}
    if used > max(8 * 4 * n * k, 8 << 20):
        raise AssertionError(f"more than 8 times the points: {result}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="start no stage after so long")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, in the interpreter")
    parser.add_argument("--results", default=str(RESULTS), help="folder of the result files")
    options = parser.parse_args()
    reason = gpu.unavailable()
    if reason is not None:
        print(f"backend 'triton': {reason}")
        return 2
    suite = Suite(options)
    suite.do("environment", lambda: environment(suite))
    if not suite.dry:
        suite.do("tests: test_gpu.py", lambda: run_tests(suite, "tests/kernels/test_gpu.py"))
    sizes = ((40, 20), (70, 3)) if suite.dry else ACCURACY
    for (n, k), half_space, angle in itertools.product(
        sizes, (False, True), (None, 1e-2, 1e-3, 1e-4)
    ):
        suite.do(
            f"accuracy {n} x {k}, half space {half_space}, angle {angle}",
            partial(accuracy, suite, n, k, angle, half_space),
        )
    for widths, k, half_space, goal in TINY if suite.dry else SPEED:
        name = f"speed {len(widths)} x {widths[0]} x {k}" + (", half space" if half_space else "")
        suite.do(name, partial(speed, suite, widths, k, half_space, goal))
    suite.do("speed ResNet-50, C = 20, k = 40, half space", lambda: speed_projected(suite))
    suite.do("launches", lambda: launches(suite))
    for n, k in ((70, 20),) if suite.dry else ((16384, 30), (131072, 64), (16384, 1024)):
        suite.do(f"memory {n} x {k}", partial(memory, suite, n, k))
    if not suite.dry:
        for tool in ("memcheck", "racecheck"):
            suite.do(f"sanitizer {tool}", partial(sanitize, suite, tool))
        for file in sorted((ROOT / "tests").rglob("test_*.py")):
            if file.name != "test_gpu.py":
                path = str(file.relative_to(ROOT))
                suite.do(f"tests: {file.name}", partial(run_tests, suite, path))
        suite.do(
            "benchmark sweep",
            lambda: benchmark(
                suite, "sweep", "--shapes", "goals", "small", "layers", "scaling", "wide"
            ),
        )
        suite.do("benchmark accuracy", lambda: benchmark(suite, "accuracy"))
        suite.do("benchmark model", lambda: benchmark(suite, "model"))
    print(f"{suite.file}: {suite.failed} failed, {suite.left} left for the next run")
    return 1 if suite.failed or suite.left else 0


if __name__ == "__main__":
    sys.exit(main())
