"""The nearest rows: the dense definition, the distance's derivatives, ids, mistakes."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from comhe_ext import nearest
from comhe_ext.testing import paired_rows, random_rows, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def distances(rows, columns=None, half_space=False, met=None):
    """Write all distances out in float64, from the differences of rows; infinite: do not meet."""
    v = torch.nn.functional.normalize(rows.double())
    w = v if columns is None else torch.nn.functional.normalize(columns.double())
    distance = (v[:, None] - w).norm(dim=2)
    if half_space:
        distance = torch.minimum(distance, (v[:, None] + w).norm(dim=2))
    if columns is None:
        met = ~torch.eye(len(v), dtype=torch.bool, device=rows.device)
    return distance if met is None else distance.masked_fill(~met, torch.inf)


def check(found, rows, columns=None, half_space=False, met=None):
    """Compare what was found with the definition.

    Two others may be equally far but for the rounding of a float32 cosine, 2e-7: either will do.
    """
    distance, index = found
    truth = distances(rows, columns, half_space, met)
    least = truth.min(1).values
    chosen = truth.gather(1, index.clamp_min(0)[:, None]).squeeze(1)
    assert torch.equal(index < 0, least.isinf())
    assert (chosen.square() <= least.square() + 4e-7)[index >= 0].all()
    assert relative_error(distance, chosen) <= 1e-6
    return least


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("size", [2, 3, 97, 600])
@pytest.mark.parametrize("k", [2, 8, 20, 130])
def test_it_is_the_definition(k, size, half_space, backend, device):
    rows = random_rows(size, k, device=device)
    distance, index = nearest(rows, half_space=half_space, backend=backend)
    check((distance, index), rows, half_space=half_space)
    assert distance.dtype == torch.float32
    angle, same = nearest(rows, half_space=half_space, angular=True, backend=backend)
    assert torch.equal(same, index)
    assert relative_error(angle, 2 * (distance.double() / 2).arcsin()) <= 1e-6


@pytest.mark.parametrize("half_space", [False, True])
def test_among_columns_and_ids(half_space, backend, device):
    rows, columns = random_rows(70, 12, device=device), random_rows(300, 12, seed=1, device=device)
    row_ids, column_ids = torch.arange(70, device=device) % 7, torch.arange(300, device=device) % 9
    for ids, met in (
        ({}, None),
        ({"row_ids": row_ids, "column_ids": column_ids}, row_ids[:, None] != column_ids),
    ):
        found = nearest(rows, columns, half_space=half_space, **ids, backend=backend)
        check(found, rows, columns, half_space, met)


@pytest.mark.parametrize("angle", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("antipodal", [False, True])
def test_near_rows_are_told_apart(angle, antipodal, backend, device):
    # each of the first 8 has its twin among the last
    rows = paired_rows(400, 20, angle, antipodal=antipodal, device=device)
    distance, index = nearest(rows, half_space=antipodal, backend=backend)
    least = check((distance, index), rows, half_space=antipodal)
    assert index[:8].tolist() == list(range(392, 400))
    assert index[392:].tolist() == list(range(8))
    assert relative_error(distance[:8], least[:8]) <= 1e-6
    # of several near ones the nearest, whatever their cosines round to
    crowd = rows[:1] + angle * torch.arange(1, 9, device=device)[:, None] * rows[1:2]
    index = nearest(rows[:1].contiguous(), crowd, backend=backend)[1]
    assert index.tolist() == distances(rows[:1], crowd).argmin(1).tolist()


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("factor", [1.0, 4.0, 0.5])
def test_equals_have_the_lowest_index_and_no_gradient(factor, half_space, backend, device):
    rows = random_rows(40, 8, device=device)
    rows[30] = factor * rows[5]
    rows[20] = (-2.0 if half_space else 2.0) * rows[5]
    rows.requires_grad_()
    distance, index = nearest(rows, half_space=half_space, backend=backend)
    assert [int(index[i]) for i in (5, 20, 30)] == [20, 5, 5]
    assert distance[[5, 20, 30]].tolist() == [0.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(distance[[5, 20, 30]].sum(), rows)
    assert not gradient.any()


@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_the_distance_has_all_derivatives(half_space, angular, eps):
    rows = random_rows(5, 4, dtype=torch.float64).requires_grad_()
    columns = random_rows(6, 4, seed=1, dtype=torch.float64).requires_grad_()
    options = {"half_space": half_space, "angular": angular, "eps": eps, "backend": "torch"}

    def alone(rows):
        return nearest(rows, **options)[0]

    def among(rows, columns):
        return nearest(rows, columns, **options)[0]

    assert gradcheck(alone, (rows,), check_forward_ad=True)
    assert gradgradcheck(alone, (rows,), check_fwd_over_rev=True)
    assert gradcheck(among, (rows, columns), check_forward_ad=True)
    assert torch.func.jacrev(alone)(rows.detach()).shape == (5, 5, 4)


def test_dead_rows_are_orthogonal_to_all(backend, device):
    rows = torch.tensor([[1.0, 0, 0], [0, 0, 0], [-1.0, 0.1, 0]], device=device).requires_grad_()
    distance, index = nearest(rows, backend=backend)
    assert index.tolist() == [1, 0, 1]
    assert distance.tolist() == pytest.approx([math.sqrt(2)] * 3)
    (gradient,) = torch.autograd.grad(distance.sum(), rows)
    assert not gradient[1].any()
    assert gradient.isfinite().all()


def test_who_meets_nobody(backend, device):
    for arguments in (
        (torch.ones(1, 3, device=device),),
        (torch.ones(2, 3, device=device), torch.ones(0, 3, device=device)),
    ):
        distance, index = nearest(*arguments, backend=backend)
        assert set(index.tolist()) == {-1}
        assert distance.isinf().all()
    rows, same = torch.ones(2, 3, device=device), torch.tensor([0, 1], device=device)
    ids = {"row_ids": same, "column_ids": torch.tensor([0, 0], device=device)}
    distance, index = nearest(rows, rows, **ids, backend=backend)
    assert index.tolist() == [-1, 0]
    assert distance.tolist() == [math.inf, 0.0]
    assert [x.shape for x in nearest(torch.ones(0, 3, device=device), backend=backend)] == [
        (0,)
    ] * 2


def test_nan_reaches_those_that_meet_it(backend, device):
    rows = random_rows(6, 4, device=device)
    rows[2, 0] = torch.nan
    assert nearest(rows, backend=backend)[0].isnan().all()
    columns = random_rows(5, 4, seed=1, device=device)
    assert nearest(rows, columns, backend=backend)[0].isnan().tolist() == [
        row == 2 for row in range(6)
    ]
    columns[3] = torch.inf
    threes, numbers = torch.full((3,), 3, device=device), torch.arange(5, device=device)
    ids = {"row_ids": threes, "column_ids": numbers}
    assert nearest(rows[3:], columns, backend=backend)[0].isnan().all()
    assert not nearest(rows[3:], columns, **ids, backend=backend)[0].isnan().any()


def test_batches_are_sets_of_their_own(backend, device):
    rows = random_rows(4 * 9, 5, device=device).view(4, 9, 5)
    distance, index = nearest(rows, backend=backend)
    for one, d, i in zip(rows, distance, index, strict=True):
        alone = nearest(one.contiguous(), backend=backend)
        assert torch.equal(d, alone[0])
        assert torch.equal(i, alone[1])
    by_vmap = torch.func.vmap(lambda x: nearest(x, backend=backend))(rows)
    assert torch.equal(by_vmap[1], index)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_full_graph(dynamic):
    rows = random_rows(20, 6).requires_grad_()

    def loss(rows):
        return nearest(rows)[0].log().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(rows), rows)[0] for f in (compiled, loss))
    assert relative_error(ours, theirs) <= 1e-6


def test_half_precision_finds_the_same_as_its_own_values(backend, device):
    for dtype in (torch.float16, torch.bfloat16):
        rows = random_rows(50, 12, dtype=dtype, device=device)
        check(nearest(rows, backend=backend), rows)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"half_space": 1}, TypeError, "`half_space` must be a bool"),
        ({"eps": -1.0}, ValueError, "`eps`"),
        ({"backend": "gpu"}, ValueError, "`backend`"),
        ({"columns": torch.ones(3, 5)}, ValueError, "as wide rows"),
    ],
)
def test_mistakes_are_told(more, error, message):
    with pytest.raises(error, match=message):
        nearest(torch.ones(3, 4), **more)
