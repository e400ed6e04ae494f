"""The estimator: an unbiased energy of very many rows, from pairs within random blocks.

With any polynomial p of the cosine and any list of pairs,

    sum F = sum p                          over all pairs, by moments
          + sum (F - p)                    over the listed pairs
          + W sum (F - p)                  over the pairs in blocks that are not listed

where the blocks are a random partition of the rows, and W is the number of all pairs over that of
the pairs in blocks. The polynomial and the list have to be fixed before the partition is drawn;
what they are good for is the variance alone. All of it but the list is one call where a backend
offers that (fused.py), and made of differentiable operators elsewhere. The sweep within the blocks
is one of these: it raises at a third derivative, of the whole sum then.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comhe_ext.kernels.pair_functions import PairFunction
from comhe_ext.operators.distance import antipode_energies, squared_distances
from comhe_ext.operators.energy import energy
from comhe_ext.operators.rows import unit_rows
from comhe_ext.operators.sweep import SweepOptions
from comhe_ext.sampled.fused import fused_energies, offered
from comhe_ext.sampled.near_list import NearList
from comhe_ext.sampled.polynomials import Polynomial, pair_sums
from comhe_ext.sampled.recompute import recomputed

# rows, or pairs of them, that are computed in float64 at a time
CHUNK = 1 << 15


class Blocks(NamedTuple):
    """A partition of n rows into blocks as even as can be: the first `longer` have one row more."""

    number: int
    size: int
    longer: int

    @classmethod
    def of(cls, n: int, samples: int) -> "Blocks":
        """Cut n rows into blocks of about `samples`, of at least 2."""
        count = max(min(round(n / samples), n // 2), 1)
        return cls(count, n // count, n % count)

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


def permutations(sets: int, n: int, device: torch.device, generator: Any = None) -> Tensor:
    """Draw a uniform permutation of n rows for each of the sets, [S, n]."""
    drawn = [torch.randperm(n, generator=generator, device=device) for _ in range(sets)]
    return torch.stack(drawn) if drawn else torch.empty(0, n, dtype=torch.int64, device=device)


def select(rows: Tensor, index: Tensor) -> Tensor:
    """Select rows of each set, [S, n, k] and [S, m] or [m] -> [S, m, k].

    An embedding, because its backward adds in one order, whatever the threads and the device.
    """
    sets, n = rows.shape[:2]
    offsets = n * torch.arange(sets, device=rows.device)[:, None]
    return torch.nn.functional.embedding(index + offsets, rows.flatten(0, 1))


def estimated_energies(
    rows: Tensor,
    permutation: Tensor,
    samples: int,
    polynomial: Polynomial | None,
    listed: NearList | None,
    options: SweepOptions,
) -> Tensor:
    """Estimate the energies of sets of rows [S, n, k] -> [S].

    Args:
        rows: float32 or float64, of any length.
        permutation: [S, n] int64, uniform and independent of all else.
        samples: rows of a block; where they are all rows, the energy is exact.
        polynomial: see `polynomials`; None: without one.
        listed: pairs that are taken exactly, of every set the same, or None.
        options: of the energy, without factors.
    """
    sets, n = rows.shape[:2]
    if n < 2 or sets == 0 or Blocks.of(n, samples).number == 1:
        return energy([rows], [None], options)
    estimator = Estimator(rows, samples, polynomial, listed, options)
    return estimator.energies(permutation).to(rows.dtype)


class Estimator:
    """Estimates the energies of sets of rows [S, n, k] that are cut into at least two blocks.

    Args:
        rows, samples, polynomial, listed, options: see `estimated_energies`.
    """

    def __init__(
        self,
        rows: Tensor,
        samples: int,
        polynomial: Polynomial | None,
        listed: NearList | None,
        options: SweepOptions,
    ) -> None:
        self.rows, self.polynomial, self.options = rows, polynomial, options
        self.sets, self.n = rows.shape[:2]
        self.blocks = Blocks.of(self.n, samples)
        self.weight = (self.n * (self.n - 1) // 2) / self.blocks.pairs
        pair = options.pair
        # from a sum of F over unordered pairs to the energy
        self.scale = pair.scale(self.n, options.reduction) * (2.0 if pair.half_space else 1.0)
        self.fused = offered(rows, samples, polynomial, options)
        self.listed = listed if listed is not None and len(listed.i) else None
        self.residuals: Tensor | None = None
        if self.listed is not None:
            self.residuals = listed_residuals(rows, self.listed, polynomial, pair, options.eps)

    def energies(self, permutation: Tensor) -> Tensor:
        """Estimate the energies [S], in float64, from one partition, the permutation [S, n]."""
        if not self.fused:
            energies = self._composed(self.rows, permutation)
        else:
            energies = fused_energies(
                self.rows,
                permutation,
                self.blocks.number,
                self.polynomial,
                self.options,
                lambda rows: self._composed(rows, permutation),
            )
        if self.residuals is None:
            return energies
        return energies + self.scale * self._listed(self.residuals, permutation)

    def _composed(self, rows: Tensor, permutation: Tensor) -> Tensor:
        """Compute what `fused_energies` does, by differentiable operators."""
        blocks, sets = self.blocks, self.sets
        pair, eps, backend = self.options.pair, self.options.eps, self.options.backend
        # the moments do not mind the order: one copy of the unit rows is enough
        permuted = select(rows, permutation)
        parts = blocks.split(permuted)
        ordered = SweepOptions(pair, "sum", eps, backend)
        sums = energy(parts, [None] * len(parts), ordered).double() / 2.0
        total = blocks.per_set(sums.split([len(part) for part in parts]), sets)
        if pair.half_space:
            # the sweep has 2 F of a pair, and f of each row and its antipode, known exactly
            antipodes = _antipodes(rows, pair, eps)
            total = (total - antipodes) / 2.0
        total = self.weight * total
        if self.polynomial is not None:
            v = _unit(permuted, eps)
            within = [pair_sums(self.polynomial, part) for part in blocks.split(v)]
            everywhere = pair_sums(self.polynomial, v)
            total = total + everywhere - self.weight * blocks.per_set(within, sets)
        energies = self.scale * total
        if pair.half_space:
            energies = energies + pair.scale(self.n, self.options.reduction) * antipodes
        return energies

    def _listed(self, residuals: Tensor, permutation: Tensor) -> Tensor:
        """Sum F - p of the listed pairs [S, P], without what the blocks have of it."""
        assert self.listed is not None
        places = torch.arange(self.n, device=permutation.device).expand_as(permutation)
        number = self.blocks.number_of(permutation.scatter(1, permutation, places))
        together = number[:, self.listed.i] == number[:, self.listed.j]
        # an infinite residual stays infinite in the sum
        met = torch.where(together & residuals.isfinite(), residuals, 0.0)
        return residuals.sum(1) - self.weight * met.sum(1)


def _unit(rows: Tensor, eps: float) -> Tensor:
    """Normalize the rows of sets [S, n, k]."""

    def unit(some: Tensor) -> Tensor:
        return unit_rows(some, eps)

    parts = rows.split(max(CHUNK // rows.shape[0], 1), 1)
    return torch.cat([recomputed(unit, part) for part in parts], 1)


def listed_residuals(
    rows: Tensor, listed: NearList, polynomial: Polynomial | None, pair: PairFunction, eps: float
) -> Tensor:
    """Compute F - p of the listed pairs of each set [S, n, k] -> [S, P], float64, exactly."""
    # each chunk has a gradient as large as the rows: not too many of them
    step = max(CHUNK // rows.shape[0], rows.shape[1] // 8, 1)

    def residuals(rows: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near, far = squared_distances(select(rows, i), select(rows, j), pair.half_space, eps)
        value = _function_of_squares(near, far.detach(), pair)
        return value if polynomial is None else value - polynomial.at(1.0 - near / 2.0)

    chunks = zip(listed.i.split(step), listed.j.split(step), strict=True)
    return torch.cat([recomputed(partial(residuals, i=i, j=j), rows) for i, j in chunks], dim=1)


def _antipodes(rows: Tensor, pair: PairFunction, eps: float) -> Tensor:
    """Sum f of each row and its antipode over the rows of each set -> [S]."""

    def energies(some: Tensor) -> Tensor:
        return antipode_energies(some, pair, eps).sum(1)

    step = max(CHUNK // rows.shape[0], 1)
    return torch.stack([recomputed(energies, some) for some in rows.split(step, 1)]).sum(0)


def _function_of_squares(near: Tensor, far: Tensor, pair: PairFunction) -> Tensor:
    """F as a function of 2 - 2c, with its first two derivatives, 0 where there is no direction.

    A third one would come out as 0, but never does, see the top of this file.
    """
    at = near.detach()
    value, slope, curve = pair.of_cosine(at, far)
    # c = 1 - near / 2
    step = (at - near) / 2.0
    return value + step * (slope + step * (curve / 2.0))
