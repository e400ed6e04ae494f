"""The public functions: checks, layout, and one call of the operator."""

import math
import operator
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from comhe_ext import angles, ops
from comhe_ext.ops import Options, quote

Reduction = Literal["mean", "sum"]
Backend = Literal["triton", "cpu", "torch"]
AngleKind = Literal["cosine", "angle"]


def hyperspherical_energy(
    weight: Tensor,
    s: float = 2.0,
    *,
    half_space: bool = False,
    angular: bool = False,
    reduction: Reduction = "mean",
    eps: float = 0.0,
    min_distance: float = 1e-3,
    backend: Backend | None = None,
) -> Tensor:
    """Compute how closely the rows of `weight` crowd on the sphere: the hyperspherical energy.

    Torch equivalent::

        r = torch.nn.functional.pdist(torch.nn.functional.normalize(weight))
        energy = (r**-s).mean()    # s = 0: -r.log().mean()

    with O(N d) memory and no N x N matrix, differentiable once and twice.

    Args:
        weight: [N, d], N neurons of d weights, or [B, N, d], B independent sets; float16, bfloat16,
            float32 or float64, any strides.
        s: exponent of the pair function r^-s, any finite s >= 0; 0 means log(1/r).
        half_space: energy of the 2N points {v_i} and {-v_i}, antipodal pairs included.
        angular: measure a pair by its angle in radians instead of the chord r.
        reduction: "mean" over the unordered pairs, or "sum" over the ordered ones (twice the
            unordered sum), as the papers write it.
        eps: added to the squared norms; the authors' code has 1e-4.
        min_distance: below it (in the unit of the distance) a pair's function continues along its
            tangent line, so near-duplicates are pushed apart with a finite force; 0 is the pure
            definition. At least 0, less than 2.
        backend: "triton", "cpu" or "torch"; None picks the best that works here.

    Returns:
        The energy, [] or [B], float32 (float64 for float64 weights). 0 where there is no pair.

    Raises:
        TypeError: `weight` is not a dense floating-point tensor, or an option has the wrong type.
        ValueError: a shape or an option is out of range.
        RuntimeError: the backend asked for cannot run here.

    Note:
        A row of zero norm is a dead neuron: orthogonal to all others, zero gradient (eps = 0).
        Exact duplicates add a finite energy and no gradient, for they have no direction to part
        in. The authors' s = 0 is -log r^2, twice this one; their angle is arccos(c)/pi + 1e-4.

    Source: Liu et al. (2018): MHE; half space is its HS-MHE, the angle its A-MHE.
    """
    _check_weight(weight)
    settings = Settings(s, half_space, angular, reduction, eps, min_distance, backend)
    options = settings.options((weight,))
    energies = set_energies([weight if weight.dim() == 3 else weight.unsqueeze(0)], options)
    return energies.view(weight.shape[:-2])


def compressive_energy(
    weight: Tensor,
    projection: Tensor,
    s: float = 2.0,
    *,
    half_space: bool = False,
    angular: bool = False,
    reduction: Reduction = "mean",
    eps: float = 0.0,
    min_distance: float = 1e-3,
    backend: Backend | None = None,
) -> Tensor:
    """Compute the mean energy of the rows of `weight` after each of several projections (CoMHE).

    Torch equivalent::

        energies = [hyperspherical_energy(weight @ p.T, s) for p in projection]
        energy = torch.stack(energies).mean(0)

    with one matrix product for all projections and one sweep over all projected rows.

    Args:
        weight: [N, d], or [B, N, d] for B independent sets; see `hyperspherical_energy`.
        projection: [C, k, d], C matrices P_c on the device of `weight`; see `random_projection`.
        s, half_space, angular, reduction, eps, min_distance, backend: see `hyperspherical_energy`.

    Returns:
        The energy, [] or [B], float32 (float64 if either argument is). Differentiable in both.

    Raises:
        TypeError, ValueError, RuntimeError: see `hyperspherical_energy`.

    Note:
        The projection is computed in float32 (float64 if either argument is), autocast or not.

    Source: Lin et al. (2020), RP-CoMHE.
    """
    _check_weight(weight)
    _check_projection(weight, projection)
    settings = Settings(s, half_space, angular, reduction, eps, min_distance, backend)
    options = settings.options((weight, projection), projection.shape[1])
    sets = weight if weight.dim() == 3 else weight.unsqueeze(0)
    energies = ops.projected_energy([sets], [projection], options)
    return energies.view(*weight.shape[:-2], projection.shape[0]).mean(-1)


