"""The raw operators, their autograd, and the choice of backend.

    comhe_ext::energy                         points -> energy [B]
    comhe_ext::energy_and_gradient            points -> energy [B], gradient like points
    comhe_ext::projected_energy               weights, projections -> energy [B]
    comhe_ext::projected_energy_and_gradient  and the gradient in the projected rows, [T, k]
    comhe_ext::hessian_vector_product         points, tangents -> like points
    comhe_ext::scale_rows                     rows, a factor of each set [B] -> like rows
    comhe_ext::dot_rows                       rows, rows -> [B]

Points are B sets of N rows, [B, N, k], with `sizes` empty; or sets of the B `sizes` one after
another, [T, k]. The first form keeps a symbolic N out of the arguments under torch.compile.

Weights are a list of [V, N, d], sets of any size and width; each has a projection [C, k, d], or
None where its rows are taken as they are, filled up with zeros to k columns. Weight by weight, set
by set, matrix by matrix they make the sets of one sweep, V C sets of N rows each. A backend may
project and sweep in one go, and nothing keeps the projected rows for the backward.

The energy of a set is one number, so the forward sweep makes the gradient along with it: the
backward only scales it, and the derivative along tangents (forward mode) is its product with them.
The gradient is a differentiable function too, in both modes, by a closed-form Hessian-vector
product; a third derivative raises instead of being silently wrong. `energy` and `projected_energy`
at the end put this together; the operators of sweeps themselves have no derivative.
"""

import importlib
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad

from comhe_ext.kernels import portable, work_table
from comhe_ext.potentials import Potential

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("triton", "cpu", "torch")
_MODULES = {
    "triton": "comhe_ext.kernels.gpu",
    "cpu": "comhe_ext.kernels.cpu.binding",
    "torch": "comhe_ext.kernels.portable",
}
# torch calls ROCm devices "cuda" too
_DEVICE_OF = {"triton": "cuda", "cpu": "cpu"}
# what the schedule of a compiled backend holds
_MAX_COLUMNS = {"cpu": 1 << 24}
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
    factors: Sequence[float] = ()  # of the sets' energies, one a set; none: all 1

    def check(self) -> None:
        """Refuse numbers and names out of range; the types are known to be right."""
        if not 0 <= self.s < math.inf:
            raise ValueError(f"`s` must be finite and at least 0, got {self.s}")
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"`eps` must be finite and at least 0, got {self.eps}")
        if not 0 <= self.min_distance < 2:
            raise ValueError(
                f"`min_distance` must be at least 0 and less than 2, got {self.min_distance}"
            )
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"`reduction` must be 'mean' or 'sum', got {quote(self.reduction)}")
        if self.backend not in BACKENDS:
            raise ValueError(f"`backend` must be one of {BACKENDS}, got {quote(self.backend)}")
        for factor in self.factors:
            if not -math.inf < factor < math.inf:
                raise ValueError(f"`factors` must be finite, got {factor}")

    def scales(self, sizes: Sequence[int]) -> list[float]:
        """From each set's sum over unordered pairs to its energy, factor included."""
        pair = self.pair_function()
        scales = [pair.scale(n, self.reduction) for n in sizes]
        if not self.factors:
            return scales
        return [scale * factor for scale, factor in zip(scales, self.factors, strict=True)]

    def pair_function(self) -> Potential:
        return Potential(self.s, self.half_space, self.angular, self.min_distance)


def quote(value: object) -> str:
    """A wrong value as it was given if that is short, else its type: a tensor fills pages."""
    short = value is None or isinstance(value, (str, type, int, float))
    return repr(value) if short else type(value).__name__


# --- backends -------------------------------------------------------------------------------------


_loaded: dict[str, ModuleType] = {}


def _load(name: str) -> ModuleType:
    """The module of a backend; imported at first use, so that importing us never needs Triton."""
    if name not in _loaded:
        _loaded[name] = importlib.import_module(_MODULES[name])
    return _loaded[name]


def unavailable(name: str) -> str | None:
    """Why a backend cannot be used here, and the remedy; None if it can."""
    try:
        module = _load(name)
    except ImportError as error:
        return f"backend {name!r} is not part of this installation ({error}): use backend='torch'"
    return module.unavailable()


_untold = threading.Lock()  # taken by the one thread that warns, and never given back


def _tell_what_is_missing(name: str) -> None:
    """Warn once a process where it could have a compiled kernel, which its build left out quietly.

    pip hides what a build prints, so a compiler that fails would go unnoticed.
    """
    if sys.platform in ("linux", "darwin") and _untold.acquire(blocking=False):
        warnings.warn(
            f"{unavailable(name)}. Until then backend 'torch' does its work, several times slower "
            "(backend='torch' asks for it without this warning). The kernel needs g++, or clang++ "
            "with OpenMP; `pip install -v` shows what the compiler says",
            stacklevel=3,
        )


