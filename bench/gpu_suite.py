"""Everything there is to know about the Triton backend on the GPU of this machine, in one command.

    python bench/gpu_suite.py                  all stages; goes on where an earlier run stopped
    python bench/gpu_suite.py --minutes 10     stops in time, a later run does the rest
    python bench/gpu_suite.py --fresh          forgets earlier results
    TRITON_INTERPRET=1 python bench/gpu_suite.py --dry-run     tiny sizes, no GPU

Stages: environment, tests, sanitizer, accuracy, speed beside peers, launches, memory, roofline.
Results go to bench/results/<gpu>.json after every single one. A stage that fails says so in the
file and in the exit status, and is tried again by the next run.
"""

import argparse
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
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from comhe_ext.kernels import gpu
from comhe_ext.potentials import Potential
from comhe_ext.testing import (
    exact_energy_and_gradient,
    paired_rows,
    random_rows,
    relative_error,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
Result = dict[str, Any]

# rows of the goals: name, sizes of the sets, k, half space, microseconds to reach
SPEED = [
    ("1 x 1024 x 32", [1024], 32, False, None),
    ("1 x 4096 x 32", [4096], 32, False, None),
    ("1 x 16384 x 32", [16384], 32, False, 250.0),
    ("20 x 4096 x 32", [4096] * 20, 32, False, 300.0),
    ("ResNet-50, C = 20, k = 40, half space", "resnet50", 40, True, None),
    ("1 x 131072 x 64", [131072], 64, False, 22_000.0),
    ("1 x 1000000 x 64", [1_000_000], 64, False, 2_000_000.0),
    ("1 x 16384 x 3", [16384], 3, False, None),
    ("1 x 16384 x 4096", [16384], 4096, False, None),
]
TINY = [
    ("1 x 70 x 32", [70], 32, False, None),
    ("2 x 40 x 20, half space", [40, 40], 20, True, None),
    ("1 x 70 x 3", [70], 3, False, None),
    ("1 x 40 x 140", [40], 140, False, None),
]
# SXM H100 and H200: 132 processors, fp16 products with float32 sums of one processor in a clock
PRODUCTS_PER_CLOCK = 2048
INSTRUCTIONS_PER_CLOCK = 128  # threads' instructions
INSTRUCTIONS_PER_PAIR = {16: 12.7, 32: 13.2, 64: 14.2, 128: 23.8}  # bench/compile_gpu.py, s = 2


def resnet50_widths() -> list[int]:
    """Filters of the 53 convolutions and the rows of the head of a ResNet-50."""
    widths = [64]
    for blocks, inner in ((3, 64), (4, 128), (6, 256), (3, 512)):
        widths.append(4 * inner)
        widths += [inner, inner, 4 * inner] * blocks
    return [*widths, 1000]


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

    def time(self, call: Callable[[], object], least: float = 0.5) -> float:
        """Median microseconds of a call, by events on the GPU; the cache is not flushed."""
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
    pair = Potential(2.0, half_space)
    scales = [pair.scale(n, "mean") for n in sizes]
    return gpu.sweep(points, sizes, scales, pair, 0.0, with_gradient)


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
            "clock_mhz": torch.cuda.clock_rate(),
            "runtime": torch.version.cuda or torch.version.hip,
        }
    return result


