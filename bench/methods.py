"""All methods that compute the energy of sets of rows: ours, and the alternatives.

Each method is a function of points [B, N, k] to the energies [B] of the sets, s = 2, mean over the
pairs, which autograd can differentiate. `METHODS` lists them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

import comhe_ext
from bench.naive import naive_energy
from comhe_ext import backends
from comhe_ext.settings import BackendName

Energies = Callable[[Tensor], Tensor]  # [B, N, k] -> [B]
Sweep = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]  # rows -> energy, and gradient
Mode = Literal["gradient", "energy", "second order"]
MODES: tuple[Mode, ...] = ("gradient", "energy", "second order")


@dataclass(frozen=True)
class Method:
    """One way to compute the energy.

    `load` is called once in the process that measures: what it imports or compiles is part of the
    first call.
    """

    name: str
    label: str
    family: str
    load: Callable[[], Energies]
    matrices: float = 0.0  # N x N, float32, that energy and gradient of a set hold at their peak
    modes: tuple[Mode, ...] = MODES
    devices: tuple[str, ...] = ("cpu", "cuda")
    same_energy: bool = True
    packages: tuple[str, ...] = ()  # what has to be installed, the peer itself first
    compiles: bool = False  # its first call compiles, for many seconds
    environment: dict[str, str] = field(default_factory=dict)
    only_batches: bool = False  # with a single set it equals another method

    def unavailable(self, device: str) -> str | None:
        """Say why it cannot run here, or None."""
        for package in self.packages:
            if find_spec(package) is None:
                return f"{package} is not installed"
        if device not in self.devices:
            return f"does not run on {device}"
        if self.family == OURS:
            return backends.unavailable(self.name.removeprefix("comhe-"))
        return None

    def version(self) -> str:
        """Find the version of the package that it comes from."""
        if self.family == OURS:
            return comhe_ext.__version__
        package = self.packages[0] if self.packages else "torch"
        try:
            return metadata.version(package.replace("_", "-"))
        except metadata.PackageNotFoundError:
            return ""

    def needed_bytes(self, sets: int, rows: int) -> float:
        """Estimate the bytes for energy and gradient, to refuse beforehand what cannot fit."""
        return self.matrices * 4.0 * sets * rows * rows


def run(energies: Energies, points: Tensor, mode: Mode) -> tuple[Tensor, Tensor | None]:
    """Compute energies [B], and the gradient or the Hessian's product with `direction(points)`."""
    if mode == "energy":
        with torch.no_grad():
            return energies(points), None
    leaf = points.detach().requires_grad_()
    energy = energies(leaf)
    (derivative,) = torch.autograd.grad(energy.sum(), leaf, create_graph=mode == "second order")
    if mode == "second order":
        (derivative,) = torch.autograd.grad((derivative * direction(points)).sum(), leaf)
    return energy.detach(), derivative


def direction(points: Tensor) -> Tensor:
    """Make a fixed direction for Hessian-vector products."""
    return torch.linspace(-1.0, 1.0, points.numel()).sin().to(points).view_as(points)


# --- ours -----------------------------------------------------------------------------------------


def load_ours(backend: BackendName) -> Energies:
    return partial(comhe_ext.hyperspherical_energy, backend=backend)


# --- eager PyTorch --------------------------------------------------------------------------------


def by_set(energy: Callable[[Tensor], Tensor]) -> Energies:
    """Compute one set at a time: for methods without batches, and better for caches."""
    return lambda points: torch.stack([energy(rows) for rows in points])


def pairs(n: int) -> float:
    return n * (n - 1) / 2


def pdist_energy(rows: Tensor) -> Tensor:
    return torch.nn.functional.pdist(normalize(rows)).pow(-2).mean()


def cdist_energies(points: Tensor, compute_mode: str) -> Tensor:
    unit, n = normalize(points, dim=-1), points.shape[-2]
    above = torch.ones(n, n, dtype=torch.bool, device=points.device).triu(1)
    distances = torch.cdist(unit, unit, compute_mode=compute_mode)
    return torch.where(above, distances, torch.inf).pow(-2).sum((-1, -2)) / pairs(n)


