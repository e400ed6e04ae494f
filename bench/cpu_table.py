"""The compiled CPU sweep beside what else computes energy and gradient on a processor, s = 2.

    python bench/cpu_table.py [--threads 1] [--shapes 0 1 2] [--budget 20]

Methods take turns, round by round, and medians are compared, so that a change in the machine's
mood meets them all. One thread is timed by processor time, more by the clock. Writes
bench/results/cpu_table_<threads>.csv; `share` is useful work, 6k flop a pair, over the peak of
fused multiply-adds, measured in the same process.
"""

import argparse
import csv
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import comhe_ext
from comhe_ext.testing import random_rows, relative_error
from naive import naive_energy

SHAPES = [
    (1, 4096, 30),
    (16, 2048, 30),
    (1, 4096, 256),
    (1, 4096, 1024),
    (1, 1024, 30),
    (1000, 64, 40),
    (1, 16384, 30),
]
RESULTS = Path(__file__).parent / "results"
Row = dict[str, str | int]
Method = Callable[[Tensor], tuple[Tensor, Tensor]]

# 24 independent accumulators of one vector: the processor's peak, whatever its vectors
PEAK_SOURCE = """
typedef float vf __attribute__((vector_size(BYTES)));
float peak(long n) {
    vf acc[24], b = {}, a = {};
    for (int i = 0; i < 24; i++) acc[i] = b;
    b += 1.0f; a += 1e-9f;
    for (long t = 0; t < n; t++) {
        asm volatile("" : "+v"(a), "+v"(b));
        #pragma GCC unroll 24
        for (int i = 0; i < 24; i++) acc[i] += a * b;
    }
    vf s = acc[0];
    for (int i = 1; i < 24; i++) s += acc[i];
    return s[0];
}
"""


def fma_peak() -> float:
    """Flop per second of one core."""
    wide = "avx512f" in Path("/proc/cpuinfo").read_text()
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.c"), Path(folder, "peak.so")
        source.write_text(PEAK_SOURCE)
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run(
            ["gcc", *flags, f"-DBYTES={64 if wide else 32}", source, "-o", library], check=True
        )
        peak = ctypes.CDLL(str(library)).peak
    peak.argtypes, peak.restype = [ctypes.c_long], ctypes.c_float
    n, rates = 1_000_000, []
    for _ in range(9):
        start = time.process_time()
        peak(n)
        rates.append(n * 24 * (16 if wide else 8) * 2 / (time.process_time() - start))
    return max(rates)


def by_autograd(energies: Callable[[Tensor], Tensor]) -> Method:
    def run(points: Tensor) -> tuple[Tensor, Tensor]:
        leaf = points.detach().requires_grad_()
        energy = energies(leaf)
        (gradient,) = torch.autograd.grad(energy.sum(), leaf)
        return energy.detach(), gradient

    return run


def ours(backend: Literal["cpu", "torch"]) -> Method:
    def run(points: Tensor) -> tuple[Tensor, Tensor]:
        leaf = points.detach().requires_grad_()
        energy = comhe_ext.hyperspherical_energy(leaf, min_distance=0.0, backend=backend)
        (gradient,) = torch.autograd.grad(energy.sum(), leaf)
        return energy.detach(), gradient

    return run


def naive(points: Tensor) -> Tensor:
    """All sets at once, as one writes it for a batch."""
    return torch.func.vmap(naive_energy)(points)


def naive_by_set(points: Tensor) -> Tensor:
    """A set at a time: smaller matrices, kinder to the caches."""
    return torch.stack([naive_energy(rows) for rows in points])


