"""The losses as modules, which keep their options."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from comhe_ext.checks import check_backend
from comhe_ext.losses.classes import (
    angular_visual_hardness,
    covering,
    polarization,
    sphereface_plus,
)
from comhe_ext.losses.nearest_rows import koleo, minimal_angle, regular_face, separation
from comhe_ext.losses.spread import dispersion, frame_potential, mean_cosine, uniformity
from comhe_ext.losses.views import dhel, gram, kcl


class Loss(nn.Module):
    """The base of all losses as modules: options when it is made, tensors when it is called.

    Options are checked when the module is made. There are no parameters and no buffers.
    """

    function: Callable[..., Tensor]

    def __init_subclass__(
        cls, *, function: Callable[..., Tensor] | None = None, **rest: Any
    ) -> None:
        """Take signature and documentation from the function."""
        super().__init_subclass__(**rest)
        if function is None:  # a subclass of a loss
            return
        cls.function = staticmethod(function)
        parameters = inspect.signature(function).parameters.values()
        options = [x for x in parameters if x.annotation is not Tensor]
        cls.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [x.replace(kind=inspect.Parameter.KEYWORD_ONLY) for x in options]
        )
        cls.__doc__ = f"{cls.__doc__}\n\n{inspect.getdoc(function)}"

    def __init__(self, **options: Any) -> None:
        super().__init__()
        parameters = inspect.signature(type(self)).parameters
        for name in options:
            if name not in parameters:
                raise TypeError(f"{type(self).__name__} has no option {name!r}")
        backend = options.get("backend")
        if backend is not None:
            check_backend(backend)
        self.options = options
        # the function checks the other options, of sets without rows: there is nothing to compute.
        # Which backends work is known where the tensors are
        trial = options | {"backend": "torch"} if "backend" in parameters else options
        self.function(*_without_rows(inspect.signature(self.function).parameters.values()), **trial)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _without_rows(parameters: Iterable[inspect.Parameter]) -> list[Tensor]:
    """Make the tensors that a loss takes, with no row in them."""
    rows = torch.empty(0, 1, device="cpu", dtype=torch.float32)
    special = {"labels": torch.empty(0, device="cpu", dtype=torch.int64), "pole": rows.new_ones(1)}
    return [special.get(x.name, rows) for x in parameters if x.annotation is Tensor]


class AngularVisualHardness(Loss, function=angular_visual_hardness):
    """Compute `comhe_ext.losses.angular_visual_hardness` as a module."""


class Covering(Loss, function=covering):
    """Compute `comhe_ext.losses.covering` as a module."""


class DHEL(Loss, function=dhel):
    """Compute `comhe_ext.losses.dhel` as a module."""


class Dispersion(Loss, function=dispersion):
    """Compute `comhe_ext.losses.dispersion` as a module."""


class FramePotential(Loss, function=frame_potential):
    """Compute `comhe_ext.losses.frame_potential` as a module."""


class Gram(Loss, function=gram):
    """Compute `comhe_ext.losses.gram` as a module."""


class KCL(Loss, function=kcl):
    """Compute `comhe_ext.losses.kcl` as a module."""


class KoLeo(Loss, function=koleo):
    """Compute `comhe_ext.losses.koleo` as a module."""


class MeanCosine(Loss, function=mean_cosine):
    """Compute `comhe_ext.losses.mean_cosine` as a module."""


class MinimalAngle(Loss, function=minimal_angle):
    """Compute `comhe_ext.losses.minimal_angle` as a module."""


class Polarization(Loss, function=polarization):
    """Compute `comhe_ext.losses.polarization` as a module."""


class RegularFace(Loss, function=regular_face):
    """Compute `comhe_ext.losses.regular_face` as a module."""


class Separation(Loss, function=separation):
    """Compute `comhe_ext.losses.separation` as a module."""


class SphereFacePlus(Loss, function=sphereface_plus):
    """Compute `comhe_ext.losses.sphereface_plus` as a module."""


class Uniformity(Loss, function=uniformity):
    """Compute `comhe_ext.losses.uniformity` as a module."""