def group_energy(
    weight: Tensor,
    groups: int | Sequence[Sequence[int] | Tensor],
    s: float = 2.0,
    *,
    half_space: bool = False,
    angular: bool = False,
    reduction: Reduction = "mean",
    eps: float = 0.0,
    min_distance: float = 1e-3,
    backend: Backend | None = None,
) -> Tensor:
    """Compute the mean over groups of coordinates of the energy of the sub-vectors (group CoMHE).

    Torch equivalent::

        energies = [hyperspherical_energy(part, s) for part in weight.tensor_split(groups, -1)]
        energy = torch.stack(energies).mean(0)

    Args:
        weight: [N, d], or [B, N, d] for B independent sets; see `hyperspherical_energy`.
        groups: how many groups of neighbouring coordinates, as even as they can be; or the
            coordinates of each group, which may overlap.
        s, half_space, angular, reduction, eps, min_distance, backend: see `hyperspherical_energy`.

    Returns:
        The energy, [] or [B], float32 (float64 for float64 weights).

    Raises:
        TypeError, ValueError, RuntimeError: see `hyperspherical_energy`.

    Source: Lin et al. (2020): projections that select coordinates.
    """
    _check_weight(weight)
    settings = Settings(s, half_space, angular, reduction, eps, min_distance, backend)
    parts = stack_parts(_split_columns(weight, groups))
    options = settings.options((weight,), parts.shape[-1])
    sets = parts if parts.dim() == 3 else parts.flatten(0, 1)
    return set_energies([sets], options).view(parts.shape[:-2]).mean(-1)


def angle_preserving_loss(
    weight: Tensor, projection: Tensor, *, kind: AngleKind = "cosine"
) -> Tensor:
    """Compute how far projections turn the rows of `weight` against each other.

    Torch equivalent::

        unit, projected = normalize(weight, dim=-1), normalize(weight @ p.T, dim=-1)
        loss = torch.linalg.norm(projected @ projected.T - unit @ unit.T)    # mean over p

    for kind "cosine", and the sum over i != j of (angle(w_i, w_j) - angle(P w_i, P w_j))^2, in
    radians, for kind "angle"; by tiles, O(N (d + k)) memory, differentiable once and twice.

    Args:
        weight: [N, d], or [B, N, d] for B independent sets; float16, bfloat16, float32 or float64.
        projection: [C, k, d], C matrices P_c on the device of `weight`.
        kind: "cosine" as in the authors' code, "angle" as in the paper.

    Returns:
        The mean over the C matrices, [] or [B], float32 (float64 if either argument is).

    Raises:
        TypeError: an argument is not a dense floating-point tensor.
        ValueError: a shape does not fit, or `kind` is unknown.

    Note:
        A dead row (zero norm) is orthogonal to all others in both spaces. Pairs that coincide or
        oppose each other have no direction to turn in: their angle adds no gradient.

    Source: Lin et al. (2020), AP-CoMHE.
    """
    _check_weight(weight)
    _check_projection(weight, projection)
    if kind not in ("cosine", "angle"):
        raise ValueError(f"`kind` must be 'cosine' or 'angle', got {quote(kind)}")
    sets = weight if weight.dim() == 3 else weight.unsqueeze(0)
    total = angle_differences(sets, projection, kind)
    if kind == "cosine":
        total = safe_sqrt(total)
    loss = total.mean(-1)
    return loss if weight.dim() == 3 else loss.squeeze(0)


# --- pieces that the regularizer shares -----------------------------------------------------------


