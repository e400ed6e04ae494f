"""`python -m bench demo`: what the energy does to features of photos, and in a real network.

Learns overcomplete features with and without it (`examples/overcomplete_ica.py`). Then trains a
small convolutional network on scikit-learn's handwritten digits without a regularizer, with minimum
hyperspherical energy (MHE) and with its compressive form (RP-CoMHE). Every sentence printed is
computed from the numbers. What the operator costs, `python -m bench sweep` measures.
"""

import argparse
import runpy
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from pandas import DataFrame
from rich.progress import track
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import comhe_ext
from bench import RESULTS, ROOT
from bench.cases.models import digits_network
from bench.measure import machine
from bench.measure.store import Row, Table
from bench.report.theme import save
from comhe_ext import bounds
from comhe_ext.kernels.pair_functions import Riesz
from comhe_ext.projections import RandomProjection

METHODS = {"none": "no regularizer", "MHE": "MHE", "RP-CoMHE": "RP-CoMHE"}
LAYERS = ("conv1", "conv2", "hidden", "output")
TRAIN_IMAGES, BATCH, CONFIDENCE = 200, 50, 0.95
# of each hidden layer's energy, as of the output layer's: with 1, the default, so short a training
# hardly moves the energy of wide layers
WEIGHT = 10.0
FIGURES = [f"{layer}_{when}" for layer in LAYERS for when in ("first", "last")]
TABLE = Table("digits", ("method", "seed"), ("steps", "accuracy", "step_ms", *FIGURES))


# --- training -------------------------------------------------------------------------------------


def energies(model: nn.Module) -> dict[str, float]:
    """Compute the unprojected energy of each layer: s = 2, mean over the pairs."""
    weights = {name: model.get_parameter(f"{name}.weight").detach() for name in LAYERS}
    return {
        name: float(comhe_ext.hyperspherical_energy(w.flatten(1), half_space=name != "output"))
        for name, w in weights.items()
    }


def levels(name: str) -> dict[str, float]:
    """Compute the energy of random vectors, and the lowest where so many vectors reach it."""
    weight, pair = (
        digits_network().get_parameter(f"{name}.weight"),
        Riesz(half_space=name != "output"),
    )
    n, d = len(weight), weight[0].numel()
    found = {"random": bounds.random_energy(n, d, pair)}
    return found | ({"optimum": bounds.lowest_energy(n, d, pair)} if n <= d else {})


