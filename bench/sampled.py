"""`python -m bench sampled`: what sampled energies cost, and how far they are off.

Three parts: errors of single draws by kind of rows; times beside the exact energy; the energy that
a training on sampled energies reaches. All in processor time, for they compare numbers of threads'
work and not of cores.
"""

import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench import machine
from bench.options import Options
from bench.screen import make_table
from bench.store import Row, Table
from comhe_ext import hyperspherical_energy
from comhe_ext.sampled import SamplingPlan, estimate_energy
from comhe_ext.testing.kinds import KINDS, rows_of_kind

PARTS = ("errors", "times", "training")
TABLE = Table(
    "sampled",
    key=(*machine.STAMP, "part", "kind", "rows", "dim", "method"),
    values=("date", "draws", "energy", "energy_error", "gradient_error", "seconds", "peak_mib"),
)
DIM = 40
SAMPLES = 1024
# draws of each degree
DRAWS = {0: 4, 2: 4, 3: 2, 4: 1}
STEPS = 120
REFRESH = 40


class Size(NamedTuple):
    """Numbers of rows: of errors and training, of times, of the estimate with an error bar."""

    rows: int = 16_384
    timed: int = 65_536
    many: int = 1_000_000


def measure(options: Options, parts: Sequence[str], quick: bool) -> None:
    """Measure some of `PARTS`, into sampled.csv."""
    size = Size(2048, 4096, 20_000) if quick else Size()
    torch.set_num_threads(options.threads)
    measures: dict[str, Callable[[Size], Iterator[dict[str, object]]]] = {
        "times": times,
        "errors": errors,
        "training": training,
    }
    for part, rows_of in measures.items():
        if part in parts:
            stamp = {**machine.stamp(options.device, options.threads), "part": part, "dim": DIM}
            for row in rows_of(size):
                TABLE.upsert(options.out, [{**stamp, **row}])
    show(options, parts)


def energy_and_gradient(rows: Tensor, **options: object) -> tuple[float, Tensor, float]:
    """Compute the energy, its gradient, and the processor time of both."""
    x = rows.clone().requires_grad_()
    begin = time.process_time()
    energy = hyperspherical_energy(x, **options)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(energy, x)
    return float(energy.detach()), gradient, time.process_time() - begin


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the parts ------------------------------------------------------------------------------------


def errors(size: Size) -> Iterator[dict[str, object]]:
    """Compare draws with the exact energy and gradient, by kind, degree, and with a list."""
    for kind in KINDS:
        rows = normalize(rows_of_kind(kind, size.rows, DIM))
        energy, gradient, _ = energy_and_gradient(rows)
        planned = SamplingPlan.from_rows(rows, generator=generator(0))
        unlisted = SamplingPlan.from_rows(rows, trees=0, generator=generator(0))
        for degree, draws in DRAWS.items():
            for plan in (unlisted, planned):
                plan.degree = degree
                off, turned = [], []
                for seed in range(1, draws + 1):
                    options = {"samples": SAMPLES, "plan": plan, "generator": generator(seed)}
                    found_energy, slope, _ = energy_and_gradient(rows, method="sampled", **options)
                    off.append(found_energy / energy - 1.0)
                    turned.append(float((slope - gradient).norm() / gradient.norm()))
                yield {
                    "kind": kind,
                    "rows": size.rows,
                    "method": f"degree {degree}" + (", list" if plan is planned else ""),
                    "draws": draws,
                    "energy": energy,
                    "energy_error": math.sqrt(statistics.fmean(x * x for x in off)),
                    "gradient_error": math.sqrt(statistics.fmean(x * x for x in turned)),
                }


