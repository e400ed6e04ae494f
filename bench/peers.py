"""All methods that compute the energy of sets of rows: ours, and the alternatives.

Each method is a function of points [B, N, k] to the energies [B] of the sets, s = 2, mean over the
pairs, which autograd can differentiate. `METHODS` lists them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

import comhe_ext
from comhe_ext.settings import BackendName

Energies = Callable[..., Tensor]  # [B, N, k] -> [B]
Derived = tuple[Tensor, Tensor | None]  # an energy, and its gradient
Sweep = Callable[[Tensor, bool], Derived]  # of rows
Mode = Literal["gradient", "half space", "energy", "second order"]
MODES: tuple[Mode, ...] = ("gradient", "half space", "energy", "second order")


def run(energies: Energies, points: Tensor, mode: Mode) -> Derived:
    """Compute energies [B], and the gradient or the Hessian's product with a fixed direction."""
    if mode == "half space":
        energies = partial(energies, half_space=True)
    if mode == "energy":
        with torch.no_grad():
            return energies(points), None
    leaf = points.detach().requires_grad_()
    energy = energies(leaf)
    (derivative,) = torch.autograd.grad(energy.sum(), leaf, create_graph=mode == "second order")
    if mode == "second order":
        (derivative,) = torch.autograd.grad((derivative * points.roll(1, -1)).sum(), leaf)
    return energy.detach(), derivative


def replayed(call: Callable[[], Derived]) -> Callable[[], Derived]:
    """Capture a call into a CUDA graph, and make a call that replays it: no work of the host."""
    call()  # what is compiled or checked must not be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Derived:
        graph.replay()
        return result

    return replay


# --- eager PyTorch --------------------------------------------------------------------------------


def pairs(n: int) -> float:
    return n * (n - 1) / 2


def naive_energy(weight: Tensor, s: float = 2.0, *, half_space: bool = False) -> Tensor:
    """Average r^-s (s = 0: -log r) over the pairs of rows of `weight` [..., N, d] -> [...].

    The formula in a few lines; holds N x N matrices. The same number as
    `comhe_ext.hyperspherical_energy(weight, s, half_space=half_space, min_distance=0)`.
    """
    n = weight.shape[-2]
    v = normalize(weight, dim=-1)
    # the factor 2 on the rows, not on the products, saves a pass over N x N
    twice = (2.0 * v) @ v.mT

    def pair_function(r2: Tensor) -> Tensor:
        r2 = r2.clamp(min=1e-12)
        return r2.pow(-s / 2) if s else -0.5 * r2.log()

    values = pair_function(2.0 - twice)
    if not half_space:
        return values.triu(1).sum((-1, -2)) / pairs(n)
    # of the four pairs that two rows and their opposites make, two are at r and two at sqrt(4 - r2)
    values = 2.0 * (values + pair_function(2.0 + twice)).triu(1)
    antipodes = n * pair_function(twice.new_tensor(4.0))
    return (values.sum((-1, -2)) + antipodes) / (n * (2 * n - 1))


def by_set(energy: Callable[[Tensor], Tensor]) -> Energies:
    """Compute one set at a time: for methods without batches, and better for caches."""
    return lambda points: torch.stack([energy(rows) for rows in points])


def pdist_energy(rows: Tensor) -> Tensor:
    return torch.nn.functional.pdist(normalize(rows)).pow(-2).mean()


def cdist_energies(points: Tensor) -> Tensor:
    unit, n = normalize(points, dim=-1), points.shape[-2]
    above = torch.ones(n, n, dtype=torch.bool, device=points.device).triu(1)
    return torch.where(above, torch.cdist(unit, unit), torch.inf).pow(-2).sum((-1, -2)) / pairs(n)


