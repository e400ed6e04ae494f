"""A small convolutional network on scikit-learn's handwritten digits, with and without CoMHE."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import comhe_ext
from bench.cases.models import digits_network
from bench.measure.store import Table
from comhe_ext import bounds
from comhe_ext.kernels.pair_functions import Riesz
from comhe_ext.projections import RandomProjection

METHODS = {"none": "no regularizer", "MHE": "MHE", "RP-CoMHE": "RP-CoMHE"}
TRAIN_IMAGES, BATCH = 200, 50
# of each hidden layer's energy, as of the output layer's: with 1, the default, so short a training
# hardly moves the energy of wide layers
WEIGHT = 10.0
LAYERS = ("conv1", "conv2", "hidden", "output")
FIGURES = [f"{layer}_{when}" for layer in LAYERS for when in ("first", "last")]
TABLE = Table("digits", ("method", "seed"), ("steps", "accuracy", "step_ms", *FIGURES))


class Layer(NamedTuple):
    """The vectors of a layer whose energy is recorded."""

    name: str
    rows: int  # N
    width: int  # d
    pair: Riesz

    def energy(self, model: nn.Module) -> float:
        """Compute the unprojected energy: s = 2, mean over the pairs."""
        weight = model.get_parameter(f"{self.name}.weight").detach().flatten(1)
        return float(comhe_ext.hyperspherical_energy(weight, half_space=self.pair.half_space))

    def levels(self) -> dict[str, float]:
        """Compute the energy of random vectors, and the lowest where vectors reach it."""
        found = {"random": bounds.random_energy(self.rows, self.width, self.pair)}
        most = self.width if self.pair.half_space else self.width + 1
        if self.rows <= most:
            found["optimum"] = bounds.lowest_energy(self.rows, self.width, self.pair)
        return found


def layers() -> list[Layer]:
    weights = {name: digits_network().get_parameter(f"{name}.weight") for name in LAYERS}
    return [
        Layer(name, len(w), w[0].numel(), Riesz(half_space=name != "output"))
        for name, w in weights.items()
    ]


@dataclass
class Run:
    """One training: its final results, and the energies on the way."""

    method: str
    seed: int
    accuracy: float = float("nan")
    seconds: list[float] = field(default_factory=list)
    energies: dict[int, list[float]] = field(default_factory=dict)  # of all layers, by the step


def regularizer(method: str, model: nn.Module, seed: int) -> comhe_ext.CoMHE | None:
    if method == "none":
        return None
    projection = RandomProjection(seed=seed) if method == "RP-CoMHE" else None
    return comhe_ext.CoMHE(model, projection, output_layer="output", weight=WEIGHT)


def train(run: Run, steps: int, steps_between_energies: int) -> Iterator[int]:
    """Train, fill in `run`, and yield the number of each step.

    The seed fixes the split, the first weights and the batches, whatever the method.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16.0).float().unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    options = {"train_size": TRAIN_IMAGES, "stratify": digits.target, "random_state": run.seed}
    train_set, test_set = train_test_split(np.arange(len(labels)), **options)
    torch.manual_seed(run.seed)
    model = digits_network()
    comhe = regularizer(run.method, model, run.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(run.seed)
    batches: list[Tensor] = []
    for step in range(steps):
        if step % steps_between_energies == 0:
            run.energies[step] = [layer.energy(model) for layer in layers()]
        if not batches:
            shuffled = torch.from_numpy(train_set)[torch.randperm(TRAIN_IMAGES, generator=order)]
            batches = list(shuffled.split(BATCH))
        batch = batches.pop()
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        if comhe is not None:
            loss = loss + comhe()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.seconds.append(time.perf_counter() - start)
        schedule.step()
        yield step
    run.energies[steps] = [layer.energy(model) for layer in layers()]
    model.eval()
    with torch.no_grad():
        hits = model(images[test_set]).argmax(1) == labels[test_set]
    run.accuracy = 100.0 * float(hits.float().mean())
