"""CoMHE as a regularizer of a whole model: `loss = task_loss + comhe()`."""

from collections import defaultdict
from collections.abc import Iterator
from typing import cast

from torch import Generator, Tensor, nn

from comhe_ext import functional, ops, projections

_LINEAR = (nn.Linear,)
_CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)  # read at each use: it may be a parametrization


def neurons(module: nn.Module) -> Tensor:
    """The neurons of a layer as rows, one set a convolution group: [groups, N, d]."""
    weight = _weight(module)
    if isinstance(module, _LINEAR):
        return weight.unsqueeze(0)
    groups = cast(int, module.groups)
    if isinstance(module, _TRANSPOSED):  # [in, out / groups, ...]: the neurons are the columns
        return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
    return weight.unflatten(0, (groups, -1)).flatten(2)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers with at least two neurons that can meet; a weight shared by several comes once."""
    seen: dict[int, Tensor] = {}  # by id; kept alive, for a parametrized weight is a temporary
    for name, module in model.named_modules():
        if not isinstance(module, _LINEAR + _CONVOLUTION + _TRANSPOSED):
            continue
        if isinstance(module.weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"layer {name!r} is not initialized: run the model once before")
        weight = _weight(module)
        if id(weight) in seen or neurons(module).shape[1] < 2:
            continue
        seen[id(weight)] = weight
        yield name, module


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
    space under 20 fresh random projections to 40 dimensions each step, the output layer in full
    space, unprojected, with weight 10. Hidden layers of no more than `dim` inputs stay unprojected.

    Args:
        model: its Linear and convolution layers are found now, and their weights read at each
            call. A weight that several layers share counts once; frozen weights are left out.
        projection: "random" for CoMHE, None for plain MHE on the weights as they are.
        num_projections: C, matrices drawn each step.
        dim: k, the dimension projected to.
        s, angular, eps, min_distance, backend: see `comhe_ext.hyperspherical_energy`.
        half_space: whether hidden layers use the half-space energy; the output layer never does,
            for a class is not its opposite.
        output_layer: qualified name of the output layer; "last" takes the layer registered last,
            None says that there is none.
        weight: factor of each hidden layer's mean energy.
        output_weight: factor of the output layer's.
        generator: source of the random matrices, on the device of the weights.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` has no layer to regularize, or an option is out of range.

    Shape: no input; returns the weighted sum of the energies, [], float32 (float64 if a weight is).

    Source: Lin et al. (2020), RP-CoMHE; Liu et al. (2018), HS-MHE.
    """

    def __init__(
        self,
        model: nn.Module,
        projection: str | None = "random",
        *,
        num_projections: int = 20,
        dim: int = 40,
        s: float = 2.0,
        half_space: bool = True,
        angular: bool = False,
        eps: float = 0.0,
        min_distance: float = 1e-3,
        output_layer: str | None = "last",
        weight: float = 1.0,
        output_weight: float = 10.0,
        generator: Generator | None = None,
        backend: functional.Backend | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
        if projection not in ("random", None):
            raise ValueError(f"`projection` must be 'random' or None, got {projection!r}")
        functional.check_count("num_projections", num_projections)
        functional.check_count("dim", dim)
        # a list, not a ModuleList: the layers belong to the model
        self._layers = list(_layers(model))
        if not self._layers:
            raise ValueError(
                "`model` must have a Linear or convolution layer of two or more neurons, found none"
            )
        names = [name for name, _ in self._layers]
        if output_layer == "last":
            output_layer = names[-1]
        if output_layer is not None and output_layer not in names:
            raise ValueError(f"`output_layer` must be one of {names}, got {output_layer!r}")
        self.projection = projection
        self.num_projections = num_projections
        self.dim = dim
        self.half_space = half_space
        self.output_layer = output_layer
        self.weight = functional.check_number("weight", weight)
        self.output_weight = functional.check_number("output_weight", output_weight)
        self.generator = generator
        self.s, self.angular, self.eps, self.min_distance = s, angular, eps, min_distance
        self.backend = backend
        # an option that is out of range is refused here, not at the first step
        self._options(_weight(self._layers[0][1]), half_space)

    def forward(self) -> Tensor:
        # sets of equal width and pair function share a sweep: all hidden layers, as a rule
        packs = defaultdict(list)
        for name, module in self._layers:
            if not module.weight.requires_grad:
                continue
            points, factor = self._points(name, module)
            half_space = self.half_space and name != self.output_layer
            kind = (half_space, points.shape[-1], points.dtype, points.device)
            packs[kind].append((points, factor))
        first = _weight(self._layers[0][1])
        total = first.new_zeros((), dtype=ops.compute_dtype(first))
        for (half_space, *_), pack in packs.items():
            views = [points for points, _ in pack]
            energies = functional.mean_energies(views, self._options(views[0], half_space))
            for energy, (_, factor) in zip(energies, pack, strict=True):
                total = total + factor * energy.to(total.device)
        return total

    def _points(self, name: str, module: nn.Module) -> tuple[Tensor, float]:
        """The sets of rows [V, N, k] whose mean energy is the layer's, and its factor."""
        rows = neurons(module)
        if name == self.output_layer:
            return rows, self.output_weight
        if self.projection is None:
            return rows, self.weight
        if rows.shape[-1] <= self.dim:
            # as wide as the projected layers, to share their sweep
            return ops.pad(rows, self.dim).to(ops.compute_dtype(rows)), self.weight
        matrices = projections.random_projection(
            self.num_projections,
            self.dim,
            rows.shape[-1],
            generator=self.generator,
            device=rows.device,
            dtype=ops.compute_dtype(rows),
        )
        return ops.project(rows, matrices).flatten(0, 1), self.weight

    def _options(self, weight: Tensor, half_space: bool) -> ops.Options:
        return functional.make_options(
            (weight,),
            self.s,
            half_space,
            self.angular,
            "mean",
            self.eps,
            self.min_distance,
            self.backend,
        )

    def extra_repr(self) -> str:
        projected = (
            f"{self.num_projections} random projections to {self.dim} dimensions"
            if self.projection
            else "no projection"
        )
        return f"{len(self._layers)} layers, {projected}, output_layer={self.output_layer!r}"
