"""The operators of a sweep over many sets: what they take, their shapes, and their batching.

    comhe_ext::sweep                   weights, matrices -> energy [B], gradient in the rows [T, k]
    comhe_ext::hessian_vector_product  points, tangents, the gradient -> like points
    comhe_ext::scale_rows              rows, a factor of each set [B] -> like rows
    comhe_ext::dot_rows                rows, rows -> [B]

Weights are a list of [V, N, d], sets of any size and width; each has matrices [C, k, d] that
project it, or None where its rows are taken as they are, filled up with zeros to k columns. Weight
by weight, set by set, matrix by matrix they make the B sets of one sweep, V C sets of N rows each,
which are T rows together. A plain energy is one without matrices. A backend may project and sweep
in one go.

The other operators take points [T, k] and the `sizes` of the sets, or B sets of N rows [B, N, k]
with `sizes` empty: that keeps a symbolic N out of the arguments under torch.compile.

None of them has a derivative: `comhe_ext.operators.energy` puts them together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comhe_ext import backends
from comhe_ext.checks import check_backend, check_reduction
from comhe_ext.kernels import packed_sets, portable
from comhe_ext.kernels.pair_functions import PairFunction, pair_function
from comhe_ext.kernels.sweep import Numbers, Projected, SweepRequest
from comhe_ext.operators.library import (
    LIBRARY,
    Form,
    check_device,
    check_like,
    check_rows,
    compute_dtype,
    define,
    form_of,
    in_front,
    over_batch,
    split_batch,
)
from comhe_ext.operators.rows import packed_rows, set_sizes, width_of
from comhe_ext.verdicts import trusted


# equal only to itself: a key of caches that is hashed at every call
@dataclass(frozen=True, eq=False)
class SweepOptions:
    """All of an energy that is not a tensor.

    Args:
        pair: the pair function.
        reduction: "mean" over the unordered pairs of a set, or "sum" over the ordered ones; of
            rows against columns over all their pairs, or "rows", the sum of each row.
        eps: added to the squared norms.
        backend: one that can take the rows, or "auto" for the best, see `comhe_ext.backends`.
        factors: of the sets' energies, one a set; none: all 1.
    """

    pair: PairFunction
    reduction: str = "mean"
    eps: float = 0.0
    backend: str = "torch"
    factors: Sequence[float] = ()
    # the same as the operators take it
    arguments: tuple[Any, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        name, parameters = self.pair.name, self.pair.parameters
        arguments = name, parameters, self.reduction, self.eps, self.backend, self.factors
        object.__setattr__(self, "arguments", arguments)

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> "SweepOptions":
        """Make what `arguments` gave again, checked: an operator may be handed anything."""
        name, parameters, reduction, eps, backend, *factors = arguments
        return _options(name, tuple(parameters), reduction, eps, backend, *map(tuple, factors))

    def check(self) -> None:
        """Refuse numbers and names out of range; the types are known to be right."""
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"`eps` must be finite and at least 0, got {self.eps}")
        check_reduction(self.reduction, ("mean", "sum", "rows"))
        if self.backend != backends.AUTO:
            check_backend(self.backend)
        for factor in self.factors:
            if not -math.inf < factor < math.inf:
                raise ValueError(f"`factors` must be finite, got {factor}")

    def repeated(self, batch: int) -> "SweepOptions":
        """Repeat the factors for all sets of a batch."""
        return replace(self, factors=tuple(self.factors) * batch)

    def request(
        self, source: Tensor | Projected, sizes: Sequence[int], gradient: bool
    ) -> SweepRequest:
        """Make what a backend is asked."""
        scales = _scales(Numbers.of(sizes), self)
        return SweepRequest(source, sizes, scales, self.pair, self.eps, gradient)


# of what depends on shapes and settings alone, for every call is made of it


@lru_cache(maxsize=1024)
def _options(
    name: str,
    parameters: tuple[float, ...],
    reduction: str,
    eps: float,
    backend: str,
    factors: tuple[float, ...] = (),
) -> SweepOptions:
    options = SweepOptions(pair_function(name, parameters), reduction, eps, backend, factors)
    options.check()
    return options


@lru_cache(maxsize=1024)
def _scales(sizes: Numbers, options: SweepOptions) -> Numbers:
    """From each set's sum over unordered pairs to its energy, factor included."""
    by_size = {n: options.pair.scale(n, options.reduction) for n in set(sizes)}
    scales = [by_size[n] for n in sizes]
    if options.factors:
        scales = [scale * f for scale, f in zip(scales, options.factors, strict=True)]
    return Numbers(scales)


