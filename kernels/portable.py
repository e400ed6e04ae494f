"""The pairwise sweep in plain torch: any device, any dtype, O(T k) memory.

    v_i = p_i / nu_i,  nu_i = sqrt(|p_i|^2 + eps),  c_ij = <v_i, v_j>
    S   = sum_{i<j} F(c_ij)                  (half space: 2 sum_{i<j} F(c_ij) + sum_i f(-|v_i|^2))
    dS/dp_i = (G_i - v_i <v_i, G_i>) / nu_i,  G_i = sum_j F'(c_ij) v_j

One matrix product gives a tile of r^2 = 2 - 2c, a few elementwise passes turn it into F and F',
two more products add it to G. Where 2 - 2c has lost its digits, the pair is taken out of the tile
and done again from the difference of the rows, in float64. In few dimensions, where close pairs
are common even among random rows, all of it is float64.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .pair_functions import PairFunction
from .sweep import Offers, SweepRequest, SweepResult
from .work_table import Tile, equal_runs, spread_over_rows, symmetric_tiles

# r^2 below which 2 - 2c (absolute error about 2e-7, in float64 4e-16) is not trusted; for half
# space and angles the same holds of 4 - r^2. Above the default min_distance of 1e-3, so that tiles
# need not know of it
CLOSE = {torch.float32: 2.0**-6, torch.float64: 2.0**-16}
# log2 of F' that a tile may hold: room is left for sums
RANGE_BITS = {torch.float32: 60, torch.float64: 900}
# r^2 below which two rows may be multiples of one row: far above the rounding of their norms, and
# so small that few others have to be looked at
MAYBE_MULTIPLES = 1e-18
# Relative difference of v_iq v_jr and v_ir v_jq for multiples: the roundings of unit rows in
# float64 leave less. Rows of float32 that are no multiples differ by 2^-48 at least, the last bit
# of a product
MULTIPLES = 2.0**-49
# F' and F'' of close pairs end here, with room for sums: infinity times 0 would be NaN. That is
# beyond all that float32 holds; in float64 a row of such a pair is infinite from LONGEST on
MOST, LONGEST = 2.0**1000, 2.0**900
# up to this k random rows come so close that float32 misses its 2e-6 in the gradient
FLOAT64_UP_TO = 15
# float64 elements per array of differences when close pairs are done again
CLOSE_CHUNK = 1 << 18


OFFERS = Offers(float64=True)


class Rows(NamedTuple):
    """Normalized rows; a dead row (norm below the smallest normal number) has v = 0, 1/nu = 0."""

    v: Tensor  # [T, k]
    inv_nu: Tensor  # [T, 1] float64
    deficit: Tensor  # [T, 1] float64, 1 - |v|^2, exactly


class ClosePairs(NamedTuple):
    """Pairs done again in float64: `apart` = v_i - side v_j, side = -1 where almost antipodal."""

    set: Tensor  # [P] number of the set
    i: Tensor  # [P] rows of the packed array
    j: Tensor
    side: Tensor  # [P, 1]
    apart: Tensor  # [P, k], along v_i where both are multiples of one row
    near: Tensor  # [P, 1]
    far: Tensor  # [P, 1]


def unavailable() -> str | None:
    """This backend needs nothing but torch."""
    return None


def _double(points: Tensor) -> Tensor:
    """A copy in float64, of subnormal numbers too.

    A processor may have been told to (`torch.set_flush_denormal`), and then it would read 0, or on
    some of torch's threads 0 and on the others not.
    """
    v = points.to(torch.float64, copy=True)
    if points.device.type != "cpu" or points.dtype not in (torch.float32, torch.bfloat16):
        return v
    bits = points.float().view(torch.int32)  # bfloat16 is the upper half of a float32
    mantissa = bits & 0x7FFFFFFF
    subnormal = (mantissa < 0x800000) & (mantissa > 0)
    if bool(subnormal.any()):
        size = mantissa.double() * 2.0**-149
        v = torch.where(subnormal, torch.where(bits < 0, -size, size), v)
    return v


def supports(pair: PairFunction) -> bool:
    """Every pair function is made of torch's operators."""
    return True


