"""`python -m bench demo`: the regularizer on a real network, the operator against naive PyTorch.

Trains a small convolutional network on scikit-learn's handwritten digits without a regularizer,
with minimum hyperspherical energy (MHE) and with its compressive form (RP-CoMHE); then measures
time, memory and error of energy + gradient. Every sentence printed is computed from the numbers.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

import comhe_ext
from bench import compare, drawing, machine, plots, readme, sweep
from bench.contest import Rules
from bench.digits import (
    BATCH,
    DIM,
    IMAGES,
    METHODS,
    TABLE,
    TRAIN_IMAGES,
    WEIGHT,
    Layer,
    Run,
    energy_history,
    layers_of,
    network,
    of_method,
    step_milliseconds,
    train,
)
from bench.options import Options
from bench.screen import Steps, make_table
from bench.shapes import Case, Shape
from bench.store import RESULTS, ROOT, Row
from comhe_ext import backends
from comhe_ext.kernels.pair_functions import Riesz

CONFIDENCE = 0.95


class Plan(NamedTuple):
    """How much to train and to measure."""

    seeds: int
    steps: int
    steps_between_energies: int
    rows: tuple[int, ...]
    rules: Rules


FULL = Plan(6, 150, 10, rows=(1024, 4096, 16384), rules=Rules(rounds=5, budget=5.0))
QUICK = Plan(2, 6, 3, rows=(512, 1024), rules=Rules(rounds=2))


# --- the regularizer ------------------------------------------------------------------------------


def train_all(plan: Plan, console: Console) -> list[Run]:
    jobs = [(method, seed) for seed in range(plan.seeds) for method in METHODS]
    runs = []
    with Steps(console, len(jobs)) as steps:
        for method, seed in jobs:
            start = time.perf_counter()
            run = Run(method, seed)
            for step in train(run, plan.steps, plan.steps_between_energies):
                steps.say(f"training, seed {seed}, {METHODS[method]}, step {step}")
            runs.append(run)
            took = time.perf_counter() - start
            steps.advance(
                f"seed {seed}, {METHODS[method]}: {run.accuracy:.2f} % right, {took:.1f} s"
            )
    return runs


def training_tables(runs: Sequence[Run], layers: Sequence[Layer]) -> list[Table]:
    results = make_table(
        "Test accuracy and cost of a step",
        ("", "test accuracy, %", "deviation", "least", "most", "step, ms"),
    )
    for method in METHODS:
        accuracies = [run.accuracy for run in of_method(runs, method)]
        results.add_row(
            METHODS[method],
            f"{statistics.mean(accuracies):.2f}",
            f"{statistics.stdev(accuracies):.2f}",
            f"{min(accuracies):.2f}",
            f"{max(accuracies):.2f}",
            f"{step_milliseconds(runs, method):.1f}",
        )
    energies = make_table(
        "Energy of each layer, before training and after it in each of the three ways",
        ("layer", "N x d", "random", "optimum", "before", *METHODS),
    )
    for index, layer in enumerate(layers):
        optimum = layer.optimum()
        first = energy_history(runs, "none")[:, 0, index].mean()
        last = [energy_history(runs, method)[:, -1, index].mean() for method in METHODS]
        energies.add_row(
            layer.name,
            f"{layer.rows} x {layer.width}",
            f"{layer.random():.4f}",
            "-" if optimum is None else f"{optimum:.4f}",
            *(f"{energy:.4f}" for energy in (first, *last)),
        )
    return [results, energies]


def training_words(runs: Sequence[Run], layers: Sequence[Layer]) -> Iterator[str]:
    plain = np.array([run.accuracy for run in of_method(runs, "none")])
    for method in ("MHE", "RP-CoMHE"):
        accuracies = np.array([run.accuracy for run in of_method(runs, method)])
        yield f"{method}: {compare_accuracy(accuracies - plain)}"
        before = energy_history(runs, "none")[:, -1].mean(0)
        after = energy_history(runs, method)[:, -1].mean(0)
        lower = [layer.name for layer, b, a in zip(layers, before, after, strict=True) if a < b]
        names = f" ({', '.join(lower)})" if lower else ""
        yield (
            f"{method}: ends with less energy than without a regularizer in "
            f"{len(lower)} of {len(layers)} layers{names}."
        )


def compare_accuracy(differences: np.ndarray) -> str:
    """Put the paired differences of the seeds into a sentence, in points of accuracy."""
    mean, count = float(differences.mean()), len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    low, high = mean - reach, mean + reach
    if low > 0:
        verdict = "more accurate than without a regularizer"
    elif high < 0:
        verdict = "less accurate than without a regularizer"
    else:
        verdict = f"no difference in accuracy that {count} seeds can show"
    return (
        f"{verdict} ({mean:+.2f} points, {CONFIDENCE:.0%} interval of the paired difference "
        f"{low:+.2f} to {high:+.2f})."
    )


# --- the operator ---------------------------------------------------------------------------------


def measure_costs(plan: Plan, options: Options) -> dict[Case, list[Row]]:
    """Measure our method and the naive formula with the sweep, and return its rows."""
    cases = [Case(Shape(1, rows, DIM), "gradient") for rows in plan.rows]
    sweep.sweep(options, cases)
    setting = machine.name(options.device), options.device, str(options.threads)
    rows = compare.by_setting(sweep.TABLE.newest(options.out))[setting]
    return {case: compare.by_case(rows)[case] for case in cases}


def cost_table(costs: dict[Case, list[Row]]) -> Table:
    lines = []
    for case, rows in costs.items():
        for row in rows:
            errors = (row["energy_error"], row["derivative_error"])
            cells = [readme.number(float(row[x])) for x in ("wall_ms", "peak_mib") if row[x]]
            cells += [f"{float(error):.1e}" for error in errors if error]
            lines.append([row["method"], str(case.shape.rows), *(cells or [row["status"]])])
    headings = ("", "N", "time, ms", "peak, MiB", "energy error", "gradient error")
    return make_table(f"Energy + gradient of N vectors, k = {DIM}, s = 2", headings, lines)


def cost_words(costs: dict[Case, list[Row]]) -> Iterator[str]:
    for case, rows in costs.items():
        mine = compare.ours(rows)
        naive = next(row for row in rows if row["method"] == "naive")
        words = f"N = {case.shape.rows}: "
        if mine is None:
            yield f"{words}comhe_ext failed: {rows[0]['note']}."
        elif not naive["wall_ms"]:
            time, memory = float(mine["wall_ms"]) / 1e3, float(mine["peak_mib"])
            yield (
                f"{words}comhe_ext takes {time:.2f} s and {memory:.1f} MiB; the naive formula was "
                f"not timed: {naive['status']}, {naive['note']}."
            )
        else:
            ratios = [float(naive[name]) / float(mine[name]) for name in ("wall_ms", "peak_mib")]
            faster = in_words(ratios[0], "faster", "slower")
            smaller = in_words(ratios[1], "smaller", "larger")
            yield f"{words}beside the naive formula comhe_ext is {faster}, its memory {smaller}."


def in_words(ratio: float, above: str, below: str) -> str:
    """Put a ratio into words, also one that rounds to 1."""
    if 0.95 <= ratio <= 1.05:
        return f"neither {above} nor {below} (within 5 %)"
    return f"{max(ratio, 1 / ratio):.1f} times {above if ratio > 1 else below}"


# --- files ----------------------------------------------------------------------------------------


def save_training(folder: Path, runs: Sequence[Run], layers: Sequence[Layer]) -> None:
    stamp = machine.stamp("cpu", 1)
    rows = []
    for run in runs:
        row = stamp | {"method": run.method, "seed": run.seed, "steps": len(run.seconds)}
        row |= {"accuracy": run.accuracy, "step_ms": 1e3 * statistics.median(run.seconds)}
        for layer, first, last in zip(layers, run.energies[0], run.energies[-1], strict=True):
            row |= {f"{layer.name}_first": first, f"{layer.name}_last": last}
        rows.append(row)
    TABLE.upsert(folder, rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few steps and small N: a check")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out", metavar="FOLDER", help="of its files; default out"
    )
    parser.add_argument(
        "--save", action="store_true", help="put the training's numbers into README.md"
    )


def run(args: argparse.Namespace, threads: int, console: Console) -> None:
    started = time.perf_counter()
    plan = QUICK if args.quick else FULL
    backend = backends.choose(None, Riesz(), torch.device("cpu"), torch.float32)
    console.print(
        f"comhe_ext {comhe_ext.__version__}, backend {backend!r}; PyTorch {torch.__version__}, "
        f"Python {platform.python_version()}; {machine.name('cpu')}; threads: {threads}"
    )
    layers = layers_of(network())

    console.rule("1. The regularizer on a real network", align="left")
    console.print(
        f"scikit-learn's digits, {TRAIN_IMAGES} for training and the other "
        f"{IMAGES - TRAIN_IMAGES} for the test; "
        f"{plan.seeds} seeds, {plan.steps} steps of {BATCH}. The three start from the same "
        f"weights and see the same batches; each layer's energy has weight {WEIGHT:g}."
    )
    torch.set_num_threads(
        1
    )  # the network is small: with more threads, they would mostly wait for each other
    runs = train_all(plan, console)
    torch.set_num_threads(threads)
    for table in training_tables(runs, layers):
        console.print(table)
    console.print(
        "Energies: s = 2, mean over pairs and seeds; half space, but for the output. Random: the "
        "expected energy of random vectors. Optimum: the regular simplex in full space "
        "(N <= d + 1), orthogonal vectors in half space (N <= d); - where not known. Step: median, "
        "on one thread."
    )
    for sentence in training_words(runs, layers):
        console.print(sentence)

    console.rule("2. The operator against naive PyTorch", align="left")
    methods = (f"comhe-{backend}", "naive")
    options = Options("cpu", threads, args.out, console, methods, plan.rules)
    costs = measure_costs(plan, options)
    console.print(cost_table(costs))
    console.print(
        f"Threads: {threads}. Time: by the wall clock, median of {plan.rules.rounds} rounds in "
        "which the two take turns, of one where a call takes 30 s. Memory: peak above the input. "
        "Each in a process of its own. Errors: relative, against float64."
    )
    for sentence in cost_words(costs):
        console.print(sentence)
    load, cpus = psutil.getloadavg()[1], psutil.cpu_count() or 1
    if load > 1.5 * cpus:
        console.print(
            f"The machine is busy (load {load:.1f} in the last 5 minutes, {cpus} CPUs): "
            "these times are not those of a quiet one."
        )

    console.rule("3. Files", align="left")
    rows = [row for found in costs.values() for row in found]
    setting = compare.setting_of(rows[0])
    written = drawing.save(
        args.out,
        {
            "energy": lambda theme: plots.energies_plot(theme, runs, layers),
            "time": lambda theme: plots.time_plot(theme, rows, setting, DIM),
            "memory": lambda theme: plots.memory_plot(theme, rows, setting, DIM),
        },
    )
    if args.save:
        save_training(RESULTS, runs, layers)
        readme.update(RESULTS)
        written += [TABLE.path(RESULTS), readme.README]
    for path in written:
        console.print(str(path), soft_wrap=True)
    console.print(f"Done in {time.perf_counter() - started:.0f} s.")