# --- raw operators --------------------------------------------------------------------------------

OPTIONS = "str pair, float[] parameters, str reduction, float eps, str backend, float[] factors=[]"


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
    options: SweepOptions, sets: int, columns: int, *tensors: Tensor | Form | None
) -> None:
    """Refuse options that do not fit so many sets of rows, made from these tensors."""
    factors = options.factors
    check_reduction(options.reduction)
    if len(factors) > 0 and len(factors) != sets:
        raise ValueError(f"`factors` must be empty or one a set ({sets}), got {len(factors)}")
    if options.backend in ("torch", backends.AUTO):
        return
    first = tensors[0]
    if options.backend == "cpu" and first is not None and first.device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs tensors on cpu, got {first.device}")
    error = backends.misfit(options.backend, options.pair, compute_dtype(*tensors), columns)
    if error is not None:
        raise error


def _check_points(points: Tensor, sizes: Sequence[int], options: SweepOptions) -> None:
    sets = _count_sets("points", points, sizes)
    _check_options(options, sets, points.shape[-1], points)


def _check_product(
    points: Tensor,
    tangents: Tensor,
    gradient: Tensor,
    sizes: Sequence[int],
    arguments: Sequence[Any],
) -> SweepOptions:
    options = SweepOptions.of(arguments)
    _check_points(points, sizes, options)
    check_like("tangents", tangents, "points", points)
    check_like("gradient", gradient, "points", points)
    dtype = compute_dtype(points)
    if gradient.dtype != dtype:
        raise TypeError(f"`gradient` must be {dtype}, as a sweep gives it, got {gradient.dtype}")
    return options


class Layout(NamedTuple):
    """The sets that weights and matrices make."""

    sizes: Sequence[int]
    width: int
    dtype: torch.dtype  # of what is computed
    projected: bool


def _lay_out(
    weights: Sequence[Tensor | Form],
    matrices: Sequence[Tensor | Form | None],
    options: SweepOptions,
) -> Layout:
    """Check all that an operator is handed, and say what it is to compute."""
    if len(weights) == 0:
        raise ValueError("`weights` must hold at least one tensor, got none")
    if len(matrices) != len(weights):
        raise ValueError(
            f"`matrices` must have one entry a weight ({len(weights)}), got {len(matrices)}"
        )
    for weight in weights:
        check_rows("weights", weight, (3,))
        check_device("weights", weight, "weights[0]", weights[0])
    width = width_of(weights, matrices)
    for weight, projection in zip(weights, matrices, strict=True):
        if projection is None:
            if weight.shape[2] > width:
                raise ValueError(
                    f"`weights` without matrices must have at most the {width} columns of the "
                    f"projected rows, got shape {tuple(weight.shape)}"
                )
            continue
        check_rows("matrices", projection, (3,))
        check_device("matrices", projection, "weights", weight)
        count, rows, columns = projection.shape
        if count == 0 or rows != width or width == 0 or columns != weight.shape[2]:
            raise ValueError(
                f"`matrices` must be [C, {max(width, 1)}, {weight.shape[2]}] for a weight of "
                f"shape {tuple(weight.shape)}, got shape {tuple(projection.shape)}"
            )
    sizes = Numbers(set_sizes(weights, matrices))
    _check_options(options, len(sizes), width, *weights, *matrices)
    projected = any(projection is not None for projection in matrices)
    return Layout(sizes, width, compute_dtype(*weights, *matrices), projected)


