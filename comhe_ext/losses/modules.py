"""The losses as modules, which keep their options."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from comhe_ext.losses.classes import (
    angular_visual_hardness,
    covering,
    polarization,
    sphereface_plus,
)
from comhe_ext.losses.nearest_rows import koleo, minimal_angle, regular_face, separation
from comhe_ext.losses.spread import dispersion, frame_potential, mean_cosine, uniformity
from comhe_ext.losses.views import dhel, gram, kcl


class _Loss(nn.Module):
    """A loss of this file as a module, which keeps its options."""

    function: Callable[..., Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = inspect.signature(self.function).parameters
        tensors = [name for name, x in known.items() if x.annotation is Tensor]
        for name in options:
            if name not in known or name in tensors:
                raise TypeError(f"got an unexpected keyword argument {name!r}")
        self.options = options

    def forward(self, *tensors: Tensor) -> Tensor:
        return type(self).function(*tensors, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _module(name: str, function: Callable[..., Tensor]) -> type[_Loss]:
    """Make the module of a loss; it can be pickled, and `help` shows the function's."""
    signature = inspect.signature(function)
    options = [x for x in signature.parameters.values() if x.annotation is not Tensor]
    options = [x.replace(kind=inspect.Parameter.KEYWORD_ONLY) for x in options]
    attributes = {
        "function": staticmethod(function),
        "__doc__": f"Compute `comhe_ext.losses.{function.__name__}` as a module.\n\n"
        + inspect.cleandoc(function.__doc__ or ""),
        "__module__": __name__,
        "__signature__": inspect.Signature(options),
    }
    return type(name, (_Loss,), attributes)


AngularVisualHardness = _module("AngularVisualHardness", angular_visual_hardness)
Covering = _module("Covering", covering)
DHEL = _module("DHEL", dhel)
Dispersion = _module("Dispersion", dispersion)
FramePotential = _module("FramePotential", frame_potential)
Gram = _module("Gram", gram)
KCL = _module("KCL", kcl)
KoLeo = _module("KoLeo", koleo)
MeanCosine = _module("MeanCosine", mean_cosine)
MinimalAngle = _module("MinimalAngle", minimal_angle)
Polarization = _module("Polarization", polarization)
RegularFace = _module("RegularFace", regular_face)
Separation = _module("Separation", separation)
SphereFacePlus = _module("SphereFacePlus", sphereface_plus)
Uniformity = _module("Uniformity", uniformity)
