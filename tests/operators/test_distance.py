"""The distance of each row to one other: the definition, gradients, all ways of asking for it."""

import math

import pytest
import torch

from comhe_ext.kernels.cpu import binding
from comhe_ext.kernels.sweep import DistanceRequest
from comhe_ext.operators.distance import distance_to
from comhe_ext.testing import random_rows, reference, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")

OPS = torch.ops.comhe_ext
FORMS = [(half, angular, eps) for half in (False, True) for angular in (0, 1) for eps in (0.0, 0.3)]


def definition(rows, columns, index, half_space, angular, eps):
    """Distances [N] in float64 by the reference, which has derivatives."""
    squares = reference._cross_squares(rows, rows if columns is None else columns, eps)
    near, far = (x.gather(1, index.clamp_min(0)[:, None]).squeeze(1) for x in squares)
    if half_space:
        near, far = torch.where(near <= far, near, far), torch.where(near <= far, far, near)
    near, far = reference._sqrt(near), reference._sqrt(far)
    distance = 2.0 * torch.atan2(near, far) if angular else near
    return distance.masked_fill(index < 0, math.inf)


def special_rows(n, k):
    """Random rows with twins at all angles, on either side."""
    rows = random_rows(n, k)
    for number, angle in enumerate((1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)):
        turned = rows[number] + angle * random_rows(1, k, seed=number + 1)[0]
        rows[n - 1 - number] = (2.0, -0.5)[number % 2] * turned
    return rows


def check(rows, columns, index, backend, half_space, angular, eps):
    """Compare distances and gradients, of one side and of both, with the definition."""
    options = half_space, bool(angular), eps
    exact = [x.double().requires_grad_() for x in (rows, columns) if x is not None]
    others = exact[1] if len(exact) > 1 else None
    truth = definition(exact[0], others, index, half_space, bool(angular), eps)
    rows = rows.clone().requires_grad_()
    floor = 1e-9  # rows of one coordinate have roundings for a gradient
    one, two = rows.unsqueeze(0), None if columns is None else columns.unsqueeze(0)
    at = index.unsqueeze(0)
    distance = distance_to(one, two, at, half_space, bool(angular), eps, backend)
    some = index >= 0
    assert relative_error(distance[0][some], truth[some]) <= 1e-6
    assert distance[0][~some].isinf().all()
    weights = torch.randn(len(rows), dtype=torch.float64, device=rows.device)
    gradients = torch.autograd.grad((truth[some] * weights[some]).sum(), exact)
    found = OPS.distance_gradient(one, two, at, weights[None], True, True, *options, backend)
    for ours, theirs in zip(found, gradients, strict=False):
        assert relative_error(ours[0], theirs, floor) <= 1e-6
    (alone,) = torch.autograd.grad((distance[0][some] * weights[some]).sum(), rows)
    assert relative_error(alone, gradients[0], floor) <= 1e-6


