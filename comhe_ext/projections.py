"""Projection matrices of compressive energies."""

import torch
from torch import Generator, Tensor

from comhe_ext.functional import check_count


def random_projection(
    num_projections: int,
    dim: int,
    in_features: int,
    *,
    generator: Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw Gaussian projection matrices, iid N(0, 1) entries.

    Torch equivalent::

        torch.randn(num_projections, dim, in_features)

    The entries are not divided by sqrt(dim): an energy does not see the length of its rows.

    Args:
        num_projections: C, how many matrices.
        dim: k, the dimension projected to.
        in_features: d, the dimension projected from.
        generator: source of the random numbers, on `device`.
        device: where to make them, torch's default device if None.
        dtype: a floating-point dtype, torch's default dtype if None.

    Returns:
        [C, k, d], to be passed to `compressive_energy`.

    Raises:
        TypeError: a count is not an integer, or `dtype` is not floating-point.
        ValueError: a count is less than 1.

    Source: Lin et al. (2020), with the distribution of the authors' code.
    """
    check_count("num_projections", num_projections)
    check_count("dim", dim)
    check_count("in_features", in_features)
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"`dtype` must be a floating-point dtype, got {dtype}")
    return torch.randn(
        num_projections, dim, in_features, generator=generator, device=device, dtype=dtype
    )
