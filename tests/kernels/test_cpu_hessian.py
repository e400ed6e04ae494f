"""The compiled Hessian-vector product by itself, once per instruction set of this processor."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from comhe_ext.kernels.cpu import binding
from comhe_ext.kernels.pair_functions import Gaussian, Laplace, Riesz
from comhe_ext.kernels.sweep import SweepRequest
from comhe_ext.testing import (
    collapsed_rows,
    paired_rows,
    random_rows,
    reference,
    relative_error,
)

pytestmark = [
    pytest.mark.skipif(binding.unavailable() is not None, reason=str(binding.unavailable())),
    pytest.mark.usefixtures("poisoned_empty", "isa"),
]


def definition(pair):
    """f of the distance, its tangent line included, in torch."""
    if isinstance(pair, Gaussian):
        return lambda t: (-pair.tau * t.square()).exp()
    if isinstance(pair, Laplace):
        return lambda t: (-pair.tau * t).exp()

    def riesz(t):
        u = (pair.shift + t.square()).sqrt() if pair.shift else t
        return -u.log() if pair.s == 0 else math.copysign(1, pair.s) * u.pow(-pair.s)

    if pair.tangent is None:
        return riesz
    at = torch.tensor(pair.min_distance, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(riesz(at), at)
    at = at.detach()
    return lambda t: torch.where(t < at, riesz(at) + slope * (t - at), riesz(t.clamp_min(at)))


_TRUTHS = {}


def truth(rows, tangents, pair, eps):
    """By autograd, twice, of the dense float64 definition; once for all instruction sets."""
    key = (rows.float().numpy().tobytes(), tangents.numpy().tobytes(), pair, eps)
    if key not in _TRUTHS:
        x = rows.double().requires_grad_()
        spaces = dict(half_space=pair.half_space, angular=pair.angular)
        energy = reference.pair_energy(x, definition(pair), **spaces, eps=eps)
        (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
        (product,) = torch.autograd.grad(gradient, x, tangents.double())
        _TRUTHS[key] = product
    return _TRUTHS[key]


def product_of(rows, tangents, pair, sizes=None, eps=0.0, factor=1.0):
    sizes = [len(rows)] if sizes is None else sizes
    scales = [factor * pair.scale(n, "mean") for n in sizes]
    request = SweepRequest(rows, sizes, scales, pair, eps)
    gradient = binding.sweep(request).gradient
    return binding.hessian_vector_product(request, tangents, gradient)


def check(rows, pair, sizes=None, eps=0.0, bound=3e-6):
    tangents = random_rows(*rows.shape, seed=11)
    sizes = [len(rows)] if sizes is None else sizes
    actual = product_of(rows, tangents, pair, sizes, eps)
    assert actual.dtype == torch.float32
    for part, t, result in zip(
        rows.split(sizes), tangents.split(sizes), actual.split(sizes), strict=True
    ):
        if pair.pair_count(len(part)) == 0:
            assert torch.equal(result, torch.zeros_like(result))
            continue
        expected = truth(part, t, pair, eps)
        # a set of one or two rows may have no second derivative but rounding
        size = 1e-6 * float(expected.norm()) + 1e-12
        assert float((result.double() - expected).norm()) <= bound * float(expected.norm()) + size


SPACES = [
    dict(half_space=half, angular=angular) for half in (False, True) for angular in (False, True)
]
PAIRS = [
    replace(pair, **space)
    for pair, space in itertools.product(
        [Riesz(s) for s in (0.0, 1.0, 2.0, 0.7, 4.0, -0.5, -1.9)]
        + [Riesz(s, shift=a) for s, a in ((0.0, 0.5), (1.0, 4.0), (2.0, 1.0), (-1.5, 0.2))]
        + [Gaussian(0.3), Gaussian(2.0), Laplace(0.3), Laplace(3.0)],
        SPACES,
    )
]
every_pair = pytest.mark.parametrize("pair", PAIRS, ids=str)


@pytest.mark.parametrize("eps", [0.0, 0.1])
@every_pair
def test_every_pair_function_on_packed_sets(pair, eps):
    sizes = [1, 67, 0, 200, 3, 31]  # 200 makes two blocks
    check(random_rows(sum(sizes), 24), pair, sizes, eps, bound=5e-6)


# around the tiles of 2, 4, 6 and 12 rows and 8, 16 and 32 columns, and the blocks of 192
@pytest.mark.parametrize("n", [3, 5, 9, 11, 13, 15, 17, 23, 31, 33, 95, 97, 191, 192, 193, 385])
def test_sizes_around_the_tiles(n):
    check(random_rows(n, 20), Riesz(2.0))


# around the vectors, the strips of half a vector to two, and the 256 columns that stay in cache
@pytest.mark.parametrize("k", [2, 3, 7, 8, 9, 15, 16, 17, 25, 31, 32, 33, 41, 63, 255, 257, 289])
def test_widths(k):
    check(random_rows(70, k), Riesz(2.0, half_space=True), bound=1e-5)


@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_near_pairs(space, angle, eps):
    for pair in (
        Riesz(2.0, min_distance=0.0),
        Riesz(0.0, min_distance=0.0),
        Riesz(1.0, min_distance=5e-3),
    ):
        pair = replace(pair, **space)
        for antipodal in (False, True) if pair.two_ended else (False,):
            rows = paired_rows(250, 24, angle, antipodal=antipodal)
            check(rows, pair, eps=eps, bound=1e-5)


@pytest.mark.parametrize("pair", [Riesz(2.0), Riesz(1.0, half_space=True), Gaussian(2.0)], ids=str)
def test_collapsed_rows(pair):
    # every pair is near, some are antipodal
    rows = collapsed_rows(130, 24, 1e-2)
    if pair.half_space:
        rows[::3] *= -1
    check(rows, pair, bound=1e-5)


@every_pair
def test_dead_rows_duplicates_and_multiples(pair):
    rows = random_rows(60, 20)
    rows[[0, 33]] = 0.0
    rows[5] = rows[40]
    rows[6] = 2.0 * rows[41]
    rows[7] = -4.0 * rows[42]
    if pair.tangent is None:
        check(rows, pair, eps=1e-2, bound=1e-5)
        return
    # without eps a kink has no direction: what is left is finite, and 0 in dead rows
    product = product_of(rows, random_rows(60, 20, seed=3), pair)
    assert product.isfinite().all()
    assert not product[[0, 33]].any()


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("min_distance", [0.3, 1.3, 1.99])
def test_large_min_distance(min_distance, half_space):
    check(
        random_rows(80, 6), Riesz(2.0, min_distance=min_distance, half_space=half_space), bound=1e-5
    )


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_rows_of_any_length(factor):
    rows, tangents = random_rows(60, 12), random_rows(60, 12, seed=4)
    expected = product_of(rows, tangents, Riesz(2.0))
    actual = product_of(rows * factor, tangents * factor, Riesz(2.0))
    assert relative_error(actual * factor, expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_exactly(dtype):
    rows, tangents = random_rows(50, 12).to(dtype), random_rows(50, 12, seed=4)
    actual = product_of(rows, tangents, Riesz(1.0))
    assert torch.equal(actual, product_of(rows.float(), tangents, Riesz(1.0)))


def test_it_is_linear_in_tangents_and_scales():
    rows, tangents = random_rows(70, 12), random_rows(70, 12, seed=4)
    product = product_of(rows, tangents, Riesz(2.0))
    assert torch.equal(product_of(rows, 4.0 * tangents, Riesz(2.0)), 4.0 * product)
    assert torch.equal(product_of(rows, tangents, Riesz(2.0), factor=-2.0), -2.0 * product)
    assert not product_of(rows, torch.zeros_like(rows), Riesz(2.0)).any()


def test_it_is_symmetric():
    rows, one, other = (random_rows(150, 12, seed=seed).double() for seed in range(3))
    pair = Riesz(2.0, half_space=True)
    left = (product_of(rows.float(), one.float(), pair).double() * other).sum()
    right = (product_of(rows.float(), other.float(), pair).double() * one).sum()
    assert float(left) == pytest.approx(float(right), rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_their_set(bad):
    rows, tangents = random_rows(90, 12), random_rows(90, 12, seed=4)
    expected = product_of(rows, tangents, Riesz(2.0), [40, 50])
    tangents[7, 3] = bad
    actual = product_of(rows, tangents, Riesz(2.0), [40, 50])
    assert torch.equal(actual[40:], expected[40:])
    assert actual[:40].isnan().any()


@pytest.mark.parametrize("sizes", [[1100], [700, 600, 3, 500]])
def test_any_number_of_threads_gives_the_same_bits(sizes):
    rows, tangents = random_rows(sum(sizes), 40), random_rows(sum(sizes), 40, seed=4)
    rows[1::7] = rows[0::7][: len(rows[1::7])] * (1 + 1e-4 * tangents[1::7])
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(product_of(rows, tangents, Riesz(2.0, half_space=True), sizes))
    torch.set_num_threads(before)
    assert results[0].isfinite().all()
    assert all(torch.equal(result, results[0]) for result in results)


def test_bad_calls_are_refused():
    rows = random_rows(6, 3)
    request = SweepRequest(rows, [6], [1.0], Riesz(2.0))
    gradient = binding.sweep(request).gradient
    for tangents, known, error, message in (
        (rows[:5], gradient, ValueError, r"`tangents` must be float32 of shape \(6, 3\)"),
        (rows.half(), gradient, ValueError, "`tangents` must be float32"),
        (rows.double(), gradient, TypeError, "`tangents` must be float32, float16 or"),
        (rows, gradient.T.contiguous(), ValueError, "`gradient` must be float32 of shape"),
        (random_rows(3, 6).T, gradient, ValueError, "`tangents` must be contiguous"),
    ):
        with pytest.raises(error, match=message):
            binding.hessian_vector_product(request, tangents, known)
