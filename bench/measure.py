"""Time and peak memory of energy + gradient, in a process of its own.

    python bench/measure.py --methods comhe_ext naive --rows 4096 --dim 40 --rounds 7

prints one line of JSON: the seconds of every round for each method, and the most memory that the
process held above what it had after a warm-up on few rows. Methods take turns, so that a change
in the machine's mood meets them all. With one method the memory is that method's.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

import comhe_ext
from comhe_ext import testing
from naive import naive_energy

METHODS = {"comhe_ext": comhe_ext.hyperspherical_energy, "naive": naive_energy}
WARM_UP_ROWS = 256


class Measured(NamedTuple):
    """What a child process reports."""

    seconds: dict[str, list[float]]
    peak_bytes: int


class Cost(NamedTuple):
    """One row of the operator's table; None where it was not measured."""

    method: str
    rows: int
    milliseconds: float | None
    rounds: int
    peak_mib: float | None
    energy_error: float | None
    gradient_error: float | None
    note: str = ""


def energy_and_gradient(method: str, points: Tensor) -> tuple[Tensor, Tensor]:
    leaf = points.detach().requires_grad_()
    energy = METHODS[method](leaf)
    (gradient,) = torch.autograd.grad(energy, leaf)
    return energy.detach(), gradient


def in_child(
    methods: Sequence[str],
    rows: int,
    dim: int,
    *,
    rounds: int,
    threads: int,
    save: Path | None = None,
) -> Measured:
    """Run this file in a fresh process; RuntimeError where it fails, short of memory say."""
    command = [sys.executable, __file__, "--methods", *methods]
    for name, value in (("rows", rows), ("dim", dim), ("rounds", rounds), ("threads", threads)):
        command += [f"--{name}", str(value)]
    if save is not None:
        command += ["--save", str(save)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"exit status {done.returncode}: {last_line}")
    return Measured(**json.loads(done.stdout))


def free_memory() -> int:
    """Bytes that a new process may take: the machine's free memory, or less in a container."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free


def machine() -> str:
    """The processor in words."""
    names = []
    if (info := Path("/proc/cpuinfo")).exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M)
    name = names[0] if names else "processor"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} CPUs"


def _resident_bytes(reset: bool) -> int:
    """The most memory this process has held, since the last reset where the system knows one."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # then the peak of the imports hides what is smaller
    if (status := Path("/proc/self/status")).exists():
        return int(re.findall(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.M)[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _give_way() -> None:
    """Where memory runs out nonetheless, the system is to end this process and no other."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--dim", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", type=Path, help="file for the energy and the gradient")
    args = parser.parse_args()

    _give_way()
    torch.set_num_threads(args.threads)
    points = testing.random_rows(args.rows, args.dim)
    for method in args.methods:
        for _ in range(3):
            energy_and_gradient(method, points[:WARM_UP_ROWS])
    before = _resident_bytes(reset=True)
    seconds: dict[str, list[float]] = {method: [] for method in args.methods}
    for _ in range(args.rounds):
        for method in args.methods:
            start = time.perf_counter()
            result = energy_and_gradient(method, points)
            seconds[method].append(time.perf_counter() - start)
    # a system counts in pages: at least one, so that ratios exist
    peak = max(_resident_bytes(reset=False) - before, resource.getpagesize())
    if args.save is not None:
        torch.save(result, args.save)
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