_lay_out_once = lru_cache(maxsize=512)(_lay_out)


@define(
    f"sweep(Tensor[] weights, Tensor?[] matrices, bool gradient, {OPTIONS}) -> (Tensor, Tensor)"
)
def _sweep(
    weights: Sequence[Tensor], matrices: Sequence[Tensor | None], gradient: bool, *arguments: Any
) -> tuple[Tensor, Tensor]:
    options = SweepOptions.of(arguments)
    forms = [None if x is None else form_of(x) for x in (*weights, *matrices)]
    layout = _lay_out_once(tuple(forms[: len(weights)]), tuple(forms[len(weights) :]), options)
    name = _backend_of(options, weights[0].device, layout.dtype, layout.width)
    request = _request(name, weights, matrices, layout, options, gradient)
    if name == "triton" and options.backend == backends.AUTO and not trusted(request):
        name = "torch"
        request = _request(name, weights, matrices, layout, options, gradient)
    if name == "torch":
        refuse_capture(weights[0].device)
    energy, rows_gradient, *_ = backends.load(name).sweep(request)
    return energy, energy.new_empty(0) if rows_gradient is None else rows_gradient


def _backend_of(
    options: SweepOptions, device: torch.device, dtype: torch.dtype, columns: int
) -> str:
    """Name the backend asked for, or the best for these rows."""
    if options.backend != backends.AUTO:
        return options.backend
    return backends.choose(None, options.pair, device, dtype, columns)


def _request(
    backend: str,
    weights: Sequence[Tensor],
    matrices: Sequence[Tensor | None],
    layout: Layout,
    options: SweepOptions,
    gradient: bool,
) -> SweepRequest:
    """Make what a backend is asked: to project the rows, too, where it can."""
    source: Tensor | Projected
    if layout.projected and backends.load(backend).OFFERS.projection:
        sets: list[Tensor] = []
        by_set: list[Tensor | None] = []
        for weight, projection in zip(weights, matrices, strict=True):
            sets += weight.unbind()
            by_set += [None if projection is None else projection.float()] * weight.shape[0]
        source = Projected(sets, by_set)
    else:
        source = packed_rows(weights, matrices, layout.sizes)
    return options.request(source, layout.sizes, gradient)


