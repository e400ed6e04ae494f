"""CoMHE as a regularizer of a whole model: `loss = task_loss + comhe()`."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from comhe_ext import bounds, functional
from comhe_ext.layers import (
    CONVOLUTIONS,
    Layer,
    Selector,
    Split,
    check_pattern,
    find_layers,
)
from comhe_ext.projections import (
    AdversarialProjection,
    AngleProjection,
    GroupProjection,
    Projection,
    RandomProjection,
)

PROJECTIONS: dict[str, type[Projection]] = {
    "random": RandomProjection,
    "angle-preserving": AngleProjection,
    "adversarial": AdversarialProjection,
    "group": GroupProjection,
}


class LayerEnergy(NamedTuple):
    """The energy of a layer as it is, and what to hold it against."""

    energy: float
    random: float  # expected of independent random directions, as many and as wide
    lowest: float  # no configuration has less: the simplex bound, in half space that of Welch


class Energies(dict[str, LayerEnergy]):
    """{layer: its energy}; `table()` shows it."""

    def table(self, format: str = "github") -> str:
        """A table in one of the formats of the package tabulate, which has to be installed."""
        try:
            from tabulate import tabulate
        except ImportError as error:
            raise ImportError(
                "a table needs the package tabulate: pip install 'comhe-ext[table]'"
            ) from error
        rows = [(name, *values) for name, values in self.items()]
        headers = ("layer", *LayerEnergy._fields)
        text: str = tabulate(rows, headers, tablefmt=format, floatfmt=".4f")
        return text


class CoMHE(nn.Module):
    """Sum over a model's layers of their compressive (projected) hyperspherical energies.

    Torch equivalent::

        hidden = sum(compressive_energy(w, random_projection(20, 40, w.shape[1]), half_space=True)
                     for w in hidden_weights)
        comhe = hidden + 10 * hyperspherical_energy(output_weight)

    with one sweep over the projected rows of all hidden layers together. Use::

        comhe = CoMHE(model)
        loss = task_loss(model(x), y) + comhe()

    The neurons are the rows of a Linear weight and the filters of a convolution, group by group.
    The defaults are the settings of the paper and of the authors' code: hidden layers in half
    space and projected, the first convolution in half space and unprojected, the output layer in
    full space, unprojected, with weight 10. Layers of no more inputs than a projection has
    dimensions stay unprojected. Each call in training mode, with gradients enabled, is a step.

    Args:
        model: its layers are found now, their weights read at each call. A weight that several
            layers share counts once; frozen weights are left out.
        projection: "random", "angle-preserving", "adversarial" or "group" with the defaults of the
            authors' code, a `comhe_ext.projections.Projection`, or None for plain MHE.
        s, angular, eps, min_distance, backend: see `comhe_ext.hyperspherical_energy`.
        half_space: whether layers other than the output layer use the half-space energy; the
            output layer never does, for a class is not its opposite.
        include: module types and glob patterns of names; a layer is taken if one of them fits. None
            takes Linear, convolution and transposed convolution layers. On request only: embeddings
            and the Linear heads tied to them (nn.Embedding), packed queries, keys and values
            (nn.MultiheadAttention, three sets).
        exclude: module types and patterns of what is left out all the same.
        split: {pattern: number of equal parts, or rows of each part} of packed weights: the parts
            do not meet each other. {"*.qkv": 3} for packed queries, keys and values.
        first_layer: name of a layer to leave unprojected; "auto" is the first layer of the model
            if it is a convolution, None says that there is none.
        output_layer: name of the output layer; "auto" asks the model (`get_output_embeddings`,
            `get_classifier`) and else takes the layer registered last, None says that there is
            none.
        weight: factor of the mean energy of every other layer, or {pattern: factor}, 1 for layers
            that none fits.
        output_weight: factor of the output layer's.
        every: only every so many steps the energy is computed, and then that many times as heavy;
            0 at the others.
        warm_up: steps over which the factor rises linearly to its full value.

    Raises:
        TypeError: `model` is not a module, or an argument has the wrong type.
        ValueError: `model` has no layer to regularize, a name or pattern fits none, or an option is
            out of range.

    Shape: no input; returns the weighted sum of the energies, [], float32 (float64 if a weight is).

    Source: Lin et al. (2020), RP-CoMHE, AP-CoMHE; Liu et al. (2018), HS-MHE.
    """

    def __init__(
        self,
        model: nn.Module,
        projection: str | Projection | None = "random",
        *,
        s: float = 2.0,
        half_space: bool = True,
        angular: bool = False,
        eps: float = 0.0,
        min_distance: float = 1e-3,
        include: Iterable[Selector] | None = None,
        exclude: Iterable[Selector] = (),
        split: Mapping[str, Split] | None = None,
        first_layer: str | None = "auto",
        output_layer: str | None = "auto",
        weight: float | Mapping[str, float] = 1.0,
        output_weight: float = 10.0,
        every: int = 1,
        warm_up: int = 0,
        backend: functional.Backend | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
        # a list, not a ModuleList: the layers belong to the model
        self._layers = find_layers(model, include, exclude, split)
        if not self._layers:
            raise ValueError(
                "`model` must have a layer of two or more neurons that `include` and `exclude` "
                "leave, found none: Linear and convolution layers are taken by default"
            )
        self.first_layer = self._checked("first_layer", first_layer, _first_layer(model))
        self.output_layer = self._checked("output_layer", output_layer, self._output_layer(model))
        self._factors = self._factors_of(weight)
        if self.output_layer is not None:
            self._factors[self.output_layer] = functional.check_number(
                "output_weight", output_weight
            )
        self.every = functional.check_count("every", every)
        self.warm_up = functional.check_count("warm_up", warm_up, least=0)
        self._settings = functional.Settings(
            s, half_space, angular, "mean", eps, min_distance, backend
        )
        # an option that is out of range is refused here, not at the first step
        self._settings.options([self._layers[0].weight])
        self._step = torch.zeros((), dtype=torch.int64)
        self.projection = _make_projection(projection)
        if self.projection is not None:
            self.projection.bind([x for x in self._layers if self._is_projected(x)], self._settings)

    def forward(self) -> Tensor:
        stepping = self.training and torch.is_grad_enabled()
        if stepping:
            self._step += 1
            # not asked for by default: a graph of torch.compile cannot branch on the step
            if self.every > 1 and int(self._step) % self.every:
                return self._zero()
        with parametrize.cached():
            if stepping and self.projection is not None:
                self.projection.step()
            total = self._energy()
        if self.every > 1:
            total = total * self.every
        if self.warm_up:
            total = total * (self._step / self.warm_up).clamp(max=1.0).to(total.dtype)
        return total

    def accumulate_gradients(
        self, scaler: torch.amp.GradScaler | None = None, *, scale: float = 1.0
    ) -> Tensor:
        """Add the gradient of `self()` to the `.grad` of the parameters, and return the energy.

        What `(scale * self()).backward()` does, without the graph of the model, and without the
        hooks by which DistributedDataParallel reduces gradients: to be called between the backward
        of the task and the optimizer's step.

        Args:
            scaler: of a loss whose gradients are still scaled; the regularizer's are scaled alike.
            scale: factor of the gradient; 1/n where it is called for each of n batches of one step.
        """
        with torch.enable_grad():
            energy = self()
        parameters = {
            id(parameter): parameter
            for layer in self._layers
            for parameter in layer.module.parameters(recurse=True)
            if parameter.requires_grad
        }
        leaves = list(parameters.values())
        if not energy.requires_grad:
            return energy
        factor = torch.full_like(energy, scale)
        if scaler is not None:
            factor = scaler.scale(factor)
        gradients = torch.autograd.grad(energy, leaves, factor, allow_unused=True)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is None:
                continue
            if leaf.grad is None:
                leaf.grad = gradient.detach()
            else:
                leaf.grad += gradient
        return energy.detach()

    @torch.no_grad()
    def energies(self) -> Energies:
        """The energy of every layer as it is, unprojected, frozen ones included.

        Returns:
            {layer: (energy, random, lowest)}, in half space where the regularizer is; `random` is
            what independent random directions are expected to have, `lowest` a lower bound.
        """
        energies = Energies()
        for layer in self._layers:
            rows = layer.rows()
            settings = self._settings_of(layer)
            energy = functional.set_energies([rows], settings.options([rows])).mean()
            shape = (rows.shape[1], rows.shape[2], float(settings.s))
            options = {"half_space": settings.half_space, "angular": settings.angular}
            energies[layer.name] = LayerEnergy(
                float(energy),
                bounds.random_energy(*shape, **options),
                bounds.lowest_energy(*shape, **options),
            )
        return energies

    def get_extra_state(self) -> Tensor:
        return self._step.clone()

    def set_extra_state(self, state: Tensor) -> None:
        self._step = state.clone()

    def extra_repr(self) -> str:
        return (
            f"{len(self._layers)} layers, first_layer={self.first_layer!r}, "
            f"output_layer={self.output_layer!r}"
        )

    def _energy(self) -> Tensor:
        """The weighted sum of this step."""
        learning = [layer for layer in self._layers if layer.learns()]
        rows = {layer.name: layer.rows() for layer in learning}
        views: dict[str, tuple[Tensor, Tensor | None]] = {n: (x, None) for n, x in rows.items()}
        if self.projection is not None:
            projected = {x.name: rows[x.name] for x in learning if self._is_projected(x)}
            views.update(self.projection.views(projected))
        output = self.output_layer
        hidden = [name for name in rows if name != output]
        totals = [
            functional.total_energy(
                [views[name][0] for name in names],
                [views[name][1] for name in names],
                [self._factors[name] for name in names],
                settings.options,
            )
            for names, settings in (
                (hidden, self._settings),
                ([output] if output in rows else [], self._settings._replace(half_space=False)),
            )
            if names
        ]
        return functional.add(totals) if totals else self._zero()

    def _zero(self) -> Tensor:
        weight = self._layers[0].weight
        return weight.new_zeros((), dtype=torch.promote_types(weight.dtype, torch.float32))

    def _is_projected(self, layer: Layer) -> bool:
        if self.projection is None or layer.name in (self.first_layer, self.output_layer):
            return False
        return self.projection.dim is None or layer.rows().shape[2] > self.projection.dim

    def _settings_of(self, layer: Layer) -> functional.Settings:
        half_space = self._settings.half_space and layer.name != self.output_layer
        return self._settings._replace(half_space=half_space)

    def _checked(self, argument: str, name: str | None, default: str | None) -> str | None:
        """The name of a layer that is there."""
        names = [layer.name for layer in self._layers]
        if name == "auto":
            return default if default in names else None
        if name is not None and name not in names:
            raise ValueError(f"`{argument}` must be one of {names}, got {name!r}")
        return name

    def _output_layer(self, model: nn.Module) -> str | None:
        for ask in ("get_output_embeddings", "get_classifier"):
            head = getattr(model, ask)() if hasattr(model, ask) else None
            if isinstance(head, nn.Module) and hasattr(head, "weight"):
                # by its weight: of tied layers only one is listed
                return next((x.name for x in self._layers if x.weight is head.weight), None)
        return self._layers[-1].name

    def _factors_of(self, weight: float | Mapping[str, float]) -> dict[str, float]:
        """The factor of each layer."""
        if not isinstance(weight, Mapping):
            factor = functional.check_number("weight", weight)
            return {layer.name: factor for layer in self._layers}
        for pattern in weight:
            check_pattern(pattern, [layer.name for layer in self._layers])
        return {
            layer.name: next(
                (
                    functional.check_number("weight", factor)
                    for pattern, factor in weight.items()
                    if layer.matches(pattern)
                ),
                1.0,
            )
            for layer in self._layers
        }


def _make_projection(projection: str | Projection | None) -> Projection | None:
    if projection is None or isinstance(projection, Projection):
        return projection
    if not isinstance(projection, str) or projection not in PROJECTIONS:
        raise ValueError(
            f"`projection` must be one of {list(PROJECTIONS)}, a Projection or None, "
            f"got {projection!r}"
        )
    return PROJECTIONS[projection]()


def _first_layer(model: nn.Module) -> str | None:
    """The first layer with neurons, if it is a convolution."""
    for name, module in model.named_modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            return name if isinstance(module, CONVOLUTIONS) else None
    return None
