"""The sweep in Triton, for CUDA and ROCm. Triton is imported at the first call, not before.

In the order of a call: splits and plan, project_normalize, then direct, or pairwise with
near_pairs, or large_k, then finish. pair_function, bounded_pairs, pair_terms and special_functions
hold what they share; backend calls them, and variant tells which code a call runs. A cross set goes
through sides, cross or cross_direct, and cross_sweep, which calls them; nearest_rows finds the
nearest rows, and angle_loss sweeps two spaces at once.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor

from ..pair_functions import PairFunction
from ..sweep import NearestRequest, Offers, SweepRequest, SweepResult

OFFERS = Offers(cross=True, nearest=True, angle_difference=True, projection=True)


def _outdated() -> str | None:
    """Name what the installed Triton has not learned yet, by what it has and not by its number."""
    import triton

    found = f"Triton {triton.__version__} is too old, backend 'triton' needs"
    if not hasattr(triton, "knobs"):
        return f"{found} 3.4 or later: update PyTorch, or use backend='torch'"
    if torch.version.hip is not None:
        from triton.backends.amd.compiler import HIPOptions

        # the product of float32 by parts, which ROCm has in place of tf32x3
        if "bf16x6" not in HIPOptions.allowed_dot_input_precisions:
            return f"{found} 3.6 or later on ROCm: update PyTorch, or use backend='torch'"
    return None


@cache
def unavailable() -> str | None:
    """None where the kernels can run, else the reason and the remedy."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: install it (`pip install triton`) or use backend='torch'"
    if (reason := _outdated()) is not None:
        return reason
    from .backend import interpreted, target_of
    from .plan import unknown_target

    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is available: use backend='cpu' or backend='torch'"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than compute capability 8.0: use backend='torch'"
    return unknown_target(target_of(torch.device("cuda")))


def supports(pair: PairFunction) -> bool:
    """Whether the kernels know a pair function."""
    from .pair_function import is_known

    return is_known(pair)


def sweep(request: SweepRequest) -> SweepResult:
    """Energies and gradients of sets, projected or not, or of rows against columns."""
    from . import backend, cross_sweep

    return (backend if request.columns is None else cross_sweep).sweep(request)


def nearest(request: NearestRequest) -> Tensor:
    """Index of the nearest other row of each row of its set, or of its nearest column."""
    from . import nearest_rows

    return nearest_rows.nearest(request)


def angle_difference(
    rows: Tensor,
    projected: Tensor,
    angle: bool,
    rows_gradient: bool,
    projected_gradient: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum over the pairs of rows in two spaces, and compute the gradients in both."""
    from . import angle_loss

    return angle_loss.angle_difference(rows, projected, angle, rows_gradient, projected_gradient)
