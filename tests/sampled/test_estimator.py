"""The sampled energy is the exact one in the mean, with right derivatives, whatever it is given."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import normalize

import comhe_ext
from comhe_ext import Gaussian, Laplace, Riesz, compressive_energy, group_energy, pair_energy
from comhe_ext import hyperspherical_energy as energy_of
from comhe_ext.sampled import SamplingPlan
from comhe_ext.sampled.estimator import Blocks, estimated_energies
from comhe_ext.settings import pair_settings
from comhe_ext.testing import random_rows, reference, relative_error
from comhe_ext.testing.kinds import KINDS, rows_of_kind

# torch's own tracer makes an instance of every autograd Function that it meets
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated"),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def few_rows(n=5, k=3):
    """Rows with a near pair, a nearly antipodal one, and a dead row, which is orthogonal to all."""
    rows = random_rows(n, k, dtype=torch.float64)
    rows[1] = 2.0 * rows[0] + 0.05 * rows[2]
    rows[3] = -rows[2] + 0.05 * rows[0]
    rows[4] = 0.0
    return rows


def mean_over_all_partitions(rows, samples, plan, pair, reduction, eps):
    permutations = torch.tensor(list(itertools.permutations(range(len(rows)))))
    sets = rows.expand(len(permutations), *rows.shape)
    options = pair_settings(pair, reduction, eps, None).options((rows,))
    polynomial = plan.polynomial(pair)
    return estimated_energies(sets, permutations, samples, polynomial, plan.listed, options).mean()


FUNCTIONS = [
    Riesz(2.0),
    Riesz(0.0),
    Riesz(-1.0),
    Riesz(1.0, shift=0.3),
    Gaussian(2.0),
    Laplace(1.0),
    Riesz(1.0, angular=True),
    Riesz(2.0, half_space=True),
    Riesz(0.0, half_space=True),
    Laplace(1.0, half_space=True, angular=True),
]


@pytest.mark.parametrize("pair", FUNCTIONS, ids=str)
@pytest.mark.parametrize(("reduction", "eps"), [("mean", 0.0), ("sum", 0.1)])
def test_mean_over_all_partitions_is_the_exact_energy_with_its_gradient(pair, reduction, eps):
    rows = few_rows()
    (exact, gradient) = value_and_gradient(
        lambda x: pair_energy(x, pair=pair, reduction=reduction, eps=eps), rows
    )
    for degree, trees, samples in itertools.product((0, 2, 4), (0, 2), (2, 3)):
        plan = SamplingPlan.from_rows(rows, degree, trees, generator=generator())
        assert (len(plan.listed.i) > 0) == (trees > 0)

        def mean(x, samples=samples, plan=plan):
            return mean_over_all_partitions(x, samples, plan, pair, reduction, eps)

        value, slope = value_and_gradient(mean, rows)
        assert relative_error(value, exact) < 1e-12
        assert relative_error(slope, gradient) < 1e-11


def value_and_gradient(function, rows):
    x = rows.clone().requires_grad_()
    value = function(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def test_the_exact_energy_of_that_test_is_the_definition():
    rows = few_rows()
    for half_space in (False, True):
        expected = reference.hyperspherical_energy(rows, 1.0, half_space=half_space)
        pair = Riesz(1.0, half_space=half_space)
        plan = SamplingPlan.from_rows(rows, generator=generator())
        value = mean_over_all_partitions(rows, 2, plan, pair, "mean", 0.0)
        assert relative_error(value, expected) < 1e-11


@pytest.mark.parametrize("wide", [3, 40])
def test_moments_and_cosines_sum_the_same_polynomial(wide):
    # wide rows in small blocks are summed by their cosines, others by moments
    rows = random_rows(7, wide, dtype=torch.float64)
    for degree in (2, 3, 4):
        plan = SamplingPlan.from_rows(rows, degree, 0, generator=generator())
        polynomial = plan.polynomial(Riesz(2.0))
        c = normalize(rows) @ normalize(rows).T
        i, j = torch.triu_indices(7, 7, 1)
        found = comhe_ext.sampled.polynomials.pair_sums(polynomial, normalize(rows)[None])
        assert relative_error(found[0], polynomial.at(c[i, j]).sum()) < 1e-12


def test_many_rows_take_the_moments_in_chunks(monkeypatch):
    rows = normalize(random_rows(1300, 6, dtype=torch.float64)).expand(2, -1, -1)
    plan = SamplingPlan.from_rows(rows[0], 4, 0, generator=generator())
    polynomial = plan.polynomial(Riesz(2.0))
    whole = comhe_ext.sampled.polynomials.pair_sums(polynomial, rows)
    monkeypatch.setattr("comhe_ext.sampled.polynomials.CHUNK", 1)
    x = rows.clone().requires_grad_()
    parts = comhe_ext.sampled.polynomials.pair_sums(polynomial, x)
    assert relative_error(parts, whole) < 1e-12
    parts.sum().backward()
    y = rows.clone().requires_grad_()
    c = y[0] @ y[0].T
    ((polynomial.at(c).sum() - polynomial.at(c.diag()).sum()) / 2.0).backward()
    assert relative_error(x.grad[0], y.grad[0]) < 1e-11


def test_a_polynomial_of_the_pair_function_s_own_form_is_found():
    # exp(t c) is nearly its own series for small t
    plan = SamplingPlan.from_rows(random_rows(2000, 5), 4, 0, generator=generator())
    powers, coefficients = plan.polynomial(Gaussian(0.05))
    series = [math.exp(-0.1) * 0.1**m / math.factorial(m) for m in powers]
    assert powers == (1, 2, 3, 4)
    for found, expected in zip(coefficients[:2], series, strict=False):
        assert abs(float(found) / expected - 1.0) < 1e-4
    assert plan.polynomial(Riesz(2.0, half_space=True)).powers == (2, 4)


# --- the public functions -------------------------------------------------------------------------


def z_score(draws, exact):
    return float((draws.mean() - exact) / (draws.std() / len(draws) ** 0.5))


@pytest.mark.parametrize("half_space", [False, True])
def test_every_energy_estimates_what_it_computes(half_space):
    rows = rows_of_kind("clusters", 96, 8).double()
    matrices = torch.randn(3, 4, 8, generator=generator(), dtype=torch.float64)
    plan = SamplingPlan.from_rows(rows, generator=generator())
    energies = [
        lambda **options: energy_of(rows, 1.0, half_space=half_space, **options),
        lambda **options: energy_of(rows.expand(2, -1, -1), 0.0, **options).sum(),
        lambda **options: compressive_energy(rows, matrices, half_space=half_space, **options),
        lambda **options: group_energy(rows, 2, half_space=half_space, **options),
        lambda **options: pair_energy(rows, pair=Gaussian(1.0), reduction="sum", **options),
    ]
    for energy in energies:
        for used in (None, plan):
            draws = torch.stack(
                [
                    energy(method="sampled", samples=12, plan=used, generator=generator(seed))
                    for seed in range(60)
                ]
            )
            assert draws.unique().numel() > 55
            assert abs(z_score(draws, energy())) < 4.0


def test_one_block_or_two_rows_are_exact():
    rows = random_rows(20, 5)
    assert torch.equal(energy_of(rows, method="sampled"), energy_of(rows))
    assert torch.equal(energy_of(rows[:2], method="sampled", samples=2), energy_of(rows[:2]))
    for n in (0, 1):
        assert energy_of(rows[:n], method="sampled", samples=2) == 0.0
        assert group_energy(rows[:n], 2, method="sampled", samples=2) == 0.0
    none = energy_of(rows.new_empty(0, 20, 5), method="sampled", samples=5)
    assert none.shape == (0,)


@pytest.mark.parametrize(("n", "samples"), [(4, 2), (5, 2), (10, 3), (1000, 7), (1001, 256)])
def test_blocks_hold_every_row_once(n, samples):
    blocks = Blocks.of(n, samples)
    rows = torch.arange(n).view(1, n, 1)
    parts = blocks.split(rows)
    assert torch.equal(torch.cat([x.flatten() for x in parts]), rows.flatten())
    sizes = [len(block) for part in parts for block in part]
    assert len(sizes) == blocks.number
    assert min(sizes) >= 2
    assert max(sizes) - min(sizes) <= 1
    assert blocks.pairs == sum(m * (m - 1) // 2 for m in sizes)
    numbers = [number for number, m in enumerate(sizes) for _ in range(m)]
    assert blocks.number_of(torch.arange(n)).tolist() == numbers


def test_a_generator_gives_the_same_bits_whatever_the_threads():
    rows = random_rows(20_001, 10)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            plan = SamplingPlan.from_rows(rows, 3, generator=generator())
            results.append(
                value_and_gradient(
                    lambda x, plan=plan: energy_of(
                        x, method="sampled", plan=plan, generator=generator(1)
                    ),
                    rows,
                )
            )
    finally:
        torch.set_num_threads(threads)
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(gradient, results[0][1])


# --- derivatives ----------------------------------------------------------------------------------


def sampled(x, degree=2, **options):
    """One and the same estimate, as a function of its rows."""
    plan = SamplingPlan.from_rows(few_rows(), degree, 2, generator=generator())
    options = {"samples": 2, "plan": plan, "generator": generator(1), **options}
    return energy_of(x, 1.0, method="sampled", **options)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("half_space", [False, True])
def test_derivatives(degree, half_space):
    rows = few_rows()[:4].requires_grad_()
    plan = SamplingPlan.from_rows(rows, degree, 2, generator=generator())

    def estimate(x):
        return sampled(x, plan=plan, half_space=half_space, eps=0.01)

    assert torch.autograd.gradcheck(estimate, (rows,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(estimate, (rows,), check_fwd_over_rev=True)


def test_a_third_derivative_raises():
    x = few_rows().requires_grad_()
    value = sampled(x)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        value = gradient.square().sum()
    with pytest.raises(NotImplementedError, match="third derivatives"):
        value.backward()
    third = torch.func.jacfwd(torch.func.jacfwd(torch.func.jacfwd(sampled), randomness="same"))
    with pytest.raises((NotImplementedError, RuntimeError)):
        third(few_rows())


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_transforms_of_torch_func(degree):
    rows = few_rows()
    _, gradient = value_and_gradient(lambda x: sampled(x, degree), rows)
    assert relative_error(torch.func.grad(lambda x: sampled(x, degree))(rows), gradient) < 1e-12
    along = random_rows(5, 3, seed=9, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda x: sampled(x, degree), (rows,), (along,))
    assert relative_error(tangent, (gradient * along).sum()) < 1e-12


def test_vmap_asks_how_to_draw():
    sets = torch.stack([few_rows(), few_rows()])

    def estimate(x):
        return energy_of(x, 1.0, method="sampled", samples=2)

    with pytest.raises(RuntimeError, match="random"):
        torch.func.vmap(estimate)(sets)
    torch.manual_seed(3)
    same = torch.func.vmap(torch.func.grad(estimate), randomness="same")(sets)
    assert torch.equal(same[0], same[1])
    torch.manual_seed(3)
    assert relative_error(same[0], value_and_gradient(estimate, sets[0])[1]) < 1e-12


@pytest.mark.parametrize("planned", [False, True])
def test_compile(planned):
    rows = random_rows(40, 5)
    plan = SamplingPlan.from_rows(rows, 3, generator=generator()) if planned else None

    def estimate(x):
        return energy_of(x, method="sampled", samples=8, plan=plan)

    torch.compiler.reset()
    compiled = torch.compile(estimate, fullgraph=True, backend="aot_eager")
    torch.manual_seed(4)
    expected = value_and_gradient(estimate, rows)
    torch.manual_seed(4)
    found = value_and_gradient(compiled, rows)
    assert relative_error(found[0], expected[0]) < 1e-6
    assert relative_error(found[1], expected[1]) < 1e-5


# --- what rows may be -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_autocast(dtype):
    rows = rows_of_kind("clusters", 3000, 16).to(dtype)
    plan = SamplingPlan.from_rows(rows, generator=generator())
    x = rows.clone().requires_grad_()

    def estimate(x):
        # scaled, because half precision would round so small gradients to few digits
        options = {"plan": plan, "samples": 64, "generator": generator(1)}
        return 1e4 * energy_of(x, method="sampled", **options)

    value = estimate(x)
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert x.grad.dtype == dtype
    double, gradient = value_and_gradient(estimate, rows.double())
    assert relative_error(value, double) < 1e-6
    assert relative_error(x.grad, gradient) < {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(
        dtype, 1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = rows.clone().requires_grad_()
        lowered = estimate(y)
        lowered.backward()
        assert torch.equal(
            SamplingPlan.from_rows(rows, generator=generator()).listed.i, plan.listed.i
        )
    assert torch.equal(lowered, value)
    assert torch.equal(y.grad, x.grad)


def test_nan_reaches_the_result():
    rows = random_rows(60, 5)
    plan = SamplingPlan.from_rows(rows, generator=generator())
    rows[7, 2] = math.nan
    for used in (None, plan, SamplingPlan.from_rows(rows, generator=generator())):
        assert energy_of(rows, method="sampled", samples=10, plan=used).isnan()


def test_dead_rows_have_no_gradient():
    rows = random_rows(60, 5)
    rows[5:8] = 0.0
    plan = SamplingPlan.from_rows(rows, generator=generator())
    _, gradient = value_and_gradient(
        lambda x: energy_of(x, method="sampled", samples=10, plan=plan), rows
    )
    assert gradient[5:8].abs().max() == 0.0
    assert gradient.isfinite().all()


def test_duplicates_have_no_direction_and_an_infinite_energy_stays_infinite():
    rows = random_rows(60, 5)
    rows[30:] = 2.0 * rows[:30]
    plan = SamplingPlan.from_rows(rows, generator=generator())
    assert len(plan.listed.i) >= 30
    for seed in range(3):
        value, gradient = value_and_gradient(
            lambda x, seed=seed: energy_of(
                x, method="sampled", samples=20, plan=plan, generator=generator(seed)
            ),
            rows,
        )
        assert value.isfinite()
        assert gradient.isfinite().all()
        options = {"method": "sampled", "samples": 20, "generator": generator(seed)}
        assert energy_of(rows, min_distance=0.0, plan=plan, **options) == math.inf


def test_rows_of_any_length():
    rows = random_rows(100, 5)
    value, _ = value_and_gradient(
        lambda x: energy_of(x, method="sampled", samples=10, generator=generator()), rows
    )
    for length in (1e-30, 1e30):
        scaled = energy_of(length * rows, method="sampled", samples=10, generator=generator())
        assert relative_error(scaled, value) < 1e-6


# --- mistakes -------------------------------------------------------------------------------------


def test_mistakes_are_told():
    rows = random_rows(60, 5)
    plan = SamplingPlan.from_rows(rows, generator=generator())
    for options, error, words in (
        ({"method": "estimated"}, ValueError, "`method`"),
        ({"method": "sampled", "samples": 1}, ValueError, "`samples`"),
        ({"method": "sampled", "samples": 2.5}, TypeError, "`samples`"),
        ({"method": "sampled", "plan": rows}, TypeError, "`plan`"),
        ({"method": "sampled", "generator": 3}, TypeError, "`generator`"),
        ({"plan": plan}, ValueError, "`plan`"),
        ({"generator": generator()}, ValueError, "`generator`"),
    ):
        for call in (
            lambda **options: energy_of(rows, **options),
            lambda **options: group_energy(rows, 2, **options),
            lambda **options: compressive_energy(rows, torch.eye(5)[None], **options),
            lambda **options: pair_energy(rows, **options),
        ):
            with pytest.raises(error, match=words):
                call(**options)
    with pytest.raises(ValueError, match="60 rows, got 50: call `refresh`"):
        energy_of(rows[:50], method="sampled", samples=8, plan=plan)
    for options in ({"columns": rows}, {"reduction": "rows"}):
        with pytest.raises(ValueError, match="`method`"):
            pair_energy(rows, **options, method="sampled")


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.long
def test_400_draws_are_right_in_the_mean(kind, degree):
    rows = rows_of_kind(kind, 2048, 16).double()
    exact, gradient = value_and_gradient(energy_of, rows)
    plan = SamplingPlan.from_rows(rows, degree, generator=generator())
    energies, gradients = [], torch.zeros(400, rows.numel(), dtype=torch.float64)
    for seed in range(400):
        value, slope = value_and_gradient(
            lambda x, seed=seed: energy_of(
                x, method="sampled", samples=64, plan=plan, generator=generator(seed)
            ),
            rows,
        )
        energies.append(value)
        gradients[seed] = slope.flatten()
    assert abs(z_score(torch.stack(energies), exact)) < 4.0
    # the error of the mean gradient is what the draws' own spread lets expect
    spread = float((gradients.var(0).sum() / 400.0).sqrt())
    error = float((gradients.mean(0) - gradient.flatten()).norm())
    assert error < 1.5 * spread
