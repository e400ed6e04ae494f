"""Energies of projected rows and of groups of coordinates."""

import pytest
import torch

import comhe_ext
from comhe_ext import backends
from comhe_ext.testing import random_rows, reference, relative_error

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def inputs(n=40, d=24, count=3, k=8, dtype=torch.float32, device=None):
    weight = random_rows(n, d, dtype=dtype, device=device)
    projection = random_rows(count * k, d, seed=1, dtype=dtype, device=device)
    return weight, projection.view(count, k, d)


def gradients(energy, tensors):
    return torch.autograd.grad(energy.sum(), tensors)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(s=0.0, half_space=True),
        dict(s=1.0, angular=True, reduction="sum"),
        dict(s=3.0, half_space=True, eps=1e-2, min_distance=0.2),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("n", "d", "count", "k"),
    [
        (40, 24, 3, 8),
        (5, 3, 1, 7),  # one matrix, more dimensions than before
        (33, 50, 4, 1),  # onto a line: coincident and antipodal rows only
        (530, 16, 2, 9),  # two blocks
        (0, 4, 2, 3),
    ],
)
def test_energy_and_gradients(n, d, count, k, options, backend, device):
    weight, projection = inputs(n, d, count, k, device=device)
    actual = [weight.requires_grad_(), projection.requires_grad_()]
    energy = comhe_ext.compressive_energy(*actual, **options, backend=backend)
    exact = [x.detach().double().requires_grad_() for x in actual]
    expected = reference.compressive_energy(*exact, **options)
    assert energy.shape == ()
    assert energy.dtype == torch.float32
    assert relative_error(energy, expected) <= 2e-6
    if k == 1 and not options.get("eps"):
        # on a line, only the side of 0 matters on which a point lies
        for gradient in gradients(energy, actual):
            assert float(gradient.abs().max()) <= 1e-5 * float(energy.detach().abs())
        return
    for gradient, truth in zip(gradients(energy, actual), gradients(expected, exact), strict=True):
        # the float32 projection is rounded too, before close pairs are told apart
        assert relative_error(gradient, truth) <= 2e-5


def test_float64_is_exact():
    weight, projection = inputs(dtype=torch.float64)
    actual = [weight.requires_grad_(), projection.requires_grad_()]
    energy = comhe_ext.compressive_energy(*actual, half_space=True)
    expected = reference.compressive_energy(*actual, half_space=True)
    assert relative_error(energy, expected) <= 1e-14
    for one, other in zip(gradients(energy, actual), gradients(expected, actual), strict=True):
        assert relative_error(one, other) <= 1e-12


def test_batch_of_layers(backend, device):
    weight, projection = inputs(60, device=device)
    weight = weight.view(4, 15, 24)
    energies = comhe_ext.compressive_energy(weight, projection, half_space=True, backend=backend)
    expected = [reference.compressive_energy(w, projection, half_space=True) for w in weight]
    assert relative_error(energies, torch.stack(expected)) <= 2e-6


def test_second_order_in_both_arguments():
    weight, projection = inputs(6, 5, 2, 3, dtype=torch.float64)
    arguments = (weight.requires_grad_(), projection.requires_grad_())

    def energy(w, p):
        return comhe_ext.compressive_energy(w, p, half_space=True)

    assert torch.autograd.gradcheck(energy, arguments)
    assert torch.autograd.gradgradcheck(energy, arguments)


def test_gradient_through_an_unrolled_step_of_the_projection(backend, device):
    # adversarial projections: P raises the energy, W lowers it through the step of P
    weight, projection = inputs(device=device)

    def outer(w, p, energy):
        (rise,) = torch.autograd.grad(energy(w, p), p, create_graph=True)
        return torch.autograd.grad(energy(w, p + 0.5 * rise), w)[0]

    actual = outer(
        weight.clone().requires_grad_(),
        projection.clone().requires_grad_(),
        lambda w, p: comhe_ext.compressive_energy(w, p, backend=backend),
    )
    expected = outer(
        weight.double().requires_grad_(),
        projection.double().requires_grad_(),
        reference.compressive_energy,
    )
    assert relative_error(actual, expected) <= 1e-4