def block_rows(points: Tensor) -> int:
    """Choose the rows of a block: against all others it should fit the cache, or fill the GPU."""
    elements = 2**26 if points.is_cuda else 2**18
    return max(elements // len(points), 64)


def checkpointed_energy(rows: Tensor) -> Tensor:
    """Compute the Gram matrix in blocks of rows, each again in backward instead of kept."""

    def block_sum(block: Tensor, unit: Tensor, begin: int) -> Tensor:
        r2 = (2.0 - (2.0 * block) @ unit.mT).clamp(min=1e-12)
        index = torch.arange(len(block), device=unit.device)
        return r2.index_put((index, index + begin), r2.new_tensor(torch.inf)).reciprocal().sum()

    unit = normalize(rows)
    total = unit.new_zeros(())
    size = block_rows(rows)
    for begin in range(0, len(unit), size):
        block = unit[begin : begin + size]
        total = total + checkpoint(block_sum, block, unit, begin, use_reentrant=False)
    return total / (2 * pairs(len(unit)))


class GradientInForward(torch.autograd.Function):
    """The energy of rows [N, k], whose gradient is computed with it; backward only scales."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sweep: Sweep) -> Tensor:
        with_gradient = ctx.needs_input_grad[0]
        energy, gradient = sweep(rows, with_gradient)
        if with_gradient:
            ctx.save_for_backward(gradient)
        return energy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_energy: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_energy, None


def gradient_in_forward(sweep: Sweep) -> Energies:
    return by_set(lambda rows: GradientInForward.apply(rows, sweep))


def across(pull: Tensor, unit: Tensor) -> Tensor:
    """Project a force by the derivative of v / |v|: off its part along v."""
    return pull - unit * (pull * unit).sum(-1, keepdim=True)


def blocked_sweep(rows: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
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


def keops_sweep(rows: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Compute the energy and the force on each row in one reduction."""
    norm = rows.norm(dim=1, keepdim=True)
    unit, count = rows / norm, pairs(len(rows))
    values, right = keops_values(unit)
    if not with_gradient:
        return values.sum(1).sum() / (2 * count), None
    both = values.concat(values * values * right).sum(1)
    return both[:, 0].sum() / (2 * count), across(both[:, 1:], unit) * (2 / count / norm)


def load_keops(energies: Energies) -> Energies:
    import pykeops

    pykeops.set_verbose(False)
    return energies


# --- other energies -------------------------------------------------------------------------------


def load_geomloss() -> Energies:
    """Load the energy distance between the rows and one point: mean of -r, and a term."""
    from geomloss import SamplesLoss

    loss = SamplesLoss("energy", backend="tensorized")

    def energies(points: Tensor) -> Tensor:
        unit = normalize(points, dim=-1)
        return loss(unit, unit[:, :1].detach())

    return energies


def load_metric_learning() -> Energies:
    """Load RegularFace: the mean over the rows of the cosine with the nearest other one."""
    from pytorch_metric_learning.regularizers import RegularFaceRegularizer

    return by_set(RegularFaceRegularizer())


# --- the registry ---------------------------------------------------------------------------------

OURS = "comhe_ext"
EAGER = "eager PyTorch"
COMPILED = "compiled PyTorch"
KEOPS = "KeOps"
OTHER = "other energy"

NATIVE = {"CXXFLAGS": "-march=native -ffast-math"}

METHODS = {
    method.name: method
    for method in (
        Method("comhe-cpu", "comhe_ext", OURS, partial(load_ours, "cpu"), devices=("cpu",)),
        Method(
            "comhe-triton",
            "comhe_ext",
            OURS,
            partial(load_ours, "triton"),
            devices=("cuda",),
            compiles=True,
        ),
        Method("comhe-torch", "comhe_ext, portable", OURS, partial(load_ours, "torch")),
        Method("naive", "naive PyTorch", EAGER, lambda: naive_energy, matrices=6),
        Method(
            "naive-by-set",
            "naive PyTorch, set by set",
            EAGER,
            lambda: by_set(naive_energy),
            matrices=6,
            only_batches=True,
        ),
        Method(
            "checkpoint",
            "row blocks, checkpointed",
            EAGER,
            lambda: by_set(checkpointed_energy),
            matrices=1.4,
        ),
        Method(
            "row-blocks",
            "row blocks, own gradient",
            EAGER,
            lambda: gradient_in_forward(blocked_sweep),
            modes=("gradient", "energy"),
        ),
        Method(
            "pdist",
            "torch.pdist",
            EAGER,
            lambda: by_set(pdist_energy),
            matrices=3,
            modes=("gradient", "energy"),
        ),
        Method(
            "cdist-mm",
            "torch.cdist, products",
            EAGER,
            lambda: partial(cdist_energies, compute_mode="use_mm_for_euclid_dist"),
            matrices=5.5,
        ),
        Method(
            "cdist-direct",
            "torch.cdist, differences",
            EAGER,
            lambda: partial(cdist_energies, compute_mode="donot_use_mm_for_euclid_dist"),
            matrices=5.5,
            modes=("gradient", "energy"),
        ),
        Method(
            "compile",
            "torch.compile",
            COMPILED,
            lambda: torch.compile(naive_energy, dynamic=False),
            matrices=1,
            modes=("gradient", "energy"),
            compiles=True,
        ),
        Method(
            "keops",
            "KeOps",
            KEOPS,
            lambda: load_keops(by_set(keops_energy)),
            packages=("pykeops",),
            compiles=True,
        ),
        Method(
            "keops-analytic",
            "KeOps, one sweep",
            KEOPS,
            lambda: load_keops(gradient_in_forward(keops_sweep)),
            modes=("gradient", "energy"),
            packages=("pykeops",),
            compiles=True,
        ),
        Method(
            "keops-native",
            "KeOps, one sweep, native flags",
            KEOPS,
            lambda: load_keops(gradient_in_forward(keops_sweep)),
            modes=("gradient", "energy"),
            devices=("cpu",),
            packages=("pykeops",),
            compiles=True,
            environment=NATIVE,
        ),
        Method(
            "geomloss",
            "geomloss energy distance",
            OTHER,
            load_geomloss,
            matrices=5,
            packages=("geomloss",),
            same_energy=False,
        ),
        Method(
            "metric-learning",
            "RegularFace",
            OTHER,
            load_metric_learning,
            matrices=4,
            packages=("pytorch_metric_learning",),
            same_energy=False,
        ),
    )
}
