"""From weights and matrices to the rows of a sweep, weight by weight, set by set."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from comhe_ext.operators.library import Form, compute_dtype, product


def project(weight: Tensor, matrices: Tensor) -> Tensor:
    """Project rows [V, N, d] by each of the matrices [C, k, d] -> [V, C, N, k], as one product."""
    dtype = compute_dtype(weight, matrices)
    rows = weight.to(dtype).flatten(0, 1)
    products = product(rows, matrices.to(dtype).flatten(0, 1).mT)
    return products.unflatten(0, weight.shape[:2]).unflatten(-1, matrices.shape[:2]).transpose(1, 2)


def unit_rows(rows: Tensor, eps: float = 0.0) -> Tensor:
    """Normalize rows [..., N, d] of any magnitude, in float32 or float64; dead rows become 0."""
    p = rows.to(compute_dtype(rows))
    # divided by its largest entry first, a row of 1e-30 or 1e30 neither vanishes nor overflows
    largest = p.detach().abs().amax(-1, keepdim=True)
    largest = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    p = p / largest
    rest = (math.sqrt(eps) / largest).square()
    nu = safe_sqrt(p.square().sum(-1, keepdim=True) + rest)
    dead = nu.detach() * largest < torch.finfo(p.dtype).tiny  # NaN is not
    return (p / nu.masked_fill(dead, 1.0)).masked_fill(dead, 0.0)


def pad(rows: Tensor, width: int) -> Tensor:
    """Fill rows up to `width` columns; a coordinate of zeros changes no cosine."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[-1]))


def width_of(weights: Sequence[Tensor | Form], matrices: Sequence[Tensor | Form | None]) -> int:
    """Find k, the one number of rows of all matrices; without any, the columns of the weights."""
    for projection in matrices:
        if projection is not None:
            return projection.shape[1]
    return max(weight.shape[2] for weight in weights)


def count_of(matrices: Tensor | Form | None) -> int:
    """Count the sets that each set of a weight becomes."""
    return 1 if matrices is None else matrices.shape[0]


def set_sizes(
    weights: Sequence[Tensor | Form], matrices: Sequence[Tensor | Form | None]
) -> list[int]:
    """List N of each set that weights and matrices make."""
    return [
        n
        for weight, projection in zip(weights, matrices, strict=True)
        for n in [weight.shape[1]] * (weight.shape[0] * count_of(projection))
    ]


def all_rows(weights: Sequence[Tensor], matrices: Sequence[Tensor | None]) -> Iterator[Tensor]:
    """Yield the rows of each weight under all its matrices, set after set, [..., k]."""
    width = width_of(weights, matrices)
    is_plain = all(projection is None for projection in matrices)
    # rows as they are keep the dtype that they share
    dtypes = {weight.dtype for weight in weights}
    dtype = compute_dtype(*weights, *matrices)
    if is_plain and len(dtypes) == 1:
        (dtype,) = dtypes
    for weight, projection in zip(weights, matrices, strict=True):
        if projection is not None:
            rows = project(weight, projection)
        else:
            rows = weight if weight.shape[2] == width else pad(weight, width)
        yield rows.to(dtype)


def packed_rows(
    weights: Sequence[Tensor], matrices: Sequence[Tensor | None], sizes: Sequence[int]
) -> Tensor:
    """Pack all rows, [T, k]; copied once at most, from where products left them."""
    if len(weights) == 1 and matrices[0] is None:
        return weights[0].flatten(0, 1).contiguous()
    width, packed, first = width_of(weights, matrices), None, 0
    for rows in all_rows(weights, matrices):
        if packed is None:
            packed = rows.new_empty(sum(sizes), width)
        last = first + rows.numel() // width
        packed[first:last].view(rows.shape).copy_(rows)
        first = last
    assert packed is not None
    return packed


def points_of(
    weights: Sequence[Tensor], matrices: Sequence[Tensor | None]
) -> tuple[Tensor, list[int]]:
    """Make all rows by torch's differentiable operators, and list the size of each set."""
    if len(weights) == 1 and matrices[0] is None:
        return weights[0] if weights[0].dim() == 3 else weights[0].unsqueeze(0), []
    width = width_of(weights, matrices)
    parts = [rows.reshape(-1, width) for rows in all_rows(weights, matrices)]
    return torch.cat(parts), set_sizes(weights, matrices)


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root with zero derivatives at 0, where a distance has no direction."""
    zero = x == 0
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
