"""The formula as one would write it in a few lines of PyTorch; autograd makes the gradient."""

import torch
from torch import Tensor


def naive_energy(weight: Tensor, s: float = 2.0) -> Tensor:
    """Mean of r^-s (s = 0: -log r) over the pairs of rows of `weight` [N, d]; holds N x N matrices.

    The same number as `comhe_ext.hyperspherical_energy(weight, s, min_distance=0)`.
    """
    n = weight.shape[0]
    v = torch.nn.functional.normalize(weight)
    # the factor 2 on the rows, not on the products, saves a pass over N x N
    r2 = (2.0 - (2.0 * v) @ v.mT).clamp(min=1e-12)
    values = r2.pow(-s / 2) if s else -0.5 * r2.log()
    return values.triu(1).sum() / (n * (n - 1) / 2)


def naive_bytes(n: int) -> int:
    """Memory that energy and gradient take at their peak: six float32 matrices of N x N."""
    return 6 * 4 * n * n