# constants to torch.compile: tracing must not follow the search for libraries and GPUs. This is
# all that torch.compiler.assume_constant_result does, but that imports Dynamo and with it Triton
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]
_tell_what_is_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_backend(
    name: str | None, device: torch.device, dtype: torch.dtype, columns: int = 1
) -> str:
    """The backend to use: the one asked for, which must work here, or the best that does."""
    if name is None:
        best = _DEFAULT_ON.get(device.type, "torch")
        if best == "torch" or _misfit(best, dtype, columns) is not None:
            return "torch"
        if unavailable(best) is None:
            return best
        _tell_what_is_missing(best)
        return "torch"
    if name not in BACKENDS:
        raise ValueError(f"`backend` must be one of {BACKENDS} or None, got {quote(name)}")
    if name == "torch":
        return name
    if (reason := unavailable(name)) is not None:
        raise RuntimeError(reason)
    if _DEVICE_OF[name] != device.type:
        raise ValueError(
            f"backend {name!r} needs tensors on {_DEVICE_OF[name]}, got {device}: "
            "use backend='torch'"
        )
    if (error := _misfit(name, dtype, columns)) is not None:
        raise error
    return name


def _misfit(name: str, dtype: torch.dtype, columns: int) -> Exception | None:
    """Why a backend cannot take rows of a dtype and so many columns; None if it can."""
    if name != "torch" and dtype == torch.float64:
        return TypeError(f"backend {name!r} computes in float32, got float64: use backend='torch'")
    if name in _MAX_COLUMNS and columns > _MAX_COLUMNS[name]:
        return ValueError(
            f"backend {name!r} takes at most {_MAX_COLUMNS[name]} columns, got {columns}: "
            "use backend='torch'"
        )
    return None


# --- raw operators --------------------------------------------------------------------------------

_SETTINGS = (
    "float s, bool half_space, bool angular, str reduction, float eps, float min_distance, "
    "str backend, float[] factors=[]"
)
_PACKED = f"int[] sizes, {_SETTINGS}"
_PROJECTED = f"Tensor[] weights, Tensor?[] projections, {_SETTINGS}"
LIBRARY = torch.library.Library("comhe_ext", "DEF")


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast would lower the products to half precision, and the energy with them."""
    # a meta tensor's device has no autocast to ask for
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def define(
    schema: str, *, composite: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the implementation of an operator on every device.

    composite: it is made of torch's own operators, which also give it shapes and derivatives.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        def full_precision(*args: Any) -> Any:
            first = args[0][:1] if isinstance(args[0], Sequence) else args[:1]
            with no_autocast(first[0].device.type if first else "cpu"):
                return implementation(*args)

        untraced = _disable_dynamo(full_precision)

        def kernel(*args: Any) -> Any:
            # after a trace has ended Dynamo tries every frame that runs, but a kernel is no frame
            # for it; it is not told so where it is not used, for its import takes seconds
            call = untraced if "torch._dynamo" in sys.modules else full_precision
            return call(*args)

        if composite:
            LIBRARY.impl(name, implementation, "CompositeImplicitAutograd")
        else:
            LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        return implementation

    return register


def _packed(points: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
    """Either form of points as rows [T, k], and the size of each set."""
    if points.dim() == 2:
        return points.contiguous(), sizes
    return points.flatten(0, 1).contiguous(), [points.shape[1]] * points.shape[0]


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 if one of the tensors is."""
    doubles = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if doubles else torch.float32


def project(weight: Tensor, projection: Tensor) -> Tensor:
    """Rows [V, N, d] under each of the matrices [C, k, d] -> [V, C, N, k], as one product."""
    dtype = compute_dtype(weight, projection)
    rows = weight.to(dtype).flatten(0, 1)
    products = _product(rows, projection.to(dtype).flatten(0, 1).mT)
    return (
        products.unflatten(0, weight.shape[:2]).unflatten(-1, projection.shape[:2]).transpose(1, 2)
    )


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of two matrices, which autocast lowers in none of its derivatives."""
    # compiled derivatives are traced while autocast is off, and Dynamo refuses a jvp
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(left.device.type):
        return left @ right
    return _Product.apply(left, right)


def pad(rows: Tensor, width: int) -> Tensor:
    """Rows of `width` columns; a coordinate of zeros changes no cosine."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[-1]))


