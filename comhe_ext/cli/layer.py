"""The numbers of one layer: its energies, its nearest rows, its dead and double ones."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import comhe_ext
from comhe_ext import bounds
from comhe_ext.kernels.pair_functions import Riesz

BLOCK = 1 << 21  # numbers that are looked at together, in float64
# distance of unit rows up to which they point the same way: a few roundings of float32
SAME = 2.0**-22


class Energy(NamedTuple):
    """A mean over pairs, and what to hold it against."""

    value: float
    error: float  # the standard error of an estimate; 0: the value is exact
    random: float  # expected of as many independent random directions
    lowest: float  # a bound that no directions undercut


class Nearest(NamedTuple):
    """The two rows at the smallest angle."""

    row: int
    other: int
    degrees: float


@dataclass(frozen=True)
class LayerReport:
    """What is told of a layer. Rows of NaN or infinity are counted, and left out of the rest."""

    checkpoint: str
    name: str
    dtype: str
    rows: int
    columns: int
    energy: Energy | None  # None: fewer than two rows are left
    half_space: Energy | None
    nearest: Nearest | None  # None: fewer than two live rows are left, or very many
    dead_rows: int
    duplicates: int  # rows that point where another row does, but for one of each such group
    nonfinite_rows: int

    def record(self) -> dict[str, object]:
        """Give the report as JSON has it."""
        record: dict[str, object] = {
            "checkpoint": self.checkpoint,
            "name": self.name,
            "dtype": self.dtype,
            "rows": self.rows,
            "columns": self.columns,
        }
        for prefix, energy in (("", self.energy), ("half_space_", self.half_space)):
            for key, number in zip(
                ("energy", "energy_error", "random_energy", "lowest_energy"),
                energy or (None,) * 4,
                strict=True,
            ):
                # JSON has no infinity
                finite = number is not None and math.isfinite(number)
                record[prefix + key] = number if finite else None
        near = self.nearest
        record["nearest"] = near and {"rows": [near.row, near.other], "degrees": near.degrees}
        record["dead_rows"] = self.dead_rows
        record["duplicates"] = self.duplicates
        record["nonfinite_rows"] = self.nonfinite_rows
        return record


@torch.no_grad()
def measure(
    checkpoint: str, name: str, rows: Tensor, *, s: float, sampled_above: int, device: torch.device
) -> LayerReport:
    """Measure a layer [N, d] of floating-point numbers.

    Args:
        checkpoint, name: what the report calls it.
        rows: the weight.
        s: exponent of the Riesz energy.
        sampled_above: rows above which energies are estimated, and the nearest not looked for.
        device: where to compute.
    """
    n, d = rows.shape
    look = _look(rows)
    alive = int(look.alive.sum())
    finite = alive + int(look.dead.sum())
    dead = finite - alive
    kept = (rows if finite == n else rows[look.alive | look.dead]).to(device)
    nearest = None
    if 2 <= alive <= sampled_above:
        # a dead row has no direction to be near to
        nearest = _nearest(kept if alive == finite else rows[look.alive].to(device), look.alive)
    return LayerReport(
        checkpoint,
        name,
        str(rows.dtype).removeprefix("torch."),
        n,
        d,
        _energy(kept, Riesz(s), dead, sampled_above),
        _energy(kept, Riesz(s, half_space=True), dead, sampled_above),
        nearest,
        dead,
        _duplicates(rows, look),
        n - finite,
    )


def _energy(rows: Tensor, pair: Riesz, dead: int, sampled_above: int) -> Energy | None:
    """Compute the energy of finite rows, so many of them zero, or estimate it."""
    n, d = rows.shape
    if n < 2:
        return None
    if n <= sampled_above:
        value, error = float(comhe_ext.pair_energy(rows, pair=pair)), 0.0
    else:
        from comhe_ext.sampled import estimate_energy  # type: ignore[import-not-found,unused-ignore]

        # the same checkpoint has the same numbers at each call
        generator = torch.Generator(rows.device).manual_seed(0)
        estimate = estimate_energy(rows, pair, generator=generator)
        value, error = estimate.energy, estimate.std_error
    return Energy(
        value,
        error,
        bounds.random_energy(n, d, pair),
        bounds.lowest_energy(n, d, pair, dead=dead),
    )


def _nearest(rows: Tensor, alive: Tensor) -> Nearest:
    """Find the nearest two of live rows, by their numbers among all rows."""
    angles, others = comhe_ext.nearest(rows, angular=True)
    row = int(angles.argmin())
    numbers = alive.nonzero()[:, 0]
    first, second = sorted((int(numbers[row]), int(numbers[int(others[row])])))
    return Nearest(first, second, math.degrees(float(angles[row])))


class _Look(NamedTuple):
    """What one passage over the rows tells of each: [N]."""

    alive: Tensor  # finite, and not zero
    dead: Tensor
    place: Tensor  # of the unit row along one random direction, float64


def _look(rows: Tensor) -> _Look:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64)
    alive, dead, place = [], [], []
    for block in rows.split(_rows_of_block(rows)):
        unit = _unit(block)
        finite, zero = block.isfinite().all(1), (block == 0).all(1)
        alive.append(finite & ~zero)
        dead.append(zero)
        place.append(unit @ direction)
    return _Look(torch.cat(alive), torch.cat(dead), torch.cat(place))


def _duplicates(rows: Tensor, look: _Look) -> int:
    """Count the rows that point where another row does, but for one of each such group.

    Rows of one direction are neighbours in the order of their places along any direction, so only
    neighbours are compared: O(N d) time.
    """
    numbers = look.alive.nonzero()[:, 0]
    place, order = look.place[numbers].sort(stable=True)
    length = math.sqrt(rows.shape[1])  # of the random direction, about
    at = ((place[1:] - place[:-1]) <= 2 * length * SAME).nonzero()[:, 0]
    count = 0
    for part in at.split(_rows_of_block(rows)):
        one, two = (_unit(rows[numbers[order[x]]]) for x in (part, part + 1))
        count += int(((one - two).norm(dim=1) <= SAME).sum())
    return count


def _unit(rows: Tensor) -> Tensor:
    """Normalize rows in float64."""
    rows = rows.double()
    # the largest entry is divided out first: squares may overflow
    rows = rows / rows.abs().amax(1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True)


def _rows_of_block(rows: Tensor) -> int:
    return max(BLOCK // rows.shape[1], 1)
