"""Every pair function on every backend: the definition, derivatives, the tangent, mistakes."""

import math
from dataclasses import replace

import pytest
import torch

import comhe_ext
from comhe_ext import Gaussian, Laplace, Riesz, backends
from comhe_ext.kernels.pair_functions import PAIR_FUNCTIONS, PairFunction, pair_function
from comhe_ext.testing import paired_rows, random_rows, reference, relative_error

# torch's own, in its checks of forward mode
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")

# a pair function, and its definition as a function of the distance
DEFINED = [
    (Riesz(2.0, min_distance=0.0), lambda t: t**-2),
    (Riesz(0.5, min_distance=0.0), lambda t: t**-0.5),
    (Riesz(0.0, min_distance=0.0), lambda t: -t.log()),
    (
        Riesz(1.0, min_distance=0.5),
        lambda t: torch.where(t < 0.5, 2 - 4 * (t - 0.5), 1 / t.clamp_min(0.5)),
    ),
    (Riesz(-1.0, min_distance=0.0), lambda t: -t),
    (Riesz(-1.9, min_distance=0.0), lambda t: -(t**1.9)),
    (
        Riesz(-0.5, min_distance=0.25),
        lambda t: torch.where(t < 0.25, -0.5 - (t - 0.25), -(t.clamp_min(0.25) ** 0.5)),
    ),
    (Riesz(2.0, shift=1.0), lambda t: 1 / (1 + t**2)),
    (Riesz(0.0, shift=0.3), lambda t: -(0.3 + t**2).log() / 2),
    (Riesz(0.7, shift=0.1), lambda t: (0.1 + t**2) ** -0.35),
    (Riesz(-1.5, shift=0.2), lambda t: -((0.2 + t**2) ** 0.75)),
    (Gaussian(2.0), lambda t: (-2 * t**2).exp()),
    (Gaussian(0.3), lambda t: (-0.3 * t**2).exp()),
    (Laplace(0.3), lambda t: (-0.3 * t).exp()),
    (Laplace(4.0), lambda t: (-4 * t).exp()),
]
SPACES = [
    dict(half_space=half, angular=angular) for half in (False, True) for angular in (False, True)
]
every_function = pytest.mark.parametrize(
    ("pair", "definition"), DEFINED, ids=[str(pair) for pair, _ in DEFINED]
)
every_space = pytest.mark.parametrize("space", SPACES, ids=str)


def floor(energy):
    """What is a small gradient: with s = -1, by angle, the two ends add up to a constant."""
    return 1e-6 * abs(float(energy.detach()))


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
    assert relative_error(gradient, truth, floor(expected)) <= 1e-5


@every_function
@every_space
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-4])
def test_near_pairs_dead_rows_and_multiples(pair, definition, angle, space, eps, backend, device):
    pair = replace(pair, **space)
    if not backends.load(backend).supports(pair):
        return  # tested above
    rows = paired_rows(60, 12, angle, device=device)
    rows[:4] *= -1.0 if pair.two_ended else 1.0  # half of the pairs are nearly antipodal
    rows[20] = 0.0
    if math.isfinite(float(pair.at_distance(torch.zeros((), dtype=torch.float64))[0])):
        rows[21], rows[23] = 2.0 * rows[22], -3.0 * rows[24]
    exact = rows.double().requires_grad_()
    expected = reference.pair_energy(exact, definition, **space, eps=eps)
    (truth,) = torch.autograd.grad(expected, exact)
    rows.requires_grad_()
    energy = comhe_ext.pair_energy(rows, pair=pair, eps=eps, backend=backend)
    (gradient,) = torch.autograd.grad(energy, rows)
    assert relative_error(energy, expected) <= 1e-6
    assert relative_error(gradient, truth, floor(expected)) <= 1e-5
    assert not gradient[20].any() or eps > 0


# nearly constant functions, whose small slopes of two ends nearly cancel in half space
NEARLY_CONSTANT = [
    *(Riesz(s) for s in (-1.99, -1.01, -0.99, -0.01, 0.01)),
    *(Riesz(s, shift=1e3) for s in (0.0, 2.0, -1.0)),
    *(Riesz(s, shift=1.0) for s in (-1.99, 0.01)),
    *(kind(tau) for kind in (Gaussian, Laplace) for tau in (1e-3, 0.05)),
]


