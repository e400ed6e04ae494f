"""CoMHE as a regularizer of a whole model: `loss = task_loss + comhe()`."""

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from comhe_ext import bounds, functional, ops
from comhe_ext.layers import (
    CONVOLUTIONS,
    Layer,
    LeftOut,
    OutputLayer,
    Selector,
    Split,
    Survey,
    as_patterns,
    as_selectors,
    check_pattern,
    find_output_layer,
    survey,
)
from comhe_ext.projections import (
    AdversarialProjection,
    AngleProjection,
    GroupProjection,
    Projection,
    RandomProjection,
    Views,
)
from comhe_ext.steps import StepCounter, host_tensor, loaded, set_number, unseen_by_checkpoint

ProjectionName: TypeAlias = Literal["random", "angle-preserving", "adversarial", "group"]
PROJECTIONS: dict[str, type[Projection]] = {
    "random": RandomProjection,
    "angle-preserving": AngleProjection,
    "adversarial": AdversarialProjection,
    "group": GroupProjection,
}
# of the paper's output layer
OUTPUT_WEIGHT = 10.0


class LayerEnergy(NamedTuple):
    """The energy of a layer as it is, and what to hold it against."""

    energy: float
    random: float  # expected of independent random directions, as many and as wide
    lowest: float  # no configuration has less: the simplex bound, in half space that of Welch


class Energies(dict[str, LayerEnergy]):
    """{layer: its energy}; `table()` shows it."""

    def table(self, format: str = "github") -> str:
        """A table in one of the formats of the package tabulate."""
        rows = [(name, *values) for name, values in self.items()]
        return _table(rows, ("layer", *LayerEnergy._fields), format)