def _project_all(
    weights: Sequence[Tensor], projections: Sequence[Tensor | None]
) -> Iterator[Tensor]:
    """The rows of each weight under all its matrices, its sets one after the other, [..., k]."""
    width, dtype = _width(projections), compute_dtype(*weights, *projections)
    for weight, matrices in zip(weights, projections, strict=True):
        rows = pad(weight, width) if matrices is None else project(weight, matrices)
        yield rows.to(dtype)


def _project_packed(
    weights: Sequence[Tensor], projections: Sequence[Tensor | None], sizes: Sequence[int]
) -> Tensor:
    """All of `_project_all`, [T, k]; copied once, from where the products left it."""
    width, dtype = _width(projections), compute_dtype(*weights, *projections)
    packed = weights[0].new_empty(sum(sizes), width, dtype=dtype)
    first = 0
    for rows in _project_all(weights, projections):
        last = first + rows.numel() // width
        packed[first:last].view(rows.shape).copy_(rows)
        first = last
    return packed


def _project_points(
    weights: Sequence[Tensor], projections: Sequence[Tensor | None]
) -> tuple[Tensor, list[int]]:
    """The same by torch's differentiable operators, and the size of each set."""
    width = _width(projections)
    parts = [rows.reshape(-1, width) for rows in _project_all(weights, projections)]
    return torch.cat(parts), _set_sizes(weights, projections)


def _width(projections: Sequence[Tensor | None]) -> int:
    """k, the one number of rows of all matrices."""
    return next(matrices.shape[1] for matrices in projections if matrices is not None)


def _set_sizes(weights: Sequence[Tensor], projections: Sequence[Tensor | None]) -> list[int]:
    """N of each set that `_project_all` makes."""
    return [
        n
        for weight, matrices in zip(weights, projections, strict=True)
        for n in [weight.shape[1]] * (weight.shape[0] * _count(matrices))
    ]


def _count(matrices: Tensor | None) -> int:
    return 1 if matrices is None else matrices.shape[0]


# What an operator is handed may come from anywhere: it is checked before any kernel, and by the
# shape functions too, so that a compiler's trace fails where the eager call fails.


def check_rows(name: str, rows: Tensor, dims: Sequence[int]) -> None:
    """Refuse what is no dense floating-point tensor of so many dimensions."""
    if rows.dtype not in DTYPES:
        raise TypeError(f"`{name}` must be float16, bfloat16, float32 or float64, got {rows.dtype}")
    if rows.layout != torch.strided:
        raise TypeError(f"`{name}` must be a dense tensor, got layout {rows.layout}")
    shape = rows.shape
    if len(shape) not in dims:
        expected = " or ".join(f"{dim}-D" for dim in dims)
        raise ValueError(f"`{name}` must be {expected}, got shape {tuple(shape)}")
    if shape[-1] == 0:
        raise ValueError(f"`{name}` must have at least one column, got shape {tuple(shape)}")


def check_like(name: str, rows: Tensor, other: str, like: Tensor) -> None:
    """Refuse rows of another shape or device than those they belong to."""
    check_rows(name, rows, (like.dim(),))
    if rows.shape != like.shape:
        raise ValueError(
            f"`{name}` must have the shape of `{other}`, got {tuple(rows.shape)} and "
            f"{tuple(like.shape)}"
        )
    check_device(name, rows, other, like)


def check_device(name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"`{name}` must be on the device of `{other}`, got {tensor.device} and {like.device}"
        )


def _count_sets(name: str, points: Tensor, sizes: Sequence[int]) -> int:
    """How many sets points of either form hold, checked."""
    check_rows(name, points, (2, 3))
    if points.dim() == 3:
        if len(sizes) > 0:
            raise ValueError(f"`sizes` must be empty where `{name}` is 3-D, got {list(sizes)}")
        return points.shape[0]
    if sum(sizes) != points.shape[0] or min(sizes, default=0) < 0:
        raise ValueError(
            f"`sizes` must be at least 0 and add up to {points.shape[0]} rows, got {list(sizes)}"
        )
    return len(sizes)


def _check_options(
    settings: Sequence[Any], sets: int, columns: int, *tensors: Tensor | None
) -> Options:
    """The settings of an operator on so many sets of rows, made from these tensors."""
    options = Options(*settings)
    options.check()
    factors = options.factors
    if len(factors) > 0 and len(factors) != sets:
        raise ValueError(f"`factors` must be empty or one a set ({sets}), got {len(factors)}")
    if options.backend == "torch":
        return options
    first = tensors[0]
    if options.backend == "cpu" and first is not None and first.device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs tensors on cpu, got {first.device}")
    if (error := _misfit(options.backend, compute_dtype(*tensors), columns)) is not None:
        raise error
    return options


