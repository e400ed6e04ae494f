"""Projections whose matrices are trained beside the weights, by an objective of their own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from comhe_ext.checks import check_count, check_factor, quote
from comhe_ext.functional import AngleKind, angle_differences
from comhe_ext.layers import Layer
from comhe_ext.operators.library import no_autocast
from comhe_ext.operators.rows import safe_sqrt
from comhe_ext.packing import Part
from comhe_ext.projections.fixed import Projection, Views, check_dim
from comhe_ext.settings import Settings
from comhe_ext.sharded.angle_loss import cosine_differences
from comhe_ext.sharded.model import sampled_shard, total_energy
from comhe_ext.sharded.rows import ShardedRows

# the neurons of a layer: all of them, or those on this rank where its weight is a DTensor
Neurons: TypeAlias = Tensor | ShardedRows


class _LearnedProjection(Projection):
    """Matrices that minimize an objective of their own while the weights are trained."""

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
        self.dim = check_dim(dim)
        self.iterations = check_count("iterations", iterations)
        self.lr = lr
        self.weight_decay = check_factor("weight_decay", weight_decay)
        if mode not in ("unrolled", "alternating"):
            raise ValueError(f"`mode` must be 'unrolled' or 'alternating', got {quote(mode)}")
        self.mode = mode
        # layers whose matrices are still to be drawn, because their weights are on the meta device
        self._undrawn: set[str] = set()

    @property
    def lr(self) -> float:
        """The step size; a learning-rate schedule of the network may set it, too."""
        return self._lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self._lr = check_factor("lr", lr)

    def objective(self, rows: Sequence[Neurons], matrices: Sequence[Tensor]) -> Tensor:
        """Compute what the matrices minimize: a sum with one term for each layer's matrices."""
        raise NotImplementedError

    def bind(self, layers: Sequence[Layer], settings: Settings) -> None:
        super().bind(layers, settings)
        self._settings = settings.in_full_space()
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

    def step(self, rows: Mapping[str, Neurons] | None = None) -> None:
        compiling = torch.compiler.is_compiling()
        before = None if compiling else int(self._state[0])
        super().step()
        if not compiling and int(self._state[0]) != before:
            # the seed is that of the first rank now: draw the matrices anew
            self._undrawn.update(layer.name for layer in self._layers)
        layers = self.learning()
        constant = [_detached(x) for x in self._rows(layers, rows)]
        for _ in range(self.iterations):
            matrices = [self._matrices_of(layer) for layer in layers]
            gradients = self._gradients(constant, matrices, create_graph=False)
            for layer, old, gradient in zip(layers, matrices, gradients, strict=True):
                self._buffers[_buffer(layer)] = old - self.lr * (gradient + self.weight_decay * old)

    def matrices(self, rows: Mapping[str, Neurons] | None = None) -> dict[str, Tensor]:
        layers = self.learning()
        matrices = [self._matrices_of(layer) for layer in layers]
        if self.mode == "unrolled" and torch.is_grad_enabled():
            # one more step, not kept, as a function of the weights
            learning = self._rows(layers, rows)
            gradients = self._gradients(learning, matrices, create_graph=True)
            matrices = [m - self.lr * g for m, g in zip(matrices, gradients, strict=True)]
        return {layer.name: m for layer, m in zip(layers, matrices, strict=True)}

    def views(self, rows: Mapping[str, Neurons]) -> Views:
        matrices = self.matrices(rows)
        return {
            name: (sets if isinstance(sets, Tensor) else sets.local, matrices[name])
            for name, sets in rows.items()
        }

    def _rows(self, layers: Sequence[Layer], rows: Mapping[str, Neurons] | None) -> list[Neurons]:
        return [layer.rows() if rows is None else rows[layer.name] for layer in layers]

    def _matrices_of(self, layer: Layer) -> Tensor:
        """Return the matrices of a layer, drawn at their first use."""
        name = _buffer(layer)
        if layer.name in self._undrawn and layer.device.type != "meta":
            stream = [x.name for x in self._layers].index(layer.name)
            with torch.inference_mode(False), torch.no_grad():
                shape = (self.num_projections, self.dim, layer.sizes[2])
                self._buffers[name] = self._draw(layer, shape, 1, stream)
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
                # a tensor to load into
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
        self, rows: Sequence[Neurons], matrices: Sequence[Tensor], create_graph: bool
    ) -> Sequence[Tensor]:
        if not matrices:
            return []
        # autocast would reach into the backward of the projection
        with torch.enable_grad(), no_autocast(matrices[0].device.type):
            leaves = [m.detach().requires_grad_() for m in matrices]
            total = self.objective(rows, leaves)
            return torch.autograd.grad(total, leaves, create_graph=create_graph)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_LearnedProjection":
        # matrices follow the model to another device, but not to a lower precision
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for layer in self._layers:
            name = _buffer(layer)
            before, after = kept[name], self._buffers[name]
            assert before is not None
            assert after is not None
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


