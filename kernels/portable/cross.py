"""The energy of rows against columns of their own, and its gradients.

    E_i = sum_j F(c_ij)  over the columns j of another id
    L   = scale sum_i a_i E_i

The columns are packed behind the rows, and `forces` sums over the tiles of rows against columns.
"""

import torch
from torch import Tensor

from ..sweep import SweepRequest, SweepResult
from .forces import Pairing, forces, gradient_of
from .rows import result_dtype
from .tiles import block_of, cross_tiles


def sweep(request: SweepRequest) -> SweepResult:
    """Sum F over the rows and columns of a cross set, and compute the gradients in both.

    Returns:
        float32, float64 for float64 points.
    """
    (scale,), (n,), dtype = request.scales, request.sizes, result_dtype(request.points)
    pairing = _pairing(request)
    total = forces(pairing, request.pair, request.eps, request.gradient)
    sums = total.sums[:n]
    row_energies = sums.squeeze(1).to(dtype) if request.row_energies else None
    weighted = sums if pairing.weights is None else sums * pairing.weights[:n]
    energy = (scale * weighted.sum(0)).to(dtype)
    if not request.gradient:
        return SweepResult(energy, row_energies=row_energies)
    gradient = gradient_of(total, torch.full_like(total.axial, scale), dtype)
    return SweepResult(energy, gradient[:n], gradient[n:], row_energies)


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