def _check_points(
    points: Tensor, sizes: Sequence[int], settings: Sequence[Any]
) -> tuple[int, Options]:
    sets = _count_sets("points", points, sizes)
    return sets, _check_options(settings, sets, points.shape[-1], points)


def _check_weights(
    weights: Sequence[Tensor], projections: Sequence[Tensor | None], settings: Sequence[Any]
) -> tuple[list[int], Options]:
    """Sizes of the sets that weights and projections make, and the settings."""
    if len(weights) == 0:
        raise ValueError("`weights` must hold at least one tensor, got none")
    if len(projections) != len(weights):
        raise ValueError(
            f"`projections` must have one entry a weight ({len(weights)}), got {len(projections)}"
        )
    if all(matrices is None for matrices in projections):
        raise ValueError("`projections` must hold at least one tensor, got only None")
    width = _width(projections)
    for weight, matrices in zip(weights, projections, strict=True):
        check_rows("weights", weight, (3,))
        check_device("weights", weight, "weights[0]", weights[0])
        if matrices is None:
            if weight.shape[2] > width:
                raise ValueError(
                    f"`weights` without a projection must have at most the {width} columns of the "
                    f"projected rows, got shape {tuple(weight.shape)}"
                )
            continue
        check_rows("projections", matrices, (3,))
        check_device("projections", matrices, "weights", weight)
        count, rows, columns = matrices.shape
        if count == 0 or rows != width or width == 0 or columns != weight.shape[2]:
            raise ValueError(
                f"`projections` must be [C, {max(width, 1)}, {weight.shape[2]}] for a weight of "
                f"shape {tuple(weight.shape)}, got shape {tuple(matrices.shape)}"
            )
    sizes = _set_sizes(weights, projections)
    return sizes, _check_options(settings, len(sizes), width, *weights, *projections)


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
    return rows, sizes, options.scales(sizes), options.pair_function(), options.eps


@define(f"energy(Tensor points, {_PACKED}) -> Tensor")
def _energy(points: Tensor, sizes: Sequence[int], *settings: Any) -> Tensor:
    _, options = _check_points(points, sizes, settings)
    return _sweep(points, sizes, options, with_gradient=False)[0]


@define(f"energy_and_gradient(Tensor points, {_PACKED}) -> (Tensor, Tensor)")
def _energy_and_gradient(
    points: Tensor, sizes: Sequence[int], *settings: Any
) -> tuple[Tensor, Tensor | None]:
    _, options = _check_points(points, sizes, settings)
    return _sweep(points, sizes, options, with_gradient=True)


