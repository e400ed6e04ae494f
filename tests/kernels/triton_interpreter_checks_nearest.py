"""The nearest row of each row, run by Triton's interpreter against the definition in float64.

Collected only for `test_triton_interpreter.py`, as `triton_interpreter_checks.py` is.
"""

import itertools

import pytest
import torch

from comhe_ext.kernels import gpu
from comhe_ext.kernels.gpu import splits
from comhe_ext.kernels.sweep import NearestRequest
from comhe_ext.testing import collapsed_rows, paired_rows, random_rows, reference

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    # the interpreter computes what a mask discards, in numpy, and numpy says so
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    # Triton 3.6's own, under numpy 2.3; from numpy 2.4 on its interpreter does not work
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning:triton"),
]


def truth(rows, columns=None, *, half_space=False, eps=0.0, row_ids=None, column_ids=None):
    """Index of the nearest, the lowest of those that are equal but for rounding, or -1."""
    if columns is None:
        columns, row_ids, column_ids = rows, torch.arange(len(rows)), torch.arange(len(rows))
    units = []
    for points in (rows.double(), columns.double()):
        nu2 = points.square().sum(1, keepdim=True) + eps
        alive = nu2 > 0
        nu2 = torch.where(alive, nu2, 1.0)
        v = torch.where(alive, points / nu2.sqrt(), 0.0)
        units.append((v, torch.where(alive, eps / nu2, 1.0)))
    (u, of_u), (v, of_v) = units
    n, m = len(u), len(v)
    i, j = torch.arange(n).repeat_interleave(m), torch.arange(m).repeat(n)
    lengths = (1.0 - of_u).sqrt()[i], (1.0 - of_v).sqrt()[j]
    squares = [
        reference._difference(u[i], side * v[j], *lengths).square().sum(1).view(n, m)
        for side in ((1.0, -1.0) if half_space else (1.0,))
    ]
    distance = (torch.stack(squares).amin(0) + of_u + of_v.mT).sqrt()
    if row_ids is not None:
        distance = distance.masked_fill(row_ids[:, None] == column_ids[None], torch.inf)
    least = distance.amin(1, keepdim=True)
    equal = distance <= least + (least / 2).clamp_max(2.0**-46)
    index = equal.to(torch.uint8).argmax(1)
    return torch.where(least.squeeze(1).isfinite(), index, -1)


def nearest(rows, columns=None, sizes=None, **options):
    return gpu.nearest(NearestRequest(rows, sizes or [len(rows)], columns=columns, **options))


def check(rows, columns=None, **options):
    index = nearest(rows, columns, **options)
    assert index.dtype == torch.int64
    assert torch.equal(index, truth(rows, columns, **options))


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("k", [1, 3, 20, 40, 100, 200])
def test_nearest_of_every_size(k, half_space):
    for n in (1, 2, 33, 130):
        check(random_rows(n, k), half_space=half_space, eps=0.1 if n == 33 else 0.0)
    rows, columns = random_rows(33, k), random_rows(70, k, seed=1)
    check(rows, columns, half_space=half_space)
    ids = {"row_ids": torch.arange(33).int() % 5, "column_ids": torch.arange(70).int() % 3}
    check(rows, columns, half_space=half_space, **ids)


@pytest.mark.parametrize("most", [1, 64])
def test_nearest_in_many_sets(most, monkeypatch):
    monkeypatch.setattr(splits, "MAX_SPLITS", most)
    splits.splits_of_columns.cache_clear()
    sizes = [3, 0, 1, 300, 40, 2, 0]
    parts = [random_rows(n, 10, seed=n + 100 * i) for i, n in enumerate(sizes)]
    # equal but for rounding, in tiles of their own
    parts[3][270] = 3.0 * parts[3][3]
    parts[3][280] = parts[3][5]
    expected = torch.cat([truth(x) for x in parts if len(x)])
    assert torch.equal(nearest(torch.cat(parts), sizes=sizes), expected)
    check(parts[4], parts[3])
    splits.splits_of_columns.cache_clear()


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("angle", [1e-2, 1e-5, 1e-7])
def test_nearest_among_near_pairs(angle, half_space):
    # cosines of rows within 1e-5 radians are equal in float64, or almost
    rows = collapsed_rows(80, 12, angle)
    check(rows, half_space=half_space)
    check(rows, eps=1e-3)
    check(rows[:30], -rows[30:] if half_space else rows[30:], half_space=half_space)
    check(paired_rows(80, 24, angle, antipodal=half_space), half_space=half_space)


def test_nearest_among_multiples():
    row = random_rows(1, 20).bfloat16().float()  # of few bits, so that products are exact
    multiples = row * torch.tensor([5.0, 3.0, 0.75, 2.0**-60, 9 * 2.0**60, 7.0])[:, None]
    assert nearest(multiples).tolist() == [1, 0, 0, 0, 0, 0]
    # to a row that is far, near, or nearly equal to them
    for angle in (1.0, 1e-3, 1e-6):
        unit = torch.nn.functional.normalize(torch.cat([row, random_rows(1, 20, seed=1)]))
        other = (unit[0] + angle * unit[1]).unsqueeze(0)
        filler = -unit.repeat(30, 1)
        assert nearest(other, torch.cat([filler, multiples])).tolist() == [60]
    rows = torch.tensor([[1.0, 2.0], [5.0, -3.0], [-3.0, -6.0], [2.0, 4.0]])
    assert nearest(rows, half_space=True).tolist() == [2, 0, 0, 0]
    assert nearest(rows).tolist()[0] == 3


def test_nearest_of_dead_rows():
    rows = random_rows(9, 5)
    rows[[2, 6]] = 0.0
    # perpendicular to all: the lowest of them
    assert nearest(rows)[[2, 6]].tolist() == [0, 0]
    check(rows)
    check(rows, half_space=True, eps=1e-3)
    check(torch.zeros(4, 5))
    assert nearest(torch.zeros(3, 0)).tolist() == [1, 0, 0]


def test_nearest_of_who_meets_nobody():
    ids = torch.tensor([4, 4, 5], dtype=torch.int32)
    columns = random_rows(2, 6, seed=1)
    index = nearest(random_rows(3, 6), columns, row_ids=ids, column_ids=ids[:2])
    assert index[:2].tolist() == [-1, -1]
    assert index[2] >= 0
    assert nearest(random_rows(3, 6), random_rows(0, 6)).tolist() == [-1, -1, -1]
    assert nearest(random_rows(0, 6), random_rows(3, 6)).shape == (0,)
    assert nearest(random_rows(4, 6), sizes=[1, 2, 1]).tolist() == [-1, 1, 0, -1]


@pytest.mark.parametrize(
    ("value", "half_space"), [*itertools.product((torch.nan, torch.inf), (False, True))]
)
def test_nearest_of_rows_that_are_not_finite(value, half_space):
    rows = paired_rows(40, 20, 1e-4)
    expected = nearest(rows, half_space=half_space)
    rows[5, 3] = value
    index = nearest(rows, half_space=half_space)
    assert ((index >= 0) & (index < 40)).all()
    unaffected = (torch.arange(40) != 5) & (expected != 5)
    assert torch.equal(index[unaffected], expected[unaffected])
    index = nearest(random_rows(30, 20), rows[5:6])
    assert not index.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nearest_of_half_precision(dtype):
    check(random_rows(40, 12, dtype=dtype))
    check(random_rows(40, 12, dtype=dtype), random_rows(30, 12, dtype=dtype, seed=1))