def times(size: Size) -> Iterator[dict[str, object]]:
    """Time the estimate of very many rows, then draws beside the exact energy, in turns."""
    yield _time_of_estimate(size.many)
    place = {"kind": "clusters", "rows": size.timed}
    rows = rows_of_kind("clusters", size.timed, DIM)
    begin = time.process_time()
    plan = SamplingPlan.from_rows(rows, generator=generator(0))
    yield {**place, "method": "plan", "seconds": time.process_time() - begin}
    methods: dict[str, dict[str, object]] = {"exact": {}}
    for samples in (256, 1024, 4096):
        methods[f"sampled, {samples}"] = {"method": "sampled", "samples": samples, "plan": plan}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    values: dict[str, tuple[float, Tensor]] = {}
    for turn in range(4):  # the first one is not counted
        for name, options in methods.items():
            energy, gradient, took = energy_and_gradient(rows, **options)
            values[name] = energy, gradient
            seconds[name] += [took] if turn else []
    exact, slope = values["exact"]
    for name, (energy, gradient) in values.items():
        row: dict[str, object] = {"method": name, "seconds": statistics.median(seconds[name])}
        if name != "exact":
            row["energy_error"] = abs(energy / exact - 1.0)
            row["gradient_error"] = float((gradient - slope).norm() / slope.norm())
        yield {**place, **row}


def _time_of_estimate(many: int) -> dict[str, object]:
    rows = rows_of_kind("near-duplicates", many, DIM)
    begin = time.process_time()
    estimate = estimate_energy(rows, samples=256, generator=generator(0))
    return {
        "kind": "near-duplicates",
        "rows": many,
        "method": "estimate",
        "draws": 16,
        "energy": estimate.energy,
        # half the width of the interval
        "energy_error": (estimate.high - estimate.low) / 2.0 / estimate.energy,
        "seconds": time.process_time() - begin,
        # of the whole process, which has done nothing else yet
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0,
    }


def training(size: Size) -> Iterator[dict[str, object]]:
    """Move rows by the gradient of an energy alone, and compute the exact energy in the end."""
    for kind in ("clusters", "words"):
        start = normalize(rows_of_kind(kind, size.rows, DIM))
        energy = float(hyperspherical_energy(start))
        place = {"kind": kind, "rows": size.rows}
        yield {**place, "method": "start", "energy": energy}
        for method, degree, trees in (
            ("exact", 0, 0),
            ("degree 0", 0, 0),
            ("degree 2", 2, 0),
            ("degree 2, list", 2, 4),
            ("degree 3, list", 3, 4),
        ):
            rows, begin = start.clone().requires_grad_(), time.process_time()
            descent = torch.optim.Adam([rows], lr=0.01)
            plan: SamplingPlan | None = None
            for step in range(STEPS):
                options: dict[str, object] = {}
                if method != "exact":
                    if step % REFRESH == 0:
                        plan = SamplingPlan.from_rows(
                            rows, degree, trees, generator=generator(step)
                        )
                    options = {"method": "sampled", "samples": 256, "plan": plan}
                    options["generator"] = generator(1000 + step)
                descent.zero_grad()
                hyperspherical_energy(rows, **options).backward()  # type: ignore[arg-type]
                descent.step()
                with torch.no_grad():
                    rows.copy_(normalize(rows))
            seconds = (time.process_time() - begin) / STEPS
            energy = float(hyperspherical_energy(rows.detach()))
            yield {**place, "method": method, "energy": energy, "seconds": seconds}


# --- what they show -------------------------------------------------------------------------------


def show(options: Options, parts: Sequence[str]) -> None:
    """Print the parts as tables."""
    for part in parts:
        rows = [row for row in TABLE.newest(options.out) if row["part"] == part]
        columns = ("energy", "energy_error", "gradient_error", "seconds", "peak_mib")
        cells = [
            [f"{row['kind']}, {int(row['rows']):,}: {row['method']}", *(row[x] for x in columns)]
            for row in rows
        ]
        heads = ("", *(x.replace("_", " ") for x in columns))
        options.console.print(make_table(f"sampled: {part}", heads, cells))


def error_of(rows: Sequence[Row], kind: str, method: str) -> float | None:
    """Find the gradient error of a kind and a method."""
    for row in rows:
        if (row["part"], row["kind"], row["method"]) == ("errors", kind, method):
            return float(row["gradient_error"])
    return None
