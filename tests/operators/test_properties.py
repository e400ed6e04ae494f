"""What must hold for any rows: invariances and identities, on inputs hypothesis chooses."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import comhe_ext
from comhe_ext.kernels.pair_functions import Riesz
from comhe_ext.testing import random_rows, relative_error

SETTINGS = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],  # the machine may be busy
)
OPTIONS = st.fixed_dictionaries(
    {
        "s": st.sampled_from([-1.5, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0]),
        "half_space": st.booleans(),
        "angular": st.booleans(),
    }
)
SEED = st.integers(0, 2**31)
N = st.integers(2, 70)
K = st.integers(2, 40)


def energy_and_gradient(weight, **options):
    weight = weight.detach().requires_grad_()
    energy = comhe_ext.hyperspherical_energy(weight, **options)
    (gradient,) = torch.autograd.grad(energy, weight)
    return energy.detach(), gradient


def agree(one, other, weight):
    """Equal but for rounding: 1e-16, over the distance of the closest rows, and some."""
    unit = torch.nn.functional.normalize(weight)
    closest = torch.nn.functional.pdist(torch.cat([unit, -unit])).min()
    bound = 1e-12 / float(closest.clamp_min(1e-12))
    assert relative_error(one[0], other[0]) <= bound
    floor = 1e-6 * float(other[0].abs())
    assert relative_error(one[1], other[1], floor) <= bound


@SETTINGS
@given(N, K, SEED, OPTIONS)
def test_rotation(n, k, seed, options):
    weight = random_rows(n, k, seed=seed, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(random_rows(k, k, seed=seed + 1, dtype=torch.float64))
    energy, gradient = energy_and_gradient(weight, **options)
    agree(energy_and_gradient(weight @ rotation, **options), (energy, gradient @ rotation), weight)


@SETTINGS
@given(N, K, SEED, OPTIONS, st.sampled_from([0.0, 1e-4, 1.0]))
def test_permutation(n, k, seed, options, eps):
    weight = random_rows(n, k, seed=seed, dtype=torch.float64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    energy, gradient = energy_and_gradient(weight, eps=eps, **options)
    agree(energy_and_gradient(weight[order], eps=eps, **options), (energy, gradient[order]), weight)


@SETTINGS
@given(N, K, SEED, OPTIONS)
def test_positive_lengths_do_not_count(n, k, seed, options):
    weight = random_rows(n, k, seed=seed, dtype=torch.float64)
    lengths = torch.exp(8 * random_rows(n, 1, seed=seed + 1, dtype=torch.float64))
    energy, gradient = energy_and_gradient(weight, **options)
    scaled_energy, scaled_gradient = energy_and_gradient(weight * lengths, **options)
    agree((scaled_energy, scaled_gradient * lengths), (energy, gradient), weight)


@SETTINGS
@given(N, K, SEED, OPTIONS, st.sampled_from([0.0, 1e-2]))
def test_signs_do_not_count_in_half_space(n, k, seed, options, eps):
    options = {**options, "half_space": True, "eps": eps}
    weight = random_rows(n, k, seed=seed, dtype=torch.float64)
    signs = random_rows(n, 1, seed=seed + 1, dtype=torch.float64).sign()
    energy, gradient = energy_and_gradient(weight, **options)
    agree(energy_and_gradient(weight * signs, **options), (energy, gradient * signs), weight)


@SETTINGS
@given(N, K, SEED, OPTIONS, st.sampled_from([torch.float32, torch.float64]))
def test_gradient_is_tangent_to_the_sphere(n, k, seed, options, dtype):
    weight = random_rows(n, k, seed=seed, dtype=dtype)
    _, gradient = energy_and_gradient(weight, **options)
    along = (gradient * weight).sum(1).abs()
    size = gradient.norm(dim=1) * weight.norm(dim=1)
    assert (along <= 16 * torch.finfo(dtype).eps * (size + size.max())).all()


@SETTINGS
@given(N, K, SEED, OPTIONS)
def test_sum_is_twice_the_pairs_times_the_mean(n, k, seed, options):
    weight = random_rows(n, k, seed=seed, dtype=torch.float64)
    energy, gradient = energy_and_gradient(weight, **options)
    ordered = 2 * Riesz(half_space=options["half_space"]).pair_count(n)
    assert ordered == (2 * n * (2 * n - 1) if options["half_space"] else n * (n - 1))
    total = energy_and_gradient(weight, reduction="sum", **options)
    agree(total, (ordered * energy, ordered * gradient), weight)


@SETTINGS
@given(N, K, SEED, OPTIONS, st.integers(1, 9))
def test_columns_of_zeros_do_not_count(n, k, seed, options, more):
    weight = random_rows(n, k, seed=seed, dtype=torch.float64)
    energy, gradient = energy_and_gradient(weight, **options)
    padded_energy, padded = energy_and_gradient(
        torch.nn.functional.pad(weight, (0, more)), **options
    )
    agree((padded_energy, padded[:, :k]), (energy, gradient), weight)
    assert (padded[:, k:] == 0).all()


@SETTINGS
@given(N, K, SEED, OPTIONS)
def test_half_space_is_the_energy_of_twice_the_points(n, k, seed, options):
    weight = random_rows(n, k, seed=seed, dtype=torch.float64)
    folded = energy_and_gradient(weight, **{**options, "half_space": True})
    both = torch.cat([weight, -weight])
    energy, gradient = energy_and_gradient(both, **{**options, "half_space": False})
    agree(folded, (energy, gradient[:n] - gradient[n:]), weight)


@SETTINGS
@given(N, K, SEED, OPTIONS)
def test_a_step_down_the_gradient_lowers_the_energy(n, k, seed, options):
    weight = random_rows(n, k, seed=seed, dtype=torch.float64)
    energy, gradient = energy_and_gradient(weight, **options)
    if float(gradient.norm()) < 1e-8:  # already at an optimum
        return
    step = 1e-6 * weight.norm() / gradient.norm() * gradient
    lower, _ = energy_and_gradient(weight - step, **options)
    assert float(lower) <= float(energy)


@SETTINGS
@given(st.integers(0, 5), st.integers(0, 20), K, SEED, OPTIONS)
def test_sets_of_a_batch_do_not_see_each_other(count, n, k, seed, options):
    weight = random_rows(count * n, k, seed=seed, dtype=torch.float64).view(count, n, k)
    energies = comhe_ext.hyperspherical_energy(weight, **options)
    alone = [comhe_ext.hyperspherical_energy(one, **options) for one in weight]
    assert energies.shape == (count,)
    for energy, one in zip(energies, alone, strict=True):
        assert float(energy) == pytest.approx(float(one), rel=1e-12)


def test_small_s_tends_to_the_logarithm():
    # (t^-s - 1) / s -> log(1/t)
    weight = random_rows(40, 7, dtype=torch.float64)
    logarithm = comhe_ext.hyperspherical_energy(weight, 0.0)
    energy = comhe_ext.hyperspherical_energy(weight, 1e-7)
    assert float((energy - 1) / 1e-7) == pytest.approx(float(logarithm), rel=1e-5)
