"""A study of what a step of each method costs, beside the same by hand with N x N matrices."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame
from torch import Tensor, nn

from bench.cases.models import NaiveCoMHE
from bench.measure.contest import Entry
from bench.measure.study import Case, Options, Study
from bench.measure.worker import Call, Result
from bench.report import tables
from bench.training.data import CLASSES
from bench.training.methods import METHODS, WITHOUT_WEIGHT, Strength
from bench.training.networks import network
from bench.training.plans import PLANS
from bench.training.runs import Setting

NAIVE = {"half-space MHE, naive": None, "RP-CoMHE, naive": "random"}
TASK = "loss of the task"


def task_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels)


def make_step(setting: Setting, method: str) -> Call:
    """Make the loss of the task or a method's penalty, with its gradient."""
    torch.manual_seed(0)
    model = network(setting.network, setting.size, setting.width)
    images = torch.randn(setting.batch, 3, setting.size, setting.size)
    images = images.contiguous(memory_format=torch.channels_last)  # as they come in training
    labels = torch.randint(CLASSES, (setting.batch,))
    strength = Strength(dim=setting.dim, num_projections=setting.num_projections)
    loss: Callable[[], Any]
    if method == TASK:
        loss = partial(task_loss, model, images, labels)
    elif method in NAIVE:
        loss = NaiveCoMHE(model, NAIVE[method], "auto")
    else:
        loss = METHODS[method](model, strength)

    def step() -> Result:
        model.zero_grad(set_to_none=True)
        loss().backward()
        return ()

    return step


def entries(case: Case, options: Options) -> dict[str, Entry]:
    names = [TASK, *(name for name in METHODS if name not in WITHOUT_WEIGHT), *NAIVE]
    setting = PLANS[case["plan"]].base
    return {name: Entry(partial(make_step, setting, name)) for name in names}


STUDY = Study(
    *("cost", "what a step of each method costs", 1),
    key=("plan",),
    groups=lambda device, quick: {plan: [{"plan": plan}] for plan in PLANS},
    entries=entries,
    devices=("cpu",),
)


def table(folder: Path, plan: str) -> str:
    """Write the newest times of a plan beside the time of the task; nothing if there are none."""
    rows = tables.newest(STUDY.table, folder, "cpu")
    rows = rows[rows.plan == plan]
    if rows.empty:
        return ""
    times = rows.set_index("method").ms
    shown = DataFrame({"a step, ms": times, "of the task's": times / times[TASK]})
    return tables.block(rows, shown.map(tables.number).reset_index())