class Settings(NamedTuple):
    """The keywords that all energies share."""

    s: float = 2.0
    half_space: bool = False
    angular: bool = False
    reduction: str = "mean"
    eps: float = 0.0
    min_distance: float = 1e-3
    backend: str | None = None

    def options(self, tensors: Sequence[Tensor], columns: int | None = None) -> Options:
        """The same, checked, with the backend chosen for what is computed from `tensors`.

        columns: of the rows that are swept; those of the first tensor if None.
        """
        backend = ops.choose_backend(
            self.backend,
            tensors[0].device,
            ops.compute_dtype(*tensors),
            tensors[0].shape[-1] if columns is None else columns,
        )
        options = Options(
            check_number("s", self.s),
            check_flag("half_space", self.half_space),
            check_flag("angular", self.angular),
            self.reduction,
            check_number("eps", self.eps),
            check_number("min_distance", self.min_distance),
            backend,
        )
        options.check()
        return options


def angle_differences(sets: Tensor, projection: Tensor, kind: str) -> Tensor:
    """Squared differences summed over ordered pairs, of sets [V, N, d] -> [V, C]."""
    rows = sets.to(ops.compute_dtype(sets, projection))
    projected = ops.project(sets, projection).unbind(1)
    totals = [angles.angle_difference(rows, points, kind == "angle") for points in projected]
    return torch.stack(totals, 1)


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root with zero derivatives at 0, where a distance has no direction."""
    zero = x == 0
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def stack_parts(parts: Sequence[Tensor]) -> Tensor:
    """Groups of columns [..., N, k_g] as [..., G, N, k], k the largest k_g."""
    width = max(part.shape[-1] for part in parts)
    return torch.stack([ops.pad(part, width) for part in parts], -3)


def set_energies(views: Sequence[Tensor], options: Options) -> Tensor:
    """Energy of each set of the `views` [V, N, k], of one k and any N, in one sweep -> [sum V]."""
    if len(views) == 1:
        return ops.energy(views[0].contiguous(), [], options)
    sizes = [rows.shape[1] for rows in views for _ in range(rows.shape[0])]
    return ops.energy(torch.cat([rows.flatten(0, 1) for rows in views]), sizes, options)


def total_energy(
    views: Sequence[Tensor],
    matrices: Sequence[Tensor | None],
    factors: Sequence[float],
    options_for: Callable[[Sequence[Tensor], int], Options],
) -> Tensor:
    """Sum over layers of a factor times the mean energy of its sets under its matrices -> [].

    Layers of one k, dtype and device share a sweep; rows without a matrix join the one of projected
    rows if they have no more columns.

    Args:
        views: [V, N, d] of each layer, at least one.
        matrices: [C, k, d], or None for rows that are to be taken as they are.
        factors: one a layer.
        options_for: the options for the tensors of a sweep, and the columns of its rows.
    """
    places = [(rows.dtype, rows.device) for rows in views]
    projected = {p: m.shape[1] for p, m in zip(places, matrices, strict=True) if m is not None}
    packs: dict[tuple[torch.dtype, torch.device, int], list[int]] = {}
    for index, (place, rows, projection) in enumerate(zip(places, views, matrices, strict=True)):
        width = rows.shape[-1] if projection is None else projection.shape[1]
        if projection is None and width < projected.get(place, 0):
            width = projected[place]
        packs.setdefault((*place, width), []).append(index)

    totals = []
    for (*_, width), pack in packs.items():
        weights, projections = [views[i] for i in pack], [matrices[i] for i in pack]
        per_set: list[float] = []
        for i, weight, projection in zip(pack, weights, projections, strict=True):
            count = weight.shape[0] * (1 if projection is None else projection.shape[0])
            per_set += [factors[i] / count] * count
        options = options_for([*weights, *(p for p in projections if p is not None)], width)
        options = options._replace(factors=per_set)
        if any(projection is not None for projection in projections):
            totals.append(ops.projected_energy(weights, projections, options).sum())
        else:
            totals.append(set_energies(weights, options).sum())
    return add(totals)


def add(totals: Sequence[Tensor]) -> Tensor:
    """Sum of scalars, on the device of the first."""
    total = totals[0]
    for other in totals[1:]:
        total = total + other.to(total.device)
    return total


# --- checks ---------------------------------------------------------------------------------------


def check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"`{name}` must be a plain tensor, got a DTensor, of which each rank holds a part: "
            f"pass {name}.full_tensor()"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"`{name}` must be a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in ops.DTYPES:
        raise TypeError(
            f"`{name}` must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
        )


def _check_weight(weight: Tensor) -> None:
    check_tensor("weight", weight)
    if weight.dim() not in (2, 3):
        raise ValueError(f"`weight` must be 2-D or 3-D, got shape {tuple(weight.shape)}")
    if weight.shape[-1] == 0:
        raise ValueError(f"`weight` must have at least one column, got shape {tuple(weight.shape)}")


def _check_projection(weight: Tensor, projection: Tensor) -> None:
    check_tensor("projection", projection)
    if projection.dim() != 3:
        raise ValueError(f"`projection` must be 3-D [C, k, d], got shape {tuple(projection.shape)}")
    count, dim, features = projection.shape
    if count == 0 or dim == 0:
        raise ValueError(
            "`projection` must hold at least one matrix of at least one row, "
            f"got shape {tuple(projection.shape)}"
        )
    if features != weight.shape[-1]:
        raise ValueError(
            f"`projection` must have as many columns as `weight`, got {features} and "
            f"{weight.shape[-1]}"
        )
    if projection.device != weight.device:
        raise ValueError(
            f"`projection` must be on the device of `weight`, got {projection.device} and "
            f"{weight.device}"
        )


def check_count(name: str, value: int, least: int = 1) -> int:
    """A whole number of at least `least` (symbolic under torch.compile), NumPy's too."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
        raise TypeError(f"`{name}` must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}")
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)


