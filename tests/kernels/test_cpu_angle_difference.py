"""The compiled sweep over two spaces by itself, once per instruction set of this processor."""

import itertools

import pytest
import torch

from comhe_ext.kernels.cpu import binding
from comhe_ext.testing import collapsed_rows, paired_rows, random_rows, reference, relative_error

pytestmark = [
    pytest.mark.skipif(binding.unavailable() is not None, reason=str(binding.unavailable())),
    pytest.mark.usefixtures("poisoned_empty", "isa"),
]

both_kinds = pytest.mark.parametrize("angle", [False, True], ids=["cosine", "angle"])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def definition(rows, projected, angle):
    """The dense definition in float64, for rows of which no two are near but exactly opposite."""

    def compare(rows):
        v = torch.nn.functional.normalize(rows, dim=1)
        c = v @ v.mT
        if not angle:
            return c
        ends = c.detach().abs() > 1 - 1e-13  # no direction to turn in
        return torch.where(ends, (c < 0) * torch.pi, torch.where(ends, 0.0, c).arccos())

    difference = compare(projected) - compare(rows)
    return (difference - difference.diag().diag()).square().sum()


_TRUTHS = {}


def truth(rows, projected, angle, of=definition):
    """Sum and both gradients of one set; once for all instruction sets."""
    key = (*(x.float().numpy().tobytes() for x in (rows, projected)), rows.shape, angle)
    if key not in _TRUTHS:
        points = [x.double().requires_grad_() for x in (rows, projected)]
        total = of(*points, angle)
        _TRUTHS[key] = total.detach(), *torch.autograd.grad(total, points)
    return _TRUTHS[key]


def by_differences(rows, projected, angle):
    return reference.angle_difference(rows, projected, "angle" if angle else "cosine")


BOUNDS = (1e-6, 3e-6, 3e-6)  # of the sum, and of the gradients in both spaces


def check(rows, projected, angle, bounds=BOUNDS, of=definition):
    """Compare with float64 of the rows as they are."""
    results = binding.angle_difference(rows, projected, angle, True)
    assert [x.shape for x in results] == [rows.shape[:1], rows.shape, projected.shape]
    assert all(x.dtype == torch.float32 for x in results)
    for m, (row_set, projected_set) in enumerate(zip(rows, projected, strict=True)):
        expected = truth(row_set, projected_set, angle, of)
        for result, exact, bound in zip(results, expected, bounds, strict=True):
            size = float(exact.norm())
            # rows of one column have no gradient, only the rounding of float64
            assert float((result[m].double() - exact).norm()) <= bound * size + 1e-10


def rows_of(sets, n, d, k, seed=0):
    """Random rows, projected where k < d, else others."""
    rows = random_rows(sets * n, d, seed=seed).view(sets, n, d)
    if k < d:
        return rows, rows @ random_rows(d, k, seed=seed + 1)
    return rows, random_rows(sets * n, k, seed=seed + 2).view(sets, n, k)


WIDTHS = [(1, 1), (3, 1), (3, 8), (8, 3), (30, 8), (129, 30), (30, 129), (700, 129)]


@both_kinds
@pytest.mark.parametrize(("d", "k"), WIDTHS)
@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("n", [2, 5, 97, 300])
def test_values_and_gradients(n, sets, d, k, angle):
    # nothing averages the rounding of a few float32 cosines, which a squared difference doubles
    bounds = BOUNDS if n > 5 else (6e-6, 6e-6, 6e-6)
    rows, projected = rows_of(sets, n, d, k)
    check(rows, projected, angle, bounds)


@both_kinds
@pytest.mark.parametrize(("sets", "n"), [(0, 5), (1, 0), (3, 0), (1, 1), (3, 1)])
def test_without_pairs_there_is_nothing_to_keep(sets, n, angle):
    rows, projected = rows_of(sets, n, 6, 3)
    total, *gradients = binding.angle_difference(rows, projected, angle, True)
    assert torch.equal(total, torch.zeros(sets))
    for gradient, x in zip(gradients, (rows, projected), strict=True):
        assert torch.equal(gradient, torch.zeros(x.shape))


