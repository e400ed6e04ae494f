"""The nearest other row of each row in the compiled kernel, against float64 distances."""

import itertools
import math

import pytest
import torch

from comhe_ext.kernels.cpu import binding
from comhe_ext.kernels.sweep import NearestRequest
from comhe_ext.testing import random_rows, reference

pytestmark = [
    pytest.mark.skipif(binding.unavailable() is not None, reason=str(binding.unavailable())),
    pytest.mark.usefixtures("poisoned_empty", "isa"),
]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def nearest(points, sizes=None, **fields):
    sizes = [len(points)] if sizes is None else sizes
    index = binding.nearest(NearestRequest(points, sizes, **fields))
    assert index.dtype == torch.int64
    assert index.shape == points.shape[:1]
    return index


def unit_rows(p, eps):
    """Unit rows in float64, and 1 - |v|^2."""
    p = p.double()
    squared = p.square().sum(1, keepdim=True) + eps
    alive = squared > 0
    squared = torch.where(alive, squared, 1.0)
    return torch.where(alive, p / squared.sqrt(), 0.0), torch.where(alive, eps / squared, 1.0)


def exact_squares(rows, columns, half_space=False, eps=0.0):
    """2 - 2c of all pairs [N, M], in half space 2 - 2|c|, from the differences of the unit rows."""
    (u, u_deficit), (v, v_deficit) = unit_rows(rows, eps), unit_rows(columns, eps)
    squares = []
    for side in (1.0, -1.0) if half_space else (1.0,):
        squared = reference._distance(u, side * v).square()
        # of multiples of one row nothing but the difference of their lengths
        i, j = (squared < 1e-18).nonzero(as_tuple=True)
        lengths = (1.0 - u_deficit).sqrt()[i], (1.0 - v_deficit).sqrt()[j]
        squared[i, j] = reference._difference(u[i], side * v[j], *lengths).square().sum(1)
        squares.append(squared + u_deficit + v_deficit.mT)
    return squares[0].minimum(squares[-1])


def check(index, squares, meets, k, columns):
    """An index for each row that meets anybody, of a column that is as near as any.

    Below the bound of near pairs float64 tells distances apart, above it float32 cosines do. Of
    columns of the same bits the first one is taken, and the first one of those at distance 0.
    """
    squares = torch.where(meets, squares, math.inf)
    assert torch.equal(index >= 0, meets.any(1))
    rows = (index >= 0).nonzero().squeeze(1)
    if not len(rows):
        return
    index, squares, meets = index[rows], squares[rows], meets[rows]
    found, least = squares.gather(1, index.unsqueeze(1)).squeeze(1), squares.min(1).values
    near = 2.0**-6 if k > 16 else 2.0**-3
    slack = torch.where(least < near - 1e-6, 1e-8 * least, 1e-6)
    assert bool((found <= least + slack).all())
    same = (columns.unsqueeze(0) == columns[index].unsqueeze(1)).all(2) & meets
    assert torch.equal(same.int().argmax(1), index)
    exact = least == 0
    assert torch.equal((squares[exact] == 0).int().argmax(1), index[exact])


def check_set(points, sizes=None, half_space=False, eps=0.0):
    sizes = [len(points)] if sizes is None else sizes
    index = nearest(points, sizes, half_space=half_space, eps=eps)
    for part, rows in zip(index.split(sizes), points.split(sizes), strict=True):
        squares = exact_squares(rows, rows, half_space, eps)
        meets = ~torch.eye(len(rows), dtype=torch.bool)
        check(part, squares, meets, rows.shape[1], rows)


def check_cross(rows, columns, ids=None, half_space=False, eps=0.0):
    meets = torch.ones(len(rows), len(columns), dtype=torch.bool)
    fields = dict(columns=columns, half_space=half_space, eps=eps)
    if ids is not None:
        meets = ids[0].unsqueeze(1) != ids[1]
        fields |= dict(row_ids=ids[0], column_ids=ids[1])
    index = nearest(rows, **fields)
    squares = exact_squares(rows, columns, half_space, eps)
    check(index, squares, meets, rows.shape[1], columns)
    return index


