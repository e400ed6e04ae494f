"""`comhe-ext bench`: energy and gradient on this machine, beside two ways without the package."""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import comhe_ext
from comhe_ext import backends
from comhe_ext.cli import arguments, screen
from comhe_ext.kernels.pair_functions import Riesz

HELP = "time energy and gradient beside plain PyTorch: seconds"
DESCRIPTION = """Time the energy of random rows and its gradient, s = 2, float32, at three shapes:
by comhe_ext, by the formula in a few lines of PyTorch (naive), and by torch.pdist. Median of rounds
in which they take turns, in milliseconds, the times of the others as multiples of ours. For more
peers, memory and accuracy run `python -m bench` in a checkout."""
SHAPES = ((1024, 64), (4096, 32), (2048, 512))
ROUNDS, SECONDS = 5, 1.0  # at least, for each shape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--device", type=arguments.device, default="cpu", help="default cpu")
    parser.add_argument(
        "--threads",
        type=arguments.count,
        help="of the processor; default: as many as PyTorch takes",
    )


def naive(rows: Tensor) -> Tensor:
    """Compute the energy by its formula, with all pairs in memory."""
    unit = torch.nn.functional.normalize(rows)
    squares = 2 - 2 * unit @ unit.T
    squares = squares.fill_diagonal_(torch.inf)
    return squares.reciprocal().sum() / (len(rows) * (len(rows) - 1))


def pdist(rows: Tensor) -> Tensor:
    """Compute the energy from PyTorch's distances of all pairs."""
    return torch.nn.functional.pdist(torch.nn.functional.normalize(rows)).pow(-2).mean()


METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "comhe_ext": comhe_ext.hyperspherical_energy,
    "naive": naive,
    "pdist": pdist,
}


def run(options: argparse.Namespace) -> int:
    """Print the times."""
    device = options.device
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    backend = backends.choose(None, Riesz(), device, torch.float32)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    threads = "" if device.type == "cuda" else f", threads: {torch.get_num_threads()}"
    print(f"{name}{threads}; PyTorch {torch.__version__}; backend {backend}")
    lines = []
    for n, d in SHAPES:
        times = measure(torch.randn(n, d, device=device))
        ours = times["comhe_ext"]
        others = [f"{times[x] / ours:.3g}x" for x in METHODS if x != "comhe_ext"]
        lines.append([f"{n} x {d}", f"{1e3 * ours:.3g}", *others])
    screen.print_table(("rows x columns", "comhe_ext, ms", "naive", "pdist"), lines)
    return 0


def measure(rows: Tensor) -> dict[str, float]:
    """Time each method, in seconds; the first round, which compiles and allocates, is not used."""
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    begun = time.perf_counter()
    rounds = 0
    while rounds <= ROUNDS or time.perf_counter() - begun < SECONDS:
        for name, method in METHODS.items():
            leaf = rows.clone().requires_grad_()
            _wait(rows.device)
            start = time.perf_counter()
            method(leaf).backward()
            _wait(rows.device)
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
