"""The compiled sweep for processors: the C library of this folder, called through ctypes."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..pair_functions import PairFunction, Riesz
from ..sweep import (
    DistanceRequest,
    NearestRequest,
    Numbers,
    Offers,
    SampledRequest,
    SweepRequest,
    SweepResult,
)

LIBRARY = Path(__file__).with_name("_pairwise.so")
# that of pairwise.h, which says when to raise it
ABI_VERSION = 9
# those of this architecture, in the order of the C enum
INSTRUCTION_SETS: tuple[str, ...] = ("baseline", "avx2", "avx512")
if platform.machine() in ("aarch64", "arm64", "ARM64"):
    INSTRUCTION_SETS = ("baseline", "neon")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_MISSING = (
    "the compiled CPU kernel is not installed; reinstall comhe-ext where a C++ compiler is found"
)
_REBUILD = "reinstall comhe-ext, or rebuild a checkout: pip install -e ."


OFFERS = Offers(
    cross=True,
    nearest=True,
    distance=True,
    angle_difference=True,
    sampled=True,
    second_order=True,
    max_columns=1 << 24,
)


class _Tangent(ctypes.Structure):
    _fields_ = [("at", ctypes.c_double), ("value", ctypes.c_double), ("slope", ctypes.c_double)]


class _Pair(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.c_int32),
        ("half_space", ctypes.c_int32),
        ("angular", ctypes.c_int32),
        ("parameters", ctypes.c_double * 2),
        ("growth", ctypes.c_double),
        ("tangent", _Tangent),
    ]

    @classmethod
    @lru_cache(maxsize=512)
    def of(cls, pair: PairFunction) -> _Pair:
        """Make what the library takes of a pair function."""
        # the tangent line says all there is to min_distance, which comes last
        half_space, angular, *parameters = pair.parameters
        tangent = _Tangent(*(pair.tangent or ()))
        numbers = (ctypes.c_double * 2)(*parameters[:2])
        return cls(pair.number, int(half_space), int(angular), numbers, pair.growth, tangent)


class _Call(ctypes.Structure):
    _fields_ = [
        ("points", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("row_ids", ctypes.c_void_p),
        ("column_ids", ctypes.c_void_p),
        ("row_weights", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("energy", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("columns_gradient", ctypes.c_void_p),
        ("row_energies", ctypes.c_void_p),
        ("tangents", ctypes.c_void_p),
        ("known_gradient", ctypes.c_void_p),
        ("product", ctypes.c_void_p),
        ("nearest", ctypes.c_void_p),
        ("sets", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("pair", _Pair),
        ("sample", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("cross", ctypes.c_int32),
        ("second_order", ctypes.c_int32),
    ]


@cache
def _library() -> ctypes.CDLL:
    """Load the library; OSError where it does not load, or is not of these sources."""
    library = ctypes.CDLL(str(LIBRARY))
    try:
        theirs = library.comhe_abi_version(), library.comhe_call_bytes()
        library.comhe_sweep.argtypes = [ctypes.POINTER(_Call), ctypes.c_int]
        library.comhe_angle_difference.argtypes = [ctypes.c_void_p, ctypes.c_int]
        library.comhe_distance.argtypes = [ctypes.c_void_p, ctypes.c_int]
        library.comhe_supports.argtypes = [ctypes.c_int]
        library.comhe_best_isa.argtypes = []
    except AttributeError as error:
        raise OSError(f"{LIBRARY} is of another version: {error}") from None
    ours = ABI_VERSION, ctypes.sizeof(_Call)
    if theirs != ours:
        raise OSError(
            f"{LIBRARY} is of another version: interface {theirs[0]} of {theirs[1]} bytes, "
            f"not {ours[0]} of {ours[1]}"
        )
    return library


@cache
def unavailable() -> str | None:
    """Why this backend cannot run and what to do about it; None when it can."""
    if not LIBRARY.exists():
        return _MISSING
    try:
        _library()
    except OSError as error:
        return f"the compiled CPU kernel does not load ({error}); {_REBUILD}"
    return None


def instruction_sets() -> tuple[str, ...]:
    """List the instruction sets of this processor, the best one last; without library none."""
    return INSTRUCTION_SETS[: _library().comhe_best_isa() + 1] if unavailable() is None else ()


def instruction_set() -> str:
    """Name the instruction set in use: the processor's best, or that of COMHE_CPU_ISA."""
    here = instruction_sets()
    name = os.environ.get("COMHE_CPU_ISA") or here[-1]
    if name not in INSTRUCTION_SETS:
        raise ValueError(
            f"COMHE_CPU_ISA must be one of {', '.join(INSTRUCTION_SETS)}, got {name!r}"
        )
    if name not in here:
        raise RuntimeError(f"COMHE_CPU_ISA={name}, but this processor has {here[-1]} at best")
    return name


