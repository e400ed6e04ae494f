"""What pairs add up to: the sums of F, the forces on rows, and their derivatives along tangents.

    v_i = p_i / nu_i,  nu_i = sqrt(|p_i|^2 + eps),  c_ij = <v_i, v_j>
    G_i = sum_j F'(c_ij) v_j                        the force on row i
    (G_i - v_i <v_i, G_i>) / nu_i                   the gradient of the sum of F(c_ij) in p_i

One matrix product gives a tile of d2 = 2 - 2c, in half space of c; a few elementwise passes turn it
into F and F', and two more products add F' v to the force G. Near pairs are left out of the tiles
and computed again in float64. In few dimensions, where near pairs are common even among random
rows, the tiles are float64 too.

Where row i of a tile has a weight a_i, its pairs count a_i times: its columns are pushed by a_i v_i
in place of v_i, and its own force is multiplied by a_i at the end. Columns have weight 1.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..pair_functions import PairFunction
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
from .rows import Rows, normalize, working_dtype
from .tiles import Tile, cols_of, rows_of

# F' and F'' of near pairs are clamped here, which leaves room for sums: an infinite one times 0
# would be NaN. The bound is beyond all that float32 holds; in float64, the gradient of a row with a
# clamped pair becomes infinite where it exceeds LONGEST
MOST, LONGEST = 2.0**1000, 2.0**900


class Pairing(NamedTuple):
    """Which pairs of packed rows count, and how often."""

    points: Tensor  # [T, k] raw rows
    tiles: Iterable[Tile]  # cover the pairs, each once, but for both orders on the diagonal
    ids: Tensor | None = None  # [T] a pair of equal ids does not count
    weights: Tensor | None = None  # [T, 1] float64, 1 for columns
    # whether the rows, and the columns, of tiles that are not on the diagonal are pushed
    pushed: tuple[bool, bool] = (True, True)


class Forces(NamedTuple):
    """What the pairs add up to; all but `rows` in float64."""

    rows: Rows
    sums: Tensor  # [T, 1] F of the pairs that have the row on the left, half on the diagonal
    force: Tensor | None  # [T, k] without what near pairs add along the row
    axial: Tensor  # [T, 1] that part: (1 - |v|^2) times the sum of side F' over near pairs
    clamped: Tensor  # [T, 1] how many pairs of the row were clamped to MOST


class ForcesDot(NamedTuple):
    """Forces, and their derivatives along the tangents; see `Forces`."""

    rows: Rows
    v_dot: Tensor
    tau: Tensor  # [T, 1] <v, tangent>
    sums_dot: Tensor
    force: Tensor
    force_dot: Tensor
    axial: Tensor
    axial_dot: Tensor


def forces(pairing: Pairing, pair: PairFunction, eps: float, gradient: bool) -> Forces:
    """Sum F and, for the gradient, the forces over all pairs."""
    points, tiles, ids, weights, (push_rows, push_columns) = pairing
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
    sums = torch.zeros_like(rows.deficit)
    # most of G lies along v_i and is projected away: hence float64 between tiles
    force = torch.zeros_like(v, dtype=torch.float64) if gradient else None
    axial, clamped = torch.zeros_like(sums), torch.zeros_like(sums)
    bound = near_below(pair, dtype)
    clean = pair.clean_above(bound)

    def weighted(tile: Tile) -> Tensor:
        some = rows_of(v, tile)
        return some if weights is None else (some * rows_of(weights, tile)).to(dtype)

    def masked_tile(tile: Tile) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = torch.bmm(rows_of(left, tile), cols_of(right, tile).mT)
        return x, *mask_out(x, tile, pair, bound, ids)

    def repair(tile: Tile, near: Tensor) -> None:
        for index in near_indices(near, tile, points.shape[1]):
            pairs = near_pairs(points, *index, eps)
            value, slope, _ = pair.of_cosine(pairs.d2, pairs.far)
            sums.index_put_((pairs.i,), value, accumulate=True)
            if force is not None:
                add_to_both(clamped, pairs, slope.abs() > MOST)
                slope.clamp_(-MOST, MOST)
                share = 1.0 if weights is None else weights[pairs.i]
                push, outward = slope * pairs.apart, pairs.side * slope
                push_apart(force, pairs, push, share * push)
                add_to_both(axial, pairs, outward, share * outward)

    repairs = Repairs(masked_tile, repair, points.device)
    for tile in tiles:
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
        part = value.sum(2, keepdim=True, dtype=dtype)
        rows_of(sums, tile).add_(part, alpha=0.5 if tile.diagonal else 1.0)
        if force is not None:
            if push_rows:
                rows_of(force, tile).add_(torch.bmm(slope, cols_of(v, tile)), alpha=factor)
            if push_columns and not tile.diagonal:
                part = torch.bmm(slope.mT, weighted(tile))
                cols_of(force, tile).add_(part, alpha=factor)
        repairs.add(tile, near)
    repairs.finish()

    axial.mul_(rows.deficit)
    if weights is not None and force is not None:
        force.mul_(weights)
        axial.mul_(weights)
    return Forces(rows, sums, force, axial, clamped)


def gradient_of(
    total: Forces, factor: Tensor, dtype: torch.dtype, part: slice = slice(None)
) -> Tensor:
    """Compute the gradient [T, k] in the rows, or a part of them, times `factor` [T, 1]."""
    assert total.force is not None
    v, inv_nu, deficit = (x[part] for x in total.rows)
    force, axial, clamped, factor = (
        x[part] for x in (total.force, total.axial, total.clamped, factor)
    )
    gradient = torch.empty_like(force, dtype=dtype)
    for part in (slice(b, b + 1024) for b in range(0, v.shape[0], 1024)):
        g, u = force[part], v[part].double()
        # (G + (axial - <v, G>) v) / nu. The length of v in <v, G> v is corrected for rounding:
        # |v|^2 is 1 - deficit exactly
        length = (1.0 - deficit[part]) / u.square().sum(1, keepdim=True).clamp_min_(1e-30)
        outward = axial[part] - (g * u).sum(1, keepdim=True) * length
        g = g + u * outward
        g = torch.where((clamped[part] > 0) & (g.abs() > LONGEST), g * torch.inf, g)
        gradient[part] = g * (inv_nu[part] * factor[part])
    return gradient


def forces_along(
    pairing: Pairing,
    pair: PairFunction,
    eps: float,
    tangents: Tensor,
    weight_tangents: Tensor | None = None,
    sums: bool = False,
) -> ForcesDot:
    """Differentiate the forces along `tangents` [T, k] of the raw rows, and [T, 1] of the weights.

    With a dot for the derivative along the tangents t and tau_i = <v_i, t_i>:

        v.  = (t - v tau) / nu        c.  = <v_i., v_j> + <v_i, v_j.>
        G_i. = sum_j F''(c) c. v_j + F'(c) v_j.

    Args:
        pairing: the pairs; with `weight_tangents`, weights of them.
        pair: the pair function.
        eps: added to the squared norms.
        tangents: of any dtype.
        weight_tangents: float64, 0 for columns; None: 0.
        sums: whether the derivatives of `Forces.sums` are wanted.
    """
    points, tiles, ids, weights, _ = pairing
    dtype = _tile_dtype(points, pair)
    rows = normalize(points, eps, dtype)
    v, inv_nu, deficit = rows
    tangents = tangents.to(dtype)
    tau = (v * tangents).sum(1, keepdim=True)
    v_dot = ((tangents - v * tau) * inv_nu).to(dtype)
    deficit_dot = -2.0 * deficit * tau * inv_nu
    both, swapped = torch.cat([v_dot, v], 1), torch.cat([v, v_dot], 1)
    weighted, weighted_dot = v, v_dot
    if weights is not None:
        weighted, weighted_dot = (v * weights).to(dtype), v_dot * weights
        if weight_tangents is not None:
            weighted_dot += v * weight_tangents
        weighted_dot = weighted_dot.to(dtype)
    # float64: what near pairs add may be beyond float32 where the product is not
    force = torch.zeros_like(v, dtype=torch.float64)
    force_dot = torch.zeros_like(force)
    axial, axial_dot, sums_dot = (torch.zeros_like(deficit) for _ in range(3))
    bound = near_below(pair, dtype)
    clean = pair.clean_above(bound)

    def masked_tile(tile: Tile) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = torch.bmm(rows_of(v, tile), cols_of(v, tile).mT)
        if not pair.half_space:
            x.mul_(-2.0).add_(2.0)
        return x, *mask_out(x, tile, pair, bound, ids)

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
            push, outward = slope * pairs.apart, pairs.side * slope
            push_dot = slope_dot * pairs.apart + slope * apart_dot
            outward_dot = pairs.side * slope_dot
            share = 1.0 if weights is None else weights[pairs.i]
            share_dot = 0.0 if weight_tangents is None else weight_tangents[pairs.i]
            push_apart(force, pairs, push, share * push)
            push_apart(force_dot, pairs, push_dot, share * push_dot + share_dot * push)
            add_to_both(axial, pairs, outward, share * outward)
            add_to_both(axial_dot, pairs, outward_dot, share * outward_dot + share_dot * outward)
            if sums:
                sums_dot.index_put_((pairs.i,), slope * c_dot, accumulate=True)

    repairs = Repairs(masked_tile, repair, points.device)
    for tile in tiles:
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
        if sums:
            part = (slope * c_dot).sum(2, keepdim=True)
            rows_of(sums_dot, tile).add_(part, alpha=0.5 if tile.diagonal else 1.0)
        rows_of(force, tile).add_(torch.bmm(slope, cols_of(v, tile)))
        part = torch.bmm(slope_dot, cols_of(v, tile)).baddbmm_(slope, cols_of(v_dot, tile))
        rows_of(force_dot, tile).add_(part)
        if not tile.diagonal:
            slope, slope_dot = slope.mT, slope_dot.mT
            u, u_dot = rows_of(weighted, tile), rows_of(weighted_dot, tile)
            cols_of(force, tile).add_(torch.bmm(slope, u))
            cols_of(force_dot, tile).add_(torch.bmm(slope_dot, u).baddbmm_(slope, u_dot))
        repairs.add(tile, near)
    repairs.finish()

    axial_dot.mul_(deficit).add_(axial * deficit_dot)
    axial.mul_(deficit)
    if weights is not None:
        force_dot.mul_(weights)
        axial_dot.mul_(weights)
        if weight_tangents is not None:
            force_dot.addcmul_(force, weight_tangents)
            axial_dot.addcmul_(axial, weight_tangents)
        force.mul_(weights)
        axial.mul_(weights)
    return ForcesDot(rows, v_dot, tau, sums_dot, force, force_dot, axial, axial_dot)


def gradient_along(total: ForcesDot, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Differentiate `gradient_of` along the tangents."""
    (v, inv_nu, _), v_dot, tau, _, force, force_dot, axial, axial_dot = total
    along = (v * force).sum(1, keepdim=True)
    along_dot = (v_dot * force).sum(1, keepdim=True) + (v * force_dot).sum(1, keepdim=True)
    outward, outward_dot = axial - along, axial_dot - along_dot
    gradient = force + v * outward
    product = force_dot + v_dot * outward + v * outward_dot - gradient * tau * inv_nu
    return product.mul_(inv_nu * factor).to(dtype)


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
