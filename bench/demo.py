"""`python -m bench demo`: what the energy does to features, to a network, and to its checkpoints.

Learns features of photos with and without it (`examples/overcomplete_ica.py`), trains a small
network on handwritten digits with and without its compressive form, RP-CoMHE, and measures
checkpoints by the command `comhe-ext energy`. Whether it helps accuracy, `bench/training` asks.
"""

import argparse
import copy
import os
import runpy
import shlex
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from pandas import DataFrame, Series
from rich.progress import track
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import comhe_ext
from bench import ROOT
from bench.cases.models import digits_network
from bench.measure.store import Row
from bench.report.theme import save
from comhe_ext import __main__ as command
from comhe_ext.projections import RandomProjection

METHODS = PLAIN, COMHE = "plain training", "RP-CoMHE"
TRAIN_IMAGES, BATCH = 200, 50
# of each layer; with 1, the default of hidden ones, so short a training hardly moves wide layers
WEIGHT = 10.0
# of copied neurons, in deviations of the weights. The nearer copies are, the further they are
# pushed in a step: with 0.05 they end nearly opposite, with 0.02 training diverges
NOISE = 0.1


def train(model: nn.Module, method: str, seed: int, steps: int) -> tuple[float, list[Row]]:
    """Train, and return the test accuracy in per cent, and records of the energies.

    The seed fixes the split and the batches, whatever the method.
    """
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    options = {"train_size": TRAIN_IMAGES, "stratify": labels, "random_state": seed}
    train_set, test_set = map(torch.from_numpy, train_test_split(np.arange(len(labels)), **options))
    projection, order = RandomProjection(seed=seed), torch.Generator().manual_seed(seed)
    comhe = comhe_ext.CoMHE(model, projection, output_layer="output", weight=WEIGHT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    energies = {0: comhe.energies()}
    for step in range(1, steps + 1):
        batch = train_set[torch.randperm(TRAIN_IMAGES, generator=order)[:BATCH]]
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        if method == COMHE:
            loss = loss + comhe()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps:
            energies[step] = comhe.energies()
    model.eval()
    with torch.no_grad():
        hits = model(images[test_set]).argmax(1) == labels[test_set]
    return 100 * float(hits.float().mean()), [
        {"method": method, "step": step, "layer": layer, **energy._asdict()}
        for step, layers in energies.items()
        for layer, energy in layers.items()
    ]


def widen(model: nn.Module) -> nn.Sequential:
    """Copy each hidden neuron and halve its outgoing weights: the outputs stay (Net2WiderNet).

    Noise lets the copies part, for equal neurons have equal gradients.
    """
    state, generator = model.state_dict(), torch.Generator().manual_seed(0)
    weight = state["hidden.weight"]
    noise = NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
    state["hidden.weight"] = torch.cat([weight, weight + noise])
    state["hidden.bias"] = state["hidden.bias"].repeat(2)
    state["output.weight"] = state["output.weight"].repeat(1, 2) / 2
    wide, neurons = digits_network(), 2 * len(weight)
    wide.hidden, wide.output = nn.Linear(weight.shape[1], neurons), nn.Linear(neurons, 10)
    wide.load_state_dict(state)
    return wide


def save_checkpoint(model: nn.Module, folder: Path, name: str) -> str:
    """Save a state_dict, by safetensors where that is installed, and return the path."""
    if find_spec("safetensors"):
        from safetensors.torch import save_file

        save_file(model.state_dict(), file := folder / f"{name}.safetensors")
    else:
        torch.save(model.state_dict(), file := folder / f"{name}.pt")
    return os.path.relpath(file)


def table(accuracies: DataFrame, history: DataFrame) -> str:
    """Put accuracies and energies, means over the seeds, into lines."""
    first, last = history[history.step == 0], history[history.step == history.step.max()]
    lines = first.groupby("layer")[["random", "lowest"]].mean().T
    lines.loc["before training"] = first.groupby("layer").energy.mean()
    for method in METHODS:
        lines.loc[method] = last[last.method == method].groupby("layer").energy.mean()
    words = {x: f"{accuracies[x].mean():.2f} ± {accuracies[x].std():.2f}" for x in METHODS}
    lines.insert(0, "test accuracy, %", Series(words))
    return str(lines.rename_axis(columns=None).to_string(na_rep="", float_format="{:.4f}".format))


def verdict(accuracies: DataFrame) -> str:
    """Say whether the seeds show a difference in accuracy."""
    test = stats.ttest_rel(accuracies[COMHE], accuracies[PLAIN])
    low, high = test.confidence_interval(0.95)
    found = f"{len(accuracies)} seeds show {'a' if low > 0 or high < 0 else 'no'} difference"
    return f"{found}: {COMHE} gains {low:+.2f} to {high:+.2f} points of accuracy (95% interval)."


def picture(history: DataFrame) -> Figure:
    """Draw the energy of each layer over the steps, mean and deviation over the seeds."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 6), sharex=True)
    for axes, (layer, part) in zip(panels.flat, history.groupby("layer"), strict=True):
        for method in METHODS:
            runs = part[part.method == method].groupby("step").energy
            mean, off = runs.mean(), runs.std()
            (line,) = axes.plot(mean, label=method)
            axes.fill_between(mean.index, mean - off, mean + off, color=line.get_color(), alpha=0.2)
        for level, style in (("random", "--"), ("lowest", ":")):
            axes.axhline(part[level].mean(), color="black", lw=1, linestyle=style, label=level)
        axes.set(title=layer, xlim=(0, history.step.max()))
        axes.ticklabel_format(axis="y", useOffset=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.supxlabel("training step")
    figure.supylabel("energy, half space but for the output")
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few steps: a check")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder; default: out")


def run(args: argparse.Namespace) -> None:
    seeds, steps = (2, 6) if args.quick else (8, 150)
    effort = ["--steps", "3", "--patches", "1000"] if args.quick else []
    torch.set_num_threads(1)  # the network is small: more threads would wait for each other
    args.out.mkdir(parents=True, exist_ok=True)

    print("1. Features of photos: which of 256, in 64 dimensions, become copies of others\n")
    example = runpy.run_path(str(ROOT / "examples" / "overcomplete_ica.py"))
    example["main"]([*effort, "--picture", file := os.path.relpath(args.out / "features.png")])
    print(file)

    print(f"\n2. A network: {TRAIN_IMAGES} of scikit-learn's digits, the others are for the test\n")
    accuracies, records, models = DataFrame(columns=METHODS, dtype=float), [], []
    for seed, method in track([*product(range(seeds), METHODS)], "training"):
        torch.manual_seed(seed)
        models.append(digits_network())
        accuracies.loc[seed, method], found = train(models[-1], method, seed, steps)
        records += found
    history = DataFrame(records)
    print(f"\n{table(accuracies, history)}\n\n{verdict(accuracies)}")
    print("Energies: half space but for the output; random: of random directions; lowest: a bound.")
    (energy,) = save(args.out, {"energy": lambda: picture(history)})
    print(os.path.relpath(energy))

    print(
        f"\n3. Checkpoints of a layer widened by copies (Net2WiderNet, Chen et al., 2016)\n\n"
        f"before: a network from {PLAIN} as above, with a copy of each hidden neuron, noise "
        f"{NOISE:.0%}.\nplain, comhe: {steps} steps of {PLAIN} or of {COMHE} from there.\n"
    )
    before = widen(models[0])
    plain, comhe = copy.deepcopy(before), copy.deepcopy(before)
    hits = [train(x, y, 0, steps)[0] for x, y in zip((plain, comhe), METHODS, strict=True)]
    files, near = [], []
    for name, model in (("before", before), ("plain", plain), ("comhe", comhe)):
        files.append(save_checkpoint(model, args.out, name))
        weight = model.get_parameter("hidden.weight").detach()
        angles = comhe_ext.nearest(weight, angular=True, half_space=True)[0].rad2deg()
        near.append(f"{int((angles < 10).sum())} {name}")
    options = ["--exclude", "norm*", "--exclude", "*.bias"]
    print(f"$ comhe-ext energy {shlex.join(files)} \\\n    {shlex.join(options)}", flush=True)
    command.run(["energy", *files, *options])
    print(
        f"\nHidden neurons within 10 degrees of another or its opposite: {', '.join(near)}.\n"
        f"Test accuracy of this one network: {hits[0]:.1f}% plain, {hits[1]:.1f}% comhe.\n"
        "On your own: comhe-ext energy before.safetensors after.safetensors (or .pt, .bin)"
    )
