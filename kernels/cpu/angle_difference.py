"""The difference of cosines or angles in two spaces, by the compiled sweep."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import binding


class _AngleCall(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("projected", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("to_rows", ctypes.c_void_p),
        ("to_projected", ctypes.c_void_p),
        ("sets", ctypes.c_int64),
        ("projections", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("rows_dtype", ctypes.c_int32),
        ("projected_dtype", ctypes.c_int32),
        ("angle", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


def angle_difference(
    rows: Tensor,
    projected: Tensor,
    angle: bool,
    rows_gradient: bool,
    projected_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum the squared differences of cosines or angles; see `kernels.portable.angle_loss.sweep`.

    Args:
        rows: [M, N, d], float32, float16 or bfloat16. Where it is one set, expanded to M, its
            cosines are computed once.
        projected: [M, N, k], likewise.
        angle: compare angles, not cosines.
        rows_gradient, projected_gradient: without either, what only it needs is left out.

    Returns:
        float32: [M], [M, N, d] and [M, N, k], None for a gradient that is left out.
    """
    reason = binding.unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    sets, n, d = rows.shape
    make = torch.empty if n > 1 else torch.zeros  # without pairs there is nothing to do
    total = make(sets, dtype=torch.float32)
    gradients = [
        make(x.shape, dtype=torch.float32) if wanted else None
        for x, wanted in ((rows, rows_gradient), (projected, projected_gradient))
    ]
    if n < 2 or sets == 0:
        return total, gradients[0], gradients[1]
    one_set = rows.stride(0) == 0
    rows = (rows[:1] if one_set else rows).contiguous()
    projected = projected.contiguous()
    binding._check("rows", rows.flatten(0, 1))
    binding._check("projected", projected.flatten(0, 1))
    call = _AngleCall(
        rows=rows.data_ptr(),
        projected=projected.data_ptr(),
        total=total.data_ptr(),
        to_rows=binding._pointer(gradients[0]),
        to_projected=binding._pointer(gradients[1]),
        sets=rows.shape[0],
        projections=sets // rows.shape[0],
        n=n,
        d=d,
        k=projected.shape[2],
        rows_dtype=binding.DTYPES[rows.dtype],
        projected_dtype=binding.DTYPES[projected.dtype],
        angle=angle,
        threads=torch.get_num_threads(),
    )
    isa = binding.INSTRUCTION_SETS.index(binding.instruction_set())
    binding._raise_for(binding._library().comhe_angle_difference(ctypes.byref(call), isa))
    return total, gradients[0], gradients[1]
