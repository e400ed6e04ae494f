"""The raw operators, their autograd, and the choice of backend.

    comhe_ext::energy                  points -> energy [B]
    comhe_ext::energy_and_gradient     points -> energy [B], gradient like points
    comhe_ext::scale_rows              gradient, grad of energy [B] -> like points
    comhe_ext::dot_rows                tangents, gradient -> [B]
    comhe_ext::hessian_vector_product  points, tangents -> like points

Points are B sets of N rows, [B, N, k], with `sizes` empty; or sets of the B `sizes` one after
another, [T, k]. The first form keeps a symbolic N out of the arguments under torch.compile.

The energy of a set is one number, so the forward sweep makes the gradient along with it and the
backward only scales. The gradient is a differentiable function too (closed-form Hessian-vector
product); a third derivative raises instead of being silently wrong.
"""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comhe_ext.kernels import portable, work_table
from comhe_ext.potentials import Potential

BACKENDS = ("triton", "cpu", "torch")
_MODULES = {
    "triton": "comhe_ext.kernels.gpu",
    "cpu": "comhe_ext.kernels.cpu.binding",
    "torch": "comhe_ext.kernels.portable",
}
# torch calls ROCm devices "cuda" too
_DEVICE_OF = {"triton": "cuda", "cpu": "cpu"}
# not yet "triton" on "cuda": what has only been interpreted and compiled has to be asked for
_DEFAULT_ON = {"cpu": "cpu"}


class Options(NamedTuple):
    """The arguments of an energy that are not tensors, in the order of the operators' schemas."""

    s: float = 2.0
    half_space: bool = False
    angular: bool = False
    reduction: str = "mean"
    eps: float = 0.0
    min_distance: float = 1e-3
    backend: str = "torch"


# --- backends -------------------------------------------------------------------------------------


def _load(name: str) -> ModuleType:
    """The module of a backend; imported at first use, so that importing us never needs Triton."""
    return importlib.import_module(_MODULES[name])


def unavailable(name: str) -> str | None:
    """Why a backend cannot be used here, and the remedy; None if it can."""
    try:
        module = _load(name)
    except ImportError as error:
        return f"backend {name!r} is not part of this installation ({error}): use backend='torch'"
    return module.unavailable()


