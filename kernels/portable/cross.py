"""The energy of rows against columns of their own, its gradients and its Hessian-vector product.

    E_i = sum_j F(c_ij)  over the columns j of another id
    L   = scale sum_i a_i E_i

The columns are packed behind the rows, and `forces` sums over the tiles of rows against columns.
"""

import torch
from torch import Tensor

from ..sweep import SweepRequest, SweepResult
from .forces import Pairing, forces, forces_along, gradient_along, gradient_of
from .rows import result_dtype
from .tiles import block_of, cross_tiles


def sweep(request: SweepRequest) -> SweepResult:
    """Sum F over the rows and columns of a cross set, and compute the gradients that are wanted.

    Returns:
        float32, float64 for float64 points.
    """
    (scale,), (n,), dtype = request.scales, request.sizes, result_dtype(request.points)
    wanted = request.wanted
    pairing = _pairing(request)._replace(pushed=wanted)
    total = forces(pairing, request.pair, request.eps, any(wanted))
    sums = total.sums[:n]
    row_energies = sums.squeeze(1).to(dtype) if request.row_energies else None
    weighted = sums if pairing.weights is None else sums * pairing.weights[:n]
    energy = (scale * weighted.sum(0)).to(dtype)
    factor = torch.full_like(total.axial, scale)
    gradients = [
        gradient_of(total, factor, dtype, part) if one else None
        for part, one in zip((slice(n), slice(n, None)), wanted, strict=True)
    ]
    return SweepResult(energy, gradients[0], gradients[1], row_energies)


def cross_hessian_vector_product(
    request: SweepRequest,
    row_tangents: Tensor | None = None,
    column_tangents: Tensor | None = None,
    weight_tangents: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate the derivatives of L in rows, columns and weights along tangents of these.

    In closed form, by tiles. Tangents that are None are 0.

    Args:
        request: a cross set; weights that are None are all 1.
        row_tangents: [N, k].
        column_tangents: [M, k].
        weight_tangents: [N].

    Returns:
        [N, k], [M, k] and [N], float32, float64 for float64 points.
    """
    (scale,), (n,), dtype = request.scales, request.sizes, result_dtype(request.points)
    assert request.columns is not None
    tangents = torch.cat(
        [
            torch.zeros_like(points, dtype=dtype) if given is None else given.to(dtype)
            for points, given in (
                (request.points, row_tangents),
                (request.columns, column_tangents),
            )
        ]
    )
    pairing = _pairing(request)
    weights_dot = None
    if weight_tangents is not None:
        weights_dot = _packed(weight_tangents, request.columns, 0.0)
        if pairing.weights is None:
            pairing = pairing._replace(weights=torch.ones_like(weights_dot))
    total = forces_along(pairing, request.pair, request.eps, tangents, weights_dot, sums=True)
    product = gradient_along(total, torch.full_like(total.axial, scale), dtype)
    return product[:n], product[n:], (scale * total.sums_dot[:n, 0]).to(dtype)


def _pairing(request: SweepRequest) -> Pairing:
    """Pack the columns behind the rows, and let them meet."""
    rows, columns = request.points, request.columns
    assert columns is not None
    ids = weights = None
    if request.row_ids is not None and request.column_ids is not None:
        ids = torch.cat([request.row_ids, request.column_ids])
    if request.row_weights is not None:
        weights = _packed(request.row_weights, columns, 1.0)
    tiles = cross_tiles(rows.shape[0], columns.shape[0], block_of(rows))
    return Pairing(torch.cat([rows, columns]), tiles, ids, weights)


def _packed(of_rows: Tensor, columns: Tensor, of_columns: float) -> Tensor:
    """Give each row its value [N], and all columns one value -> float64 [N + M, 1]."""
    of_rows = of_rows.double()
    return torch.cat([of_rows, of_rows.new_full((columns.shape[0],), of_columns)]).unsqueeze(1)
