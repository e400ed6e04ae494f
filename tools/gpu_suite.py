"""Everything there is to know about the Triton backend on the GPU of this machine, in one command.

    python -m tools.gpu_suite --minutes 10     stops in time, a later run does the rest
    python -m tools.gpu_suite --only "speed|tests" --fresh     forgets earlier results
    TRITON_INTERPRET=1 python -m tools.gpu_suite     a dry run, no GPU needed

Stages: speed at the main shapes, by replay of CUDA graphs too, with errors and memory; tests of
what only a GPU shows (graphs, streams, addresses above 2^31, ...); sanitizer; all other tests; and
last the benchmark of all methods. Its rows go where `python -m bench` keeps them, what came of each
stage to bench/results/gpu-<name>.json. A stage that fails says so there and in the exit status, and
is tried again by the next run; one that runs into the limit is left to it.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import RESULTS, ROOT
from bench.measure import machine
from bench.measure.study import LEFT_OVER
from comhe_ext.kernels import gpu
from comhe_ext.kernels.gpu import backend

DRY = backend.interpreted()
# without the interpreter's tests, which have nothing to say about a GPU
FILES = sorted(
    {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    - {"tests/kernels/test_gpu.py", "tests/kernels/test_triton_interpreter.py"}
)
SANITIZED = "test_near_pairs and 2.5 or test_cross_sets or test_nearest_rows or test_two_spaces"
# what `python -m bench` says of a method that was not timed
FAILED = re.compile(r"comhe-(triton|graph)\s+(?!ok)[a-z]")


def stages(results: Path) -> dict[str, list[str]]:
    """List the command of each stage; those of the benchmark resume by themselves."""
    bench, pytest = [sys.executable, "-m", "bench"], [sys.executable, "-m", "pytest", "-q"]
    of_gpu = {"tests of what only a GPU shows": [*pytest, "tests/kernels/test_gpu.py"]}
    if DRY:  # these tests are skipped
        return of_gpu
    cuda = ["--device", "cuda", "--resume", f"--out={results}"]
    found = {"speed": [*bench, "sweep", *cuda, "--cases", "main", "modes"], **of_gpu}
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in ("memcheck", "racecheck"):
        options = [f"--tool={tool}", "--error-exitcode=9", *pytest, "tests/kernels/test_gpu.py"]
        found[f"sanitizer {tool}"] = [sanitizer, *options, "-k", SANITIZED]
    found |= {f"tests {file}": [*pytest, "-n", "8", "-m", "not long", file] for file in FILES}
    return found | {f"bench {x}": [*bench, x, *cuda] for x in ("sweep", "accuracy", "model")}


def run(name: str, command: list[str], seconds: float) -> dict[str, object] | None:
    """Run a stage, and say what came of it; None if its time was up."""
    start, benchmark = time.monotonic(), name.startswith(("speed", "bench"))
    if benchmark:
        command = [*command, f"--budget-minutes={seconds / 60.0:.1f}"]
    # torch's allocator would hide writes beyond the end of a tensor
    extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name.startswith("sanitizer") else {}
    environment = {**os.environ, **extra}
    try:
        options: dict[str, Any] = {"cwd": ROOT, "env": environment, "timeout": seconds + 60.0}
        done = subprocess.run(command, capture_output=True, text=True, **options)
    except subprocess.TimeoutExpired:
        return None
    except OSError as error:  # the sanitizer comes with the CUDA toolkit
        return {"ok": False, "seconds": 0.0, "output": str(error)}
    if benchmark and done.returncode == LEFT_OVER:
        return None
    no_test = name.startswith("tests") and done.returncode == 5
    ok = (done.returncode == 0 or no_test) and not (benchmark and FAILED.search(done.stdout))
    seconds = round(time.monotonic() - start, 1)
    return {"ok": ok, "seconds": seconds, "output": done.stdout[-1800:] + done.stderr[-200:]}


def main() -> int:
    """Run the stages that have not succeeded yet, as far as the time allows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="start no stage after so long")
    parser.add_argument("--only", default="", metavar="REGEX", help="stages with this in the name")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    if (reason := gpu.unavailable()) is not None:
        print(f"backend 'triton': {reason}")
        return 2
    options.results.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60.0 * options.minutes
    title = "dry-run" if DRY else torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    file = options.results / f"gpu-{slug}.json"
    results = json.loads(file.read_text()) if file.exists() and not options.fresh else {}
    failed = left = 0
    for name, command in stages(options.results).items():
        if results.get(name, {}).get("ok") or not re.search(options.only, name):
            continue
        seconds = deadline - time.monotonic()
        if seconds < 0.0 or (result := run(name, command, min(max(seconds, 30.0), 1e6))) is None:
            left += 1
            continue
        failed += not result["ok"]
        results[name] = {**result, **machine.stamp("cpu" if DRY else "cuda", 1)}
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{'ok  ' if result['ok'] else 'FAIL'} {name}: {result['seconds']} s", flush=True)
    print(f"{file}: {failed} failed, {left} left for the next run")
    return 1 if failed or left else 0


if __name__ == "__main__":
    sys.exit(main())
