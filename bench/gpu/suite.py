"""Everything there is to know about the Triton backend on the GPU of this machine, in one command.

    python -m bench.gpu.suite                  all stages; goes on where an earlier run stopped
    python -m bench.gpu.suite --minutes 10     stops in time, a later run does the rest
    python -m bench.gpu.suite --only "speed|memory"
    python -m bench.gpu.suite --fresh          forgets earlier results
    TRITON_INTERPRET=1 python -m bench.gpu.suite     a dry run: tiny sizes, no GPU

Stages: environment, speed beside peers and beside the bound of the machine, launches, tests of
what only a GPU shows (graphs, streams, addresses above 2^31, ...), accuracy, memory, sanitizer, all
other tests, and last the benchmark of all methods, whose rows go where `python -m bench` keeps
them. Results go to bench/results/<gpu>.json after every single stage. A stage that fails says so in
the file and in the exit status, and is tried again by the next run; one that runs into the limit is
left to it: two runs of ten minutes see the most of it.
"""

import argparse
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton

from bench import RESULTS, ROOT
from bench.gpu import speed
from bench.gpu.speed import DEVICE, DRY, Result
from comhe_ext.kernels import gpu
from comhe_ext.kernels.pair_functions import Riesz
from comhe_ext.kernels.sweep import SweepRequest
from comhe_ext.testing import (
    exact_energy_and_gradient,
    paired_rows,
    random_rows,
    relative_error,
)

ACCURACY = (
    *((n, k) for n in (1000, 4096, 16384) for k in (3, 9, 16, 30, 64, 128)),
    (16384, 256),
)


class Suite:
    """Runs stages one result at a time and keeps what it has in a file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.deadline = time.monotonic() + 60.0 * options.minutes
        self.only = re.compile(options.only)
        name = "dry-run" if DRY else torch.cuda.get_device_name()
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
        if self.results.get(name, {}).get("ok") or not self.only.search(name):
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


def environment() -> Result:
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
    if not DRY:
        properties = torch.cuda.get_device_properties(0)
        result |= {
            "gpu": properties.name,
            "processors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "clock_mhz": speed.clock_mhz(),
            "runtime": torch.version.cuda or torch.version.hip,
        }
    return result


def run_tests(suite: Suite, which: str) -> Result:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "8", "-m", "not long", which],
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
        "from bench.gpu import speed; from comhe_ext.testing import paired_rows; "
        "[speed.sweep(paired_rows(n, k, 1e-3, device='cuda'), [n - 65, 65], half) "
        "for n, k in ((200, 3), (333, 12), (333, 40), (200, 200)) for half in (False, True)]; "
        "speed.projected(*speed.layers([(70, 50), (33, 27), (9, 20)], 2, 40), 40)"
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


def accuracy(n: int, k: int, angle: float | None, half_space: bool) -> Result:
    if angle is None:
        points, bound = random_rows(n, k, device=DEVICE), 2e-6
    else:
        points = paired_rows(n, k, angle, antipodal=half_space, device=DEVICE)
        bound = 1e-5
    expected, expected_gradient = exact_energy_and_gradient(
        points, 2.0, half_space=half_space, min_distance=0.0
    )
    pair = Riesz(2.0, min_distance=0.0, half_space=half_space)
    energy, gradient, *_ = gpu.sweep(SweepRequest(points, [n], [pair.scale(n, "mean")], pair))
    assert gradient is not None
    errors = {
        "energy_error": relative_error(energy[0], expected),
        "gradient_error": relative_error(gradient, expected_gradient),
    }
    if not (errors["energy_error"] <= 1e-6 and errors["gradient_error"] <= bound):
        raise AssertionError(f"beyond 1e-6 and {bound}: {errors}")
    return errors


def memory(n: int, k: int) -> Result:
    points = random_rows(n, k, device=DEVICE)
    speed.sweep(points, [n])
    if DRY:
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    speed.sweep(points, [n])
    used = torch.cuda.max_memory_allocated() - before
    result = {"bytes": used, "times_the_points": used / (4 * n * k)}
    if used > max(8 * 4 * n * k, 8 << 20):
        raise AssertionError(f"more than 8 times the points: {result}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="start no stage after so long")
    parser.add_argument("--only", default="", metavar="REGEX", help="stages with this in the name")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--results", default=str(RESULTS), help="folder of the result files")
    options = parser.parse_args()
    reason = gpu.unavailable()
    if reason is not None:
        print(f"backend 'triton': {reason}")
        return 2
    suite = Suite(options)
    suite.do("environment", environment)
    for case in speed.TINY if DRY else speed.CASES:
        suite.do(f"speed {case}", partial(speed.speed, case))
    suite.do("speed ResNet-50, C = 20, k = 40, half space", speed.speed_projected)
    suite.do("launches", speed.launches)
    if not DRY:
        suite.do("tests: test_gpu.py", lambda: run_tests(suite, "tests/kernels/test_gpu.py"))
    sizes = ((40, 20), (70, 3)) if DRY else ACCURACY
    for (n, k), half_space, angle in itertools.product(
        sizes, (False, True), (None, 1e-2, 1e-3, 1e-4)
    ):
        suite.do(
            f"accuracy {n} x {k}, half space {half_space}, angle {angle}",
            partial(accuracy, n, k, angle, half_space),
        )
    for n, k in ((70, 20),) if DRY else ((16384, 30), (131072, 64), (16384, 1024)):
        suite.do(f"memory {n} x {k}", partial(memory, n, k))
    if not DRY:
        for tool in ("memcheck", "racecheck"):
            suite.do(f"sanitizer {tool}", partial(sanitize, suite, tool))
        for file in sorted((ROOT / "tests").rglob("test_*.py")):
            # the interpreter has nothing to say about a GPU
            if file.name not in ("test_gpu.py", "test_triton_interpreter.py"):
                path = str(file.relative_to(ROOT))
                suite.do(f"tests: {file.name}", partial(run_tests, suite, path))
        shapes = ("goals", "small", "layers", "scaling")
        suite.do("benchmark sweep", lambda: benchmark(suite, "sweep", "--cases", *shapes))
        suite.do("benchmark accuracy", lambda: benchmark(suite, "accuracy"))
        suite.do("benchmark model", lambda: benchmark(suite, "model"))
    print(f"{suite.file}: {suite.failed} failed, {suite.left} left for the next run")
    return 1 if suite.failed or suite.left else 0


if __name__ == "__main__":
    sys.exit(main())
