"""One training: its settings, its loop, and the line that it writes an epoch."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn

from bench.training import data
from bench.training.methods import METHODS, WITHOUT_WEIGHT, Penalty, Strength
from bench.training.networks import network
from comhe_ext import CoMHE


@dataclass(frozen=True)
class Setting:
    """All that a run depends on, but the images. `name` tells the runs of a plan apart."""

    method: str = "none"
    seed: int = 1
    weight: float = 0.0
    output_weight: float = 0.0
    lr: float = 0.1
    weight_decay: float = 5e-4
    network: str = "small"
    width: int = 64
    size: int = 16
    per_class: int = 40
    validation: int = 5000
    epochs: int = 25
    batch: int = 128
    schedule: str = "one-cycle"
    label_smoothing: float = 0.0
    dim: int = 40
    num_projections: int = 20
    sums: str = "exact"
    evaluate_every: int = 5
    test: bool = True

    @property
    def name(self) -> str:
        """Say the values in which this differs from a setting of defaults, the method first."""
        words, usual = [self.method.replace(" ", "-").replace(",", "")], Setting()
        for name, value in asdict(self).items():
            if name not in ("method", "seed") and value != getattr(usual, name):
                words.append(f"{name}={value}" if isinstance(value, str) else f"{name}={value:g}")
        return "_".join([*words, f"seed={self.seed}"])

    def check(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}, one of {sorted(METHODS)}")
        if self.method in WITHOUT_WEIGHT and (self.weight or self.output_weight):
            raise ValueError(f"{self.method!r} has no weight")


@dataclass
class State:
    """What a run has come to: all of it goes into a checkpoint."""

    model: nn.Sequential
    penalty: Penalty
    optimizer: torch.optim.SGD
    schedule: torch.optim.lr_scheduler.LRScheduler
    draws: Generator  # of batches and augmentation
    epoch: int = 0

    PARTS = ("model", "penalty", "optimizer", "schedule")

    def save(self, file: Path) -> None:
        content = {part: getattr(self, part).state_dict() for part in self.PARTS}
        content |= {"draws": self.draws.get_state(), "epoch": self.epoch}
        beside = file.with_suffix(".tmp")
        torch.save(content, beside)
        os.replace(beside, file)  # a checkpoint is there whole or not at all

    def load(self, file: Path) -> None:
        # to the memory of the processor: the state of the draws has to be there
        content = torch.load(file, weights_only=True, map_location="cpu")
        for part in self.PARTS:
            getattr(self, part).load_state_dict(content[part])
        self.draws.set_state(content["draws"])
        self.epoch = content["epoch"]


def start(setting: Setting, steps: int, device: str = "cpu") -> State:
    """Build the state before the first step; the seed alone decides the network's first weights."""
    torch.manual_seed(setting.seed)
    model = network(setting.network, setting.size, setting.width).to(device)
    penalty = METHODS[setting.method](
        model,
        Strength(
            setting.weight,
            setting.output_weight,
            setting.dim,
            setting.num_projections,
            setting.sums,  # type: ignore[arg-type]
            setting.seed,
        ),
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=setting.lr, momentum=0.9, weight_decay=setting.weight_decay
    )
    draws = Generator().manual_seed(setting.seed)
    return State(model, penalty, optimizer, _schedule(setting, optimizer, steps), draws)


def _schedule(
    setting: Setting, optimizer: torch.optim.SGD, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if setting.schedule == "one-cycle":
        # PyTorch's, but for the momentum, which stays
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, setting.lr, total_steps=steps, cycle_momentum=False
        )
    if setting.schedule == "steps":  # a tenth at 30,000, 50,000 and 65,000 of 75,000 iterations
        milestones = [round(steps * share) for share in (0.4, 2 / 3, 13 / 15)]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)
    raise ValueError(f"unknown schedule {setting.schedule!r}: 'one-cycle' or 'steps'")