def _detached(rows: Neurons) -> Neurons:
    return rows.detach() if isinstance(rows, Tensor) else replace(rows, local=rows.local.detach())


def _buffer(layer: Layer) -> str:
    """Name the buffer of a layer's matrices, without dots or the name of an attribute."""
    return "matrices/" + layer.name.replace("%", "%25").replace("/", "%2F").replace(".", "/")


class AngleProjection(_LearnedProjection):
    """Matrices that learn to keep the angles between the neurons of their layer (AP-CoMHE).

    Torch equivalent, of a step::

        (gradient,) = torch.autograd.grad(angle_preserving_loss(weight, P), P)
        P = P - lr * (gradient + weight_decay * P)    # `iterations` times

    Args:
        num_projections: C.
        dim: k.
        kind: what to keep, see `comhe_ext.angle_preserving_loss`; for angles the root of the sum
            of squares is minimized, so that one `lr` suits both.
        lr: step size, in the authors' code that of the network; it may be set later, too.
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
            raise ValueError(f"`kind` must be 'cosine' or 'angle', got {quote(kind)}")
        self.kind: AngleKind = kind

    def objective(self, rows: Sequence[Neurons], matrices: Sequence[Tensor]) -> Tensor:
        losses = [
            safe_sqrt(self._differences(sets, m)).sum()
            for sets, m in zip(rows, matrices, strict=True)
        ]
        return torch.stack(losses).sum()

    def learns_from_shards(self, layer: Layer) -> bool:
        """Tell whether moments, of d d numbers, are fewer than the neurons; angles have none."""
        _, neurons, inputs = layer.sizes
        return type(self) is AngleProjection and self.kind == "cosine" and neurons > inputs

    def _differences(self, rows: Neurons, matrices: Tensor) -> Tensor:
        if isinstance(rows, Tensor):
            return angle_differences(rows, matrices, self.kind)
        return cosine_differences(
            rows.with_all_columns() if rows.columns.groups else rows, matrices
        )


class AdversarialProjection(_LearnedProjection):
    """Matrices that raise the energy which the weights lower (adversarial CoMHE).

    Torch equivalent, of a step::

        (gradient,) = torch.autograd.grad(-compressive_energy(weight, P), P)
        P = P - lr * (gradient + weight_decay * P)    # `iterations` times

    They raise the energy in full space, also where the weights lower that in half space.

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

    def objective(self, rows: Sequence[Neurons], matrices: Sequence[Tensor]) -> Tensor:
        # other blocks than those of the energy, which would else be lowest for these matrices
        step, pair = self._state[1:2], self._settings.pair
        parts: list[tuple[Part, ShardedRows | None]] = []
        for number, (sets, m) in enumerate(zip(rows, matrices, strict=True)):
            stream = -1 - number
            if isinstance(sets, Tensor):
                parts.append((self.partitions.part(step, stream, pair, sets, m), None))
                continue
            part = Part(sets.local, m)
            parts.append((part, sampled_shard(sets, part, self.partitions, pair, step, stream)))
        return -total_energy(parts, self._settings)

    def learns_from_shards(self, layer: Layer) -> bool:
        """Tell whether one derivative is enough; an unrolled step takes two, of all neurons."""
        return type(self) is AdversarialProjection and self.mode == "alternating"