def normalize(points: Tensor, eps: float, dtype: torch.dtype) -> Rows:
    """Rows of any magnitude, normalized in float64; v as `dtype`."""
    v = _double(points)
    # divided by its largest entry first, a row of 1e-30 or 1e30 neither vanishes nor overflows
    largest = v.abs().amax(1, keepdim=True)
    largest = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    v.div_(largest)
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    root = torch.full_like(norm, math.sqrt(eps))
    nu = torch.hypot(norm * largest, root)
    # the least normal number of the dtype asked for, whatever it is computed in; NaN is not dead:
    # it has to reach the result
    dead = nu < torch.finfo(_result_dtype(points)).tiny
    v.div_(torch.hypot(norm, root / largest)).masked_fill_(dead, 0.0)
    inv_nu = nu.reciprocal().masked_fill_(dead, 0.0)
    deficit = (root * inv_nu).square().masked_fill_(dead, 1.0)
    return Rows(v.to(dtype), inv_nu, deficit)


def sweep(request: SweepRequest) -> SweepResult:
    """Scaled sum over the pairs of each set, and its gradient in the rows.

    Without the gradient the second and third product of each tile are left out.

    Returns:
        float32, float64 for float64 points.
    """
    points, sizes, scales = request.points, request.sizes, request.scales
    pair, eps = request.pair, request.eps
    dtype = _working_dtype(points)
    rows = normalize(points, eps, dtype)
    # [-2v, 2] [v, 1]^T: the product itself gives 2 - 2c, which saves a pass over every tile
    right = torch.nn.functional.pad(rows.v, (0, 1), value=1.0)
    left = -2.0 * right
    left[:, -1] = 2.0
    v = right[:, :-1]
    rows = rows._replace(v=v)
    energy = torch.zeros(len(sizes), dtype=torch.float64, device=points.device)
    # G: a sum over all rows, of which the projection takes most away; hence float64 between tiles
    pull = torch.zeros_like(v, dtype=torch.float64) if request.gradient else None
    radial = torch.zeros_like(rows.deficit)  # sum of the F' that close pairs owe to v_i itself
    cut_off = torch.zeros_like(rows.deficit)  # how many of them ended at MOST
    bound = _close_below(pair, dtype)
    clean = pair.clean_above(bound)

    for tile in symmetric_tiles(sizes, block_of(points)):
        near = torch.bmm(rows_of(left, tile), cols_of(right, tile).mT)
        left_out, close = _take_out(near, tile, pair, bound)
        closed = pair.closed_tile(near) if clean else None
        if closed is not None:
            value, slope, factor = closed
        else:
            (value, slope, _), factor = pair.of_cosine(near, 4.0 - near), 1.0
        if left_out is not None:
            value.masked_fill_(left_out, 0.0)
            slope.masked_fill_(left_out, 0.0)
        energy[tile.run.sets] += value.sum((1, 2)).double() * (0.5 if tile.diagonal else 1.0)
        if pull is not None:
            rows_of(pull, tile).add_(torch.bmm(slope, cols_of(v, tile)), alpha=factor)
            if not tile.diagonal:
                cols_of(pull, tile).add_(torch.bmm(slope.mT, rows_of(v, tile)), alpha=factor)
        if close is None:
            continue
        for index in close_indices(close, tile, points.shape[1]):
            pairs = close_pairs(points, *index, eps)
            exact_value, exact_slope, _ = pair.of_cosine(pairs.near, pairs.far)
            energy.index_put_((pairs.set,), exact_value.squeeze(1), accumulate=True)
            if pull is not None:
                _add_rows(cut_off, pairs, exact_slope.abs() > MOST)
                exact_slope.clamp_(-MOST, MOST)
                push_apart(pull, pairs, exact_slope * pairs.apart)
                _add_rows(radial, pairs, pairs.side * exact_slope)

    radial.mul_(rows.deficit)
    if pair.half_space:
        energy.mul_(2.0)
        value, slope, _ = _antipodes(rows, pair)
        for run in equal_runs(sizes):
            energy[run.sets] += run.view(value).sum((1, 2)).double()
        # pairs count twice, the antipodal one once: half of its slope here, doubled with the rest
        radial -= slope * rows.deficit
    energy.mul_(energy.new_tensor(scales))
    energy = energy.to(_result_dtype(points))
    if pull is None:
        return SweepResult(energy)
    del left
    gradient = torch.empty_like(pull, dtype=_result_dtype(points))
    factor_of_row = rows.inv_nu * _scale_of_row(sizes, scales, pair, rows.inv_nu)
    for part in (slice(b, b + 1024) for b in range(0, v.shape[0], 1024)):
        # tangent projection, (G + (radial - <v, G>) v) / nu, with v as long as it ought to be
        g, u = pull[part], v[part].double()
        length = (1.0 - rows.deficit[part]) / u.square().sum(1, keepdim=True).clamp_min_(1e-30)
        outward = radial[part] - (g * u).sum(1, keepdim=True) * length
        g = g + u * outward
        g = torch.where((cut_off[part] > 0) & (g.abs() > LONGEST), g * torch.inf, g)
        gradient[part] = g * factor_of_row[part]
    return SweepResult(energy, gradient)