@pytest.mark.parametrize("pair", NEARLY_CONSTANT, ids=str)
@every_space
def test_small_slopes_keep_their_digits(pair, space, backend, device):
    pair = replace(pair, **space)
    if not backends.load(backend).supports(pair):
        return  # tested above
    for n, k in ((70, 3), (70, 8), (100, 16), (100, 130)):
        rows = random_rows(n, k, seed=k, device=device)
        exact = rows.double().requires_grad_()
        expected = reference.pair_energy(exact, definition_of(pair), **space)
        (truth,) = torch.autograd.grad(expected, exact)
        rows.requires_grad_()
        energy = comhe_ext.pair_energy(rows, pair=pair, backend=backend)
        (gradient,) = torch.autograd.grad(energy, rows)
        assert relative_error(energy, expected) <= 1e-6
        assert relative_error(gradient, truth) <= 2e-6


def definition_of(pair):
    """The reference's own definition of a pair function of any parameters."""
    if isinstance(pair, Gaussian):
        return lambda t: (-pair.tau * t.square()).exp()
    if isinstance(pair, Laplace):
        return lambda t: (-pair.tau * t).exp()
    return lambda t: reference._pair_function(t, pair.s, pair.min_distance, pair.shift)


@every_function
def test_nan_and_infinity_stay_in_their_set(pair, definition, backend, device):
    if not backends.load(backend).supports(pair):
        return  # tested above
    for bad in (math.nan, math.inf):
        rows = random_rows(40, 6, device=device).view(2, 20, 6)
        rows[0, 3, 1] = bad
        rows.requires_grad_()
        energy = comhe_ext.pair_energy(rows, pair=pair, backend=backend)
        (gradient,) = torch.autograd.grad(energy.sum(), rows)
        assert energy.isnan().tolist() == [True, False]
        assert bool(gradient[0, 3].isnan().all())
        assert bool(gradient[1].isfinite().all())


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
    assert relative_error(gradient, truth, floor(energy)) <= 2e-6


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
        (ValueError, "`s` must be finite and greater than -2, got -2", lambda: Riesz(-2)),
        (ValueError, "`s` must be finite and greater than -2, got inf", lambda: Riesz(math.inf)),
        (ValueError, "`s` must be finite and greater than -2, got nan", lambda: Riesz(math.nan)),
        (ValueError, "`shift` must be finite and at least 0, got -1", lambda: Riesz(2.0, -1)),
        (ValueError, "`shift` must be finite and at least 0, got inf",
         lambda: Riesz(2.0, math.inf)),
        (ValueError, "`shift` must be finite and at least 0, got nan",
         lambda: Riesz(2.0, math.nan)),
        (TypeError, "`shift` must be a number, got str", lambda: Riesz(2.0, "1")),
        (ValueError, "`tau` must be finite and greater than 0, got 0", lambda: Laplace(0)),
        (ValueError, "`tau` must be finite and greater than 0, got inf",
         lambda: Laplace(math.inf)),
        (ValueError, "`min_distance` must be .* got nan",
         lambda: Riesz(2.0, min_distance=math.nan)),
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


def test_the_triton_kernels_say_which_pair_functions_they_know():
    pytest.importorskip("triton")
    gpu = backends.load("triton")
    assert gpu.supports(Riesz(0.5))
    for pair in (Gaussian(), Riesz(-0.5), Riesz(2.0, shift=1.0), Laplace()):
        assert gpu.supports(pair)
    # their two ends cancel to rounding
    for pair in (
        Riesz(-1.5, half_space=True),
        Riesz(-0.5, half_space=True, angular=True),
        Riesz(2.0, shift=1.0, half_space=True, angular=True),
        Laplace(0.5, half_space=True, angular=True),
    ):
        assert not gpu.supports(pair)


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