# a constant to torch.compile: tracing must not follow the search for libraries and GPUs. This is
# all that torch.compiler.assume_constant_result does, but that imports Dynamo and with it Triton
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_backend(name: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend to use: the one asked for, which must work here, or the best that does."""
    if name is None:
        best = _DEFAULT_ON.get(device.type, "torch")
        # the compiled backends compute in float32
        usable = dtype != torch.float64 and best != "torch" and unavailable(best) is None
        return best if usable else "torch"
    if name not in BACKENDS:
        raise ValueError(f"`backend` must be one of {BACKENDS} or None, got {name!r}")
    if name == "torch":
        return name
    if (reason := unavailable(name)) is not None:
        raise RuntimeError(reason)
    if _DEVICE_OF[name] != device.type:
        raise ValueError(
            f"backend {name!r} needs tensors on {_DEVICE_OF[name]}, got {device}: "
            "use backend='torch'"
        )
    if dtype == torch.float64:
        raise TypeError(f"backend {name!r} computes in float32, got float64: use backend='torch'")
    return name


# --- raw operators --------------------------------------------------------------------------------

_SETTINGS = (
    "int[] sizes, float s, bool half_space, bool angular, str reduction, float eps, "
    "float min_distance, str backend"
)
_LIBRARY = torch.library.Library("comhe_ext", "DEF")


def _define(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the implementation of an operator on every device."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        return implementation

    return register


def _packed(points: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
    """Either form of points as rows [T, k], and the size of each set."""
    if points.dim() == 2:
        if sum(sizes) != points.shape[0] or min(sizes, default=0) < 0:
            raise ValueError(f"`sizes` must add up to {points.shape[0]} rows, got {list(sizes)}")
        return points.contiguous(), sizes
    return points.flatten(0, 1).contiguous(), [points.shape[1]] * points.shape[0]


def _num_sets(points: Tensor, sizes: Sequence[int]) -> int:
    return len(sizes) if points.dim() == 2 else points.shape[0]


def _accumulation_dtype(points: Tensor) -> torch.dtype:
    return torch.float64 if points.dtype == torch.float64 else torch.float32


def _sweep(
    points: Tensor, sizes: Sequence[int], options: Options, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    module = _load(options.backend)
    energy, gradient = module.sweep(*_sweep_arguments(points, sizes, options), with_gradient)
    return energy, gradient if gradient is None else gradient.view(points.shape)


def _sweep_arguments(
    points: Tensor, sizes: Sequence[int], options: Options
) -> tuple[Tensor, Sequence[int], list[float], Potential, float]:
    """What every sweep takes: packed rows, sizes, scales, the pair function and eps."""
    rows, sizes = _packed(points, sizes)
    pair = Potential(options.s, options.half_space, options.angular, options.min_distance)
    return rows, sizes, [pair.scale(n, options.reduction) for n in sizes], pair, options.eps


@_define(f"energy(Tensor points, {_SETTINGS}) -> Tensor")
def _energy(points: Tensor, sizes: Sequence[int], *settings: Any) -> Tensor:
    return _sweep(points, sizes, Options(*settings), with_gradient=False)[0]


@_define(f"energy_and_gradient(Tensor points, {_SETTINGS}) -> (Tensor, Tensor)")
def _energy_and_gradient(
    points: Tensor, sizes: Sequence[int], *settings: Any
) -> tuple[Tensor, Tensor | None]:
    return _sweep(points, sizes, Options(*settings), with_gradient=True)


@_define(f"hessian_vector_product(Tensor points, Tensor tangents, {_SETTINGS}) -> Tensor")
def _hessian_vector_product(
    points: Tensor, tangents: Tensor, sizes: Sequence[int], *settings: Any
) -> Tensor:
    rows, *rest = _sweep_arguments(points, sizes, Options(*settings))
    # the portable tiles serve every device: second order is asked for rarely
    product = portable.hessian_vector_product(rows, tangents.reshape(rows.shape), *rest)
    return product.view(points.shape)


@_define("scale_rows(Tensor rows, Tensor factors, int[] sizes) -> Tensor")
def _scale_rows(rows: Tensor, factors: Tensor, sizes: Sequence[int]) -> Tensor:
    if rows.dim() == 3:
        return rows * factors[:, None, None]
    return rows * work_table.spread_over_rows(factors.contiguous(), sizes)


@_define("dot_rows(Tensor left, Tensor right, int[] sizes) -> Tensor")
def _dot_rows(left: Tensor, right: Tensor, sizes: Sequence[int]) -> Tensor:
    if left.dim() == 3:
        return (left * right).sum((1, 2))
    products = (left * right).sum(1)
    dots = products.new_zeros(len(sizes))
    for run in work_table.equal_runs(sizes):
        dots[run.sets] = run.view(products).sum(1)
    return dots


@torch.library.register_fake("comhe_ext::energy", lib=_LIBRARY)
def _(points: Tensor, sizes: Sequence[int], *settings: Any) -> Tensor:
    return points.new_empty(_num_sets(points, sizes), dtype=_accumulation_dtype(points))


@torch.library.register_fake("comhe_ext::energy_and_gradient", lib=_LIBRARY)
def _(points: Tensor, sizes: Sequence[int], *settings: Any) -> tuple[Tensor, Tensor]:
    dtype = _accumulation_dtype(points)
    energy = points.new_empty(_num_sets(points, sizes), dtype=dtype)
    return energy, points.new_empty(points.shape, dtype=dtype)


@torch.library.register_fake("comhe_ext::hessian_vector_product", lib=_LIBRARY)
def _(points: Tensor, tangents: Tensor, sizes: Sequence[int], *settings: Any) -> Tensor:
    return points.new_empty(points.shape, dtype=_accumulation_dtype(points))


@torch.library.register_fake("comhe_ext::scale_rows", lib=_LIBRARY)
def _(rows: Tensor, factors: Tensor, sizes: Sequence[int]) -> Tensor:
    return rows.new_empty(rows.shape, dtype=torch.promote_types(rows.dtype, factors.dtype))


@torch.library.register_fake("comhe_ext::dot_rows", lib=_LIBRARY)
def _(left: Tensor, right: Tensor, sizes: Sequence[int]) -> Tensor:
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.new_empty(_num_sets(left, sizes), dtype=dtype)


# --- vmap: the batch becomes more sets of the same launch -----------------------------------------


def _flat(x: Tensor, dim: int | None, batch: int) -> Tensor:
    """The batch dimension in front, merged with the first one."""
    x = x.unsqueeze(0).expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _split(x: Tensor, batch: int) -> Tensor:
    return x.view(batch, x.shape[0] // batch, *x.shape[1:])


def _register_vmap(name: str, num_tensors: int, num_outputs: int = 1) -> None:
    """Batching rule of an operator whose arguments are some tensors, then `sizes`."""
    op = getattr(torch.ops.comhe_ext, name).default

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        batch = info.batch_size
        tensors = [_flat(x, d, batch) for x, d in zip(args[:num_tensors], in_dims, strict=False)]
        sizes = list(args[num_tensors]) * batch
        results = op(*tensors, sizes, *args[num_tensors + 1 :])
        if num_outputs == 1:
            return _split(results, batch), 0
        return tuple(_split(r, batch) for r in results), (0,) * num_outputs

    torch.library.register_vmap(f"comhe_ext::{name}", rule, lib=_LIBRARY)


_register_vmap("energy", num_tensors=1)
_register_vmap("energy_and_gradient", num_tensors=1, num_outputs=2)
_register_vmap("hessian_vector_product", num_tensors=2)
_register_vmap("scale_rows", num_tensors=2)
_register_vmap("dot_rows", num_tensors=2)


# --- autograd -------------------------------------------------------------------------------------


class _Energy(torch.autograd.Function):
    """points -> energy [B]; the gradient comes out beside it to be kept for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(points: Tensor, sizes: Sequence[int], *settings: Any) -> tuple[Tensor, Tensor]:
        energy, gradient = torch.ops.comhe_ext.energy_and_gradient(points, sizes, *settings)
        return energy, gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        points, ctx.sizes, *ctx.settings = inputs
        gradient = output[1]
        ctx.mark_non_differentiable(gradient)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(points, gradient)

    @staticmethod
    def backward(ctx: Any, grad_energy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (1 + len(ctx.settings))
        if grad_energy is None:
            return None, *nothing
        points, gradient = ctx.saved_tensors
        # nobody differentiates what runs without grad mode: then the operator itself will do, also
        # because Dynamo (2.13) cannot trace a setup_context Function inside a backward
        scale = _Gradient.apply if torch.is_grad_enabled() else _Gradient.forward
        return scale(points, grad_energy, gradient, ctx.sizes, *ctx.settings), *nothing


class _Gradient(torch.autograd.Function):
    """gradient of sum_b grad_energy_b E_b in the points, out of the saved one: scaled, and cast."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        points: Tensor, grad_energy: Tensor, gradient: Tensor, sizes: Sequence[int], *settings: Any
    ) -> Tensor:
        scaled: Tensor = torch.ops.comhe_ext.scale_rows(gradient, grad_energy, sizes)
        return scaled.to(points.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        points, grad_energy, gradient, ctx.sizes, *ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(points, grad_energy, gradient)

    @staticmethod
    def backward(ctx: Any, tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (2 + len(ctx.settings))
        if tangents is None:
            return None, None, *nothing
        points, grad_energy, gradient = ctx.saved_tensors
        product, dots = _SecondOrder.apply(
            points, tangents, grad_energy, gradient, ctx.sizes, *ctx.settings
        )
        return product, dots, *nothing


class _SecondOrder(torch.autograd.Function):
    """grad_energy_b H_b t and <gradient, t>: what `_Gradient` owes to points and grad_energy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        points: Tensor,
        tangents: Tensor,
        grad_energy: Tensor,
        gradient: Tensor,
        sizes: Sequence[int],
        *settings: Any,
    ) -> tuple[Tensor, Tensor]:
        ops = torch.ops.comhe_ext
        product = ops.hessian_vector_product(points, tangents, sizes, *settings)
        product = ops.scale_rows(product, grad_energy, sizes).to(points.dtype)
        return product, ops.dot_rows(tangents, gradient, sizes).to(grad_energy.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "comhe_ext: the energy is differentiable twice; third derivatives are not implemented"
        )


def energy(points: Tensor, sizes: Sequence[int], options: Options) -> Tensor:
    """Energies [B] of sets of rows: [B, N, k], or [T, k] and `sizes`; differentiable twice."""
    if torch.is_grad_enabled() and points.requires_grad:
        return _Energy.apply(points, sizes, *options)[0]
    return torch.ops.comhe_ext.energy(points, sizes, *options)
