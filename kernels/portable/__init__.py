"""Backend "torch": every sweep in plain torch, tile by tile, on any device and in any dtype.

    rows         normalizes rows of any magnitude
    tiles        cuts the pairs of many sets into tiles
    near_pairs   finds pairs whose cosine is near +-1 and computes them again in float64
    energy       the energy, its gradient and its Hessian-vector product
    angle_loss   the angle-preserving loss, likewise

Each imports only from those above it. Memory is O(T k): a tile exists only while it is worked on.
"""

from ..pair_functions import PairFunction
from ..sweep import Offers
from .energy import hessian_vector_product, sweep

__all__ = ["OFFERS", "hessian_vector_product", "supports", "sweep", "unavailable"]

OFFERS = Offers(float64=True)


def unavailable() -> str | None:
    """Say why this backend cannot run: it always can, for it needs nothing but torch."""
    return None


def supports(pair: PairFunction) -> bool:
    """Tell whether it knows a pair function: it knows all, for they are made of torch operators."""
    return True