def run_tests(suite: Suite, which: list[str]) -> Result:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *which],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
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
        "for n, k in ((200, 3), (333, 40), (200, 200)) for half in (False, True)]"
    )
    run = subprocess.run(
        [binary, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # its allocator would hide writes beyond the end of a tensor
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    if run.returncode:
        raise RuntimeError(run.stdout[-1800:] + run.stderr[-200:])
    return {"summary": run.stdout.strip().splitlines()[-1]}


def accuracy(suite: Suite, n: int, k: int, angle: float | None, half_space: bool) -> Result:
    if angle is None:
        points, bound = random_rows(n, k, device=suite.device), 2e-6
    else:
        points = paired_rows(n, k, angle, antipodal=half_space, device=suite.device)
        bound = 1e-5
    expected, expected_gradient = exact_energy_and_gradient(
        points, 2.0, half_space=half_space, min_distance=0.0
    )
    pair = Potential(2.0, half_space, False, 0.0)
    energy, gradient = gpu.sweep(points, [n], [pair.scale(n, "mean")], pair, 0.0, True)
    assert gradient is not None
    errors = {
        "energy_error": relative_error(energy[0], expected),
        "gradient_error": relative_error(gradient, expected_gradient),
    }
    if not (errors["energy_error"] <= 1e-6 and errors["gradient_error"] <= bound):
        raise AssertionError(f"beyond 1e-6 and {bound}: {errors}")
    return errors


def speed(suite: Suite, sizes: list[int], k: int, half_space: bool, goal: float | None) -> Result:
    points = torch.randn(sum(sizes), k, device=suite.device)
    result: Result = {
        "us": suite.time(lambda: sweep(points, sizes, half_space)),
        "us_energy_only": suite.time(lambda: sweep(points, sizes, half_space, False)),
        "goal_us": goal,
    }
    pairs = sum(n * n for n in sizes)
    width = max(16, triton.next_power_of_2(k))
    if not suite.dry and width in INSTRUCTIONS_PER_PAIR and k > 8 and torch.version.hip is None:
        clocks = torch.cuda.get_device_properties(0).multi_processor_count * torch.cuda.clock_rate()
        issue = pairs * INSTRUCTIONS_PER_PAIR[width] / INSTRUCTIONS_PER_CLOCK / clocks
        matrix = pairs * 6 * width / PRODUCTS_PER_CLOCK / clocks
        result["bound_us"] = max(issue, matrix)
        result["share_of_bound"] = result["bound_us"] / result["us"]
    dense = 16 * sum(n * n for n in sizes) * (4 if half_space else 1)
    room = 2**30 if suite.dry else torch.cuda.mem_get_info()[0]
    if dense < room:
        result["naive_us"] = suite.time(lambda: backward(naive, points, sizes, half_space))
        if not suite.dry and len(sizes) == 1:
            compiled = torch.compile(naive)
            result["compiled_us"] = suite.time(
                lambda: backward(compiled, points, sizes, half_space)
            )
    else:
        result["naive_us"] = None  # would need more memory than there is
    try:
        import pykeops  # noqa: F401
    except ImportError:
        result["keops_us"] = None
    else:
        if len(sizes) == 1 and not half_space and pairs < 1e11:
            result["keops_us"] = suite.time(lambda: backward(keops, points, sizes, half_space))
    for peer in ("naive", "compiled", "keops"):
        if result.get(f"{peer}_us"):
            result[f"times_{peer}"] = result[f"{peer}_us"] / result["us"]
    if goal is not None and result["us"] > goal:
        result["missed"] = f"{result['us'] / goal:.2f} times the goal"
    return result


def launches(suite: Suite) -> Result:
    sizes = [20, 33] if suite.dry else resnet50_widths() * 20
    points = torch.randn(sum(sizes), 40, device=suite.device)
    sweep(points, sizes, True)
    if suite.dry:
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sweep(points, sizes, True)
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
        suite.do("tests: gpu", lambda: run_tests(suite, ["tests/test_gpu.py"]))
    cases = SPEED if not suite.dry else TINY
    for n, k in (
        ((40, 20), (70, 3)) if suite.dry else ((1000, 30), (4096, 30), (16384, 32), (16384, 256))
    ):
        for half_space in (False, True):
            for angle in (None, 1e-2, 1e-3, 1e-4):
                name = f"accuracy {n} x {k}, half space {half_space}, angle {angle}"
                suite.do(
                    name,
                    lambda n=n, k=k, a=angle, h=half_space: accuracy(suite, n, k, a, h),  # type: ignore[misc]
                )
    for name, sizes, k, half_space, goal in cases:
        widths = resnet50_widths() * 20 if isinstance(sizes, str) else sizes
        suite.do(
            f"speed {name}",
            lambda w=widths, k=k, h=half_space, g=goal: speed(suite, w, k, h, g),  # type: ignore[misc]
        )
    suite.do("launches", lambda: launches(suite))
    for n, k in ((70, 20),) if suite.dry else ((16384, 30), (131072, 64), (16384, 1024)):
        suite.do(f"memory {n} x {k}", lambda n=n, k=k: memory(suite, n, k))  # type: ignore[misc]
    if not suite.dry:
        for tool in ("memcheck", "racecheck"):
            suite.do(f"sanitizer {tool}", lambda tool=tool: sanitize(suite, tool))  # type: ignore[misc]
        suite.do(
            "tests: all", lambda: run_tests(suite, ["tests", "--deselect", "tests/test_gpu.py"])
        )
    print(f"{suite.file}: {suite.failed} failed, {suite.left} left for the next run")
    return 1 if suite.failed or suite.left else 0


if __name__ == "__main__":
    sys.exit(main())
