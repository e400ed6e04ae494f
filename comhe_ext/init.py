"""Weights of least hyperspherical energy, in the style of `torch.nn.init`."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from comhe_ext import functional, ops
from comhe_ext.layers import Selector, Split, find_layers
from comhe_ext.projections import random_projection


def minimum_energy_(
    weight: Tensor,
    *,
    num_projections: int = 20,
    dim: int = 40,
    s: float = 2.0,
    half_space: bool = True,
    angular: bool = False,
    steps: int = 1000,
    lr: float = 0.5,
    momentum: float = 0.9,
    patience: int = 100,
    tolerance: float = 1e-3,
    generator: Generator | None = None,
    progress: bool | str = False,
    backend: functional.Backend | None = None,
) -> Tensor:
    """Turn the rows of `weight` in place to directions of low hyperspherical energy.

    Torch equivalent::

        for step in range(steps):    # by SGD with momentum and a cosine schedule
            energy = compressive_energy(weight, random_projection(20, 40, d), half_space=True)

    The rows keep their lengths. Rows of no more than `dim` columns are not projected. Fresh
    projections are drawn each step; the gradient descended is that of N/2 times the mean energy, so
    that a row's step does not depend on how many there are, in units of the row's length.

    Args:
        weight: [N, d], or [N, ...] of a convolution, whose rows are its filters.
        num_projections: C, matrices drawn each step.
        dim: k, the dimension projected to.
        s, half_space, angular, backend: see `comhe_ext.hyperspherical_energy`.
        steps: at most.
        lr: of the first step; it falls to 0 as half a cosine.
        momentum: of SGD.
        patience, tolerance: stop when `patience` steps together lower the mean energy by less than
            `tolerance` of what has been won so far; tolerance 0 does all steps.
        generator: source of the projections, on the device of `weight`.
        progress: show a bar, under this title; needs the package tqdm.

    Returns:
        `weight`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Note:
        Memory: four times that of `weight`, in float32, and 2 C N k numbers.

    Source: RP-CoMHE of Lin et al. (2020), as an initializer: Qiu et al. (2025), POET.
    """
    functional.check_tensor("weight", weight)
    settings = functional.Settings(s, half_space, angular, backend=backend)
    settings.options([weight])
    if weight.dim() < 2:
        raise ValueError(f"`weight` must be at least 2-D, got shape {tuple(weight.shape)}")
    for argument, count in (
        ("num_projections", num_projections),
        ("dim", dim),
        ("steps", steps),
        ("patience", patience),
    ):
        functional.check_count(argument, count)
    for argument, number in (("lr", lr), ("momentum", momentum), ("tolerance", tolerance)):
        if not functional.check_number(argument, number) >= 0:
            raise ValueError(f"`{argument}` must be at least 0, got {number}")

    with torch.no_grad():
        rows = weight.flatten(1).to(ops.compute_dtype(weight), copy=True)
        n, width = rows.shape
        lengths = _normalize_(rows)
        velocity = torch.zeros_like(rows)
        plateau = _Plateau(patience, tolerance)
        with _bar(steps, progress) as advance:
            for step in range(steps):
                matrices = None
                if width > dim:
                    matrices = random_projection(
                        num_projections,
                        dim,
                        width,
                        generator=generator,
                        device=rows.device,
                        dtype=rows.dtype,
                    )
                energy, gradient = _energy_and_gradient(rows, matrices, settings)
                velocity.mul_(momentum).add_(gradient, alpha=n)
                rows.sub_(velocity, alpha=lr * (1 + math.cos(math.pi * step / steps)) / 2)
                _normalize_(rows)
                advance()
                if plateau.reached(energy):
                    break
        return weight.copy_(rows.mul_(lengths).view(weight.shape))


def minimum_energy_model_(
    model: nn.Module,
    *,
    include: Iterable[Selector] | None = None,
    exclude: Iterable[Selector] = (),
    split: Mapping[str, Split] | None = None,
    progress: bool = False,
    **options: Any,
) -> nn.Module:
    """Apply `minimum_energy_` to every layer of `model`, one after the other.

    Args:
        model: its layers are found as `comhe_ext.CoMHE` finds them, its output layer among them;
            filters of different convolution groups do not meet.
        include, exclude, split: see `comhe_ext.CoMHE`.
        progress: show a bar for each layer; needs the package tqdm.
        options: see `minimum_energy_`.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: as `minimum_energy_`; no layer is changed where a name is wrong.
    """
    for layer in find_layers(model, include, exclude, split):
        groups = layer.rows().detach().clone()
        for rows in groups:
            minimum_energy_(rows, progress=layer.name if progress else False, **options)
        layer.assign(groups)
    return model


class _Plateau:
    """Tells when a window of steps wins too little of what has been won since the first one."""

    def __init__(self, patience: int, tolerance: float) -> None:
        self.patience, self.tolerance = patience, tolerance
        self.window: list[Tensor] = []
        self.means: list[float] = []

    def reached(self, energy: Tensor) -> bool:
        self.window.append(energy)
        if len(self.window) < self.patience:
            return False
        # one look at the device for a whole window
        self.means.append(float(torch.stack(self.window).mean()))
        self.window.clear()
        if len(self.means) < 2:
            return False
        before = min(self.means[:-1])
        return before - self.means[-1] < self.tolerance * (self.means[0] - self.means[-1])


def _normalize_(rows: Tensor) -> Tensor:
    """Unit rows in place, zero ones as they are; returns the lengths."""
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows.div_(lengths.masked_fill(lengths == 0, 1.0))
    return lengths


def _energy_and_gradient(
    rows: Tensor, matrices: Tensor | None, settings: functional.Settings
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = rows.detach().requires_grad_()
        energy = functional.total_energy([leaf.unsqueeze(0)], [matrices], [1.0], settings.options)
        (gradient,) = torch.autograd.grad(energy, leaf)
    return energy.detach(), gradient


@contextmanager
def _bar(steps: int, progress: bool | str) -> Iterator[Callable[[], object]]:
    """What to call after each step."""
    if not progress:
        yield lambda: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "`progress` needs the package tqdm: pip install 'comhe-ext[progress]'"
        ) from error
    title = progress if isinstance(progress, str) else "minimum_energy_"
    with tqdm(total=steps, desc=title) as bar:
        yield bar.update
