"""The estimate in one call of the compiled kernel, against its definition in float64."""

import itertools
import math

import pytest
import torch

from comhe_ext import Gaussian, Laplace, Riesz, pair_energy
from comhe_ext import hyperspherical_energy as energy_of
from comhe_ext.kernels.cpu import binding
from comhe_ext.kernels.sweep import SampledRequest
from comhe_ext.sampled import SamplingPlan
from comhe_ext.sampled.estimator import estimated_energies, permutations
from comhe_ext.sampled.fused import offered
from comhe_ext.settings import pair_settings
from comhe_ext.testing import random_rows, reference, relative_error

pytestmark = pytest.mark.skipif(
    binding.unavailable() is not None, reason=str(binding.unavailable())
)

PAIRS = [
    (Riesz(2.0, min_distance=0.0), lambda t: t**-2),
    (Riesz(0.0, min_distance=0.0, half_space=True), lambda t: -t.log()),
    (Riesz(2.0, min_distance=0.0, half_space=True), lambda t: t**-2),
    (Riesz(1.0, min_distance=0.0, half_space=True, angular=True), lambda t: 1.0 / t),
    (Gaussian(2.0), lambda t: (-2.0 * t.square()).exp()),
    (Laplace(1.0, half_space=True), lambda t: (-t).exp()),
]


def definition(rows, order, parts, coefficients, pair, function, eps):
    """The energy of one set [n, k] in float64, pair by pair."""

    def pairs(some):
        """Sum f over the unordered pairs of these points."""
        options = {"angular": pair.angular, "eps": eps, "reduction": "sum"}
        return reference.pair_energy(some, function, **options) / 2.0

    def polynomial(some):
        squared = some.square().sum(1, keepdim=True) + eps
        alive = squared > 0
        v = torch.where(alive, some / torch.where(alive, squared, 1.0).sqrt(), 0.0)
        c = v @ v.T
        i, j = torch.triu_indices(len(c), len(c), 1)
        return (coefficients[0] * c + coefficients[1] * c.square())[i, j].sum()

    antipodes = [pairs(torch.stack([row, -row])) if pair.half_space else 0.0 for row in rows]
    inside, count = 0.0, 0
    for part in order.tensor_split(parts):
        some = rows[part]
        if pair.half_space:
            others = sum(antipodes[i] for i in part.tolist())
            total = (pairs(torch.cat([some, -some])) - others) / 2.0
        else:
            total = pairs(some)
        inside = inside + total - polynomial(some)
        count += len(part) * (len(part) - 1) // 2
    n = len(rows)
    total = polynomial(rows) + n * (n - 1) / 2 / count * inside
    if pair.half_space:
        total = 2.0 * total + sum(antipodes)
    return pair.scale(n, "mean") * total


def few_rows(sets, n, k):
    """Rows of which some are near, one nearly antipodal to another, and one is dead."""
    rows = random_rows(sets * n, k).view(sets, n, k) * (1.0 + torch.rand(sets, n, 1))
    rows[:, 1] = 2.0 * rows[:, 0] + 0.05 * rows[:, 2]
    rows[:, 3] = -rows[:, 2] + 0.05 * rows[:, 0]
    rows[:, 4] = 0.0
    return rows


@pytest.mark.usefixtures("poisoned_empty", "isa")
@pytest.mark.parametrize(("pair", "function"), PAIRS, ids=lambda x: str(x) if x in PAIRS else "")
@pytest.mark.parametrize(
    ("sets", "n", "k", "parts"),
    [(1, 7, 3, 3), (3, 50, 5, 4), (2, 131, 24, 2), (1, 60, 37, 4), (1, 150, 57, 5)],
)
def test_energy_and_gradient(pair, function, sets, n, k, parts):
    rows, order = few_rows(sets, n, k), permutations(sets, n, torch.device("cpu"))
    for eps, coefficients in itertools.product((0.0, 0.1), ((0.0, 0.0), (0.3, 0.0), (0.25, 0.5))):
        x = rows.double().requires_grad_()
        expected = torch.stack(
            [
                definition(x[s], order[s], parts, coefficients, pair, function, eps)
                for s in range(sets)
            ]
        )
        (gradient,) = torch.autograd.grad(expected.sum(), x)
        # sets side by side, as products with matrices leave them
        beside = rows.transpose(0, 1).contiguous().transpose(0, 1)
        for given in (rows, beside):
            request = SampledRequest(
                given, order, parts, coefficients, pair.scale(n, "mean"), pair, eps
            )
            energy, slope = binding.sampled(request)
            assert relative_error(energy, expected.detach()) < 1e-6
            assert relative_error(slope, gradient) < 1e-5


