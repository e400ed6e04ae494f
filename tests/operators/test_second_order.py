"""Hessian-vector products, double backward, and what happens beyond."""

import itertools
import math

import pytest
import torch

import comhe_ext
from comhe_ext.testing import (
    options_of,
    packed_energy,
    paired_rows,
    random_rows,
    reference,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

OPTIONS = [
    dict(s=s, angular=angular, half_space=half_space, eps=eps)
    for s, angular, half_space, eps in itertools.product(
        (0.0, 0.5, 1.0, 2.0, 3.0), (False, True), (False, True), (0.0, 1e-2)
    )
]


def hessian_vector_product(energy, weight, tangents):
    """Of the sum of `energy(weight)`, by reverse mode twice."""
    weight = weight.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(weight).sum(), weight, create_graph=True)
    (product,) = torch.autograd.grad(gradient, weight, tangents)
    return product


_TRUTHS = {}


def truth(weight, tangents, **options):
    """The float64 product, worked out once for all backends."""
    key = (weight.cpu().numpy().tobytes(), weight.shape, *sorted(options.items()))
    if key not in _TRUTHS:
        _TRUTHS[key] = hessian_vector_product(
            lambda w: reference.hyperspherical_energy(w, **options),
            weight.double(),
            tangents.double(),
        )
    return _TRUTHS[key]


def check(weight, backend, bound=1e-5, **options):
    tangents = random_rows(weight.numel(), 1, seed=5).view(weight.shape).to(weight)
    actual = hessian_vector_product(
        lambda w: comhe_ext.hyperspherical_energy(w, **options, backend=backend), weight, tangents
    )
    assert actual.dtype == weight.dtype
    assert relative_error(actual, truth(weight, tangents, **options)) <= bound


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options):
    weight = random_rows(6, 4, dtype=torch.float64).requires_grad_()

    def energy(w):
        return comhe_ext.hyperspherical_energy(w, **options)

    assert torch.autograd.gradcheck(energy, weight)
    assert torch.autograd.gradgradcheck(energy, weight)


def test_gradcheck_of_batches_and_sums():
    weight = random_rows(15, 3, dtype=torch.float64).view(3, 5, 3).requires_grad_()

    def energy(w):
        return comhe_ext.hyperspherical_energy(w, 1.0, reduction="sum", eps=1e-2, half_space=True)

    assert torch.autograd.gradcheck(energy, weight)
    assert torch.autograd.gradgradcheck(energy, weight)


def test_gradcheck_of_packed_sets():
    points = random_rows(12, 3, dtype=torch.float64).requires_grad_()

    def energy(p):
        return packed_energy(p, [5, 0, 1, 4, 2], options_of(s=2.0, half_space=True))

    assert torch.autograd.gradcheck(energy, points)
    assert torch.autograd.gradgradcheck(energy, points)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_hessian_vector_product(options, backend, device):
    check(random_rows(67, 12, device=device), backend, **options)


@pytest.mark.parametrize("n", [3, 31, 33, 129, 513])
def test_hessian_vector_product_of_sizes(n, backend, device):
    check(random_rows(n, 9, device=device), backend, s=2.0)
    check(random_rows(n, 9, device=device), backend, s=0.0, half_space=True)


@pytest.mark.parametrize("angle", [1e-2, 1e-3])
@pytest.mark.parametrize("n", [60, 530])  # twins in one tile, and in two
@pytest.mark.parametrize(
    "options",
    [
        dict(s=2.0),
        dict(s=0.0, angular=True),
        dict(s=2.0, half_space=True),
        dict(s=1.0, half_space=True, angular=True),
        dict(s=1.0, eps=1e-4),
        dict(s=2.0, half_space=True, eps=1e-4),
    ],
    ids=str,
)
def test_hessian_vector_product_of_close_pairs(options, n, angle, backend, device):
    for antipodal in (False, True) if options.get("half_space") else (False,):
        weight = paired_rows(n, 12, angle, antipodal=antipodal, device=device)
        check(weight, backend, min_distance=0.0, **options)


@pytest.mark.parametrize("s", [6.0, 8.0, 10.0])
@pytest.mark.parametrize("half_space", [False, True])
def test_hessian_vector_product_is_finite_where_its_parts_are_not(half_space, s, backend, device):
    # the slope in the cosine, up to 1e39, is out of float32; the product is not
    for k in (5, 24):
        weight = random_rows(30, k, device=device)
        weight[5] = weight[6] + 1e-5 * weight[7]
        check(weight, backend, bound=1e-4, s=s, half_space=half_space)


def test_hessian_vector_product_without_a_bound(backend, device):
    weight = torch.zeros(3, 20, device=device)
    weight[:, 0] = 1.0
    weight[1, 1], weight[2, 2] = 1e-7, 1.0
    check(weight, backend, s=2.0, min_distance=0.0)
    weight[1, 1] = 1e-12  # and here it is infinite
    product = hessian_vector_product(
        lambda w: comhe_ext.hyperspherical_energy(w, 9.0, min_distance=0.0, backend=backend),
        weight,
        torch.ones_like(weight),
    )
    assert not product.isnan().any()


