"""The energy of sets of rows, its gradient and its Hessian-vector product.

    S       = sum_{i<j} F(c_ij)              (half space: 2 sum_{i<j} F(c_ij) + sum_i f(-|v_i|^2))
    dS/dp_i = (G_i - v_i <v_i, G_i>) / nu_i,  G_i = sum_j F'(c_ij) v_j

`forces` sums over the pairs of each set; here they get the factor of their set and, in half space,
the antipodes.
"""

from torch import Tensor

from ..packed_sets import spread_over_rows, sum_over_rows
from ..pair_functions import PairFunction
from ..sweep import SweepRequest, SweepResult
from .forces import Pairing, forces, forces_along, gradient_along, gradient_of
from .rows import Rows, result_dtype
from .tiles import block_of, symmetric_tiles


def sweep(request: SweepRequest) -> SweepResult:
    """Sum F over the pairs of each set, scaled, and compute the gradient in the rows.

    Without the gradient the second and third product of each tile are left out.

    Returns:
        float32, float64 for float64 points.
    """
    sizes, pair, dtype = request.sizes, request.pair, result_dtype(request.points)
    total = forces(_pairing(request), pair, request.eps, request.gradient)
    energy = sum_over_rows(total.sums.squeeze(1), sizes)
    if pair.half_space:
        value, slope, _ = _antipodes(total.rows, pair)
        energy.mul_(2.0).add_(sum_over_rows(value.squeeze(1), sizes))
        # a pair counts twice, a row with its own antipode once: half of its slope is added here,
        # and all of the gradient is doubled below
        total.axial.sub_(slope * total.rows.deficit)
    energy = energy.mul_(energy.new_tensor(request.scales)).to(dtype)
    if not request.gradient:
        return SweepResult(energy)
    return SweepResult(energy, gradient_of(total, _scale_of_row(request, total.axial), dtype))


def hessian_vector_product(request: SweepRequest, tangents: Tensor) -> Tensor:
    """Differentiate the gradient of `sweep` along `tangents` [T, k], in closed form, by tiles.

    Returns:
        [T, k], float32, float64 for float64 points.
    """
    pair = request.pair
    total = forces_along(_pairing(request), pair, request.eps, tangents)
    if pair.half_space:
        # each row with its own antipode, as in `sweep`: -slope deficit v, and c. = deficit.
        _, slope, curve = _antipodes(total.rows, pair)
        deficit = total.rows.deficit
        deficit_dot = -2.0 * deficit * total.tau * total.rows.inv_nu
        total.axial.sub_(slope * deficit)
        total.axial_dot.sub_((curve * deficit + slope) * deficit_dot)
    return gradient_along(total, _scale_of_row(request, total.axial), result_dtype(request.points))


def _pairing(request: SweepRequest) -> Pairing:
    """Let the rows of each set meet each other."""
    points = request.points
    return Pairing(points, symmetric_tiles(request.sizes, block_of(points)))


def _scale_of_row(request: SweepRequest, like: Tensor) -> Tensor:
    """Give each row the scale of its set, [T, 1]; the half space counts every pair twice."""
    scales = like.new_tensor(request.scales) * (2.0 if request.pair.half_space else 1.0)
    return spread_over_rows(scales, request.sizes)


def _antipodes(rows: Rows, pair: PairFunction) -> tuple[Tensor, Tensor, Tensor]:
    """Compute f, f', f'' of every row with its own antipode: c = -|v|^2 = deficit - 1."""
    far = 2.0 * rows.deficit
    return pair.one_sided(4.0 - far, far)