def check_number(name: str, value: float) -> float:
    """A real number, NumPy's too; a tensor is none, for no gradient would reach it."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}")
    return float(value)


def check_flag(name: str, value: bool) -> bool:
    """True or False, NumPy's too, which are known by name: NumPy may not be there."""
    kind = type(value)
    if kind is not bool and (kind.__module__, kind.__name__) not in _NUMPY_BOOLS:
        raise TypeError(f"`{name}` must be a bool, got {kind.__name__}")
    return bool(value)


_NUMPY_BOOLS = (("numpy", "bool"), ("numpy", "bool_"))


def check_factor(name: str, value: float) -> float:
    """A finite number of at least 0."""
    value = check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be finite and at least 0, got {value}")
    return value


def _split_columns(
    weight: Tensor, groups: int | Sequence[Sequence[int] | Tensor]
) -> Sequence[Tensor]:
    """The columns of each group."""
    features = weight.shape[-1]
    if isinstance(groups, (bool, str)) or not isinstance(groups, (int, Integral, Sequence)):
        raise TypeError(
            f"`groups` must be an int or a sequence of index sequences, got {type(groups).__name__}"
        )
    if not isinstance(groups, Sequence):
        if not 1 <= groups <= features:
            raise ValueError(
                f"`groups` must be between 1 and the {features} columns of `weight`, got {groups}"
            )
        return weight.tensor_split(check_count("groups", groups), -1)
    if len(groups) == 0:
        raise ValueError("`groups` must name at least one group, got none")
    parts = []
    for number, group in enumerate(groups):
        try:
            # on the host: a default device that is a GPU would be waited for at each call
            index = group if isinstance(group, Tensor) else torch.tensor(group, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"`groups[{number}]` must be a list of columns: {error}") from None
        integral = index.dtype not in (torch.bool, *ops.DTYPES)
        if index.dim() != 1 or index.numel() == 0 or not integral:
            raise ValueError(
                f"each of `groups` must be a non-empty list of columns, got {index.dtype} of shape "
                f"{tuple(index.shape)} for `groups[{number}]`"
            )
        lowest, highest = int(index.min()), int(index.max())
        if lowest < 0 or highest >= features:
            raise ValueError(
                f"`groups` must name columns from 0 to {features - 1} of `weight`, got "
                f"{lowest if lowest < 0 else highest} in `groups[{number}]`"
            )
        parts.append(weight.index_select(-1, index.to(weight.device)))
    return parts
