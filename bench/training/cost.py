"""What a step of each method costs, beside the same written by hand with N x N matrices."""

import time
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from bench.cases.models import NaiveCoMHE
from bench.training.data import CLASSES
from bench.training.methods import METHODS, Strength
from bench.training.networks import network
from bench.training.runs import Setting

NAIVE = {"half-space MHE, naive": None, "RP-CoMHE, naive": "random"}
WITHOUT = "loss of the task"


def costs(setting: Setting, rounds: int = 7) -> pd.DataFrame:
    """Time the loss of the task and each method's penalty, with their gradients, in turns.

    Milliseconds of processor time on one thread: the median over the rounds.
    """
    torch.manual_seed(0)
    model = network(setting.network, setting.size, setting.width)
    images = torch.randn(setting.batch, 3, setting.size, setting.size)
    images = images.contiguous(memory_format=torch.channels_last)  # as they come in training
    labels = torch.randint(CLASSES, (setting.batch,))

    losses: dict[str, Callable[[], Tensor | None]] = {
        WITHOUT: lambda: torch.nn.functional.cross_entropy(model(images), labels)
    }
    for name, make in METHODS.items():
        losses[name] = make(model, Strength(dim=setting.dim, num_projections=20))
    losses |= {name: NaiveCoMHE(model, kind, "auto") for name, kind in NAIVE.items()}

    def once(loss: Callable[[], Tensor | None]) -> float:
        model.zero_grad(set_to_none=True)
        begin = time.process_time()
        value = loss()
        if value is not None:
            value.backward()
        return 1e3 * (time.process_time() - begin)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [{name: once(loss) for name, loss in losses.items()} for _ in range(rounds + 1)]
    finally:
        torch.set_num_threads(threads)
    times = pd.DataFrame(rows[1:]).median()  # without the first, which loads and allocates
    table = pd.DataFrame({"ms": times, "of the task's": times / times[WITHOUT]})
    known = ~table.index.isin(("none", "norms held"))  # they have no penalty
    return table[known].rename_axis("method").reset_index()
