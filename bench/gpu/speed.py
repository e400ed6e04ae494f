"""How fast the Triton backend is on the GPU of this machine, beside peers and the machine's bound.

Times of the GPU alone are those of a replayed CUDA graph: an eager call has the host's part in it.
"""

import csv
import importlib.util
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import RESULTS
from comhe_ext.kernels import gpu
from comhe_ext.kernels.gpu import backend, plan
from comhe_ext.kernels.pair_functions import Riesz
from comhe_ext.kernels.sweep import Projected, SweepRequest
from comhe_ext.testing.architectures import neuron_shapes, resnet50

COMPILED = RESULTS / "compile_gpu.csv"
# tiny sizes on the processor, and no time that means anything
DRY = backend.interpreted()
DEVICE = "cpu" if DRY else "cuda"
Result = dict[str, Any]


class Case(NamedTuple):
    """Sets of these sizes, and the microseconds to reach on an H100 or H200."""

    sizes: list[int]
    k: int
    half_space: bool = False
    goal_us: float | None = None

    def __str__(self) -> str:
        half_space = ", half space" if self.half_space else ""
        return f"{len(self.sizes)} x {self.sizes[0]} x {self.k}{half_space}"


CASES = [
    Case([1024], 32),
    Case([4096], 32),
    Case([4096], 128, goal_us=50.0),
    Case([16384], 32, goal_us=180.0),
    Case([16384], 32, True),
    Case([4096] * 20, 32),
    # the setting of the paper's random projections
    Case([4096] * 20, 40, True, 320.0),
    Case([131072], 64, goal_us=17_000.0),
    Case([1_000_000], 64, goal_us=1_000_000.0),
    Case([16384], 3),
    Case([16384], 9),
    Case([16384], 4096),
]
TINY = [Case([70], 32), Case([40] * 2, 20, True), Case([70], 3), Case([40], 140)]
# what one processor of an SXM H100 or H200 does in a clock: fp16 products with float32 sums, and
# instructions of a thread
PRODUCTS_PER_CLOCK = 2048
INSTRUCTIONS_PER_CLOCK = 128


def time_graph(call: Callable[[], object]) -> float | None:
    """Median microseconds of a call on the GPU alone: replayed from a CUDA graph."""
    if DRY:
        return None
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    result = time_call(graph.replay)
    del kept
    return result


def time_call(call: Callable[[], object], least: float = 0.5) -> float:
    """Median microseconds of a call, by events on the GPU, launches included; the cache is not
    flushed.
    """
    call()
    if DRY:
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


def clock_mhz() -> float | None:
    """The most the processors can run at; torch would ask for a package of NVIDIA's to tell."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return float(answer) if answer.isdigit() else None


def layers(
    shapes: list[tuple[int, int]], count: int, k: int
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Random weights, and matrices for those that are wider than k."""
    weights = [torch.randn(n, d, device=DEVICE) for n, d in shapes]
    matrices = [torch.randn(count, k, d, device=DEVICE) if d > k else None for _, d in shapes]
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


def resnet50_layers(count: int) -> tuple[list[Tensor], list[Tensor | None]]:
    """The hidden layers of a ResNet-50 and so many matrices to k = 40 each."""
    shapes = [(20, 50), (7, 30)] if DRY else neuron_shapes(resnet50)
    return layers(shapes, 2 if DRY else count, 40)


def bound_us(case: Case) -> float | None:
    """The time that instructions or products alone take on this GPU; None where it is not known.

    Instructions a pair are those that `bench.gpu.compile` counted.
    """
    clock, (sizes, k, half_space, _) = clock_mhz(), case
    if clock is None or not plan.MAX_DIRECT < k <= plan.MAX_WIDTH or not COMPILED.exists():
        return None
    target, width = backend.target_of(torch.device("cuda")), plan.row_width(k)
    tiles = plan.tiles_for(target, k, max(sizes), False)
    cosine_terms = 4 if k <= plan.MAX_WITH_REST else 3
    name = "s=2 half" if half_space else "s=2"
    variant = f"{name} {tiles.block_m}x{tiles.block_n}x{width} {cosine_terms}+3"
    with COMPILED.open() as file:
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


def speed(case: Case) -> Result:
    """Microseconds of a case and of its peers, and whether the goal was met."""
    sizes, k, half_space, goal = case
    points = torch.randn(sum(sizes), k, device=DEVICE)
    result: Result = {
        "us": time_call(lambda: sweep(points, sizes, half_space)),
        "us_graph": time_graph(lambda: sweep(points, sizes, half_space)),
        "us_energy_only": time_call(lambda: sweep(points, sizes, half_space, False)),
        "goal_us": goal,
    }
    bound = bound_us(case)
    if bound is not None and result["us_graph"] is not None:
        result["bound_us"] = bound
        result["share_of_bound"] = bound / result["us_graph"]
    if goal is not None and result["us_graph"] is not None and result["us_graph"] > goal:
        result["missed"] = f"{result['us_graph'] / goal:.2f} times the goal"
    peers: dict[str, Callable[..., Tensor]] = {}
    pairs = sum(n * n for n in sizes)
    # autograd holds about six matrices of each set; more memory than there is: no naive formula
    dense = 24 * pairs * (4 if half_space else 1)
    if dense < (2**30 if DRY else torch.cuda.mem_get_info()[0]):
        peers["naive"] = naive
        if not DRY and len(sizes) == 1:
            peers["compiled"] = torch.compile(naive)
    if importlib.util.find_spec("pykeops") and len(sizes) == 1 and not half_space and pairs < 1e11:
        peers["keops"] = keops
    for name, peer in peers.items():
        peer_us = time_call(partial(backward, peer, points, sizes, half_space))
        result |= {f"{name}_us": peer_us, f"times_{name}": peer_us / result["us"]}
    return result


def speed_projected() -> Result:
    """The hidden layers of a ResNet-50 with C = 20 matrices to k = 40, and the backward GEMMs."""
    weights, matrices = resnet50_layers(20)

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
        "us": time_call(lambda: projected(weights, matrices, 40)),
        "us_graph": time_graph(lambda: projected(weights, matrices, 40)),
        "us_with_backward": time_call(backward_gemms),
    }


def launches() -> Result:
    """A ResNet-50 in at most five launches, copies counted too."""
    weights, matrices = resnet50_layers(2)
    projected(weights, matrices, 40)
    if DRY:
        return {}
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        projected(weights, matrices, 40)
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type.name == "CUDA"]
    if not 0 < len(events) <= 5:
        raise AssertionError(f"{len(events)} launches: {[e.name for e in events]}")
    return {"kernels_us": {e.name: e.device_time_total for e in events}}