# around the tiles of 2, 4, 6 and 12 rows and 8, 16 and 32 columns, and the blocks of 192
@both_kinds
@pytest.mark.parametrize("n", [3, 7, 11, 12, 13, 17, 31, 33, 95, 191, 192, 193, 385])
def test_sizes_around_the_tiles(n, angle):
    rows, projected = rows_of(1, n, 40, 20)
    check(rows, projected, angle, (2e-6, 4e-6, 4e-6))


# around the vectors, the strips of half a vector to two, and the 256 columns that stay in cache
@both_kinds
@pytest.mark.parametrize("width", [2, 4, 7, 9, 15, 16, 17, 31, 32, 33, 255, 256, 257, 289, 513])
def test_widths_around_the_strips(width, angle):
    rows, projected = rows_of(1, 61, width, 10)
    check(rows, projected, angle)
    check(projected, rows, angle)


@both_kinds
@pytest.mark.parametrize("antipodal", [False, True])
@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_near_pairs(spread, antipodal, angle):
    near = paired_rows(60, 24, spread, antipodal=antipodal).unsqueeze(0)
    far = random_rows(60, 10, seed=5).unsqueeze(0)
    matrix = random_rows(24, 10, seed=6)
    # near in one space, in the other one, and in both
    for rows, projected in ((near, far), (far, near), (near, near @ matrix)):
        check(rows, projected, angle, of=by_differences)


@both_kinds
def test_collapsed_rows(angle):
    rows = collapsed_rows(70, 24, 1e-2).unsqueeze(0)
    # cosines near 1 have errors of 6e-8, and differ by about 1e-4
    bounds = (1e-6, 1e-6, 1e-6) if angle else (1e-3, 1e-3, 1e-3)
    check(rows, rows @ random_rows(24, 8, seed=1), angle, bounds, by_differences)


@both_kinds
def test_dead_equal_and_opposite_rows(angle):
    rows, projected = rows_of(2, 130, 24, 8)
    for x in (rows, projected):
        x[:, 3] = 0
        x[:, 5] = 2 * x[:, 7]
        x[:, 9] = -x[:, 120]
    rows[0, 20] = 0  # in one space alone
    projected[0, 21] = 0
    rows[1, 30] = 3 * rows[1, 31]
    projected[1, 40] = -projected[1, 41]
    rows[1, 50] = rows[1, 3]  # two dead rows
    check(rows, projected, angle, of=by_differences)
    _, to_rows, to_projected = binding.angle_difference(rows, projected, angle, True)
    assert not to_rows[:, 3].any()
    assert not to_projected[:, 3].any()
    assert not to_rows[0, 20].any()
    assert not to_projected[0, 21].any()


@both_kinds
@pytest.mark.parametrize("n", [2, 40])
def test_nothing_but_equal_rows(n, angle):
    rows = random_rows(1, 9).expand(n, 9).unsqueeze(0).clone()
    total, to_rows, to_projected = binding.angle_difference(rows, rows[..., :4].neg(), angle, True)
    if angle:
        assert total == 0
        assert not to_rows.any()
        assert not to_projected.any()
    else:
        assert float(total) <= 1e-12 * n * n


@both_kinds
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_any_length_of_rows(size, angle):
    rows, projected = rows_of(1, 40, 12, 5)
    scaled = (rows * size).float()
    expected = truth(scaled[0] / size, projected[0], angle)
    total, to_rows, to_projected = binding.angle_difference(scaled, projected, angle, True)
    assert relative_error(total, expected[0]) <= 1e-6
    if size < 1e20:  # else it is below float32
        assert relative_error(to_rows.double() * size, expected[1]) <= 3e-6
    assert relative_error(to_projected, expected[2]) <= 3e-6


@both_kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("space", [0, 1])
def test_nan_and_infinity_come_out_as_nan(space, value, angle):
    points = rows_of(2, 50, 12, 5)
    points[space][0, 17, 3] = value
    total, *gradients = binding.angle_difference(points[0], points[1], angle, True)
    assert total.isnan().tolist() == [True, False]
    for gradient in gradients:
        assert gradient[0, 17].isnan().any()
        assert gradient[1].isfinite().all()


HALVES = list(itertools.product([torch.float16, torch.bfloat16, torch.float32], repeat=2))[:-1]