def _check(name: str, points: Tensor) -> None:
    if not isinstance(points, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(points).__name__}")
    if points.dtype not in DTYPES:
        raise TypeError(f"`{name}` must be float32, float16 or bfloat16, got {points.dtype}")
    if points.device.type != "cpu":
        raise ValueError(f"`{name}` must be on the CPU, got {points.device}")
    if points.dim() != 2 or points.shape[1] < 1:
        raise ValueError(f"`{name}` must be [T, k] with k >= 1, got shape {tuple(points.shape)}")
    if not points.is_contiguous():
        raise ValueError(f"`{name}` must be contiguous, got strides {points.stride()}")


def supports(pair: PairFunction) -> bool:
    """Whether the library knows a pair function; of one that is missing, nothing is held back."""
    return _knows(pair.number)


def _knows(number: int) -> bool:
    return unavailable() is not None or bool(_library().comhe_supports(number))


# a constant to torch.compile, which must not follow it into the library
_knows._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _run(call: _Call, pair: PairFunction, eps: float) -> None:
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    if not supports(pair):
        raise ValueError(f"backend 'cpu' does not know {pair}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"`eps` must be finite and at least 0, got {eps}")
    call.pair = _Pair.of(pair)
    call.eps = eps
    call.threads = torch.get_num_threads()
    isa = INSTRUCTION_SETS.index(instruction_set())
    _raise_for(_library().comhe_sweep(ctypes.byref(call), isa))


def _raise_for(status: int) -> None:
    """Raise what the library's status means, if it is not 0."""
    if status == 2:
        raise MemoryError("the CPU kernel could not allocate its workspace")
    if status:
        raise RuntimeError(f"the CPU kernel refused the call (code {status})")


def sweep(request: SweepRequest) -> SweepResult:
    """Compute energies of sets of rows, or of rows against columns, and their gradients.

    Returns:
        float32; the energies alone are about a third of the work.
    """
    return _sweep_sets(request) if request.columns is None else _sweep_columns(request)


class _Sets(NamedTuple):
    """Sizes and scales as the library reads them."""

    sizes: ctypes.Array[ctypes.c_int64]
    scales: ctypes.Array[ctypes.c_double]
    num_rows: int


@lru_cache(maxsize=512)
def _sets_of(sizes: Numbers, scales: Numbers) -> _Sets:
    if min(sizes, default=0) < 0:
        raise ValueError(f"`sizes` must be at least 0, got {list(sizes)}")
    if len(scales) != len(sizes):
        raise ValueError(f"`scales` must have one value a set ({len(sizes)}), got {len(scales)}")
    size_array = (ctypes.c_int64 * len(sizes))(*sizes)
    scale_array = (ctypes.c_double * len(scales))(*scales)
    return _Sets(size_array, scale_array, sum(sizes))


def _run_on_sets(
    request: SweepRequest | NearestRequest,
    scales: Sequence[float],
    pair: PairFunction,
    **pointers: int | None,
) -> None:
    points = request.points
    _check("points", points)
    sets = _sets_of(Numbers.of(request.sizes), Numbers.of(scales))
    if sets.num_rows != points.shape[0]:
        raise ValueError(
            f"`sizes` must be at least 0 and sum to {points.shape[0]}, got {list(request.sizes)}"
        )
    call = _Call(
        points=points.data_ptr(),
        sizes=ctypes.addressof(sets.sizes),
        scales=ctypes.addressof(sets.scales),
        sets=len(request.sizes),
        k=points.shape[1],
        dtype=DTYPES[points.dtype],
        **pointers,
    )
    _run(call, pair, request.eps)


def _sweep_sets(request: SweepRequest) -> SweepResult:
    energy = torch.empty(len(request.sizes), dtype=torch.float32)
    gradient = None
    if request.gradient:
        gradient = torch.empty(request.points.shape, dtype=torch.float32)
    pointers = dict(energy=energy.data_ptr(), gradient=_pointer(gradient))
    _run_on_sets(request, request.scales, request.pair, **pointers)
    return SweepResult(energy, gradient)


def hessian_vector_product(request: SweepRequest, tangents: Tensor, gradient: Tensor) -> Tensor:
    """Differentiate `sweep`'s gradient along tangents [T, k], in closed form, by the same tiles.

    Args:
        request: as the sweep got it, without columns.
        tangents: float32, contiguous.
        gradient: what the sweep gave, finite: it saves two of nine products a pair.

    Returns:
        float32 [T, k].
    """
    for name, rows in (("tangents", tangents), ("gradient", gradient)):
        _check(name, rows)
        if rows.dtype != torch.float32 or rows.shape != request.points.shape:
            raise ValueError(
                f"`{name}` must be float32 of shape {tuple(request.points.shape)}, got "
                f"{rows.dtype} {tuple(rows.shape)}"
            )
    product = torch.empty(request.points.shape, dtype=torch.float32)
    _run_on_sets(
        request,
        request.scales,
        request.pair,
        tangents=tangents.data_ptr(),
        known_gradient=gradient.data_ptr(),
        product=product.data_ptr(),
        second_order=True,
    )
    return product


def sampled(request: SampledRequest) -> tuple[Tensor, Tensor | None]:
    """Compute energies of rows that meet within random parts alone; see `SampledRequest`."""
    from . import sampled as module

    return module.sampled(request)


def _sweep_columns(request: SweepRequest) -> SweepResult:
    rows, columns = request.points, request.columns
    assert columns is not None
    if len(request.scales) != 1:
        raise ValueError(f"a cross set has one scale, got {len(request.scales)}")
    row_weights = _of_each("row_weights", request.row_weights, rows, torch.float32)
    energy = torch.empty(1, dtype=torch.float32)
    row_energies = torch.empty(len(rows), dtype=torch.float32) if request.row_energies else None
    gradients = [
        torch.empty(p.shape, dtype=torch.float32) if wanted else None
        for p, wanted in zip((rows, columns), request.wanted, strict=True)
    ]
    _run_on_columns(
        request,
        columns,
        request.scales[0],
        request.pair,
        row_weights=_pointer(row_weights),
        energy=energy.data_ptr(),
        gradient=_pointer(gradients[0]),
        columns_gradient=_pointer(gradients[1]),
        row_energies=_pointer(row_energies),
    )
    return SweepResult(energy, gradients[0], gradients[1], row_energies)


def _run_on_columns(
    request: SweepRequest | NearestRequest,
    columns: Tensor,
    scale: float,
    pair: PairFunction,
    **pointers: int | None,
) -> None:
    rows = request.points
    _check("points", rows)
    _check("columns", columns)
    if columns.dtype != rows.dtype or columns.shape[1] != rows.shape[1]:
        raise ValueError(
            f"`columns` must have the dtype and width of `points`, got {columns.dtype} "
            f"{tuple(columns.shape)} and {rows.dtype} {tuple(rows.shape)}"
        )
    if list(request.sizes) != [len(rows)]:
        raise ValueError(
            f"rows against columns are one set of {len(rows)} rows, got sizes {list(request.sizes)}"
        )
    row_ids = _of_each("row_ids", request.row_ids, rows, torch.int32)
    column_ids = _of_each("column_ids", request.column_ids, columns, torch.int32)
    if (row_ids is None) != (column_ids is None):
        raise ValueError("`row_ids` and `column_ids` must be given both, or neither")
    sizes = (ctypes.c_int64 * 2)(len(rows), len(columns))
    factor = ctypes.c_double(scale)
    call = _Call(
        points=rows.data_ptr(),
        columns=columns.data_ptr(),
        row_ids=_pointer(row_ids),
        column_ids=_pointer(column_ids),
        sizes=ctypes.addressof(sizes),
        scales=ctypes.addressof(factor),
        cross=True,
        sets=2,
        k=rows.shape[1],
        dtype=DTYPES[rows.dtype],
        **pointers,
    )
    _run(call, pair, request.eps)


def _of_each(name: str, values: Tensor | None, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Check one value of each row, if there are any, and lay them out one after another."""
    if values is None:
        return None
    if values.dtype != dtype or values.shape != rows.shape[:1]:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"`{name}` must be {kind} of shape ({rows.shape[0]},), got {values.dtype} "
            f"{tuple(values.shape)}"
        )
    return values.cpu().contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# any pair function without a tangent line: nothing is asked of it but whether it is folded
_FOLDED = {
    half_space: Riesz(0.0, min_distance=0.0, half_space=half_space) for half_space in (False, True)
}


def nearest(request: NearestRequest) -> Tensor:
    """Find the nearest other row of each row, or its nearest column; see `NearestRequest`.

    Pairs that are not near are told apart by their float32 cosines.

    Returns:
        int64 [T], the index in the set, or of the column; -1 for a row that meets nobody.
    """
    num_rows, pair = len(request.points), _FOLDED[request.half_space]
    index = torch.empty(max(num_rows, 1), dtype=torch.int64)  # the library is asked by its pointer
    if request.columns is None:
        scales = (1.0,) * len(request.sizes)
        _run_on_sets(request, scales, pair, nearest=index.data_ptr())
    else:
        _run_on_columns(request, request.columns, 1.0, pair, nearest=index.data_ptr())
    return index[:num_rows]


def distance(request: DistanceRequest) -> Tensor:
    """Compute the distance of each row to the other one of its index, float32 [N]."""
    from . import distance as module

    return module.distance(request)


def distance_gradient(
    request: DistanceRequest, weights: Tensor, rows_gradient: bool, columns_gradient: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of the weighted sum of the distances."""
    from . import distance as module

    return module.distance_gradient(request, weights, rows_gradient, columns_gradient)


def angle_difference(
    rows: Tensor,
    projected: Tensor,
    angle: bool,
    rows_gradient: bool,
    projected_gradient: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum the squared differences of cosines or angles; see `kernels.portable.angle_loss.sweep`."""
    from . import angle_difference as module

    return module.angle_difference(rows, projected, angle, rows_gradient, projected_gradient)
