"""Rows against columns of their own, run by Triton's interpreter against the definition.

Collected only for `test_triton_interpreter.py`, as `triton_interpreter_checks.py` is.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from comhe_ext import verdicts
from comhe_ext.kernels import gpu
from comhe_ext.kernels.gpu import cross, cross_direct, splits, variant
from comhe_ext.kernels.pair_functions import Gaussian, Riesz
from comhe_ext.kernels.sweep import NearestRequest, SweepRequest
from comhe_ext.testing import paired_rows, random_rows, reference, relative_error

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    # the interpreter computes what a mask discards, in numpy, and numpy says so
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    # Triton 3.6's own, under numpy 2.3; from numpy 2.4 on its interpreter does not work
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning:triton"),
]

PAIRS = [
    replace(pair, half_space=half_space, angular=angular)
    for pair, half_space, angular in itertools.product(
        (Riesz(0.0), Riesz(1.0), Riesz(2.0), Riesz(1.5), Gaussian(2.0)),
        (False, True),
        (False, True),
    )
]


def function_of(pair):
    """The pair function of a distance, once more."""
    if isinstance(pair, Gaussian):
        return lambda t: (-pair.tau * t.square()).exp()
    return lambda t: reference._pair_function(t, pair.s, pair.min_distance)


def unit(points, eps):
    """Unit rows and their deficits 1 - |v|^2, float64."""
    nu2 = points.square().sum(1, keepdim=True) + eps
    alive = nu2 > 0
    nu2 = torch.where(alive, nu2, 1.0)
    v = torch.where(alive, points / nu2.sqrt(), 0.0)
    return v, torch.where(alive, eps / nu2, 1.0).squeeze(1)


def truth(request):
    """Energy, both gradients and the E_i of the rows, float64, every pair written out."""
    rows, columns = (x.double().requires_grad_() for x in (request.points, request.columns))
    (u, of_u), (v, of_v) = (unit(x, request.eps) for x in (rows, columns))
    i, j = (
        x.flatten() for x in torch.meshgrid(*map(torch.arange, (len(u), len(v))), indexing="ij")
    )
    lengths = (1.0 - of_u[i, None]).sqrt(), (1.0 - of_v[j, None]).sqrt()
    deficits = of_u[i] + of_v[j]
    near = reference._difference(u[i], v[j], *lengths).square().sum(1) + deficits
    far = reference._difference(u[i], -v[j], *lengths).square().sum(1) + deficits
    pair, values = request.pair, 0.0
    met = torch.ones(len(i), dtype=torch.bool)
    if request.row_ids is not None:
        met = request.row_ids[i] != request.column_ids[j]
    near, far = (torch.where(met, x, 2.0) for x in (near, far))
    for a, b in [(near, far), (far, near)][: 1 + pair.half_space]:
        t = 2 * torch.atan2(reference._sqrt(a), reference._sqrt(b))
        values = values + function_of(pair)(t if pair.angular else reference._sqrt(a))
    each = torch.where(met, values, 0.0).view(len(u), len(v)).sum(1)
    weights = 1.0 if request.row_weights is None else request.row_weights.double()
    energy = request.scales[0] * (weights * each).sum()
    nothing = 0.0 * (rows.sum() + columns.sum())
    return energy.detach(), *torch.autograd.grad(energy + nothing, (rows, columns)), each.detach()


def request_of(rows, columns, pair, *, eps=1e-4, ids=False, weights=False):
    n, m = len(rows), len(columns)
    generator = torch.Generator().manual_seed(7)
    return SweepRequest(
        rows,
        [n],
        [0.3 / max(n * m, 1)],
        pair,
        eps,
        True,
        columns,
        torch.arange(n).int() % 7 if ids else None,
        torch.arange(m).int() % 5 if ids else None,
        # of both signs, and some of them small
        torch.randn(n, generator=generator) ** 3 if weights else None,
        True,
    )


def check(request, energy_bound=1e-6, gradient_bound=2e-6):
    """All results, and the energies alone, against the definition."""
    result, alone = gpu.sweep(request), gpu.sweep(replace(request, gradient=False))
    energy, *gradients, each = truth(request)
    assert alone.gradient is None
    assert alone.columns_gradient is None
    # sums of both signs are as right as their parts
    sizes = each if request.row_weights is None else each * request.row_weights.double()
    floor = request.scales[0] * float(sizes.abs().sum())
    for got in (result, alone):
        assert got.energy.shape == (1,)
        assert got.energy.dtype == got.row_energies.dtype == torch.float32
        assert relative_error(got.energy, energy.view(1), floor) <= energy_bound
        assert relative_error(got.row_energies, each) <= energy_bound
    found = result.gradient, result.columns_gradient
    for gradient, expected, of in zip(
        found, gradients, (request.points, request.columns), strict=True
    ):
        assert gradient.shape == of.shape
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()
        assert relative_error(gradient, expected, 1e-6 * floor) <= gradient_bound
    return result


# on the CUDA cores all of them, on tensor cores every third, and all in the long suite
@pytest.mark.parametrize(
    ("pair", "k"),
    [
        pytest.param(pair, k, marks=[pytest.mark.long] if k > 8 and number % 3 else [])
        for number, pair in enumerate(PAIRS)
        for k in (3, 20)
    ],
    ids=str,
)
def test_cross_of_every_pair_function(pair, k):
    both = paired_rows(112, k, 1e-2, pairs=2, seed=1, antipodal=pair.two_ended)
    rows, columns = 0.1 * both[:40], 0.1 * both[40:]  # twins on either side
    columns[3] = paired_rows(112, k, 2e-2, pairs=1, seed=1)[111] * 0.2
    for more in (False, True):
        check(request_of(rows, columns, pair, ids=more, weights=more), gradient_bound=1e-5)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 130), (130, 1), (33, 64), (64, 65)])
def test_cross_sizes_around_the_tiles(n, m):
    for k, pair in ((12, Riesz(2.0)), (12, Riesz(0.0, half_space=True)), (2, Riesz(1.0))):
        rows, columns = random_rows(n, k), random_rows(m, k, seed=1)
        check(request_of(rows, columns, pair, eps=0.0))
        check(request_of(rows, columns, pair, ids=True, weights=True), gradient_bound=1e-5)


@pytest.mark.parametrize("k", [1, 8, 9, 17, 40, 100, 129, 260])
def test_cross_widths(k):
    rows, columns = random_rows(40, k), random_rows(70, k, seed=1)
    columns[65] = rows[3] + 1e-3 * columns[64]
    request = request_of(rows, columns, Riesz(2.0, min_distance=0.1), ids=True, weights=True)
    check(request, gradient_bound=1e-5)


@pytest.mark.parametrize("k", [8, 20])
def test_cross_with_the_gradient_of_one_side(k):
    rows, columns = paired_rows(60, k, 1e-3).split(30)
    request = request_of(rows, columns, Riesz(2.0), ids=True, weights=True)
    both = check(request)
    rows_alone = gpu.sweep(replace(request, columns_gradient=False))
    columns_alone = gpu.sweep(replace(request, gradient=False, columns_gradient=True))
    assert rows_alone.columns_gradient is None
    assert columns_alone.gradient is None
    assert torch.equal(rows_alone.gradient, both.gradient)
    assert torch.equal(columns_alone.columns_gradient, both.columns_gradient)
    for one in (rows_alone, columns_alone):
        assert relative_error(one.energy, both.energy) <= 1e-6
        assert relative_error(one.row_energies, both.row_energies) <= 1e-6


def test_cross_of_many_tiles(monkeypatch):
    """Several items a row tile; and one, whose sums go through memory."""
    rows, columns = random_rows(70, 10), random_rows(330, 10, seed=1)
    for kernel in (cross, cross_direct):
        monkeypatch.setattr(kernel, "TILES_PER_SUM", 2)
    for most in (1, 64):
        monkeypatch.setattr(splits, "MAX_SPLITS", most)
        splits.splits_of_columns.cache_clear()
        for k in (10, 2):
            check(request_of(rows[:, :k], columns[:, :k], Riesz(2.0)), gradient_bound=1e-5)
        pair = Riesz(0.0, half_space=True)
        check(request_of(rows, columns, pair, ids=True, weights=True))
    splits.splits_of_columns.cache_clear()


@pytest.mark.parametrize("k", [5, 20, 131])
@pytest.mark.parametrize("pair", [Riesz(2.0), Riesz(0.0, half_space=True)], ids=str)
def test_cross_of_multiples_and_dead_rows(pair, k):
    rows = random_rows(20, k)
    rows[4] = torch.arange(1.0, k + 1).remainder(5.0) - 2.0
    columns = torch.cat([3.0 * rows[:5], -rows[5:9], torch.zeros(2, k), random_rows(9, k)])
    rows[[3, 17]] = 0.0
    check(request_of(rows, columns, pair, eps=1e-6, weights=True), gradient_bound=1e-5)
    result = check(request_of(rows, columns, pair, eps=0.0, weights=True), gradient_bound=1e-5)
    assert not result.gradient[[3, 17]].any()
    assert not result.columns_gradient[[9, 10]].any()


@pytest.mark.parametrize("k", [4, 20])
def test_cross_of_a_set_with_itself_is_the_energy_of_the_set(k):
    rows, ids = paired_rows(70, k, 1e-2), torch.arange(70, dtype=torch.int32)
    request = SweepRequest(rows, [70], [0.5], Riesz(1.0), 0.0, True, rows, ids, ids)
    result, own = gpu.sweep(request), gpu.sweep(SweepRequest(rows, [70], [1.0], Riesz(1.0)))
    assert result.row_energies is None
    assert relative_error(result.energy, own.energy) <= 1e-6
    gradient = result.gradient + result.columns_gradient
    assert relative_error(gradient, own.gradient) <= 1e-6


@pytest.mark.parametrize("k", [3, 20])
def test_cross_of_nobody(k):
    ids = torch.zeros(9, dtype=torch.int32)
    rows = random_rows(9, k)
    request = SweepRequest(rows, [9], [1.0], Riesz(2.0), 0.0, True, rows, ids, ids, None, True)
    for x in gpu.sweep(request):
        assert not x.any()
    for n, m, width in ((0, 4, k), (4, 0, k), (0, 0, k)):
        of_nobody = request_of(random_rows(n, width), random_rows(m, width), Riesz(2.0))
        result = gpu.sweep(of_nobody)
        assert [tuple(x.shape) for x in result] == [(1,), (n, width), (m, width), (n,)]
        assert not any(x.any() for x in result)
    # without coordinates all rows are dead
    result = gpu.sweep(request_of(torch.zeros(3, 0), torch.zeros(2, 0), Riesz(2.0)))
    assert [tuple(x.shape) for x in result] == [(1,), (3, 0), (2, 0), (3,)]
    assert relative_error(result.row_energies, torch.full((3,), 1.0)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_of_half_precision(dtype):
    rows, columns = random_rows(40, 20, dtype=dtype), random_rows(30, 20, seed=1, dtype=dtype)
    check(request_of(rows, columns, Riesz(2.0), ids=True, weights=True))


@pytest.mark.parametrize(("precision", "bound"), [("high", 1e-3), ("medium", 2e-3)])
def test_cross_with_cheaper_products(precision, bound):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for k in (20, 130):
            request = request_of(random_rows(40, k), random_rows(70, k, seed=1), Riesz(2.0))
            check(request, bound, bound)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("k", [8, 24])
def test_cross_with_nan(k):
    rows, columns = (x.clone() for x in paired_rows(60, k, 1e-3).split(30))
    expected = gpu.sweep(request_of(rows, columns, Riesz(2.0)))
    rows[5, 3] = torch.nan
    result = gpu.sweep(request_of(rows, columns, Riesz(2.0)))
    assert result.energy.isnan().all()
    assert result.columns_gradient.isnan().all()
    others = torch.arange(30) != 5
    assert result.gradient[5].isnan().all()
    assert result.row_energies[5].isnan()
    assert relative_error(result.gradient[others], expected.gradient[others]) <= 1e-6
    assert relative_error(result.row_energies[others], expected.row_energies[others]) <= 1e-6


def test_cross_weights_of_any_size():
    rows, columns = random_rows(40, 20), random_rows(70, 20, seed=1)
    request = request_of(rows, columns, Riesz(2.0), weights=True)
    for factor in (1e-20, 1e20):
        check(replace(request, row_weights=factor * request.row_weights))
    nothing = gpu.sweep(replace(request, row_weights=torch.zeros(40)))
    assert not any(x.any() for x in nothing[:3])


def test_cross_of_transposed_rows():
    rows, columns = random_rows(20, 40).mT, random_rows(20, 70, seed=1).mT
    check(request_of(rows, columns, Riesz(2.0)))


@pytest.mark.parametrize(
    "kind",
    ["columns", "columns, ids", "columns, ids, weights", "nearest", "nearest columns, ids"],
)
def test_cross_variants_are_checked_before_they_serve(kind, monkeypatch):
    device = torch.device("cpu")
    rows, ids = random_rows(9, 12), torch.arange(9).int()
    columns = rows if "columns" in kind else None
    row_ids = ids if "ids" in kind else None
    request = NearestRequest(rows, [9], True, 0.0, columns, row_ids, row_ids)
    if not kind.startswith("nearest"):
        request = request_of(rows, rows, Riesz(2.0, half_space=True), ids="ids" in kind)
        request = replace(request, row_weights=torch.ones(9) if "weights" in kind else None)
    which = variant.variant_of(request)
    assert which.kind == kind
    verdict = verdicts.examine(which, device)
    assert verdict.passed, verdict.detail
    right = variant.sweep_as

    def wrong(*arguments):
        results = [None if x is None else x.clone() for x in right(*arguments)]
        results[-1][3] += 1
        return results

    monkeypatch.setattr(variant, "sweep_as", wrong)
    assert not verdicts.examine(which, device).passed
