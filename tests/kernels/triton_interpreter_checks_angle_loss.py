"""The sweep over two spaces, run by Triton's interpreter against the definition in float64.

Collected only for `test_triton_interpreter.py`, as `triton_interpreter_checks.py` is.
"""

import itertools

import pytest
import torch

from comhe_ext import verdicts
from comhe_ext.kernels import gpu
from comhe_ext.kernels.gpu import angle_loss, variant
from comhe_ext.kernels.sweep import DifferenceRequest
from comhe_ext.testing import collapsed_rows, paired_rows, random_rows, reference, relative_error

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    # the interpreter computes what a mask discards, in numpy, and numpy says so
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    # Triton 3.6's own, under numpy 2.3; from numpy 2.4 on its interpreter does not work
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning:triton"),
]

both_kinds = pytest.mark.parametrize("angle", [False, True], ids=["cosine", "angle"])
BOUNDS = (1e-6, 3e-6, 3e-6)  # of the sum, and of the gradients in both spaces


def truth(rows, projected, angle):
    """Sum and both gradients of one set, in float64."""
    points = [x.double().requires_grad_() for x in (rows, projected)]
    total = reference.angle_difference(points[0], points[1], "angle" if angle else "cosine")
    return total.detach(), *torch.autograd.grad(total, points)


def check(rows, projected, angle, bounds=BOUNDS):
    """Compare with float64 of the rows as they are."""
    results = gpu.angle_difference(rows, projected, angle, True)
    assert [x.shape for x in results] == [rows.shape[:1], rows.shape, projected.shape]
    assert all(x.dtype == torch.float32 for x in results)
    for m, (row_set, projected_set) in enumerate(zip(rows, projected, strict=True)):
        expected = truth(row_set, projected_set, angle)
        for result, exact, bound in zip(results, expected, bounds, strict=True):
            # rows of one column have no gradient, only the rounding of float64
            error = float((result[m].double() - exact).norm())
            assert error <= bound * float(exact.norm()) + 1e-10
    return results


def rows_of(sets, n, d, k, seed=0):
    """Random rows, projected where k < d, else others."""
    rows = random_rows(sets * n, d, seed=seed).view(sets, n, d)
    if k < d:
        return rows, rows @ random_rows(d, k, seed=seed + 1)
    return rows, random_rows(sets * n, k, seed=seed + 2).view(sets, n, k)