def pdist(points: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(points, dim=-1)
    return torch.stack([torch.nn.functional.pdist(v).pow(-2).mean() for v in unit])


def cdist(points: Tensor) -> Tensor:
    unit, n = torch.nn.functional.normalize(points, dim=-1), points.shape[1]
    above = torch.ones(n, n, dtype=torch.bool).triu(1)
    distance = torch.where(above, torch.cdist(unit, unit), torch.inf)
    return distance.pow(-2).sum((-1, -2)) / (n * (n - 1) / 2)


def keops() -> Method | None:
    """The analytic gradient in one reduction, the best form for KeOps; None if not installed."""
    try:
        from pykeops.torch import LazyTensor
    except ImportError:
        return None

    def run(points: Tensor) -> tuple[Tensor, Tensor]:
        n = points.shape[1]
        energies, gradients = [], []
        number = torch.arange(n, dtype=torch.float32).view(n, 1)
        for rows in points:
            norm = rows.norm(dim=1, keepdim=True)
            v = rows / norm
            v_i, v_j = LazyTensor(v[:, None]), LazyTensor(v[None])
            other = ((LazyTensor(number[:, None]) - LazyTensor(number[None])) ** 2).clamp(0, 1)
            e = other / (((v_i - v_j) ** 2).sum(-1) + (1 - other))
            both = LazyTensor.concatenate((e, e * e * v_j), axis=-1).sum(1)
            pull = both[:, 1:]
            pairs = n * (n - 1) / 2
            energies.append(both[:, 0].sum() / 2 / pairs)
            gradients.append((pull - v * (pull * v).sum(1, keepdim=True)) * (2 / pairs) / norm)
        return torch.stack(energies), torch.stack(gradients)

    return run


def methods(shape: tuple[int, int, int]) -> dict[str, Method]:
    found = {
        "cpu": ours("cpu"),
        "torch": ours("torch"),
        "naive": by_autograd(naive),
        "pdist": by_autograd(pdist),
        "cdist": by_autograd(cdist),
        "compiled": by_autograd(torch.compile(naive_by_set, dynamic=False)),
    }
    if shape[0] > 1:
        found["naive_by_set"] = by_autograd(naive_by_set)
    if shape[2] <= 64 and (method := keops()) is not None:  # minutes beyond that
        found["keops"] = method
    if shape[0] > 100:  # a loop over sets would measure Python
        found = {name: found[name] for name in ("cpu", "torch")}
    return found


def measure(shape: tuple[int, int, int], threads: int, budget: float, peak: float) -> list[Row]:
    batch, n, k = shape
    points = random_rows(batch * n, k).view(shape)
    clock = time.process_time if threads == 1 else time.perf_counter
    candidates = methods(shape)
    seconds: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    left: dict[str, int] = {}
    truth: tuple[Tensor, Tensor] | None = None
    for name, method in candidates.items():
        method(points[:, : min(n, 128)] if name != "compiled" else points)  # warm-up, compilation
        start = time.perf_counter()
        result = method(points)
        truth = truth or result
        left[name] = max(1, min(9, int(budget / (time.perf_counter() - start))))
        # of the other methods: how far they are from ours, as a check that all do the same
        errors[name] = relative_error(result[1], truth[1])
        seconds[name] = []
    for turn in range(9):
        for name, method in candidates.items():
            if turn < left[name]:
                start = clock()
                method(points)
                seconds[name].append(clock() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    useful = batch * n * (n - 1) / 2 * 6 * k
    return [
        {
            "shape": "x".join(map(str, shape)),
            "threads": threads,
            "method": name,
            "median_ms": f"{1e3 * median[name]:.2f}",
            "min_ms": f"{1e3 * min(seconds[name]):.2f}",
            "rounds": len(seconds[name]),
            "over_cpu": f"{median[name] / median['cpu']:.2f}",
            "share": f"{useful / median[name] / (threads * peak):.3f}",
            "gradient_difference": f"{errors[name]:.1e}",
        }
        for name in candidates
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", type=int, nargs="*", default=range(len(SHAPES)))
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per method and shape")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peak = fma_peak()
    print(f"peak {peak / 1e9:.1f} GF/s a core")
    rows: list[Row] = []
    for index in args.shapes:
        for row in measure(SHAPES[index], args.threads, args.budget, peak):
            rows.append(row)
            print(*row.values(), sep="\t", flush=True)
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"cpu_table_{args.threads}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
