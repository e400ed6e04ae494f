"""The base of all projections, and those that do not learn."""

from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from numbers import Integral
from typing import Any, Literal, TypeAlias

import torch
from torch import Generator, Tensor, nn

from comhe_ext.checks import check_count, check_tensor, quote
from comhe_ext.layers import Layer
from comhe_ext.packing import Partitions, stack_parts
from comhe_ext.projections.draws import advance
from comhe_ext.projections.sketches import SKETCHES, Sketch, SketchKind, draw_sketch
from comhe_ext.settings import Settings
from comhe_ext.steps import host_tensor, loaded


def random_projection(
    num_projections: int,
    dim: int,
    in_features: int,
    *,
    generator: Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw Gaussian projection matrices, iid N(0, 1) entries.

    Torch equivalent::

        torch.randn(num_projections, dim, in_features)

    The entries are not divided by sqrt(dim): an energy does not depend on the length of its rows.

    Args:
        num_projections: C, how many matrices.
        dim: k, the dimension projected to.
        in_features: d, the dimension projected from.
        generator: source of the random numbers, on `device`.
        device: where to make them, torch's default device if None.
        dtype: a floating-point dtype, torch's default dtype if None.

    Returns:
        [C, k, d], to be passed to `compressive_energy`.

    Raises:
        TypeError: a count is not an integer, or `dtype` is not floating-point.
        ValueError: a count is less than 1.

    Source: Lin et al. (2020), with the distribution of the authors' code.
    """
    num_projections = check_count("num_projections", num_projections)
    dim = check_count("dim", dim)
    in_features = check_count("in_features", in_features)
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"`dtype` must be a floating-point dtype, got {dtype}")
    return torch.randn(
        num_projections, dim, in_features, generator=generator, device=device, dtype=dtype
    )


# --- projections of a model -----------------------------------------------------------------------


Views: TypeAlias = dict[str, tuple[Tensor, Tensor | None]]


class Projection(nn.Module):
    """The base of all projections, which map the neurons of each layer to few dimensions.

    Args:
        seed: of all that is drawn; None takes torch's seed, and on several ranks that of the first
            one, broadcast at the first training step.
    """

    dim: int | None = None  # k; a layer of at most k inputs is not projected. None: every layer is
    partitions = Partitions()  # the regularizer's, for energies that matrices learn from

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
            raise TypeError(f"`seed` must be an int or None, got {type(seed).__name__}")
        self._layers: list[Layer] = []
        number = torch.initial_seed() if seed is None else int(seed)
        # seed, steps, and whether all ranks have the same seed. It is not a buffer, because it has
        # to stay on the host, where the draws are seeded
        self._state = host_tensor([number % 2**63, 0, int(seed is not None)])

    def bind(self, layers: Sequence[Layer], settings: Settings) -> None:
        """Take charge of these layers, for an energy of these settings."""
        if self._layers:
            raise ValueError("`projection` already belongs to a regularizer: make one for each")
        self._layers = list(layers)

    def rebind(self, layers: Sequence[Layer]) -> None:
        """Take charge of these layers instead, after the model was changed."""
        self._layers = list(layers)

    def step(self, rows: Mapping[str, Tensor] | None = None) -> None:
        """Go on to the next training step."""
        if torch.compiler.is_compiling():
            torch.ops.comhe_ext.advance(self._state)
        else:
            advance(self._state)

    def matrices(self, rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return {layer: [C, k, d]} of this step, for the layers that learn."""
        raise NotImplementedError

    def views(self, rows: Mapping[str, Tensor]) -> Views:
        """Return the sets [V, N, d] of each layer of `rows`, and the matrices that project them."""
        # the `matrices` of a user's projection may take no argument
        takes_rows = len(signature(self.matrices).parameters) > 0
        matrices = self.matrices(rows) if takes_rows else self.matrices()
        for name, sets in rows.items():
            self._check_matrices(name, sets, matrices)
        return {name: (sets, matrices[name]) for name, sets in rows.items()}

    def learns_from_shards(self, layer: Layer) -> bool:
        """Tell whether `rows` may hold a layer as `ShardedRows`, and not as all of its neurons."""
        return False

    def width(self, layer: Layer) -> int:
        """Return how many columns the rows of a layer have that are swept."""
        return layer.sizes[2] if self.dim is None else self.dim

    def learning(self) -> list[Layer]:
        """List the layers whose weights are not frozen."""
        return [layer for layer in self._layers if layer.learns()]

    def get_extra_state(self) -> Tensor:
        return self._state.clone()

    def set_extra_state(self, state: Tensor) -> None:
        self._state = loaded(state)

    def _check_matrices(self, name: str, rows: Tensor, matrices: object) -> None:
        """Raise if what `matrices` returned does not project the rows of a layer."""
        what = f"`{type(self).__name__}.matrices` must return a dict of a tensor for every layer"
        if not isinstance(matrices, Mapping):
            raise TypeError(f"{what}, got {type(matrices).__name__}")
        if name not in matrices:
            raise ValueError(f"{what}, got none for {name!r}, only {sorted(matrices)}")
        check_tensor(f"matrices of layer {name!r}", matrices[name])
        shape, inputs = tuple(matrices[name].shape), rows.shape[2]
        if len(shape) != 3 or 0 in shape or shape[2] != inputs:
            raise ValueError(
                f"`matrices of layer {name!r}` must be [C, k, {inputs}], got shape {shape}"
            )
        if matrices[name].device != rows.device:
            raise ValueError(
                f"`matrices of layer {name!r}` must be on {rows.device}, got "
                f"{matrices[name].device}"
            )

    def _draw(self, layer: Layer, shape: Sequence[int], every: int, stream: int) -> Tensor:
        dtype = torch.promote_types(layer.dtype, torch.float32)
        drawn: Tensor = torch.ops.comhe_ext.gaussian(
            self._state, every, stream, shape, dtype, layer.device
        )
        return drawn


class RandomProjection(Projection):
    """Random matrices, drawn afresh every so many steps (RP-CoMHE).

    Torch equivalent::

        matrices = {name: torch.randn(C, k, d) for each layer}    # at each step

    Layers of equal width d share their draw, as in the authors' code, so that a model of a hundred
    layers draws only a few matrices a step. The entries that one layer sees are independent, in the
    kind "gaussian".

    Args:
        num_projections: C; 20 if neither is given.
        dim: k.
        kind: of the matrices. "gaussian": independent normal entries. The others keep the cosines
            of the neurons in the same way and are made to be multiplied quickly: "sparse", random
            signs and many zeros; "hadamard" and "fourier", k random coordinates after random signs
            and an orthogonal transform.
        neurons_per_projection: makes C grow with the layer: one matrix for every so many neurons.
        every: steps from one draw to the next.
        seed: see `Projection`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: Lin et al. (2020); the defaults are those of the authors' code. "sparse": Achlioptas
    (2003), in the blocks of Kane and Nelson (2014); "hadamard": Ailon and Chazelle (2006),
    Tropp (2011); "fourier": Woolfe et al. (2008).
    """

    def __init__(
        self,
        num_projections: int | None = None,
        dim: int = 40,
        *,
        kind: Literal["gaussian"] | SketchKind = "gaussian",
        neurons_per_projection: int | None = None,
        every: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed)
        if num_projections is not None and neurons_per_projection is not None:
            raise ValueError("`num_projections` and `neurons_per_projection` exclude each other")
        if neurons_per_projection is not None:
            neurons_per_projection = check_count("neurons_per_projection", neurons_per_projection)
        else:
            num_projections = 20 if num_projections is None else num_projections
            num_projections = check_count("num_projections", num_projections)
        if kind not in ("gaussian", *SKETCHES):
            raise ValueError(f"`kind` must be one of {['gaussian', *SKETCHES]}, got {quote(kind)}")
        self.num_projections = num_projections
        self.neurons_per_projection = neurons_per_projection
        self.dim: int = check_dim(dim)
        self.kind = kind
        self.every = check_count("every", every)

    def _count(self, layer: Layer) -> int:
        if self.neurons_per_projection is not None:
            return max(layer.sizes[1] // self.neurons_per_projection, 1)
        return self.num_projections or 1

    def _shared_draws(self) -> Iterator[tuple[list[Layer], int]]:
        """Yield the layers that share a draw, and the largest C of them."""
        by_kind: dict[Any, list[Layer]] = {}
        for layer in self.learning():
            kind = (layer.sizes[2], torch.promote_types(layer.dtype, torch.float32), layer.device)
            by_kind.setdefault(kind, []).append(layer)
        for layers in by_kind.values():
            yield layers, max([self._count(layer) for layer in layers])

    def _sketches(self) -> dict[str, Sketch]:
        """Draw what is not a dense matrix, for the layers that learn."""
        drawn = {}
        for layers, count in self._shared_draws():
            width = layers[0].sizes[2]

            def normal(size: int, layer: Layer = layers[0], width: int = width) -> Tensor:
                return self._draw(layer, (size,), self.every, width)

            sketch = draw_sketch(normal, self.kind, count, self.dim, width)
            for layer in layers:
                drawn[layer.name] = sketch.first(self._count(layer))
        return drawn

    def matrices(self, rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        if self.kind != "gaussian":
            return {name: sketch.matrices() for name, sketch in self._sketches().items()}
        drawn = {}
        for layers, count in self._shared_draws():
            width = layers[0].sizes[2]
            matrices = self._draw(layers[0], (count, self.dim, width), self.every, width)
            for layer in layers:
                drawn[layer.name] = matrices[: self._count(layer)]
        return drawn

    def views(self, rows: Mapping[str, Tensor]) -> Views:
        """Return the sets and their matrices, or projected sets where no matrix has to be made."""
        if self.kind == "gaussian":
            return super().views(rows)
        sketches = self._sketches()
        return {
            name: (sketches[name].project(sets).flatten(0, 1), None) for name, sets in rows.items()
        }

    def extra_repr(self) -> str:
        count = self.num_projections or f"N / {self.neurons_per_projection}"
        return (
            f"{count} projections to {self.dim} dimensions, {self.kind}, "
            f"drawn every {self.every} steps"
        )


class GroupProjection(Projection):
    """The coordinates of each layer in groups, whose sub-vectors have an energy each (group CoMHE).

    Torch equivalent::

        energy = torch.stack([hyperspherical_energy(part) for part in parts_of(weight)]).mean()

    Args:
        groups: how many; fewer where a group would have a single coordinate, whose neurons have
            nowhere to turn.
        layout: "contiguous", neighbouring coordinates; "strided", every `groups`-th coordinate;
            "channels", input channels of a convolution with all their kernel positions
            (contiguous coordinates elsewhere).

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: Lin et al. (2020): projections that select coordinates.
    """

    def __init__(
        self,
        groups: int = 4,
        layout: Literal["contiguous", "strided", "channels"] = "contiguous",
    ) -> None:
        super().__init__(seed=0)
        self.groups = check_count("groups", groups)
        if layout not in ("contiguous", "strided", "channels"):
            raise ValueError(
                f"`layout` must be 'contiguous', 'strided' or 'channels', got {quote(layout)}"
            )
        self.layout = layout

    def split(self, layer: Layer, rows: Tensor) -> list[Tensor]:
        """Split the rows of a layer into the columns of each group."""
        width = rows.shape[-1]
        if self.layout == "strided":
            groups = min(self.groups, max(width // 2, 1))
            return [rows[..., g::groups] for g in range(groups)]
        kernel = getattr(layer.module, "kernel_size", ()) if self.layout == "channels" else ()
        # a channel stays together with its kernel positions, and no coordinate stays alone
        size = torch.Size(kernel).numel()
        channels = rows.unflatten(-1, (-1, size))
        most = width // size if size > 1 else max(width // 2, 1)
        return [part.flatten(-2) for part in channels.tensor_split(min(self.groups, most), -2)]

    def width(self, layer: Layer) -> int:
        return max(x.shape[-1] for x in self.split(layer, torch.empty(0, layer.sizes[2])))

    def matrices(self, rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        selected = {}
        for layer in self.learning():
            dtype = torch.promote_types(layer.dtype, torch.float32)
            identity = torch.eye(layer.sizes[2], dtype=dtype, device=layer.device)
            selected[layer.name] = stack_parts(self.split(layer, identity)).mT
        return selected

    def views(self, rows: Mapping[str, Tensor]) -> Views:
        """Return the sub-vectors, without the cost of a product with zeros and ones."""
        views: Views = {}
        for layer in self._layers:
            if layer.name in rows:
                parts = self.split(layer, rows[layer.name])
                views[layer.name] = (stack_parts(parts).flatten(0, 1), None)
        return views

    def extra_repr(self) -> str:
        return f"{self.groups} {self.layout} groups"


def check_dim(dim: int) -> int:
    """Return a dimension to project to."""
    dim = check_count("dim", dim)
    if dim == 1:
        raise ValueError("`dim` must be at least 2: in one dimension neurons have nowhere to turn")
    return dim