@both_kinds
@pytest.mark.parametrize("k", [3, 20, pytest.param(130, marks=pytest.mark.long)])
@pytest.mark.parametrize("d", [5, 40, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("n", [2, 33, pytest.param(70, marks=pytest.mark.long)])
def test_difference_of_every_size(n, d, k, angle):
    # nothing averages the rounding of one cosine, which a squared difference doubles
    bounds = BOUNDS if n > 2 else (6e-6, 6e-6, 6e-6)
    check(*rows_of(2 if n == 33 else 1, n, d, k), angle=angle, bounds=bounds)


@both_kinds
def test_difference_of_rows_of_one_column(angle):
    check(*rows_of(1, 9, 1, 3), angle=angle)
    check(*rows_of(1, 9, 3, 1), angle=angle)


@both_kinds
def test_difference_by_blocks(angle, monkeypatch):
    rows, projected = rows_of(1, 130, 6, 3)
    rows[0, 3] = rows[0, 120] * 1.001
    rows[0, 70] = -rows[0, 71]
    whole = check(rows, projected, angle)
    # one row tile against all columns; then several column blocks
    monkeypatch.setattr(angle_loss, "BLOCK_ELEMENTS", (64 * 192, 64 * 192))
    for result, expected in zip(check(rows, projected, angle), whole, strict=True):
        assert relative_error(result, expected.double()) <= 1e-6
    monkeypatch.setattr("comhe_ext.kernels.gpu.large_k.BLOCK_COLS", 64)
    monkeypatch.setattr(angle_loss, "BLOCK_ELEMENTS", (64 * 64, 64 * 64))
    check(rows, projected, angle)


@both_kinds
@pytest.mark.parametrize("antipodal", [False, True])
@pytest.mark.parametrize("spread", [1e-2, 1e-4])
def test_difference_of_near_pairs(spread, antipodal, angle):
    near = paired_rows(60, 24, spread, antipodal=antipodal).unsqueeze(0)
    far = random_rows(60, 10, seed=5).unsqueeze(0)
    # near in one space, in the other one, and in both
    for rows, projected in ((near, far), (far, near), (near, near @ random_rows(24, 10, seed=6))):
        check(rows, projected, angle)


@both_kinds
def test_difference_of_near_pairs_in_wide_rows(angle):
    rows = paired_rows(20, 140, 1e-3).unsqueeze(0)
    check(rows, rows @ random_rows(140, 130, seed=1), angle)


@both_kinds
def test_difference_of_collapsed_rows(angle):
    rows = collapsed_rows(70, 24, 1e-2).unsqueeze(0)
    # cosines near 1 have errors of 6e-8, and differ by about 1e-4
    bounds = (1e-6, 1e-6, 1e-6) if angle else (1e-3, 1e-3, 1e-3)
    check(rows, rows @ random_rows(24, 8, seed=1), angle, bounds)


@both_kinds
def test_difference_of_dead_equal_and_opposite_rows(angle):
    rows, projected = rows_of(2, 70, 24, 8)
    for x in (rows, projected):
        x[:, 3] = 0
        x[:, 5] = 2 * x[:, 7]
        x[:, 9] = -x[:, 68]
    rows[0, 20] = 0  # in one space alone
    projected[0, 21] = 0
    rows[1, 30] = 3 * rows[1, 31]
    projected[1, 40] = -projected[1, 41]
    rows[1, 50] = rows[1, 3]  # two dead rows
    _, to_rows, to_projected = check(rows, projected, angle)
    assert not to_rows[:, 3].any()
    assert not to_projected[:, 3].any()
    assert not to_rows[0, 20].any()
    assert not to_projected[0, 21].any()


@both_kinds
def test_difference_of_nothing_but_equal_rows(angle):
    rows = random_rows(1, 9).expand(40, 9).unsqueeze(0).clone()
    total, to_rows, to_projected = gpu.angle_difference(rows, rows[..., :4].neg(), angle, True)
    if angle:
        assert total == 0
        assert not to_rows.any()
        assert not to_projected.any()
    else:
        assert float(total) <= 1e-12 * 40 * 40


@both_kinds
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_difference_of_rows_of_any_length(size, angle):
    rows, projected = rows_of(1, 40, 12, 5)
    scaled = (rows * size).float()
    expected = truth(scaled[0].double() / size, projected[0], angle)
    total, _, to_projected = gpu.angle_difference(scaled, projected, angle, True)
    assert relative_error(total, expected[0]) <= 1e-6
    assert relative_error(to_projected, expected[2]) <= 3e-6


@both_kinds
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("space", [0, 1])
def test_difference_of_rows_that_are_not_finite(space, value, angle):
    points = rows_of(2, 50, 12, 5)
    points[0][0, 3] = points[0][0, 40] * 1.001
    points[space][0, 17, 3] = value
    total, *gradients = gpu.angle_difference(points[0], points[1], angle, True)
    assert total.isnan().tolist() == [True, False]
    for gradient in gradients:
        assert gradient[0, 17].isnan().any()
        assert gradient[1].isfinite().all()


HALVES = [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32)]


@both_kinds
@pytest.mark.parametrize("dtypes", HALVES)
def test_difference_reads_half_precision_exactly(dtypes, angle):
    half = [x.to(dtype) for x, dtype in zip(rows_of(2, 40, 37, 9), dtypes, strict=True)]
    results = gpu.angle_difference(half[0], half[1], angle, True)
    same = gpu.angle_difference(half[0].float(), half[1].float(), angle, True)
    assert all(torch.equal(x, y) for x, y in zip(results, same, strict=True))


@both_kinds
def test_difference_of_any_strides(angle):
    rows, projected = rows_of(2, 40, 12, 5)
    expected = gpu.angle_difference(rows, projected, angle, True)
    strided = [x.mT.contiguous().mT for x in (rows, projected)]
    results = gpu.angle_difference(strided[0], strided[1], angle, True)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


@both_kinds
@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=2)))
def test_difference_leaves_out_what_is_not_wanted(wanted, angle):
    rows, projected = rows_of(2, 70, 24, 8)
    rows[0, 3] = rows[0, 60] * 1.0001
    expected = gpu.angle_difference(rows, projected, angle, True)
    results = gpu.angle_difference(rows, projected, angle, *wanted)
    assert torch.equal(results[0], expected[0])
    for result, gradient, made in zip(results[1:], expected[1:], wanted, strict=True):
        assert torch.equal(result, gradient) if made else result is None