def train(method: str, seed: int, steps: int, between: int) -> tuple[Row, DataFrame]:
    """Train, and return the results, and the energies by the step.

    The seed fixes the split, the first weights and the batches, whatever the method.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16.0).float().unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    options = {"train_size": TRAIN_IMAGES, "stratify": digits.target, "random_state": seed}
    train_set, test_set = map(torch.from_numpy, train_test_split(np.arange(len(labels)), **options))
    torch.manual_seed(seed)
    model, comhe = digits_network(), None
    if method != "none":
        projection = RandomProjection(seed=seed) if method == "RP-CoMHE" else None
        comhe = comhe_ext.CoMHE(model, projection, output_layer="output", weight=WEIGHT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order, batches = torch.Generator().manual_seed(seed), list[Tensor]()
    seconds, history = [], {}
    for step in range(steps):
        if step % between == 0:
            history[step] = energies(model)
        if not batches:
            shuffled = train_set[torch.randperm(TRAIN_IMAGES, generator=order)]
            batches = list(shuffled.split(BATCH))
        batch = batches.pop()
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        if comhe is not None:
            loss = loss + comhe()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        schedule.step()
    history[steps] = energies(model)
    model.eval()
    with torch.no_grad():
        hits = model(images[test_set]).argmax(1) == labels[test_set]
    accuracy, step_ms = 100.0 * float(hits.float().mean()), 1e3 * float(np.median(seconds))
    row = {"method": method, "seed": seed, "steps": steps, "accuracy": accuracy, "step_ms": step_ms}
    row |= {f"{x}_first": history[0][x] for x in LAYERS}
    row |= {f"{x}_last": history[steps][x] for x in LAYERS}
    return row, DataFrame(history).T.assign(method=method)


# --- what it shows --------------------------------------------------------------------------------


def tables(rows: DataFrame) -> Iterator[DataFrame]:
    by_method = rows.groupby("method", sort=False)
    accuracies = by_method.accuracy.agg(["mean", "std", "min", "max"]).round(2)
    yield accuracies.assign(**{"step, ms": by_method.step_ms.median().round(1)}).rename(METHODS)
    known = DataFrame({name: levels(name) for name in LAYERS})
    known.loc["before"] = [rows[f"{name}_first"].mean() for name in LAYERS]
    last = by_method[[f"{name}_last" for name in LAYERS]].mean().set_axis(LAYERS, axis=1)
    yield pd.concat([known, last.rename(METHODS)]).round(4)


def sentences(rows: DataFrame) -> Iterator[str]:
    """Put the paired differences of the seeds into sentences, in points of accuracy."""
    accuracies = rows.pivot(index="seed", columns="method", values="accuracy")
    for method in list(METHODS)[1:]:
        differences, count = accuracies[method] - accuracies["none"], len(accuracies)
        low, high = stats.ttest_1samp(differences, 0.0).confidence_interval(CONFIDENCE)
        verdict = f"no difference in accuracy that {count} seeds can show"
        if low > 0 or high < 0:
            verdict = f"{'more' if low > 0 else 'less'} accurate than without a regularizer"
        yield (
            f"{method}: {verdict} ({differences.mean():+.2f} points, {CONFIDENCE:.0%} interval of "
            f"the paired difference {low:+.2f} to {high:+.2f})."
        )


def picture(history: DataFrame) -> Figure:
    """Draw the energy of each layer over the steps, mean and deviation over the seeds."""
    figure, panels = plt.subplots(2, 2, figsize=(10.4, 6.4), sharex=True)
    for axes, layer in zip(panels.flat, LAYERS, strict=True):
        for method, label in METHODS.items():
            runs = history[history.method == method].groupby(level=0)[layer]
            mean, off = runs.mean(), runs.std()
            (line,) = axes.plot(mean, label=label)
            axes.fill_between(mean.index, mean - off, mean + off, color=line.get_color(), alpha=0.2)
        for (label, level), style in zip(levels(layer).items(), ("--", ":"), strict=False):
            axes.axhline(level, color="black", linewidth=0.8, linestyle=style, label=label)
        axes.set_title(f"{layer}, {'full' if layer == 'output' else 'half'} space")
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.legend()
    figure.supxlabel("training step")
    figure.supylabel("energy, mean over pairs")
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few steps: a check")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out", metavar="FOLDER", help="default: out"
    )
    parser.add_argument("--save", action="store_true", help="put the numbers into the documents")


def learn_features(args: argparse.Namespace) -> None:
    """Show which features of photos are copies of others, without a regularizer and with."""
    print(
        "256 features of 8 x 8 patches of two photos, in 64 dimensions. Nothing but a regularizer\n"
        "keeps one from becoming the copy of another.\n"
    )
    example = runpy.run_path(str(ROOT / "examples" / "overcomplete_ica.py"))
    args.out.mkdir(parents=True, exist_ok=True)
    picture = str(args.out / "features.png")
    effort = ["--steps", "3", "--patches", "1000"] if args.quick else []
    example["main"]([*effort, "--picture", picture])
    print(picture, end="\n\n")


def run(args: argparse.Namespace) -> None:
    seeds, steps, between = (2, 6, 3) if args.quick else (6, 150, 10)
    torch.set_num_threads(1)  # the network is small: more threads would wait for each other
    learn_features(args)
    print(
        f"scikit-learn's digits, {TRAIN_IMAGES} for training and the others for the test; {seeds} "
        f"seeds, {steps} steps of {BATCH}.\nThe three start from the same weights and see the same "
        f"batches; each layer's energy has weight {WEIGHT:g}.\n"
    )
    runs = [(method, seed) for seed in range(seeds) for method in METHODS]
    found = [train(*run, steps, between) for run in track(runs, "training")]
    rows, history = DataFrame([row for row, _ in found]), pd.concat([h for _, h in found])
    for title, table in zip(("Test accuracy, %", "Energies"), tables(rows), strict=True):
        print(f"\n{title}\n{table.to_string(na_rep='-')}")
    print(
        "\nEnergies: s = 2, mean over pairs and seeds; half space, but for the output. Optimum:\n"
        "the regular simplex, in half space orthogonal vectors; - where more rows do not fit.\n"
        "Step: median, on one thread.\n"
    )
    print(*sentences(rows), *save(args.out, {"energy": lambda: picture(history)}), sep="\n")
    if args.save:
        stamp = machine.stamp("cpu", 1)
        TABLE.upsert(RESULTS, [{**stamp, **row} for row, _ in found])
