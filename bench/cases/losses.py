"""Named losses, nearest rows and cross sets beside what people write; value and gradient.

Beside ours stand the formula with the whole matrix of cosines, the same in row blocks that backward
computes again, and what is published or usual for the loss.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

import comhe_ext
from bench.measure.contest import Entry, errors, judged
from bench.measure.store import Row
from bench.measure.study import Case, Options, Study
from bench.measure.worker import Call, Result
from bench.peers import block_rows
from comhe_ext import Laplace, losses, testing

# --- the formulas ---------------------------------------------------------------------------------

Sets = tuple[Tensor, Tensor, Tensor]  # unit rows, unit columns, each row's own column


def among_themselves(x: Tensor) -> Sets:
    unit = normalize(x)
    return unit, unit, torch.arange(len(x), device=x.device)


def classes_of_batch(weight: Tensor, labels: Tensor) -> Sets:
    unit = normalize(weight)
    return unit[labels], unit, labels


class Formula(NamedTuple):
    """A loss by its definition: a function of each row's cosines, and one of what that gave."""

    of_row: Callable[[Tensor], Tensor]  # [n, M] -> [n]
    of_rows: Callable[[Tensor], Tensor] = torch.mean
    own: float = -math.inf  # stands for the cosine of a row with its own column, to leave it out
    sets: Callable[..., Sets] = among_themselves

    def block(self, rows: Tensor, columns: Tensor, own: Tensor) -> Tensor:
        cosines, index = rows @ columns.mT, torch.arange(len(rows), device=rows.device)
        cosines.index_put_((index, own), cosines.new_tensor(self.own))
        return self.of_row(cosines)


def dense(formula: Formula, *inputs: Tensor) -> Tensor:
    return formula.of_rows(formula.block(*formula.sets(*inputs)))


def in_row_blocks(formula: Formula, *inputs: Tensor) -> Tensor:
    """Compute a formula a block of rows at a time, each again in backward instead of kept."""
    rows, columns, own = formula.sets(*inputs)
    size = block_rows(columns)
    values = [
        checkpoint(formula.block, block, columns, index, use_reentrant=False)
        for block, index in zip(rows.split(size), own.split(size), strict=True)
    ]
    return formula.of_rows(torch.cat(values))


def mean_of_others(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make the mean over the other columns of a function of the cosine, 0 at minus infinity."""
    return lambda cosines: function(cosines).sum(1) / (cosines.shape[1] - 1)


def largest(cosines: Tensor) -> Tensor:
    return cosines.max(1).values


def distance(cosines: Tensor) -> Tensor:
    return (2.0 - 2.0 * cosines).sqrt()


def gram_matrices(student: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = normalize(student, dim=-1), normalize(teacher, dim=-1)
    return (ours @ ours.mT - theirs @ theirs.mT).square().mean()


# --- what is published or usual -------------------------------------------------------------------


def by_pdist(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(torch.nn.functional.pdist(normalize(x)))


def koleo_published(x: Tensor, eps: float = 1e-8) -> Tensor:
    """DINOv2's: the nearest by the matrix of products, then the distance to it alone."""
    unit = normalize(x, eps=eps)
    with torch.no_grad():
        products = unit @ unit.T
        index = products.fill_diagonal_(-1).max(1).indices
    distances = torch.nn.PairwiseDistance(2, eps=eps)(unit, unit[index])
    return -(distances + eps).log().mean()


# --- what is compared -----------------------------------------------------------------------------

OURS = "comhe_ext"
METHODS = (OURS, "dense", "row-blocks", "pdist", "published")
Value = Callable[..., Tensor]  # of the inputs
Shape = tuple[int, ...]


class Loss(NamedTuple):
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
    return tuple(testing.random_rows(2 * b * n, d, device=device).view(2, b, n, d).unbind())


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


def riesz_2(cosines: Tensor) -> Tensor:
    return (2.0 - 2.0 * cosines).reciprocal()


LOSSES = {
    "uniformity": of_pairs(
        losses.uniformity,
        Formula(mean_of_others(lambda c: (4.0 * c - 4.0).exp()), lambda x: x.mean().log()),
        pdist=partial(by_pdist, lambda r: r.pow(2).mul(-2).exp().mean().log()),
    ),
    "koleo": of_pairs(
        losses.koleo,
        Formula(largest, lambda c: -(distance(c) + 1e-8).log().mean()),
        ALL,
        published=koleo_published,
    ),
    "nearest": of_pairs(
        lambda x: comhe_ext.nearest(x)[0].mean(),
        Formula(largest, lambda c: distance(c).mean()),
    ),
    "sphereface_plus": of_pairs(
        losses.sphereface_plus,
        Formula(mean_of_others(riesz_2), sets=classes_of_batch),
        (HEAD,),
        classes_and_labels,
    ),
    "row energies": of_pairs(
        lambda x: comhe_ext.pair_energy(x, reduction="rows").log().mean(),
        Formula(lambda c: riesz_2(c).sum(1), lambda x: x.log().mean()),
    ),
    "frame_potential": of_pairs(
        losses.frame_potential, Formula(mean_of_others(torch.square), own=0.0), ALL
    ),
    "gram": Loss(
        {OURS: lambda *z: losses.gram(*z).mean(), "dense": gram_matrices},
        ((4, 784, 1024),),
        two_networks,
    ),
    "Laplace": of_pairs(
        partial(comhe_ext.pair_energy, pair=Laplace(1.0)),
        Formula(mean_of_others(lambda c: (-distance(c)).exp())),
        pdist=partial(by_pdist, lambda r: (-r).exp().mean()),
    ),
}


# --- the study ------------------------------------------------------------------------------------


def run(value: Value, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute the loss, and its gradient with respect to the first input."""
    leaf = inputs[0].detach().requires_grad_()
    loss = value(leaf, *inputs[1:])
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def make_call(method: str, name: str, shape: Shape, device: str) -> Call:
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


def groups(device: str, quick: bool) -> dict[str, list[Case]]:
    shapes = {name: loss.shapes for name, loss in LOSSES.items()}
    if quick:
        shapes = {name: [tuple(min(n, 64) for n in some[0])] for name, some in shapes.items()}
    return {
        name: [{"loss": name, "shape": "x".join(map(str, shape))} for shape in some]
        for name, some in shapes.items()
    }


def entries(case: Case, options: Options) -> dict[str, Entry]:
    shape = tuple(map(int, case["shape"].split("x")))
    place = case["loss"], shape, options.device
    checked = partial(check, *place)
    methods = LOSSES[case["loss"]].methods
    return {method: Entry(partial(make_call, method, *place), checked) for method in methods}


STUDY = Study(
    *("losses", "named losses and nearest rows beside what people write", 3),
    key=("loss", "shape"),
    groups=groups,
    entries=entries,
)