def train(
    setting: Setting,
    images: Callable[[], tuple[data.Images, data.Images]],
    folder: Path,
    after_epoch: Callable[[dict[str, Any]], None] = lambda line: None,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Train to the end, from where an earlier call was interrupted; return the lines of all epochs.

    `folder` gets the file `<name>.jsonl`, a line an epoch, and while the run goes on `<name>.pt`.
    A finished run is read, not repeated.
    """
    setting.check()
    lines_file, checkpoint = folder / f"{setting.name}.jsonl", folder / f"{setting.name}.pt"
    lines = read_lines(lines_file)
    if len(lines) >= setting.epochs:
        checkpoint.unlink(missing_ok=True)
        return lines
    split = data.split(*images(), setting.per_class, setting.validation, setting.seed).to(device)
    state = start(setting, setting.epochs * _batches(setting, split), device)
    if checkpoint.exists():
        state.load(checkpoint)
    # a line without its checkpoint is of an epoch that will be trained again
    lines = lines[: state.epoch]
    folder.mkdir(parents=True, exist_ok=True)
    for line in _epochs(setting, state, split):
        lines.append(line)
        beside = lines_file.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
        os.replace(beside, lines_file)
        state.save(checkpoint)
        after_epoch(line)
    checkpoint.unlink(missing_ok=True)
    return lines


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _batches(setting: Setting, split: data.Split) -> int:
    # the last, smaller batch of an epoch is left out: its statistics are noisier
    return max(len(split.train) // setting.batch, 1)


def _clock(device: torch.device) -> float:
    """Read the clock when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _epochs(setting: Setting, state: State, split: data.Split) -> Iterator[dict[str, Any]]:
    """Train epoch by epoch, and yield the line of each."""
    n, batches = len(split.train), _batches(setting, split)
    device = split.train.pixels.device
    # looks at all layers alike, whatever the method: half space where hidden, full at the output
    view = CoMHE(state.model, None, output_layer="output")
    while state.epoch < setting.epochs:
        state.model.train()
        order = torch.randperm(n, generator=state.draws)
        loss_sum, hits, seen, step_seconds, penalty_seconds = 0.0, 0, 0, 0.0, 0.0
        for index in order[: batches * setting.batch].split(setting.batch):
            x = data.normalized(data.augmented(split.train.pixels[index], state.draws))
            y = split.train.labels[index]
            begin = _clock(device)
            state.optimizer.zero_grad()
            logits = state.model(x)
            loss = nn.functional.cross_entropy(logits, y, label_smoothing=setting.label_smoothing)
            loss.backward()
            before = _clock(device)
            penalty = state.penalty()
            if penalty is not None:
                penalty.backward()
            after = _clock(device)
            state.optimizer.step()
            stepped = _clock(device)
            state.penalty.after_step()
            end = _clock(device)
            state.schedule.step()
            step_seconds += end - begin
            penalty_seconds += after - before + end - stepped
            loss_sum += float(loss.detach()) * len(index)
            hits += int((logits.detach().argmax(1) == y).sum())
            seen += len(index)
        state.epoch += 1
        line: dict[str, Any] = {
            **asdict(setting),
            "epoch": state.epoch,
            "loss": loss_sum / seen,
            "train_error": 100.0 * (1 - hits / seen),
            "step_ms": 1e3 * step_seconds / batches,
            "penalty_ms": 1e3 * penalty_seconds / batches,
        }
        last = state.epoch == setting.epochs
        if last or state.epoch % setting.evaluate_every == 0:
            if len(split.validation):
                line["validation_error"] = error(state.model, split.validation)
            if setting.test:
                line["test_error"] = error(state.model, split.test)
            line["energies"] = {
                layer: round(float(energy.energy), 6) for layer, energy in view.energies().items()
            }
            line["norms"] = {
                layer: round(float(w.detach().norm(dim=1).mean()), 4)
                for layer, w in state.penalty.weights().items()
            }
        if not math.isfinite(line["loss"]):
            line["loss"] = None  # JSON has no NaN: the run went astray
        yield line


@torch.no_grad()
def error(model: nn.Module, images: data.Images, batch: int = 1000) -> float:
    """Compute the classification error in %, in evaluation mode."""
    model.eval()
    hits = sum(
        int((model(data.normalized(x)).argmax(1) == y).sum())
        for x, y in zip(images.pixels.split(batch), images.labels.split(batch), strict=True)
    )
    return 100.0 * (1.0 - hits / len(images))
