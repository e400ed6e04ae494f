"""Energies and gradients in float64, and the errors that a method may have."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.methods import Mode, run
from bench.naive import naive_energy
from bench.shapes import Shape
from comhe_ext import testing

# far above the rounding of any float32 formula on random rows, far below a wrong factor or a
# missing term
ENERGY_BOUND = 1e-5
DERIVATIVE_BOUND = 2e-3
# with more rows, only the gradient of some is computed
MOST_ROWS = 32768
SAMPLE = 512


class Truth(NamedTuple):
    energies: Tensor  # [B]
    derivatives: Tensor | None  # [B, R, k], of the rows `sample`
    sample: Tensor


class Errors(NamedTuple):
    """Relative errors in the L2 norm; of the gradient or of the Hessian-vector product."""

    energy: float
    derivative: float | None

    def verdict(self) -> str | None:
        """Say what is wrong, or None."""
        # a comparison with NaN is false
        if not self.energy <= ENERGY_BOUND:
            return f"energy off by {self.energy:.1e}, more than {ENERGY_BOUND:.0e}"
        if self.derivative is not None and not self.derivative <= DERIVATIVE_BOUND:
            return f"derivative off by {self.derivative:.1e}, more than {DERIVATIVE_BOUND:.0e}"
        return None


def errors(truth: Truth, energies: Tensor, derivatives: Tensor | None) -> Errors:
    energy = testing.relative_error(energies, truth.energies)
    if derivatives is None or truth.derivatives is None:
        return Errors(energy, None)
    return Errors(energy, testing.relative_error(derivatives[:, truth.sample], truth.derivatives))


def points(shape: Shape, device: str) -> Tensor:
    """Draw the same random rows for every method, [B, N, k]."""
    return testing.random_rows(shape.sets * shape.rows, shape.dim, device=device).view(shape)


def truth(shape: Shape, mode: Mode, device: str) -> Truth:
    """Compute the truth of `points(shape, device)`: s = 2, mean over the pairs.

    Up to `MOST_ROWS` rows, all of it comes from differences of rows. Beyond, energies come from
    matrix products, exact enough where no two rows are near, and gradients only of `SAMPLE` rows.
    """
    rows = points(shape, device)
    everything = torch.arange(shape.rows)
    if mode == "second order":
        energies, products = run(naive_energy, rows.double(), mode)
        return Truth(energies, products, everything)
    if shape.rows <= MOST_ROWS:
        # random rows: no two are closer than `min_distance`
        both = [testing.exact_energy_and_gradient(one) for one in rows]
        return Truth(
            torch.stack([e for e, _ in both]), torch.stack([g for _, g in both]), everything
        )
    sample = torch.linspace(0, shape.rows - 1, SAMPLE).long()
    gradients = torch.stack([_sample_gradient(one, sample) for one in rows])
    return Truth(torch.stack([_energy_by_products(one) for one in rows]), gradients, sample)


def _energy_by_products(rows: Tensor, block: int = 512) -> Tensor:
    """Sum tiles on and above the diagonal, small enough for the caches."""
    unit = normalize(rows.double())
    n, two = len(unit), unit.new_tensor(2.0)
    blocks, total = unit.split(block), unit.new_zeros(())
    for i, part in enumerate(blocks):
        for j, other in enumerate(blocks[i:], i):
            values = torch.addmm(two, part, other.mT, alpha=-2.0)
            if i == j:
                values.fill_diagonal_(torch.inf)
            total += values.reciprocal_().sum() * (0.5 if i == j else 1.0)
    return total / (n * (n - 1) / 2)


def _sample_gradient(rows: Tensor, sample: Tensor, block: int = 32) -> Tensor:
    unit, n = normalize(rows.double()), len(rows)
    gradients = []
    for index in sample.to(rows.device).split(block):
        leaf = rows[index].double().requires_grad_()
        r2 = torch.cdist(
            normalize(leaf), unit, compute_mode="donot_use_mm_for_euclid_dist"
        ).square()
        itself = torch.arange(len(index), device=rows.device), index
        energy = r2.index_put(itself, r2.new_tensor(torch.inf)).reciprocal().sum()
        (gradient,) = torch.autograd.grad(energy / (n * (n - 1) / 2), leaf)
        gradients.append(gradient)
    return torch.cat(gradients)
