"""The compiled sweep by itself, once per instruction set of this processor."""

import ctypes
import itertools
import math
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch

from comhe_ext import backends
from comhe_ext.kernels import portable
from comhe_ext.kernels.cpu import binding
from comhe_ext.kernels.pair_functions import PAIR_FUNCTIONS, Gaussian, Laplace, Riesz
from comhe_ext.testing import (
    collapsed_rows,
    exact_energy_and_gradient,
    leech_minimal_vectors,
    paired_rows,
    random_rows,
    reference,
    relative_error,
    sweep_columns,
    sweep_of,
)

pytestmark = [
    pytest.mark.skipif(binding.unavailable() is not None, reason=str(binding.unavailable())),
    pytest.mark.usefixtures("poisoned_empty", "isa"),
]


@pytest.fixture
def flush():
    """Sets whether this thread, and those it makes from now on, take subnormal numbers for 0."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    torch.set_flush_denormal(False)
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


_TRUTHS = {}


def truth(points, pair=None, function=None, **options):
    """The float64 energy and gradient, worked out once for all instruction sets.

    Of Riesz' function, or of the `function` of the distance that defines `pair`.
    """
    key = (points.numpy().tobytes(), points.shape[1], pair, *sorted(options.items()))
    if key not in _TRUTHS:
        _TRUTHS[key] = exact_energy_and_gradient(points, function=function, **options)
    return _TRUTHS[key]


def check(points, sizes=None, eps=0.0, energy_bound=1e-6, gradient_bound=2e-6, size=0.0, **options):
    """Means of packed sets and their gradient against the float64 definition, set by set.

    `size` is that of the terms of the energy, where terms of both signs leave less of it.
    """
    pair = Riesz(**options)
    sizes = [len(points)] if sizes is None else sizes
    scales = [pair.scale(n, "mean") for n in sizes]
    energy, gradient = sweep_of(binding, points, sizes, scales, pair, eps, True)
    alone, nothing = sweep_of(binding, points, sizes, scales, pair, eps, False)
    assert nothing is None
    assert torch.equal(alone, energy)
    assert energy.dtype == gradient.dtype == torch.float32
    first = 0
    for i, n in enumerate(sizes):
        rows = slice(first, first + n)
        first += n
        exact = truth(points[rows], eps=eps, **options)
        assert relative_error(energy[i], exact[0], size) <= energy_bound
        # where symmetry makes the gradient 0, the energy says what is small
        scale = float(exact[1].norm()) + 1e-6 * float(exact[0].abs())
        error = float((gradient[rows].double() - exact[1]).norm())
        assert error <= gradient_bound * scale, (error / scale, n)


PAIRS = [
    dict(s=s, half_space=half_space, angular=angular)
    for s, half_space, angular in itertools.product(
        (0.0, 1.0, 2.0, 0.7, 4.0), (False, True), (False, True)
    )
]


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_every_pair_function_on_packed_sets(pair, eps):
    sizes = [1, 67, 0, 300, 2, 31]  # 300 makes two blocks
    check(random_rows(sum(sizes), 24), sizes, eps, gradient_bound=3e-6, **pair)


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize("tau", [pytest.param(0.1, marks=pytest.mark.long), 2.0, 20.0])
def test_gaussian_with_near_pairs_duplicates_and_dead_rows(tau, angular, half_space, eps):
    pair = Gaussian(tau, half_space=half_space, angular=angular)
    rows = paired_rows(310, 24, 1e-3, antipodal=half_space)
    rows[7] = 0.0
    rows[301] = rows[100]
    rows[302] = -3.0 * rows[101]
    options = dict(half_space=half_space, angular=angular, eps=eps)
    expected, exact = truth(rows, pair, lambda t: (-tau * t**2).exp(), **options)
    scale = pair.scale(len(rows), "mean")
    energy, gradient = sweep_of(binding, rows, [len(rows)], [scale], pair, eps, True)
    assert relative_error(energy[0], expected) <= 1e-6
    assert relative_error(gradient, exact) <= 5e-6


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize(
    ("pair", "definition"),
    [
        pytest.param(
            Riesz(-1.9), lambda t: reference._pair_function(t, -1.9, 1e-3), marks=pytest.mark.long
        ),
        (Riesz(-0.5), lambda t: reference._pair_function(t, -0.5, 1e-3)),
        (Riesz(0.0, shift=0.3), lambda t: -(0.3 + t**2).log() / 2),
        pytest.param(Riesz(1.0, shift=4.0), lambda t: (4.0 + t**2) ** -0.5, marks=pytest.mark.long),
        (Riesz(2.0, shift=1.0), lambda t: 1 / (1 + t**2)),
        pytest.param(
            Riesz(-1.5, shift=0.2), lambda t: -((0.2 + t**2) ** 0.75), marks=pytest.mark.long
        ),
        pytest.param(Laplace(0.02), lambda t: (-0.02 * t).exp(), marks=pytest.mark.long),
        (Laplace(3.0), lambda t: (-3 * t).exp()),
    ],
    ids=["s=-1.9", "s=-0.5", "log", "s=1", "s=2", "s=-1.5", "wide", "Laplace"],
)
def test_other_functions_with_near_pairs_duplicates_and_dead_rows(
    pair, definition, angular, half_space
):
    pair = replace(pair, half_space=half_space, angular=angular)
    for k, eps in ((2, 0.0), (9, 0.1), (24, 0.0), (130, 1e-4)):
        rows = paired_rows(300, k, 1e-3, antipodal=half_space)  # more than one block
        rows[7] = 0.0
        rows[281] = rows[100]
        rows[282] = -3.0 * rows[101]
        options = dict(half_space=half_space, angular=angular, eps=eps)
        expected, exact = truth(rows, pair, definition, **options)
        scale = pair.scale(len(rows), "mean")
        energy, gradient = sweep_of(binding, rows, [len(rows)], [scale], pair, eps, True)
        assert relative_error(energy[0], expected) <= 1e-6
        assert relative_error(gradient, exact) <= 5e-6


CLOSE_ENDS = [
    *(Riesz(s) for s in (1.0, 0.7, 4.0, -0.5, -1.01, -1.99)),
    *(Riesz(s, shift=a) for s, a in ((0.0, 0.5), (2.0, 1.0), (-1.9, 30.0), (2.0, 4.0))),
    *(Gaussian(0.2), Laplace(0.01), Laplace(2.0)),
]


@pytest.mark.parametrize("k", [2, 64, 200, 1000])
@pytest.mark.parametrize("n", [2, 200])
@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize("pair", CLOSE_ENDS, ids=str)
def test_the_ends_of_nearly_orthogonal_rows_do_not_cancel(pair, angular, n, k):
    pair = replace(pair, half_space=True, angular=angular)
    rows = random_rows(n, k)
    if n == 2:  # nearly orthogonal, too: one pair has nobody to hide behind
        rows[1] = torch.nn.functional.normalize(rows[:1].roll(1, 1) * (-1.0) ** torch.arange(k))
        rows[1] += 0.01 * rows[0]
    scale = pair.scale(n, "mean")
    _, gradient = sweep_of(binding, rows, [n], [scale], pair, 0.0, True)
    _, expected = sweep_of(portable, rows.double(), [n], [scale], pair, 0.0, True)
    assert relative_error(gradient, expected) <= 2e-6


# around the tiles of 2, 4, 6 and 12 rows and 8, 16 and 32 columns, and the blocks of 288
EDGES = [2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 20, 21, 31, 33, 47, 49, 95, 97]
EDGES += [191, 192, 193, 287, 288, 289, 321, 575, 576, 577]


@pytest.mark.parametrize("n", EDGES)
def test_sizes_around_the_tiles(n):
    check(random_rows(n, 20))


# around the vectors, the strips of half a vector to two, and the 256 columns that stay in cache
WIDTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 25, 31, 32, 33, 40, 41, 48, 49, 56, 63]
WIDTHS += [255, 256, 257, 264, 272, 289, 1000, 4096]


@pytest.mark.parametrize("k", WIDTHS)
def test_widths(k):
    # below k = 8 random rows are close enough for float32 cosines to show
    bound = 2e-6 if k >= 8 else 2e-5
    check(random_rows(70, k), energy_bound=bound, gradient_bound=bound)
    check(random_rows(200, k), [120, 80], energy_bound=bound, gradient_bound=bound)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_close_pairs(pair):
    for angle, min_distance, eps in (
        (1e-1, 0.0, 0.0),
        (1e-2, 0.0, 0.0),
        (1e-3, 0.0, 1e-4),
        (1e-3, 1e-3, 0.0),
        (1e-4, 0.0, 0.0),
        (1e-4, 1e-3, 1e-4),
    ):
        options = dict(pair, eps=eps, min_distance=min_distance, gradient_bound=1e-5)
        check(paired_rows(40, 30, angle), **options)
        check(paired_rows(40, 30, angle, antipodal=True), **options)
        check(collapsed_rows(40, 30, angle), **options)


LOG_SIZE = 0.3  # mean of |log r| where that of log r may be 0


def clusters(n, k, spread):
    """Rows about five directions, two in three turned round, in random order; some rows alone."""
    generator = torch.Generator().manual_seed(3)
    centres = random_rows(5, k, seed=4)[torch.randint(5, (n,), generator=generator)]
    turned = 1.0 - 2.0 * (torch.rand(n, 1, generator=generator) < 2 / 3).float()
    rows = turned * centres + spread * random_rows(n, k, seed=5)
    rows[::7] = random_rows(n, k, seed=6)[::7]
    return rows


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_close_pairs_in_every_tile(pair):
    # near and ordinary pairs side by side, on both sides, over several blocks and ragged tiles
    for k, spread, eps in ((30, 1e-3, 0.0), (41, 1e-4, 1e-4), (9, 1e-2, 0.0)):
        options = dict(pair, eps=eps, gradient_bound=1e-5, size=LOG_SIZE if pair["s"] == 0 else 0.0)
        check(clusters(333, k, spread), [289, 44], **options)
        check(clusters(333, k, spread), [289, 44], min_distance=0.0, **options)


def test_close_pairs_of_a_wide_set():
    check(clusters(70, 700, 1e-3), gradient_bound=1e-5)
    check(clusters(70, 700, 1e-3), half_space=True, s=1.0, gradient_bound=1e-5)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_few_dimensions(k, pair):
    # where most pairs are close, and at k = 1 all
    options = dict(pair, gradient_bound=2e-5, size=LOG_SIZE if pair["s"] == 0 else 0.0)
    check(random_rows(333, k), [289, 44], **options)
    check(random_rows(333, k), [289, 44], eps=0.1, **options)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_large_min_distance(pair):
    for min_distance in (0.04, 0.9, 1.99):
        check(random_rows(60, 10), gradient_bound=4e-6, min_distance=min_distance, **pair)


def test_equal_rows():
    points = random_rows(40, 8)
    points[20:30] = 2 * points[:10]
    points[30:] = -points[:10]
    for pair in PAIRS:
        check(points, gradient_bound=4e-6, **pair)
    energy, gradient = sweep_of(binding, points, [40], [1.0], Riesz(min_distance=0.0), 0.0, True)
    assert energy.item() == math.inf
    assert bool(gradient.isfinite().all())


def test_directions_that_differ_in_a_tiny_entry():
    points = torch.tensor([[1.0, 1e-30], [1.0, 3e-30], [0.0, 1.0]])
    check(points, s=0.0, min_distance=0.0)
    check(points, s=2.0)


@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e18, 1e30])
def test_rows_of_any_length(factor):
    points = factor * random_rows(30, 12)
    energy, gradient = sweep_of(binding, points, [30], [1.0], Riesz(), 0.0, True)
    exact = exact_energy_and_gradient(points)
    assert relative_error(energy / 435, exact[0]) <= 1e-6
    assert relative_error(gradient.double() / 435, exact[1]) <= 2e-6


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_dead_rows(pair):
    points = random_rows(40, 12)
    points[[3, 17, 39]] = 0.0
    check(points, gradient_bound=4e-6, **pair)
    dead = sweep_of(binding, points, [40], [1.0], Riesz(**pair), 0.0, True)
    assert not dead[1][[3, 17, 39]].any()
    points[17] = 1e-42  # shorter than any normal number
    again = sweep_of(binding, points, [40], [1.0], Riesz(**pair), 0.0, True)
    assert all(map(torch.equal, dead, again))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_in_their_set(bad):
    sizes = [10, 300, 10]
    points = random_rows(320, 12)
    points[150, 7] = bad
    for pair in PAIRS:
        energy, gradient = sweep_of(binding, points, sizes, [1.0] * 3, Riesz(**pair), 0.0, True)
        assert energy.isnan().tolist() == [False, True, False]
        assert bool(gradient[:10].isfinite().all() and gradient[310:].isfinite().all())
        assert bool(gradient[150].isnan().all())


def test_empty():
    pair = Riesz()
    energy, gradient = sweep_of(binding, torch.empty(0, 5), [], [], pair, 0.0, True)
    assert energy.shape == (0,)
    assert gradient.shape == (0, 5)
    energy, gradient = sweep_of(binding, torch.ones(2, 5), [0, 1, 0, 1], [1.0] * 4, pair, 0.0, True)
    assert energy.tolist() == [0.0] * 4
    assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_exactly(dtype):
    values = torch.arange(65536).to(torch.int16).view(dtype)
    points = torch.stack([values, torch.ones_like(values), values.flip(0)], 1)
    points = points[points.isfinite().all(1)].contiguous()
    # a subset of every exponent and sign, subnormals among them
    points = points[::29].contiguous()
    pair = Riesz(s=0.5)
    half = sweep_of(binding, points, [len(points)], [1.0], pair, 0.0, True)
    single = sweep_of(binding, points.float(), [len(points)], [1.0], pair, 0.0, True)
    assert torch.equal(half[0], single[0])
    assert torch.equal(half[1], single[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_half_precision_keeps_nan_and_infinity(value):
    points = random_rows(9, 4, dtype=torch.float16)
    points[2, 1] = value
    energy, _ = sweep_of(binding, points, [9], [1.0], Riesz(), 0.0, False)
    assert energy.isnan().all()


# subnormal entries among others; the float32 and bfloat16 rows are hardly longer than 2^-126, which
# is the shortest that counts
SUBNORMAL = {torch.float16: 2e-5, torch.float32: 1e-38, torch.bfloat16: 1e-38}


def subnormal_rows(n, dtype):
    return (random_rows(n, 24, dtype=torch.float64) * SUBNORMAL[dtype]).to(dtype)


@pytest.mark.parametrize("dtype", SUBNORMAL, ids=str)
def test_subnormal_numbers_count(dtype, flush):
    points = subnormal_rows(60, dtype)
    energy, gradient = exact_energy_and_gradient(points)
    flush(True)
    scale = Riesz().scale(60, "mean")
    results = sweep_of(binding, points, [60], [scale], Riesz(), 0.0, True)
    flush(False)
    assert relative_error(results[0], energy) <= 1e-6
    assert relative_error(results[1], gradient) <= 2e-6


@pytest.mark.parametrize("dtype", SUBNORMAL, ids=str)
def test_flushing_subnormal_numbers_changes_no_bit(dtype, flush, threads):
    points = subnormal_rows(1500, dtype)
    points[1] = 3 * points[0]  # a pair that is done in double
    sets = [60, 1440], [Riesz().scale(60, "mean"), 1.0], Riesz(), 0.0
    threads(1)
    expected = sweep_of(binding, points, *sets, True)
    for flushes, count in ((True, 1), (True, 2), (False, 2)):
        flush(flushes)
        threads(count)
        for with_gradient in (True, False):
            energy, gradient = sweep_of(binding, points, *sets, with_gradient)
            assert torch.equal(energy, expected[0])
            assert gradient is None or torch.equal(gradient, expected[1])


@pytest.mark.parametrize(
    ("sizes", "k"),
    [
        ([3000], 30),
        ([1500, 1400, *[60] * 20], 30),
        ([1000, 700, 64, 193, 1, 0, 400], 40),
        ([100] * 150, 64),
        ([600], 700),
    ],
    ids=["one large set", "two large sets", "mixed sets", "many small sets", "wide rows"],
)
def test_any_number_of_threads_gives_the_same_bits(sizes, k, threads):
    points = random_rows(sum(sizes), k)
    points[100:400] = clusters(300, k, 1e-3)  # and repairs take part
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(sweep_of(binding, points, sizes, [1.0] * len(sizes), Riesz(), 0.0, True))
    for energy, gradient in results[1:]:
        assert torch.equal(energy, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_more_threads_than_cores_come_to_an_end(threads):
    # of few blocks, so that they wait for each other all the time
    points = random_rows(700, 30)
    threads(1)
    expected = sweep_of(binding, points, [700], [1.0], Riesz(), 0.0, True)
    threads(16)
    for _ in range(100):
        results = sweep_of(binding, points, [700], [1.0], Riesz(), 0.0, True)
        assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_cross_is_what_the_union_adds(pair, eps):
    rows, columns = random_rows(200, 12, seed=1), random_rows(50, 12, seed=2)
    rows[7], columns[3] = 2 * columns[9] + 1e-3, -columns[11]
    ids = torch.arange(250, dtype=torch.int32)
    options = Riesz(**pair)
    energy, to_rows, to_columns = sweep_columns(
        binding, rows, columns, ids[:200], ids[200:], 1.0, options, eps, True
    )
    alone = sweep_columns(binding, rows, columns, ids[:200], ids[200:], 1.0, options, eps, False)
    assert torch.equal(alone[0], energy)
    assert alone[1:] == (None, None)

    def exact_sum(points):
        energy, gradient = truth(points, eps=eps, **pair)
        count = 1 / options.scale(len(points), "mean")
        return count * energy, count * gradient

    union, own_rows, own_columns = map(exact_sum, (torch.cat([rows, columns]), rows, columns))
    # half space counts the pairs of a set twice, those of rows and columns once
    once = 0.5 if pair["half_space"] else 1.0
    assert relative_error(energy, once * (union[0] - own_rows[0] - own_columns[0])) <= 1e-6
    assert relative_error(to_rows, once * (union[1][:200] - own_rows[1])) <= 4e-6
    assert relative_error(to_columns, once * (union[1][200:] - own_columns[1])) <= 4e-6


def test_cross_leaves_out_equal_ids():
    points, pair = random_rows(400, 16), Riesz()
    twice, gradient = sweep_of(binding, points, [400], [2.0], pair, 0.0, True)
    for ids in (torch.arange(400), torch.randperm(400)):
        ids = ids.int()
        energy, to_rows, to_columns = sweep_columns(
            binding, points, points, ids, ids, 1.0, pair, 0.0, True
        )
        torch.testing.assert_close(energy, twice[0], rtol=1e-6, atol=0.0)
        assert relative_error(to_rows + to_columns, gradient) <= 2e-6
    # without ids every pair counts, as where no two are equal
    different, none = (
        sweep_columns(binding, points, points, a, b, 1.0, Gaussian(), 0.0, True)
        for a, b in ((ids, ids + 400), (None, None))
    )
    assert all(map(torch.equal, different, none))
    nothing = sweep_columns(binding, points[:0], points, ids[:0], ids, 1.0, pair, 0.0, True)
    assert nothing[0] == 0
    assert nothing[1].shape == (0, 16)
    assert not nothing[2].any()


def test_cross_with_any_number_of_threads_gives_the_same_bits(threads):
    rows, columns = random_rows(2500, 30, seed=1), random_rows(1100, 30, seed=2)
    ids = torch.arange(3600, dtype=torch.int32)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(
            sweep_columns(binding, rows, columns, ids[:2500], ids[2500:], 1.0, Riesz(), 0.0, True)
        )
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


# the last one so large, for its few dimensions, that G keeps what rounding takes from it
@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize(("n", "k"), [(4096, 30), (2000, 512), (5000, 8)])
def test_large_sets(n, k, half_space):
    check(random_rows(n, k), half_space=half_space)


@pytest.mark.long
def test_very_large_set():
    check(random_rows(16384, 30))


@pytest.mark.long
def test_leech_lattice():
    points = leech_minimal_vectors().float()
    n = len(points)
    energy, _ = sweep_of(binding, points, [n], [1.0], Riesz(), 0.0, False)
    # 1/(2 - 2c) at c = -1, -1/2, -1/4, 0, 1/4, 1/2, and how many rows have that cosine with one row
    counts = {4.0: 1, 3.0: 4600, 2.5: 47104, 2.0: 93150, 1.5: 47104, 1.0: 4600}
    exact = n / 2 * math.fsum(count / squared for squared, count in counts.items())
    assert abs(energy.item() - exact) <= 1e-7 * exact


def test_bad_calls_are_refused(monkeypatch):
    points, pair = torch.ones(4, 3), Riesz()
    with pytest.raises(TypeError, match="float64"):
        sweep_of(binding, points.double(), [4], [1.0], pair, 0.0, True)
    with pytest.raises(ValueError, match=r"\[T, k\]"):
        sweep_of(binding, points[0], [4], [1.0], pair, 0.0, True)
    with pytest.raises(ValueError, match="contiguous"):
        sweep_of(binding, points.T, [3], [1.0], pair, 0.0, True)
    with pytest.raises(ValueError, match="meta"):
        sweep_of(binding, points.to("meta"), [4], [1.0], pair, 0.0, True)
    for sizes in ([3], [5, -1]):
        with pytest.raises(ValueError, match="sizes"):
            sweep_of(binding, points, sizes, [1.0] * len(sizes), pair, 0.0, True)
    with pytest.raises(ValueError, match="scales"):
        sweep_of(binding, points, [4], [], pair, 0.0, True)
    with pytest.raises(ValueError, match="eps"):
        sweep_of(binding, points, [4], [1.0], pair, math.nan, True)
    ids = torch.arange(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="columns"):
        sweep_columns(binding, points, points.half(), ids, ids, 1.0, pair, 0.0, True)
    with pytest.raises(ValueError, match="column_ids"):
        sweep_columns(binding, points, points, ids, ids.long(), 1.0, pair, 0.0, True)
    with pytest.raises(ValueError, match="both, or neither"):
        sweep_columns(binding, points, points, ids, None, 1.0, pair, 0.0, True)
    monkeypatch.setenv("COMHE_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="COMHE_CPU_ISA"):
        sweep_of(binding, points, [4], [1.0], pair, 0.0, True)


@pytest.fixture
def other_library(tmp_path, monkeypatch):
    """Puts a library of the given source in the place of the built one."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")

    def build(source):
        library = tmp_path / "other.so"
        (tmp_path / "other.c").write_text(source)
        command = [compiler, "-shared", "-fPIC", "-o", library, tmp_path / "other.c"]
        subprocess.run(command, check=True)
        monkeypatch.setattr(binding, "LIBRARY", library)
        clear()

    def clear():
        binding._library.cache_clear()
        binding.unavailable.cache_clear()

    yield build
    monkeypatch.undo()
    clear()