def hessian_vector_product(request: SweepRequest, tangents: Tensor) -> Tensor:
    """Derivative of `sweep`'s gradient along `tangents` [T, k], in closed form, by the same tiles.

    With a dot for the derivative along the tangents t and tau_i = <v_i, t_i>:

        v.  = (t - v tau) / nu        c.  = <v_i., v_j> + <v_i, v_j.>
        G_i. = sum_j F''(c) c. v_j + F'(c) v_j.

    Returns:
        [T, k], float32, float64 for float64 points.
    """
    points, sizes, scales = request.points, request.sizes, request.scales
    pair, eps = request.pair, request.eps
    dtype = _working_dtype(points)
    rows = normalize(points, eps, dtype)
    v, inv_nu, deficit = rows
    tangents = tangents.to(dtype)
    tau = (v * tangents).sum(1, keepdim=True)
    v_dot = ((tangents - v * tau) * inv_nu).to(dtype)
    deficit_dot = -2.0 * deficit * tau * inv_nu
    both, swapped = torch.cat([v_dot, v], 1), torch.cat([v, v_dot], 1)
    # as in `sweep`: what close pairs add may be beyond float32 where the product is not
    pull = torch.zeros_like(v, dtype=torch.float64)
    pull_dot = torch.zeros_like(pull)
    radial, radial_dot = torch.zeros_like(deficit), torch.zeros_like(deficit)
    bound = _close_below(pair, dtype)

    for tile in symmetric_tiles(sizes, block_of(points)):
        near = torch.bmm(rows_of(v, tile), cols_of(v, tile).mT).mul_(-2.0).add_(2.0)
        c_dot = torch.bmm(rows_of(both, tile), cols_of(swapped, tile).mT)
        left_out, close = _take_out(near, tile, pair, bound)
        _, slope, curve = pair.of_cosine(near, 4.0 - near)
        slope_dot = curve * c_dot
        if left_out is not None:
            slope.masked_fill_(left_out, 0.0)
            slope_dot.masked_fill_(left_out, 0.0)
        rows_of(pull, tile).add_(torch.bmm(slope, cols_of(v, tile)))
        part = torch.bmm(slope_dot, cols_of(v, tile)).baddbmm_(slope, cols_of(v_dot, tile))
        rows_of(pull_dot, tile).add_(part)
        if not tile.diagonal:
            slope, slope_dot = slope.mT, slope_dot.mT
            cols_of(pull, tile).add_(torch.bmm(slope, rows_of(v, tile)))
            part = torch.bmm(slope_dot, rows_of(v, tile)).baddbmm_(slope, rows_of(v_dot, tile))
            cols_of(pull_dot, tile).add_(part)
        if close is None:
            continue
        for index in close_indices(close, tile, points.shape[1]):
            pairs = close_pairs(points, *index, eps)
            dot_i, deficit_dot_i = exact_dots(points, tangents, pairs.i, eps)
            dot_j, deficit_dot_j = exact_dots(points, tangents, pairs.j, eps)
            apart_dot = dot_i - pairs.side * dot_j
            stretch = (pairs.apart * apart_dot).sum(1, keepdim=True)
            exact_c_dot = -pairs.side * (stretch + (deficit_dot_i + deficit_dot_j) / 2.0)
            _, exact_slope, exact_curve = pair.of_cosine(pairs.near, pairs.far)
            exact_slope.clamp_(-LONGEST, LONGEST)
            exact_slope_dot = exact_curve.clamp_(-LONGEST, LONGEST) * exact_c_dot
            push_apart(pull, pairs, exact_slope * pairs.apart)
            push_apart(pull_dot, pairs, exact_slope_dot * pairs.apart + exact_slope * apart_dot)
            _add_rows(radial, pairs, pairs.side * exact_slope)
            _add_rows(radial_dot, pairs, pairs.side * exact_slope_dot)

    along = (v * pull).sum(1, keepdim=True)
    along_dot = (v_dot * pull).sum(1, keepdim=True) + (v * pull_dot).sum(1, keepdim=True)
    outward = radial * deficit - along
    outward_dot = radial_dot * deficit + radial * deficit_dot - along_dot
    if pair.half_space:
        # the antipodal pair's term, as in `sweep`: -slope deficit v, with c. = deficit.
        _, slope, curve = _antipodes(rows, pair)
        outward -= slope * deficit
        outward_dot -= (curve * deficit + slope) * deficit_dot
    gradient = pull + v * outward
    product = pull_dot + v_dot * outward + v * outward_dot - gradient * tau * inv_nu
    product.mul_(inv_nu * _scale_of_row(sizes, scales, pair, inv_nu))
    return product.to(_result_dtype(points))


