"""Named losses, nearest rows and cross sets beside what people write; value and gradient."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

import comhe_ext
from bench.measure.contest import Entry
from bench.measure.errors import errors, judged
from bench.measure.store import Row
from bench.measure.study import Case, Options, Study
from bench.measure.worker import Call, Result
from bench.peers import losses as peers
from bench.peers.losses import Formula, dense, distance, in_row_blocks, largest, mean_of_others
from comhe_ext import Laplace, Riesz, losses, testing

OURS = "comhe_ext"
Value = Callable[..., Tensor]  # of the inputs
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Loss:
    """What is compared. The gradient is that of the first input."""

    methods: dict[str, Value]  # ours first, last the one that is exact in float64
    shapes: Sequence[Shape]
    inputs: Callable[..., tuple[Tensor, ...]]  # of the shape and the device


def one_set(n: int, d: int, device: str) -> tuple[Tensor, ...]:
    return (testing.random_rows(n, d, device=device),)


def classes_and_labels(m: int, n: int, d: int, device: str) -> tuple[Tensor, ...]:
    labels = torch.randint(n, (m,), generator=torch.Generator().manual_seed(0))
    return *one_set(n, d, device), labels.to(device)


def two_networks(b: int, n: int, d: int, device: str) -> tuple[Tensor, ...]:
    both = testing.random_rows(2 * b * n, d, device=device).view(2, b, n, d)
    return tuple(both.unbind())


BATCH, MEDIUM, LARGE, HEAD = (256, 128), (4096, 64), (8192, 256), (512, 100_000, 512)
SMALL, ALL = (BATCH, MEDIUM), (BATCH, MEDIUM, LARGE)


def of_pairs(
    ours: Value,
    formula: Formula,
    shapes: Sequence[Shape] = SMALL,
    inputs: Callable[..., tuple[Tensor, ...]] = one_set,
    **others: Value,
) -> Loss:
    whole, blocks = partial(dense, formula), partial(in_row_blocks, formula)
    return Loss({OURS: ours, "dense": whole, **others, "row-blocks": blocks}, shapes, inputs)


def of_function(pair: Laplace | Riesz, of_distance: Callable[[Tensor], Tensor]) -> Loss:
    formula = Formula(mean_of_others(lambda c: of_distance(distance(c))))
    pdist = partial(peers.by_pdist, lambda r: of_distance(r).mean())
    return of_pairs(partial(comhe_ext.pair_energy, pair=pair), formula, pdist=pdist)


def riesz_2(cosines: Tensor) -> Tensor:
    return (2.0 - 2.0 * cosines).reciprocal()


LOSSES = {
    "uniformity": of_pairs(
        losses.uniformity,
        Formula(mean_of_others(lambda c: (4.0 * c - 4.0).exp()), lambda x: x.mean().log()),
        pdist=partial(peers.by_pdist, lambda r: r.pow(2).mul(-2).exp().mean().log()),
        cdist=peers.uniformity_cdist,
        keops=peers.uniformity_keops,
    ),
    "koleo": of_pairs(
        losses.koleo,
        Formula(largest, lambda c: -(distance(c) + 1e-8).log().mean()),
        ALL,
        published=peers.koleo_published,
    ),
    "minimal_angle": of_pairs(
        losses.minimal_angle,
        Formula(largest, lambda c: -c.arccos().mean()),
        published=peers.minimal_angle_published,
    ),
    "regular_face": of_pairs(
        losses.regular_face, Formula(largest), published=peers.regular_face_published
    ),
    "nearest": of_pairs(
        lambda x: comhe_ext.nearest(x)[0].mean(),
        Formula(largest, lambda c: distance(c).mean()),
        cdist=peers.nearest_cdist,
        keops=peers.nearest_keops,
    ),
    "sphereface_plus": of_pairs(
        losses.sphereface_plus,
        Formula(mean_of_others(riesz_2), sets=peers.classes_of_batch),
        (HEAD,),
        classes_and_labels,
        cdist=peers.sphereface_plus_cdist,
    ),
    "row energies": of_pairs(
        lambda x: comhe_ext.pair_energy(x, reduction="rows").log().mean(),
        Formula(lambda c: riesz_2(c).sum(1), lambda x: x.log().mean()),
    ),
    "frame_potential": of_pairs(
        losses.frame_potential, Formula(mean_of_others(torch.square), own=0.0), ALL
    ),
    "gram": Loss(
        {OURS: lambda *z: losses.gram(*z).mean(), "dense": peers.gram_matrices},
        ((4, 784, 1024),),
        two_networks,
    ),
    "Laplace": of_function(Laplace(1.0), lambda r: (-r).exp()),
    "Riesz with a shift": of_function(Riesz(2.0, shift=1.0), lambda r: (1.0 + r**2).reciprocal()),
}


# --- the study ------------------------------------------------------------------------------------


def run(value: Value, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute the loss, and its gradient with respect to the first input."""
    leaf = inputs[0].detach().requires_grad_()
    loss = value(leaf, *inputs[1:])
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def make_call(name: str, shape: Shape, method: str, device: str) -> Call:
    """Make the inputs, in the process that measures."""
    loss = LOSSES[name]
    inputs = loss.inputs(*shape, device)
    return lambda: run(loss.methods[method], inputs)


@lru_cache(maxsize=1)
def truth(name: str, shape: Shape, device: str) -> Result:
    inputs, exact = LOSSES[name].inputs(*shape, device), list(LOSSES[name].methods.values())[-1]
    return run(exact, [x.double() if x.is_floating_point() else x for x in inputs])


def check(name: str, shape: Shape, device: str, result: Result) -> Row:
    return judged(errors(result, truth(name, shape, device)))


def case_of(name: str, shape: Shape) -> Case:
    return {"loss": name, "shape": "x".join(map(str, shape))}


def parse(text: str) -> Case:
    """Read a loss and the shape of its inputs, as koleo:4096x64."""
    name, _, shape = text.partition(":")
    if name not in LOSSES or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(f"a case must be written LOSS:SHAPE, as koleo:4096x64, got {text!r}")
    return {"loss": name, "shape": shape}


def groups(device: str) -> dict[str, list[Case]]:
    cases = {name: [case_of(name, x) for x in loss.shapes] for name, loss in LOSSES.items()}
    small = {name: tuple(min(n, 64) for n in loss.shapes[0]) for name, loss in LOSSES.items()}
    return cases | {"quick": [case_of(name, shape) for name, shape in small.items()]}


def entries(case: Case, options: Options) -> dict[str, Entry]:
    name, device = case["loss"], options.device
    shape = tuple(map(int, case["shape"].split("x")))
    return {
        method: Entry(
            partial(make_call, name, shape, method, device),
            partial(check, name, shape, device),
            compiles=method == "keops",
        )
        for method in LOSSES[name].methods
        if method != "keops" or not options.quick
    }


STUDY = Study(
    *("losses", "named losses and nearest rows beside what people write"),
    key=("loss", "shape"),
    groups=groups,
    entries=entries,
    form="LOSS:SHAPE",
    parse=parse,
)