CALL_BYTES = ctypes.sizeof(binding._Call)
STAMP = "int comhe_abi_version() {{ return {0}; }} int comhe_call_bytes() {{ return {1}; }}"
SWEEP = """
int comhe_best_isa() { return 0; }
int comhe_supports() { return 0; }
int comhe_sweep() { __builtin_trap(); }
int comhe_angle_difference() { __builtin_trap(); }
int comhe_distance() { __builtin_trap(); }
"""


@pytest.mark.parametrize(
    "source",
    [
        SWEEP,
        STAMP.format(binding.ABI_VERSION, CALL_BYTES),
        STAMP.format(binding.ABI_VERSION + 1, CALL_BYTES) + SWEEP,
        STAMP.format(binding.ABI_VERSION, CALL_BYTES - 8) + SWEEP,
    ],
    ids=["without a stamp", "without a sweep", "another version", "another size"],
)
def test_a_library_of_other_sources_is_not_called(source, other_library):
    other_library(source)
    for refused in (binding.unavailable(), backends.unavailable("cpu")):
        assert "is of another version" in refused
        assert "pip install -e ." in refused
    with pytest.raises(RuntimeError, match="another version"):
        sweep_of(binding, torch.ones(4, 3), [4], [1.0], Riesz(), 0.0, True)
    # nothing else needs it
    assert backends.choose(None, Riesz(), torch.device("cpu"), torch.float32) == "torch"


