"""Sampled energies beside the exact one: how far single draws are off, and what they cost."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.measure.contest import Entry
from bench.measure.errors import error
from bench.measure.store import Row
from bench.measure.study import Case, Options, Study
from bench.measure.worker import Call, Result
from comhe_ext import hyperspherical_energy
from comhe_ext.sampled import SamplingPlan, estimate_energy
from comhe_ext.testing.kinds import KINDS, rows_of_kind

DIM = 40
# draws of each degree of the polynomial, whose errors are averaged
DRAWS = {0: 4, 2: 4, 3: 2, 4: 1}
BLOCKS = (256, 1024, 4096)
# so many rows have an estimate with an error bar, and no exact energy
MANY = 200_000


def case_of(kind: str, rows: int) -> Case:
    return {"kind": kind, "rows": rows}


GROUPS = {
    "errors": [case_of(kind, 16_384) for kind in KINDS],
    "times": [case_of("clusters", 65_536), case_of("near-duplicates", 1_000_000)],
    "quick": [case_of("clusters", 2048), case_of("words", 2048)],
}


@lru_cache(maxsize=1)
def points(kind: str, rows: int) -> Tensor:
    return normalize(rows_of_kind(kind, rows, DIM))


def energy_and_gradient(rows: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = rows.detach().requires_grad_()
    energy = hyperspherical_energy(leaf, **options)
    (gradient,) = torch.autograd.grad(energy, leaf)
    return energy.detach(), gradient


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_exact(kind: str, rows: int) -> Call:
    return partial(energy_and_gradient, points(kind, rows))


def make_plan(kind: str, rows: int) -> Call:
    """What many steps of a training share."""

    def plan() -> Result:
        SamplingPlan.from_rows(points(kind, rows), generator=generator(0))
        return ()

    return plan


def make_draws(kind: str, rows: int, samples: int, degree: int, trees: int, draws: int) -> Call:
    x = points(kind, rows)
    plan = SamplingPlan.from_rows(x, degree, trees, generator=generator(0))

    def draw() -> Result:
        found = [
            energy_and_gradient(
                x, method="sampled", samples=samples, plan=plan, generator=generator(seed)
            )
            for seed in range(1, draws + 1)
        ]
        return tuple(torch.stack(parts) for parts in zip(*found, strict=True))

    return draw


def make_estimate(kind: str, rows: int) -> Call:
    def estimate() -> Result:
        found = estimate_energy(points(kind, rows), samples=256, generator=generator(0))
        return tuple(torch.tensor(x) for x in (found.energy, found.low, found.high))

    return estimate


@lru_cache(maxsize=1)
def truth(kind: str, rows: int) -> tuple[Tensor, Tensor]:
    return energy_and_gradient(points(kind, rows))


def check_draws(kind: str, rows: int, result: Result) -> Row:
    """Average the errors of some draws as a root mean square."""
    energies, gradients = result
    energy, gradient = truth(kind, rows)
    return {
        "value": float(energy),
        "value_error": error(energies, energy.expand_as(energies)),
        "gradient_error": error(gradients, gradient.expand_as(gradients)),
        "draws": len(energies),
    }


def check_estimate(result: Result) -> Row:
    energy, low, high = map(float, result)
    return {"value": energy, "value_error": (high - low) / 2.0 / energy}


def entries(case: Case, options: Options) -> dict[str, Entry]:
    """Degrees with blocks of 1,024 rows where errors are asked for, else blocks by their time."""
    place, rows = (case["kind"], case["rows"]), case["rows"]
    if rows > MANY:
        return {"estimate": Entry(partial(make_estimate, *place), check_estimate)}
    check: Callable[[Result], Row] = partial(check_draws, *place)
    if case in GROUPS["times"]:
        found = {"exact": Entry(partial(make_exact, *place))}
        found["plan"] = Entry(partial(make_plan, *place))
        for samples in BLOCKS:
            make = partial(make_draws, *place, samples, 2, 4, 1)
            found[f"sampled, {samples}"] = Entry(make, check)
        return found
    return {
        f"degree {degree}" + ", list" * (trees > 0): Entry(
            partial(make_draws, *place, 1024, degree, trees, draws), check, timed=False
        )
        for degree, draws in DRAWS.items()
        for trees in (0, 4)
    }


STUDY = Study(
    *("sampled", "errors and cost of sampled energies"),
    key=("kind", "rows"),
    groups=lambda device: GROUPS,
    entries=entries,
    values=("draws",),
    devices=("cpu",),
)
