"""Work in chunks whose backward computes them again, so that memory stays O(N k)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from comhe_ext.operators.library import forward_mode


def recomputed(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Compute function(*rows), and keep nothing but the rows for the backward.

    Under torch.compile and the transforms of torch.func, which take no checkpoints, all is kept; in
    forward mode, too, for which the checkpoints of PyTorch 2.6 have no rule.
    """
    plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in rows)
    if plain or forward_mode() or not wanted:
        return function(*rows)
    kept: Tensor = checkpoint(function, *rows, use_reentrant=False, preserve_rng_state=False)
    return kept
