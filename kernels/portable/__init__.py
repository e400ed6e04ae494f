"""Backend "torch": every sweep in plain torch, tile by tile, on any device and in any dtype.

    rows         normalizes rows of any magnitude
    tiles        cuts the pairs of many sets into tiles
    near_pairs   finds pairs whose cosine is near +-1 and computes them again in float64
    forces       sums F and the forces over the tiles, and their derivatives along tangents
    energy       the energy of sets, its gradient and its Hessian-vector product
    cross        the same of rows against columns of their own
    nearest      the nearest row, or column, of each row
    distance     the distance of each row to one other, and its gradient
    angle_loss   the angle-preserving loss, likewise
    angle_moments    of cosines, without visiting pairs, where rows are many and narrow

Each imports only from those above it. Memory is O(T k): a tile exists only while it is worked on.
"""

from ..pair_functions import PairFunction
from ..sweep import Offers, SweepRequest, SweepResult
from . import cross, energy
from .angle_loss import sweep as angle_difference
from .cross import cross_hessian_vector_product
from .distance import distance, distance_gradient
from .energy import hessian_vector_product
from .nearest import nearest

__all__ = [
    "OFFERS",
    "angle_difference",
    "cross_hessian_vector_product",
    "distance",
    "distance_gradient",
    "hessian_vector_product",
    "nearest",
    "supports",
    "sweep",
    "unavailable",
]

OFFERS = Offers(cross=True, nearest=True, distance=True, angle_difference=True, float64=True)


def unavailable() -> str | None:
    """Say why this backend cannot run: it always can, for it needs nothing but torch."""
    return None


def supports(pair: PairFunction) -> bool:
    """Tell whether it knows a pair function: it knows all, for they are made of torch operators."""
    return True


def sweep(request: SweepRequest) -> SweepResult:
    """Sum F over the pairs of sets, or of rows and columns, and compute the gradients."""
    return energy.sweep(request) if request.columns is None else cross.sweep(request)
