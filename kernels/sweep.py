"""What a backend is asked, and what it gives: one sweep over the pairs of many sets.

A backend is a module with

    OFFERS             what it can do beyond the energy of sets and its gradient
    unavailable()      why it cannot run here and the remedy, or None
    supports(pair)     whether it knows a pair function
    sweep(request)     -> SweepResult
    hessian_vector_product(request, tangents, gradient)   where it offers `second_order`
    sampled(request)   -> energies, gradient, where it offers `sampled`
    nearest(request)   -> index of the nearest other row of each row, where it offers `nearest`
    distance(request), distance_gradient(request, ...)    where it offers `distance`
    angle_difference(rows, projected, ...)   where it offers `angle_difference`

Backend "torch" offers all of them, and cross_hessian_vector_product besides, for every backend;
but not `sampled`, which `comhe_ext.sampled` composes of operators where a backend lacks it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .pair_functions import PairFunction


class Numbers(tuple[Any, ...]):
    """A tuple that is hashed once: a thousand sizes are the key of several caches at each call."""

    @classmethod
    def of(cls, values: Iterable[Any]) -> "Numbers":
        return values if isinstance(values, Numbers) else cls(values)

    @cached_property
    def largest(self) -> Any:
        return max(self)

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        return self._hash


class Projected(NamedTuple):
    """Rows that are still to be projected: weight by weight, matrix by matrix one set each.

    A backend that offers `projection` does it in the same go.
    """

    weights: Sequence[Tensor]  # [N, d] each, of any size and width, one dtype
    matrices: Sequence[Tensor | None]  # [C, k, d] each, of one k; None: rows of at most k columns


@dataclass(frozen=True)
class SweepRequest:
    """Sets of rows against themselves, or one set of rows against columns of its own.

    Rows against columns are a cross set. Its energy is scale * sum_i weight_i E_i, where
    E_i = sum_j F(c_ij) over the columns of another id: half space counts nothing twice there, and
    has no antipodal term.

    Args:
        source: packed rows [T, k], the sets one after another; or rows still to be projected.
        sizes: rows of each set.
        scales: the factor of each set's sum over unordered pairs, or of the cross set's sum.
        pair: the pair function.
        eps: added to the squared norms.
        gradient: whether the gradient in the rows is wanted.
        columns: [M, k], of the dtype of the rows, what they meet instead of each other, or None.
        row_ids, column_ids: int32 [N] and [M], both or neither; a pair of equal ids does not count.
        row_weights: float32 (float64 for float64 rows) [N], weight_i of a cross set; None: all 1.
        row_energies: whether the E_i of a cross set are wanted.
        columns_gradient: whether the gradient in the columns is wanted; None: as that in the rows.
    """

    source: Tensor | Projected
    sizes: Sequence[int]
    scales: Sequence[float]
    pair: PairFunction
    eps: float = 0.0
    gradient: bool = True
    columns: Tensor | None = None
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None
    row_weights: Tensor | None = None
    row_energies: bool = False
    columns_gradient: bool | None = None

    @property
    def wanted(self) -> tuple[bool, bool]:
        """Which gradients of a cross set are wanted, in the rows and in the columns."""
        of_columns = self.columns_gradient
        return self.gradient, self.gradient if of_columns is None else of_columns

    @property
    def points(self) -> Tensor:
        """The packed rows [T, k]."""
        assert isinstance(self.source, Tensor)
        return self.source


class SweepResult(NamedTuple):
    """Energy [B], gradient [T, k] and [M, k], row energies [N]; None: not wanted."""

    energy: Tensor
    gradient: Tensor | None = None
    columns_gradient: Tensor | None = None
    row_energies: Tensor | None = None


@dataclass(frozen=True)
class SampledRequest:
    """Sets of one size n, of which only rows of the same random part meet.

    Wanted are the energies of

        sum of p over all pairs + W (sum of F - p over the pairs within parts)

    and the gradients of these, where p(c) = coefficients[0] c + coefficients[1] c^2, and W is the
    number of all pairs over that of the pairs within parts.

    Args:
        points: float32 [S, n, k], of any strides.
        order: int64 [S, n], a permutation of the rows of each set. The parts are neighbours in it,
            as even as can be, the larger ones first.
        parts: how many, at most n / 2.
        coefficients: of the polynomial p.
        scale: of a set's sum over unordered pairs.
        pair, eps, gradient: as in `SweepRequest`.
    """

    points: Tensor
    order: Tensor
    parts: int
    coefficients: tuple[float, float]
    scale: float
    pair: PairFunction
    eps: float = 0.0
    gradient: bool = True


@dataclass(frozen=True)
class NearestRequest:
    """Which other row of its set, or which column, each row is nearest to.

    The nearest is the one of the largest cosine, in half space of the largest |cosine|, of rows
    normalized with `eps`; among equals the lowest index. Near pairs are told apart by the exact
    difference of the rows, as an energy tells them apart, and multiples of one row are equals. A
    row that meets nobody has index -1. What a row of NaN or infinity has, or meets, is undefined,
    but in range.

    Args:
        points: packed rows [T, k], the sets one after another.
        sizes: rows of each set.
        half_space: whether an antipode counts as the row itself.
        eps: added to the squared norms.
        columns, row_ids, column_ids: as in `SweepRequest`.
    """

    points: Tensor
    sizes: Sequence[int]
    half_space: bool = False
    eps: float = 0.0
    columns: Tensor | None = None
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None


@dataclass(frozen=True)
class DistanceRequest:
    """How far each row is from one other row of a set, or from one column.

    Args:
        rows: [N, k].
        columns: [M, k] of the dtype of the rows, or None: the others are the rows themselves.
        index: int64 [N], of the other row, or the column; -1: none, at an infinite distance.
        half_space: measure the distance from the nearer of the other row and its antipode.
        angular: in radians, not as a chord.
        eps: added to the squared norms.
    """

    rows: Tensor
    columns: Tensor | None
    index: Tensor
    half_space: bool = False
    angular: bool = False
    eps: float = 0.0


@dataclass(frozen=True)
class DifferenceRequest:
    """The arguments of `Backend.angle_difference`, by which a kernel is checked.

    Args:
        rows, projected: [M, N, d] and [M, N, k]; either may be one set, expanded.
        angle: whether angles are compared, not cosines.
        rows_gradient, projected_gradient: which of both are wanted.
    """

    rows: Tensor
    projected: Tensor
    angle: bool
    rows_gradient: bool
    projected_gradient: bool = True


Request = SweepRequest | NearestRequest | DifferenceRequest


class Offers(NamedTuple):
    """What a backend can do beyond the energy of sets and its gradient."""

    cross: bool = False  # rows against columns of their own
    nearest: bool = False  # the nearest of each row
    distance: bool = False  # the distance from it, and its gradient
    angle_difference: bool = False  # the sweep over two spaces at once
    projection: bool = False  # project and sweep in one go
    sampled: bool = False  # energies of rows that meet within random parts alone
    second_order: bool = False  # the derivative of the gradient along tangents
    float64: bool = False
    max_columns: int = 2**62  # of a row


class Backend(Protocol):
    """A module that sweeps."""

    OFFERS: Offers

    def unavailable(self) -> str | None: ...
    def supports(self, pair: PairFunction) -> bool: ...
    def sweep(self, request: SweepRequest) -> SweepResult: ...
    def hessian_vector_product(
        self, request: SweepRequest, tangents: Tensor, gradient: Tensor
    ) -> Tensor: ...

    def sampled(self, request: SampledRequest) -> tuple[Tensor, Tensor | None]:
        """Energies, float64 [S], and the gradient, float32 [S, n, k]."""
        ...

    def nearest(self, request: NearestRequest) -> Tensor:
        """Index within the set, or of the column, int64 [T]."""
        ...

    def distance(self, request: DistanceRequest) -> Tensor:
        """Distances [N], float32, float64 for float64 rows; 0 for multiples of one row."""
        ...

    def distance_gradient(
        self, request: DistanceRequest, weights: Tensor, rows_gradient: bool, columns_gradient: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of sum_i weight_i distance_i in the rows and the columns, in its dtype.

        Without columns that in the rows is of both ends. None for a gradient that is not wanted.
        Where a distance is 0 it has no direction: it adds nothing.
        """
        ...

    def angle_difference(
        self,
        rows: Tensor,
        projected: Tensor,
        angle: bool,
        rows_gradient: bool,
        projected_gradient: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See `kernels.portable.angle_loss.sweep`."""
        ...
