"""Sampled energies beside the exact one: how far single draws are off, and what they cost."""

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.measure.contest import Entry, error
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
PARTITIONS = (16, 4)  # of an estimate with an error bar, where no exact energy can be had
PROJECTED = "20 projections"  # in half space, as a step of a regularizer has them
GROUPS: dict[str, list[Case]] = {
    "errors": [{"kind": kind, "rows": 16_384} for kind in KINDS],
    "times": [{"kind": "clusters", "rows": 65_536}],
    "many": [{"kind": "near-duplicates", "rows": 1_000_000}],
    "projected": [{"kind": PROJECTED, "rows": rows} for rows in (512, 1024, 2048, 4096)],
}
QUICK: dict[str, list[Case]] = {
    "errors": [{"kind": kind, "rows": 2048} for kind in ("clusters", "words")],
    "projected": [{"kind": PROJECTED, "rows": 300}],
}


@lru_cache(maxsize=1)
def points(kind: str, rows: int) -> Tensor:
    if kind == PROJECTED:
        return testing.random_rows(20 * rows, DIM).view(20, rows, DIM)
    return normalize(rows_of_kind(kind, rows, DIM))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def energy_and_gradient(rows: Tensor, **options: Any) -> Result:
    leaf = rows.detach().requires_grad_()
    energy = hyperspherical_energy(leaf, **options)
    (gradient,) = torch.autograd.grad(energy.sum(), leaf)
    return energy.detach(), gradient


def make_call(kind: str, rows: int, **options: Any) -> Call:
    return partial(energy_and_gradient, points(kind, rows), **options)


def make_draws(
    kind: str, rows: int, samples: int, degree: int = 2, trees: int = 4, draws: int = 1
) -> Call:
    x = points(kind, rows)
    plan = SamplingPlan.from_rows(x, degree, trees, generator=generator(0))
    draw = partial(energy_and_gradient, x, method="sampled", samples=samples, plan=plan)

    def all_draws() -> Result:
        found = [draw(generator=generator(seed)) for seed in range(1, draws + 1)]
        return tuple(torch.stack(parts) for parts in zip(*found, strict=True))

    return all_draws


def make_plan(kind: str, rows: int) -> Call:
    """What many steps of a training share."""

    def plan() -> Result:
        SamplingPlan.from_rows(points(kind, rows), generator=generator(0))
        return ()

    return plan


def make_estimate(kind: str, rows: int, partitions: int) -> Call:
    def estimate() -> Result:
        options: dict[str, Any] = {"samples": 256, "partitions": partitions}
        found = estimate_energy(points(kind, rows), **options, generator=generator(0))
        return tuple(torch.tensor(x) for x in (found.energy, found.low, found.high))

    return estimate


@lru_cache(maxsize=1)
def truth(kind: str, rows: int) -> Result:
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
    found: dict[str, Entry] = {}
    if case["kind"] == PROJECTED:
        make = partial(make_call, *place, half_space=True)
        found["exact"] = Entry(make)
        for samples in SMALL_BLOCKS:
            sampled = partial(make, method="sampled", samples=samples)
            found[f"sampled, {samples}"] = Entry(sampled)
        return found
    if case in GROUPS["many"]:
        for count in PARTITIONS:
            estimate = partial(make_estimate, *place, count)
            found[f"estimate, {count} partitions"] = Entry(estimate, check_estimate)
        return found
    check = partial(check_draws, *place)
    if case in GROUPS["times"]:
        found["exact"] = Entry(partial(make_call, *place))
        found["plan"] = Entry(partial(make_plan, *place))
        for samples in BLOCKS:
            found[f"sampled, {samples}"] = Entry(partial(make_draws, *place, samples), check)
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
