"""Rows against columns in plain torch, against the definition in float64."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

from comhe_ext.kernels import portable
from comhe_ext.kernels.pair_functions import Gaussian, PairFunction, Riesz
from comhe_ext.kernels.portable.tiles import cross_tiles
from comhe_ext.kernels.sweep import SweepRequest
from comhe_ext.testing import collapsed_rows, paired_rows, random_rows, reference, relative_error

PAIRS = [
    Riesz(2.0, min_distance=0.0),
    Riesz(0.0),
    Riesz(1.0, angular=True),
    Riesz(3.5),
    Riesz(2.0, half_space=True),
    Riesz(0.0, half_space=True, angular=True),
    Riesz(2.0, min_distance=0.3, half_space=True),  # a tangent line that tiles meet
    Riesz(1.0, min_distance=0.3, angular=True),
    Gaussian(2.0),
    Gaussian(0.5, half_space=True),
    Gaussian(1.0, angular=True),
    Gaussian(1.0, half_space=True, angular=True),
]
# both sides of a block of 512, and none
SIZES = [(0, 7), (7, 0), (0, 0), (1, 1), (1, 7), (2, 2), (7, 2), (7, 600), (600, 7), (2, 9000)]


def function_of(pair: PairFunction):
    """Write the pair function from its definition."""
    if isinstance(pair, Riesz):
        return partial(reference._pair_function, s=pair.s, min_distance=pair.min_distance)
    assert isinstance(pair, Gaussian)
    return lambda t: (-pair.tau * t.square()).exp()


def expected_of(request: SweepRequest, *tangents):
    """Compute energy, row energies, both gradients and, of tangents, the three products."""
    rows = request.points.double().requires_grad_()
    columns = request.columns.double().requires_grad_()
    weights = torch.ones(len(rows), dtype=torch.float64)
    if request.row_weights is not None:
        weights = request.row_weights.double()
    weights = weights.clone().requires_grad_()
    energy, row_energies = reference.cross_energy(
        rows,
        columns,
        function_of(request.pair),
        half_space=request.pair.half_space,
        angular=request.pair.angular,
        eps=request.eps,
        row_ids=request.row_ids,
        column_ids=request.column_ids,
        row_weights=weights,
    )
    inputs = (rows, columns, weights)
    first = torch.autograd.grad(request.scales[0] * energy, inputs, create_graph=bool(tangents))
    products: tuple[torch.Tensor, ...] = ()
    if tangents:
        # the second derivative is symmetric
        along = sum((x * t).sum() for x, t in zip(first, tangents, strict=True) if t is not None)
        products = torch.autograd.grad(along, inputs, materialize_grads=True)
    energy = request.scales[0] * energy.detach().view(1)
    return energy, row_energies.detach(), *(x.detach() for x in first[:2]), *products


def request_of(rows, columns, pair, *, eps=1e-4, ids=False, weights=False, **options):
    n, m = len(rows), len(columns)
    dtype = rows.dtype if rows.dtype == torch.float64 else torch.float32
    return SweepRequest(
        rows,
        [n],
        [0.25 / max(n * m, 1)],
        pair,
        eps,
        columns=columns,
        row_ids=(torch.arange(n) % 5).int() if ids else None,
        column_ids=(torch.arange(m) % 3).int() if ids else None,
        row_weights=random_rows(n, 1, seed=11, dtype=dtype).squeeze(1) if weights else None,
        row_energies=True,
        **options,
    )


def check(request, energy=1e-6, gradient=2e-6):
    result = portable.sweep(request)
    expected = expected_of(request)
    # weights of both signs cancel, which is no error of the sweep
    positive = expected[1] if request.row_weights is None else expected[1] * request.row_weights
    floor = float(request.scales[0] * positive.abs().sum())
    assert relative_error(result.energy, expected[0], floor) <= energy
    assert relative_error(result.row_energies, expected[1]) <= energy
    assert relative_error(result.gradient, expected[2]) <= gradient
    assert relative_error(result.columns_gradient, expected[3]) <= gradient
    dtype = torch.float64 if request.points.dtype == torch.float64 else torch.float32
    assert {x.dtype for x in result} == {dtype}
    assert [tuple(x.shape) for x in result] == [
        (1,),
        tuple(request.points.shape),
        tuple(request.columns.shape),
        (len(request.points),),
    ]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("k", [2, 8, 16, 40])
def test_every_pair_function(pair, k):
    rows, columns = random_rows(90, k), random_rows(70, k, seed=1)
    for ids, weights in ((False, False), (True, True)):
        check(request_of(rows, columns, pair, ids=ids, weights=weights))
    # a cosine's 4e-16 beside the smallest distance that a tile is trusted with, 2^-16
    check(request_of(rows.double(), columns.double(), pair, weights=True), 3e-11, 3e-11)


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("k", [1, 16])
def test_every_size(n, m, k):
    for pair in (Riesz(2.0), Riesz(1.0, half_space=True)):
        rows, columns = random_rows(n, k), random_rows(m, k, seed=1)
        check(request_of(rows, columns, pair, ids=True, weights=True))


def test_many_tiles():
    rows, columns = random_rows(1100, 16), random_rows(600, 16, seed=1)
    check(request_of(rows, columns, Riesz(2.0), ids=True, weights=True))


@pytest.mark.parametrize(("n", "m"), [*SIZES, (1, 10000), (10000, 3), (1100, 1100)])
@pytest.mark.parametrize("block", [16, 512, 4096])
def test_tiles_cover_each_pair_once(n, m, block):
    met = torch.zeros(n, n + m, dtype=torch.int8)
    for tile in cross_tiles(n, m, block):
        met[tile.rows, tile.cols] += 1
        area = (tile.rows.stop - tile.rows.start) * (tile.cols.stop - tile.cols.start)
        assert area <= block * block
        assert not tile.diagonal
    assert (met[:, :n] == 0).all()
    assert (met[:, n:] == 1).all()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-4])
def test_near_pairs(pair, angle):
    for k, eps in itertools.product((8, 24), (0.0, 1e-2)):
        both = paired_rows(120, k, angle, antipodal=pair.two_ended)
        rows, columns = both[:60], both[60:]  # twins on either side
        check(request_of(rows, columns, pair, eps=eps, weights=True), 1e-6, 1e-5)


@pytest.mark.parametrize("pair", PAIRS[1:], ids=str)
def test_multiples_and_dead_rows(pair):
    rows = random_rows(20, 24)
    columns = torch.cat([3.0 * rows[:5], -rows[5:9], torch.zeros(2, 24), random_rows(9, 24)])
    rows[[3, 17]] = 0.0
    for eps in (0.0, 1e-3):
        request = request_of(rows, columns, pair, eps=eps, weights=True)
        check(request, 1e-6, 1e-5)
        if eps == 0.0:
            result = portable.sweep(request)
            assert (result.gradient[[3, 17]] == 0).all()
            assert (result.columns_gradient[[9, 10]] == 0).all()


def test_a_set_against_itself_is_the_energy_of_the_set():
    rows, ids = random_rows(300, 24), torch.arange(300, dtype=torch.int32)
    pair = Riesz(1.0)
    scale = pair.scale(300, "mean")
    own = portable.sweep(SweepRequest(rows, [300], [scale], pair, 1e-4))
    # each pair is met from both sides
    both = portable.sweep(
        SweepRequest(
            rows, [300], [scale / 2], pair, 1e-4, columns=rows, row_ids=ids, column_ids=ids
        )
    )
    assert relative_error(both.energy, own.energy) <= 1e-7
    assert relative_error(both.gradient + both.columns_gradient, own.gradient) <= 1e-6
    assert both.row_energies is None


def test_equal_ids_do_not_count():
    rows = random_rows(9, 20)
    ids = torch.zeros(9, dtype=torch.int32)
    request = SweepRequest(
        rows, [9], [1.0], Riesz(2.0), columns=rows, row_ids=ids, column_ids=ids, row_energies=True
    )
    for x in portable.sweep(request):
        assert (x == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    rows, columns = random_rows(40, 20, dtype=dtype), random_rows(30, 20, seed=1, dtype=dtype)
    check(request_of(rows, columns, Riesz(2.0), ids=True, weights=True))


def test_the_energy_alone():
    rows, columns = paired_rows(60, 20, 1e-3).split(30)
    for pair in PAIRS:
        whole = portable.sweep(request_of(rows, columns, pair, weights=True))
        alone = portable.sweep(request_of(rows, columns, pair, weights=True, gradient=False))
        assert alone.gradient is None
        assert alone.columns_gradient is None
        assert torch.equal(alone.energy, whole.energy)
        assert torch.equal(alone.row_energies, whole.row_energies)


@pytest.mark.parametrize("weights", [False, True])
def test_one_side_alone_has_the_same_bits(weights):
    rows, columns = paired_rows(60, 20, 1e-3).split(30)
    for pair in PAIRS:
        request = request_of(rows, columns, pair, weights=weights)
        both = portable.sweep(request)
        rows_alone = portable.sweep(replace(request, columns_gradient=False))
        columns_alone = portable.sweep(replace(request, gradient=False, columns_gradient=True))
        assert rows_alone.columns_gradient is None
        assert columns_alone.gradient is None
        assert torch.equal(rows_alone.gradient, both.gradient)
        assert torch.equal(columns_alone.columns_gradient, both.columns_gradient)
        for one in (rows_alone, columns_alone):
            assert torch.equal(one.energy, both.energy)
            assert torch.equal(one.row_energies, both.row_energies)


@pytest.mark.parametrize("k", [8, 24])
def test_nan_reaches_what_meets_it(k):
    rows, columns = (part.clone() for part in paired_rows(60, k, 1e-3).split(30))
    request = request_of(rows, columns, Riesz(2.0))
    clean = portable.sweep(request)
    rows[4, 0] = torch.nan
    result = portable.sweep(request)
    others = torch.arange(30) != 4
    assert result.energy.isnan().all()
    assert result.row_energies[4].isnan()
    assert result.gradient[4].isnan().all()
    assert result.columns_gradient.isnan().all()
    assert relative_error(result.row_energies[others], clean.row_energies[others]) <= 1e-6
    assert relative_error(result.gradient[others], clean.gradient[others]) <= 1e-6
    rows[4, 0], columns[3, 1] = 1.0, torch.inf
    result = portable.sweep(request)
    assert result.row_energies.isnan().all()
    assert result.gradient.isnan().all()


def test_rows_of_any_magnitude():
    rows, columns = random_rows(30, 20), random_rows(20, 20, seed=1)
    expected = portable.sweep(request_of(rows, columns, Riesz(2.0), eps=0.0))
    scaled = portable.sweep(request_of(rows * 1e-30, columns * 1e30, Riesz(2.0), eps=0.0))
    assert relative_error(scaled.energy, expected.energy) <= 1e-6
    assert relative_error(scaled.gradient * 1e-30, expected.gradient) <= 2e-6
    assert (
        relative_error(scaled.columns_gradient.double() * 1e30, expected.columns_gradient) <= 2e-6
    )


def test_collapsed_rows():
    for spread in (0.3, 1e-3):
        rows, columns = collapsed_rows(80, 20, spread).split(40)
        check(request_of(rows, columns, Riesz(1.0), weights=True), 1e-6, 1e-5)


# --- second order ---------------------------------------------------------------------------------


def check_products(request, tangents, tolerance=2e-6):
    products = portable.cross_hessian_vector_product(request, *tangents)
    expected = expected_of(request, *tangents)[4:]
    for actual, truth, like in zip(
        products, expected, (request.points, request.columns, request.points[:, 0]), strict=True
    ):
        assert actual.shape == like.shape
        assert relative_error(actual, truth) <= tolerance


def tangents_of(request):
    dtype = torch.float64 if request.points.dtype == torch.float64 else torch.float32
    shapes = (request.points.shape, request.columns.shape, (len(request.points), 1))
    rows, columns, weights = (random_rows(*s, seed=20 + s[0], dtype=dtype) for s in shapes)
    return rows, columns, weights.squeeze(1)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("k", [2, 8, 16, 40])
def test_hessian_product_of_every_pair_function(pair, k):
    rows, columns = random_rows(60, k), random_rows(50, k, seed=1)
    for ids, weights in ((False, False), (True, True)):
        request = request_of(rows, columns, pair, ids=ids, weights=weights)
        check_products(request, tangents_of(request), 2e-6)
    request = request_of(rows.double(), columns.double(), pair, weights=True)
    check_products(request, tangents_of(request), 1e-9)


@pytest.mark.parametrize("given", list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("weights", [False, True])
def test_hessian_product_with_tangents_left_out(given, weights):
    rows, columns = paired_rows(60, 20, 1e-2).double().split(30)
    request = request_of(rows, columns, Riesz(2.0, half_space=True), weights=weights)
    tangents = [t if g else None for t, g in zip(tangents_of(request), given, strict=True)]
    products = portable.cross_hessian_vector_product(request, *tangents)
    if not any(given):
        assert all((x == 0).all() for x in products)
        return
    check_products(request, tangents, 1e-9)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_hessian_product_of_every_size(n, m):
    rows, columns = random_rows(n, 16), random_rows(m, 16, seed=1)
    request = request_of(rows, columns, Riesz(1.0), ids=True, weights=True)
    check_products(request, tangents_of(request), 2e-6)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("angle", [1e-2, 1e-4])
def test_hessian_product_of_near_pairs(pair, angle):
    for k, eps in itertools.product((8, 24), (0.0, 1e-2)):
        both = paired_rows(80, k, angle, antipodal=pair.two_ended)
        request = request_of(both[:40], both[40:], pair, eps=eps, weights=True)
        check_products(request, tangents_of(request), 1e-5)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_hessian_product_is_the_difference_of_gradients(pair):
    rows, columns = (x.double() for x in paired_rows(60, 6, 0.05).split(30))
    request = request_of(rows, columns, pair, ids=True, weights=True)
    tangents = tangents_of(request)
    products = portable.cross_hessian_vector_product(request, *tangents)

    def at(step):
        moved = SweepRequest(
            rows + step * tangents[0],
            [30],
            request.scales,
            pair,
            request.eps,
            columns=columns + step * tangents[1],
            row_ids=request.row_ids,
            column_ids=request.column_ids,
            row_weights=request.row_weights + step * tangents[2],
            row_energies=True,
        )
        result = portable.sweep(moved)
        return result.gradient, result.columns_gradient, request.scales[0] * result.row_energies

    h = 1e-5
    for product, after, before in zip(products, at(h), at(-h), strict=True):
        assert relative_error((after - before) / (2 * h), product) <= 1e-4


def test_hessian_product_of_dead_rows_is_zero():
    rows, columns = random_rows(20, 24), random_rows(20, 24, seed=1)
    rows[[3, 17]] = 0.0
    columns[5] = 0.0
    request = request_of(rows, columns, Riesz(1.0), eps=0.0, weights=True)
    to_rows, to_columns, to_weights = portable.cross_hessian_vector_product(
        request, *tangents_of(request)
    )
    assert (to_rows[[3, 17]] == 0).all()
    assert (to_columns[5] == 0).all()
    assert all(x.isfinite().all() for x in (to_rows, to_columns, to_weights))
