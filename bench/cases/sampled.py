"""Sampled energies beside the exact one: how far single draws are off, and what they cost."""

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
from comhe_ext import hyperspherical_energy, testing
from comhe_ext.sampled import SamplingPlan, estimate_energy
from comhe_ext.testing.kinds import KINDS, rows_of_kind

DIM = 40
# draws of each degree of the polynomial, whose errors are averaged
DRAWS = {0: 4, 2: 4, 3: 2, 4: 1}
BLOCKS, SMALL_BLOCKS = (256, 1024, 4096), (64, 128, 256)
PROJECTED = "20 projections"  # in half space, as a step of a regularizer has them
PARTITIONS = (16, 4)  # of an estimate with an error bar, where no exact energy can be had


def case_of(kind: str, rows: int) -> Case:
    return {"kind": kind, "rows": rows}


GROUPS = {
    "errors": [case_of(kind, 16_384) for kind in KINDS],
    "times": [case_of("clusters", 65_536)],
    "many": [case_of("near-duplicates", 1_000_000)],
    "projected": [case_of(PROJECTED, rows) for rows in (512, 1024, 2048, 4096)],
}
QUICK = {
    "errors": [case_of("clusters", 2048), case_of("words", 2048)],
    "projected": [case_of(PROJECTED, 300)],
}


@lru_cache(maxsize=1)
def points(kind: str, rows: int) -> Tensor:
    if kind == PROJECTED:
        return testing.random_rows(20 * rows, DIM).view(20, rows, DIM)
    return normalize(rows_of_kind(kind, rows, DIM))


def energy_and_gradient(rows: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = rows.detach().requires_grad_()
    energy = hyperspherical_energy(leaf, **options)
    (gradient,) = torch.autograd.grad(energy.sum(), leaf)
    return energy.detach(), gradient


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_call(kind: str, rows: int, **options: Any) -> Call:
    return partial(energy_and_gradient, points(kind, rows), **options)


def make_plan(kind: str, rows: int) -> Call:
    """What many steps of a training share."""

    def plan() -> Result:
        SamplingPlan.from_rows(points(kind, rows), generator=generator(0))
        return ()

    return plan


def make_draws(kind: str, rows: int, samples: int, degree: int, trees: int, draws: int) -> Call:
    x = points(kind, rows)
    plan = SamplingPlan.from_rows(x, degree, trees, generator=generator(0))
    options: dict[str, Any] = {"method": "sampled", "samples": samples, "plan": plan}

    def draw() -> Result:
        seeds = range(1, draws + 1)
        found = [energy_and_gradient(x, **options, generator=generator(seed)) for seed in seeds]
        return tuple(torch.stack(parts) for parts in zip(*found, strict=True))

    return draw


def make_estimate(kind: str, rows: int, partitions: int) -> Call:
    options: dict[str, Any] = {"samples": 256, "partitions": partitions}

    def estimate() -> Result:
        found = estimate_energy(points(kind, rows), **options, generator=generator(0))
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
    place = case["kind"], case["rows"]
    check = partial(check_draws, *place)
    if case["kind"] == PROJECTED:
        wanted: dict[str, Any] = {"half_space": True}
        found = {"exact": Entry(partial(make_call, *place, **wanted))}
        for samples in SMALL_BLOCKS:
            make = partial(make_call, *place, **wanted, method="sampled", samples=samples)
            found[f"sampled, {samples}"] = Entry(make)
        return found
    if case in GROUPS["many"]:
        return {
            f"estimate, {n} partitions": Entry(partial(make_estimate, *place, n), check_estimate)
            for n in PARTITIONS
        }
    if case in GROUPS["times"]:
        found = {
            "exact": Entry(partial(make_call, *place)),
            "plan": Entry(partial(make_plan, *place)),
        }
        for samples in BLOCKS:
            draws = partial(make_draws, *place, samples, 2, 4, 1)
            found[f"sampled, {samples}"] = Entry(draws, check)
        return found
    return {
        f"degree {degree}" + ", list" * (trees > 0): Entry(
            partial(make_draws, *place, 1024, degree, trees, draws), check, timed=False
        )
        for degree, draws in DRAWS.items()
        for trees in (0, 4)
    }


STUDY = Study(
    *("sampled", "errors and cost of sampled energies", 5),
    key=("kind", "rows"),
    groups=lambda device, quick: QUICK if quick else GROUPS,
    entries=entries,
    values=("draws",),
    devices=("cpu",),
)