def _project_sweep(
    weights: Sequence[Tensor],
    projections: Sequence[Tensor | None],
    settings: Sequence[Any],
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    sizes, options = _check_weights(weights, projections, settings)
    module = _load(options.backend)
    if not hasattr(module, "project_sweep"):
        return _sweep(_project_packed(weights, projections, sizes), sizes, options, with_gradient)
    sets: list[Tensor] = []
    matrices: list[Tensor | None] = []
    for weight, projection in zip(weights, projections, strict=True):
        sets += weight.unbind()
        matrices += [None if projection is None else projection.float()] * weight.shape[0]
    energy, gradient = module.project_sweep(
        sets,
        matrices,
        options.scales(sizes),
        options.pair_function(),
        options.eps,
        with_gradient,
    )
    return energy, gradient


@define(f"projected_energy({_PROJECTED}) -> Tensor")
def _projected_energy(
    weights: Sequence[Tensor], projections: Sequence[Tensor | None], *settings: Any
) -> Tensor:
    return _project_sweep(weights, projections, settings, with_gradient=False)[0]


@define(f"projected_energy_and_gradient({_PROJECTED}) -> (Tensor, Tensor)")
def _projected_energy_and_gradient(
    weights: Sequence[Tensor], projections: Sequence[Tensor | None], *settings: Any
) -> tuple[Tensor, Tensor | None]:
    return _project_sweep(weights, projections, settings, with_gradient=True)


@define(f"hessian_vector_product(Tensor points, Tensor tangents, {_PACKED}) -> Tensor")
def _hessian_vector_product(
    points: Tensor, tangents: Tensor, sizes: Sequence[int], *settings: Any
) -> Tensor:
    _, options = _check_points(points, sizes, settings)
    check_like("tangents", tangents, "points", points)
    rows, sizes, scales, pair, eps = _sweep_arguments(points, sizes, options)
    tangents = tangents.reshape(rows.shape)
    # the portable tiles serve every device: second order is asked for rarely
    product = portable.hessian_vector_product(rows, tangents, sizes, scales, pair, eps)
    return product.view(points.shape)


@define("scale_rows(Tensor rows, Tensor factors, int[] sizes) -> Tensor", composite=True)
def _scale_rows(rows: Tensor, factors: Tensor, sizes: Sequence[int]) -> Tensor:
    sets = _count_sets("rows", rows, sizes)
    check_device("factors", factors, "rows", rows)
    if factors.dim() != 1 or factors.shape[0] != sets:
        raise ValueError(f"`factors` must be one a set ({sets},), got {tuple(factors.shape)}")
    if rows.dim() == 3:
        return rows * factors[:, None, None]
    return rows * work_table.spread_over_rows(factors, sizes)


@define("dot_rows(Tensor left, Tensor right, int[] sizes) -> Tensor", composite=True)
def _dot_rows(left: Tensor, right: Tensor, sizes: Sequence[int]) -> Tensor:
    _count_sets("left", left, sizes)
    check_like("right", right, "left", left)
    if left.dim() == 3:
        return (left * right).sum((1, 2))
    return work_table.sum_over_rows((left * right).sum(1), sizes)


@torch.library.register_fake("comhe_ext::energy", lib=LIBRARY)
def _(points: Tensor, sizes: Sequence[int], *settings: Any) -> Tensor:
    sets, _ = _check_points(points, sizes, settings)
    return points.new_empty(sets, dtype=compute_dtype(points))


@torch.library.register_fake("comhe_ext::energy_and_gradient", lib=LIBRARY)
def _(points: Tensor, sizes: Sequence[int], *settings: Any) -> tuple[Tensor, Tensor]:
    sets, _ = _check_points(points, sizes, settings)
    dtype = compute_dtype(points)
    return points.new_empty(sets, dtype=dtype), points.new_empty(points.shape, dtype=dtype)


@torch.library.register_fake("comhe_ext::projected_energy", lib=LIBRARY)
def _(weights: Sequence[Tensor], projections: Sequence[Tensor | None], *settings: Any) -> Tensor:
    sizes, _ = _check_weights(weights, projections, settings)
    return weights[0].new_empty(len(sizes), dtype=compute_dtype(*weights, *projections))


@torch.library.register_fake("comhe_ext::projected_energy_and_gradient", lib=LIBRARY)
def _(
    weights: Sequence[Tensor], projections: Sequence[Tensor | None], *settings: Any
) -> tuple[Tensor, Tensor]:
    sizes, _ = _check_weights(weights, projections, settings)
    dtype = compute_dtype(*weights, *projections)
    gradient = weights[0].new_empty(sum(sizes), _width(projections), dtype=dtype)
    return weights[0].new_empty(len(sizes), dtype=dtype), gradient


@torch.library.register_fake("comhe_ext::hessian_vector_product", lib=LIBRARY)
def _(points: Tensor, tangents: Tensor, sizes: Sequence[int], *settings: Any) -> Tensor:
    _check_points(points, sizes, settings)
    check_like("tangents", tangents, "points", points)
    return points.new_empty(points.shape, dtype=compute_dtype(points))


# --- vmap: the batch becomes more sets of the same launch -----------------------------------------


def _in_front(x: Tensor, dim: int | None, batch: int) -> Tensor:
    """The batch dimension as the first one."""
    return x.unsqueeze(0).expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)


def over_batch(
    call: Callable[..., Any], info: Any, in_dims: Sequence[Any], tensors: Sequence[Any], *rest: Any
) -> tuple[Any, Any]:
    """What a batching rule returns, by a call on the sets of all elements of the batch at once."""
    batch = info.batch_size
    flat = []
    for x, dim in zip(tensors, in_dims, strict=False):
        if x is not None:
            x = _in_front(x, dim, batch)
            x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
        flat.append(x)
    results = call(*flat, *rest)
    if isinstance(results, Tensor):
        return _split(results, batch), 0
    return tuple(_split(x, batch) for x in results), (0,) * len(results)


