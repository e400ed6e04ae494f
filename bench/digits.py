"""A small convolutional network on scikit-learn's handwritten digits, with and without CoMHE."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import comhe_ext
from bench import machine
from bench.store import Table
from comhe_ext.projections import RandomProjection

LAYERS = ("conv1", "conv2", "hidden", "output")
TABLE = Table(
    "training",
    key=(*machine.STAMP, "method", "seed"),
    values=(
        *("date", "steps", "accuracy", "step_ms"),
        *(f"{layer}_{when}" for layer in LAYERS for when in ("first", "last")),
    ),
)

METHODS = {"none": "no regularizer", "MHE": "MHE", "RP-CoMHE": "RP-CoMHE"}
IMAGES = 1797
TRAIN_IMAGES = 200
BATCH = 50
DIM = 40
# of each hidden layer's energy, as of the output layer's: with 1, the default, so short a training
# hardly moves the energy of wide layers
WEIGHT = 10.0


class Layer(NamedTuple):
    """The vectors of a layer whose energy is recorded."""

    name: str
    rows: int  # N
    width: int  # d
    half_space: bool

    def energy(self, model: nn.Module) -> float:
        """Compute the unprojected energy: s = 2, mean over the pairs."""
        weight = model.get_parameter(f"{self.name}.weight").detach().flatten(1)
        return float(comhe_ext.hyperspherical_energy(weight, half_space=self.half_space))

    def random(self) -> float:
        """Compute the expected energy of uniform random directions, s = 2.

        c has (1 + c)/2 ~ Beta(a, a), a = (d-1)/2, so E[1/(2-2c)] = (d-2)/(2(d-3)) and
        E[1/(1-c^2)] = (d-2)/(d-3). Half space: pairs of rows meet four times in two such sums,
        each row meets its antipode once at f = 1/4.
        """
        n, d = self.rows, self.width
        ratio = (d - 2) / (d - 3)
        return ((n - 1) * ratio + 0.25) / (2 * n - 1) if self.half_space else ratio / 2

    def optimum(self) -> float | None:
        """Compute the lowest energy where it is known: of the simplex, in half space of N axes."""
        n, d = self.rows, self.width
        if self.half_space:
            return (n - 1 + 0.25) / (2 * n - 1) if n <= d else None
        return (n - 1) / (2 * n) if n <= d + 1 else None


@dataclass
class Run:
    """One training: its final results, and the energies on the way."""

    method: str
    seed: int
    accuracy: float = math.nan
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    energies: list[list[float]] = field(
        default_factory=list
    )  # one list of all layers for each time


def network() -> nn.Sequential:
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(1, 32, 3, padding=1, bias=False))
    model.add_module("norm1", nn.BatchNorm2d(32))
    model.add_module("relu1", nn.ReLU())
    model.add_module("conv2", nn.Conv2d(32, 64, 3, padding=1, bias=False))
    model.add_module("norm2", nn.BatchNorm2d(64))
    model.add_module("relu2", nn.ReLU())
    model.add_module("pool", nn.MaxPool2d(2))
    model.add_module("flatten", nn.Flatten())
    model.add_module("hidden", nn.Linear(64 * 4 * 4, 128))
    model.add_module("relu3", nn.ReLU())
    model.add_module("output", nn.Linear(128, 10))
    return model


def layers_of(model: nn.Module) -> list[Layer]:
    weights = [(name, m.weight) for name, m in model.named_modules() if hasattr(m, "weight")]
    sizes = [(name, w.shape[0], w[0].numel()) for name, w in weights if w.dim() > 1]
    return [Layer(name, n, d, half_space=name != "output") for name, n, d in sizes]


def regularizer(method: str, model: nn.Module, seed: int) -> comhe_ext.CoMHE | None:
    if method == "none":
        return None
    if method == "MHE":
        return comhe_ext.CoMHE(model, None, output_layer="output", weight=WEIGHT)
    projection = RandomProjection(dim=DIM, seed=seed)
    return comhe_ext.CoMHE(model, projection, output_layer="output", weight=WEIGHT)


def train(run: Run, steps: int, steps_between_energies: int) -> Iterator[int]:
    """Train, fill in `run`, and yield the number of each step.

    The seed fixes the split, the first weights and the batches, whatever the method.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16.0).float().unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train_set, test_set = train_test_split(
        np.arange(len(labels)),
        train_size=TRAIN_IMAGES,
        stratify=digits.target,
        random_state=run.seed,
    )
    torch.manual_seed(run.seed)
    model = network()
    comhe = regularizer(run.method, model, run.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    layers = layers_of(model)
    order = torch.Generator().manual_seed(run.seed)
    batches: list[Tensor] = []
    for step in range(steps):
        if step % steps_between_energies == 0:
            run.steps.append(step)
            run.energies.append([layer.energy(model) for layer in layers])
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
    run.steps.append(steps)
    run.energies.append([layer.energy(model) for layer in layers])
    model.eval()
    with torch.no_grad():
        hits = model(images[test_set]).argmax(1) == labels[test_set]
    run.accuracy = 100.0 * float(hits.float().mean())


def of_method(runs: Sequence[Run], method: str) -> list[Run]:
    return [run for run in runs if run.method == method]


def step_milliseconds(runs: Sequence[Run], method: str) -> float:
    return 1e3 * statistics.median(t for run in of_method(runs, method) for t in run.seconds)


def energy_history(runs: Sequence[Run], method: str) -> np.ndarray:
    """Collect the energies of a method, [seeds, times, layers]."""
    return np.array([run.energies for run in of_method(runs, method)])
