"""Work in chunks whose backward computes them again, so that memory stays O(N k)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Compute function(*rows), and keep nothing but the rows for the backward.

    Under torch.compile and the transforms of torch.func, which take no checkpoints, all is kept.
    """
    plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if plain or not (torch.is_grad_enabled() and any(x.requires_grad for x in rows)):
        return function(*rows)
    kept: Tensor = checkpoint(function, *rows, use_reentrant=False, preserve_rng_state=False)
    return kept
