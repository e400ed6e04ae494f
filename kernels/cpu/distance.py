"""Distances of rows to one other each, by the C library of this folder; see distance-inl.h."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..sweep import DistanceRequest
from .binding import (
    DTYPES,
    INSTRUCTION_SETS,
    _check,
    _library,
    _pointer,
    _raise_for,
    instruction_set,
    unavailable,
)


class _Call(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("distance", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("to_rows", ctypes.c_void_p),
        ("to_columns", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("dtype", ctypes.c_int32),
        ("half_space", ctypes.c_int32),
        ("angular", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


def distance(request: DistanceRequest) -> Tensor:
    """Compute the distance of each row to the other one of its index, float32 [N]."""
    # the library is asked by its pointer
    result = torch.empty(max(len(request.rows), 1), dtype=torch.float32)
    _run(request, distance=result.data_ptr())
    return result[: len(request.rows)]


def distance_gradient(
    request: DistanceRequest, weights: Tensor, rows_gradient: bool, columns_gradient: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradient of the weighted sum of the distances; see `Backend.distance_gradient`.

    Each row's is summed in double over all that have it for their nearest.
    """
    if weights.dtype != torch.float32 or weights.shape != request.rows.shape[:1]:
        raise ValueError(
            f"`weights` must be float32 of shape ({len(request.rows)},), got {weights.dtype} "
            f"{tuple(weights.shape)}"
        )
    weights = weights.contiguous()
    gradients = [
        torch.empty(x.shape, dtype=torch.float32) if wanted and x is not None else None
        for x, wanted in ((request.rows, rows_gradient), (request.columns, columns_gradient))
    ]
    if any(x is not None and x.numel() for x in gradients):
        to_rows, to_columns = map(_pointer, gradients)
        _run(request, weights=weights.data_ptr(), to_rows=to_rows, to_columns=to_columns)
    return gradients[0], gradients[1]


def _run(request: DistanceRequest, **pointers: Any) -> None:
    if (reason := unavailable()) is not None:
        raise RuntimeError(reason)
    rows, columns, index = request.rows, request.columns, request.index
    _check("rows", rows)
    if columns is not None:
        _check("columns", columns)
        if columns.dtype != rows.dtype or columns.shape[1] != rows.shape[1]:
            raise ValueError(
                f"`columns` must be {rows.dtype} with {rows.shape[1]} columns, got {columns.dtype} "
                f"of shape {tuple(columns.shape)}"
            )
    if index.dtype != torch.int64 or index.shape != rows.shape[:1] or not index.is_contiguous():
        raise ValueError(
            f"`index` must be int64 of shape ({len(rows)},) and contiguous, got {index.dtype} "
            f"{tuple(index.shape)}"
        )
    call = _Call(
        rows=rows.data_ptr(),
        columns=None if columns is None else columns.data_ptr(),
        index=index.data_ptr(),
        n=rows.shape[0],
        m=0 if columns is None else columns.shape[0],
        k=rows.shape[1],
        eps=request.eps,
        dtype=DTYPES[rows.dtype],
        half_space=request.half_space,
        angular=request.angular,
        threads=torch.get_num_threads(),
        **pointers,
    )
    isa = INSTRUCTION_SETS.index(instruction_set())
    _raise_for(_library().comhe_distance(ctypes.byref(call), isa))
