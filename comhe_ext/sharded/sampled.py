"""The energy of rows that are spread over ranks, estimated without bias from a sample of columns.

With any polynomial p of the cosine, any list of pairs, and m columns drawn from the N rows,

    sum F = sum p                                  over all pairs, by moments
          + N / 2m sum (F - p)                     over the pairs of a row and a drawn column
          + 1/2 sum (1 - N / m times) (F - p)      over the listed pairs, from either side, and how
                                                   many times its other row was drawn

where each rank computes the pairs of its own rows. The drawn rows and the listed ones are gathered;
the moments and the ranks' sums are added up in one all-reduce. As where all rows are gathered, half
of each pair is a rank's own, and so is the whole gradient in its rows. That is not the gradient of
the estimate, half of which would be in the few rows that were drawn, and be sent back to them. Both
have the same mean, the gradient of the energy; this one varies less.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from comhe_ext.operators.cross import cross_energy
from comhe_ext.operators.distance import antipode_energies
from comhe_ext.operators.library import compute_dtype, leave_trace
from comhe_ext.operators.rows import unit_rows
from comhe_ext.operators.sweep import SweepOptions
from comhe_ext.sampled.estimator import CHUNK, listed_residuals
from comhe_ext.sampled.keywords import Sampling
from comhe_ext.sampled.near_list import NearList
from comhe_ext.sampled.plan import SamplingPlan
from comhe_ext.sampled.polynomials import Polynomial, moments, uniform_polynomial
from comhe_ext.sampled.recompute import recomputed
from comhe_ext.sharded.collectives import AllRows, Group, Shards, exchange, total
from comhe_ext.sharded.energy import differentiable_once

# a seed is drawn below it, so that it fits into an int64
SEEDS = 2**62


class CommonSampling(NamedTuple):
    """How the energy of rows on several ranks is sampled, the same on all of them.

    Args:
        seed: of the draws.
        samples: how many columns are drawn for each set.
        plan: of the rows of all ranks, or None.
        as_planned: whether they are the rows that the plan was made from, see
            `sampled.keywords.sampled_energies`.
    """

    seed: int
    samples: int
    plan: SamplingPlan | None = None
    as_planned: bool = True

    def of_other_rows(self) -> "CommonSampling":
        """Sample other rows than the plan was made from, whose list belongs to them, too."""
        return CommonSampling(self.seed, self.samples, self.plan, as_planned=False)

    def on(self, device: torch.device) -> Sampling:
        """Sample rows that are all on each of the ranks, which then have the same blocks."""
        return Sampling(self.samples, self.plan, Generator(device).manual_seed(self.seed))


# --- what ranks agree on --------------------------------------------------------------------------


def proposal(sampling: Sampling | None) -> list[int]:
    """List the numbers that a rank tells the others: its seed, and what tells plans apart."""
    if sampling is None:
        return []
    _, plan, generator = sampling
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(SEEDS, (), generator=generator, device=device))
    looks = [sampling.samples]
    if plan is not None:
        i, j, _ = plan.listed
        bins = torch.arange(len(plan.cosines), dtype=plan.cosines.dtype, device="cpu")
        looks += [plan.degree, plan.num_rows, len(i), int(i.sum()), int((i * j).sum())]
        looks.append(int((plan.cosines * bins).sum()))
    return [seed, hash(tuple(looks))]


def agreed(sampling: Sampling | None, proposals: Sequence[Sequence[int]]) -> CommonSampling | None:
    """Take the seed of the first rank of a group.

    Raises:
        ValueError: on every rank, where they sample differently: they would wait for rows that
            others do not send.
    """
    if sampling is None:
        return None
    return _common(sampling, proposals[0][0], len({looks for _, looks in proposals}) == 1)


def agreed_over(
    sampling: Sampling | None, groups: Sequence[Group], device: torch.device
) -> CommonSampling | None:
    """Agree over all dimensions of a mesh, also those along which ranks have the same rows."""
    if sampling is None:
        return None
    (seed, looks), alike = proposal(sampling), True
    for group in groups:
        told = exchange([seed, looks, int(alike)], group, device)
        seed = told[0][0]
        alike = all(one[1:] == [looks, 1] for one in told)
    return _common(sampling, seed, alike)


def _common(sampling: Sampling, seed: int, alike: bool) -> CommonSampling:
    if not alike:
        raise ValueError(
            "`samples` and `plan` must be the same on all ranks: "
            "`comhe_ext.distributed.sampling_plan` makes such a plan"
        )
    return CommonSampling(seed, sampling.samples, sampling.plan)


def draw(seed: int, sets: int, samples: int, rows: int) -> Tensor:
    """Draw columns for each set, one from each of as many even parts of the rows -> [V, m].

    Ascending, int64, on the host. Each row is met as often as any other, in the mean; where a part
    ends within a row, that may be drawn twice.
    """
    generator = Generator("cpu").manual_seed(seed)
    within = torch.randint(rows, (sets, samples), generator=generator, device="cpu")
    return (torch.arange(samples, device="cpu") * rows + within) // samples


# --- the estimate ---------------------------------------------------------------------------------


def sampled_energies(
    points: Tensor,
    shards: Shards,
    sampling: CommonSampling,
    options: SweepOptions,
) -> Tensor:
    """Estimate the energies [V] of the whole from the rows [V, n, k] of this rank.

    The same on all ranks; differentiable once. `sampling` draws fewer columns than there are rows.
    """
    plan, count = sampling.plan, shards.total
    listed: NearList | None = None
    if plan is not None:
        plan.check(torch.empty(count, 0, device="meta"))
        listed = plan.on(points.device)
    if plan is not None and sampling.as_planned:
        polynomial = plan.polynomial(options.pair)
    else:
        polynomial = uniform_polynomial(options.pair, points.shape[2])
    drawn = draw(sampling.seed, points.shape[0], sampling.samples, count)
    return estimated_energies(points, shards, drawn, polynomial, listed, options)


def estimated_energies(
    points: Tensor,
    shards: Shards,
    drawn: Tensor,
    polynomial: Polynomial | None,
    listed: NearList | None,
    options: SweepOptions,
) -> Tensor:
    """Estimate energies as `sampled_energies` does.

    Args:
        points: [V, n, k], the rows of this rank.
        shards: who has which rows.
        drawn: [V, m] int64, on the host, ascending: the columns of each set. Any row has to be
            drawn m / N times in the mean, independently of all else.
        polynomial: see `sampled.polynomials`, the same on all ranks; None: without one.
        listed: pairs of rows of the whole, the same on all ranks, or None.
        options: of the energy, without factors; its reduction is that of the whole.
    """
    leave_trace()
    pair, eps = options.pair, options.eps
    times = shards.total / drawn.shape[1]
    drawn_rows = _DrawnRows(points, shards, drawn)
    listed_rows = None
    if listed is not None and len(listed.i):
        listed_rows = _ListedRows(points, shards, listed)
    # what follows is computed while both are under way
    dtype = compute_dtype(points)
    points = differentiable_once(points).to(dtype)
    parts: list[Tensor] = []
    own: Tensor | float = 0.0
    if pair.half_space:
        own = _by_rows(lambda some: antipode_energies(some, pair, eps), points).sum(1) / 2.0
    v = None
    if polynomial is not None:
        v = _by_rows(lambda some: unit_rows(some, eps), points)
        parts = _moments(polynomial, v)
        own = own - polynomial.at(v.square().sum(-1).double()).sum(1) / 2.0

    columns = drawn_rows.wait().to(dtype)
    pairs = _pairs_with(columns, points, drawn, shards, options)
    if polynomial is not None and v is not None:
        of_columns = _moments(polynomial, unit_rows(columns, eps))
        met = _weighted(polynomial, parts, of_columns)
        pairs = pairs - (met - drawn_rows.with_themselves(polynomial, v))
    pairs = times * pairs
    if listed_rows is not None:
        residuals, counts = listed_rows.residuals(points, drawn, polynomial, pair, eps)
        # an infinite residual stays infinite in the sum
        left = torch.where(residuals.isfinite(), 1.0 - times * counts.double(), 1.0)
        pairs = pairs + (left * residuals).sum(1)

    part = _OwnHalf.apply(pairs) + own
    sums = total(torch.cat([*parts, part[:, None]], 1), shards.groups)
    *whole, sums = sums.split([*[x.shape[1] for x in parts], 1], 1)
    energies = sums.squeeze(1)
    if polynomial is not None:
        energies = energies + _weighted(polynomial, whole, whole) / 2.0
    scale = pair.scale(shards.total, options.reduction) * (2.0 if pair.half_space else 1.0)
    return (scale * energies).to(dtype)


class _OwnHalf(torch.autograd.Function):
    """Half of the pairs of this rank's rows, the other half is others'; all of their gradient."""

    @staticmethod
    def forward(ctx: Any, pairs: Tensor) -> Tensor:
        return pairs / 2.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _pairs_with(
    columns: Tensor, points: Tensor, drawn: Tensor, shards: Shards, options: SweepOptions
) -> Tensor:
    """Sum F over the pairs of this rank's rows and the drawn columns -> [V], float64."""
    sets, n = points.shape[:2]
    numbers = torch.arange(n, dtype=torch.int32, device=points.device) + shards.first
    row_ids, column_ids = numbers.expand(sets, n), drawn.to(points.device, torch.int32)
    # of a mean: a sum of very many pairs might not fit into float32
    mean = SweepOptions(options.pair, "mean", options.eps, options.backend)
    energies = cross_energy(points, columns, row_ids, column_ids, mean)
    # F is of two pairs of points in half space
    count = n * columns.shape[1] * (2 if options.pair.half_space else 1)
    return count * energies.double()