@pytest.mark.parametrize("first", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("second", [torch.float16, torch.bfloat16, torch.float32])
def test_mixed_dtypes(first, second, backend, device):
    weight, projection = inputs(device=device)
    actual = [weight.to(first).requires_grad_(), projection.to(second).requires_grad_()]
    energy = comhe_ext.compressive_energy(*actual, reduction="sum", backend=backend)
    exact = [x.detach().double().requires_grad_() for x in actual]
    expected = reference.compressive_energy(*exact, reduction="sum")
    assert energy.dtype == torch.float32
    assert relative_error(energy, expected) <= 2e-6
    pairs = zip(actual, gradients(energy, actual), gradients(expected, exact), strict=True)
    for argument, gradient, truth in pairs:
        assert gradient.dtype == argument.dtype
        rounding = 0.0 if argument.dtype == torch.float32 else torch.finfo(argument.dtype).eps
        assert relative_error(gradient, truth) <= 2e-5 + rounding


@pytest.mark.parametrize("position", [0, 1])
def test_float64_in_one_argument(position):
    arguments = list(inputs())
    arguments[position] = arguments[position].double()
    energy = comhe_ext.compressive_energy(*arguments)
    assert energy.dtype == torch.float64
    assert relative_error(energy, reference.compressive_energy(*arguments)) <= 1e-14


def test_autocast_does_not_lower_the_projection(backend, device):
    weight, projection = inputs(device=device)
    arguments = [weight.requires_grad_(), projection.requires_grad_()]
    expected = comhe_ext.compressive_energy(*arguments, backend=backend)
    expected_gradients = gradients(expected, arguments)
    with torch.autocast(device, dtype=torch.bfloat16):
        energy = comhe_ext.compressive_energy(*arguments, backend=backend)
        assert torch.is_autocast_enabled(device)
    assert torch.equal(energy, expected)
    for one, other in zip(gradients(energy, arguments), expected_gradients, strict=True):
        assert torch.equal(one, other)


def count_products(call):
    """What `call` returns, and how many matrix products PyTorch ran for it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        result = call()
    products = ("aten::mm", "aten::bmm", "aten::addmm")
    return result, sum(event.count for event in profile.key_averages() if event.key in products)


@pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason="the portable tiles are products"
)
def test_all_projections_are_one_product():
    weight, projection = inputs(count=20)
    arguments = [weight.requires_grad_(), projection.requires_grad_()]
    energy, products = count_products(
        lambda: comhe_ext.compressive_energy(*arguments, backend="cpu")
    )
    assert products == 1
    _, products = count_products(lambda: gradients(energy, arguments))
    assert products == 2
    _, products = count_products(
        lambda: gradients(comhe_ext.compressive_energy(weight, projection.detach()), [weight])
    )
    assert products == 2  # none for a projection that does not learn


def test_random_projection():
    generator = torch.Generator().manual_seed(3)
    projection = comhe_ext.random_projection(20, 40, 300, generator=generator)
    assert projection.shape == (20, 40, 300)
    assert projection.dtype == torch.float32
    assert not projection.requires_grad
    count = projection.numel()
    assert abs(float(projection.mean())) < 6 / count**0.5
    assert float(projection.var()) == pytest.approx(1.0, abs=6 * (2 / count) ** 0.5)
    again = comhe_ext.random_projection(20, 40, 300, generator=generator.manual_seed(3))
    assert torch.equal(projection, again)
    assert not torch.equal(projection, comhe_ext.random_projection(20, 40, 300))
    half = comhe_ext.random_projection(1, 2, 3, dtype=torch.bfloat16, device="cpu")
    assert half.dtype == torch.bfloat16


def test_projection_keeps_the_mean_of_the_angles():
    # Johnson-Lindenstrauss: many dimensions, the energies come together
    weight = random_rows(50, 200, dtype=torch.float64)
    energy = comhe_ext.hyperspherical_energy(weight, 1.0)
    projection = comhe_ext.random_projection(5, 4000, 200, dtype=torch.float64)
    projected = comhe_ext.compressive_energy(weight, projection, 1.0)
    assert float(projected) == pytest.approx(float(energy), rel=1e-2)


@pytest.mark.parametrize(
    ("groups", "lists"),
    [
        (1, [range(11)]),
        (2, [range(6), range(6, 11)]),
        (3, [range(4), range(4, 8), range(8, 11)]),
        (11, [[i] for i in range(11)]),
        ([[0, 1, 2], [2, 9]], [[0, 1, 2], [2, 9]]),  # overlapping, not covering
        ([torch.tensor([10, 4]), (1, 2, 3, 5)], [[10, 4], [1, 2, 3, 5]]),
    ],
    ids=str,
)
def test_group_energy(groups, lists, backend, device):
    weight = random_rows(23, 11, device=device).requires_grad_()
    exact = weight.detach().double().requires_grad_()
    energy = comhe_ext.group_energy(weight, groups, 1.0, half_space=True, backend=backend)
    expected = reference.group_energy(exact, [list(g) for g in lists], 1.0, half_space=True)
    assert relative_error(energy, expected) <= 1e-6
    (gradient,) = gradients(energy, [weight])
    (truth,) = gradients(expected, [exact])
    floor = 1e-6 * float(expected.detach())
    assert relative_error(gradient, truth, floor) <= 1e-5


def test_group_energy_of_a_batch(backend, device):
    weight = random_rows(30, 7, device=device).view(3, 10, 7)
    energies = comhe_ext.group_energy(weight, 3, backend=backend)
    expected = [comhe_ext.group_energy(w, 3, backend=backend) for w in weight]
    assert relative_error(energies, torch.stack(expected)) <= 1e-6


def test_group_energy_is_differentiable_twice():
    weight = random_rows(5, 7, dtype=torch.float64).requires_grad_()

    def energy(w):
        return comhe_ext.group_energy(w, [[0, 1, 2, 3], [3, 4, 5, 6]], half_space=True)

    assert torch.autograd.gradcheck(energy, weight)
    assert torch.autograd.gradgradcheck(energy, weight)
