"""The losses of other papers as people write them: by their formulas, and as they are published.

Beside ours stand the formula with the whole matrix of cosines, the same in row blocks that backward
computes again, and what is published or usual for the loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.peers.energies import block_rows

# --- the formulas ---------------------------------------------------------------------------------

Sets = tuple[Tensor, Tensor, Tensor]  # unit rows, unit columns, each row's own column


def among_themselves(x: Tensor) -> Sets:
    unit = normalize(x)
    return unit, unit, torch.arange(len(x), device=x.device)


def classes_of_batch(weight: Tensor, labels: Tensor) -> Sets:
    unit = normalize(weight)
    return unit[labels], unit, labels


@dataclass(frozen=True)
class Formula:
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


class RowBlocks(torch.autograd.Function):
    """What a formula gives for each row, a block at a time; backward computes each again."""

    @staticmethod
    def forward(ctx: Any, formula: Formula, rows: Tensor, columns: Tensor, own: Tensor) -> Tensor:
        ctx.formula = formula
        ctx.save_for_backward(rows, columns, own)
        values = rows.new_empty(len(rows))
        for part in _parts(rows, columns):
            values[part] = formula.block(rows[part], columns, own[part])
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
                values = ctx.formula.block(block, columns, own[part])
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


def nearest_keops(x: Tensor) -> Tensor:
    """Take the second of the two nearest: the first is the row itself."""
    from pykeops.torch import LazyTensor

    unit = normalize(x)
    rows = unit.detach()
    r2 = LazyTensor(rows[:, None]).sqdist(LazyTensor(rows[None]))
    return mean_distance(unit, unit, r2.argKmin(2, dim=1)[:, 1])