SIZES = [0, 1, 2, 3, 5, 12, 13, 31, 33, 97, 289, 700]
WIDTHS = [1, 2, 3, 8, 17, 40, 130, 600]


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("k", WIDTHS)
def test_sets_of_random_rows(k, half_space):
    for n in SIZES if k < 600 else [1, 33, 97]:
        check_set(random_rows(n, k), half_space=half_space)
    check_set(random_rows(140, k), [40, 0, 1, 67, 2, 30], half_space)


SHAPES = [(1, 1), (1, 700), (700, 1), (2, 3), (3, 2), (31, 33), (97, 289), (289, 97), (300, 301)]


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("k", WIDTHS)
def test_cross_sets_of_random_rows(k, half_space):
    for n, m in SHAPES if k < 600 else SHAPES[:6]:
        check_cross(random_rows(n, k, seed=1), random_rows(m, k, seed=2), half_space=half_space)


def special_rows(n, k):
    """Rows among which are twins at all angles, multiples of both signs, duplicates, dead rows."""
    rows = random_rows(n, k, seed=1)
    generator = torch.Generator().manual_seed(2)
    places = torch.randperm(n, generator=generator)
    for number, angle in enumerate((1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)):
        for copy in range(4):
            i, j = places[8 * number + 2 * copy], places[8 * number + 2 * copy + 1]
            scale = (1.0, -2.0, 0.5, -1.0)[copy]
            rows[j] = scale * (rows[i] + angle * random_rows(1, k, seed=9 * number + copy)[0])
    for number, scale in enumerate((1.0, 3.0, -1.0, -0.7, 1.0, 5.0)):
        rows[places[50 + number]] = scale * rows[places[60]]
    rows[places[61]] = rows[places[62]] = rows[places[63]]
    rows[places[64]] = rows[places[65]] = 0.0
    return rows


