"""The compiled sweep for processors: the C library of this folder, called through ctypes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_pairwise.so")
# that of pairwise.h, which says when to raise it
ABI_VERSION = 1
# in the order of the C enum
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_MISSING = (
    "the compiled CPU kernel is not installed; reinstall comhe-ext where a C++ compiler is found"
)
_REBUILD = "reinstall comhe-ext, or rebuild a checkout: pip install -e ."


class Pair(Protocol):
    """f(t) = t^-s (s = 0: -log t) of the chord or angle t; its tangent below `min_distance`."""

    s: float
    half_space: bool
    angular: bool
    min_distance: float


class _Pair(ctypes.Structure):
    _fields_ = [
        ("s", ctypes.c_double),
        ("min_distance", ctypes.c_double),
        ("half_space", ctypes.c_int32),
        ("angular", ctypes.c_int32),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        ("points", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("energy", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("columns_gradient", ctypes.c_void_p),
        ("sets", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("pair", _Pair),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("rectangular", ctypes.c_int32),
    ]


@cache
def _library() -> ctypes.CDLL:
    """The library, found to be of these sources; OSError where it is not, or does not load."""
    library = ctypes.CDLL(str(LIBRARY))
    try:
        theirs = library.comhe_abi_version(), library.comhe_call_bytes()
        library.comhe_sweep.argtypes = [ctypes.POINTER(_Call), ctypes.c_int]
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


def instruction_set() -> str:
    """The instruction set in use: the processor's best, or the one COMHE_CPU_ISA names."""
    best = _library().comhe_best_isa()
    name = os.environ.get("COMHE_CPU_ISA") or INSTRUCTION_SETS[best]
    if name not in INSTRUCTION_SETS:
        raise ValueError(
            f"COMHE_CPU_ISA must be one of {', '.join(INSTRUCTION_SETS)}, got {name!r}"
        )
    if INSTRUCTION_SETS.index(name) > best:
        raise RuntimeError(
            f"COMHE_CPU_ISA={name}, but this processor has {INSTRUCTION_SETS[best]} at best"
        )
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


def _run(call: _Call, pair: Pair, eps: float) -> None:
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    if not 0 <= pair.s < float("inf"):
        raise ValueError(f"`s` must be finite and at least 0, got {pair.s}")
    if not 0 <= pair.min_distance < 2:
        raise ValueError(f"`min_distance` must be in [0, 2), got {pair.min_distance}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"`eps` must be finite and at least 0, got {eps}")
    call.pair = _Pair(pair.s, pair.min_distance, pair.half_space, pair.angular)
    call.eps = eps
    call.threads = torch.get_num_threads()
    isa = INSTRUCTION_SETS.index(instruction_set())
    status = _library().comhe_sweep(ctypes.byref(call), isa)
    if status == 2:
        raise MemoryError("the CPU kernel could not allocate its workspace")
    if status:
        raise RuntimeError(f"the CPU kernel refused the call (code {status})")


def sweep(
    points: Tensor,
    sizes: Sequence[int],
    scales: Sequence[float],
    pair: Pair,
    eps: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Energies of sets of rows, and their gradient.

    Args:
        points: [T, k] raw rows, the sets stored one after another.
        sizes: rows of each set; they sum to T.
        scales: the factor of each set's energy.
        pair: the pair function.
        eps: added to each squared norm.
        with_gradient: False computes the energies alone, at about a third of the work.

    Returns:
        float32 energies [len(sizes)], and float32 [T, k]: the gradient of each row's own energy.
    """
    _check("points", points)
    if any(n < 0 for n in sizes) or sum(sizes) != points.shape[0]:
        raise ValueError(
            f"`sizes` must be at least 0 and sum to {points.shape[0]}, got {list(sizes)}"
        )
    if len(scales) != len(sizes):
        raise ValueError(f"`scales` must have one value a set ({len(sizes)}), got {len(scales)}")
    size_array = (ctypes.c_int64 * len(sizes))(*sizes)
    scale_array = (ctypes.c_double * len(scales))(*scales)
    energy = torch.empty(len(sizes), dtype=torch.float32)
    gradient = torch.empty(points.shape, dtype=torch.float32) if with_gradient else None
    call = _Call(
        points=points.data_ptr(),
        sizes=ctypes.addressof(size_array),
        scales=ctypes.addressof(scale_array),
        energy=energy.data_ptr(),
        gradient=None if gradient is None else gradient.data_ptr(),
        sets=len(sizes),
        k=points.shape[1],
        dtype=DTYPES[points.dtype],
    )
    _run(call, pair, eps)
    return energy, gradient


def cross(
    rows: Tensor,
    columns: Tensor,
    row_index: Tensor,
    column_index: Tensor,
    scale: float,
    pair: Pair,
    eps: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Energy of every row with every column whose index differs, and the gradient to both.

    Half space counts a pair as `sweep` does, 2 f(c) + 2 f(-c), and has no antipodal term here: with
    the same rows on both sides this is twice the pair sum of `sweep`.

    Args:
        rows: [N, k] raw rows.
        columns: [M, k] raw rows of the same dtype.
        row_index: int32 [N].
        column_index: int32 [M].
        scale: the factor of the energy.
        pair, eps, with_gradient: as in `sweep`.

    Returns:
        float32 energy [], gradient [N, k] and gradient [M, k].
    """
    _check("rows", rows)
    _check("columns", columns)
    if columns.dtype != rows.dtype or columns.shape[1] != rows.shape[1]:
        raise ValueError(
            f"`columns` must have the dtype and width of `rows`, got {columns.dtype} "
            f"{tuple(columns.shape)} and {rows.dtype} {tuple(rows.shape)}"
        )
    for name, index, points in (
        ("row_index", row_index, rows),
        ("column_index", column_index, columns),
    ):
        if index.dtype != torch.int32 or tuple(index.shape) != (points.shape[0],):
            raise ValueError(
                f"`{name}` must be int32 of shape ({points.shape[0]},), "
                f"got {index.dtype} {tuple(index.shape)}"
            )
    sizes = (ctypes.c_int64 * 2)(len(rows), len(columns))
    factor = ctypes.c_double(scale)
    ids = torch.cat([row_index, column_index]).cpu()
    energy = torch.empty((), dtype=torch.float32)
    gradients = [
        torch.empty(p.shape, dtype=torch.float32) if with_gradient else None
        for p in (rows, columns)
    ]
    call = _Call(
        points=rows.data_ptr(),
        columns=columns.data_ptr(),
        ids=ids.data_ptr(),
        sizes=ctypes.addressof(sizes),
        scales=ctypes.addressof(factor),
        energy=energy.data_ptr(),
        gradient=None if gradients[0] is None else gradients[0].data_ptr(),
        columns_gradient=None if gradients[1] is None else gradients[1].data_ptr(),
        rectangular=True,
        sets=2,
        k=rows.shape[1],
        dtype=DTYPES[rows.dtype],
    )
    _run(call, pair, eps)
    return energy, gradients[0], gradients[1]
