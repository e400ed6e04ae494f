"""The angle-preserving loss of cosines by second moments, against its tiles in float64."""

import pytest
import torch

from comhe_ext.kernels.portable import angle_loss, angle_moments
from comhe_ext.testing import collapsed_rows, paired_rows, random_rows, relative_error

ROWS = {
    "random": random_rows(300, 12),
    "near pairs": paired_rows(300, 12, 1e-4),
    "collapsed": collapsed_rows(300, 12, 1e-2),
    "wider than many": random_rows(9, 40),
}


def spaces(kind, sets=1):
    rows = ROWS[kind].repeat(sets, 1, 1)
    return rows, rows @ random_rows(sets * 5, rows.shape[2], seed=1).view(sets, 5, -1).mT


def check(ours, theirs):
    for x, exact in zip(ours, theirs, strict=True):
        assert x.dtype == torch.float32
        assert relative_error(x, exact) <= 1e-7


@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("kind", ROWS)
def test_value_and_gradients(kind, sets):
    rows, projected = spaces(kind, sets)
    rows[0, 2] = 0.0
    projected[0, 2] = projected[0, 4] = 0.0  # the second one is dead in this space alone
    exact = rows.double(), projected.double()
    check(angle_moments.sweep(rows, projected, True), angle_loss.sweep(*exact, False, True))


@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("kind", ROWS)
def test_hessian_vector_product(kind, sets):
    rows, projected = spaces(kind, sets)
    tangents = [torch.randn_like(x) for x in (rows, projected)]
    for given in (tangents, (tangents[0], None), (None, tangents[1])):
        along = [x if x is None else x.double() for x in given]
        check(
            angle_moments.hessian_vector_product(rows, projected, given[0], given[1]),
            angle_loss.hessian_vector_product(
                rows.double(), projected.double(), along[0], along[1], False
            ),
        )


def test_one_set_of_rows_for_many_projections():
    rows, projected = spaces("random", 3)
    one = rows[:1].expand(3, -1, -1)
    for ours, theirs in zip(
        angle_moments.sweep(one, projected, True),
        angle_moments.sweep(rows, projected, True),
        strict=True,
    ):
        assert relative_error(ours, theirs) <= 1e-7
    total, to_rows, to_projected = angle_moments.sweep(one, projected, False)
    assert to_rows is None
    assert total.shape == (3,)
    assert to_projected.shape == projected.shape


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-6])
def test_spaces_of_almost_the_same_cosines(apart):
    rows = ROWS["random"].unsqueeze(0)
    other = rows + apart * torch.randn_like(rows)
    ours = angle_moments.sweep(rows, other, True)
    theirs = angle_loss.sweep(rows.double(), other.double(), False, True)
    for gradient, exact in zip(ours[1:], theirs[1:], strict=True):
        assert relative_error(gradient, exact) <= 1e-7
    # of the mean squared difference of cosines
    assert float((ours[0] - theirs[0]).abs()) <= 1e-6 * theirs[0] + 1e-15 * 300**2


def test_equal_spaces_have_exactly_0():
    rows = ROWS["random"].unsqueeze(0)
    total, *gradients = angle_moments.sweep(rows, rows.clone(), True)
    assert total == 0
    assert not any(x.any() for x in gradients)
