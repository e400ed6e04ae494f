"""CoMHE as a regularizer of a whole model: `loss = task_loss + comhe()`."""

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from comhe_ext import bounds
from comhe_ext.checks import check_count, check_factor
from comhe_ext.gradients import accumulate
from comhe_ext.layers import Layer, LeftOut
from comhe_ext.packing import Part, Partitions, add
from comhe_ext.projections import Projection, ProjectionName, make_projection
from comhe_ext.projections.fixed import Views
from comhe_ext.reports import ALL_FROZEN, Energies, LayerEnergy, RegularizedLayer, summary
from comhe_ext.selection import Choice, Factors
from comhe_ext.selectors import Selector, Split, as_patterns, as_selectors
from comhe_ext.settings import EnergyOptions, Settings, lists_energy_options, mean_settings
from comhe_ext.sharded.collectives import total
from comhe_ext.sharded.model import sampled_shard, sharded_rows, total_energy
from comhe_ext.sharded.rows import ShardedRows
from comhe_ext.steps import StepCounter, host_tensor, loaded, set_number, unseen_by_checkpoint

if TYPE_CHECKING:
    from typing_extensions import Unpack


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

    A step is a call in training mode with gradients enabled, unless `auto_step=False`. All calls in
    one `optimizer.step(closure)` are one step; calls that activation checkpointing repeats do not
    count. Neither the model nor its buffers are changed.

    Args:
        model: its layers are found now, their weights read at each call, whatever computes them. A
            weight that several layers share counts once; frozen weights are left out.
        projection: "random", "angle-preserving", "adversarial" or "group" with the defaults of the
            authors' code, a `comhe_ext.projections.Projection`, or None for plain MHE.
        s: exponent of the energy, see `comhe_ext.hyperspherical_energy`.
        half_space: whether layers other than the output layer use the half-space energy; the
            output layer never does, because a class and its opposite differ.
        include: a module type or glob pattern of names, or several; a layer is taken if one of them
            fits. None takes Linear, convolution and transposed convolution layers. On request only:
            embeddings (without the row of their `padding_idx`) and the Linear heads tied to them,
            packed queries, keys and values (nn.MultiheadAttention, three sets), and, by name,
            parameters [N, d] or [sets, N, d] that are no layer's weight.
        exclude: a type or pattern, or several, of layers to leave out although `include` fits.
        split: {pattern: number of equal parts, or rows of each part} of packed weights: each part
            has an energy of its own. {"*.qkv": 3} for packed queries, keys and values.
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
        output_weight: factor of the output layer's; None takes that of the first pattern in
            `weight` that fits it, else 10.
        every: the energy is computed once in so many steps, and multiplied by that number; it is 0
            in the other steps.
        warm_up: steps over which the factor rises linearly to its full value.
        auto_step: False counts the calls of `step` instead.
        method: "exact"; "sampled", an unbiased estimate from random blocks of each layer's rows,
            partitioned anew for each projection at each step, where that takes less time; or
            "auto", "sampled" for layers of more than `above` rows. On several ranks all draw the
            same. Adversarial matrices learn from samples, too, of other blocks; angle-preserving
            ones from all rows.
        samples: rows of a block; None is a twelfth of a layer's rows, from 64 to 128. Sets of at
            most twice as many are never sampled.
        above: see `method`; None is 192 in float32 on a processor, 16,384 elsewhere.
        options: `pair`, any pair function, in place of `s`, `angular` and `min_distance`; and all
            other keywords of `comhe_ext.hyperspherical_energy` but `reduction`.

    Raises:
        TypeError: `model` is not a module, a weight that learns is neither a dense floating-point
            tensor nor a DTensor of such shards, or an argument has the wrong type.
        ValueError: `model` has no layer to regularize, a name or pattern fits none, or an option is
            out of range.
        RuntimeError: at a call, if layers were replaced, added or resized; see `refresh`.

    Shape: no input; returns the weighted sum of the energies, [], float32 (float64 if a weight is).

    Note:
        On several ranks all draw the same matrices: without a `seed` of the projection, they take
        that of the first rank at the first training step, which all have to make together. Weights
        that are DTensors stay sharded; some learned projections gather them, and those of users:
        see docs/distributed.md.

    Source: Lin et al. (2020), RP-CoMHE, AP-CoMHE; Liu et al. (2018), HS-MHE.
    """

    @lists_energy_options
    def __init__(
        self,
        model: nn.Module,
        projection: ProjectionName | Projection | None = "random",
        *,
        s: float = 2.0,
        half_space: bool = True,
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
        method: Literal["exact", "sampled", "auto"] = "exact",
        samples: int | None = None,
        above: int | None = None,
        **options: "Unpack[EnergyOptions]",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
        # in a tuple, so that the layers are not registered as modules of the regularizer
        self._model = (model,)
        self._choice = Choice(
            None if include is None else as_selectors("include", include),
            as_selectors("exclude", exclude),
            dict(split or {}),
            as_patterns("transpose", transpose),
            first_layer,
            output_layer,
            dict(weight) if isinstance(weight, Mapping) else weight,
            output_weight,
        )
        self._selection = self._choice.select(model)
        self.every = check_count("every", every)
        self.warm_up = check_count("warm_up", warm_up, least=0)
        if not isinstance(auto_step, bool):
            raise TypeError(f"`auto_step` must be a bool, got {type(auto_step).__name__}")
        self.auto_step = auto_step
        self._partitions = Partitions.checked(method, samples, above)
        self._settings = mean_settings(s, half_space, options)
        # of the output layer, which is never in half space
        self._full_space = self._settings.in_full_space()
        # so that a backend that cannot run is refused here, not at the first step
        self._settings.options(
            [torch.empty(0, dtype=x.dtype, device=x.device) for x in self._layers[:1]]
        )
        self._step = host_tensor(0)
        self._counter = StepCounter()
        self._warned_of_frozen = False
        self.projection = make_projection(projection)
        if self.projection is not None:
            self.projection.partitions = self._partitions
            self.projection.bind([x for x in self._layers if self._is_projected(x)], self._settings)
        self._selection.output.warn_of_guess(self._factors[self.output_layer], stacklevel=2)

    if TYPE_CHECKING:

        def __call__(self) -> Tensor: ...

    def forward(self) -> Tensor:
        self._check_structure()
        steps = self._counter.new_steps() if self.training and self.auto_step else 0
        for _ in range(steps):
            self._count_step()
        # `every` and `warm_up` belong to training: an evaluation sees the energy itself
        stepping = self.training and torch.is_grad_enabled()
        if stepping and self.every > 1 and int(self._step) % self.every:
            # by default this is not reached: a graph of torch.compile cannot branch on the step
            return self._zero()
        total = self._energy(*self._read(), steps)
        if stepping and self.every > 1:
            total = total * self.every
        if stepping and self.warm_up:
            total = total * (self._step / self.warm_up).clamp(max=1.0).to(total.dtype)
        return total

    def step(self) -> None:
        """Begin the next training step, where `auto_step` is False; called once, before its calls.

        Raises:
            RuntimeError: `auto_step` is True.
        """
        if self.auto_step:
            raise RuntimeError("`step` is for CoMHE(..., auto_step=False): calls are counted")
        self._check_structure()
        self._count_step()
        if self.projection is not None and int(self._step) % self.every == 0:
            with torch.no_grad():
                self.projection.step(self._projected(*self._read()))

    def accumulate_gradients(
        self, scaler: torch.amp.GradScaler | None = None, *, scale: float = 1.0
    ) -> Tensor:
        """Add the gradient of `self()` to the `.grad` of the parameters, and return the energy.

        The result is that of `(scale * self()).backward()`, bit for bit, but hooks on gradients,
        by which DistributedDataParallel reduces them, do not run. To be called between the backward
        of the task and the optimizer's step.

        Args:
            scaler: that of the loss, if its gradients are still scaled; it scales these, too.
            scale: factor of the gradient; 1/n where it is called for each of n batches of one step.
        """
        scale = check_factor("scale", scale)
        with torch.enable_grad():
            energy = self()
        if not energy.requires_grad:
            return energy
        factor = torch.full_like(energy, scale)
        if scaler is not None:
            factor = scaler.scale(factor)
        accumulate(energy, factor)
        return energy.detach()

    @torch.no_grad()
    def energies(self) -> Energies:
        """Compute the unprojected energy of every layer, frozen ones included.

        Returns:
            {layer: (energy, random, lowest)}, in half space where the regularizer is; `random` is
            the expected energy of independent random directions, `lowest` a lower bound.
        """
        self._check_structure()
        energies = Energies()
        for layer in self._layers:
            rows, shard = sharded_rows(layer, layer.weight, None)
            shard = ShardedRows(rows) if shard is None else shard
            settings = self._settings_of(layer)
            energy = shard.energies(settings).mean()
            # the bound of a set depends on its dead rows: take the lowest
            dead = {int(x) for x in total((rows == 0).all(2).sum(1), shard.rows.groups)}
            _, n, d = layer.sizes
            energies[layer.name] = LayerEnergy(
                float(energy),
                bounds.random_energy(n, d, settings.pair),
                min(
                    bounds.lowest_energy(n, d, settings.pair, eps=settings.eps, dead=count)
                    for count in dead
                ),
            )
        return energies

    @property
    def layers(self) -> tuple[RegularizedLayer, ...]:
        """The layers that are regularized, in the order of registration, and how."""
        return tuple(
            RegularizedLayer(
                layer.name,
                "output" if layer.name == self.output_layer
                else "first" if layer.name == self.first_layer
                else "hidden",
                *layer.sizes,
                self._factors[layer.name],
                self._settings_of(layer).pair.half_space,
                self._is_projected(layer),
                layer.learns(),
                self._is_sampled(layer),
            )
            for layer in self._layers
        )  # fmt: skip

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """The layers and parameters of the model that are not regularized, and why."""
        return tuple(self._selection.left_out)

    def summary(self, format: str = "github") -> str:
        """Show a table of what is regularized and how, and of what is left out and why.

        Args:
            format: one of the formats of the package tabulate.
        """
        name = type(self.projection).__name__
        return summary(self.layers, self.left_out, self._selection.output, name, format)

    def refresh(self) -> None:
        """Find the layers again, after layers of the model were replaced, added or resized.

        The count of steps goes on. Learned matrices are kept for layers of the same name and width,
        and drawn for the others.

        Raises:
            TypeError, ValueError: as for a new `CoMHE`; this one is then unchanged.
        """
        (model,) = self._model
        self._selection = self._choice.select(model)
        self._warned_of_frozen = False
        if self.projection is not None:
            self.projection.rebind([x for x in self._layers if self._is_projected(x)])

    def get_extra_state(self) -> Tensor:
        return self._step.clone()

    def set_extra_state(self, state: Tensor) -> None:
        self._step = loaded(state)

    def extra_repr(self) -> str:
        return (
            f"{len(self._layers)} layers, {len(self._selection.left_out)} left out, "
            f"first_layer={self.first_layer!r}, output_layer={self.output_layer!r} "
            f"({self._selection.output.reason})"
        )

    # --- what is regularized ----------------------------------------------------------------------

    @property
    def first_layer(self) -> str | None:
        """Name of the layer that is left unprojected as the first one."""
        return self._selection.first_layer

    @property
    def output_layer(self) -> str | None:
        """Name of the layer that is taken for the output layer."""
        return self._selection.output.name

    @property
    def _layers(self) -> list[Layer]:
        return self._selection.layers

    @property
    def _factors(self) -> Factors:
        return self._selection.factors

    def _check_structure(self) -> None:
        self._choice.check_unchanged(self._model[0], self._selection)

    # --- one call ---------------------------------------------------------------------------------

    def _count_step(self) -> None:
        if torch.compiler.is_compiling():
            self._step += 1
        else:
            set_number(self._step, 0, int(self._step) + 1)

    def _read(self) -> tuple[dict[str, Tensor], dict[str, ShardedRows]]:
        """Read the neurons of the layers that learn, and compute each weight only once.

        Those on this rank, where a weight is a DTensor, of which the second dict says more.
        """
        rows: dict[str, Tensor] = {}
        shards: dict[str, ShardedRows] = {}
        read: dict[tuple[int, str], Tensor] = {}
        for layer in self._layers:
            if not layer.learns():
                continue
            key = (id(layer.module), layer.attribute)
            if key not in read:
                read[key] = layer.weight
            projection = self.projection if self._is_projected(layer) else None
            rows[layer.name], shard = sharded_rows(layer, read[key], projection)
            if shard is not None:
                shards[layer.name] = shard
        if not rows and not self._warned_of_frozen:
            self._warned_of_frozen = True
            warnings.warn(ALL_FROZEN, stacklevel=2)
        return rows, shards

    def _projected(
        self, rows: Mapping[str, Tensor], shards: Mapping[str, ShardedRows] | None = None
    ) -> dict[str, Any]:
        """Select the layers that are projected, as the projection takes them."""
        shards = shards or {}
        given: dict[str, Any] = {}
        for layer in self._layers:
            if self.projection is not None and layer.name in rows and self._is_projected(layer):
                shared = self.projection.learns_from_shards(layer) and layer.name in shards
                given[layer.name] = shards[layer.name] if shared else rows[layer.name]
        return given

    def _energy(
        self, rows: Mapping[str, Tensor], shards: Mapping[str, ShardedRows], steps: int
    ) -> Tensor:
        """Compute the weighted sum of this call."""
        views: Views = {name: (sets, None) for name, sets in rows.items()}
        if self.projection is not None:
            projected = self._projected(rows, shards)
            with unseen_by_checkpoint():
                for _ in range(steps):
                    self.projection.step(projected)
            views.update(self.projection.views(projected))
        output = self.output_layer
        parts = {
            name: self._part(number, name, view, shards.get(name))
            for number, (name, view) in enumerate(views.items())
        }
        hidden = [part for name, part in parts.items() if name != output]
        totals = [
            total_energy(some, settings)
            for some, settings in (
                (hidden, self._settings),
                ([parts[name] for name in rows if name == output], self._full_space),
            )
            if some
        ]
        return add(totals) if totals else self._zero()

    def _part(
        self,
        number: int,
        name: str,
        view: tuple[Tensor, Tensor | None],
        shard: ShardedRows | None,
    ) -> tuple[Part, ShardedRows | None]:
        """Make the part of a layer, and say who has how much of it."""
        partitions, factor = self._partitions, self._factors[name]
        pair = (self._full_space if name == self.output_layer else self._settings).pair
        if shard is None:
            return partitions.part(self._step, number, pair, *view, factor), None
        part = Part(*view, factor)
        return part, sampled_shard(shard, part, partitions, pair, self._step, number)

    def _zero(self) -> Tensor:
        first = self._layers[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        return torch.zeros((), dtype=dtype, device=first.device)

    def _is_projected(self, layer: Layer) -> bool:
        if self.projection is None or layer.name in (self.first_layer, self.output_layer):
            return False
        return self.projection.dim is None or layer.sizes[2] > self.projection.dim

    def _is_sampled(self, layer: Layer) -> bool:
        projection = self.projection if self._is_projected(layer) else None
        width = layer.sizes[2] if projection is None else projection.width(layer)
        pair = self._settings_of(layer).pair
        return self._partitions.takes(layer.sizes[1], width, pair, layer.device, layer.dtype)

    def _settings_of(self, layer: Layer) -> Settings:
        return self._full_space if layer.name == self.output_layer else self._settings
