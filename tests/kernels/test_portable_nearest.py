"""The nearest row of each row in plain torch, against the definition in float64."""

import itertools

import pytest
import torch

from comhe_ext.kernels import portable
from comhe_ext.kernels.portable import near_pairs
from comhe_ext.kernels.sweep import NearestRequest
from comhe_ext.testing import collapsed_rows, paired_rows, random_rows, reference


@pytest.fixture(params=[False, True], ids=["at once", "late"], autouse=True)
def answers(request, monkeypatch):
    """Let the processor also count as a device that answers late."""
    monkeypatch.setattr(near_pairs, "answers_at_once", lambda device: not request.param)


def nearest(rows, columns=None, sizes=None, **options):
    return portable.nearest(NearestRequest(rows, sizes or [len(rows)], columns=columns, **options))


def check(rows, columns=None, **options):
    index = nearest(rows, columns, **options)
    assert index.dtype == torch.int64
    assert torch.equal(index, reference.nearest(rows, columns, **options)[1])


@pytest.mark.parametrize("n", [0, 1, 2, 7, 512, 513, 600])
@pytest.mark.parametrize("half_space", [False, True])
def test_the_rows_of_a_set(n, half_space):
    for k, eps in itertools.product((1, 2, 8, 16, 40) if n <= 7 else (3,), (0.0, 0.1)):
        check(random_rows(n, k), half_space=half_space, eps=eps)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 600])
@pytest.mark.parametrize("m", [0, 1, 2, 7, 600])
@pytest.mark.parametrize("half_space", [False, True])
def test_rows_and_columns(n, m, half_space):
    for k in (1, 2, 8, 16, 40) if n * m <= 50 else (3,):
        rows, columns = random_rows(n, k), random_rows(m, k, seed=1)
        check(rows, columns, half_space=half_space)
        ids = {"row_ids": torch.arange(n).int() % 5, "column_ids": torch.arange(m).int() % 3}
        check(rows, columns, half_space=half_space, **ids)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    check(random_rows(80, 12, dtype=dtype))
    check(random_rows(80, 12, dtype=dtype), random_rows(70, 12, dtype=dtype, seed=1))


@pytest.mark.parametrize("half_space", [False, True])
def test_many_sets(half_space):
    sizes = [3, 3, 3, 0, 1, 700, 40, 40, 2, 0]
    parts = [random_rows(n, 10, seed=n + 100 * i) for i, n in enumerate(sizes)]
    parts[6][7] = 2.0 * parts[6][3]
    actual = nearest(torch.cat(parts), sizes=sizes, half_space=half_space)
    expected = [reference.nearest(x, half_space=half_space)[1] for x in parts]
    assert torch.equal(actual, torch.cat(expected))


@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("half_space", [False, True])
def test_near_pairs_are_told_apart(angle, half_space):
    # cosines of rows within 1e-5 radians are equal in float64, or almost
    rows = collapsed_rows(520, 4, angle)
    check(rows, half_space=half_space)
    check(rows[:100], eps=1e-3)
    check(rows[:100], -rows[100:200] if half_space else rows[100:200], half_space=half_space)
    twins = paired_rows(600, 24, angle, antipodal=half_space)
    index = nearest(twins, half_space=half_space)
    assert torch.equal(index[:8], torch.arange(592, 600))
    assert torch.equal(index[592:], torch.arange(8))


def test_float64_rows_that_are_nearer_than_rounding_of_cosines():
    rows = torch.tensor([[1.0, 0.0], [1.0, 3e-9], [1.0, 1e-9], [1.0, 1e-12]], dtype=torch.float64)
    assert nearest(rows).tolist() == [3, 2, 3, 0]


def test_multiples_are_equals():
    row = random_rows(1, 20).bfloat16().float()  # of few bits, so that products are exact
    multiples = row * torch.tensor([5.0, 3.0, 0.75, 2.0**-60, 9 * 2.0**60, 7.0])[:, None]
    assert nearest(multiples).tolist() == [1, 0, 0, 0, 0, 0]
    # to a row that is far, near, or nearly equal to them
    for angle in (1.0, 1e-3, 1e-6):
        unit = torch.nn.functional.normalize(torch.cat([row, random_rows(1, 20, seed=1)]))
        other = (unit[0] + angle * unit[1]).unsqueeze(0)
        filler = -unit.repeat(300, 1)
        assert nearest(other, torch.cat([filler, multiples])).tolist() == [600]
    # the exact duplicate wins over whatever is only near
    rows = torch.tensor([[1.0, 0.0], [1.0, 1e-30], [3.0, 0.0], [1.0, 2e-30]])
    assert nearest(rows).tolist() == [2, 0, 0, 1]


def test_antipodes_are_equals_in_half_space():
    rows = torch.tensor([[1.0, 2.0], [5.0, -3.0], [-3.0, -6.0], [2.0, 4.0]])
    assert nearest(rows, half_space=True).tolist() == [2, 0, 0, 0]
    assert nearest(rows).tolist()[0] == 3


def test_dead_rows():
    rows = random_rows(9, 5)
    rows[[2, 6]] = 0.0
    index = nearest(rows)
    # perpendicular to all: the lowest of them
    assert index[2] == 0
    assert index[6] == 0
    check(rows)
    check(rows, half_space=True, eps=1e-3)
    check(torch.zeros(4, 5))


def test_who_meets_nobody():
    ids = torch.tensor([4, 4, 5], dtype=torch.int32)
    columns = random_rows(2, 6, seed=1)
    index = nearest(random_rows(3, 6), columns, row_ids=ids, column_ids=ids[:2])
    assert index[:2].tolist() == [-1, -1]
    assert index[2] >= 0
    assert nearest(random_rows(3, 6), random_rows(0, 6)).tolist() == [-1, -1, -1]
    assert nearest(random_rows(4, 6), sizes=[1, 2, 1]).tolist() == [-1, 1, 0, -1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_in_range(value):
    rows = paired_rows(40, 20, 1e-4)
    expected = nearest(rows)
    rows[5, 3] = value
    index = nearest(rows)
    assert ((index >= 0) & (index < 40)).all()
    unaffected = (torch.arange(40) != 5) & (expected != 5)
    assert torch.equal(index[unaffected], expected[unaffected])
    index = nearest(random_rows(30, 20), rows[:6])
    assert ((index >= 0) & (index < 6)).all()
