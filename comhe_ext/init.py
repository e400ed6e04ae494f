"""Weights of least hyperspherical energy, in the style of `torch.nn.init`."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn

from comhe_ext.checks import check_count, check_number, check_tensor
from comhe_ext.layers import NOWHERE_TO_TURN, Layer, survey
from comhe_ext.operators.library import compute_dtype
from comhe_ext.packing import Part, total_energy
from comhe_ext.progress import bar
from comhe_ext.projections import random_projection
from comhe_ext.selectors import Selector, Split
from comhe_ext.settings import EnergyOptions, Settings, lists_energy_options, mean_settings

if TYPE_CHECKING:
    from typing_extensions import Unpack


@lists_energy_options
def minimum_energy_(
    weight: Tensor,
    *,
    num_projections: int = 20,
    dim: int = 40,
    s: float = 2.0,
    half_space: bool = True,
    steps: int = 1000,
    lr: float = 0.5,
    momentum: float = 0.9,
    patience: int = 100,
    tolerance: float = 1e-3,
    generator: Generator | None = None,
    progress: bool | str = False,
    **options: "Unpack[EnergyOptions]",
) -> Tensor:
    """Turn the rows of `weight` in place to directions of low hyperspherical energy.

    Torch equivalent::

        for step in range(steps):    # by SGD with momentum and a cosine schedule
            energy = compressive_energy(weight, random_projection(20, 40, d), half_space=True)

    The rows keep their lengths; rows of zero norm stay as they are. Fresh projections are drawn
    each step. What is minimized is N/2 times the mean energy, so that the step of a row, relative
    to its length, does not depend on N. Rows of at most `dim` columns are not projected, and their
    energy is minimized by L-BFGS. `weight` is written once, at the end: a call that fails or is
    interrupted leaves it unchanged.

    Args:
        weight: [N, d], or [N, ...] of a convolution, whose rows are its filters; float16, bfloat16,
            float32 or float64, any strides. Rows of one column have nowhere to turn: they are left
            as they are, with a warning.
        num_projections: C, matrices drawn each step.
        dim: k, the dimension projected to.
        s, half_space: see `comhe_ext.hyperspherical_energy`.
        steps: at most.
        lr: of the first step of SGD; it falls to 0 as half a cosine.
        momentum: of SGD.
        patience, tolerance: stop when `patience` steps together lower the mean energy by less than
            `tolerance` times the whole decrease so far; tolerance 0 never stops early, L-BFGS only
            where the energy falls no more.
        generator: source of the projections, on the device of `weight`.
        progress: show a progress bar, a string is its title; needs the package tqdm.
        options: `pair`, any pair function, in place of `s`, `angular` and `min_distance`; and all
            other keywords of `comhe_ext.hyperspherical_energy` but `reduction`.

    Returns:
        `weight`.

    Raises:
        TypeError: `weight` is not a dense floating-point tensor or has no numbers (device meta), or
            an option has the wrong type.
        ValueError: a shape or an option is out of range, a row holds NaN or infinity, or a turned
            row does not fit into the dtype.
        RuntimeError: `weight` is expanded: several of its elements are one number in memory.

    Note:
        Memory: four times that of `weight`, in float32, and 2 C N k numbers; without a projection
        twenty times that of `weight`.

    Source: RP-CoMHE of Lin et al. (2020), as an initializer: Qiu et al. (2025), POET.
    """
    _check_weight("weight", weight)
    if any(
        size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride(), strict=True)
    ):
        raise RuntimeError(
            "`weight` must not be expanded, got elements that share a place in memory: "
            "pass weight.clone()"
        )
    settings = mean_settings(s, half_space, options)
    settings.options([weight])
    for argument, count in (
        ("num_projections", num_projections),
        ("dim", dim),
        ("steps", steps),
        ("patience", patience),
    ):
        check_count(argument, count)
    for argument, number in (("lr", lr), ("momentum", momentum), ("tolerance", tolerance)):
        if not check_number(argument, number) >= 0:
            raise ValueError(f"`{argument}` must be at least 0, got {number}")
        if math.isinf(number):
            raise ValueError(f"`{argument}` must be finite, got {number}")
    width = weight[0].numel() if len(weight) else 0
    if width == 1:
        warnings.warn(
            "`weight` has one column: its rows have nowhere to turn and are left as they are",
            stacklevel=2,
        )
    if width <= 1:
        return weight

    # autograd is needed, also where the caller is in inference mode
    with torch.inference_mode(False), torch.no_grad():
        rows = weight.flatten(1).to(
            compute_dtype(weight), copy=True, memory_format=torch.contiguous_format
        )
        largest, lengths = _normalize_(rows)
        with bar(steps, progress, "minimum_energy_") as advance:
            if width <= dim:
                _settle_(rows, settings, steps, patience, tolerance, advance)
            else:
                velocity = torch.zeros_like(rows)
                plateau = _Plateau(patience, tolerance)
                for step in range(steps):
                    matrices = random_projection(
                        num_projections,
                        dim,
                        width,
                        generator=generator,
                        device=rows.device,
                        dtype=rows.dtype,
                    )
                    energy, gradient = _energy_and_gradient(rows, matrices, settings)
                    velocity.mul_(momentum).add_(gradient, alpha=len(rows))
                    rows.sub_(velocity, alpha=lr * (1 + math.cos(math.pi * step / steps)) / 2)
                    _normalize_(rows)
                    advance()
                    if plateau.reached(energy):
                        break
        if not bool(rows.isfinite().all()):
            raise ValueError(
                "the energy of `weight` or its gradient overflows: use a smaller `s` or `lr`"
            )
        # the length comes in two factors: it may overflow the dtype though no entry does
        turned = rows.mul_(lengths).mul_(largest).to(weight.dtype).view(weight.shape)
        if not bool(turned.isfinite().all()):
            raise ValueError(
                f"`weight` must leave room in {weight.dtype} to turn, got entries up to "
                f"{float(largest.max()):.3g}: scale it down"
            )
    # an inference tensor may be written in inference mode only
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        return weight.copy_(turned)


def directions(
    n: int,
    dim: int,
    *,
    generator: Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw `n` directions that are spread evenly over the lines through the origin.

    Torch equivalent::

        rows = torch.randn(n, dim)
        directions = normalize(minimum_energy_(rows, dim=dim))

    For averages over directions, as in sliced Wasserstein distances: each direction alone is
    uniform on the sphere, so that the average is unbiased, and together they leave no part of it
    out, so that it varies less than with independent or orthogonal ones.

    Args:
        n: number of directions.
        dim: of the space.
        generator: source of the start, on `device`.
        device, dtype: of the result; float16 and bfloat16 are rounded at the end.

    Returns:
        Unit rows [n, dim], at a minimum of the half-space energy, s = 2.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: rows of least energy as points of quadrature: Brauchart et al. (2014), QMC designs.
    """
    check_count("n", n)
    check_count("dim", dim)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"`dtype` must be a floating-point dtype, got {dtype}")
    rows = torch.randn(
        n, dim, generator=generator, device=device, dtype=torch.promote_types(dtype, torch.float32)
    )
    if dim > 1:
        minimum_energy_(rows, dim=dim)
    return torch.nn.functional.normalize(rows).to(dtype)


