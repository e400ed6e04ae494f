"""Rows of any magnitude, normalized in float64.

v = p / nu,  nu = sqrt(|p|^2 + eps),  deficit = 1 - |v|^2 = eps / nu^2
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# up to this k random rows come so near to each other that float32 misses 2e-6 in the gradient
FLOAT64_UP_TO = 15


class Rows(NamedTuple):
    """Normalized rows; a dead row (nu below the smallest normal number) has v = 0, 1/nu = 0."""

    v: Tensor  # [T, k]
    inv_nu: Tensor  # [T, 1] float64
    deficit: Tensor  # [T, 1] float64, 1 - |v|^2, exactly


def normalize(points: Tensor, eps: float, dtype: torch.dtype) -> Rows:
    """Normalize `points` [T, k] in float64; v comes out as `dtype`."""
    v = _double(points)
    # divided by its largest entry first, a row of 1e-30 or 1e30 neither vanishes nor overflows
    largest = v.abs().amax(1, keepdim=True)
    largest = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    v.div_(largest)
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    root = torch.full_like(norm, math.sqrt(eps))
    nu = torch.hypot(norm * largest, root)
    # the smallest normal number of the result's dtype, whatever this is computed in. A row of NaN
    # is not dead: its NaN has to reach the result
    dead = nu < torch.finfo(result_dtype(points)).tiny
    v.div_(torch.hypot(norm, root / largest)).masked_fill_(dead, 0.0)
    inv_nu = nu.reciprocal().masked_fill_(dead, 0.0)
    deficit = (root * inv_nu).square().masked_fill_(dead, 1.0)
    return Rows(v.to(dtype), inv_nu, deficit)


def working_dtype(points: Tensor) -> torch.dtype:
    """Choose the dtype of the tiles: float32 only where that is accurate enough."""
    few = points.shape[1] <= FLOAT64_UP_TO
    return torch.float64 if few or points.dtype == torch.float64 else torch.float32


def result_dtype(points: Tensor) -> torch.dtype:
    """Choose the dtype of energies and gradients: float64 for float64 points, else float32."""
    return torch.float64 if points.dtype == torch.float64 else torch.float32


def _double(points: Tensor) -> Tensor:
    """Copy to float64, subnormal numbers included.

    Under `torch.set_flush_denormal` a conversion reads subnormal numbers as 0, or does so on some
    of torch's threads only; so their bits are read instead.
    """
    v = points.to(torch.float64, copy=True)
    if points.device.type != "cpu" or points.dtype not in (torch.float32, torch.bfloat16):
        return v
    bits = points.float().view(torch.int32)  # bfloat16 is the upper half of a float32
    mantissa = bits & 0x7FFFFFFF
    subnormal = (mantissa < 0x800000) & (mantissa > 0)
    if bool(subnormal.any()):
        size = mantissa.double() * 2.0**-149
        v = torch.where(subnormal, torch.where(bits < 0, -size, size), v)
    return v