def refuse_capture(device: torch.device) -> None:
    """Say why a CUDA graph cannot hold what the portable tiles compute."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend 'torch' waits for the GPU, so no CUDA graph can capture it: leave this call "
            "out of the capture, or use backend='triton' (float32, first derivatives)"
        )


@define(
    "hessian_vector_product(Tensor points, Tensor tangents, Tensor gradient, int[] sizes, "
    f"{OPTIONS}) -> Tensor"
)
def _hessian_vector_product(
    points: Tensor, tangents: Tensor, gradient: Tensor, sizes: Sequence[int], *arguments: Any
) -> Tensor:
    options = _check_product(points, tangents, gradient, sizes, arguments)
    if points.dim() == 3:
        sizes = [points.shape[1]] * points.shape[0]
    rows, tangents, gradient = (
        x.reshape(-1, x.shape[-1]).contiguous() for x in (points, tangents, gradient)
    )
    refuse_capture(points.device)
    request = options.request(rows, sizes, True)
    name = _backend_of(options, points.device, gradient.dtype, points.shape[-1])
    backend = backends.load(name)
    # a gradient beyond its dtype says nothing any more: the portable tiles do without it
    if backend.OFFERS.second_order and bool(gradient.isfinite().all()):
        product = backend.hessian_vector_product(request, tangents.float(), gradient)
    else:
        product = portable.hessian_vector_product(request, tangents)
    return product.view(points.shape)


@define("scale_rows(Tensor rows, Tensor factors, int[] sizes) -> Tensor", composite=True)
def _scale_rows(rows: Tensor, factors: Tensor, sizes: Sequence[int]) -> Tensor:
    sets = _count_sets("rows", rows, sizes)
    check_device("factors", factors, "rows", rows)
    if factors.dim() != 1 or factors.shape[0] != sets:
        raise ValueError(f"`factors` must be one a set ({sets},), got {tuple(factors.shape)}")
    if rows.dim() == 3:
        return rows * factors[:, None, None]
    return rows * packed_sets.spread_over_rows(factors, sizes)


@define("dot_rows(Tensor left, Tensor right, int[] sizes) -> Tensor", composite=True)
def _dot_rows(left: Tensor, right: Tensor, sizes: Sequence[int]) -> Tensor:
    _count_sets("left", left, sizes)
    check_like("right", right, "left", left)
    if left.dim() == 3:
        return (left * right).sum((1, 2))
    return packed_sets.sum_over_rows((left * right).sum(1), sizes)


@torch.library.register_fake("comhe_ext::sweep", lib=LIBRARY)
def _(
    weights: Sequence[Tensor], matrices: Sequence[Tensor | None], gradient: bool, *arguments: Any
) -> tuple[Tensor, Tensor]:
    sizes, width, dtype, _ = _lay_out(weights, matrices, SweepOptions.of(arguments))
    shape = (sum(sizes), width) if gradient else (0,)
    energy = weights[0].new_empty(len(sizes), dtype=dtype)
    return energy, weights[0].new_empty(shape, dtype=dtype)


@torch.library.register_fake("comhe_ext::hessian_vector_product", lib=LIBRARY)
def _(
    points: Tensor, tangents: Tensor, gradient: Tensor, sizes: Sequence[int], *arguments: Any
) -> Tensor:
    _check_product(points, tangents, gradient, sizes, arguments)
    return points.new_empty(points.shape, dtype=compute_dtype(points))


# --- vmap: the batch becomes more sets of the same launch -----------------------------------------


def _each(x: Tensor | None, dim: int | None, batch: int) -> list[Tensor | None]:
    """List a tensor for each element of the batch."""
    return [x] * batch if x is None or dim is None else list(x.unbind(dim))


def _sweep_batch(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
    """Batch by the lists of every element, one after the other; a lone plain weight stays one."""
    batch = info.batch_size
    weights, matrices, gradient, *arguments = args
    options = SweepOptions.of(arguments).repeated(batch)
    if len(weights) == 1 and matrices[0] is None:
        rows = in_front(weights[0], in_dims[0][0], batch)
        lists: list[list[Any]] = [[rows.flatten(0, 1)], [None]]
    else:
        lists = []
        for tensors, dims in zip((weights, matrices), in_dims[:2], strict=True):
            by_tensor = [_each(x, d, batch) for x, d in zip(tensors, dims, strict=True)]
            lists.append([x for element in zip(*by_tensor, strict=True) for x in element])
    results = torch.ops.comhe_ext.sweep(*lists, gradient, *options.arguments)
    if not gradient:  # nothing has no rows to share out
        results = (results[0], results[1].view(batch, 0))
        return (split_batch(results[0], batch), results[1]), (0, 0)
    return tuple(split_batch(result, batch) for result in results), (0, 0)


def _product_batch(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
    points, tangents, gradient, sizes, *arguments = args
    options = SweepOptions.of(arguments).repeated(info.batch_size)
    rest = (list(sizes) * info.batch_size, *options.arguments)
    op = torch.ops.comhe_ext.hessian_vector_product
    return over_batch(op, info, in_dims, (points, tangents, gradient), *rest)


def _rows_batch(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.comhe_ext, name)

    def rule(info: Any, in_dims: Sequence[Any], left: Tensor, right: Tensor, sizes: Any) -> Any:
        return over_batch(op, info, in_dims, (left, right), list(sizes) * info.batch_size)

    return rule


torch.library.register_vmap("comhe_ext::sweep", _sweep_batch, lib=LIBRARY)
torch.library.register_vmap("comhe_ext::hessian_vector_product", _product_batch, lib=LIBRARY)
for name in ("scale_rows", "dot_rows"):
    torch.library.register_vmap(f"comhe_ext::{name}", _rows_batch(name), lib=LIBRARY)
