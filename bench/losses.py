"""`python -m bench losses`: named losses, nearest rows and cross sets beside what people write.

Value and gradient together. Beside ours stand the formula with the whole matrix of cosines, the
same in row blocks that backward computes again, and what is published or usual for the loss.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import comhe_ext
from bench import compare, machine
from bench.contest import FIGURES, Entry, OutOfTime, hold
from bench.methods import block_rows
from bench.options import Options
from bench.screen import Steps
from bench.store import Table, to_text
from bench.sweep import cache_environment
from bench.truth import Errors
from bench.worker import Call, Job, load_result
from comhe_ext import Laplace, Riesz, losses, testing

TABLE = Table(
    "losses",
    key=(*machine.STAMP, "loss", "shape", "method"),
    values=("date", *FIGURES, "value_error", "gradient_error"),
)

OURS = "comhe_ext"
Value = Callable[..., Tensor]  # of the inputs
Shape = tuple[int, ...]


# --- the formulas ---------------------------------------------------------------------------------

Sets = tuple[Tensor, Tensor, Tensor | None]  # unit rows, unit columns, each row's own column


def among_themselves(x: Tensor) -> Sets:
    unit = normalize(x)
    return unit, unit, torch.arange(len(x), device=x.device)


def classes_of_batch(weight: Tensor, labels: Tensor) -> Sets:
    unit = normalize(weight)
    return unit[labels], unit, labels


def against_columns(x: Tensor, columns: Tensor) -> Sets:
    return normalize(x), normalize(columns), None


@dataclass(frozen=True)
class Formula:
    """A loss by its definition: a function of each row's cosines, and one of what that gave."""

    of_row: Callable[[Tensor], Tensor]  # [n, M] -> [n]
    of_rows: Callable[[Tensor], Tensor] = torch.mean
    own: float = -math.inf  # stands for the cosine of a row with its own column, to leave it out
    sets: Callable[..., Sets] = among_themselves

    def block(self, rows: Tensor, columns: Tensor, own: Tensor | None) -> Tensor:
        cosines = rows @ columns.mT
        if own is not None:
            index = torch.arange(len(rows), device=rows.device)
            cosines.index_put_((index, own), cosines.new_tensor(self.own))
        return self.of_row(cosines)


def dense(formula: Formula, *inputs: Tensor) -> Tensor:
    return formula.of_rows(formula.block(*formula.sets(*inputs)))


class RowBlocks(torch.autograd.Function):
    """What a formula gives for each row, a block at a time; backward computes each again."""

    @staticmethod
    def forward(
        ctx: Any, formula: Formula, rows: Tensor, columns: Tensor, own: Tensor | None
    ) -> Tensor:
        ctx.formula = formula
        ctx.save_for_backward(rows, columns, own)
        values = rows.new_empty(len(rows))
        for part in _parts(rows, columns):
            values[part] = formula.block(rows[part], columns, None if own is None else own[part])
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[None, Tensor, Tensor | None, None]:
        rows, columns, own = ctx.saved_tensors
        columns = columns.detach().requires_grad_(ctx.needs_input_grad[2])
        grad_rows = torch.empty_like(rows)
        for part in _parts(rows, columns):
            block = rows[part].detach().requires_grad_()
            with torch.enable_grad():
                values = ctx.formula.block(block, columns, None if own is None else own[part])
            values.backward(grad_values[part])
            grad_rows[part] = block.grad
        return None, grad_rows, columns.grad, None


def _parts(rows: Tensor, columns: Tensor) -> list[slice]:
    size = block_rows(columns)
    return [slice(begin, begin + size) for begin in range(0, len(rows), size)]


def in_row_blocks(formula: Formula, *inputs: Tensor) -> Tensor:
    return formula.of_rows(RowBlocks.apply(formula, *formula.sets(*inputs)))


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


def uniformity_cdist(x: Tensor) -> Tensor:
    unit, n = normalize(x), len(x)
    potential = torch.cdist(unit, unit).square().mul(-2).exp()
    return ((potential.sum() - potential.trace()) / (n * (n - 1))).log()


def uniformity_keops(x: Tensor) -> Tensor:
    from pykeops.torch import LazyTensor

    unit, n = normalize(x), len(x)
    r2 = LazyTensor(unit[:, None]).sqdist(LazyTensor(unit[None]))
    return (((-2.0 * r2).exp().sum(1).sum() - n) / (n * (n - 1))).log()


def koleo_published(x: Tensor, eps: float = 1e-8) -> Tensor:
    """DINOv2's: the nearest by the matrix of products, then the distance to it alone."""
    unit = normalize(x, eps=eps)
    with torch.no_grad():
        products = unit @ unit.T
        index = products.fill_diagonal_(-1).max(1).indices
    distances = torch.nn.PairwiseDistance(2, eps=eps)(unit, unit[index])
    return -(distances + eps).log().mean()


