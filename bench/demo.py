"""`make demo`: the regularizer on a real network, and the operator against naive PyTorch.

Trains a small convolutional network on scikit-learn's handwritten digits without a regularizer,
with minimum hyperspherical energy (MHE) and with its compressive form (RP-CoMHE); then measures
time, memory and error of energy + gradient. Every sentence printed is computed from the numbers.
"""

import argparse
import csv
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy import stats
from torch import Tensor

import comhe_ext
import readme
from comhe_ext import ops, testing
from digits import (
    BATCH,
    DIM,
    IMAGES,
    METHODS,
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
from measure import Cost, free_memory, in_child, machine
from naive import naive_bytes
from plots import plot_costs, plot_energies

ROOT = Path(__file__).resolve().parent.parent
CONFIDENCE = 0.95
# beyond, a round of the naive formula takes many seconds: it is timed once, in a process of its own
MOST_ROWS_IN_TURNS = 8192


class Plan(NamedTuple):
    """How much to do."""

    seeds: int
    steps: int
    steps_between_energies: int
    rows: tuple[int, ...]
    rounds: int


FULL = Plan(seeds=6, steps=150, steps_between_energies=10, rows=(1024, 4096, 16384), rounds=5)
QUICK = Plan(seeds=2, steps=6, steps_between_energies=3, rows=(512, 1024), rounds=2)


# --- the regularizer ------------------------------------------------------------------------------


def train_all(plan: Plan, console: Console) -> list[Run]:
    jobs = [(method, seed) for seed in range(plan.seeds) for method in METHODS]
    runs = []
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=len(jobs) * plan.steps)
        for done, (method, seed) in enumerate(jobs, 1):
            start = time.perf_counter()
            progress.update(bar, description=f"training, seed {seed}, {METHODS[method]}")
            run = Run(method, seed)
            for _ in train(run, plan.steps, plan.steps_between_energies):
                progress.advance(bar)
            runs.append(run)
            if not console.is_terminal:
                took = time.perf_counter() - start
                console.print(
                    f"trained {done} of {len(jobs)}: seed {seed}, {METHODS[method]}, "
                    f"{run.accuracy:.2f} % right, {took:.1f} s"
                )
    return runs