@pytest.mark.parametrize("options", [dict(), dict(half_space=True), dict(angular=True)], ids=str)
@pytest.mark.parametrize("factor", [3.0, -3.0, 11.0])
def test_hessian_vector_product_of_multiples_of_a_row(factor, options, backend, device):
    weight = random_rows(20, 24, device=device)
    weight[3] = torch.arange(24.0, device=device).remainder(5.0) - 2.0
    weight[4] = math.copysign(1.0, factor) * weight[3]
    tangents = random_rows(20, 24, seed=7, device=device)
    tangents[4] = torch.arange(24.0, device=device).remainder(7.0) - 3.0  # scaled exactly, too
    scaled, scaled_tangents = weight.clone(), tangents.clone()
    scaled[4] *= abs(factor)
    scaled_tangents[4] *= abs(factor)

    def product(w, t, function, **more):
        return hessian_vector_product(lambda x: function(x, **options, **more), w, t)

    # of exact duplicates; the length of a row scales its row of the product
    expected = product(weight.double(), tangents.double(), reference.hyperspherical_energy)
    expected[4] /= abs(factor)
    actual = product(scaled, scaled_tangents, comhe_ext.hyperspherical_energy, backend=backend)
    assert relative_error(actual, expected) <= 1e-5
    truth = product(scaled.double(), scaled_tangents.double(), reference.hyperspherical_energy)
    assert relative_error(truth, expected) <= 1e-10


def test_hessian_vector_product_on_the_tangent_line(backend, device):
    for options in (dict(min_distance=0.3), dict(min_distance=1.3, half_space=True, eps=1e-2)):
        check(paired_rows(60, 5, 1e-2, device=device), backend, **options)


@pytest.mark.parametrize("options", [dict(), dict(half_space=True), dict(eps=1e-2)], ids=str)
def test_hessian_vector_product_with_dead_rows_and_duplicates(options, backend, device):
    weight = random_rows(40, 6, device=device)
    weight[[0, 7, 39]] = 0.0
    check(weight, backend, **options)
    weight[5] = weight[6]
    product = hessian_vector_product(
        lambda w: comhe_ext.hyperspherical_energy(w, **options, backend=backend),
        weight,
        torch.ones_like(weight),
    )
    assert product.isfinite().all()


def test_penalty_on_the_gradient_beside_another_term(backend, device):
    # a saved gradient that is only scaled would silently drop the Hessian here
    weight = random_rows(50, 8, device=device)

    def penalty(energy, w):
        total = energy(w) + w.pow(3).mean()
        (gradient,) = torch.autograd.grad(total, w, create_graph=True)
        return torch.autograd.grad(gradient.norm(), w)[0]

    actual = penalty(
        lambda w: comhe_ext.hyperspherical_energy(w, backend=backend),
        weight.clone().requires_grad_(),
    )
    expected = penalty(reference.hyperspherical_energy, weight.double().requires_grad_())
    assert relative_error(actual, expected) <= 1e-5


def test_second_derivative_in_the_incoming_gradient():
    # E(w) * a: the mixed derivative in w and a is the gradient itself
    weight = random_rows(20, 5, dtype=torch.float64).requires_grad_()
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    energy = comhe_ext.hyperspherical_energy(weight)
    (gradient,) = torch.autograd.grad(energy, weight, retain_graph=True)
    (scaled,) = torch.autograd.grad(energy * a, weight, create_graph=True)
    tangents = random_rows(20, 5, seed=9, dtype=torch.float64)
    (mixed,) = torch.autograd.grad((scaled * tangents).sum(), a)
    assert float(mixed) == pytest.approx(float((gradient * tangents).sum()), rel=1e-12)


def test_jacobian_and_hessian_of_torch_func():
    weight = random_rows(5, 3, dtype=torch.float64)
    actual = torch.func.jacrev(torch.func.grad(comhe_ext.hyperspherical_energy))(weight)
    expected = torch.autograd.functional.hessian(reference.hyperspherical_energy, weight)
    assert relative_error(actual, expected) <= 1e-12


def test_third_derivatives_are_refused():
    weight = random_rows(10, 4).requires_grad_()
    energy = comhe_ext.hyperspherical_energy(weight)
    (gradient,) = torch.autograd.grad(energy, weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives are not implemented"):
        torch.autograd.grad(second.sum(), weight)


def test_retained_graph_gives_the_same_twice(backend, device):
    weight = random_rows(30, 5, device=device).requires_grad_()
    energy = comhe_ext.hyperspherical_energy(weight, backend=backend)
    (first,) = torch.autograd.grad(3.0 * energy, weight, retain_graph=True)
    (second,) = torch.autograd.grad(3.0 * energy, weight)
    assert torch.equal(first, second)


def test_create_graph_alone_changes_nothing(backend, device):
    weight = random_rows(30, 5, device=device).requires_grad_()
    energy = comhe_ext.hyperspherical_energy(weight, backend=backend)
    (plain,) = torch.autograd.grad(energy, weight, retain_graph=True)
    (graphed,) = torch.autograd.grad(energy, weight, create_graph=True)
    assert torch.equal(plain, graphed)
    assert graphed.requires_grad
