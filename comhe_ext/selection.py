"""Which layers of a model are regularized, and as what."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from comhe_ext.checks import check_factor, quote
from comhe_ext.layers import CONVOLUTIONS, Layer, LeftOut, Survey, survey
from comhe_ext.output_layer import OutputLayer, find_output_layer
from comhe_ext.selectors import Selector, Split, check_pattern

# factor of the output layer in the paper
OUTPUT_WEIGHT = 10.0


class Factors(dict[str | None, float]):
    """{layer: factor}, 1 for layers that are not named."""

    def __missing__(self, name: str | None) -> float:
        return 1.0


@dataclass(frozen=True)
class Selection:
    """What was found in a model when it was last looked at."""

    layers: list[Layer]
    left_out: list[LeftOut]
    first_layer: str | None
    output: OutputLayer
    factors: Factors
    modules: list[nn.Module]  # all of the model


@dataclass(frozen=True)
class Choice:
    """Which layers a user wants; the arguments of `comhe_ext.CoMHE` of these names."""

    include: tuple[Selector, ...] | None
    exclude: tuple[Selector, ...]
    split: Mapping[str, Split]
    transpose: tuple[str, ...]
    first_layer: str | None
    output_layer: str | None
    weight: float | Mapping[str, float]
    output_weight: float | None

    def survey(self, model: nn.Module) -> Survey:
        return survey(model, self.include, self.exclude, self.split, self.transpose)

    def select(self, model: nn.Module) -> Selection:
        """Find the layers in the model as it is now."""
        layers, left_out = self.survey(model)
        if not layers:
            why = "; ".join(f"{name!r}: {reason}" for name, reason in left_out[:5])
            raise ValueError(
                "`model` must have a layer of two or more neurons that `include` and `exclude` "
                "leave, found none: Linear and convolution layers are taken by default"
                + (f" ({why})" if why else "")
            )
        names = [layer.name for layer in layers]
        first = _checked("first_layer", self.first_layer, names)
        if first == "auto":
            first = _first_layer(model)
            first = first if first in names else None
        name = _checked("output_layer", self.output_layer, names)
        if name == "auto":
            output = find_output_layer(model, layers)
        else:
            output = OutputLayer(name, "as given")
        factors = self._factors_of(layers, output.name)
        return Selection(layers, left_out, first, output, factors, list(model.modules()))

    def check_unchanged(self, model: nn.Module, selection: Selection) -> None:
        """Raise if a model has other layers than when the selection was made."""
        if torch.compiler.is_compiling():
            return
        try:
            changed = self._changed(model, selection)
        except (TypeError, ValueError) as error:
            raise RuntimeError(
                f"the model was changed after `CoMHE` was made, and has no such layers any more: "
                f"{error}. Make a new one"
            ) from error
        if changed:
            raise RuntimeError(
                f"the model was changed after `CoMHE` was made: layers {changed} are other ones "
                "now, or gone. Call `refresh()`"
            )

    def _changed(self, model: nn.Module, selection: Selection) -> list[str]:
        """List the layers that were added, removed or replaced since the selection was made."""
        if _same(list(model.modules()), selection.modules):
            return []
        before = {layer.name: layer for layer in selection.layers}
        now = {layer.name: layer for layer in self.survey(model).layers}
        return [
            name
            for name in {**before, **now}
            if name not in before
            or name not in now
            or before[name].module is not now[name].module
            or before[name].shape != now[name].shape
        ]

    def _factors_of(self, layers: list[Layer], output: str | None) -> Factors:
        """Choose the factor of each layer."""
        factors = Factors()
        names = [layer.name for layer in layers]
        patterns: Mapping[str, float] = {}
        if isinstance(self.weight, Mapping):
            for pattern, factor in self.weight.items():
                if not isinstance(pattern, str):
                    raise TypeError(f"`weight` must have patterns for keys, got {quote(pattern)}")
                check_pattern(pattern, names)
                check_factor("weight", factor)
            patterns = self.weight
        else:
            factor = check_factor("weight", self.weight)
            factors.update(dict.fromkeys(names, factor))
        fitting = {
            layer.name: next((f for p, f in patterns.items() if layer.matches(p)), None)
            for layer in layers
        }
        factors.update({name: float(f) for name, f in fitting.items() if f is not None})
        if self.output_weight is not None:
            given = check_factor("output_weight", self.output_weight)
            if output is not None and output in patterns:
                raise ValueError(
                    f"`weight` and `output_weight` must not both name the output layer {output!r}, "
                    f"got {patterns[output]:g} and {given:g}"
                )
            if output is not None:
                factors[output] = given
        elif output is not None and fitting[output] is None:
            factors[output] = OUTPUT_WEIGHT
        return Factors({name: factors[name] for name in names})


def _same(left: list[nn.Module], right: list[nn.Module]) -> bool:
    """Tell whether both lists hold the very same modules."""
    return len(left) == len(right) and all(map(_is, left, right))


def _is(left: object, right: object) -> bool:
    return left is right


def _checked(argument: str, name: str | None, names: list[str]) -> str | None:
    """Return the name of an existing layer, "auto" or None."""
    if name is not None and name != "auto" and name not in names:
        raise ValueError(f"`{argument}` must be one of {names}, got {quote(name)}")
    return name


def _first_layer(model: nn.Module) -> str | None:
    """Find the first layer with neurons, if it is a convolution."""
    for name, module in model.named_modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            return name if isinstance(module, CONVOLUTIONS) else None
    return None