@both_kinds
@pytest.mark.parametrize("dtypes", HALVES)
def test_half_precision_is_read_exactly(dtypes, angle):
    half = [x.to(dtype) for x, dtype in zip(rows_of(2, 60, 37, 9), dtypes, strict=True)]
    results = binding.angle_difference(half[0], half[1], angle, True)
    same = binding.angle_difference(half[0].float(), half[1].float(), angle, True)
    assert all(torch.equal(x, y) for x, y in zip(results, same, strict=True))


@both_kinds
def test_any_strides(angle):
    rows, projected = rows_of(3, 40, 12, 5)
    expected = binding.angle_difference(rows, projected, angle, True)
    strided = [x.mT.contiguous().mT for x in (rows, projected)]
    results = binding.angle_difference(strided[0], strided[1], angle, True)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


@both_kinds
@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=2)))
def test_what_is_not_wanted_is_left_out(wanted, angle):
    rows, projected = rows_of(2, 230, 24, 8)
    rows[0, 3] = rows[0, 200] * 1.0001
    expected = binding.angle_difference(rows, projected, angle, True)
    results = binding.angle_difference(rows, projected, angle, wanted[0], wanted[1])
    assert torch.equal(results[0], expected[0])
    for result, gradient, made in zip(results[1:], expected[1:], wanted, strict=True):
        assert torch.equal(result, gradient) if made else result is None


@both_kinds
@pytest.mark.parametrize("rows_gradient", [True, False])
def test_projections_of_one_set_share_its_cosines(rows_gradient, angle):
    rows, projected = rows_of(4, 230, 24, 8)
    rows = rows[:1].clone()
    rows[0, 3] = rows[0, 200] * 1.0001
    rows[0, 5] = -rows[0, 6]
    shared = binding.angle_difference(rows.expand(4, -1, -1), projected, angle, rows_gradient)
    for m in range(4):
        single = binding.angle_difference(rows, projected[m : m + 1], angle, rows_gradient)
        for x, y in zip(shared, single, strict=True):
            assert (x is None and y is None) or torch.equal(x[m : m + 1], y)


@both_kinds
@pytest.mark.parametrize(("sets", "projections", "n"), [(1, 1, 900), (2, 3, 500), (40, 1, 150)])
def test_any_number_of_threads_gives_the_same_bits(sets, projections, n, angle, threads):
    rows, projected = rows_of(sets * projections, n, 40, 10)
    rows[:, 3] = rows[:, n - 1] * 1.001
    if sets == 1 or projections > 1:
        rows = rows[:1].expand(len(projected), -1, -1)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(binding.angle_difference(rows, projected, angle, True))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_an_isometry_is_within_the_rounding_of_cosines():
    # the error of a float32 cosine is about 6e-8, whatever b - a is
    rows = random_rows(400, 64).unsqueeze(0)
    rotation = torch.linalg.qr(random_rows(64, 64, seed=2, dtype=torch.float64)).Q
    turned = (rows.double() @ rotation).float()
    for angle in (False, True):
        total, _, _ = binding.angle_difference(rows, turned, angle, True)
        assert float(total) <= 400 * 399 * (3e-7 if angle else 2e-7) ** 2


@both_kinds
@pytest.mark.parametrize("noise", [1e-1, 1e-2])
def test_spaces_that_nearly_agree(noise, angle):
    # a student beside its teacher: cosines have errors of 6e-8, of which b - a loses nothing
    teacher = random_rows(300, 96)
    student = (teacher + noise * random_rows(300, 96, seed=3)).unsqueeze(0)
    bounds = (2e-7 / noise, 6e-7 / noise, 6e-7 / noise)
    check(teacher.unsqueeze(0), student, angle, bounds)


def test_mistakes_are_refused():
    rows, projected = rows_of(1, 5, 4, 3)
    with pytest.raises(TypeError, match="`rows` must be float32, float16 or bfloat16"):
        binding.angle_difference(rows.double(), projected, False, True)
    with pytest.raises(TypeError, match="`projected` must be float32, float16 or bfloat16"):
        binding.angle_difference(rows, projected.double(), False, True)
    with pytest.raises(ValueError, match="`projected` must be on the CPU"):
        binding.angle_difference(rows, projected.to("meta"), False, True)