def _split(x: Tensor, batch: int) -> Tensor:
    return x.view(batch, x.shape[0] // batch, *x.shape[1:])


def _each(x: Tensor | None, dim: int | None, batch: int) -> list[Tensor | None]:
    """A tensor for each element of the batch."""
    return [x] * batch if x is None or dim is None else list(x.unbind(dim))


def _repeat_factors(settings: Sequence[Any], batch: int) -> Options:
    """The settings of an operator for all sets of the batch."""
    options = Options(*settings)
    return options._replace(factors=list(options.factors) * batch)


def _register_vmap_of_lists(name: str) -> None:
    """Batching rule of an operator on lists: the lists of every element, one after the other."""
    op = getattr(torch.ops.comhe_ext, name).default

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        batch, lists = info.batch_size, []
        for tensors, dims in zip(args[:2], in_dims[:2], strict=True):
            by_tensor = [_each(x, d, batch) for x, d in zip(tensors, dims, strict=True)]
            lists.append([x for element in zip(*by_tensor, strict=True) for x in element])
        results = op(*lists, *_repeat_factors(args[2:], batch))
        if isinstance(results, Tensor):
            return _split(results, batch), 0
        return tuple(_split(r, batch) for r in results), (0, 0)

    torch.library.register_vmap(f"comhe_ext::{name}", rule, lib=LIBRARY)


def register_vmap(name: str, num_tensors: int, packed: bool = True) -> None:
    """Batching rule of an operator on some tensors of many sets.

    packed: the sets' sizes come after them, and the settings of an energy where it is one.
    """
    op = getattr(torch.ops.comhe_ext, name).default

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        tensors, rest = args[:num_tensors], args[num_tensors:]
        if packed:
            sizes, settings = list(rest[0]) * info.batch_size, rest[1:]
            rest = (sizes, *(_repeat_factors(settings, info.batch_size) if settings else ()))
        return over_batch(op, info, in_dims, tensors, *rest)

    torch.library.register_vmap(f"comhe_ext::{name}", rule, lib=LIBRARY)


register_vmap("energy", num_tensors=1)
register_vmap("energy_and_gradient", num_tensors=1)
_register_vmap_of_lists("projected_energy")
_register_vmap_of_lists("projected_energy_and_gradient")
register_vmap("hessian_vector_product", num_tensors=2)
register_vmap("scale_rows", num_tensors=2)
register_vmap("dot_rows", num_tensors=2)


# --- autograd -------------------------------------------------------------------------------------


def forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open, so that any tensor may be dual."""
    return forward_ad._current_level >= 0


def under_vmap() -> bool:
    """Whether a vmap is running: its tensors do not tell whether they are being differentiated."""
    if not torch._C._are_functorch_transforms_active():
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def leave_trace() -> None:
    """End a trace of torch.compile: it would lose what follows, and the result a derivative."""


# constants to torch.compile, as `unavailable` is: Dynamo makes a new trace where they change
forward_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]
under_vmap._dynamo_marked_constant = True  # type: ignore[attr-defined]
# all that torch.compiler.disable does here, but that imports Dynamo and with it Triton
leave_trace._torchdynamo_disable = True  # type: ignore[attr-defined]
leave_trace._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "comhe_ext: not in a trace are forward mode, and vmap where gradients may be asked for"
)


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether somebody may ask for a derivative in one of the tensors, in reverse mode."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    if under_vmap():
        leave_trace()
        return True
    return False


def differentiable_jvp(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Let the jvp of a Function, called as jvp(ctx, *saved, *tangents), be differentiated again.

    Around a jvp torch turns forward mode off, for the levels of torch.func further out too: their
    derivative of it would be zero. Instead the saved tensors lose the tangents of this level.
    Under vmap they could not, so such a Function has a vmap rule of its own, without a batch in it.
    """

    @wraps(jvp)
    def within_outer_levels(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors]
            return jvp(ctx, *saved, *tangents)

    return within_outer_levels


class _Energy(torch.autograd.Function):
    """points -> energy [B]; the gradient comes out beside it to be kept for the derivatives."""

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
        # nobody differentiates what runs without grad mode or tangents: then the values will do,
        # also because Dynamo (2.13) cannot trace a setup_context Function inside a backward
        if torch.is_grad_enabled() or forward_mode():
            gradient = _Gradient.apply(points, gradient, _Sets(ctx.sizes, ctx.settings))
        scaled = torch.ops.comhe_ext.scale_rows(gradient, grad_energy, ctx.sizes)
        return scaled.to(points.dtype), *nothing


class _EnergyWithTangents(torch.autograd.Function):
    """The same in forward mode too; apart, because Dynamo refuses a Function that has a jvp."""

    @staticmethod
    def forward(points: Tensor, sets: "_Sets") -> tuple[Tensor, Tensor]:
        return _Energy.forward(points, sets.sizes, *sets.settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        points, sets = inputs
        _Energy.setup_context(ctx, (points, sets.sizes, *sets.settings), output)
        ctx.save_for_forward(points, output[1])

    @staticmethod
    def backward(ctx: Any, grad_energy: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        return _Energy.backward(ctx, grad_energy, None)[0], None

    @staticmethod
    @differentiable_jvp
    def jvp(
        ctx: Any, points: Tensor, gradient: Tensor, tangents: Tensor, _: None
    ) -> tuple[Tensor, None]:
        gradient = _Gradient.apply(points, gradient, _Sets(ctx.sizes, ctx.settings))
        return torch.ops.comhe_ext.dot_rows(gradient, tangents, ctx.sizes), None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], points: Tensor, sets: "_Sets") -> tuple[Any, Any]:
        sets = sets.repeat(info.batch_size)
        return over_batch(_EnergyWithTangents.apply, info, in_dims, [points], sets)


class _ProjectedEnergy(torch.autograd.Function):
    """Weights and projections -> energy [B]; the gradient in the projected rows is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(num_weights: int, settings: Sequence[Any], *tensors: Any) -> tuple[Tensor, Tensor]:
        weights, projections = tensors[:num_weights], tensors[num_weights:]
        energy, gradient = torch.ops.comhe_ext.projected_energy_and_gradient(
            weights, projections, *settings
        )
        return energy, gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.num_weights, ctx.settings, *tensors = inputs
        gradient = output[1]
        ctx.mark_non_differentiable(gradient)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_energy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_energy is None:
            return None, None, *[None] * (len(ctx.needs_input_grad) - 2)
        gradient, *tensors = ctx.saved_tensors
        weights, projections = tensors[: ctx.num_weights], tensors[ctx.num_weights :]
        factors: Tensor | None = grad_energy
        if torch.is_grad_enabled() or forward_mode():
            # to be differentiated again: as a function of the rows, and they of both tensors
            points, sizes = _project_points(weights, projections)
            gradient = _Gradient.apply(points, gradient, _Sets(sizes, ctx.settings))
            gradient = torch.ops.comhe_ext.scale_rows(gradient, grad_energy, sizes)
            factors = None
        needed = ctx.needs_input_grad[2:]
        return None, None, *_pull_back(gradient, factors, weights, projections, needed)


def _pull_back(
    gradient: Tensor,
    factors: Tensor | None,
    weights: Sequence[Tensor],
    projections: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """From the gradient in the projected rows [T, k] to those in the weights and the projections.

    Two products a weight, of all its matrices at once: sum_c g_c P_c, and g_c^T W.

    Args:
        gradient: in the order of `_project_all`.
        factors: what each set's part is to be multiplied with, [B], or None.
        weights, projections: what was projected.
        needed: whether each of them wants its gradient.
    """
    grad_weights: list[Tensor | None] = []
    grad_projections: list[Tensor | None] = []
    row = first = 0
    for index, (weight, matrices) in enumerate(zip(weights, projections, strict=True)):
        sets, n, d = weight.shape
        count = _count(matrices)
        part = gradient[row : row + sets * count * n].view(sets, count, n, gradient.shape[1])
        if factors is not None:
            part = part * factors[first : first + sets * count].view(sets, count, 1, 1)
        row, first = row + sets * count * n, first + sets * count
        grad_weight = grad_matrices = None
        if matrices is None:
            grad_weight = part[:, 0, :, :d]
        else:
            by_row = part.transpose(1, 2).reshape(sets * n, count * gradient.shape[1])
            if needed[index]:
                grad_weight = _product(by_row, matrices.to(part.dtype).flatten(0, 1))
            if needed[len(weights) + index]:
                grad_matrices = _product(by_row.mT, weight.to(part.dtype).flatten(0, 1))
        grad_weights.append(
            grad_weight if grad_weight is None else grad_weight.view(weight.shape).to(weight.dtype)
        )
        grad_projections.append(
            grad_matrices
            if grad_matrices is None or matrices is None
            else grad_matrices.view(matrices.shape).to(matrices.dtype)
        )
    return [*grad_weights, *grad_projections]


@dataclass(frozen=True)
class _Sets:
    """Sizes and settings as one argument: torch would look for tangents of a list's elements."""

    sizes: Sequence[int]
    settings: Sequence[Any]

    def repeat(self, batch: int) -> "_Sets":
        return _Sets(list(self.sizes) * batch, _repeat_factors(self.settings, batch))


class _Gradient(torch.autograd.Function):
    """The gradient that a sweep has made, as a function of the points."""

    @staticmethod
    def forward(points: Tensor, gradient: Tensor, sets: _Sets) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        points, gradient, ctx.sets = inputs
        ctx.dtype = gradient.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(points)
        ctx.save_for_forward(points)

    @staticmethod
    def backward(ctx: Any, cotangents: Tensor | None) -> tuple[Tensor | None, None, None]:
        if cotangents is None:
            return None, None, None
        (points,) = ctx.saved_tensors
        product = _HessianProduct.apply(final(points, "energy"), cotangents, ctx.sets)
        return product.to(points.dtype), None, None

    @staticmethod
    @differentiable_jvp
    def jvp(ctx: Any, points: Tensor, tangents: Tensor, *_: None) -> Tensor:
        return _HessianProduct.apply(final(points, "energy"), tangents.to(ctx.dtype), ctx.sets)

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[Any], points: Tensor, gradient: Tensor, sets: _Sets
    ) -> tuple[Any, Any]:
        sets = sets.repeat(info.batch_size)
        return over_batch(_Gradient.apply, info, in_dims, [points, gradient], sets)