def _working_dtype(points: Tensor) -> torch.dtype:
    few = points.shape[1] <= FLOAT64_UP_TO
    return torch.float64 if few or points.dtype == torch.float64 else torch.float32


def _result_dtype(points: Tensor) -> torch.dtype:
    return torch.float64 if points.dtype == torch.float64 else torch.float32


def block_of(points: Tensor) -> int:
    """Rows of a tile: one that a processor's cache holds, or one that fills an accelerator."""
    return 512 if points.device.type == "cpu" else 4096


def rows_of(x: Tensor, tile: Tile) -> Tensor:
    return tile.run.view(x)[:, tile.rows]


def cols_of(x: Tensor, tile: Tile) -> Tensor:
    return tile.run.view(x)[:, tile.cols]


def _scale_of_row(
    sizes: Sequence[int], scales: Sequence[float], pair: PairFunction, like: Tensor
) -> Tensor:
    """[T, 1]; the half space counts every pair of rows twice."""
    return spread_over_rows(like.new_tensor(scales) * (2.0 if pair.half_space else 1.0), sizes)


def _close_below(pair: PairFunction, dtype: torch.dtype) -> float:
    """r^2 below which a pair is done again; the exponent multiplies the error of r^2."""
    trusted = min(CLOSE[dtype] * max(pair.growth / 4.0, 1.0), 1.0)
    # F' is about r^-growth
    in_range = 2.0 ** (-2.0 * RANGE_BITS[dtype] / pair.growth) if pair.growth > 0 else 0.0
    return max(trusted, in_range)


def _take_out(
    near: Tensor, tile: Tile, pair: PairFunction, bound: float
) -> tuple[Tensor | None, Tensor | None]:
    """Mask of the tile's elements that do not count, and of those to be done again exactly.

    Both are overwritten by a harmless r^2 = 2, so what follows stays finite.
    """
    left_out = None
    if tile.diagonal:
        near.diagonal(dim1=1, dim2=2).fill_(2.0)
        left_out = torch.eye(near.shape[1], dtype=torch.bool, device=near.device).expand_as(near)
    two_ended = pair.two_ended
    lowest, highest = torch.aminmax(near)
    if not (bool(lowest < bound) or (two_ended and bool(highest > 4.0 - bound))):
        return left_out, None
    close = near < bound
    if two_ended:
        close |= near > 4.0 - bound
    near.masked_fill_(close, 2.0)
    left_out = close if left_out is None else close | left_out
    return left_out, close.triu(1) if tile.diagonal else close


