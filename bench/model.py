"""`python -m bench model`: a training step of whole models, with and without the regularizer.

The models are the published architectures in plain PyTorch, with random weights and inputs: a
step's cost does not depend on them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.table import Table as Screen
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import comhe_ext
from bench import machine
from bench.contest import FIGURES, Entry, OutOfTime, hold
from bench.digits import network
from bench.naive import naive_energy
from bench.options import Options
from bench.screen import Steps, make_table
from bench.store import Table
from bench.worker import Call, Job, load_result
from comhe_ext.projections import ProjectionName
from comhe_ext.testing.architectures import LlamaBlock, ViT, resnet50

TABLE = Table(
    "model",
    key=(*machine.STAMP, "model", "batch", "variant", "written"),
    values=("date", *FIGURES),
)

# --- models ---------------------------------------------------------------------------------------


def llama_blocks(width: int, inner: int, heads: int, depth: int) -> nn.Sequential:
    """Make the blocks of a LLaMA, without embedding and head."""
    return nn.Sequential(*(LlamaBlock(width, inner, heads, heads) for _ in range(depth)))


@dataclass(frozen=True)
class Model:
    """A model, and the inputs of one step."""

    label: str
    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]  # the batch first
    classes: int | None = 1000  # None: without a head, the loss is the square of the output


# a processor gets less of each than a GPU
MODELS = {
    "cpu": {
        "digits": Model("the demo's network", network, (50, 1, 8, 8), 10),
        "resnet50": Model("ResNet-50", resnet50, (8, 3, 224, 224)),
        "vit-b": Model("ViT-B/16", ViT, (4, 3, 224, 224)),
        "llama": Model(
            "2 blocks of LLaMA-1.3B", partial(llama_blocks, 2048, 5504, 16, 2), (1, 256, 2048), None
        ),
    },
    "cuda": {
        "digits": Model("the demo's network", network, (50, 1, 8, 8), 10),
        "resnet50": Model("ResNet-50", resnet50, (128, 3, 224, 224)),
        "vit-b": Model("ViT-B/16", ViT, (64, 3, 224, 224)),
        "llama": Model(
            "4 blocks of LLaMA-7B", partial(llama_blocks, 4096, 11008, 32, 4), (4, 2048, 4096), None
        ),
    },
}

# --- regularizers ---------------------------------------------------------------------------------

# the argument `projection` of CoMHE
VARIANTS: dict[str, ProjectionName | None] = {
    "MHE": None,
    "RP-CoMHE": "random",
    "AP-CoMHE": "angle-preserving",
    "adversarial CoMHE": "adversarial",
    "group CoMHE": "group",
}
NAIVE = ("MHE", "RP-CoMHE")  # those that are a few lines of PyTorch
NONE, OURS, PLAIN = "none", "comhe_ext", "naive"
# (variant, how it is written), the step without a regularizer first
ENTRANTS = [(NONE, NONE), *((v, OURS) for v in VARIANTS), *((v, PLAIN) for v in NAIVE)]


class NaiveCoMHE(nn.Module):
    """What `comhe_ext.CoMHE(model, projection)` computes, written by hand."""

    def __init__(self, model: nn.Module, projection: str | None, output_layer: str | None) -> None:
        super().__init__()
        kinds = nn.Linear | nn.Conv2d
        self.layers = [m for m in model.modules() if isinstance(m, kinds)]
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


def make_call(name: str, variant: str, written: str, device: str) -> Call:
    """Make the model and a step of its training, in the process that measures."""
    spec = MODELS[device][name]
    torch.manual_seed(0)
    model = spec.make().to(device)
    output_layer = None if spec.classes is None else "auto"
    regularizer: nn.Module | None = None
    if written == OURS:
        regularizer = comhe_ext.CoMHE(
            model, projection=VARIANTS[variant], output_layer=output_layer
        )
    elif written == PLAIN:
        regularizer = NaiveCoMHE(model, VARIANTS[variant], output_layer)
    inputs = torch.randn(spec.inputs, device=device)
    labels = torch.zeros(spec.inputs[0], dtype=torch.long, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> tuple[Tensor]:
        outputs = model(inputs)
        loss = outputs.square().mean() if spec.classes is None else cross_entropy(outputs, labels)
        if regularizer is not None:
            loss = loss + regularizer()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return (loss.detach(),)

    return step


# --- measuring ------------------------------------------------------------------------------------


def check(result: Path) -> str | None:
    (loss,) = load_result(result)
    return None if bool(loss.isfinite()) else "the loss is not finite"


def measure(options: Options, models: Sequence[str]) -> int:
    """Measure a step of every model in every way; return how many models are left over."""
    device, threads = options.device, options.threads
    stamp = machine.stamp(device, threads)
    if options.resume:
        models = [
            m for m in models if TABLE.lacks(options.out, [stamp | n for n in _names(m, device)])
        ]
    with Steps(options.console, len(models)) as steps:
        for index, name in enumerate(models):
            entries = {
                " ".join(dict.fromkeys(entrant)): Entry(
                    Job(partial(make_call, name, *entrant, device), device, threads),
                    check,
                    compiles=device == "cuda",
                )
                for entrant in ENTRANTS
            }
            try:
                outcomes = hold(entries, options.rules, partial(_say, steps, name))
            except OutOfTime:
                return len(models) - index
            rows = [
                stamp | names | outcome.figures()
                for names, outcome in zip(_names(name, device), outcomes.values(), strict=True)
            ]
            TABLE.upsert(options.out, rows)
            steps.advance()
            options.console.print(table_of(MODELS[device][name].label, rows))
    return 0


def _say(steps: Steps, model: str, words: str) -> None:
    steps.say(f"{model}: {words}")


def _names(model: str, device: str) -> list[dict[str, object]]:
    batch = MODELS[device][model].inputs[0]
    return [{"model": model, "batch": batch, "variant": v, "written": w} for v, w in ENTRANTS]


def table_of(title: str, rows: Sequence[dict[str, object]]) -> Screen:
    lines = []
    for row in rows:
        time, peak = row["wall_ms"], row["peak_mib"]
        lines.append(
            [
                str(row["variant"]),
                str(row["written"]),
                f"{time:,.0f}" if isinstance(time, float) else str(row["status"]),
                f"{peak:,.0f}" if isinstance(peak, float) else "",
            ]
        )
    return make_table(title, ("", "written", "step, ms", "peak, MiB"), lines)