class _DrawnRows:
    """The columns that were drawn, on their way."""

    def __init__(self, points: Tensor, shards: Shards, drawn: Tensor) -> None:
        (self._sets, n, self._width), samples = points.shape, drawn.shape[1]
        numbers, order = drawn.flatten().sort(stable=True)
        ends = torch.tensor([shards.first, shards.first + n], device="cpu")
        begin, end = torch.searchsorted(numbers, ends).tolist()
        # set and row of those that are on this rank
        self._set = (order[begin:end] // samples).to(points.device)
        self._place = self._set * n + (numbers[begin:end] - shards.first).to(points.device)
        self._order = order.to(points.device)
        rows = points.detach().flatten(0, 1)[self._place]
        self._rows = AllRows(rows.unsqueeze(0), shards.of_numbers(numbers))

    def wait(self) -> Tensor:
        """Return them as [V, m, k]."""
        rows = self._rows.wait().squeeze(0)
        return (
            torch.empty_like(rows).index_copy_(0, self._order, rows).unflatten(0, (self._sets, -1))
        )

    def with_themselves(self, polynomial: Polynomial, v: Tensor) -> Tensor:
        """Sum p over the pairs of a column of this rank, of unit rows `v`, with itself -> [V]."""
        # an embedding, because its backward adds in one order, whatever the device
        rows = torch.nn.functional.embedding(self._place, v.flatten(0, 1))
        values = polynomial.at((rows * rows.detach()).sum(-1).double())
        sets = torch.arange(self._sets, device=v.device)
        return torch.where(self._set == sets[:, None], values, 0.0).sum(1)


class _ListedRows:
    """The rows of listed pairs, on their way, and the pairs of which this rank has the first."""

    def __init__(self, points: Tensor, shards: Shards, listed: NearList) -> None:
        n, first = points.shape[1], shards.first
        i, j = torch.cat([listed.i, listed.j]), torch.cat([listed.j, listed.i])
        here = (i >= first) & (i < first + n)
        self._i, self._j = i[here] - first, j[here]
        self._numbers = i.unique()
        own = self._numbers[(self._numbers >= first) & (self._numbers < first + n)] - first
        self._rows = AllRows(points.detach()[:, own], shards.of_numbers(self._numbers))

    def residuals(
        self,
        points: Tensor,
        drawn: Tensor,
        polynomial: Polynomial | None,
        pair: Any,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Compute F - p of these pairs, and how often the other row was drawn, [V, P] both."""
        others = self._rows.wait().to(points.dtype)
        places = points.shape[1] + torch.searchsorted(self._numbers, self._j)
        pairs = NearList(self._i, places, self._i)
        rows = torch.cat([points, others], 1)
        drawn = drawn.to(points.device)
        j = self._j.expand(drawn.shape[0], -1).contiguous()
        counts = torch.searchsorted(drawn, j, right=True) - torch.searchsorted(drawn, j)
        return listed_residuals(rows, pairs, polynomial, pair, eps), counts


def _by_rows(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Compute something of each row, of so many at a time that few of the steps are in memory."""
    parts = rows.split(max(CHUNK // max(rows.shape[0], 1), 1), 1)
    return torch.cat([recomputed(function, part) for part in parts], 1)


def _moments(polynomial: Polynomial, v: Tensor) -> list[Tensor]:
    """List the moments [V, L] of unit rows for each power, each number once."""
    if v.shape[1] == 0:
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))  # a row of zeros adds nothing
    found = [(power, moments(v, power)) for power in polynomial.powers]
    return [x.flatten(1) if power % 2 else packed(x) for power, x in found]


def packed(symmetric: Tensor) -> Tensor:
    """Take each number of symmetric matrices [V, a, a] once -> [V, a (a + 1) / 2].

    Such that products of what is taken are those of the matrices.
    """
    i, j = torch.triu_indices(*symmetric.shape[1:], device=symmetric.device)
    twice = (1.0 + (i != j).to(symmetric.dtype)).sqrt()
    return symmetric[:, i, j] * twice


def _weighted(polynomial: Polynomial, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Sum p over the pairs of two sets of rows, from their moments -> [V]."""
    terms = [
        coefficient * (x * y).sum(1)
        for coefficient, x, y in zip(polynomial.coefficients, left, right, strict=True)
    ]
    return torch.stack(terms).sum(0)