class _HessianProduct(torch.autograd.Function):
    """H t of each set, linear in the tangents t; the points have to be `final`."""

    @staticmethod
    def forward(points: Tensor, tangents: Tensor, sets: _Sets) -> Tensor:
        product: Tensor = torch.ops.comhe_ext.hessian_vector_product(
            points, tangents, sets.sizes, *sets.settings
        )
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        points, _, ctx.sets = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(points)
        ctx.save_for_forward(points)

    @staticmethod
    def backward(ctx: Any, cotangents: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if cotangents is None:
            return None, None, None
        (points,) = ctx.saved_tensors
        product = _HessianProduct.apply(points, cotangents, ctx.sets)
        return torch.zeros_like(points), product, None

    @staticmethod
    @differentiable_jvp
    def jvp(ctx: Any, points: Tensor, _: None, tangents: Tensor, __: None) -> Tensor:
        return _HessianProduct.apply(points, tangents, ctx.sets)

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[Any], points: Tensor, tangents: Tensor, sets: _Sets
    ) -> tuple[Any, Any]:
        sets = sets.repeat(info.batch_size)
        return over_batch(_HessianProduct.apply, info, in_dims, [points, tangents], sets)


class _Product(torch.autograd.Function):
    """left @ right, [..., n, m], and all its derivatives, whatever autocast says."""

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        with no_autocast(left.device.type):
            return left @ right

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return None, None
        left, right = ctx.saved_tensors
        to_left, to_right = ctx.needs_input_grad
        return (
            _Product.apply(grad, right.mT) if to_left else None,
            _Product.apply(left.mT, grad) if to_right else None,
        )

    @staticmethod
    @differentiable_jvp
    def jvp(
        ctx: Any, left: Tensor, right: Tensor, to_left: Tensor | None, to_right: Tensor | None
    ) -> Tensor:
        if to_left is None:
            return _Product.apply(left, to_right)
        if to_right is None:
            return _Product.apply(to_left, right)
        return _Product.apply(to_left, right) + _Product.apply(left, to_right)

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[int | None], left: Tensor, right: Tensor
    ) -> tuple[Tensor, int]:
        left, right = (
            _in_front(x, dim, info.batch_size)
            for x, dim in zip((left, right), in_dims, strict=True)
        )
        return _Product.apply(left, right), 0


