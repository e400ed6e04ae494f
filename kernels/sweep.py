"""What a backend is asked, and what it gives: one sweep over the pairs of many sets.

A backend is a module with

    OFFERS             what it can do beyond the energy of sets and its gradient
    unavailable()      why it cannot run here and the remedy, or None
    supports(pair)     whether it knows a pair function
    sweep(request)     -> SweepResult
    hessian_vector_product(request, tangents, gradient)   where it offers `second_order`
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
    """Sets of rows, against themselves or against columns of their own.

    Args:
        source: packed rows [T, k], the sets one after another; or rows still to be projected.
        sizes: rows of each set.
        scales: the factor of each set's sum over unordered pairs.
        pair: the pair function.
        eps: added to the squared norms.
        gradient: whether the gradient in the rows is wanted, and in the columns.
        columns: [M, k] what the rows of a single set meet instead of each other, or None.
        row_ids, column_ids: int32 [N] and [M]; a pair of equal ids does not count.
        nearest: whether the largest cosine of each row and its index are wanted.
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
    nearest: bool = False

    @property
    def points(self) -> Tensor:
        """The packed rows [T, k]."""
        assert isinstance(self.source, Tensor)
        return self.source


class SweepResult(NamedTuple):
    """Energy [B], gradient [T, k] and [M, k], largest cosine [T] and index; None: not wanted."""

    energy: Tensor
    gradient: Tensor | None = None
    columns_gradient: Tensor | None = None
    nearest: Tensor | None = None
    nearest_index: Tensor | None = None


class Offers(NamedTuple):
    """What a backend can do beyond the energy of sets and its gradient."""

    columns: bool = False  # rows against columns of their own
    nearest: bool = False  # the largest cosine of each row
    projection: bool = False  # project and sweep in one go
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
