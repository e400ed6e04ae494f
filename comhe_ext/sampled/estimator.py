"""The estimator: an unbiased energy of very many rows, from pairs within random blocks.

With any polynomial p of the cosine and any list of pairs,

    sum F = sum p                          over all pairs, by moments
          + sum (F - p)                    over the listed pairs
          + W sum (F - p)                  over the pairs in blocks that are not listed

where the blocks are a random partition of the rows, and W is the number of all pairs over that of
the pairs in blocks. The polynomial and the list have to be fixed before the partition is drawn;
what they are good for is the variance alone. Everything is made of differentiable operators.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comhe_ext.kernels.pair_functions import PairFunction
from comhe_ext.operators.energy import energy
from comhe_ext.operators.nearest import antipode_energies, squared_distance
from comhe_ext.operators.rows import unit_rows
from comhe_ext.operators.sweep import SweepOptions
from comhe_ext.sampled.near_list import NearList
from comhe_ext.sampled.polynomials import at_cosine, pair_sums


class Blocks(NamedTuple):
    """A partition of n rows into blocks as even as can be: the first `longer` have one row more."""

    number: int
    size: int
    longer: int

    @classmethod
    def of(cls, n: int, samples: int) -> "Blocks":
        """Cut n rows into blocks of about `samples`, of at least 2."""
        count = max(min(round(n / samples), n // 2), 1)
        size, longer = divmod(n, count)
        return cls(count, size, longer)

    @property
    def pairs(self) -> int:
        """The number of pairs of rows in one block."""
        n, more = self.size, self.size + 1
        return (self.number - self.longer) * n * (n - 1) // 2 + self.longer * more * n // 2

    def split(self, rows: Tensor) -> list[Tensor]:
        """Split sets [S, n, k] into blocks, the longer ones first, as one or two tensors."""
        cut = self.longer * (self.size + 1)
        parts = []
        for part, size in ((rows[:, :cut], self.size + 1), (rows[:, cut:], self.size)):
            if part.shape[1]:
                parts.append(part.reshape(-1, size, rows.shape[2]))
        return parts

    def per_set(self, values: Sequence[Tensor], sets: int) -> Tensor:
        """Sum values of the blocks, as `split` lists them, over those of each set."""
        return torch.stack([x.view(sets, -1).sum(1) for x in values]).sum(0)

    def number_of(self, place: Tensor) -> Tensor:
        """Tell the number of the block that holds a place of the permutation."""
        cut = self.longer * (self.size + 1)
        late = self.longer + (place - cut) // self.size
        return torch.where(place < cut, place // (self.size + 1), late)


class _Permute(torch.autograd.Function):
    """rows[s, permutation[s, i]], whose derivative is the inverse, without a scatter."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, permutation: Tensor, inverse: Tensor) -> Tensor:
        return rows.gather(1, permutation.unsqueeze(-1).expand(-1, -1, rows.shape[2]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, permutation, inverse = inputs
        ctx.save_for_backward(permutation, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        permutation, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, permutation), None, None


def permutations(sets: int, n: int, device: torch.device, generator: Any = None) -> Tensor:
    """Draw a uniform permutation of n rows for each of the sets, [S, n]."""
    drawn = [torch.randperm(n, generator=generator, device=device) for _ in range(sets)]
    return torch.stack(drawn) if drawn else torch.empty(0, n, dtype=torch.int64, device=device)


def inverse_of(permutation: Tensor) -> Tensor:
    """Invert permutations [S, n]."""
    places = torch.arange(permutation.shape[1], device=permutation.device)
    return torch.empty_like(permutation).scatter_(1, permutation, places.expand_as(permutation))


def estimated_energies(
    rows: Tensor,
    permutation: Tensor,
    samples: int,
    coefficients: Sequence[float],
    listed: NearList | None,
    options: SweepOptions,
) -> Tensor:
    """Estimate the energies of sets of rows [S, n, k] -> [S].

    Args:
        rows: float32 or float64, of any length.
        permutation: [S, n] int64, uniform and independent of all else.
        samples: rows of a block; where they are all rows, the energy is exact.
        coefficients: of the polynomial, see `polynomials`.
        listed: pairs that are taken exactly, of every set the same, or None.
        options: of the energy, without factors.
    """
    n = rows.shape[1]
    if n < 2 or Blocks.of(n, samples).number == 1:
        return energy([rows], [None], options)
    estimator = Estimator(rows, samples, coefficients, listed, options)
    return estimator.energies(estimator.fixed() + estimator.sampled(permutation)).to(rows.dtype)


class Estimator:
    """The terms of the estimate for sets of rows [S, n, k], which are to be cut into blocks."""

    def __init__(
        self,
        rows: Tensor,
        samples: int,
        coefficients: Sequence[float],
        listed: NearList | None,
        options: SweepOptions,
    ) -> None:
        self.rows, self.coefficients, self.options = rows, coefficients, options
        self.sets, self.n = rows.shape[:2]
        self.blocks = Blocks.of(self.n, samples)
        self.weight = (self.n * (self.n - 1) // 2) / self.blocks.pairs
        pair, eps = options.pair, options.eps
        self.v = unit_rows(rows, eps) if any(coefficients) else None
        # f of each row and its antipode is known exactly
        self.antipodes = antipode_energies(rows, pair, eps).sum(1) if pair.half_space else None
        self.listed = listed if listed is not None and len(listed.i) else None
        self.residuals = None
        if self.listed is not None:
            self.residuals = listed_residuals(rows, self.listed, coefficients, pair, eps)

    def fixed(self) -> Tensor:
        """Sum what does not depend on the partition -> [S]."""
        total = self.rows.new_zeros(self.sets, dtype=torch.float64)
        if self.v is not None:
            total = total + pair_sums(self.coefficients, self.v)
        if self.residuals is not None:
            total = total + self.residuals.sum(1)
        return total

    def sampled(self, permutation: Tensor) -> Tensor:
        """Estimate the sum of F - p over the pairs that are not listed -> [S]."""
        blocks, inverse = self.blocks, inverse_of(permutation)
        parts = blocks.split(_Permute.apply(self.rows, permutation, inverse))
        pair, eps, backend = self.options.pair, self.options.eps, self.options.backend
        ordered = SweepOptions(pair, "sum", eps, backend)
        sums = energy(parts, [None] * len(parts), ordered).double() / 2.0
        total = blocks.per_set(sums.split([len(part) for part in parts]), self.sets)
        if self.antipodes is not None:
            # the sweep has 2 F of a pair, and the antipodes of all rows
            total = (total - self.antipodes) / 2.0
        if self.v is not None:
            parts = blocks.split(_Permute.apply(self.v, permutation, inverse))
            polynomial = [pair_sums(self.coefficients, part) for part in parts]
            total = total - blocks.per_set(polynomial, self.sets)
        if self.residuals is not None and self.listed is not None:
            places = inverse[:, self.listed.i], inverse[:, self.listed.j]
            together = blocks.number_of(places[0]) == blocks.number_of(places[1])
            total = total - (self.residuals * together).sum(1)
        return self.weight * total

    def energies(self, sums: Tensor) -> Tensor:
        """Turn sums of F over unordered pairs [S] into energies, in float64."""
        if self.antipodes is not None:
            sums = 2.0 * sums + self.antipodes
        return self.options.pair.scale(self.n, self.options.reduction) * sums


def listed_residuals(
    rows: Tensor, listed: NearList, coefficients: Sequence[float], pair: PairFunction, eps: float
) -> Tensor:
    """Compute F - p of the listed pairs of each set [S, n, k] -> [S, P], float64, exactly."""
    near = squared_distance(
        rows[:, listed.i], rows[:, listed.j], pair.half_space, eps
    )  # of a row and an antipode where they are nearer
    value = _function_of_square(near, pair)
    if not any(coefficients):
        return value
    return value - at_cosine(coefficients, 1.0 - near / 2.0)


def _function_of_square(near: Tensor, pair: PairFunction) -> Tensor:
    """F as a function of 2 - 2c, with its first two derivatives, 0 where there is no direction."""
    at = near.detach()
    value, slope, curve = pair.of_cosine(at, 4.0 - at)
    # c = 1 - near / 2
    step = (at - near) / 2.0
    return value + step * (slope + step * (curve / 2.0))
