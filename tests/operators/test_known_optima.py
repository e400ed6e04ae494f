"""Configurations whose energy is known exactly, and descents that have to find them."""

import math

import pytest
import torch

import comhe_ext
from comhe_ext import Gaussian, Laplace, Riesz, backends
from comhe_ext.testing import (
    cross_polytope,
    e8_roots,
    icosahedron,
    leech_minimal_vectors,
    simplex,
)


def energy_of_cosines(cosines, s, angular=False):
    """Mean energy of a set each of whose points sees the same cosines: {cosine: how many}."""

    def f(c):
        t = math.acos(c) if angular else math.sqrt(2 - 2 * c)
        return -math.log(t) if s == 0 else math.copysign(t**-s, s)

    return sum(count * f(c) for c, count in cosines.items()) / sum(cosines.values())


GOLDEN = math.sqrt(0.2)
CONFIGURATIONS = {
    "antipodal pair": (torch.tensor([[0.6, 0.8], [-0.6, -0.8]]).double(), {-1.0: 1}),
    "simplex of 5": (simplex(5), {-0.25: 4}),
    "simplex of 101": (simplex(101), {-0.01: 100}),
    "cross-polytope": (cross_polytope(7), {-1.0: 1, 0.0: 12}),
    "icosahedron": (icosahedron(), {-1.0: 1, GOLDEN: 5, -GOLDEN: 5}),
    "E8": (e8_roots(), {-1.0: 1, 0.5: 56, -0.5: 56, 0.0: 126}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("s", [-1.9, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("angular", [False, True])
def test_energy_is_known_and_gradient_zero(name, s, angular, backend, device):
    rows, cosines = CONFIGURATIONS[name]
    expected = energy_of_cosines(cosines, s, angular)
    n = rows.shape[0]
    for dtype, where, bound in ((torch.float64, None, 1e-13), (torch.float32, backend, 1e-6)):
        weight = rows.to(device, dtype).requires_grad_()
        for reduction, times in (("mean", 1.0), ("sum", n * (n - 1.0))):
            energy = comhe_ext.hyperspherical_energy(
                weight, s, angular=angular, reduction=reduction, backend=where
            )
            (gradient,) = torch.autograd.grad(energy, weight)
            assert energy.item() == pytest.approx(times * expected, rel=bound)
            assert float(gradient.norm()) <= bound * times


BOUNDED = {
    "Laplace": (Laplace(1.5), lambda t: math.exp(-1.5 * t)),
    "Gaussian": (Gaussian(0.7), lambda t: math.exp(-0.7 * t**2)),
    "TIMA": (Riesz(2.0, shift=1.0), lambda t: 1 / (1 + t**2)),
    "shifted logarithm": (Riesz(0.0, shift=0.5), lambda t: -math.log(0.5 + t**2) / 2),
    "shifted s = -1": (Riesz(-1.0, shift=0.5), lambda t: -math.sqrt(0.5 + t**2)),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("function", BOUNDED)
def test_the_same_of_functions_without_a_singularity(name, function, backend, device):
    rows, cosines = CONFIGURATIONS[name]
    pair, f = BOUNDED[function]
    if not backends.load(backend).supports(pair):
        return
    total = sum(count * f(math.sqrt(2 - 2 * c)) for c, count in cosines.items())
    expected = total / sum(cosines.values())
    for dtype, where, bound in ((torch.float64, None, 1e-13), (torch.float32, backend, 1e-6)):
        weight = rows.to(device, dtype).requires_grad_()
        energy = comhe_ext.pair_energy(weight, pair=pair, backend=where)
        (gradient,) = torch.autograd.grad(energy, weight)
        assert energy.item() == pytest.approx(expected, rel=bound)
        assert float(gradient.norm()) <= bound


@pytest.mark.parametrize("n", [3, 8, 51])
def test_regular_polygons(n, backend, device):
    # the chords from a corner add up to 2 cot(pi / 2n); the polygon is optimal for every s > -2
    angles = 2 * math.pi / n * torch.arange(n, dtype=torch.float64)
    rows = torch.stack([angles.cos(), angles.sin()], 1).to(device, torch.float32).requires_grad_()
    energy = comhe_ext.hyperspherical_energy(rows, -1.0, backend=backend)
    expected = -2 / math.tan(math.pi / (2 * n)) / (n - 1)
    assert float(energy.detach()) == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(energy, rows)
    assert float(gradient.norm()) <= 1e-6


def test_orthonormal_rows_in_half_space(backend, device):
    for n in (2, 30, 128):
        weight = torch.eye(n, device=device).requires_grad_()
        energy = comhe_ext.hyperspherical_energy(weight, 2.0, half_space=True, backend=backend)
        expected = (n * (n - 1) + n / 4) / (n * (2 * n - 1))
        assert float(energy.detach()) == pytest.approx(expected, rel=1e-6)
        (gradient,) = torch.autograd.grad(energy, weight)
        assert float(gradient.norm()) <= 1e-6


def test_spherical_designs_have_their_strength():
    # the tests above rely on it: the sets are what they claim to be
    for rows, cosines in CONFIGURATIONS.values():
        unit = torch.nn.functional.normalize(rows)
        found = torch.cat([unit[:1] @ unit[1:].T, unit[-1:] @ unit[:-1].T]).sort(1).values
        expected = sorted(c for c, count in cosines.items() for _ in range(count))
        assert torch.allclose(found, torch.tensor([expected] * 2).to(found), atol=1e-12)


@pytest.fixture(scope="module")
def leech():
    return leech_minimal_vectors()


LEECH = {-1.0: 1, 0.5: 4600, -0.5: 4600, 0.25: 47104, -0.25: 47104, 0.0: 93150}


@pytest.mark.long
def test_leech_lattice_has_its_inner_products(leech):
    assert len(torch.unique(leech, dim=0)) == 196_560
    assert (leech.square().sum(1) == 32).all()
    for i in (0, 100_000, 196_559):  # one of each shape of vector
        cosines, counts = torch.unique(leech @ leech[i] / 32, return_counts=True)
        assert dict(zip(cosines.tolist(), counts.tolist(), strict=True)) == {**LEECH, 1.0: 1}


@pytest.mark.long
@pytest.mark.parametrize("s", [0.0, 1.0, 2.0])
def test_leech_lattice(leech, s, backend, device):
    weight = leech.float().to(device).requires_grad_()
    energy = comhe_ext.hyperspherical_energy(weight, s, backend=backend)
    (gradient,) = torch.autograd.grad(energy, weight)
    expected = energy_of_cosines(LEECH, s)
    # at s = 0 the terms of the two signs all but cancel: the bound is on their size, log(2)/2
    assert abs(energy.item() - expected) <= 1e-7 * max(abs(expected), math.log(2) / 2)
    assert float(gradient.norm()) <= 1e-6


# N: the least energy of N charges on the unit sphere, sum over unordered pairs of 1/r
THOMSON = {
    2: 0.5,
    3: 1.732050808,
    4: 3.674234614,
    5: 6.474691495,
    6: 9.985281374,
    7: 14.452977414,
    8: 19.675287861,
    9: 25.759986531,
    10: 32.716949460,
    11: 40.596450510,
    12: 49.165253058,
}


@pytest.mark.parametrize("n", THOMSON)
def test_thomson_problem(n):
    lowest = math.inf
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(n, 3, generator=generator, dtype=torch.float64).requires_grad_()
        descent = torch.optim.LBFGS(
            [weight],
            max_iter=300,
            tolerance_grad=1e-12,
            tolerance_change=1e-15,
            line_search_fn="strong_wolfe",
        )

        def energy(weight=weight, descent=descent):
            descent.zero_grad()
            total = comhe_ext.hyperspherical_energy(weight, 1.0, reduction="sum") / 2
            total.backward()
            return total

        descent.step(energy)
        lowest = min(lowest, energy().item())
        if lowest <= THOMSON[n] + 1e-8:
            break
    assert lowest == pytest.approx(THOMSON[n], abs=1e-8)


def test_descent_reaches_the_simplex(backend, device):
    # as many rows as dimensions + 1: the simplex is the one optimum, for every s
    weight = torch.randn(6, 5, device=device).requires_grad_()
    descent = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def energy():
        descent.zero_grad()
        total = comhe_ext.hyperspherical_energy(weight, 2.0, backend=backend)
        total.backward()
        return total

    descent.step(energy)
    assert energy().item() == pytest.approx(1 / (2 + 2 / 5), rel=1e-6)