def test_a_library_of_these_sources_is_taken(other_library):
    library = binding._library()
    other_library(STAMP.format(library.comhe_abi_version(), library.comhe_call_bytes()) + SWEEP)
    assert binding.unavailable() is None


def test_the_library_refuses_what_the_binding_would_not_send():
    library, call = binding._library(), binding._Call()
    assert library.comhe_sweep(None, 0) == 1
    energy = torch.zeros(1)
    call.energy, call.k = energy.data_ptr(), 3
    assert library.comhe_sweep(call, 0) == 0  # no sets: nothing to do
    assert library.comhe_sweep(call, len(binding.INSTRUCTION_SETS)) == 3
    for field, value in dict(k=0, sets=-1, dtype=7, eps=-1.0).items():
        before = getattr(call, field)
        setattr(call, field, value)
        assert library.comhe_sweep(call, 0) == 1
        setattr(call, field, before)
    call.pair = binding._Pair(function=len(PAIR_FUNCTIONS))
    assert library.comhe_sweep(call, 0) == 1
    for parameters in ((-2.0, 0.0), (math.nan, 0.0), (2.0, -1.0), (2.0, math.nan)):
        call.pair = binding._Pair(parameters=parameters)
        assert library.comhe_sweep(call, 0) == 1
    for kind in (Gaussian, Laplace):
        call.pair = binding._Pair(function=kind.number, parameters=(0.0, 0.0))
        assert library.comhe_sweep(call, 0) == 1


def test_the_library_says_which_pair_functions_it_knows():
    library = binding._library()
    assert binding.supports(Riesz())
    assert binding.supports(Riesz(-1.0, shift=1.0))
    assert binding.supports(Gaussian())
    assert binding.supports(Laplace())
    assert not library.comhe_supports(-1)
    assert not library.comhe_supports(len(PAIR_FUNCTIONS))
