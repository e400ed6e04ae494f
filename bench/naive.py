"""The formula in a few lines of PyTorch; autograd computes the gradient."""

import torch
from torch import Tensor


def naive_energy(weight: Tensor, s: float = 2.0, *, half_space: bool = False) -> Tensor:
    """Average r^-s (s = 0: -log r) over the pairs of rows of `weight` [..., N, d] -> [...].

    Holds N x N matrices. The same number as
    `comhe_ext.hyperspherical_energy(weight, s, half_space=half_space, min_distance=0)`.
    """
    n = weight.shape[-2]
    v = torch.nn.functional.normalize(weight, dim=-1)
    # the factor 2 on the rows, not on the products, saves a pass over N x N
    twice = (2.0 * v) @ v.mT

    def pair_function(r2: Tensor) -> Tensor:
        r2 = r2.clamp(min=1e-12)
        return r2.pow(-s / 2) if s else -0.5 * r2.log()

    values = pair_function(2.0 - twice)
    if not half_space:
        return values.triu(1).sum((-1, -2)) / (n * (n - 1) / 2)
    # of the four pairs that two rows and their opposites make, two are at r and two at sqrt(4 - r2)
    values = 2.0 * (values + pair_function(2.0 + twice)).triu(1)
    antipodes = n * pair_function(twice.new_tensor(4.0))
    return (values.sum((-1, -2)) + antipodes) / (n * (2 * n - 1))