def block_rows(points: Tensor) -> int:
    """Choose the rows of a block: against all others it should fit the cache, or fill the GPU."""
    elements = 2**26 if points.is_cuda else 2**18
    return max(elements // len(points), 64)


def gradient_in_forward(sweep: Sweep) -> Energies:
    """Make energies of a sweep that computes the gradient, too; backward only scales it."""

    def energy(rows: Tensor) -> Tensor:
        value, gradient = sweep(rows.detach(), rows.requires_grad)
        return value if gradient is None else value + ((rows - rows.detach()) * gradient).sum()

    return by_set(energy)


def across(pull: Tensor, unit: Tensor) -> Tensor:
    """Project a force by the derivative of v / |v|: off its part along v."""
    return pull - unit * (pull * unit).sum(-1, keepdim=True)


def blocked_sweep(rows: Tensor, with_gradient: bool) -> Derived:
    """Sweep blocks of rows against all others: one matrix product forward, one for the force."""
    norm = rows.norm(dim=1, keepdim=True)
    unit, count = rows / norm, pairs(len(rows))
    energy, pull = rows.new_zeros(()), torch.empty_like(rows)
    size = block_rows(rows)
    for begin in range(0, len(unit), size):
        block = unit[begin : begin + size]
        values = torch.addmm(unit.new_tensor(2.0), block, unit.mT, alpha=-2.0)
        values.diagonal(begin).fill_(torch.inf)
        energy += values.reciprocal_().sum()
        if with_gradient:
            torch.mm(values.square_(), unit, out=pull[begin : begin + size])
    energy /= 2 * count
    return energy, across(pull, unit) * (2 / count / norm) if with_gradient else None


# --- KeOps ----------------------------------------------------------------------------------------


def keops_values(unit: Tensor) -> tuple[Any, Any]:
    """Make the symbolic [N, N] of r^-2, 0 on the diagonal, and the rows of its columns.

    A set at a time: with batches KeOps 2.3 runs half as fast on a processor.
    """
    from pykeops.torch import LazyTensor

    number = torch.arange(len(unit), dtype=unit.dtype, device=unit.device).unsqueeze(1)
    other = ((LazyTensor(number[:, None]) - LazyTensor(number[None])) ** 2).clamp(0, 1)
    left, right = LazyTensor(unit[:, None]), LazyTensor(unit[None])
    return other / (left.sqdist(right) + (1 - other)), right


def keops_energy(rows: Tensor) -> Tensor:
    values, _ = keops_values(normalize(rows))
    return values.sum(1).sum() / (2 * pairs(len(rows)))


def keops_sweep(rows: Tensor, with_gradient: bool) -> Derived:
    """Compute the energy and the force on each row in one reduction."""
    norm = rows.norm(dim=1, keepdim=True)
    unit, count = rows / norm, pairs(len(rows))
    values, right = keops_values(unit)
    if not with_gradient:
        return values.sum(1).sum() / (2 * count), None
    both = values.concat(values * values * right).sum(1)
    return both[:, 0].sum() / (2 * count), across(both[:, 1:], unit) * (2 / count / norm)


# --- the registry ---------------------------------------------------------------------------------

ONCE: tuple[Mode, ...] = ("gradient", "energy")
TWICE: tuple[Mode, ...] = ("gradient", "energy", "second order")


class Method(NamedTuple):
    """One way to compute the energy.

    `load` is called once in the process that measures: what it imports or compiles is part of the
    first call.
    """

    label: str
    load: Callable[[], Energies]
    modes: tuple[Mode, ...] = ONCE
    devices: tuple[str, ...] = ("cpu", "cuda")
    backend: BackendName | None = None  # of ours
    compiles: bool = False  # its first call compiles, for many seconds
    environment: Mapping[str, str] = {}
    graph: bool = False  # replayed from a CUDA graph


def ours(backend: BackendName, label: str, *devices: str, **options: Any) -> Method:
    load = partial(partial, comhe_ext.hyperspherical_energy, backend=backend)
    return Method(label, load, MODES, devices, backend, **options)


METHODS = {
    "comhe-cpu": ours("cpu", "comhe_ext", "cpu"),
    "comhe-triton": ours("triton", "comhe_ext", "cuda", compiles=True),
    "comhe-graph": ours("triton", "comhe_ext, CUDA graph", "cuda", compiles=True, graph=True),
    "comhe-torch": ours("torch", "comhe_ext, portable", "cpu", "cuda"),
    "naive": Method("naive PyTorch", lambda: naive_energy, MODES),
    "row-blocks": Method("row blocks", partial(gradient_in_forward, blocked_sweep)),
    "pdist": Method("torch.pdist", partial(by_set, pdist_energy)),
    "cdist-mm": Method("torch.cdist", lambda: cdist_energies, TWICE),
    "compile": Method(
        "torch.compile", lambda: torch.compile(naive_energy, dynamic=False), compiles=True
    ),
    "keops": Method("KeOps", partial(by_set, keops_energy), TWICE, compiles=True),
    # the best that it can do: energy and force in one reduction, compiled for this machine
    "keops-native": Method(
        "KeOps, one sweep",
        partial(gradient_in_forward, keops_sweep),
        compiles=True,
        environment={"CXXFLAGS": "-march=native -ffast-math"},
    ),
}
OURS = [name for name, method in METHODS.items() if method.backend is not None]
PEERS = [name for name in METHODS if name not in OURS]
