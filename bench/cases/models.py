"""A training step of whole models: without a regularizer, with ours, with one by hand.

The models are the published architectures in plain PyTorch, with random weights and inputs, and the
loss is the mean square of their output: a step's cost does not depend on that.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import comhe_ext
from bench.measure.contest import Entry
from bench.measure.store import Row
from bench.measure.study import Case, Options, Study
from bench.measure.worker import Call, Result
from bench.peers import naive_energy
from comhe_ext.testing.architectures import LlamaBlock, ViT, resnet50


class Model(NamedTuple):
    """A model, and the inputs of one step."""

    label: str
    make: Callable[[], nn.Module]
    batch: dict[str, int]  # by device
    inputs: tuple[int, ...]
    output_layer: str | None = "auto"  # None: it has no head


def digits_network() -> nn.Sequential:
    """Make the demo's network, for images of 8 x 8."""
    conv1, conv2 = (nn.Conv2d(n, m, 3, padding=1, bias=False) for n, m in ((1, 32), (32, 64)))
    norm1, norm2 = nn.BatchNorm2d(32), nn.BatchNorm2d(64)
    hidden, output = nn.Linear(64 * 4 * 4, 128), nn.Linear(128, 10)
    layers = {"conv1": conv1, "norm1": norm1, "relu1": nn.ReLU()}
    layers |= {"conv2": conv2, "norm2": norm2, "relu2": nn.ReLU(), "pool": nn.MaxPool2d(2)}
    layers |= {"flatten": nn.Flatten(), "hidden": hidden, "relu3": nn.ReLU(), "output": output}
    return nn.Sequential(OrderedDict(layers))


def llama_blocks() -> nn.Sequential:
    """Make two blocks of a LLaMA, without embedding and head."""
    return nn.Sequential(*(LlamaBlock(2048, 5504, 16, 16) for _ in range(2)))


IMAGE = (3, 224, 224)
# a processor gets less than a GPU
MODELS = {
    "digits": Model("the demo's network", digits_network, {"cpu": 50, "cuda": 50}, (1, 8, 8)),
    "resnet50": Model("ResNet-50", resnet50, {"cpu": 8, "cuda": 128}, IMAGE),
    "vit-b": Model("ViT-B/16", ViT, {"cpu": 4, "cuda": 64}, IMAGE),
    "llama": Model(
        "2 blocks of LLaMA-1.3B", llama_blocks, {"cpu": 1, "cuda": 8}, (256, 2048), None
    ),
}


class NaiveCoMHE(nn.Module):
    """What `comhe_ext.CoMHE(model, projection)` computes, written by hand."""

    def __init__(self, model: nn.Module, projection: str | None, output_layer: str | None) -> None:
        super().__init__()
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        self.head = self.layers[-1] if output_layer == "auto" else None
        self.first = self.layers[0] if isinstance(self.layers[0], nn.Conv2d) else None
        self.projected = projection == "random"

    def forward(self) -> Tensor:
        total = torch.zeros((), device=self.layers[0].weight.device)
        for layer in self.layers:
            rows = layer.weight.flatten(1)
            if layer is self.head:
                total = total + 10.0 * naive_energy(rows)
            elif self.projected and layer is not self.first and rows.shape[1] > 40:
                projection = torch.randn(20, 40, rows.shape[1], device=rows.device)
                total = total + naive_energy(rows @ projection.mT, half_space=True).mean()
            else:
                total = total + naive_energy(rows, half_space=True)
        return total


# of the model and the name of its output layer
METHODS: dict[str, Callable[..., nn.Module] | None] = {
    "none": None,
    "MHE": partial(comhe_ext.CoMHE, projection=None),
    "RP-CoMHE": partial(comhe_ext.CoMHE, projection="random"),
    "AP-CoMHE": partial(comhe_ext.CoMHE, projection="angle-preserving"),
    "adversarial CoMHE": partial(comhe_ext.CoMHE, projection="adversarial"),
    "group CoMHE": partial(comhe_ext.CoMHE, projection="group"),
    "MHE, naive": partial(NaiveCoMHE, projection=None),
    "RP-CoMHE, naive": partial(NaiveCoMHE, projection="random"),
}


# --- the study ------------------------------------------------------------------------------------


def make_step(name: str, method: str, device: str) -> Call:
    """Make the model and a step of its training, in the process that measures."""
    spec = MODELS[name]
    torch.manual_seed(0)
    model = spec.make().to(device)
    make = METHODS[method]
    regularizer = None if make is None else make(model, output_layer=spec.output_layer)
    inputs = torch.randn(spec.batch[device], *spec.inputs, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> Result:
        loss = model(inputs).square().mean()
        if regularizer is not None:
            loss = loss + regularizer()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return (loss.detach(),)

    return step


def check(result: Result) -> Row:
    return {} if bool(result[0].isfinite()) else {"status": "wrong", "note": "not finite"}


def groups(device: str, quick: bool) -> dict[str, list[Case]]:
    cases = {name: [{"model": name, "batch": m.batch[device]}] for name, m in MODELS.items()}
    return {"digits": cases["digits"]} if quick else cases


def entries(case: Case, options: Options) -> dict[str, Entry]:
    name, device = case["model"], options.device
    return {method: Entry(partial(make_step, name, method, device), check) for method in METHODS}


STUDY = Study(
    *("model", "a training step of whole models, with and without the regularizer", 12),
    key=("model", "batch"),
    groups=groups,
    entries=entries,
    threads=0,
)
