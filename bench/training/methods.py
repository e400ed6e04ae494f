"""What is compared: nothing, two controls, and the energies.

A method is built for a model and a weight; it is called once a step for the penalty, or None where
it has none, and `after_step` follows each step of the optimizer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from comhe_ext import CoMHE, losses
from comhe_ext.projections import (
    AdversarialProjection,
    AngleProjection,
    GroupProjection,
    Projection,
    RandomProjection,
)

OUTPUT = "output"  # the name of the output layer in the networks here


@dataclass(frozen=True)
class Strength:
    """How strongly a method acts, and how it sums."""

    weight: float = 1.0  # of each hidden layer's energy
    output_weight: float = 10.0
    dim: int = 40  # k
    num_projections: int = 20  # C, of random matrices
    method: Literal["exact", "sampled"] = "exact"
    seed: int = 0


class Penalty(nn.Module):
    """No penalty: the loss of the task alone."""

    def __init__(self, model: nn.Module, strength: Strength) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: the weights are not this module's own
        self.strength = strength

    def weights(self) -> dict[str, Tensor]:
        """Give the rows [N, d] of each hidden layer."""
        return {
            name: module.weight.flatten(1)
            for name, module in self._model[0].named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear)) and name != OUTPUT
        }

    def forward(self) -> Tensor | None:
        return None

    def after_step(self) -> None:
        """Change the weights after a step of the optimizer."""


class HeldNorms(Penalty):
    """The control: rows keep the lengths that they began with, and no direction is pushed.

    Under batch normalization a row's length does not change what the network computes, but sets how
    far a step turns it, and so do weight decay and soft orthogonality.
    """

    def __init__(self, model: nn.Module, strength: Strength) -> None:
        super().__init__(model, strength)
        for name, rows in self.weights().items():
            self.register_buffer(self._buffer(name), rows.detach().norm(dim=1, keepdim=True))

    @staticmethod
    def _buffer(name: str) -> str:
        return name.replace(".", "_")

    @torch.no_grad()
    def after_step(self) -> None:
        for name, rows in self.weights().items():
            length = self.get_buffer(self._buffer(name))
            rows.mul_(length / rows.norm(dim=1, keepdim=True).clamp_min(1e-12))


class SoftOrthogonality(Penalty):
    """Sum |W W^T - I|^2 over the hidden layers, of W^T W where there are more rows than columns.

    Source: Bansal et al. (2018), SO.
    """

    def forward(self) -> Tensor:
        penalties = []
        for w in self.weights().values():
            gram = w @ w.mT if w.shape[0] <= w.shape[1] else w.mT @ w
            penalties.append((gram - torch.eye(len(gram), device=w.device)).square().sum())
        return self.strength.weight * torch.stack(penalties).sum()


class MinimalAngle(Penalty):
    """Sum `losses.minimal_angle` over the hidden layers and the output layer (MMA)."""

    def forward(self) -> Tensor:
        hidden = [losses.minimal_angle(w) for w in self.weights().values()]
        output = losses.minimal_angle(self._model[0].get_parameter(f"{OUTPUT}.weight"))
        strength = self.strength
        return strength.weight * torch.stack(hidden).sum() + strength.output_weight * output


class Energy(Penalty):
    """`CoMHE` with one of its projections."""

    def __init__(
        self,
        model: nn.Module,
        strength: Strength,
        projection: Callable[[Strength], Projection | None],
        half_space: bool = True,
    ) -> None:
        super().__init__(model, strength)
        self.comhe = CoMHE(
            model,
            projection(strength),
            half_space=half_space,
            output_layer=OUTPUT,
            weight=strength.weight,
            output_weight=strength.output_weight,
            method=strength.method,
        )

    def forward(self) -> Tensor:
        return self.comhe()


def _random(strength: Strength) -> Projection:
    return RandomProjection(strength.num_projections, strength.dim, seed=strength.seed)


def _angle(mode: Literal["alternating", "unrolled"]) -> Callable[[Strength], Projection]:
    return lambda strength: AngleProjection(dim=30, mode=mode, seed=strength.seed)


def _energy(
    projection: Callable[[Strength], Projection | None], **options: Any
) -> Callable[[nn.Module, Strength], Penalty]:
    return lambda model, strength: Energy(model, strength, projection, **options)


METHODS: dict[str, Callable[[nn.Module, Strength], Penalty]] = {
    "none": Penalty,
    "norms held": HeldNorms,
    "soft orthogonality": SoftOrthogonality,
    "MMA": MinimalAngle,
    "MHE": _energy(lambda strength: None, half_space=False),
    "half-space MHE": _energy(lambda strength: None),
    "RP-CoMHE": _energy(_random),
    "AP-CoMHE": _energy(_angle("alternating")),
    "AP-CoMHE, unrolled": _energy(_angle("unrolled")),
    "adversarial CoMHE": _energy(
        lambda strength: AdversarialProjection(dim=30, seed=strength.seed)
    ),
    "group CoMHE": _energy(lambda strength: GroupProjection()),
}
WITHOUT_WEIGHT = ("none", "norms held")