@pytest.mark.parametrize(("half_space", "angular", "eps"), FORMS)
@pytest.mark.parametrize(("n", "k"), [(12, 1), (40, 3), (97, 17), (200, 130)])
def test_it_is_the_definition(n, k, half_space, angular, eps, backend, device):
    # with one coordinate there are multiples alone, at a distance for their lengths only
    rows = special_rows(n, k).to(device) if k > 1 else random_rows(n, 1, device=device)
    columns = random_rows(31, k, seed=2, device=device)
    index = torch.arange(n, device=device).flip(0)
    if n % 2:
        index[n // 2] = -1
    check(rows, None, index, backend, half_space, angular, eps)
    crowd = torch.where(index % 3 == 0, 7, index % 31)  # very many to one
    check(rows, columns, crowd, backend, half_space, angular, eps)


def test_every_instruction_set_computes_it(isa, poisoned_empty):
    for n, k in ((5, 1), (97, 17), (64, 40)):
        rows, index = special_rows(max(n, 13), k), torch.arange(max(n, 13)).flip(0)
        check(rows, None, index, "cpu", False, True, 0.0)
        check(rows, random_rows(9, k, seed=3), index % 9, "cpu", True, False, 0.1)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_rows_of_any_magnitude(magnitude, backend, device):
    rows = special_rows(40, 6).to(device)
    index = torch.arange(40, device=device).flip(0).unsqueeze(0)
    options = (False, False, 0.0, backend)
    ours = OPS.distance(rows.unsqueeze(0) * magnitude, None, index, *options)
    assert relative_error(ours, OPS.distance(rows.unsqueeze(0), None, index, *options)) <= 1e-6


def test_dead_rows_and_coinciding_ones_have_no_gradient(backend, device):
    rows = random_rows(6, 4, device=device)
    rows[1], rows[3] = 0.0, 4.0 * rows[2]
    index = torch.tensor([[1, 0, 3, 2, 5, -1]], device=device)
    weights = torch.ones(1, 6, device=device)
    for half_space in (False, True):
        for angular in (False, True):
            options = half_space, angular, 0.0, backend
            distance = OPS.distance(rows.unsqueeze(0), None, index, *options)[0]
            right = math.pi / 2 if angular else math.sqrt(2.0)
            assert distance[:2].tolist() == pytest.approx([right, right])
            assert distance[2:4].tolist() == [0.0, 0.0]
            gradient = OPS.distance_gradient(
                rows.unsqueeze(0), None, index, weights, True, False, *options
            )[0][0]
            assert not gradient[1:4].any()
            assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_exactly(dtype, backend, device):
    rows = special_rows(60, 9).to(dtype).unsqueeze(0).to(device)
    index = torch.arange(60, device=device).flip(0).unsqueeze(0)
    weights = torch.rand(1, 60, device=device)
    options = (False, True, 0.0, backend)
    assert torch.equal(
        OPS.distance(rows, None, index, *options), OPS.distance(rows.float(), None, index, *options)
    )
    ours, theirs = (
        OPS.distance_gradient(x, None, index, weights, True, False, *options)[0]
        for x in (rows, rows.float())
    )
    assert torch.equal(ours, theirs)


def test_sets_are_independent(backend, device):
    rows = random_rows(3 * 20, 5, device=device).view(3, 20, 5)
    columns = random_rows(3 * 7, 5, seed=1, device=device).view(3, 7, 5)
    index = torch.arange(60, device=device).view(3, 20) % 7
    index[1, 4] = -1
    options = (True, False, 0.0, backend)
    together = OPS.distance(rows, columns, index, *options)
    weights = torch.rand(3, 20, device=device)
    gradients = OPS.distance_gradient(rows, columns, index, weights, True, True, *options)
    for i in range(3):
        one = slice(i, i + 1)
        alone = rows[one], columns[one], index[one]
        assert torch.equal(together[one], OPS.distance(*alone, *options))
        of_one = OPS.distance_gradient(*alone, weights[one], True, True, *options)
        for ours, theirs in zip(gradients, of_one, strict=True):
            assert torch.equal(ours[one], theirs)


def test_any_number_of_threads_has_the_same_bits():
    rows, columns = random_rows(40000, 40), random_rows(500, 40, seed=1)
    index = torch.arange(40000) % 500
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        request = DistanceRequest(rows, columns, index)
        gradients = binding.distance_gradient(request, torch.ones(40000), True, True)
        results.append([binding.distance(request), *gradients])
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("with_columns", [False, True])
def test_opcheck(with_columns, backend, device):
    rows = random_rows(2 * 6, 3, device=device).view(2, 6, 3)
    columns = random_rows(2 * 4, 3, seed=1, device=device).view(2, 4, 3) if with_columns else None
    index = torch.tensor([[1, 0, 3, 2, -1, 0], [3, 2, 1, 0, 1, 2]], device=device)
    options = (False, True, 0.1, backend)
    torch.library.opcheck(OPS.distance.default, (rows, columns, index, *options))
    for wanted in ((True, with_columns), (False, True)):
        arguments = (rows, columns, index, torch.rand(2, 6, device=device), *wanted, *options)
        torch.library.opcheck(OPS.distance_gradient.default, arguments)


def test_gradient_of_one_side_is_that_of_both(backend, device):
    rows, columns = random_rows(30, 5, device=device), random_rows(8, 5, seed=1, device=device)
    sets = rows.unsqueeze(0), columns.unsqueeze(0), torch.arange(30, device=device)[None] % 8
    weights = torch.rand(1, 30, device=device)
    options = (False, False, 0.0, backend)
    both = OPS.distance_gradient(*sets, weights, True, True, *options)
    for side in range(2):
        one = OPS.distance_gradient(*sets, weights, side == 0, side == 1, *options)
        assert torch.equal(one[side], both[side])
        assert one[1 - side].shape == (1, 0)


def test_bad_calls_are_refused():
    rows, index = torch.ones(1, 3, 4), torch.zeros(1, 3, dtype=torch.int64)
    options = (False, False, 0.0, "torch")
    with pytest.raises(ValueError, match="`index` must be int64"):
        OPS.distance(rows, None, index.int(), *options)
    with pytest.raises(ValueError, match="as wide rows"):
        OPS.distance(rows, torch.ones(1, 3, 5), index, *options)
    with pytest.raises(ValueError, match="`weights` must be floating-point"):
        OPS.distance_gradient(rows, None, index, index, True, False, *options)
    request = DistanceRequest(rows[0], None, index[0])
    with pytest.raises(TypeError, match="float64"):
        binding.distance(DistanceRequest(rows[0].double(), None, index[0]))
    with pytest.raises(RuntimeError, match="refused"):
        binding.distance(DistanceRequest(rows[0], None, index[0] + 3))
    with pytest.raises(ValueError, match="weights"):
        binding.distance_gradient(request, torch.ones(2), True, False)