def close_indices(close: Tensor, tile: Tile, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Set and the two packed rows of the pairs marked in a tile, a chunk of them at a time."""
    run = tile.run
    chunk = max(CLOSE_CHUNK // width, 1)
    for which, i, j in (part.unbind(1) for part in close.nonzero().split(chunk)):
        first = run.first_row + which * run.size
        yield run.first_set + which, first + tile.rows.start + i, first + tile.cols.start + j


def close_pairs(points: Tensor, set: Tensor, i: Tensor, j: Tensor, eps: float) -> ClosePairs:
    """Some pairs of packed rows, from the raw rows in float64."""
    rows_i, rows_j = _exact(points, i, eps), _exact(points, j, eps)
    side = torch.where((rows_i.v * rows_j.v).sum(1, keepdim=True) < 0, -1.0, 1.0)
    apart = rows_i.v - side * rows_j.v
    squared = apart.square().sum(1, keepdim=True)
    suspects = (squared < MAYBE_MULTIPLES).squeeze(1).nonzero().squeeze(1)
    if len(suspects):
        multiples = suspects[_multiples(rows_i.v[suspects], rows_j.v[suspects])]
        # |v_i| - |v_j|, where |v| is almost 1
        longer = (rows_j.deficit[multiples] - rows_i.deficit[multiples]) / 2.0
        apart[multiples] = longer * rows_i.v[multiples]
        squared[multiples] = longer.square()
    short = squared + rows_i.deficit + rows_j.deficit
    near = torch.where(side > 0, short, 4.0 - short)
    far = torch.where(side > 0, 4.0 - short, short)
    return ClosePairs(set, i, j, side, apart, near, far)


def _multiples(u: Tensor, v: Tensor) -> Tensor:
    """Whether two unit rows are one up to the sign and the rounding of either."""
    pivot = u.abs().argmax(1, keepdim=True)
    left, right = u * v.gather(1, pivot), v * u.gather(1, pivot)
    return ((left - right).abs() <= MULTIPLES * left.abs()).all(1)


def _exact(points: Tensor, index: Tensor, eps: float) -> Rows:
    return normalize(points[index], eps, torch.float64)


def exact_dots(
    points: Tensor, tangents: Tensor, index: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """v. and deficit. of some rows, in float64."""
    v, inv_nu, deficit = _exact(points, index, eps)
    t = tangents[index].double()
    tau = (v * t).sum(1, keepdim=True)
    return (t - v * tau) * inv_nu, -2.0 * deficit * tau * inv_nu


def push_apart(pull: Tensor, pairs: ClosePairs, push: Tensor) -> None:
    """Add F' v_j to G_i and F' v_i to G_j, but for their parts along v_i and v_j.

    v_j = side (v_i - apart): the part along v_i is large, and falls out in the projection but for
    its deficit, which `radial` keeps; what is left is the exact difference.
    """
    pull.index_put_((pairs.i,), (-pairs.side * push).to(pull.dtype), accumulate=True)
    pull.index_put_((pairs.j,), push.to(pull.dtype), accumulate=True)


def _add_rows(x: Tensor, pairs: ClosePairs, value: Tensor) -> None:
    """Add a pair's value to both its rows; index_put_ adds in a fixed order on every device."""
    x.index_put_((torch.cat([pairs.i, pairs.j]),), value.to(x.dtype).repeat(2, 1), accumulate=True)


def _antipodes(rows: Rows, pair: PairFunction) -> tuple[Tensor, Tensor, Tensor]:
    """f, f', f'' of every row with its own antipode: c = -|v|^2 = deficit - 1."""
    far = 2.0 * rows.deficit
    return pair.one_sided(4.0 - far, far)