def minimum_energy_model_(
    model: nn.Module,
    *,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] = (),
    split: Mapping[str, Split] | None = None,
    transpose: str | Iterable[str] = (),
    progress: bool = False,
    **options: Any,
) -> nn.Module:
    """Apply `minimum_energy_` to every layer of `model`, one after the other.

    Args:
        model: its layers are found as `comhe_ext.CoMHE` finds them, its output layer among them;
            filters of different convolution groups do not meet.
        include, exclude, split, transpose: see `comhe_ext.CoMHE`.
        progress: show a bar for each layer; needs the package tqdm.
        options: see `minimum_energy_`.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: as `minimum_energy_`.

    Note:
        The layers are written together, at the end; a call that fails or is interrupted leaves all
        of them as they were. Memory: two more copies of the layers.
    """
    layers, left_out = survey(model, include, exclude, split, transpose)
    for name, reason in left_out:
        if reason == NOWHERE_TO_TURN:
            warnings.warn(f"layer {name!r} is left as it is: {reason}", stacklevel=2)
    for layer in layers:
        _check_weight(f"{layer.name}.weight".lstrip("."), layer.rows().flatten(0, 1))
    turned = []
    for layer in layers:
        groups = layer.rows().detach().clone()
        for rows in groups:
            minimum_energy_(rows, progress=layer.name if progress else False, **options)
        turned.append(groups)
    with torch.inference_mode(any(layer.weight.is_inference() for layer in layers)):
        _assign_all(layers, turned)
    return model