def minimal_angle_published(w: Tensor) -> Tensor:
    """MMA's own code."""
    unit = normalize(w)
    cosine = unit @ unit.T
    cosine = cosine - 2.0 * torch.diag(torch.diag(cosine))
    return -torch.acos(cosine.max(dim=1)[0].clamp(-0.99999, 0.99999)).mean()


def regular_face_published(w: Tensor) -> Tensor:
    from pytorch_metric_learning.regularizers import RegularFaceRegularizer

    return RegularFaceRegularizer()(w)


def sphereface_plus_cdist(weight: Tensor, labels: Tensor) -> Tensor:
    unit, n = normalize(weight), len(weight)
    own = labels[:, None] == torch.arange(n, device=weight.device)
    r = torch.cdist(unit[labels], unit).masked_fill(own, torch.inf)
    return r.pow(-2).sum() / (len(labels) * (n - 1))


def mean_distance(unit: Tensor, columns: Tensor, index: Tensor) -> Tensor:
    return (unit - columns[index]).norm(dim=1).mean()


def nearest_cdist(x: Tensor) -> Tensor:
    unit = normalize(x)
    with torch.no_grad():
        index = torch.cdist(unit, unit).fill_diagonal_(torch.inf).argmin(1)
    return mean_distance(unit, unit, index)


def nearest_column_cdist(x: Tensor, columns: Tensor) -> Tensor:
    unit, others = normalize(x), normalize(columns)
    with torch.no_grad():
        index = torch.cdist(unit, others).argmin(1)
    return mean_distance(unit, others, index)


def nearest_keops(x: Tensor) -> Tensor:
    """Take the second of the two nearest: the first is the row itself."""
    from pykeops.torch import LazyTensor

    unit = normalize(x)
    rows = unit.detach()
    r2 = LazyTensor(rows[:, None]).sqdist(LazyTensor(rows[None]))
    return mean_distance(unit, unit, r2.argKmin(2, dim=1)[:, 1])


# --- the registry ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """What is compared. The gradient is that of the first input."""

    methods: dict[str, Value]  # ours first
    exact: Value  # in float64
    shapes: Sequence[Shape]
    inputs: Callable[..., tuple[Tensor, ...]]  # of the shape and the device


def one_set(n: int, d: int, device: str) -> tuple[Tensor, ...]:
    return (testing.random_rows(n, d, device=device),)


def batch_and_columns(m: int, n: int, d: int, device: str) -> tuple[Tensor, ...]:
    return testing.random_rows(m + n, d, device=device).split([m, n])


def classes_and_labels(m: int, n: int, d: int, device: str) -> tuple[Tensor, ...]:
    labels = torch.randint(n, (m,), generator=torch.Generator().manual_seed(0))
    return *one_set(n, d, device), labels.to(device)


def two_networks(b: int, n: int, d: int, device: str) -> tuple[Tensor, ...]:
    both = testing.random_rows(2 * b * n, d, device=device).view(2, b, n, d)
    return tuple(both.unbind())


BATCH, MEDIUM, LARGE, HEAD = (256, 128), (4096, 64), (8192, 256), (512, 100_000, 512)


def of_pairs(
    ours: Value,
    formula: Formula,
    shapes: Sequence[Shape] = (BATCH, MEDIUM),
    inputs: Callable[..., tuple[Tensor, ...]] = one_set,
    **others: Value,
) -> Loss:
    exact = partial(in_row_blocks, formula)
    methods: dict[str, Value] = {
        OURS: ours,
        "dense": partial(dense, formula),
        "row-blocks": exact,
        **others,
    }
    return Loss(methods, exact, shapes, inputs)


def of_function(pair: Laplace | Riesz, of_distance: Callable[[Tensor], Tensor]) -> Loss:
    formula = Formula(mean_of_others(lambda c: of_distance(distance(c))))
    return of_pairs(
        partial(comhe_ext.pair_energy, pair=pair),
        formula,
        pdist=partial(by_pdist, lambda r: of_distance(r).mean()),
    )