# Of the rows of sin(1), sin(2), ..., sin(40), 8 x 5, normalized to x; r = torch.pdist(x), and c and
# theta the cosines and angles of the same pairs. The value of each formula, and how it is ours.
OTHERS = {
    # Wang and Isola (2020): torch.pdist(x, p=2).pow(2).mul(-2).exp().mean().log()
    "uniformity": (-1.9773558019351645, Gaussian(2.0), torch.log),
    # TIMA, arXiv 2405.17678: (1 / (1 + r**2)).mean()
    "TIMA": (0.39490535962625234, Riesz(2.0, shift=1.0), lambda e: e),
    # KCL, arXiv 2405.18045, t = c = 2: (-0.5 * torch.log(t * r**2 + 1)).mean()
    "KCL log": (-0.7609940902582951, Riesz(0.0, shift=0.5), lambda e: e - math.log(2) / 2),
    # (c / torch.sqrt(c**2 + r**2)).mean()
    "KCL IMQ": (0.8172340411887806, Riesz(1.0, shift=4.0), lambda e: 2 * e),
    # (-t * r**2).exp().mean()
    "KCL Gaussian": (0.13843480282181567, Gaussian(2.0), lambda e: e),
    # LM-Dispersion, its angular spread with tau = 0.5: (-theta / math.pi / tau).exp().mean().log()
    "LM-Dispersion": (-0.9333970103939346, Laplace(2 / math.pi, angular=True), torch.log),
    # ltl-uva/ledoh-torch, KERNELS with gamma = 1: c.exp().mean()
    "LEDoH Gaussian": (1.1129695866569895, Gaussian(0.5), lambda e: math.e * e),
    # (-(theta**2)).exp().mean(), and (-theta).exp().mean()
    "LEDoH geodesic Gaussian": (0.20651565105154668, Gaussian(angular=True), lambda e: e),
    "LEDoH geodesic Laplace": (0.2617477552160238, Laplace(angular=True), lambda e: e),
    # Riesz of 2 - c, half of 2 + r^2: ((2 - c)**-0.5).mean(), (-(2 - c).log() / 2).mean() and
    # (-((2 - c)**0.5)).mean()
    "LEDoH Riesz 1": (0.7193107064026885, Riesz(1.0, shift=2.0), lambda e: math.sqrt(2) * e),
    "LEDoH Riesz 0": (-0.3445866839806712, Riesz(0.0, shift=2.0), lambda e: e + math.log(2) / 2),
    "LEDoH Riesz -1": (-1.4317377806470708, Riesz(-1.0, shift=2.0), lambda e: e / math.sqrt(2)),
    # (-theta).mean()
    "LEDoH geodesic Riesz -1": (-1.6889689331930882, Riesz(-1.0, angular=True), lambda e: e),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_formulas_of_others(name, backend, device):
    expected, pair, ours = OTHERS[name]
    rows = torch.arange(1, 41, dtype=torch.float64).sin().view(8, 5)
    energy = ours(comhe_ext.pair_energy(rows, pair=pair))
    assert float(energy) == pytest.approx(expected, rel=1e-12)
    if not backends.load(backend).supports(pair):
        return  # tested above
    energy = ours(comhe_ext.pair_energy(rows.float().to(device), pair=pair, backend=backend))
    assert float(energy) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("pair", "of_square"),
    [
        (Gaussian(1.5), lambda x: (-1.5 * x).exp()),
        (Riesz(2.0, shift=1.0), lambda x: 1 / (1 + x)),
        (Riesz(0.0, shift=0.5), lambda x: -(0.5 + x).log() / 2),
        (Riesz(-1.0, shift=0.5), lambda x: -((0.5 + x) ** 0.5)),
    ],
    ids=["Gaussian", "s=2", "s=0", "s=-1"],
)
@pytest.mark.parametrize("half_space", [False, True])
def test_what_is_smooth_has_second_derivatives_at_duplicates(pair, of_square, half_space):
    # their force is along the rows themselves, and their second derivative is not zero
    rows = random_rows(8, 4, dtype=torch.float64)
    rows[5] = rows[2]
    tangents = random_rows(8, 4, seed=1, dtype=torch.float64)

    def energy(x):
        return comhe_ext.pair_energy(x, pair=replace(pair, half_space=half_space))

    def dense(x):
        u = torch.nn.functional.normalize(x)
        u = torch.cat([u, -u]) if half_space else u
        i, j = torch.triu_indices(len(u), len(u), 1)
        return of_square(2 - 2 * (u[i] * u[j]).sum(1)).mean()

    assert relative_error(energy(rows), dense(rows)) <= 1e-14
    actual = torch.autograd.functional.hvp(energy, rows, tangents)[1]
    assert relative_error(actual, torch.autograd.functional.hvp(dense, rows, tangents)[1]) <= 1e-10
