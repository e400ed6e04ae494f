"""The oracle against formulas written by hand, closed forms and finite differences."""

import math

import pytest
import torch
from scipy.special import beta, digamma, gamma

from comhe_ext.testing import (
    exact_energy_and_gradient,
    paired_rows,
    random_rows,
    reference,
    relative_error,
)


def pair(s: float, c: float, angular: bool = False) -> float:
    t = math.acos(c) if angular else math.sqrt(2 - 2 * c)
    return -math.log(t) if s == 0 else t**-s


@pytest.mark.parametrize("s", [0.0, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("angular", [False, True])
def test_three_rows_by_hand(s, angular):
    rows = torch.tensor([[2.0, 0.0], [0.0, 0.5], [-3.0, 3.0]])
    cosines = [0.0, -math.sqrt(0.5), math.sqrt(0.5)]
    total = sum(pair(s, c, angular) for c in cosines)
    energy = reference.hyperspherical_energy(rows, s, angular=angular)
    assert float(energy) == pytest.approx(total / 3, rel=1e-14)
    energy = reference.hyperspherical_energy(rows, s, angular=angular, reduction="sum")
    assert float(energy) == pytest.approx(2 * total, rel=1e-14)

    # the six points of the half space: each pair twice as it is, twice mirrored, and 3 antipodes
    total = sum(2 * pair(s, c, angular) + 2 * pair(s, -c, angular) for c in cosines)
    total += 3 * pair(s, -1.0, angular)
    energy = reference.hyperspherical_energy(rows, s, angular=angular, half_space=True)
    assert float(energy) == pytest.approx(total / 15, rel=1e-14)


def test_eps_by_hand():
    rows = torch.tensor([[0.3, 0.0], [0.0, 0.4], [0.0, 0.0]], dtype=torch.float64)
    # every cosine is 0, and stays 0 with shorter rows
    assert float(reference.hyperspherical_energy(rows, 2.0, eps=1e-2)) == pytest.approx(0.5)
    # half space: 12 pairs at c = 0 and the antipodes at c = -|v|^2
    antipodes = sum(0.5 / (1 + p / (p + 1e-2)) for p in (0.09, 0.16, 0.0))
    energy = reference.hyperspherical_energy(rows, 2.0, eps=1e-2, half_space=True)
    assert float(energy) == pytest.approx((12 * 0.5 + antipodes) / 15, rel=1e-14)


@pytest.mark.parametrize("s", [0.0, 1.0, 2.0, 3.0])
def test_tangent_line(s):
    t, bound = 0.01, 0.1
    rows = torch.tensor([[1.0, 0.0], [math.cos(t), math.sin(t)]], dtype=torch.float64)
    value, slope = (-math.log(bound), -1 / bound) if s == 0 else (bound**-s, -s * bound ** (-s - 1))
    energy = reference.hyperspherical_energy(rows, s, angular=True, min_distance=bound)
    assert float(energy) == pytest.approx(value + slope * (t - bound), rel=1e-12)
    chord = 2 * math.sin(t / 2)
    energy = reference.hyperspherical_energy(rows, s, min_distance=bound)
    assert float(energy) == pytest.approx(value + slope * (chord - bound), rel=1e-12)


@pytest.mark.parametrize("k", [10, 30, 64])
def test_random_rows_have_the_energy_of_the_beta_distribution(k):
    # r^2 / 4 of two random directions follows Beta(a, a)
    a = (k - 1) / 2
    rows = random_rows(600, k, seed=3, dtype=torch.float64)
    pairs = 600 * 599 / 2

    def moment(s):
        return 2**-s * gamma(a - s / 2) * gamma(2 * a) / (gamma(a) * gamma(2 * a - s / 2))

    for s in (1.0, 2.0):
        assert moment(s) == pytest.approx(2**-s * beta(a - s / 2, a) / beta(a, a))
        deviation = math.sqrt((moment(2 * s) - moment(s) ** 2) / pairs)
        energy = float(reference.hyperspherical_energy(rows, s))
        assert abs(energy - moment(s)) < 6 * deviation
    mean = -(math.log(4) + digamma(a) - digamma(2 * a))
    energy = float(reference.hyperspherical_energy(rows, 0.0))
    assert 2 * energy == pytest.approx(mean, abs=6 * 2 / math.sqrt(pairs * k))
    known = {10: (0.74097, 0.57143, -0.63452), 30: (0.71664, 0.51852, -0.67561)}
    if k in known:
        assert (moment(1.0), moment(2.0), mean) == pytest.approx(known[k], abs=6e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(s=2.0),
        dict(s=0.0, half_space=True),
        dict(s=1.0, angular=True, reduction="sum"),
        dict(s=0.5, half_space=True, angular=True),
        dict(s=3.0, eps=1e-2),
        dict(s=2.0, eps=1e-2, half_space=True, min_distance=1.2),
    ],
    ids=str,
)
def test_derivatives_are_those_of_finite_differences(options):
    rows = random_rows(7, 3, dtype=torch.float64).requires_grad_()

    def energy(w):
        return reference.hyperspherical_energy(w, **options)

    assert torch.autograd.gradcheck(energy, rows)
    if options.get("min_distance", 0) < 1:  # the tangent line has a jump in f''
        assert torch.autograd.gradgradcheck(energy, rows)


def test_cases_without_a_direction():
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    rows.requires_grad_()
    for options in (dict(), dict(half_space=True), dict(angular=True), dict(s=0.0)):
        energy = reference.hyperspherical_energy(rows, **options)
        (gradient,) = torch.autograd.grad(energy, rows)
        assert energy.isfinite()
        assert gradient.isfinite().all()
        assert (gradient[0] == 0).all()
    for n, half_space in ((0, False), (0, True), (1, False)):
        assert reference.hyperspherical_energy(rows[:n], half_space=half_space) == 0
    assert reference.hyperspherical_energy(rows[1:2], 2.0, half_space=True) == 0.25


@pytest.mark.parametrize("options", [dict(), dict(half_space=True), dict(angular=True)], ids=str)
@pytest.mark.parametrize("factor", [3.0, -3.0, 0.1, 11.0])
def test_multiples_of_a_row_are_duplicates(factor, options):
    rows = random_rows(12, 24, dtype=torch.float64)
    rows[7] = math.copysign(1.0, factor) * rows[2]  # to the bit
    multiples = rows.clone()
    multiples[7] *= abs(factor)
    for function in (reference.hyperspherical_energy, exact_energy_and_gradient):
        results = []
        for weight in (rows, multiples):
            if function is exact_energy_and_gradient:
                results.append(function(weight, **options))
                continue
            weight = weight.clone().requires_grad_()
            energy = function(weight, **options)
            results.append((energy.detach(), torch.autograd.grad(energy, weight)[0]))
        (expected, expected_gradient), (energy, gradient) = results
        gradient[7] *= abs(factor)
        assert relative_error(energy, expected) <= 1e-14
        assert relative_error(gradient, expected_gradient) <= 1e-11


@pytest.mark.parametrize("eps", [1e-14, 1e-10, 1e-4])
def test_multiples_under_eps_differ_in_length_alone(eps):
    rows = torch.tensor([[1.0, 2.0, -2.0], [3.0, 6.0, -6.0]], dtype=torch.float64)
    unit, (a, b) = rows[0] / 3.0, (3.0, 9.0)
    nu_a, nu_b = math.sqrt(a**2 + eps), math.sqrt(b**2 + eps)
    # 1/r^2 with 2 - 2c, and dc/da, dc/db, written without a difference
    squared = 2 * eps * (a**2 + b**2 + eps) / (nu_a * nu_b * (nu_a * nu_b + a * b))
    slopes = (b * eps / (nu_a**3 * nu_b), a * eps / (nu_b**3 * nu_a))
    expected = torch.stack([2 / squared**2 * slope * unit for slope in slopes])
    leaf = rows.clone().requires_grad_()
    energy = reference.hyperspherical_energy(leaf, eps=eps, min_distance=0.0)
    (gradient,) = torch.autograd.grad(energy, leaf)
    assert float(energy.detach()) == pytest.approx(1 / squared, rel=1e-10)
    assert relative_error(gradient, expected) <= 1e-10
    energy, gradient = exact_energy_and_gradient(rows, eps=eps, min_distance=0.0)
    assert float(energy) == pytest.approx(1 / squared, rel=1e-10)
    assert relative_error(gradient, expected) <= 1e-10


@pytest.mark.parametrize("kind", ["cosine", "angle"])
def test_angles_between_multiples_of_a_row_are_zero(kind):
    rows = random_rows(6, 8, dtype=torch.float64)
    rows[4] = rows[1]
    projection = random_rows(12, 8, seed=1, dtype=torch.float64).view(3, 4, 8)
    results = []
    for length in (1.0, 0.3):
        weight = rows.clone()
        weight[4] *= length
        weight.requires_grad_()
        loss = reference.angle_preserving_loss(weight, projection, kind)
        (gradient,) = torch.autograd.grad(loss, weight)
        gradient[4] *= length
        results.append((loss.detach(), gradient))
    assert relative_error(results[1][0], results[0][0]) <= 1e-14
    assert relative_error(results[1][1], results[0][1]) <= 1e-12


def test_views_are_averaged():
    rows = random_rows(9, 6, dtype=torch.float64)
    projection = torch.randn(3, 4, 6, dtype=torch.float64)
    expected = sum(reference.hyperspherical_energy(rows @ p.T) for p in projection) / 3
    assert float(reference.compressive_energy(rows, projection)) == pytest.approx(float(expected))
    parts = [[0, 1, 2], [3, 4, 5]]
    expected = sum(reference.hyperspherical_energy(rows[:, part]) for part in parts) / 2
    assert float(reference.group_energy(rows, parts)) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(half_space=True, angular=True, eps=1e-3),
        dict(s=0.0, reduction="sum", eps=1e-4),
        dict(s=1.0, half_space=True, min_distance=0.0),
    ],
    ids=str,
)
def test_energy_in_chunks_is_the_same(options):
    rows = paired_rows(41, 5, 1e-3, antipodal="half_space" in options).double()
    rows[3] = 0.0
    rows.requires_grad_()
    expected = reference.hyperspherical_energy(rows, **options)
    (expected_gradient,) = torch.autograd.grad(expected, rows)
    energy, gradient = exact_energy_and_gradient(rows, **options, chunk=10)
    assert relative_error(energy, expected) < 1e-14
    # float64's rounding over the angle of the closest pairs, 1e-3
    assert relative_error(gradient, expected_gradient) < 1e-12


def test_energy_of_any_function_in_chunks_is_the_same():
    rows = paired_rows(41, 5, 1e-3).double().requires_grad_()
    options = dict(half_space=True, angular=True)

    def laplace(distance):
        return (-3 * distance).exp()

    expected = reference.pair_energy(rows, laplace, **options)
    (expected_gradient,) = torch.autograd.grad(expected, rows)
    energy, gradient = exact_energy_and_gradient(rows, function=laplace, **options, chunk=10)
    assert relative_error(energy, expected) < 1e-14
    assert relative_error(gradient, expected_gradient) < 1e-12
