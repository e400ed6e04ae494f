"""The sweep in Triton, for CUDA and ROCm. Triton is imported at the first call, not before.

The files read in the order of a call: plan, project_normalize, then direct, pairwise with
near_pairs, or large_k, then finish; pair_function holds what they share, backend calls them.
"""

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .pair_function import Pair


def unavailable() -> str | None:
    """None where the kernels can run, else the reason and the remedy."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: install it (`pip install triton`) or use backend='torch'"
    from .backend import interpreted

    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is available: use backend='cpu' or backend='torch'"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than compute capability 8.0: use backend='torch'"
    return None


def sweep(
    points: Tensor,
    sizes: Sequence[int],
    scales: Sequence[float],
    pair: "Pair",
    eps: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Energy [B] and gradient [T, k] (or None) of packed sets; see `kernels.gpu.backend.sweep`."""
    from . import backend

    return backend.sweep(points, sizes, scales, pair, eps, with_gradient)


def project_sweep(
    weights: Sequence[Tensor],
    projections: Sequence[Tensor | None],
    scales: Sequence[float],
    pair: "Pair",
    eps: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The sweep of the projected rows of several weights; see `kernels.gpu.backend.project_sweep`.

    Returns:
        Energy [B] and gradient in the projected rows [T, k] (or None), float32.
    """
    from . import backend

    return backend.project_sweep(weights, projections, scales, pair, eps, with_gradient)
