"""Every pair function on every backend: the definition, derivatives, the tangent, mistakes."""

import math
from dataclasses import replace

import pytest
import torch

import comhe_ext
from comhe_ext import Gaussian, Riesz, backends
from comhe_ext.kernels.pair_functions import PAIR_FUNCTIONS, PairFunction, pair_function
from comhe_ext.testing import random_rows, reference, relative_error

# torch's own, in its checks of forward mode
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")

# a pair function, and its definition as a function of the distance
DEFINED = [
    (Riesz(2.0, 0.0), lambda t: t**-2),
    (Riesz(0.5, 0.0), lambda t: t**-0.5),
    (Riesz(0.0, 0.0), lambda t: -t.log()),
    (Riesz(1.0, 0.5), lambda t: torch.where(t < 0.5, 2 - 4 * (t - 0.5), 1 / t)),
    (Gaussian(2.0), lambda t: (-2 * t**2).exp()),
    (Gaussian(0.3), lambda t: (-0.3 * t**2).exp()),
]
SPACES = [
    dict(half_space=half, angular=angular) for half in (False, True) for angular in (False, True)
]
every_function = pytest.mark.parametrize(
    ("pair", "definition"), DEFINED, ids=[str(pair) for pair, _ in DEFINED]
)
every_space = pytest.mark.parametrize("space", SPACES, ids=str)


@every_function
@every_space
@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_energy_and_gradient_are_those_of_the_definition(
    pair, definition, space, eps, backend, device
):
    pair = replace(pair, **space)
    if not backends.load(backend).supports(pair):
        with pytest.raises(ValueError, match=f"backend {backend!r} does not know"):
            comhe_ext.pair_energy(random_rows(9, 4), pair=pair, backend=backend)
        return
    rows = random_rows(70, 12, device=device)
    rows[3] = 0.0
    exact = rows.double().requires_grad_()
    expected = reference.pair_energy(exact, definition, **space, eps=eps)
    (truth,) = torch.autograd.grad(expected, exact)
    rows.requires_grad_()
    energy = comhe_ext.pair_energy(rows, pair=pair, eps=eps, backend=backend)
    (gradient,) = torch.autograd.grad(energy, rows)
    assert relative_error(energy, expected) <= 1e-6
    assert relative_error(gradient, truth) <= 1e-5


@every_function
@pytest.mark.parametrize("k", [64, 1000])
@pytest.mark.parametrize("n", [2, 50])
@pytest.mark.parametrize("angular", [False, True])
def test_the_ends_of_nearly_orthogonal_rows_do_not_cancel(
    pair, definition, angular, n, k, backend, device
):
    space = {"half_space": True, "angular": angular}
    pair = replace(pair, **space)
    if not backends.load(backend).supports(pair):
        return  # tested above
    rows = random_rows(n, k, device=device)
    if n == 2:
        rows = torch.eye(2, k, device=device)
        rows[1, 0] = 0.01
    exact = rows.double().requires_grad_()
    (truth,) = torch.autograd.grad(reference.pair_energy(exact, definition, **space), exact)
    rows.requires_grad_()
    energy = comhe_ext.pair_energy(rows, pair=pair, backend=backend)
    (gradient,) = torch.autograd.grad(energy, rows)
    assert relative_error(gradient, truth) <= 2e-6