LOSSES = {
    "uniformity": of_pairs(
        losses.uniformity,
        Formula(mean_of_others(lambda c: (4.0 * c - 4.0).exp()), lambda x: x.mean().log()),
        (BATCH, MEDIUM, LARGE),
        pdist=partial(by_pdist, lambda r: r.pow(2).mul(-2).exp().mean().log()),
        cdist=uniformity_cdist,
        keops=uniformity_keops,
    ),
    "koleo": of_pairs(
        losses.koleo,
        Formula(largest, lambda c: -(distance(c) + 1e-8).log().mean()),
        (BATCH, MEDIUM, LARGE),
        published=koleo_published,
    ),
    "minimal_angle": of_pairs(
        losses.minimal_angle,
        Formula(largest, lambda c: -c.arccos().mean()),
        published=minimal_angle_published,
    ),
    "regular_face": of_pairs(
        losses.regular_face, Formula(largest), published=regular_face_published
    ),
    "nearest": of_pairs(
        lambda x: comhe_ext.nearest(x)[0].mean(),
        Formula(largest, lambda c: distance(c).mean()),
        cdist=nearest_cdist,
        keops=nearest_keops,
    ),
    "nearest column": of_pairs(
        lambda x, columns: comhe_ext.nearest(x, columns)[0].mean(),
        Formula(largest, lambda c: distance(c).mean(), sets=against_columns),
        (HEAD,),
        batch_and_columns,
        cdist=nearest_column_cdist,
    ),
    "sphereface_plus": of_pairs(
        losses.sphereface_plus,
        Formula(mean_of_others(lambda c: (2.0 - 2.0 * c).reciprocal()), sets=classes_of_batch),
        (HEAD,),
        classes_and_labels,
        cdist=sphereface_plus_cdist,
    ),
    "row energies": of_pairs(
        lambda x: comhe_ext.pair_energy(x, reduction="rows").log().mean(),
        Formula(lambda c: (2.0 - 2.0 * c).reciprocal().sum(1), lambda x: x.log().mean()),
    ),
    "frame_potential": of_pairs(
        losses.frame_potential,
        Formula(mean_of_others(torch.square), own=0.0),
        (BATCH, MEDIUM, LARGE),
    ),
    "gram": Loss(
        {OURS: lambda *z: losses.gram(*z).mean(), "dense": gram_matrices},
        gram_matrices,
        ((4, 784, 1024),),
        two_networks,
    ),
    "Laplace": of_function(Laplace(1.0), lambda r: (-r).exp()),
    "Riesz with a shift": of_function(
        Riesz(2.0, shift=1.0), lambda r: (1.0 + r.square()).reciprocal()
    ),
}


# --- the measurement ------------------------------------------------------------------------------


def methods(name: str, shape: Shape) -> list[str]:
    """Name the methods that are measured; KeOps takes half a minute a call at the large shape."""
    return [m for m in LOSSES[name].methods if m != "keops" or shape != LARGE]


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


def truth(name: str, shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    inputs = LOSSES[name].inputs(*shape, device)
    return run(LOSSES[name].exact, [x.double() if x.is_floating_point() else x for x in inputs])


def errors(right: tuple[Tensor, Tensor], found: Sequence[Tensor]) -> Errors:
    value, gradient = (testing.relative_error(a, b) for a, b in zip(found, right, strict=True))
    return Errors(value, gradient)


def measure(options: Options, names: Sequence[str], small: bool = False) -> int:
    """Measure the losses, store each shape once it is complete, and return how many are left."""
    stamp = machine.stamp(options.device, options.threads)
    cases = [(name, shape) for name in names for shape in LOSSES[name].shapes]
    if small:
        cases = [(name, tuple(min(n, 64) for n in LOSSES[name].shapes[0])) for name in names]
    if options.resume:
        cases = [
            (name, shape)
            for name, shape in cases
            if TABLE.lacks(
                options.out, [stamp | _names(name, shape, m) for m in methods(name, shape)]
            )
        ]
    with TemporaryDirectory() as caches, Steps(options.console, len(cases)) as steps:
        for index, (name, shape) in enumerate(cases):
            try:
                rows = _measure_one(name, shape, options, Path(caches), steps)
            except OutOfTime:
                return len(cases) - index
            TABLE.upsert(options.out, [stamp | row for row in rows])
            steps.advance(_summary([stamp | row for row in rows]))
    return 0


def _names(name: str, shape: Shape, method: str) -> dict[str, object]:
    return {"loss": name, "shape": shape_text(shape), "method": method}


def shape_text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _measure_one(
    name: str, shape: Shape, options: Options, caches: Path, steps: Steps
) -> list[dict[str, object]]:
    words = f"{name} {shape}"
    steps.say(f"{words}: float64")
    right = truth(name, shape, options.device)
    found: dict[str, Errors] = {}

    def check(method: str, result: Path) -> str | None:
        found[method] = errors(right, load_result(result))
        return found[method].verdict()

    entries = {}
    for method in methods(name, shape):
        make = partial(make_call, name, shape, method, options.device)
        job = Job(make, options.device, options.threads, cache_environment(caches))
        entries[method] = Entry(job, partial(check, method), compiles=method == "keops")
    outcomes = hold(entries, options.rules, lambda what: steps.say(f"{words} {what}"))
    rows = []
    for method, outcome in outcomes.items():
        row = _names(name, shape, method) | outcome.figures()
        if method in found:
            row["value_error"] = found[method].energy
            row["gradient_error"] = found[method].derivative
        rows.append(row)
    return rows


def _summary(rows: Sequence[dict[str, object]]) -> str:
    texts = [{column: to_text(value) for column, value in row.items()} for row in rows]
    words = []
    for row in texts:
        time = compare.milliseconds(row)
        words.append(f"{row['method']} {row['status'] if time is None else f'{time:.3g} ms'}")
    return f"{texts[0]['loss']} {texts[0]['shape']}: " + ", ".join(words)
