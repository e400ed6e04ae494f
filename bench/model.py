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
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

import comhe_ext
from bench import machine
from bench.contest import FIGURES, Entry, OutOfTime, hold
from bench.digits import network
from bench.naive import naive_energy
from bench.options import Options
from bench.screen import Steps, make_table
from bench.store import Table
from bench.worker import Call, Job, load_result

TABLE = Table(
    "model",
    key=(*machine.STAMP, "model", "batch", "variant", "written"),
    values=("date", *FIGURES),
)

# --- models ---------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """A residual block of ResNet-50: He et al. (2015), the stride on the 3 x 3 convolution."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * inner

        def convolution(i: int, o: int, size: int, stride: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(i, o, size, stride, padding=size // 2, bias=False)
            return [conv, nn.BatchNorm2d(o)]

        self.body = nn.Sequential(
            *convolution(inputs, inner, 1),
            nn.ReLU(inplace=True),
            *convolution(inner, inner, 3, stride),
            nn.ReLU(inplace=True),
            *convolution(inner, outputs, 1),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride))
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    width = 64
    for index, (blocks, inner) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            layers.append(Bottleneck(width, inner, 2 if block == 0 and index > 0 else 1))
            width = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool, bias: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=bias) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        def by_head(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, key, value = (by_head(layer(x)) for layer in (self.query, self.key, self.value))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """LLaMA's feed-forward layer: Touvron et al. (2023)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """A transformer's block, normalization first."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.norm1, self.norm2 = norm(), norm()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT-B/16: Dosovitskiy et al. (2020)."""

    def __init__(
        self, width: int = 768, depth: int = 12, patch: int = 16, image: int = 224
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, width))

        def block() -> Block:
            mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            attention = Attention(width, width // 64, causal=False, bias=True)
            return Block(attention, mlp, lambda: nn.LayerNorm(width))

        self.blocks = nn.Sequential(*(block() for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        return self.head(self.blocks(tokens)[:, 0])


def llama(width: int, inner: int, depth: int) -> nn.Sequential:
    """Blocks of LLaMA without embedding and rotation, which hold no neurons that meet."""

    def block() -> Block:
        attention = Attention(width, width // 128, causal=True, bias=False)
        return Block(attention, GatedMLP(width, inner), lambda: nn.RMSNorm(width))

    return nn.Sequential(*(block() for _ in range(depth)))


@dataclass(frozen=True)
class Model:
    """A model and what a step of it is fed with."""

    label: str
    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]  # the batch first
    classes: int | None = 1000  # None: there is no head, the output is driven to zero


# a processor gets less of each than a GPU
MODELS = {
    "cpu": {
        "digits": Model("the demo's network", network, (50, 1, 8, 8), 10),
        "resnet50": Model("ResNet-50", resnet50, (8, 3, 224, 224)),
        "vit-b": Model("ViT-B/16", VisionTransformer, (4, 3, 224, 224)),
        "llama": Model(
            "2 blocks of LLaMA-1.3B", partial(llama, 2048, 5504, 2), (1, 256, 2048), None
        ),
    },
    "cuda": {
        "digits": Model("the demo's network", network, (50, 1, 8, 8), 10),
        "resnet50": Model("ResNet-50", resnet50, (128, 3, 224, 224)),
        "vit-b": Model("ViT-B/16", VisionTransformer, (64, 3, 224, 224)),
        "llama": Model(
            "4 blocks of LLaMA-7B", partial(llama, 4096, 11008, 4), (4, 2048, 4096), None
        ),
    },
}

# --- regularizers ---------------------------------------------------------------------------------

# the argument `projection` of CoMHE
VARIANTS: dict[str, str | None] = {
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
    """What `comhe_ext.CoMHE(model, projection)` computes, as one would write it by hand."""

    def __init__(self, model: nn.Module, projection: str | None, output_layer: str | None) -> None:
        super().__init__()
        kinds = nn.Linear | nn.Conv2d
        self.layers = [m for m in model.modules() if isinstance(m, kinds)]
        self.head = self.layers[-1] if output_layer == "last" else None
        self.projected = projection == "random"

    def forward(self) -> Tensor:
        total = torch.zeros((), device=self.layers[0].weight.device)
        for layer in self.layers:
            rows = layer.weight.flatten(1)
            if layer is self.head:
                total = total + 10.0 * naive_energy(rows)
            elif self.projected and rows.shape[1] > 40:
                projection = torch.randn(20, 40, rows.shape[1], device=rows.device)
                total = total + naive_energy(rows @ projection.mT, half_space=True).mean()
            else:
                total = total + naive_energy(rows, half_space=True)
        return total


def make_call(name: str, variant: str, written: str, device: str) -> Call:
    """In the process that measures: the model, and a step of its training."""
    spec = MODELS[device][name]
    torch.manual_seed(0)
    model = spec.make().to(device)
    output_layer = None if spec.classes is None else "last"
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
    """A step of every model in every way; the number of models left over at the deadline."""
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