@every_function
@every_space
def test_derivatives_of_every_order_and_mode(pair, definition, space):
    pair = replace(pair, **space)
    rows = random_rows(6, 4, dtype=torch.float64).requires_grad_()

    def energy(x):
        return comhe_ext.pair_energy(x, pair=pair)

    assert torch.autograd.gradcheck(energy, rows, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(energy, rows, check_fwd_over_rev=True)


@every_function
def test_without_asking_the_best_backend_that_knows_it_is_taken(pair, definition):
    rows = random_rows(20, 5)
    energy = comhe_ext.pair_energy(rows, pair=pair)
    expected = reference.pair_energy(rows, definition)
    assert relative_error(energy, expected) <= 1e-6
    batch = comhe_ext.pair_energy(rows.view(4, 5, 5), pair=pair, reduction="sum")
    expected = reference.pair_energy(rows.view(4, 5, 5), definition, reduction="sum")
    assert relative_error(batch, expected) <= 1e-6


def test_riesz_is_the_hyperspherical_energy():
    rows = random_rows(20, 5)
    for s, options in ((2.0, {}), (0.0, dict(half_space=True)), (1.0, dict(angular=True))):
        actual = comhe_ext.pair_energy(rows, pair=Riesz(s, **options))
        assert torch.equal(actual, comhe_ext.hyperspherical_energy(rows, s, **options))


def test_a_name_and_parameters_are_the_pair_function():
    for pair, _ in DEFINED:
        assert pair_function(pair.name, pair.parameters) == pair
        assert PAIR_FUNCTIONS[pair.name] is type(pair)
    assert len({kind.number for kind in PAIR_FUNCTIONS.values()}) == len(PAIR_FUNCTIONS)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, "`s` must be a number, got str", lambda: Riesz("2")),
        (TypeError, "`s` must be a number, got bool", lambda: Riesz(True)),
        (TypeError, "`half_space` must be a bool, got int", lambda: Riesz(half_space=1)),
        (ValueError, "`s` must be finite and at least 0, got -1", lambda: Riesz(-1)),
        (ValueError, "`min_distance` must be .* got nan", lambda: Riesz(2.0, math.nan)),
        (TypeError, "`tau` must be a number, got NoneType", lambda: Gaussian(None)),
        (ValueError, "`tau` must be finite and greater than 0, got 0", lambda: Gaussian(0)),
        (TypeError, "`pair` must be a pair function, as .* got 2.0",
         lambda: comhe_ext.pair_energy(torch.ones(3, 3), pair=2.0)),
        (ValueError, r"`rows` must be 2-D or 3-D, got shape \(3,\)",
         lambda: comhe_ext.pair_energy(torch.ones(3))),
        (ValueError, "`reduction` must be", lambda: comhe_ext.pair_energy(torch.ones(3, 3),
                                                                          reduction="avg")),
    ],
)  # fmt: skip
def test_messages(error, message, make):
    with pytest.raises(error, match=message):
        make()


def test_a_pair_function_that_the_compiled_kernels_do_not_know():
    class Cubic(PairFunction):
        name, number = "cubic", 10**6

        def of_distance(self, t):
            return -(t**3), -3 * t**2, -6 * t

    try:
        rows = random_rows(9, 4)
        expected = reference.pair_energy(rows, lambda t: -(t**3), half_space=True)
        energy = comhe_ext.pair_energy(rows, pair=Cubic(half_space=True))
        assert relative_error(energy, expected) <= 1e-6
        if backends.unavailable("cpu") is None:
            with pytest.raises(ValueError, match="backend 'cpu' does not know"):
                comhe_ext.pair_energy(rows, pair=Cubic(), backend="cpu")
    finally:
        del PAIR_FUNCTIONS["cubic"]


def test_the_gaussian_is_the_uniformity_of_wang_and_isola():
    # "Understanding contrastive representation learning through alignment and uniformity" (2020):
    # torch.pdist(x, p=2).pow(2).mul(-t).exp().mean().log(), t = 2
    x = torch.nn.functional.normalize(random_rows(40, 8, dtype=torch.float64))
    expected = torch.pdist(x, p=2).pow(2).mul(-2).exp().mean().log()
    assert relative_error(comhe_ext.pair_energy(x, pair=Gaussian(2.0)).log(), expected) <= 1e-12


def test_the_gaussian_of_duplicates_is_smooth():
    # their force is along the rows themselves, and their second derivative is not zero
    rows = random_rows(8, 4, dtype=torch.float64)
    rows[5] = rows[2]
    tangents = random_rows(8, 4, seed=1, dtype=torch.float64)

    def energy(x):
        return comhe_ext.pair_energy(x, pair=Gaussian(1.5))

    def dense(x):
        u = torch.nn.functional.normalize(x)
        i, j = torch.triu_indices(8, 8, 1)
        return (3 * ((u[i] * u[j]).sum(1) - 1)).exp().mean()

    assert relative_error(energy(rows), dense(rows)) <= 1e-14
    actual = torch.autograd.functional.hvp(energy, rows, tangents)[1]
    assert relative_error(actual, torch.autograd.functional.hvp(dense, rows, tangents)[1]) <= 1e-10