class RegularizedLayer(NamedTuple):
    """A layer, and what `CoMHE` does with it."""

    name: str
    role: str  # "first", "hidden" or "output"
    sets: int  # of neurons that meet each other: the groups of a convolution
    neurons: int  # N of each set
    inputs: int  # d of each neuron
    factor: float
    half_space: bool
    projected: bool
    learns: bool  # not frozen


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
    dimensions stay unprojected.

    A step is a call in training mode with gradients enabled, unless `auto_step=False`. Calls in one
    `optimizer.step(closure)` are one step; calls that activation checkpointing repeats are none.
    Nothing here changes the model or its buffers.

    Args:
        model: its layers are found now, their weights read at each call, whatever computes them. A
            weight that several layers share counts once; frozen weights are left out.
        projection: "random", "angle-preserving", "adversarial" or "group" with the defaults of the
            authors' code, a `comhe_ext.projections.Projection`, or None for plain MHE.
        s, angular, eps, min_distance, backend: see `comhe_ext.hyperspherical_energy`.
        half_space: whether layers other than the output layer use the half-space energy; the
            output layer never does, for a class is not its opposite.
        include: a module type or glob pattern of names, or several; a layer is taken if one of them
            fits. None takes Linear, convolution and transposed convolution layers. On request only:
            embeddings (without the row of their `padding_idx`) and the Linear heads tied to them,
            packed queries, keys and values (nn.MultiheadAttention, three sets), and, by name,
            parameters [N, d] or [sets, N, d] that are no layer's weight.
        exclude: a type or pattern, or several, of what is left out all the same.
        split: {pattern: number of equal parts, or rows of each part} of packed weights: the parts
            do not meet each other. {"*.qkv": 3} for packed queries, keys and values.
        transpose: a pattern, or several, of the Linear layers and parameters whose columns are the
            neurons.
        first_layer: name of a layer to leave unprojected; "auto" is the first layer of the model
            if it is a convolution, None says that there is none.
        output_layer: name of the output layer, None says that there is none. "auto" asks the model
            or the outermost module in it that answers (`get_output_embeddings`,
            `get_classifier`); where none does, the very last layer of the whole model is taken for
            it, with a warning, unless it is not regularized.
        weight: factor of the mean energy of every other layer; or {pattern: factor} for all layers,
            1 for those that none fits.
        output_weight: factor of the output layer's; None is what `weight` says of it by pattern,
            else 10.
        every: only every so many steps the energy is computed, and then that many times as heavy;
            0 at the others.
        warm_up: steps over which the factor rises linearly to its full value.
        auto_step: False leaves the counting of steps to calls of `step`.

    Raises:
        TypeError: `model` is not a module, a weight that learns is not a dense floating-point
            tensor, or an argument has the wrong type.
        ValueError: `model` has no layer to regularize, a name or pattern fits none, or an option is
            out of range.
        RuntimeError: at a call, if layers were replaced, added or resized; see `refresh`.

    Shape: no input; returns the weighted sum of the energies, [], float32 (float64 if a weight is).

    Note:
        On several ranks all draw the same matrices: without a `seed` of the projection the first
        training step asks the first rank for its own, which all ranks have to make together.

    Source: Lin et al. (2020), RP-CoMHE, AP-CoMHE; Liu et al. (2018), HS-MHE.
    """

    def __init__(
        self,
        model: nn.Module,
        projection: ProjectionName | Projection | None = "random",
        *,
        s: float = 2.0,
        half_space: bool = True,
        angular: bool = False,
        eps: float = 0.0,
        min_distance: float = 1e-3,
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] = (),
        split: Mapping[str, Split] | None = None,
        transpose: str | Iterable[str] = (),
        first_layer: str | None = "auto",
        output_layer: str | None = "auto",
        weight: float | Mapping[str, float] = 1.0,
        output_weight: float | None = None,
        every: int = 1,
        warm_up: int = 0,
        auto_step: bool = True,
        backend: functional.Backend | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
        # in a tuple: the layers belong to the model, not to this module
        self._model = (model,)
        self._include = None if include is None else as_selectors("include", include)
        self._exclude = as_selectors("exclude", exclude)
        self._split = dict(split or {})
        self._transpose = as_patterns("transpose", transpose)
        self._first_layer, self._output_layer = first_layer, output_layer
        self._weight = dict(weight) if isinstance(weight, Mapping) else weight
        self._output_weight = output_weight
        self._find()
        self.every = functional.check_count("every", every)
        self.warm_up = functional.check_count("warm_up", warm_up, least=0)
        if not isinstance(auto_step, bool):
            raise TypeError(f"`auto_step` must be a bool, got {type(auto_step).__name__}")
        self.auto_step = auto_step
        self._settings = functional.Settings(
            s, half_space, angular, "mean", eps, min_distance, backend
        )
        # as the output layer has it: never in half space
        self._full_space = self._settings._replace(half_space=False)
        # an option that is out of range is refused here, not at the first step
        self._settings.options(
            [torch.empty(0, dtype=x.dtype, device=x.device) for x in self._layers[:1]]
        )
        self._step = host_tensor(0)
        self._counter = StepCounter()
        self._warned_of_frozen = False
        self.projection = _make_projection(projection)
        if self.projection is not None:
            self.projection.bind([x for x in self._layers if self._is_projected(x)], self._settings)
        if self._output.guessed and output_layer == "auto":
            name, factor = self.output_layer, self._factors[self.output_layer]
            warnings.warn(
                f"CoMHE takes layer {name!r} for the output layer, {self._output.reason}: its "
                f"energy is that of full space, unprojected, with weight {factor:g}. Say which it "
                f"is (output_layer={name!r}), or that there is none (output_layer=None)",
                stacklevel=2,
            )

    if TYPE_CHECKING:

        def __call__(self) -> Tensor: ...

    def forward(self) -> Tensor:
        self._check_structure()
        steps = self._counter.new_steps() if self.training and self.auto_step else 0
        for _ in range(steps):
            self._count_step()
        # factors belong to training: an evaluation sees the energy itself
        stepping = self.training and torch.is_grad_enabled()
        if stepping and self.every > 1 and int(self._step) % self.every:
            # not asked for by default: a graph of torch.compile cannot branch on the step
            return self._zero()
        total = self._energy(self._read(), steps)
        if stepping and self.every > 1:
            total = total * self.every
        if stepping and self.warm_up:
            total = total * (self._step / self.warm_up).clamp(max=1.0).to(total.dtype)
        return total

    def step(self) -> None:
        """Go on to the next training step, where `auto_step` is False: once before its calls.

        Raises:
            RuntimeError: steps are counted by themselves.
        """
        if self.auto_step:
            raise RuntimeError("`step` is for CoMHE(..., auto_step=False): calls are counted")
        self._check_structure()
        self._count_step()
        if self.projection is not None and int(self._step) % self.every == 0:
            with torch.no_grad():
                self.projection.step(self._projected(self._read()))

    def accumulate_gradients(
        self, scaler: torch.amp.GradScaler | None = None, *, scale: float = 1.0
    ) -> Tensor:
        """Add the gradient of `self()` to the `.grad` of the parameters, and return the energy.

        What `(scale * self()).backward()` leaves, bit for bit, but without the hooks that run when
        a gradient is accumulated, by which DistributedDataParallel reduces gradients: to be called
        between the backward of the task and the optimizer's step.

        Args:
            scaler: of a loss whose gradients are still scaled; the regularizer's are scaled alike.
            scale: factor of the gradient; 1/n where it is called for each of n batches of one step.
        """
        scale = functional.check_factor("scale", scale)
        with torch.enable_grad():
            energy = self()
        if not energy.requires_grad:
            return energy
        factor = torch.full_like(energy, scale)
        if scaler is not None:
            factor = scaler.scale(factor)
        leaves = _leaves(energy)
        # a weight may be part of a graph that is still wanted
        gradients = torch.autograd.grad(energy, leaves, factor, retain_graph=True)
        given: set[int] = set()
        for leaf, gradient in zip(leaves, gradients, strict=True):
            # one tensor may be the gradient of several leaves, and none may see another's sums
            alias = gradient.data_ptr() in given
            given.add(gradient.data_ptr())
            # by autograd itself, which knows of strides and sparse gradients, on a tensor that has
            # none of the leaf's hooks
            stand_in = leaf.detach().requires_grad_()
            stand_in.grad = leaf.grad
            torch.autograd.backward(
                stand_in.view_as(stand_in), gradient.clone() if alias else gradient
            )
            leaf.grad = stand_in.grad
        return energy.detach()

    @torch.no_grad()
    def energies(self) -> Energies:
        """The energy of every layer as it is, unprojected, frozen ones included.

        Returns:
            {layer: (energy, random, lowest)}, in half space where the regularizer is; `random` is
            what independent random directions are expected to have, `lowest` a lower bound.
        """
        self._check_structure()
        energies = Energies()
        for layer in self._layers:
            rows = self._rows_of(layer, layer.weight)
            settings = self._settings_of(layer)
            energy = functional.set_energies([rows], settings.options([rows])).mean()
            # of the sets of a layer, those whose dead rows allow the least
            dead = {int(count) for count in (rows == 0).all(2).sum(1)}
            n, d, s = rows.shape[1], rows.shape[2], float(settings.s)
            half_space, angular = settings.half_space, settings.angular
            bound = settings.min_distance
            energies[layer.name] = LayerEnergy(
                float(energy),
                bounds.random_energy(
                    n, d, s, half_space=half_space, angular=angular, min_distance=bound
                ),
                min(
                    bounds.lowest_energy(
                        n,
                        d,
                        s,
                        half_space=half_space,
                        angular=angular,
                        eps=settings.eps,
                        min_distance=bound,
                        dead=count,
                    )
                    for count in dead
                ),
            )
        return energies

    @property
    def layers(self) -> tuple[RegularizedLayer, ...]:
        """The layers that are regularized, in the order of registration, and as what."""
        return tuple(
            RegularizedLayer(
                layer.name,
                "output" if layer.name == self.output_layer
                else "first" if layer.name == self.first_layer
                else "hidden",
                *layer.sizes,
                self._factors[layer.name],
                self._settings_of(layer).half_space,
                self._is_projected(layer),
                layer.learns(),
            )
            for layer in self._layers
        )  # fmt: skip

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """The layers and parameters of the model that are not regularized, and why."""
        return tuple(self._left_out)

    def summary(self, format: str = "github") -> str:
        """A table of what is regularized, as what, and of what is left out and why.

        Args:
            format: one of the formats of the package tabulate.
        """
        rows: list[tuple[object, ...]] = []
        for layer in self.layers:
            name = type(self.projection).__name__ if layer.projected else "none"
            space = "half" if layer.half_space else "full"
            rows.append(
                (
                    layer.name,
                    layer.role if layer.learns else f"{layer.role}, frozen",
                    layer.sets,
                    layer.neurons,
                    layer.inputs,
                    f"{layer.factor:g}",
                    space,
                    name,
                )
            )
        headers = ("layer", "as", "sets", "neurons", "inputs", "factor", "space", "projection")
        text = _table(rows, headers, format)
        text += f"\n\nOutput layer: {self.output_layer!r}, {self._output.reason}."
        if self._left_out:
            text += "\n\n" + _table(self._left_out, ("left out", "why"), format)
        return text

    def refresh(self) -> None:
        """Find the layers again, after layers of the model were replaced, added or resized.

        The steps go on. Learned matrices are kept for layers of the same name and width, and drawn
        for the others.

        Raises:
            TypeError, ValueError: as for a new `CoMHE`; this one is then as it was.
        """
        before = dict(self.__dict__)
        try:
            self._find()
            self._warned_of_frozen = False
            if self.projection is not None:
                self.projection.rebind([x for x in self._layers if self._is_projected(x)])
        except Exception:
            self.__dict__.update(before)
            raise

    def get_extra_state(self) -> Tensor:
        return self._step.clone()

    def set_extra_state(self, state: Tensor) -> None:
        self._step = loaded(state)

    def extra_repr(self) -> str:
        return (
            f"{len(self._layers)} layers, {len(self._left_out)} left out, "
            f"first_layer={self.first_layer!r}, output_layer={self.output_layer!r} "
            f"({self._output.reason})"
        )

    # --- what is regularized ----------------------------------------------------------------------

    def _survey(self) -> Survey:
        (model,) = self._model
        return survey(model, self._include, self._exclude, self._split, self._transpose)

    def _find(self) -> None:
        """Look for the layers in the model as it is now."""
        (model,) = self._model
        layers, left_out = self._survey()
        if not layers:
            why = "; ".join(f"{name!r}: {reason}" for name, reason in left_out[:5])
            raise ValueError(
                "`model` must have a layer of two or more neurons that `include` and `exclude` "
                "leave, found none: Linear and convolution layers are taken by default"
                + (f" ({why})" if why else "")
            )
        names = [layer.name for layer in layers]
        first = _checked("first_layer", self._first_layer, names)
        if first == "auto":
            first = _first_layer(model)
            first = first if first in names else None
        name = _checked("output_layer", self._output_layer, names)
        if name == "auto":
            output = find_output_layer(model, layers)
        else:
            output = OutputLayer(name, "as given")
        factors = self._factors_of(layers, output.name)
        self._layers, self._left_out = layers, left_out
        self.first_layer, self.output_layer, self._output = first, output.name, output
        self._factors = factors
        self._modules_seen = list(model.modules())

    def _factors_of(self, layers: list[Layer], output: str | None) -> "_Factors":
        """The factor of each layer."""
        factors = _Factors()
        names = [layer.name for layer in layers]
        patterns: Mapping[str, float] = {}
        if isinstance(self._weight, Mapping):
            for pattern, factor in self._weight.items():
                if not isinstance(pattern, str):
                    raise TypeError(
                        f"`weight` must have patterns for keys, got {ops.quote(pattern)}"
                    )
                check_pattern(pattern, names)
                functional.check_factor("weight", factor)
            patterns = self._weight
        else:
            factor = functional.check_factor("weight", self._weight)
            factors.update(dict.fromkeys(names, factor))
        fitting = {
            layer.name: next((f for p, f in patterns.items() if layer.matches(p)), None)
            for layer in layers
        }
        factors.update({name: float(f) for name, f in fitting.items() if f is not None})
        if self._output_weight is not None:
            given = functional.check_factor("output_weight", self._output_weight)
            if output is not None and output in patterns:
                raise ValueError(
                    f"`weight` and `output_weight` must not both name the output layer {output!r}, "
                    f"got {patterns[output]:g} and {given:g}"
                )
            if output is not None:
                factors[output] = given
        elif output is not None and fitting[output] is None:
            factors[output] = OUTPUT_WEIGHT
        return _Factors({name: factors[name] for name in names})

    def _check_structure(self) -> None:
        """Raise if the model has other layers than when they were found."""
        if torch.compiler.is_compiling():
            return
        (model,) = self._model
        seen = list(model.modules())
        if len(seen) == len(self._modules_seen) and all(map(_same, seen, self._modules_seen)):
            return
        try:
            layers = self._survey().layers
        except (TypeError, ValueError) as error:
            raise RuntimeError(
                f"the model was changed after `CoMHE` was made, and has no such layers any more: "
                f"{error}. Make a new one"
            ) from error
        before = {layer.name: layer for layer in self._layers}
        now = {layer.name: layer for layer in layers}
        changed = [
            name
            for name in {**before, **now}
            if name not in before or name not in now
            or before[name].module is not now[name].module
            or before[name].shape != now[name].shape
        ]  # fmt: skip
        if changed:
            raise RuntimeError(
                f"the model was changed after `CoMHE` was made: layers {changed} are other ones "
                "now, or gone. Call `refresh()`"
            )
        self._modules_seen = seen

    # --- one call ---------------------------------------------------------------------------------

    def _count_step(self) -> None:
        if torch.compiler.is_compiling():
            self._step += 1
        else:
            set_number(self._step, 0, int(self._step) + 1)

    def _read(self) -> dict[str, Tensor]:
        """The neurons of the layers that learn; each weight is computed once."""
        rows: dict[str, Tensor] = {}
        read: dict[tuple[int, str], Tensor] = {}
        for layer in self._layers:
            if not layer.learns():
                continue
            key = (id(layer.module), layer.attribute)
            if key not in read:
                read[key] = layer.weight
            rows[layer.name] = self._rows_of(layer, read[key])
        if not rows and not self._warned_of_frozen:
            self._warned_of_frozen = True
            warnings.warn(
                "CoMHE adds nothing: all weights that it regularizes are frozen. Where adapters "
                "are trained (LoRA), register the merged weight W + BA as a parametrization of the "
                "layer; its rows are the neurons",
                stacklevel=2,
            )
        return rows

    def _rows_of(self, layer: Layer, weight: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            layer.check(weight)
            if weight.is_inference() and not torch.is_inference_mode_enabled():
                weight = weight.clone()  # such a tensor cannot be kept for a backward
        return layer.rows(weight)

    def _projected(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the layers that are projected."""
        layers = [x for x in self._layers if x.name in rows and self._is_projected(x)]
        return {layer.name: rows[layer.name] for layer in layers}

    def _energy(self, rows: Mapping[str, Tensor], steps: int) -> Tensor:
        """The weighted sum of this call."""
        views: Views = {name: (sets, None) for name, sets in rows.items()}
        if self.projection is not None:
            projected = self._projected(rows)
            with unseen_by_checkpoint():
                for _ in range(steps):
                    self.projection.step(projected)
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
                ([name for name in rows if name == output], self._full_space),
            )
            if names
        ]
        return functional.add(totals) if totals else self._zero()

    def _zero(self) -> Tensor:
        first = self._layers[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        return torch.zeros((), dtype=dtype, device=first.device)

    def _is_projected(self, layer: Layer) -> bool:
        if self.projection is None or layer.name in (self.first_layer, self.output_layer):
            return False
        return self.projection.dim is None or layer.sizes[2] > self.projection.dim

    def _settings_of(self, layer: Layer) -> functional.Settings:
        return self._full_space if layer.name == self.output_layer else self._settings


class _Factors(dict[str | None, float]):
    """{layer: factor}, 1 for what is not named."""

    def __missing__(self, name: str | None) -> float:
        return 1.0


def _same(left: object, right: object) -> bool:
    return left is right


def _leaves(output: Tensor) -> list[Tensor]:
    """The leaves that a backward from `output` reaches."""
    leaves: list[Tensor] = []
    stack, seen = [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack += [parent for parent, _ in node.next_functions]
    return leaves


def _make_projection(projection: str | Projection | None) -> Projection | None:
    if projection is None or isinstance(projection, Projection):
        return projection
    if not isinstance(projection, str) or projection not in PROJECTIONS:
        raise ValueError(
            f"`projection` must be one of {list(PROJECTIONS)}, a Projection or None, "
            f"got {ops.quote(projection)}"
        )
    return PROJECTIONS[projection]()


def _checked(argument: str, name: str | None, names: list[str]) -> str | None:
    """The name of a layer that is there, "auto" or None."""
    if name is not None and name != "auto" and name not in names:
        raise ValueError(f"`{argument}` must be one of {names}, got {ops.quote(name)}")
    return name


def _first_layer(model: nn.Module) -> str | None:
    """The first layer with neurons, if it is a convolution."""
    for name, module in model.named_modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            return name if isinstance(module, CONVOLUTIONS) else None
    return None


def _table(rows: Iterable[Iterable[object]], headers: Iterable[str], format: str) -> str:
    try:
        from tabulate import tabulate
    except ImportError as error:
        raise ImportError(
            "a table needs the package tabulate: pip install 'comhe-ext[table]'"
        ) from error
    text: str = tabulate(list(rows), tuple(headers), tablefmt=format, floatfmt=".4f")
    return text
