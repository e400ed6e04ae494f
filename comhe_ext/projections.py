"""Projections of compressive energies: single draws, and those of a whole model, step by step.

A `Projection` belongs to one `CoMHE`, which binds it to its hidden layers:

    projection.step(rows)        once a training step
    projection.views(rows)       what is swept: the sets of each layer, and its matrices
    projection.matrices(rows)    {layer: [C, k, d]} of this step

`rows` are the neurons [sets, N, d] of each layer, read once for all of them; None reads them.
A projection of one's own overrides `matrices`. The state goes with the state_dict of the
regularizer. On several ranks all draw the same numbers: a seed that is not given is that of the
first rank, asked for at the first training step, which all ranks make together.
"""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from numbers import Integral
from typing import Any, Literal, TypeAlias

import torch
from torch import Generator, Tensor, nn

from comhe_ext import functional, ops
from comhe_ext.functional import AngleKind, check_count, check_factor
from comhe_ext.layers import Layer
from comhe_ext.steps import host_tensor, loaded, set_number


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

    The entries are not divided by sqrt(dim): an energy does not see the length of its rows.

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


# --- draws that are a function of a seed and a step -----------------------------------------------


@ops.define(
    "gaussian(Tensor state, int every, int stream, SymInt[] shape, ScalarType dtype, Device device)"
    " -> Tensor"
)
def _gaussian(
    state: Tensor,
    every: int,
    stream: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Normal numbers of step state[1] under seed state[0], the same for `every` steps in a row."""
    if device.type == "meta":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "random matrices cannot be drawn while a CUDA graph is captured, which would repeat "
            "one draw for ever: call the regularizer outside of the graph"
        )
    seed, steps, _ = state.tolist()
    draw = max(steps - 1, 0) // every
    # three numbers into one seed, by the constants of the SplitMix64 generator
    for number in (draw, stream):
        seed = ((seed ^ number) * 0x9E3779B97F4A7C15 + 0xBF58476D1CE4E5B9) % 2**64
        seed ^= seed >> 31
    generator = Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=device)


@torch.library.register_fake("comhe_ext::gaussian", lib=ops.LIBRARY)
def _(
    state: Tensor,
    every: int,
    stream: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@ops.define("advance(Tensor(a!) state) -> ()")
def _advance(state: Tensor) -> None:
    """Count a step; before the first one, agree on a seed with the other ranks."""
    seed, steps, is_common = state.tolist()
    if not is_common:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            seeds = [seed]
            torch.distributed.broadcast_object_list(seeds)
            set_number(state, 0, seeds[0])
        set_number(state, 2, 1)
    set_number(state, 1, steps + 1)


@torch.library.register_fake("comhe_ext::advance", lib=ops.LIBRARY)
def _(state: Tensor) -> None:
    pass


# --- projections of a model -----------------------------------------------------------------------


Views: TypeAlias = dict[str, tuple[Tensor, Tensor | None]]


class Projection(nn.Module):
    """What takes the neurons of each layer to few dimensions; the base of the four below.

    Args:
        seed: of all that is drawn; None takes torch's seed, and on several ranks that of the first
            one, broadcast at the first training step.
    """

    dim: int | None = None  # k; a layer of no more inputs is not projected. None: any layer is

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
            raise TypeError(f"`seed` must be an int or None, got {type(seed).__name__}")
        self._layers: list[Layer] = []
        number = torch.initial_seed() if seed is None else int(seed)
        # seed, steps, and whether all ranks know the seed; not a buffer: it stays on the host,
        # where the draws are seeded
        self._state = host_tensor([number % 2**63, 0, int(seed is not None)])

    def bind(self, layers: Sequence[Layer], settings: functional.Settings) -> None:
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
            _advance(self._state)

    def matrices(self, rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """{layer: [C, k, d]} of this step, for the layers that learn."""
        raise NotImplementedError

    def views(self, rows: Mapping[str, Tensor]) -> Views:
        """The sets [V, N, d] of each layer of `rows`, and the matrices that project them."""
        # of one's own, `matrices` may do without the rows
        takes_rows = len(signature(self.matrices).parameters) > 0
        matrices = self.matrices(rows) if takes_rows else self.matrices()
        for name, sets in rows.items():
            self._check_matrices(name, sets, matrices)
        return {name: (sets, matrices[name]) for name, sets in rows.items()}

    def learning(self) -> list[Layer]:
        """The layers whose weights are not frozen."""
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
        functional.check_tensor(f"matrices of layer {name!r}", matrices[name])
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

    def _draw(self, layer: Layer, count: int, dim: int, every: int, stream: int) -> Tensor:
        dtype = torch.promote_types(layer.dtype, torch.float32)
        shape = (count, dim, layer.sizes[2])
        drawn: Tensor = torch.ops.comhe_ext.gaussian(
            self._state, every, stream, shape, dtype, layer.device
        )
        return drawn


class RandomProjection(Projection):
    """Gaussian matrices, drawn afresh every so many steps (RP-CoMHE).

    Torch equivalent::

        matrices = {name: torch.randn(C, k, d) for each layer}    # at each step

    Layers of equal width d share their draw, as they do in the authors' code: so a model of a
    hundred layers draws a few matrices a step. Each layer by itself sees independent entries.

    Args:
        num_projections: C; 20 if neither is given.
        dim: k.
        neurons_per_projection: makes C grow with the layer: one matrix for so many neurons.
        every: steps from one draw to the next.
        seed: see `Projection`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or less than 1.

    Source: Lin et al. (2020); the defaults are those of the authors' code.
    """

    def __init__(
        self,
        num_projections: int | None = None,
        dim: int = 40,
        *,
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
        self.num_projections = num_projections
        self.neurons_per_projection = neurons_per_projection
        self.dim: int = _check_dim(dim)
        self.every = check_count("every", every)

    def _count(self, layer: Layer) -> int:
        if self.neurons_per_projection is not None:
            return max(layer.sizes[1] // self.neurons_per_projection, 1)
        return self.num_projections or 1

    def matrices(self, rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        by_kind: dict[Any, list[Layer]] = {}
        for layer in self.learning():
            kind = (layer.sizes[2], torch.promote_types(layer.dtype, torch.float32), layer.device)
            by_kind.setdefault(kind, []).append(layer)
        drawn = {}
        for (width, *_), layers in by_kind.items():
            counts = [self._count(layer) for layer in layers]
            matrices = self._draw(layers[0], max(counts), self.dim, self.every, width)
            for layer, count in zip(layers, counts, strict=True):
                drawn[layer.name] = matrices[:count]
        return drawn

    def extra_repr(self) -> str:
        count = self.num_projections or f"N / {self.neurons_per_projection}"
        return f"{count} projections to {self.dim} dimensions, drawn every {self.every} steps"


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
                f"`layout` must be 'contiguous', 'strided' or 'channels', got {ops.quote(layout)}"
            )
        self.layout = layout

    def split(self, layer: Layer, rows: Tensor) -> list[Tensor]:
        """The columns of each group of the rows of a layer."""
        width = rows.shape[-1]
        if self.layout == "strided":
            groups = min(self.groups, max(width // 2, 1))
            return [rows[..., g::groups] for g in range(groups)]
        kernel = getattr(layer.module, "kernel_size", ()) if self.layout == "channels" else ()
        # indivisible: a channel with its kernel positions, and never a coordinate alone
        size = torch.Size(kernel).numel()
        channels = rows.unflatten(-1, (-1, size))
        most = width // size if size > 1 else max(width // 2, 1)
        return [part.flatten(-2) for part in channels.tensor_split(min(self.groups, most), -2)]

    def matrices(self, rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        selected = {}
        for layer in self.learning():
            dtype = torch.promote_types(layer.dtype, torch.float32)
            identity = torch.eye(layer.sizes[2], dtype=dtype, device=layer.device)
            selected[layer.name] = functional.stack_parts(self.split(layer, identity)).mT
        return selected

    def views(self, rows: Mapping[str, Tensor]) -> Views:
        """The sub-vectors themselves: cheaper than a product with zeros and ones."""
        views: Views = {}
        for layer in self._layers:
            if layer.name in rows:
                parts = self.split(layer, rows[layer.name])
                views[layer.name] = (functional.stack_parts(parts).flatten(0, 1), None)
        return views

    def extra_repr(self) -> str:
        return f"{self.groups} {self.layout} groups"


class _LearnedProjection(Projection):
    """Matrices that descend an objective of their own, beside the weights."""

    dim: int

    def __init__(
        self,
        num_projections: int,
        dim: int,
        lr: float,
        iterations: int,
        weight_decay: float,
        mode: Literal["unrolled", "alternating"],
        seed: int | None,
    ) -> None:
        super().__init__(seed)
        self.num_projections = check_count("num_projections", num_projections)
        self.dim = _check_dim(dim)
        self.iterations = check_count("iterations", iterations)
        self.lr = lr
        self.weight_decay = check_factor("weight_decay", weight_decay)
        if mode not in ("unrolled", "alternating"):
            raise ValueError(f"`mode` must be 'unrolled' or 'alternating', got {ops.quote(mode)}")
        self.mode = mode
        # layers whose matrices are still to be drawn: the model was not there yet
        self._undrawn: set[str] = set()

    @property
    def lr(self) -> float:
        """The step size, which may be set: a schedule of the network's serves both."""
        return self._lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self._lr = check_factor("lr", lr)

    def objective(self, rows: Sequence[Tensor], matrices: Sequence[Tensor]) -> Tensor:
        """What the matrices descend: a sum over layers, of which each sees its own term alone."""
        raise NotImplementedError

    def bind(self, layers: Sequence[Layer], settings: functional.Settings) -> None:
        super().bind(layers, settings)
        self._settings = settings._replace(half_space=False)
        self.rebind(layers)

    def rebind(self, layers: Sequence[Layer]) -> None:
        super().rebind(layers)
        kept, self._buffers, undrawn = dict(self._buffers), {}, self._undrawn
        self._undrawn = set()
        for layer in self._layers:
            name = _buffer(layer)
            shape = (self.num_projections, self.dim, layer.sizes[2])
            before = kept.get(name)
            if before is not None and before.shape == shape and layer.name not in undrawn:
                self.register_buffer(name, before)
                continue
            self._undrawn.add(layer.name)
            self.register_buffer(name, torch.empty(shape, device="meta"))
            if layer.device.type != "meta":
                self._matrices_of(layer)

    def step(self, rows: Mapping[str, Tensor] | None = None) -> None:
        compiling = torch.compiler.is_compiling()
        before = None if compiling else int(self._state[0])
        super().step()
        if not compiling and int(self._state[0]) != before:
            # the seed is that of the first rank now: draw the matrices that it has
            self._undrawn.update(layer.name for layer in self._layers)
        layers = self.learning()
        constant = [x.detach() for x in self._rows(layers, rows)]
        for _ in range(self.iterations):
            matrices = [self._matrices_of(layer) for layer in layers]
            gradients = self._gradients(constant, matrices, create_graph=False)
            for layer, old, gradient in zip(layers, matrices, gradients, strict=True):
                self._buffers[_buffer(layer)] = old - self.lr * (gradient + self.weight_decay * old)

    def matrices(self, rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        layers = self.learning()
        matrices = [self._matrices_of(layer) for layer in layers]
        if self.mode == "unrolled" and torch.is_grad_enabled():
            # one more step that is not kept, as a function of the weights
            learning = self._rows(layers, rows)
            gradients = self._gradients(learning, matrices, create_graph=True)
            matrices = [m - self.lr * g for m, g in zip(matrices, gradients, strict=True)]
        return {layer.name: m for layer, m in zip(layers, matrices, strict=True)}

    def _rows(self, layers: Sequence[Layer], rows: Mapping[str, Tensor] | None) -> list[Tensor]:
        return [layer.rows() if rows is None else rows[layer.name] for layer in layers]

    def _matrices_of(self, layer: Layer) -> Tensor:
        """The matrices of a layer, drawn at their first use."""
        name = _buffer(layer)
        if layer.name in self._undrawn and layer.device.type != "meta":
            stream = [x.name for x in self._layers].index(layer.name)
            with torch.inference_mode(False), torch.no_grad():
                self._buffers[name] = self._draw(layer, self.num_projections, self.dim, 1, stream)
            self._undrawn.discard(layer.name)
        matrices = self._buffers[name]
        assert matrices is not None
        return matrices.to(layer.device)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for layer in self._layers:
            given = state_dict.get(prefix + _buffer(layer))
            if layer.name in self._undrawn and isinstance(given, Tensor) and not given.is_meta:
                # room for what is loaded
                own = self._buffers[_buffer(layer)]
                assert own is not None
                if own.shape == given.shape:
                    self._buffers[_buffer(layer)] = torch.empty_like(given)
                    self._undrawn.discard(layer.name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for layer in self._layers:
            now = self._buffers[_buffer(layer)]
            if now is not None and now.is_meta:
                self._undrawn.add(layer.name)

    def _gradients(
        self, rows: Sequence[Tensor], matrices: Sequence[Tensor], create_graph: bool
    ) -> Sequence[Tensor]:
        if not matrices:
            return []
        # autocast would reach into the backward of the projection
        with torch.enable_grad(), ops.no_autocast(matrices[0].device.type):
            leaves = [m.detach().requires_grad_() for m in matrices]
            total = self.objective(rows, leaves)
            return torch.autograd.grad(total, leaves, create_graph=create_graph)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_LearnedProjection":
        # matrices follow a model to another device, not to a lower precision
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for layer in self._layers:
            name = _buffer(layer)
            before, after = kept[name], self._buffers[name]
            assert before is not None and after is not None
            if after.is_meta:
                self._undrawn.add(layer.name)
            if after.dtype != before.dtype and not before.is_meta:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.num_projections} projections to {self.dim} dimensions, {self.mode}, "
            f"lr={self.lr}, iterations={self.iterations}"
        )


def _buffer(layer: Layer) -> str:
    """Name of the buffer of a layer's matrices: no dots, nor any attribute's name."""
    return "matrices/" + layer.name.replace("%", "%25").replace("/", "%2F").replace(".", "/")


def _check_dim(dim: int) -> int:
    """A dimension to project to."""
    dim = check_count("dim", dim)
    if dim == 1:
        raise ValueError("`dim` must be at least 2: in one dimension neurons have nowhere to turn")
    return dim


class AngleProjection(_LearnedProjection):
    """Matrices that learn to keep the angles between the neurons of their layer (AP-CoMHE).

    Torch equivalent, of a step::

        (gradient,) = torch.autograd.grad(angle_preserving_loss(weight, P), P)
        P = P - lr * (gradient + weight_decay * P)    # `iterations` times

    Args:
        num_projections: C.
        dim: k.
        kind: what to keep, see `comhe_ext.angle_preserving_loss`; of angles the root of the sum
            of squares is descended, so that one `lr` serves both.
        lr: step size, in the authors' code that of the network; an attribute that may be set.
        iterations: steps of the matrices for one of the weights.
        weight_decay: of the matrices.
        mode: "alternating", the weights see constant matrices; "unrolled", they see the matrices
            one more step ahead, and their gradient goes through that step (second order; not
            under torch.compile).
        seed: see `Projection`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: Lin et al. (2020); the defaults are those of the authors' code.
    """

    def __init__(
        self,
        num_projections: int = 1,
        dim: int = 30,
        *,
        kind: AngleKind = "cosine",
        lr: float = 0.1,
        iterations: int = 1,
        weight_decay: float = 5e-7,
        mode: Literal["unrolled", "alternating"] = "unrolled",
        seed: int | None = None,
    ) -> None:
        super().__init__(num_projections, dim, lr, iterations, weight_decay, mode, seed)
        if kind not in ("cosine", "angle"):
            raise ValueError(f"`kind` must be 'cosine' or 'angle', got {ops.quote(kind)}")
        self.kind: AngleKind = kind

    def objective(self, rows: Sequence[Tensor], matrices: Sequence[Tensor]) -> Tensor:
        losses = [
            functional.safe_sqrt(functional.angle_differences(sets, m, self.kind)).sum()
            for sets, m in zip(rows, matrices, strict=True)
        ]
        return torch.stack(losses).sum()


class AdversarialProjection(_LearnedProjection):
    """Matrices that raise the energy which the weights lower (adversarial CoMHE).

    Torch equivalent, of a step::

        (gradient,) = torch.autograd.grad(-compressive_energy(weight, P), P)
        P = P - lr * (gradient + weight_decay * P)    # `iterations` times

    The energy they raise is that of full space, whatever that of the weights.

    Args:
        num_projections, dim, lr, weight_decay, mode, seed: see `AngleProjection`.
        iterations: steps of the matrices for one of the weights.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: Lin et al. (2020); the defaults are those of the authors' code.
    """

    def __init__(
        self,
        num_projections: int = 1,
        dim: int = 30,
        *,
        lr: float = 0.1,
        iterations: int = 10,
        weight_decay: float = 5e-7,
        mode: Literal["unrolled", "alternating"] = "unrolled",
        seed: int | None = None,
    ) -> None:
        super().__init__(num_projections, dim, lr, iterations, weight_decay, mode, seed)

    def objective(self, rows: Sequence[Tensor], matrices: Sequence[Tensor]) -> Tensor:
        return -functional.total_energy(rows, matrices, [1.0] * len(rows), self._settings.options)
