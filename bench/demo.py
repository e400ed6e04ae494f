"""`python -m bench demo`: the regularizer on a real network.

Trains a small convolutional network on scikit-learn's handwritten digits without a regularizer,
with minimum hyperspherical energy (MHE) and with its compressive form (RP-CoMHE). Every sentence
printed is computed from the numbers. What the operator costs, `python -m bench sweep` measures.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from pandas import DataFrame
from rich.progress import track
from scipy import stats

from bench import RESULTS, ROOT
from bench.cases.digits import (
    BATCH,
    LAYERS,
    METHODS,
    TABLE,
    TRAIN_IMAGES,
    WEIGHT,
    Run,
    layers,
    train,
)
from bench.measure import machine
from bench.measure.store import Row
from bench.report import pages
from bench.report.theme import Theme, name_line, part_names, save

CONFIDENCE = 0.95
IMAGES = 1797


def history(runs: Sequence[Run], method: str) -> np.ndarray:
    """Collect the energies of a method, [seeds, times, layers]."""
    return np.array([list(run.energies.values()) for run in runs if run.method == method])


def tables(runs: Sequence[Run]) -> Iterator[DataFrame]:
    frame = DataFrame([{"": METHODS[r.method], "test accuracy, %": r.accuracy} for r in runs])
    results = frame.groupby("", sort=False).agg(["mean", "std", "min", "max"]).round(2)
    steps = [1e3 * np.median([r.seconds for r in runs if r.method == m]) for m in METHODS]
    yield results.assign(**{"step, ms": np.round(steps, 1)})
    rows = []
    for index, layer in enumerate(layers()):
        levels = layer.levels()
        row = {"layer": layer.name, "N x d": f"{layer.rows} x {layer.width}", **levels}
        row["before"] = history(runs, "none")[:, 0, index].mean()
        row |= {name: history(runs, m)[:, -1, index].mean() for m, name in METHODS.items()}
        rows.append(row)
    yield DataFrame(rows).set_index("layer").round(4)


def sentences(runs: Sequence[Run]) -> Iterator[str]:
    def accuracies(method: str) -> np.ndarray:
        return np.array([run.accuracy for run in runs if run.method == method])

    before = history(runs, "none")[:, -1].mean(0)
    for method in ("MHE", "RP-CoMHE"):
        yield f"{method}: {compare_accuracy(accuracies(method) - accuracies('none'))}"
        lower = [
            x
            for x, less in zip(LAYERS, history(runs, method)[:, -1].mean(0) < before, strict=True)
            if less
        ]
        names = f" ({', '.join(lower)})" if lower else ""
        count = f"{len(lower)} of {len(LAYERS)} layers{names}"
        yield f"{method}: ends with less energy than without a regularizer in {count}."


def compare_accuracy(differences: np.ndarray) -> str:
    """Put the paired differences of the seeds into a sentence, in points of accuracy."""
    mean, count = float(differences.mean()), len(differences)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * stats.sem(differences))
    low, high = mean - reach, mean + reach
    verdict = f"no difference in accuracy that {count} seeds can show"
    if low > 0 or high < 0:
        verdict = f"{'more' if low > 0 else 'less'} accurate than without a regularizer"
    return (
        f"{verdict} ({mean:+.2f} points, {CONFIDENCE:.0%} interval of the paired difference "
        f"{low:+.2f} to {high:+.2f})."
    )


def energies(theme: Theme, runs: Sequence[Run]) -> Figure:
    """Draw the energy of each layer over the steps, mean and deviation over the seeds."""
    figure, panels = plt.subplots(2, 2, figsize=(10.4, 6.4), sharex=True)
    colors = {"none": theme.faint, "MHE": theme.blue, "RP-CoMHE": theme.orange}
    steps = list(runs[0].energies)
    for index, (axes, layer) in enumerate(zip(panels.flat, layers(), strict=True)):
        names = []
        for method, color in colors.items():
            values = history(runs, method)[:, :, index]
            mean, off = values.mean(0), values.std(0, ddof=1)
            axes.plot(steps, mean, color=color, linewidth=1.8)
            axes.fill_between(steps, mean - off, mean + off, color=color, alpha=0.15, linewidth=0)
            names.append(name_line(axes, steps[-1], mean[-1], METHODS[method], color, "right"))
        for label, level in layer.levels().items():
            axes.axhline(level, color=theme.ink, linewidth=0.8, linestyle=(0, (4, 3)))
            names.append(name_line(axes, steps[-1], level, label, theme.ink, "right"))
        kind = "half space" if layer.pair.half_space else "full space"
        axes.set_title(f"{layer.name}: {layer.rows} vectors of {layer.width}, {kind}", fontsize=10)
        axes.set_xlim(0, steps[-1])
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(visible=False)
        figure.subplots_adjust(left=0.09, right=0.87, top=0.95, bottom=0.08, wspace=0.8)
        part_names(figure, names)
    for axes in panels[-1]:
        axes.set_xlabel("training step")
    for axes in panels[:, 0]:
        axes.set_ylabel("energy, mean over pairs")
    return figure


def results(runs: Sequence[Run]) -> Iterator[Row]:
    for run in runs:
        first, *_, last = run.energies.values()
        yield {
            **machine.stamp("cpu", 1),
            **{"method": run.method, "seed": run.seed, "steps": len(run.seconds)},
            **{"accuracy": run.accuracy, "step_ms": 1e3 * float(np.median(run.seconds))},
            **{f"{x}_first": energy for x, energy in zip(LAYERS, first, strict=True)},
            **{f"{x}_last": energy for x, energy in zip(LAYERS, last, strict=True)},
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few steps: a check")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "out",
        metavar="FOLDER",
        help="of its picture; default out",
    )
    parser.add_argument("--save", action="store_true", help="put the numbers into the documents")


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    seeds, steps, between = (2, 6, 3) if args.quick else (6, 150, 10)
    torch.set_num_threads(1)  # the network is small: more threads would wait for each other
    print(
        f"scikit-learn's digits, {TRAIN_IMAGES} for training and the other "
        f"{IMAGES - TRAIN_IMAGES} for the test; {seeds} seeds, {steps} steps of {BATCH}.\n"
        "The three start from the same weights and see the same batches; each layer's energy has "
        f"weight {WEIGHT:g}.\n"
    )
    runs = [Run(method, seed) for seed in range(seeds) for method in METHODS]
    for one in track(runs, "training"):
        for _ in train(one, steps, between):
            pass
    for table in tables(runs):
        print(f"\n{table.to_string(na_rep='-')}")
    print(
        "\nEnergies: s = 2, mean over pairs and seeds; half space, but for the output. Optimum:\n"
        "the regular simplex, in half space orthogonal vectors; - where more rows do not fit.\n"
        "Step: median, on one thread.\n"
    )
    print(*sentences(runs), sep="\n")
    written = save(args.out, {"energy": lambda theme: energies(theme, runs)})
    if args.save:
        TABLE.upsert(RESULTS, results(runs))
        pages.update(RESULTS)
        written.append(TABLE.path(RESULTS))
    print(*written, f"Done in {time.perf_counter() - started:.0f} s.", sep="\n")
    return 0