@torch.no_grad()
def _assign_all(layers: Sequence[Layer], rows: Sequence[Tensor]) -> None:
    """Write the rows of every layer, or, if one fails, of none."""
    parameters = {p for layer in layers for p in layer.module.parameters()}
    before = [(parameter, parameter.clone()) for parameter in parameters]
    try:
        for layer, groups in zip(layers, rows, strict=True):
            layer.assign(groups)
    except BaseException:
        for parameter, value in before:
            parameter.copy_(value)
        raise


def _check_weight(name: str, weight: Tensor) -> None:
    """Raise before anything is computed if the rows cannot be turned."""
    check_tensor(name, weight)
    if weight.is_meta:
        raise TypeError(
            f"`{name}` must hold numbers, got a meta tensor: allocate it and give it values before"
        )
    if weight.dim() < 2:
        raise ValueError(f"`{name}` must be at least 2-D, got shape {tuple(weight.shape)}")
    if 0 in weight.shape[1:]:
        raise ValueError(f"`{name}` must have at least one column, got shape {tuple(weight.shape)}")
    finite = weight.detach().flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        row = int(finite.logical_not().nonzero()[0])
        raise ValueError(f"`{name}` must be finite, got NaN or infinity in row {row}")


def _settle_(
    rows: Tensor,
    settings: Settings,
    steps: int,
    patience: int,
    tolerance: float,
    advance: Callable[[int], object],
) -> None:
    """Minimize the energy of unit `rows` in place, without projections.

    In few dimensions neighbours are close, and no step size suits them and the rest: the curvature
    goes as 1/r^(s + 2). L-BFGS finds one, and nothing is drawn that could disturb it.
    """
    leaf = rows.detach().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [leaf],
        history_size=5,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def evaluate() -> Tensor:
        energy, leaf.grad = _energy_and_gradient(leaf, None, settings)
        return energy

    energies = [float(evaluate())]
    while steps > 0:
        count = min(patience, steps)
        optimizer.param_groups[0].update(max_iter=count, max_eval=2 * count)
        optimizer.step(evaluate)
        energies.append(float(evaluate()))
        advance(count)
        steps -= count
        # written so that it is over where one of them is NaN
        if not energies[-2] - energies[-1] > tolerance * (energies[0] - energies[-1]):
            break
    _normalize_(rows)


class _Plateau:
    """Tells when a window of steps lowers the energy by too little of what was won before."""

    def __init__(self, patience: int, tolerance: float) -> None:
        self.patience, self.tolerance = patience, tolerance
        self.window: list[Tensor] = []
        self.means: list[float] = []

    def reached(self, energy: Tensor) -> bool:
        """Add the energy of a step, and tell whether the last window won too little."""
        self.window.append(energy)
        if len(self.window) < self.patience:
            return False
        # one synchronization with the device for a whole window
        self.means.append(float(torch.stack(self.window).mean()))
        self.window.clear()
        if len(self.means) < 2:
            return False
        before = min(self.means[:-1])
        return before - self.means[-1] < self.tolerance * (self.means[0] - self.means[-1])


def _normalize_(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Normalize rows in place, except zero ones, and return two factors of their lengths.

    The largest entry is divided out first, so that no square overflows or vanishes.
    """
    largest = torch.linalg.vector_norm(rows, math.inf, dim=1, keepdim=True)
    largest.masked_fill_(largest == 0, 1.0)
    lengths = torch.linalg.vector_norm(rows.div_(largest), dim=1, keepdim=True)
    rows.div_(lengths.masked_fill(lengths == 0, 1.0))
    return largest, lengths


def _energy_and_gradient(
    rows: Tensor, matrices: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = rows.detach().requires_grad_()
        energy = total_energy([Part(leaf.unsqueeze(0), matrices)], settings)
        (gradient,) = torch.autograd.grad(energy, leaf)
    return energy.detach(), gradient
