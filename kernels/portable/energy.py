"""The energy of sets of rows, its gradient and its Hessian-vector product.

    v_i = p_i / nu_i,  nu_i = sqrt(|p_i|^2 + eps),  c_ij = <v_i, v_j>
    S   = sum_{i<j} F(c_ij)                  (half space: 2 sum_{i<j} F(c_ij) + sum_i f(-|v_i|^2))
    dS/dp_i = (G_i - v_i <v_i, G_i>) / nu_i,  G_i = sum_j F'(c_ij) v_j

One matrix product gives a tile of d2 = 2 - 2c, in half space of c; a few elementwise passes turn it
into F and F', and two more products add F' v to the force G. Near pairs are left out of the tiles
and computed again in float64. In few dimensions, where near pairs are common even among random
rows, the tiles are float64 too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packed_sets import equal_runs, spread_over_rows
from ..pair_functions import PairFunction
from ..sweep import SweepRequest, SweepResult
from .near_pairs import (
    Repairs,
    add_to_both,
    exact_dots,
    mask_out,
    near_below,
    near_indices,
    near_pairs,
    push_apart,
)
from .rows import Rows, normalize, result_dtype, working_dtype
from .tiles import Tile, block_of, cols_of, rows_of, symmetric_tiles

# F' and F'' of near pairs are clamped here, which leaves room for sums: an infinite one times 0
# would be NaN. The bound is beyond all that float32 holds; in float64, the gradient of a row with a
# clamped pair becomes infinite where it exceeds LONGEST
MOST, LONGEST = 2.0**1000, 2.0**900


def sweep(request: SweepRequest) -> SweepResult:
    """Sum F over the pairs of each set, scaled, and compute the gradient in the rows.

    Without the gradient the second and third product of each tile are left out.

    Returns:
        float32, float64 for float64 points.
    """
    points, sizes, scales = request.points, request.sizes, request.scales
    pair, eps = request.pair, request.eps
    dtype = _tile_dtype(points, pair)
    rows = normalize(points, eps, dtype)
    if pair.half_space:
        left = right = v = rows.v
    else:
        # [-2v, 2] [v, 1]^T: the product itself gives 2 - 2c, which saves a pass over every tile
        right = torch.nn.functional.pad(rows.v, (0, 1), value=1.0)
        left = -2.0 * right
        left[:, -1] = 2.0
        v = right[:, :-1]
        rows = rows._replace(v=v)
    energy = torch.zeros(len(sizes), dtype=torch.float64, device=points.device)
    # most of G lies along v_i and is projected away: hence float64 between tiles
    force = torch.zeros_like(v, dtype=torch.float64) if request.gradient else None
    axial = torch.zeros_like(rows.deficit)  # sum of side F' over the near pairs of a row
    clamped = torch.zeros_like(rows.deficit)  # how many of them were clamped to MOST
    bound = near_below(pair, dtype)
    clean = pair.clean_above(bound)

    def masked_tile(tile: Tile) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = torch.bmm(rows_of(left, tile), cols_of(right, tile).mT)
        return x, *mask_out(x, tile, pair, bound)

    def repair(tile: Tile, near: Tensor) -> None:
        for index in near_indices(near, tile, points.shape[1]):
            pairs = near_pairs(points, *index, eps)
            value, slope, _ = pair.of_cosine(pairs.d2, pairs.far)
            energy.index_put_((pairs.set,), value.squeeze(1), accumulate=True)
            if force is not None:
                add_to_both(clamped, pairs, slope.abs() > MOST)
                slope.clamp_(-MOST, MOST)
                push_apart(force, pairs, slope * pairs.apart)
                add_to_both(axial, pairs, pairs.side * slope)

    repairs = Repairs(masked_tile, repair, points.device)
    for tile in symmetric_tiles(sizes, block_of(points)):
        x, left_out, near = masked_tile(tile)
        closed = pair.closed_tile(x) if clean else None
        if closed is not None:
            value, slope, factor = closed
        else:
            d2, far = _both_squares(x, pair)
            (value, slope, _), factor = pair.of_cosine(d2, far), 1.0
        if left_out is not None:
            value.masked_fill_(left_out, 0.0)
            slope.masked_fill_(left_out, 0.0)
        energy[tile.run.sets] += value.sum((1, 2)).double() * (0.5 if tile.diagonal else 1.0)
        if force is not None:
            rows_of(force, tile).add_(torch.bmm(slope, cols_of(v, tile)), alpha=factor)
            if not tile.diagonal:
                cols_of(force, tile).add_(torch.bmm(slope.mT, rows_of(v, tile)), alpha=factor)
        repairs.add(tile, near)
    repairs.finish()

    axial.mul_(rows.deficit)
    if pair.half_space:
        energy.mul_(2.0)
        value, slope, _ = _antipodes(rows, pair)
        for run in equal_runs(sizes):
            energy[run.sets] += run.view(value).sum((1, 2)).double()
        # a pair counts twice, a row with its own antipode once: half of its slope is added here,
        # and all of the gradient is doubled below
        axial -= slope * rows.deficit
    energy.mul_(energy.new_tensor(scales))
    energy = energy.to(result_dtype(points))
    if force is None:
        return SweepResult(energy)
    gradient = torch.empty_like(force, dtype=result_dtype(points))
    factor_of_row = rows.inv_nu * _scale_of_row(sizes, scales, pair, rows.inv_nu)
    for part in (slice(b, b + 1024) for b in range(0, v.shape[0], 1024)):
        g, u = force[part], v[part].double()
        # (G + (axial - <v, G>) v) / nu. The length of v in <v, G> v is corrected for rounding:
        # |v|^2 is 1 - deficit exactly
        length = (1.0 - rows.deficit[part]) / u.square().sum(1, keepdim=True).clamp_min_(1e-30)
        outward = axial[part] - (g * u).sum(1, keepdim=True) * length
        g = g + u * outward
        g = torch.where((clamped[part] > 0) & (g.abs() > LONGEST), g * torch.inf, g)
        gradient[part] = g * factor_of_row[part]
    return SweepResult(energy, gradient)


def hessian_vector_product(request: SweepRequest, tangents: Tensor) -> Tensor:
    """Differentiate the gradient of `sweep` along `tangents` [T, k], in closed form, by tiles.

    With a dot for the derivative along the tangents t and tau_i = <v_i, t_i>:

        v.  = (t - v tau) / nu        c.  = <v_i., v_j> + <v_i, v_j.>
        G_i. = sum_j F''(c) c. v_j + F'(c) v_j.

    Returns:
        [T, k], float32, float64 for float64 points.
    """
    points, sizes, scales = request.points, request.sizes, request.scales
    pair, eps = request.pair, request.eps
    dtype = _tile_dtype(points, pair)
    rows = normalize(points, eps, dtype)
    v, inv_nu, deficit = rows
    tangents = tangents.to(dtype)
    tau = (v * tangents).sum(1, keepdim=True)
    v_dot = ((tangents - v * tau) * inv_nu).to(dtype)
    deficit_dot = -2.0 * deficit * tau * inv_nu
    both, swapped = torch.cat([v_dot, v], 1), torch.cat([v, v_dot], 1)
    # float64: what near pairs add may be beyond float32 where the product is not
    force = torch.zeros_like(v, dtype=torch.float64)
    force_dot = torch.zeros_like(force)
    axial, axial_dot = torch.zeros_like(deficit), torch.zeros_like(deficit)
    bound = near_below(pair, dtype)
    clean = pair.clean_above(bound)

    def masked_tile(tile: Tile) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = torch.bmm(rows_of(v, tile), cols_of(v, tile).mT)
        if not pair.half_space:
            x.mul_(-2.0).add_(2.0)
        return x, *mask_out(x, tile, pair, bound)

    def repair(tile: Tile, near: Tensor) -> None:
        for index in near_indices(near, tile, points.shape[1]):
            pairs = near_pairs(points, *index, eps)
            dot_i, deficit_dot_i = exact_dots(points, tangents, pairs.i, eps)
            dot_j, deficit_dot_j = exact_dots(points, tangents, pairs.j, eps)
            apart_dot = dot_i - pairs.side * dot_j
            stretch = (pairs.apart * apart_dot).sum(1, keepdim=True)
            c_dot = -pairs.side * (stretch + (deficit_dot_i + deficit_dot_j) / 2.0)
            _, slope, curve = pair.of_cosine(pairs.d2, pairs.far)
            slope.clamp_(-LONGEST, LONGEST)
            slope_dot = curve.clamp_(-LONGEST, LONGEST) * c_dot
            push_apart(force, pairs, slope * pairs.apart)
            push_apart(force_dot, pairs, slope_dot * pairs.apart + slope * apart_dot)
            add_to_both(axial, pairs, pairs.side * slope)
            add_to_both(axial_dot, pairs, pairs.side * slope_dot)

    repairs = Repairs(masked_tile, repair, points.device)
    for tile in symmetric_tiles(sizes, block_of(points)):
        x, left_out, near = masked_tile(tile)
        c_dot = torch.bmm(rows_of(both, tile), cols_of(swapped, tile).mT)
        d2, far = _both_squares(x, pair)
        _, slope, curve = pair.of_cosine(d2, far)
        closed = pair.closed_tile(x) if clean and pair.half_space else None
        if closed is not None:  # the other slope has lost digits, see `closed_tile`
            slope = closed[1].mul_(closed[2])
        slope_dot = curve * c_dot
        if left_out is not None:
            slope.masked_fill_(left_out, 0.0)
            slope_dot.masked_fill_(left_out, 0.0)
        rows_of(force, tile).add_(torch.bmm(slope, cols_of(v, tile)))
        part = torch.bmm(slope_dot, cols_of(v, tile)).baddbmm_(slope, cols_of(v_dot, tile))
        rows_of(force_dot, tile).add_(part)
        if not tile.diagonal:
            slope, slope_dot = slope.mT, slope_dot.mT
            cols_of(force, tile).add_(torch.bmm(slope, rows_of(v, tile)))
            part = torch.bmm(slope_dot, rows_of(v, tile)).baddbmm_(slope, rows_of(v_dot, tile))
            cols_of(force_dot, tile).add_(part)
        repairs.add(tile, near)
    repairs.finish()

    along = (v * force).sum(1, keepdim=True)
    along_dot = (v_dot * force).sum(1, keepdim=True) + (v * force_dot).sum(1, keepdim=True)
    outward = axial * deficit - along
    outward_dot = axial_dot * deficit + axial * deficit_dot - along_dot
    if pair.half_space:
        # each row with its own antipode, as in `sweep`: -slope deficit v, and c. = deficit.
        _, slope, curve = _antipodes(rows, pair)
        outward -= slope * deficit
        outward_dot -= (curve * deficit + slope) * deficit_dot
    gradient = force + v * outward
    product = force_dot + v_dot * outward + v * outward_dot - gradient * tau * inv_nu
    product.mul_(inv_nu * _scale_of_row(sizes, scales, pair, inv_nu))
    return product.to(result_dtype(points))


def _tile_dtype(points: Tensor, pair: PairFunction) -> torch.dtype:
    """Choose the dtype of the tiles: float64 also where the slope of both ends would cancel."""
    dtype = working_dtype(points)
    if not pair.half_space or dtype == torch.float64:
        return dtype
    short = (
        pair.clean_above(near_below(pair, dtype)) and pair.closed_tile(torch.zeros(())) is not None
    )
    return dtype if short else torch.float64


def _both_squares(x: Tensor, pair: PairFunction) -> tuple[Tensor, Tensor]:
    """Turn a tile into 2 - 2c and 2 + 2c."""
    if pair.half_space:
        return 2.0 - 2.0 * x, 2.0 + 2.0 * x
    return x, 4.0 - x


def _scale_of_row(
    sizes: Sequence[int], scales: Sequence[float], pair: PairFunction, like: Tensor
) -> Tensor:
    """Give each row the scale of its set, [T, 1]; the half space counts every pair twice."""
    return spread_over_rows(like.new_tensor(scales) * (2.0 if pair.half_space else 1.0), sizes)


def _antipodes(rows: Rows, pair: PairFunction) -> tuple[Tensor, Tensor, Tensor]:
    """Compute f, f', f'' of every row with its own antipode: c = -|v|^2 = deficit - 1."""
    far = 2.0 * rows.deficit
    return pair.one_sided(4.0 - far, far)
