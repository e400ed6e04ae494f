"""Rows against columns in the compiled kernel: sums and weights of the rows, against float64."""

import itertools
import math

import pytest
import torch

from comhe_ext.kernels.cpu import binding
from comhe_ext.kernels.pair_functions import Gaussian, Riesz
from comhe_ext.kernels.sweep import SweepRequest
from comhe_ext.testing import random_rows, reference, relative_error

pytestmark = [
    pytest.mark.skipif(binding.unavailable() is not None, reason=str(binding.unavailable())),
    pytest.mark.usefixtures("poisoned_empty", "isa"),
]

PAIRS = [
    *(
        Riesz(s, half_space=half_space, angular=angular)
        for s, half_space, angular in itertools.product(
            (0.0, 1.0, 2.0, 0.7, 4.0), (False, True), (False, True)
        )
    ),
    *(
        Gaussian(2.0, half_space=half_space, angular=angular)
        for half_space, angular in itertools.product((False, True), (False, True))
    ),
]
LOG_SIZE = 0.3  # of log r, about that of random rows
# one of each way to add energies up, in each form that a sweep has
FEW = [Riesz(), Riesz(0.0), Riesz(0.0, half_space=True), Gaussian(1.0, angular=True)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def function_of(pair, t):
    if isinstance(pair, Gaussian):
        return (-pair.tau * t**2).exp()
    return reference._pair_function(t, pair.s, pair.min_distance)


def unit_rows(p, eps):
    """Unit rows, and 1 - |v|^2."""
    squared = p.square().sum(1, keepdim=True) + eps
    alive = squared > 0
    squared = torch.where(alive, squared, 1.0)
    return torch.where(alive, p / squared.sqrt(), 0.0), torch.where(alive, eps / squared, 1.0)


def exact_pairs(p, q, pair, row_ids, column_ids, eps):
    """F of all pairs in float64 [N, M], 0 where ids are equal, from the differences of the rows."""
    (u, u_deficit), (v, v_deficit) = unit_rows(p, eps), unit_rows(q, eps)
    i, j = torch.ones(len(p), len(q)).nonzero().unbind(1)
    if row_ids is not None:
        meet = row_ids[i] != column_ids[j]
        i, j = i[meet], j[meet]
    lengths = (1.0 - u_deficit).sqrt()[i], (1.0 - v_deficit).sqrt()[j]
    both = (u_deficit[i] + v_deficit[j]).squeeze(1)
    near = reference._difference(u[i], v[j], *lengths).square().sum(1) + both
    far = reference._difference(u[i], -v[j], *lengths).square().sum(1) + both

    def f(near, far):
        root = reference._sqrt(near)
        return function_of(
            pair, 2 * torch.atan2(root, reference._sqrt(far)) if pair.angular else root
        )

    values = f(near, far) + f(far, near) if pair.half_space else f(near, far)
    return values.new_zeros(len(p), len(q)).index_put((i, j), values)


def sweep(rows, columns, pair, gradient=True, scale=1.0, eps=0.0, **fields):
    return binding.sweep(
        SweepRequest(rows, [len(rows)], [scale], pair, eps, gradient, columns, **fields)
    )


def check(rows, columns, pair, eps=0.0, ids=(None, None), weights=None, gradient_bound=5e-6):
    scale = 0.7
    asked = dict(row_ids=ids[0], column_ids=ids[1], row_weights=weights, eps=eps, scale=scale)
    energy, to_rows, to_columns, sums = sweep(rows, columns, pair, row_energies=True, **asked)
    alone = sweep(rows, columns, pair, row_energies=True, gradient=False, **asked)
    assert alone.gradient is None
    assert alone.columns_gradient is None
    assert torch.equal(alone.energy, energy)
    assert torch.equal(alone.row_energies, sums)
    without = sweep(rows, columns, pair, gradient=False, **asked)
    assert without.row_energies is None

    p, q = rows.double().requires_grad_(), columns.double().requires_grad_()
    values = exact_pairs(p, q, pair, ids[0], ids[1], eps)
    factors = scale * (torch.ones(len(rows)) if weights is None else weights).double()
    total = (factors * values.sum(1)).sum()
    # terms of both signs leave less than they are made of, and a logarithm may be of about 1
    least = LOG_SIZE if getattr(pair, "s", 1.0) == 0 else 0.0
    sizes = values.detach().abs().clamp_min(least).sum(1)
    assert bool(((sums - values.detach().sum(1)).abs() <= 2e-6 * sizes).all())
    for result in (energy, without.energy):
        assert abs(result.item() - total.item()) <= 2e-6 * float((factors.abs() * sizes).sum())
    expected = torch.autograd.grad(total, (p, q), allow_unused=True)
    for result, truth in zip((to_rows, to_columns), expected, strict=True):
        assert relative_error(result, truth) <= gradient_bound, pair
    # one side alone has the same bits, and the other one is left out
    rows_alone = sweep(rows, columns, pair, columns_gradient=False, **asked)
    columns_alone = sweep(rows, columns, pair, gradient=False, columns_gradient=True, **asked)
    assert rows_alone.columns_gradient is None
    assert columns_alone.gradient is None
    assert torch.equal(rows_alone.gradient, to_rows)
    assert torch.equal(columns_alone.columns_gradient, to_columns)
    for one in (rows_alone, columns_alone):
        assert torch.equal(one.energy, without.energy)


def special_rows(k):
    """Rows and columns with twins on either side, near and exact ones, and dead rows."""
    rows, columns = random_rows(70, k, seed=1), random_rows(90, k, seed=2)
    for number, angle in enumerate((1e-1, 1e-2, 1e-3, 1e-4)):
        across = angle * random_rows(2, k, seed=3 + number)
        columns[10 + number] = 3.0 * (rows[20 + number] + across[0])
        columns[80 + number] = -2.0 * (rows[20 + number] + across[1])
    columns[5], columns[40] = 2.0 * rows[3], -3.0 * rows[4]
    rows[8] = columns[85] = 0.0
    return rows, columns


def weights_of(n):
    weights = torch.randn(n, generator=torch.Generator().manual_seed(5))
    weights[::7] = 0.0
    return weights


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_every_pair_function(pair, eps):
    rows, columns = special_rows(24)
    ids = torch.arange(70, dtype=torch.int32), torch.arange(90, dtype=torch.int32) * 3 - 30
    check(rows, columns, pair, eps)
    check(rows, columns, pair, eps, ids, weights_of(70))


SHAPES = [(1, 1, 1), (1, 700, 2), (2, 3, 8), (3, 1, 17), (700, 2, 3), (31, 33, 40), (97, 289, 8)]
SHAPES += [(289, 97, 17), (13, 40, 130), (300, 310, 17), (50, 21, 600), (577, 12, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pair", FEW, ids=str)
def test_shapes(pair, shape):
    n, m, k = shape
    # in few dimensions random rows are so close that float32 cosines show
    check(
        random_rows(n, k, seed=1),
        random_rows(m, k, seed=2),
        pair,
        weights=weights_of(n),
        gradient_bound=2e-5 if k <= 3 else 5e-6,
    )


@pytest.mark.parametrize("pair", FEW, ids=str)
def test_ids(pair):
    rows, columns = random_rows(60, 17, seed=1), random_rows(45, 17, seed=2)
    columns[3] = rows[2]
    n, m = torch.arange(60, dtype=torch.int32), torch.arange(45, dtype=torch.int32)
    extremes = torch.tensor([-(2**31), 2**31 - 1, 0], dtype=torch.int32)
    check(rows, columns, pair, ids=(n, m), weights=weights_of(60))
    check(rows, columns, pair, ids=(n, m - 100))
    check(rows, columns, pair, ids=(-n // 7, -m // 9))
    check(rows, columns, pair, ids=(extremes[n % 3], extremes[m % 2]))
    nothing = sweep(
        rows, columns, pair, row_ids=0 * n, column_ids=0 * m, row_energies=True, eps=0.1
    )
    for result in nothing:
        assert not result.any()


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 5), (5, 0)])
def test_no_pairs(n, m):
    rows, columns = random_rows(n, 4), random_rows(m, 4)
    ids = torch.arange(n, dtype=torch.int32), torch.arange(m, dtype=torch.int32)
    weights = torch.ones(n)
    for fields in ({}, dict(row_ids=ids[0], column_ids=ids[1], row_weights=weights)):
        result = sweep(rows, columns, Riesz(), row_energies=True, **fields)
        assert result.energy.tolist() == [0.0]
        assert result.row_energies.tolist() == [0.0] * n
        assert result.gradient.shape == (n, 4)
        assert result.columns_gradient.shape == (m, 4)
        assert not result.gradient.any()
        assert not result.columns_gradient.any()


@pytest.mark.parametrize("pair", FEW, ids=str)
def test_a_row_of_weight_0_is_not_there(pair):
    rows, columns = random_rows(40, 9, seed=1), random_rows(30, 9, seed=2)
    rows[4] = columns[7] + 1e-3 * rows[5]
    weights = torch.ones(40)
    weights[4] = 0.0
    others = [i for i in range(40) if i != 4]
    energy, to_rows, to_columns, _ = sweep(rows, columns, pair, row_weights=weights)
    expected = sweep(rows[others], columns, pair, row_weights=weights[others])
    assert not to_rows[4].any()
    assert relative_error(energy, expected.energy) <= 1e-6
    assert relative_error(to_rows[others], expected.gradient) <= 1e-6
    assert relative_error(to_columns, expected.columns_gradient) <= 4e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pair", FEW, ids=str)
def test_nan_and_infinity_reach_the_sums_of_what_they_meet(pair, bad):
    rows, columns = random_rows(40, 9, seed=1), random_rows(30, 9, seed=2)
    ids = torch.arange(40, dtype=torch.int32), torch.arange(30, dtype=torch.int32)
    rows[5, 3] = bad
    result = sweep(rows, columns, pair, row_energies=True)
    assert result.energy.isnan().all()
    assert result.row_energies.isnan().nonzero().flatten().tolist() == [5]
    columns[7, 2] = bad
    result = sweep(
        rows, columns, pair, row_ids=ids[0], column_ids=ids[1], row_energies=True, gradient=False
    )
    assert result.energy.isnan().all()
    assert (~result.row_energies.isnan()).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("pair", FEW, ids=str)
def test_a_weight_of_nan(pair):
    rows, columns = random_rows(20, 9, seed=1), random_rows(30, 9, seed=2)
    weights = torch.ones(20)
    weights[3] = math.nan
    result = sweep(rows, columns, pair, row_weights=weights, row_energies=True)
    assert result.energy.isnan().all()
    assert result.gradient.isnan().any(1).nonzero().flatten().tolist() == [3]
    assert result.columns_gradient.isnan().all()
    assert result.row_energies.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_exactly(dtype):
    rows, columns = random_rows(40, 9, seed=1).to(dtype), random_rows(30, 9, seed=2).to(dtype)
    fields = dict(row_weights=weights_of(40), row_energies=True)
    half = sweep(rows, columns, Riesz(), **fields)
    single = sweep(rows.float(), columns.float(), Riesz(), **fields)
    assert all(map(torch.equal, half, single))


@pytest.mark.parametrize("pair", FEW, ids=str)
def test_any_number_of_threads_gives_the_same_bits(pair, threads):
    rows, columns = random_rows(2500, 30, seed=1), random_rows(1100, 30, seed=2)
    columns[200:400] = rows[700:900] + 1e-3 * columns[200:400]  # and repairs take part
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(sweep(rows, columns, pair, row_weights=weights_of(2500), row_energies=True))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_bad_calls_are_refused():
    rows, columns, pair = random_rows(4, 3), random_rows(5, 3), Riesz()
    with pytest.raises(ValueError, match=r"`row_weights` must be float32 of shape \(4,\)"):
        sweep(rows, columns, pair, row_weights=torch.ones(5))
    with pytest.raises(ValueError, match=r"`row_weights` must be float32 of shape \(4,\)"):
        sweep(rows, columns, pair, row_weights=torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="one set of 4 rows"):
        binding.sweep(SweepRequest(rows, [2, 2], [1.0], pair, columns=columns))
    with pytest.raises(ValueError, match="a cross set has one scale, got 2"):
        binding.sweep(SweepRequest(rows, [4], [1.0, 1.0], pair, columns=columns))