class _Final(torch.autograd.Function):
    """The identity; any derivative raises, and only if it is really on the way to a result."""

    generate_vmap_rule = True

    @staticmethod
    def forward(points: Tensor, what: str) -> Tensor:
        return points.view_as(points)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.what = inputs[1]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            f"comhe_ext: the {ctx.what} is differentiable twice; "
            "third derivatives are not implemented"
        )

    jvp = backward


def final(points: Tensor, what: str) -> Tensor:
    """The points of a second derivative, of which a third one raises.

    A second derivative is linear in its tangents, and a function of them may be differentiated
    (torch.autograd.functional.hvp does). What it is in the points must not come out as zero.
    """
    return _Final.apply(points, what)


def energy(points: Tensor, sizes: Sequence[int], options: Options) -> Tensor:
    """Energies [B] of sets of rows: [B, N, k], or [T, k] and `sizes`; differentiable twice."""
    if forward_mode():
        leave_trace()
        return _EnergyWithTangents.apply(points, _Sets(sizes, options))[0]
    if differentiated(points):
        return _Energy.apply(points, sizes, *options)[0]
    return torch.ops.comhe_ext.energy(points, sizes, *options)


def projected_energy(
    weights: Sequence[Tensor], projections: Sequence[Tensor | None], options: Options
) -> Tensor:
    """Energies [B] of the projected rows of weights [V, N, d], in one sweep; see the top."""
    if forward_mode():
        # torch's own products carry the tangents of weights and projections to the rows
        return energy(*_project_points(weights, projections), options)
    tensors = [*weights, *projections]
    if differentiated(*tensors):
        return _ProjectedEnergy.apply(len(weights), options, *tensors)[0]
    return torch.ops.comhe_ext.projected_energy(weights, projections, *options)