def make_table(title: str, headings: Sequence[str]) -> Table:
    """A plain table: the first column is words, the others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table


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
    """A sentence on the paired differences of the seeds, in points of accuracy."""
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


def measure_costs(plan: Plan, threads: int, console: Console) -> list[Cost]:
    costs = []
    for rows in plan.rows:
        points = testing.random_rows(rows, DIM)
        with step(console, f"energy and gradient in float64, N = {rows}"):
            truth = testing.exact_energy_and_gradient(points)
        in_turns = ["comhe_ext", "naive"] if rows <= MOST_ROWS_IN_TURNS else ["comhe_ext"]
        with step(console, f"time, N = {rows}"):
            child = in_child(in_turns, rows, DIM, rounds=plan.rounds, threads=threads)
            seconds = child.seconds
        for method in ("comhe_ext", "naive"):
            needed = naive_bytes(rows) * 1.1 + 2**28
            if method == "naive" and (free := free_memory()) < needed:
                note = f"needs {gib(needed)}, {gib(free)} free"
                costs.append(Cost(method, rows, None, 0, None, None, None, note))
                continue
            with step(console, f"memory and error, N = {rows}, {method}"):
                costs.append(measure_cost(method, rows, threads, truth, seconds.get(method)))
    return costs


def measure_cost(
    method: str,
    rows: int,
    threads: int,
    truth: tuple[Tensor, Tensor],
    seconds: Sequence[float] | None,
) -> Cost:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.pt"
        try:
            # one round: what an earlier one left behind is not the operator's need
            child = in_child([method], rows, DIM, rounds=1, threads=threads, save=file)
        except RuntimeError as error:
            return Cost(method, rows, None, 0, None, None, None, str(error))
        energy, gradient = torch.load(file)
    seconds = child.seconds[method] if seconds is None else seconds
    return Cost(
        method,
        rows,
        1e3 * statistics.median(seconds),
        len(seconds),
        child.peak_bytes / 2**20,
        testing.relative_error(energy, truth[0]),
        testing.relative_error(gradient, truth[1]),
    )


class step:  # noqa: N801 (used as a statement)
    """Say what is being measured: a spinner, or a line where the output is not a terminal."""

    def __init__(self, console: Console, words: str) -> None:
        self.status = console.status(words) if console.is_terminal else None
        if self.status is None:
            console.print(f"measuring: {words}")

    def __enter__(self) -> None:
        if self.status is not None:
            self.status.start()

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def cost_table(costs: Sequence[Cost]) -> Table:
    table = make_table(
        f"Energy + gradient of N vectors, k = {DIM}, s = 2",
        ("", "N", "time, ms", "peak, MiB", "energy error", "gradient error"),
    )
    for cost in costs:
        if cost.milliseconds is None:
            table.add_row(cost.method, str(cost.rows), "not run")
            continue
        table.add_row(
            cost.method,
            str(cost.rows),
            f"{cost.milliseconds:.1f}",
            f"{cost.peak_mib:.1f}",
            f"{cost.energy_error:.1e}",
            f"{cost.gradient_error:.1e}",
        )
    return table


def cost_words(costs: Sequence[Cost]) -> Iterator[str]:
    for ours, naive in zip(costs[::2], costs[1::2], strict=True):
        if ours.milliseconds is None or ours.peak_mib is None:
            yield f"N = {ours.rows}: comhe_ext failed: {ours.note}."
        elif naive.milliseconds is None or naive.peak_mib is None:
            yield (
                f"N = {ours.rows}: comhe_ext takes {ours.milliseconds / 1e3:.2f} s and "
                f"{ours.peak_mib:.1f} MiB; the naive formula was not run: {naive.note}."
            )
        else:
            faster = compare(naive.milliseconds / ours.milliseconds, "faster", "slower")
            smaller = compare(naive.peak_mib / ours.peak_mib, "smaller", "larger")
            yield (
                f"N = {ours.rows}: against the naive formula comhe_ext is {faster}, "
                f"its peak memory {smaller}."
            )


def compare(ratio: float, above: str, below: str) -> str:
    """A ratio in words, one that rounds to 1 as such."""
    if 0.95 <= ratio <= 1.05:
        return f"neither {above} nor {below} (within 5 %)"
    return f"{max(ratio, 1 / ratio):.1f} times {above if ratio > 1 else below}"


# --- files ----------------------------------------------------------------------------------------


def save_costs(path: Path, costs: Sequence[Cost], backend: str, threads: int) -> None:
    fields = {"machine": machine(), "torch": torch.__version__, "threads": threads, "k": DIM}
    rows = [{**fields, "backend": backend, **cost._asdict()} for cost in costs]
    for row in rows:
        row["backend"] = backend if row["method"] == "comhe_ext" else ""
    write_csv(path, rows)


def save_training(path: Path, runs: Sequence[Run], layers: Sequence[Layer], backend: str) -> None:
    fields = {"machine": machine(), "torch": torch.__version__, "threads": 1}
    rows = []
    for run in runs:
        row = {**fields, "backend": backend, "method": run.method, "seed": run.seed}
        row |= {"steps": len(run.seconds), "accuracy": round(run.accuracy, 4)}
        row["step_ms"] = round(1e3 * statistics.median(run.seconds), 3)
        for layer, first, last in zip(layers, run.energies[0], run.energies[-1], strict=True):
            row[f"{layer.name}_first"], row[f"{layer.name}_last"] = first, last
        rows.append(row)
    write_csv(path, rows)


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps and small N: a check")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder for the plots")
    parser.add_argument(
        "--save", action="store_true", help="write bench/results/demo-*.csv, the README's numbers"
    )
    parser.add_argument("--threads", type=int, help="default: as many as PyTorch takes")
    args = parser.parse_args()
    if args.quick and args.save:
        parser.error("the README's numbers come from a full run: --save without --quick")

    started = time.perf_counter()
    plan = QUICK if args.quick else FULL
    console = Console(highlight=False)
    if console.width > 100:
        console.width = 100
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()
    backend = ops.choose_backend(None, torch.device("cpu"), torch.float32)
    console.print(
        f"comhe_ext {comhe_ext.__version__}, backend {backend!r}; PyTorch {torch.__version__}, "
        f"Python {platform.python_version()}; {machine()}; threads: {threads}"
    )
    layers = layers_of(network())

    console.rule("1. The regularizer on a real network", align="left")
    console.print(
        f"scikit-learn's digits, {TRAIN_IMAGES} for training and the other "
        f"{IMAGES - TRAIN_IMAGES} for the test; "
        f"{plan.seeds} seeds, {plan.steps} steps of {BATCH}. The three start from the same "
        f"weights and see the same batches; each layer's energy has weight {WEIGHT:g}."
    )
    torch.set_num_threads(1)  # the network is small: more threads wait for each other
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
    costs = measure_costs(plan, threads, console)
    console.print(cost_table(costs))
    console.print(
        f"Threads: {threads}. Time: median of {plan.rounds} rounds, the two taking turns; above "
        f"N = {MOST_ROWS_IN_TURNS} naive runs once. Memory: peak above the input, in a fresh "
        "process. Errors: relative, against float64."
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
    args.out.mkdir(parents=True, exist_ok=True)
    plot_energies(runs, layers, args.out / "energy.png")
    plot_costs(costs, args.out / "cost.png")
    written = [args.out / "energy.png", args.out / "cost.png"]
    if args.save:
        results = ROOT / "bench" / "results"
        written += [results / "demo-cpu.csv", results / "demo-training.csv"]
        save_costs(written[2], costs, backend, threads)
        save_training(written[3], runs, layers, backend)
        readme.update()
        written.append(readme.README)
    for path in written:
        console.print(str(path), soft_wrap=True)
    console.print(f"Done in {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
