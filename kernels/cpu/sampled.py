"""Energies of sets whose rows meet within random parts alone, by the compiled sweep."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..sweep import Numbers, SampledRequest
from . import binding


class _Sample(ctypes.Structure):
    _fields_ = [
        ("order", ctypes.c_void_p),
        ("parts", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("set_stride", ctypes.c_int64),
        ("gradient_stride", ctypes.c_int64),
        ("gradient_set_stride", ctypes.c_int64),
        ("coefficients", ctypes.c_double * 2),
        ("energy", ctypes.c_void_p),
    ]


def sampled(request: SampledRequest) -> tuple[Tensor, Tensor | None]:
    """Compute energies of rows that meet within random parts alone; see `SampledRequest`.

    Returns:
        float64 [S], and float32 [S, n, k], laid out as the points where they fill their memory.
    """
    points, order = request.points, request.order
    if points.dim() != 3 or points.dtype != torch.float32 or points.device.type != "cpu":
        raise ValueError(
            "`points` must be float32 [S, n, k] on the CPU, got "
            f"{points.dtype} {tuple(points.shape)} on {points.device}"
        )
    if order.dtype != torch.int64 or order.shape != points.shape[:2]:
        raise ValueError(
            f"`order` must be int64 {tuple(points.shape[:2])}, got {order.dtype} "
            f"{tuple(order.shape)}"
        )
    sets, n, k = points.shape
    if not 1 <= request.parts <= n // 2:
        raise ValueError(f"`parts` must be from 1 to {n // 2}, got {request.parts}")
    points = points if points.stride(2) == 1 else points.contiguous()
    order = order.contiguous()
    energy = torch.empty(sets, dtype=torch.float64)
    gradient = torch.empty_like(points) if request.gradient else None
    sample = _Sample(
        order=order.data_ptr(),
        parts=request.parts,
        stride=points.stride(1),
        set_stride=points.stride(0),
        gradient_stride=0 if gradient is None else gradient.stride(1),
        gradient_set_stride=0 if gradient is None else gradient.stride(0),
        coefficients=(ctypes.c_double * 2)(*request.coefficients),
        energy=energy.data_ptr(),
    )
    every = binding._sets_of(Numbers.of((n,) * sets), Numbers.of((request.scale,) * sets))
    call = binding._Call(
        points=points.data_ptr(),
        sizes=ctypes.addressof(every.sizes),
        scales=ctypes.addressof(every.scales),
        gradient=binding._pointer(gradient),
        sets=sets,
        k=k,
        sample=ctypes.addressof(sample),
    )
    binding._run(call, request.pair, request.eps)
    return energy, gradient
