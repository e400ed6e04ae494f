"""From the layers and projections of a model to the sets of one sweep."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comhe_ext.checks import check_count, quote
from comhe_ext.kernels.pair_functions import PairFunction
from comhe_ext.operators.energy import energy
from comhe_ext.operators.library import compute_dtype
from comhe_ext.operators.rows import pad, project
from comhe_ext.operators.sweep import SweepOptions
from comhe_ext.sampled.estimator import estimated_energies
from comhe_ext.sampled.fused import MOST_COLUMNS_OF_A_ROW
from comhe_ext.sampled.polynomials import DEGREE, uniform_polynomial
from comhe_ext.settings import Settings

# rows of so many columns each for one column: then moments of them cost little beside exact pairs
ROWS_OF_A_COLUMN = 2
# from so many rows on "auto" samples, where the compiled kernel does it in one pass, and elsewhere
ABOVE_IN_ONE_PASS, ABOVE = 192, 16_384
# blocks in a layer, and the rows of one: fewer in small layers, where their error is smaller
BLOCKS, FEWEST_SAMPLES, MOST_SAMPLES = 12, 64, 128


@dataclass(frozen=True)
class Part:
    """The neurons of a layer, and how they count.

    Args:
        rows: [V, N, d], V sets that do not meet each other.
        matrices: [C, k, d] that project them, or None for rows that are taken as they are.
        factor: of the mean energy of the sets.
        permutation: [sets, N] where the energy is to be sampled, uniform; None: it is exact.
        samples: rows of a block of what is sampled.
    """

    rows: Tensor
    matrices: Tensor | None = None
    factor: float = 1.0
    permutation: Tensor | None = None
    samples: int = 0

    @property
    def width(self) -> int:
        """Columns of the rows that are swept."""
        return self.rows.shape[2] if self.matrices is None else self.matrices.shape[1]

    @property
    def num_sets(self) -> int:
        return self.rows.shape[0] * (1 if self.matrices is None else self.matrices.shape[0])

    @property
    def tensors(self) -> list[Tensor]:
        return [self.rows] if self.matrices is None else [self.rows, self.matrices]


@dataclass(frozen=True)
class Partitions:
    """Which layers of a model are sampled, and from what blocks.

    Args:
        method: "exact", "sampled", or "auto" for sets of more than `above` rows.
        samples: rows of a block; None: a twelfth of the rows, from 64 to 128.
        above: see `method`; None: 192 in float32 on a processor, 16,384 elsewhere.
    """

    method: str = "exact"
    samples: int | None = None
    above: int | None = None

    @classmethod
    def checked(cls, method: str, samples: int | None, above: int | None) -> "Partitions":
        """Check what a user gave."""
        if method not in ("exact", "sampled", "auto"):
            raise ValueError(f"`method` must be 'exact', 'sampled' or 'auto', got {quote(method)}")
        samples = samples if samples is None else check_count("samples", samples, least=2)
        return cls(method, samples, above if above is None else check_count("above", above, 0))

    def samples_of(self, rows: int) -> int:
        """Tell how many rows a block has, of sets of so many."""
        if self.samples is not None:
            return self.samples
        return max(FEWEST_SAMPLES, min(rows // BLOCKS, MOST_SAMPLES))

    def takes(
        self, rows: int, width: int, pair: PairFunction, device: torch.device, dtype: torch.dtype
    ) -> bool:
        """Tell whether sets of so many rows and columns are sampled, where that may save time.

        One or two blocks save none, nor do the moments of rows as wide as they are many.
        """
        samples = self.samples_of(rows)
        least = 2 * samples
        if self.method == "auto":
            one_pass = device.type == "cpu" and dtype != torch.float64
            above = ABOVE_IN_ONE_PASS if one_pass else ABOVE
            least = max(least, above if self.above is None else self.above)
        if self.method == "exact" or rows <= least:
            return False
        return _degree(width, samples, pair) < 2 or rows > ROWS_OF_A_COLUMN * width

    def part(
        self,
        step: Tensor,
        stream: int,
        pair: PairFunction,
        rows: Tensor,
        matrices: Tensor | None,
        factor: float = 1.0,
    ) -> Part:
        """Make a part of the neurons of a layer.

        Args:
            step: holds the number of the step, at each of which the rows are partitioned anew.
            stream: a number of its own for each part of a step.
            pair: of the energy.
            rows, matrices, factor: see `Part`.
        """
        part = Part(rows, matrices, factor)
        if not self.takes(rows.shape[1], part.width, pair, rows.device, rows.dtype):
            return part
        permutation = torch.ops.comhe_ext.permutations(
            step, stream, part.num_sets, rows.shape[1], rows.device
        )
        samples = self.samples_of(rows.shape[1])
        return Part(rows, matrices, factor, permutation, samples)


def set_energies(rows: Tensor, options: SweepOptions) -> Tensor:
    """Energy of each set of `rows` [V, N, k] -> [V], or of the one set [N, k] -> []."""
    return energy([rows], [None], options)


def total_energy(parts: Sequence[Part], settings: Settings) -> Tensor:
    """Sum over at least one part of its factor times the mean energy of its sets -> [].

    Parts of one k, dtype and device share a sweep; rows without matrices join the one of projected
    rows if they have no more columns.
    """
    totals = [_sampled_energy(x, settings) for x in parts if x.permutation is not None]
    parts = [part for part in parts if part.permutation is None]
    places = [(part.rows.dtype, part.rows.device) for part in parts]
    projected = {
        place: part.width
        for place, part in zip(places, parts, strict=True)
        if part.matrices is not None
    }
    packs: dict[tuple[torch.dtype, torch.device, int], list[Part]] = {}
    for place, part in zip(places, parts, strict=True):
        width = part.width
        if part.matrices is None and width < projected.get(place, 0):
            width = projected[place]
        packs.setdefault((*place, width), []).append(part)

    for (*_, width), pack in packs.items():
        options = settings.options([x for part in pack for x in part.tensors], width)
        factors = [f for part in pack for f in [part.factor / part.num_sets] * part.num_sets]
        options = SweepOptions(
            options.pair, options.reduction, options.eps, options.backend, tuple(factors)
        )
        rows, matrices = [part.rows for part in pack], [part.matrices for part in pack]
        totals.append(energy(rows, matrices, options).sum())
    return add(totals)


def _sampled_energy(part: Part, settings: Settings) -> Tensor:
    """Estimate the factor times the mean energy of the sets of a part -> []."""
    assert part.permutation is not None
    options = settings.options(part.tensors, part.width)
    if part.matrices is None:
        sets = part.rows.to(compute_dtype(part.rows))
    else:
        sets = project(part.rows, part.matrices).flatten(0, 1)
    degree = _degree(part.width, part.samples, options.pair)
    polynomial = uniform_polynomial(options.pair, part.width, degree)
    energies = estimated_energies(sets, part.permutation, part.samples, polynomial, None, options)
    return part.factor * energies.mean()


def _degree(width: int, samples: int, pair: PairFunction) -> int:
    """Choose the degree of the polynomial of rows of so many columns, in blocks of `samples`.

    The cosines of wide rows are so small that the first degree is nearly all, and its moments cost
    nothing; in half space, where F is even, there is none.
    """
    return 1 if width > MOST_COLUMNS_OF_A_ROW * samples and not pair.half_space else DEGREE


def add(totals: Sequence[Tensor]) -> Tensor:
    """Sum of scalars, on the device of the first."""
    total = totals[0]
    for other in totals[1:]:
        total = total + other.to(total.device)
    return total


def stack_parts(parts: Sequence[Tensor]) -> Tensor:
    """Stack groups of columns [..., N, k_g] as [..., G, N, k], k the largest k_g."""
    width = max(part.shape[-1] for part in parts)
    return torch.stack([pad(part, width) for part in parts], -3)
