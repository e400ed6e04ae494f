"""`python -m bench accuracy`: errors against float64 where rows are far apart, close, or equal."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from bench import machine
from bench.methods import METHODS, OURS, run
from bench.options import Options
from bench.screen import Steps, make_table
from bench.store import Table
from bench.sweep import cache_environment
from bench.worker import Call, Job, Lost, Turn, Worker, load_result
from comhe_ext import testing

ROWS, DIM, PAIRS = 1024, 30, 8
# name -> angle of the near rows in radians, None if there are none
ANGLES = {"random": None, "0.1 rad": 0.1, "0.01 rad": 1e-2, "1e-3 rad": 1e-3, "1e-4 rad": 1e-4}
DUPLICATES, COLLAPSED = "duplicates", "collapsed"
CASES = (*ANGLES, DUPLICATES, COLLAPSED)

TABLE = Table(
    "accuracy",
    key=(*machine.STAMP, "case", "method"),
    values=("date", "version", "status", "note", "energy", "energy_error", "gradient_error"),
)


def points(case: str, device: str) -> Tensor:
    """[N, k]: random rows of which some have a near twin, or an equal one; or all in a heap."""
    if case == COLLAPSED:
        return testing.collapsed_rows(ROWS, DIM, 1e-2, device=device)
    if case == DUPLICATES:
        rows = testing.random_rows(ROWS, DIM, device=device)
        rows[-PAIRS:] = rows[:PAIRS]
        return rows
    if (angle := ANGLES[case]) is None:
        return testing.random_rows(ROWS, DIM, device=device)
    return testing.paired_rows(ROWS, DIM, angle, pairs=PAIRS, device=device)


def truth(case: str, device: str) -> tuple[Tensor, Tensor]:
    """By the pure definition; with duplicates that is infinite, so there by ours (see README)."""
    distance = 1e-3 if case == DUPLICATES else 0.0
    return testing.exact_energy_and_gradient(points(case, device), min_distance=distance)


def make_call(method: str, case: str, device: str) -> Call:
    """In the process that measures."""
    rows = points(case, device).unsqueeze(0)
    energies: Callable[..., Tensor] = METHODS[method].load()
    if METHODS[method].family == OURS and case != DUPLICATES:
        energies = partial(energies, min_distance=0.0)
    return lambda: run(energies, rows, "gradient")


def measure(options: Options) -> int:
    """The errors of every method that computes the same energy; the number of cases left over."""
    stamp = machine.stamp(options.device, options.threads)
    names = [name for name in options.methods if METHODS[name].same_energy]
    names = [name for name in names if not METHODS[name].only_batches]
    cases = list(CASES)
    if options.resume:
        cases = [
            c for c in cases if TABLE.lacks(options.out, [stamp | _names(c, m) for m in names])
        ]
    lines: dict[str, list[str]] = {name: [METHODS[name].label] for name in names}
    with TemporaryDirectory() as folder, Steps(options.console, len(cases)) as steps:
        for index, case in enumerate(cases):
            right = truth(case, options.device)
            rows = []
            for name in names:
                steps.say(f"{case}: {name}")
                if time.monotonic() > options.rules.deadline:
                    return len(cases) - index
                row = one(name, case, options, Path(folder), right)
                rows.append(stamp | _names(case, name) | row)
                lines[name].append(cell(row))
            TABLE.upsert(options.out, rows)
            steps.advance()
    title = "Relative error of the gradient against float64"
    options.console.print(make_table(title, ("", *cases), list(lines.values())))
    return 0


def _names(case: str, method: str) -> dict[str, object]:
    return {"case": case, "method": method}


def one(
    name: str, case: str, options: Options, folder: Path, right: tuple[Tensor, Tensor]
) -> dict[str, object]:
    method, device, rules = METHODS[name], options.device, options.rules
    row: dict[str, object] = {"version": method.version(), "status": "ok"}
    if (reason := method.unavailable(device)) is not None:
        return row | {"status": "unavailable", "note": reason}
    cache, result = folder / name, folder / "result.pt"
    cache.mkdir(exist_ok=True)  # one for all cases: compile once
    environment = method.environment | cache_environment(cache)
    job = Job(partial(make_call, name, case, device), device, options.threads, environment)
    worker = Worker(job)
    try:
        worker.ask(Turn(save=result), rules.limit + rules.start + rules.compilation)
    except Lost as lost:
        return row | {"status": lost.status, "note": lost.note}
    finally:
        worker.close()
    energies, gradients = load_result(result)
    return row | {
        "energy": float(energies[0]),
        "energy_error": testing.relative_error(energies[0], right[0]),
        "gradient_error": testing.relative_error(gradients[0], right[1]),
    }


def cell(row: dict[str, object]) -> str:
    error = row.get("gradient_error")
    if not isinstance(error, float):
        return str(row["status"])
    return f"{error:.0e}" if math.isfinite(error) else "not finite"