@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("k", [2, 3, 8, 17, 40, 130])
def test_near_pairs_multiples_and_dead_rows(k, half_space, eps):
    for n in (70, 331):
        rows = special_rows(n, k)
        check_set(rows, half_space=half_space, eps=eps)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(7))
        check_cross(rows, rows[order[: n // 2]].contiguous(), None, half_space, eps)
        ids = torch.arange(n, dtype=torch.int32) // 3
        check_cross(rows, rows, (ids, ids), half_space, eps)


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize(("spread", "k"), [(1e-2, 30), (1e-4, 30), (1e-6, 9), (1e-3, 300)])
def test_sets_of_nothing_but_near_pairs(spread, k, half_space):
    rows = random_rows(1, k, seed=1) + spread * random_rows(320, k, seed=2)
    rows[::3] *= -1.0
    check_set(rows, half_space=half_space)


@pytest.mark.parametrize("half_space", [False, True])
def test_ids(half_space):
    rows, columns = random_rows(60, 17, seed=1), random_rows(345, 17, seed=2)
    columns[3], columns[300] = rows[2], 2.0 * rows[2]
    n, m = torch.arange(60, dtype=torch.int32), torch.arange(345, dtype=torch.int32)
    extremes = torch.tensor([-(2**31), 2**31 - 1, 0], dtype=torch.int32)
    for ids in (
        (n, m),
        (n, m - 1000),
        (-n // 7, -m // 9),
        (extremes[n % 3], extremes[m % 2]),
        (0 * n, (m > 300).int()),
    ):
        check_cross(rows, columns, ids, half_space)
    nobody = nearest(rows, columns=columns, row_ids=0 * n, column_ids=0 * m, half_space=half_space)
    assert nobody.tolist() == [-1] * 60


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 5), (5, 0)])
def test_nobody_to_meet(n, m):
    rows, columns = random_rows(n, 4), random_rows(m, 4)
    ids = torch.arange(n, dtype=torch.int32), torch.arange(m, dtype=torch.int32)
    for fields in ({}, dict(row_ids=ids[0], column_ids=ids[1])):
        assert nearest(rows, columns=columns, **fields).tolist() == [-1] * n
    assert nearest(random_rows(2, 4), [0, 1, 0, 1], half_space=True).tolist() == [-1, -1]
    assert nearest(random_rows(0, 4), []).tolist() == []


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_lowest_of_equals_in_any_order_of_blocks(count, half_space, threads):
    threads(count)
    # all cosines are 0, of blocks that meet in turns
    rows = torch.eye(1500)[torch.randperm(1500, generator=torch.Generator().manual_seed(3))]
    index = nearest(rows.contiguous(), half_space=half_space)
    assert index.tolist() == [1] + [0] * 1499
    rows[700] = 0.0
    rows[0] *= -1e-30
    index = nearest(rows, half_space=half_space)
    assert index.tolist() == [1] + [0] * 1499
    # every column four times, far from every row
    rows, quarter = random_rows(1200, 40, seed=1), random_rows(300, 40, seed=2)
    index = nearest(rows, columns=quarter.repeat(4, 1), half_space=half_space)
    assert torch.equal(index, nearest(rows, columns=quarter, half_space=half_space))
    check_cross(rows[:50], quarter, None, half_space)


def test_a_negative_multiple_is_far_but_in_half_space():
    rows = torch.tensor([[1.0, 0.1], [-3.0, -0.3], [0.0, 1.0], [1.0, 0.2]])
    assert nearest(rows).tolist()[0] == 3
    assert nearest(rows, half_space=True).tolist()[:2] == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_exactly(dtype):
    rows = special_rows(331, 24).to(dtype)
    for half_space in (False, True):
        index = nearest(rows, half_space=half_space)
        assert torch.equal(index, nearest(rows.float(), half_space=half_space))


@pytest.mark.parametrize(
    ("sizes", "k"), [([2500], 30), ([1500, 1400, *[60] * 20], 30), ([600], 700)], ids=str
)
def test_any_number_of_threads_finds_the_same(sizes, k, threads):
    points = random_rows(sum(sizes), k)
    points[100:300] = random_rows(1, k, seed=3) + 1e-3 * random_rows(200, k, seed=4)
    fields = dict(columns=random_rows(1100, k, seed=5))
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(
            [nearest(points, sizes, half_space=half_space) for half_space in (False, True)]
            + [nearest(points, half_space=half_space, **fields) for half_space in (False, True)]
        )
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_in_range(bad):
    for n, k in ((1, 3), (2, 3), (40, 9), (700, 30)):
        for half_space, rows in itertools.product((False, True), ([0], list(range(0, n, 3)))):
            points = random_rows(n, k)
            points[rows, k - 1] = bad
            index = nearest(points, half_space=half_space)
            assert bool(((index >= -1) & (index < n)).all())
            if len(rows) == 1 and n > 2:  # the others do not see it
                others = index[1:]
                assert torch.equal(others - 1, nearest(points[1:], half_space=half_space))
            index = nearest(points, columns=points[: n // 2], half_space=half_space)
            assert bool(((index >= -1) & (index < n // 2)).all())


@pytest.mark.parametrize("half_space", [False, True])
def test_rows_along_a_curve(half_space):
    # each row of a tile is nearer than the one before it
    angles = torch.linspace(0.0, 3.0, 1000, dtype=torch.float64)
    harmonics = torch.arange(1, 9, dtype=torch.float64)
    curve = torch.cat(
        [torch.cos(angles[:, None] * harmonics), torch.sin(angles[:, None] * harmonics)], 1
    )
    check_set(curve.float(), half_space=half_space)


def test_bad_calls_are_refused():
    rows, ids = random_rows(4, 3), torch.arange(4, dtype=torch.int32)
    with pytest.raises(TypeError, match="float64"):
        nearest(rows.double())
    with pytest.raises(ValueError, match="sizes"):
        nearest(rows, [3])
    with pytest.raises(ValueError, match="eps"):
        nearest(rows, eps=-1.0)
    with pytest.raises(ValueError, match="columns"):
        nearest(rows, columns=rows.half())
    with pytest.raises(ValueError, match="one set of 4 rows"):
        nearest(rows, [2, 2], columns=rows)
    with pytest.raises(ValueError, match="both, or neither"):
        nearest(rows, columns=rows, row_ids=ids)