def test_large_parts_are_shared_out_in_blocks():
    # of more rows than a block of the kernel may have, and worth several threads
    rows, order = random_rows(1500, 40)[None], permutations(1, 1500, torch.device("cpu"))
    pair, coefficients = Riesz(2.0), (0.5, 0.7)
    x = rows[0].double().requires_grad_()
    expected = definition(x, order[0], 2, coefficients, pair, lambda t: t**-2, 0.0)
    (gradient,) = torch.autograd.grad(expected, x)
    request = SampledRequest(rows, order, 2, coefficients, pair.scale(1500, "mean"), pair)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(binding.sampled(request))
    finally:
        torch.set_num_threads(threads)
    assert relative_error(results[0][0], expected.detach()) < 1e-6
    assert relative_error(results[0][1], gradient) < 1e-5
    for energy, slope in results[1:]:
        assert torch.equal(energy, results[0][0])
        assert torch.equal(slope, results[0][1])


def test_many_sets_on_any_number_of_threads():
    rows, order = (
        random_rows(24 * 700, 30).view(24, 700, 30),
        permutations(24, 700, torch.device("cpu")),
    )
    pair = Riesz(2.0, half_space=True)
    request = SampledRequest(rows, order, 11, (0.0, 1.0), 1.0, pair)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(binding.sampled(request))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("pair", [Riesz(2.0), Riesz(0.0, half_space=True), Gaussian(2.0)], ids=str)
def test_mean_over_all_partitions_is_the_exact_energy_with_its_gradient(pair):
    rows = few_rows(1, 5, 3)[0]
    orders = torch.tensor(list(itertools.permutations(range(5))))
    x = rows.double().requires_grad_()
    exact = pair_energy(x, pair=pair)
    (gradient,) = torch.autograd.grad(exact, x)
    options = pair_settings(pair, "mean", 0.0, None).options((rows,))
    for degree, trees, samples in itertools.product((0, 2), (0, 2), (2, 3)):
        plan = SamplingPlan.from_rows(rows, degree, trees)
        polynomial = plan.polynomial(pair)
        y = rows.clone().requires_grad_()
        sets = y.expand(len(orders), 5, 3)
        assert offered(sets, samples, polynomial, options)
        mean = estimated_energies(sets, orders, samples, polynomial, plan.listed, options).mean()
        mean.backward()
        assert relative_error(mean.detach(), exact.detach()) < 1e-6
        # the blocks' near pairs cancel in the mean, and leave their roundings
        assert relative_error(y.grad, gradient) < 1e-5


def test_derivatives_of_the_gradient():
    rows, tangent = random_rows(60, 6), random_rows(60, 6, seed=3)
    plan = SamplingPlan.from_rows(rows, generator=torch.Generator().manual_seed(0))

    def product(x):
        x = x.clone().requires_grad_()
        options = {"plan": plan, "samples": 10, "generator": torch.Generator().manual_seed(1)}
        energy = energy_of(x, half_space=True, method="sampled", **options)
        (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
        return torch.autograd.grad((gradient * tangent).sum(), x)[0]

    assert relative_error(product(rows), product(rows.double())) < 1e-5


def test_float64_and_high_degrees_are_composed():
    rows = random_rows(60, 6)[None]
    options = pair_settings(Riesz(2.0), "mean", 0.0, None).options((rows,))
    plan = SamplingPlan.from_rows(rows[0], 3)
    assert offered(rows, 10, None, options)
    assert not offered(rows, 10, plan.polynomial(Riesz(2.0)), options)
    double = pair_settings(Riesz(2.0), "mean", 0.0, None).options((rows.double(),))
    assert not offered(rows.double(), 10, None, double)


def test_bad_calls_are_refused():
    rows, order = random_rows(20, 3)[None], torch.arange(20)[None]
    good = SampledRequest(rows, order, 4, (0.0, 0.0), 1.0, Riesz(2.0))
    assert binding.sampled(good)[0].isfinite()
    for change, error in (
        ({"points": rows.double()}, ValueError),
        ({"points": rows[0]}, ValueError),
        ({"order": order.int()}, ValueError),
        ({"order": order[:, :19]}, ValueError),
        ({"order": order + 1}, RuntimeError),
        ({"order": order - 1}, RuntimeError),
        ({"parts": 11}, ValueError),
        ({"parts": 0}, ValueError),
        ({"eps": -1.0}, ValueError),
    ):
        with pytest.raises(error):
            binding.sampled(SampledRequest(**{**vars(good), **change}))


def test_nan_stays_in_its_set():
    rows, order = random_rows(60, 4).view(3, 20, 4), permutations(3, 20, torch.device("cpu"))
    rows[1, 3, 2] = math.nan
    request = SampledRequest(rows, order, 4, (0.1, 0.2), 1.0, Riesz(0.0))
    energy, gradient = binding.sampled(request)
    assert energy.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(2).any(1).tolist() == [False, True, False]