@both_kinds
@pytest.mark.parametrize("shared_space", [0, 1])
@pytest.mark.parametrize("rows_gradient", [True, False])
def test_difference_of_one_set_in_many_projections(rows_gradient, shared_space, angle):
    points = list(rows_of(2, 33, 24, 8))
    one = points[shared_space][:1].clone()
    one[0, 3] = one[0, 30] * 1.0001
    one[0, 5] = -one[0, 6]
    points[shared_space] = one.expand(2, -1, -1)
    shared = gpu.angle_difference(points[0], points[1], angle, rows_gradient)
    for m in range(2):
        rows, projected = (x[m : m + 1].contiguous() for x in points)
        single = gpu.angle_difference(rows, projected, angle, rows_gradient)
        for x, y in zip(shared, single, strict=True):
            assert (x is None and y is None) or torch.equal(x[m : m + 1], y)


@both_kinds
@pytest.mark.parametrize("noise", [1e-1, 1e-2])
def test_difference_of_spaces_that_nearly_agree(noise, angle):
    # cosines have errors of 6e-8, of which b - a loses nothing
    teacher = random_rows(150, 96)
    student = (teacher + noise * random_rows(150, 96, seed=3)).unsqueeze(0)
    bounds = (2e-7 / noise, 6e-7 / noise, 6e-7 / noise)
    check(teacher.unsqueeze(0), student, angle, bounds)


@both_kinds
@pytest.mark.parametrize(("sets", "n"), [(0, 5), (1, 0), (3, 0), (1, 1), (3, 1)])
def test_difference_without_pairs(sets, n, angle):
    rows, projected = rows_of(sets, n, 6, 3)
    total, *gradients = gpu.angle_difference(rows, projected, angle, True)
    assert torch.equal(total, torch.zeros(sets))
    for gradient, x in zip(gradients, (rows, projected), strict=True):
        assert torch.equal(gradient, torch.zeros(x.shape))


@both_kinds
def test_difference_of_rows_without_columns(angle):
    # dead rows, all perpendicular
    rows = random_rows(9, 6).unsqueeze(0)
    total, to_rows, to_projected = gpu.angle_difference(rows, rows[..., :0], angle, True)
    expected = check(rows, rows.new_zeros(1, 9, 2), angle)
    assert torch.equal(total, expected[0])
    assert torch.equal(to_rows, expected[1])
    assert to_projected.shape == (1, 9, 0)


@both_kinds
def test_difference_passes_the_check_before_it_serves(angle):
    rows, projected = rows_of(2, 4, 24, 8)
    for some in (rows, rows[:1].expand(2, -1, -1)):
        which = variant.variant_of(DifferenceRequest(some, projected, angle, True))
        verdict = verdicts.examine(which, torch.device("cpu"))
        assert verdict.passed, verdict


def test_difference_refuses_mistakes():
    rows, projected = rows_of(1, 5, 4, 3)
    with pytest.raises(TypeError, match="`rows` must be float32, float16 or bfloat16"):
        gpu.angle_difference(rows.double(), projected, False, True)
    with pytest.raises(TypeError, match="`projected` must be float32, float16 or bfloat16"):
        gpu.angle_difference(rows, projected.double(), False, True)
