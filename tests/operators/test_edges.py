"""Input nobody wishes for: dead rows, duplicates, extremes, odd layouts, and mistakes."""

import itertools
import math

import numpy as np
import pytest
import torch

import comhe_ext
from comhe_ext import backends
from comhe_ext.testing import (
    collapsed_rows,
    exact_energy_and_gradient,
    options_of,
    paired_rows,
    random_rows,
    reference,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

ENERGIES = [
    dict(s=2.0),
    dict(s=0.0),
    dict(s=0.5),
    dict(s=1.0, angular=True),
    dict(s=2.0, half_space=True),
    dict(s=1.0, half_space=True, angular=True),
    dict(s=2.0, eps=1e-4),
]


def energy_and_gradient(weight, backend=None, **options):
    weight = weight.detach().requires_grad_()
    energy = comhe_ext.hyperspherical_energy(weight, **options, backend=backend)
    (gradient,) = torch.autograd.grad(energy.sum(), weight)
    return energy.detach(), gradient


def check(weight, backend, energy_bound=1e-5, gradient_bound=1e-5, **options):
    energy, gradient = energy_and_gradient(weight, backend, **options)
    expected, expected_gradient = exact_energy_and_gradient(weight, **options)
    assert relative_error(energy, expected) <= energy_bound
    floor = 1e-6 * float(expected.abs())
    assert relative_error(gradient, expected_gradient, floor) <= gradient_bound
    return energy, gradient


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ENERGIES, ids=str)
@pytest.mark.parametrize("n", [20, 530])
def test_dead_rows_are_orthogonal_to_all_and_stay(options, n, backend, device):
    weight = random_rows(n, 12, device=device)
    dead = [0, 1, n // 2, n - 1]
    weight[dead] = 0.0
    _, gradient = check(weight, backend, **options)
    if not options.get("eps"):
        assert (gradient[dead] == 0).all()


@pytest.mark.parametrize("options", ENERGIES, ids=str)
def test_all_rows_dead(options, backend, device):
    energy, gradient = energy_and_gradient(torch.zeros(9, 4, device=device), backend, **options)
    right_angle = math.pi / 2 if options.get("angular") else math.sqrt(2)
    s = options["s"]
    # dead rows are orthogonal even to their own antipodes
    expected = -math.log(right_angle) if s == 0 else right_angle**-s
    assert float(energy) == pytest.approx(expected, rel=1e-6)
    assert (gradient == 0).all()


@pytest.mark.parametrize("options", ENERGIES, ids=str)
def test_duplicates_add_a_finite_energy_and_no_push(options, backend, device):
    weight = random_rows(30, 12, device=device)
    weight[7] = 2.0 * weight[3]  # a power of 2: still an exact duplicate
    weight[29] = weight[3]
    energy, gradient = check(weight, backend, **options)
    assert energy.isfinite()
    assert gradient.isfinite().all()


FACTORS = [3.0, -3.0, 11.0, 0.75, -49.0]


def multiples(factor, k, dtype=torch.float32, device="cpu"):
    """A row of small integers, others, and at the end its multiple: exact in every dtype."""
    row = torch.arange(1.0, k + 1).remainder(5.0) - 2.0
    weight = torch.cat([row[None], random_rows(20, k), factor * row[None]])
    return weight.to(device=device, dtype=dtype)


def length_of_gradient(s, a, b, eps):
    """dE/da of two positive multiples of one row, of the lengths a and b; E is their energy."""
    nu_a, nu_b = math.sqrt(a**2 + eps), math.sqrt(b**2 + eps)
    # 2 - 2c and dc/da, without a difference of large numbers
    squared = 2 * eps * (a**2 + b**2 + eps) / (nu_a * nu_b * (nu_a * nu_b + a * b))
    slope = squared ** (-s / 2 - 1) * (s or 1)
    return slope * b * eps / (nu_a**3 * nu_b)


@pytest.mark.parametrize("options", [*ENERGIES[:6], dict(s=6.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", FACTORS)
def test_multiples_of_a_row_are_duplicates_of_it(factor, dtype, options, backend, device):
    for k in (7, 24):
        weight = multiples(factor, k, dtype, device)
        energy, gradient = energy_and_gradient(weight, backend, **options)
        duplicates = weight.clone()
        duplicates[-1] = math.copysign(1.0, factor) * weight[0]  # to the bit
        expected, expected_gradient = exact_energy_and_gradient(duplicates, **options)
        expected_gradient[-1] /= abs(factor)
        assert relative_error(energy, expected) <= 1e-6
        bound = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
        assert relative_error(gradient[[0, -1]], expected_gradient[[0, -1]]) <= bound
        # the rounding of norms does not mislead the definition either
        truth = exact_energy_and_gradient(weight, **options)
        assert relative_error(truth[1][[0, -1]], expected_gradient[[0, -1]]) <= 1e-12


@pytest.mark.parametrize("factor", FACTORS)
def test_multiples_in_float64(factor):
    # rounded multiples, too: differences of the last bits are not a direction
    for weight in (multiples(factor, 24, torch.float64), random_rows(9, 24, dtype=torch.float64)):
        weight[-1] = factor / 7.0 * weight[0]
        for options in ENERGIES[:6]:
            _, gradient = energy_and_gradient(weight, **options)
            duplicates = weight.clone()
            duplicates[-1] = math.copysign(1.0, factor) * weight[0]
            _, expected = exact_energy_and_gradient(duplicates, **options)
            expected[-1] /= abs(factor / 7.0)
            assert relative_error(gradient, expected) <= 1e-10


def test_multiples_without_a_bound_are_infinite(backend, device):
    for factor, options in ((3.0, dict(s=2.0)), (-3.0, dict(s=0.0, half_space=True))):
        weight = multiples(factor, 24, device=device)
        energy, gradient = energy_and_gradient(weight, backend, min_distance=0.0, **options)
        assert float(energy) == math.inf
        assert gradient.isfinite().all()


@pytest.mark.parametrize("eps", [1e-12, 1e-8, 1e-4, 1.0])
@pytest.mark.parametrize("factor", [1.0, 3.0, 11.0])
def test_multiples_are_apart_by_their_lengths_under_eps(factor, eps, backend, device):
    # normalized with eps, the shorter row stays the shorter one, and so they differ
    row = multiples(factor, 24, device=device)[0]
    weight = torch.stack([row, factor * row])
    for s in (0.0, 1.0, 2.0):
        _, gradient = energy_and_gradient(weight, backend, s=s, eps=eps, min_distance=0.0)
        length = float(row.double().norm())
        unit = row.double() / length
        for i, lengths in enumerate([(length, factor * length), (factor * length, length)]):
            expected = length_of_gradient(s, *lengths, eps) * unit
            assert relative_error(gradient[i], expected) <= 1e-5


@pytest.mark.parametrize("options", ENERGIES[:6], ids=str)
def test_one_direction_only(options, backend, device):
    weight = torch.ones(40, 3, device=device)
    energy, gradient = energy_and_gradient(weight, backend, **options)
    expected = reference.hyperspherical_energy(weight, **options)
    assert float(energy) == pytest.approx(float(expected), rel=1e-6)
    # no direction to part in; what is left is the rounding of the unit rows
    assert float(gradient.abs().max()) <= 1e-6 * float(energy.abs())


def test_duplicates_without_a_bound_are_infinite(backend, device):
    weight = torch.ones(2, 3, device=device)
    for s, half_space in ((0.0, False), (2.0, False), (2.0, True)):
        energy = comhe_ext.hyperspherical_energy(
            weight, s, half_space=half_space, min_distance=0.0, backend=backend
        )
        assert float(energy) == math.inf


@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("min_distance", [0.0, 1e-3])
def test_near_duplicates_are_pushed_apart(angle, min_distance, backend, device):
    for half_space in (False, True):
        weight = paired_rows(40, 12, angle, pairs=1, antipodal=half_space, seed=2, device=device)
        options = dict(s=2.0, half_space=half_space, min_distance=min_distance)
        _, gradient = check(weight, backend, **options)
        side = -1.0 if half_space else 1.0
        unit = torch.nn.functional.normalize(weight.double())
        apart = unit[0] - side * unit[39]
        if float(apart.norm()) < 1e-12:
            continue  # rounded to one direction
        assert float(gradient[0].double() @ apart) < 0  # down the gradient is away from the twin
        assert float(gradient[39].double() @ (side * apart)) > 0


@pytest.mark.parametrize("angle", [1e-6, 1e-8, 1e-10, 1e-13, 1e-16, 1e-30])
@pytest.mark.parametrize("min_distance", [0.0, 1e-3])
def test_directions_that_differ_in_a_tiny_entry(angle, min_distance, backend, device):
    # the rows differ in one tiny entry, which alone gives the direction
    weight = torch.zeros(2, 24, device=device)
    weight[:, 3] = 1.0
    weight[1, 5] = angle
    angle = float(weight[1, 5])
    for s in (0.0, 1.0, 2.0):
        energy, gradient = energy_and_gradient(weight, backend, s=s, min_distance=min_distance)
        t = max(angle, min_distance)
        push = (s or 1.0) * t ** (-s - 1.0)
        value = (-math.log(t) if s == 0 else t**-s) + push * (t - angle)
        if value < 3e38:
            assert float(energy) == pytest.approx(value, rel=1e-6)
        assert not gradient.isnan().any()
        for row, sign in ((0, 1.0), (1, -1.0)):
            if push < 3e38:
                assert float(gradient[row, 5]) == pytest.approx(sign * push, rel=1e-5)
            else:
                assert float(gradient[row, 5]) == sign * math.inf


@pytest.mark.parametrize("s", [6.0, 10.0, 12.0, 20.0, 40.0])
@pytest.mark.parametrize("distance", [1e-2, 1e-5, 1e-7])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(angular=True), dict(half_space=True), dict(half_space=True, angular=True)],
    ids=str,
)
def test_a_finite_gradient_is_never_nan(options, distance, s, backend, device):
    for k in (5, 24):
        weight = random_rows(30, k, device=device)
        side = -1.0 if options.get("half_space") else 1.0
        weight[5] = side * (weight[6] + distance * weight[7])
        energy, gradient = energy_and_gradient(weight, backend, s=s, **options)
        expected, expected_gradient = exact_energy_and_gradient(weight, s, **options)
        # an error of a distance, that of float32, is multiplied by the exponent
        bound = 1e-6 + s * 2.0**-23
        largest = torch.finfo(torch.float32).max
        if float(expected) < largest:
            assert relative_error(energy, expected) <= bound
        else:
            assert float(energy) == math.inf
        rounded = expected_gradient.float()
        assert torch.equal(gradient.isinf(), rounded.isinf())
        assert torch.equal(gradient[rounded.isinf()], rounded[rounded.isinf()])
        held = rounded.isfinite().all(1)
        for part in (held, held & (rounded.abs().amax(1) < 1e20)):
            assert relative_error(gradient[part], expected_gradient[part]) <= 10 * bound


def test_large_exponents_of_random_rows(backend, device):
    for s, k in itertools.product((6.0, 12.0, 40.0), (6, 12, 24, 40)):
        weight = random_rows(300, k, device=device)
        bound = 1e-6 + s * 2.0**-23
        check(weight, backend, bound, 2 * bound, s=s)
        check(weight, backend, bound, 2 * bound, s=s, half_space=True)


def test_min_distance_beyond_the_range_of_float64():
    # f'(1e-9) is infinite, which must not affect larger distances
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1e-8]], dtype=torch.float64)
    energy, gradient = energy_and_gradient(weight, "torch", s=40.0, min_distance=1e-9)
    assert float(energy) == math.inf
    assert not gradient.isnan().any()
    assert gradient[0, 1] == math.inf
    assert gradient[2, 1] == -math.inf
    energy, gradient = energy_and_gradient(weight[:2], "torch", s=40.0, min_distance=1e-9)
    assert float(energy) == pytest.approx(2.0**-20)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3])
def test_collapsed_rows(spread, backend, device):
    weight = collapsed_rows(100, 12, spread, device=device)
    for options in (dict(), dict(half_space=True), dict(s=1.0, angular=True)):
        check(weight, backend, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [5, 600])
def test_what_is_not_finite_comes_out_as_nan(value, n, backend, device):
    for options in ENERGIES:
        weight = random_rows(n, 4, device=device)
        weight[n - 2, 1] = value
        energy, gradient = energy_and_gradient(weight, backend, **options)
        assert energy.isnan()
        assert gradient[n - 2].isnan().all()


def test_what_is_not_finite_stays_in_its_set(backend, device):
    weight = random_rows(60, 4, device=device).view(3, 20, 4)
    weight[1, 0, 0] = math.nan
    energy, gradient = energy_and_gradient(weight, backend)
    assert energy.isnan().tolist() == [False, True, False]
    assert gradient[[0, 2]].isfinite().all()
    assert torch.equal(energy[2], energy_and_gradient(weight[2], backend)[0])


@pytest.mark.parametrize("size", [6e-8, 6e-5, 1.0, 65504.0])
def test_float16_over_its_range(size, backend, device):
    # 6e-8 is the smallest subnormal: rows of a few ones and zeros
    weight = (random_rows(50, 9, device=device).sign() * size).half()
    weight[::2, ::3] = 0.0
    energy, gradient = energy_and_gradient(weight, backend, half_space=True)
    expected, expected_gradient = exact_energy_and_gradient(weight, half_space=True)
    assert float(energy) == pytest.approx(float(expected), rel=1e-6)
    # the gradient is per unit of weight: rounded to what float16 holds, infinite above it
    rounded = expected_gradient.half()
    assert not gradient.isnan().any()
    assert torch.equal(gradient.isinf(), rounded.isinf())
    held = rounded.isfinite() & (rounded.abs() > 6.2e-5)
    assert torch.allclose(gradient[held].double(), expected_gradient[held], rtol=2**-10, atol=0)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, 2e-5), (torch.bfloat16, 1e-38), (torch.float32, 1e-38)],
    ids=str,
)
def test_flushing_subnormal_numbers_changes_nothing(dtype, size, backend, device):
    for k in (9, 24):  # the portable tiles are float64 and float32
        weight = (random_rows(50, k, dtype=torch.float64) * size).to(device=device, dtype=dtype)
        expected = energy_and_gradient(weight, backend)
        exact, _ = exact_energy_and_gradient(weight)
        assert float(expected[0]) == pytest.approx(float(exact), rel=1e-6)
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush")
        try:
            results = energy_and_gradient(weight, backend)
        finally:
            torch.set_flush_denormal(False)
        assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("size", [1e-36, 1e-25, 1e-10, 1e10, 1e25, 1e37])
def test_float32_rows_whose_squares_leave_the_range(size, backend, device):
    weight = random_rows(50, 9, device=device)
    weight /= weight.abs().max()
    for options in ENERGIES[:6]:
        energy, gradient = energy_and_gradient(weight * size, backend, **options)
        expected, expected_gradient = exact_energy_and_gradient(weight, **options)
        assert float(energy) == pytest.approx(float(expected), rel=2e-6)
        assert not gradient.isnan().any()
        if 1e-30 < size < 1e30:  # else the gradient itself is out of float32's range
            assert relative_error(gradient.double() * size, expected_gradient) <= 1e-5


def test_rows_of_very_different_lengths(backend, device):
    weight = random_rows(60, 9, device=device)
    weight *= 10.0 ** torch.linspace(-18, 18, 60, device=device).unsqueeze(1)
    energy, gradient = energy_and_gradient(weight, backend)
    expected, expected_gradient = exact_energy_and_gradient(weight)
    assert float(energy) == pytest.approx(float(expected), rel=1e-6)
    lengths = weight.double().norm(dim=1, keepdim=True)
    assert relative_error(gradient.double() * lengths, expected_gradient * lengths) <= 1e-5


# --- sizes ----------------------------------------------------------------------------------------


def test_too_few_rows_for_a_pair(backend, device):
    for shape in ((0, 3), (1, 3), (2, 0, 3), (4, 1, 3)):
        weight = torch.ones(shape, device=device)
        energy, gradient = energy_and_gradient(weight, backend)
        assert (energy == 0).all()
        assert (gradient == 0).all()
        assert energy.shape == shape[:-2]
        assert gradient.shape == shape
    energy, gradient = energy_and_gradient(
        torch.ones(1, 3, device=device), backend, half_space=True
    )
    assert float(energy) == 0.25
    assert float(gradient.norm()) <= 1e-7


def test_more_pairs_than_an_int32_counts(backend, device):
    # 46,341^2 > 2^31. The corners of the 16-cube: r^2 = h / 4 where h of 16 signs differ
    signs = torch.tensor([-1.0, 1.0], device=device)
    weight = torch.cartesian_prod(*[signs] * 16)
    n = weight.shape[0]
    assert n == 65_536
    with torch.no_grad():
        energy = comhe_ext.hyperspherical_energy(weight, 2.0, backend=backend)
    expected = sum(math.comb(16, h) * 4 / h for h in range(1, 17)) / (n - 1)
    assert float(energy) == pytest.approx(expected, rel=1e-6)


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T.contiguous().T,
        lambda x: torch.stack([x, x], 1)[:, 0],
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x.flip(0).flip(0),
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    ],
    ids=["transposed", "row stride", "column slice", "every other row", "flipped", "unaligned"],
)
def test_strided(view, backend, device):
    weight = random_rows(37, 9, device=device)
    expected = energy_and_gradient(weight, backend, half_space=True)
    leaf = weight.clone().requires_grad_()
    strided = view(leaf)
    assert torch.equal(strided, weight)
    energy = comhe_ext.hyperspherical_energy(strided, half_space=True, backend=backend)
    (gradient,) = torch.autograd.grad(energy, leaf)
    assert torch.equal(energy, expected[0])
    assert torch.equal(gradient, expected[1])


def test_expanded(backend, device):
    weight = random_rows(11, 5, device=device)
    energy, gradient = energy_and_gradient(weight.expand(3, 11, 5), backend)
    expected, expected_gradient = energy_and_gradient(weight, backend)
    assert torch.allclose(energy, expected.expand(3), rtol=1e-6)
    assert torch.allclose(gradient, expected_gradient.expand(3, 11, 5), rtol=1e-4, atol=1e-7)
    row = weight[:1].expand(6, 5)  # six times the same memory
    energy, gradient = energy_and_gradient(row, backend)
    assert float(energy) == pytest.approx(float(reference.hyperspherical_energy(row)), rel=1e-6)


@pytest.mark.parametrize("form", ["expanded", "strided", "zero stride of a sum"])
def test_incoming_gradient_of_any_stride(form, backend, device):
    weight = random_rows(60, 5, device=device).view(4, 15, 5).requires_grad_()
    energy = comhe_ext.hyperspherical_energy(weight, backend=backend)
    if form == "expanded":
        incoming = torch.tensor(2.0, device=device).expand(4)
    elif form == "strided":
        incoming = torch.tensor([[1.0, 9.0], [2.0, 9.0], [3.0, 9.0], [4.0, 9.0]], device=device)
        incoming = incoming[:, 0]
    else:
        incoming = torch.ones((), device=device).expand(4)
    (gradient,) = torch.autograd.grad(energy, weight, incoming)
    for one, factor, actual in zip(weight.detach(), incoming, gradient, strict=True):
        expected = factor * energy_and_gradient(one, backend)[1]
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-7)


# --- what asks for a gradient ---------------------------------------------------------------------


def test_no_grad(backend, device):
    weight = random_rows(20, 5, device=device)
    expected = comhe_ext.hyperspherical_energy(weight, backend=backend)
    assert not expected.requires_grad
    weight.requires_grad_()
    with torch.no_grad():
        energy = comhe_ext.hyperspherical_energy(weight, backend=backend)
    assert not energy.requires_grad
    assert torch.equal(energy, expected)
    with torch.inference_mode():
        energy = comhe_ext.hyperspherical_energy(weight, backend=backend)
    assert torch.equal(energy, expected)


def test_gradient_for_one_argument_only(backend, device):
    weight, projection = random_rows(20, 8, device=device), random_rows(12, 8, device=device)
    projection = projection.view(3, 4, 8)
    both = [weight.clone().requires_grad_(), projection.clone().requires_grad_()]
    energy = comhe_ext.compressive_energy(*both, backend=backend)
    expected = torch.autograd.grad(energy, both)
    for position in (0, 1):
        arguments = [weight.clone(), projection.clone()]
        arguments[position].requires_grad_()
        energy = comhe_ext.compressive_energy(*arguments, backend=backend)
        energy.backward()
        assert torch.equal(arguments[position].grad, expected[position])
        assert arguments[1 - position].grad is None


def test_input_is_left_alone(backend, device):
    weight = random_rows(20, 5, device=device)
    before = weight.clone()
    energy_and_gradient(weight, backend, half_space=True)
    assert torch.equal(weight, before)


def test_half_of_a_leaf_in_use(backend, device):
    leaf = random_rows(30, 6, device=device).requires_grad_()
    comhe_ext.hyperspherical_energy(leaf[5:20], backend=backend).backward()
    _, expected = energy_and_gradient(leaf.detach()[5:20], backend)
    assert torch.equal(leaf.grad[5:20], expected)
    assert (leaf.grad[:5] == 0).all()
    assert (leaf.grad[20:] == 0).all()


# --- mistakes -------------------------------------------------------------------------------------

ROWS = torch.ones(4, 3)
PROJECTION = torch.ones(2, 2, 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "`weight` must be a torch.Tensor, got list", ([[1.0, 2.0]],), {}),
        (TypeError, "`weight` must be float16, .* got torch.int64", (torch.ones(4, 3).long(),), {}),
        (TypeError, "got torch.complex64", (torch.ones(4, 3, dtype=torch.complex64),), {}),
        (TypeError, "got torch.bool", (torch.ones(4, 3) > 0,), {}),
        (TypeError, "`weight` must be a dense tensor, got layout", (ROWS.to_sparse(),), {}),
        (ValueError, r"`weight` must be 2-D or 3-D, got shape \(3,\)", (torch.ones(3),), {}),
        (ValueError, r"got shape \(2, 2, 2, 2\)", (torch.ones(2, 2, 2, 2),), {}),
        (ValueError, r"got shape \(\)", (torch.ones(()),), {}),
        (ValueError, r"at least one column, got shape \(4, 0\)", (torch.ones(4, 0),), {}),
        (TypeError, "`s` must be a number, got str", (ROWS, "2"), {}),
        (TypeError, "`s` must be a number, got bool", (ROWS, True), {}),
        (TypeError, "`s` must be a number, got Tensor", (ROWS, torch.tensor(2.0)), {}),
        (ValueError, "`s` must be finite and greater than -2, got -2.0", (ROWS, -2.0), {}),
        (ValueError, "`s` must be finite and greater than -2, got inf", (ROWS, math.inf), {}),
        (ValueError, "`s` must be finite and greater than -2, got nan", (ROWS, math.nan), {}),
        (TypeError, "`eps` must be a number, got NoneType", (ROWS,), dict(eps=None)),
        (ValueError, "`eps` must be finite and at least 0, got -0.0001", (ROWS,), dict(eps=-1e-4)),
        (ValueError, "`eps` must be finite .* got nan", (ROWS,), dict(eps=math.nan)),
        (ValueError, "`min_distance` must be .* got -0.1", (ROWS,), dict(min_distance=-0.1)),
        (ValueError, "`min_distance` must be .* got 2.0", (ROWS,), dict(min_distance=2.0)),
        (ValueError, "`min_distance` must be .* got nan", (ROWS,), dict(min_distance=math.nan)),
        (TypeError, "`half_space` must be a bool, got int", (ROWS,), dict(half_space=1)),
        (TypeError, "`angular` must be a bool, got str", (ROWS,), dict(angular="yes")),
        (
            ValueError,
            "`reduction` must be 'mean' or 'sum', got 'none'",
            (ROWS,),
            {"reduction": "none"},
        ),
        (ValueError, "`backend` must be one of .* got 'numpy'", (ROWS,), dict(backend="numpy")),
        (TypeError, "`s` must be a number, got bool", (ROWS, np.bool_(True)), {}),
        (TypeError, "`s` must be a number, got ndarray", (ROWS, np.ones(1)), {}),
        (TypeError, "`s` must be a number, got complex", (ROWS, 2j), {}),
        (
            TypeError,
            "`half_space` must be a bool, got int64",
            (ROWS,),
            dict(half_space=np.int64(1)),
        ),
        (TypeError, "`angular` must be a bool, got Tensor", (ROWS,), dict(angular=ROWS[0, 0] > 0)),
        # the numbers of a tensor or an array are not printed
        (ValueError, "'mean' or 'sum', got Tensor$", (ROWS,), dict(reduction=ROWS)),
        (ValueError, "or None, got Tensor$", (ROWS,), dict(backend=ROWS)),
    ],
)
def test_messages_of_hyperspherical_energy(error, message, arguments, options):
    with pytest.raises(error, match=message):
        comhe_ext.hyperspherical_energy(*arguments, **options)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "`weight` must be a torch.Tensor, got NoneType", (None, PROJECTION)),
        (TypeError, "`projection` must be a torch.Tensor, got int", (ROWS, 20)),
        (TypeError, "`projection` must be float16, .* got torch.int32", (ROWS, PROJECTION.int())),
        (TypeError, "`projection` must be a dense tensor", (ROWS, PROJECTION.to_sparse())),
        (ValueError, r"`projection` must be 3-D \[C, k, d\], got shape \(4, 3\)", (ROWS, ROWS)),
        (ValueError, "as many columns as `weight`, got 5 and 3", (ROWS, torch.ones(2, 2, 5))),
        (ValueError, "at least one matrix of at least one row", (ROWS, torch.ones(0, 2, 3))),
        (ValueError, "at least one matrix of at least one row", (ROWS, torch.ones(2, 0, 3))),
        (
            ValueError,
            "`projection` must be on the device of `weight`, got meta and cpu",
            (ROWS, PROJECTION.to("meta")),
        ),
    ],
)
def test_messages_of_compressive_energy(error, message, arguments):
    with pytest.raises(error, match=message):
        comhe_ext.compressive_energy(*arguments)


@pytest.mark.parametrize(
    ("error", "message", "groups"),
    [
        (TypeError, "`groups` must be an int or a sequence .* got float", 2.0),
        (TypeError, "`groups` must be an int .* got bool", True),
        (ValueError, "`groups` must be between 1 and the 3 columns of `weight`, got 0", 0),
        (ValueError, "`groups` must be between 1 and the 3 columns of `weight`, got 4", 4),
        (ValueError, "`groups` must name at least one group", []),
        (ValueError, "must be a non-empty list of columns", [[0, 1], []]),
        (ValueError, "must be a non-empty list of columns", [[0.5, 1.0]]),
        (ValueError, "must name columns from 0 to 2 of `weight`", [[0, 3]]),
        (ValueError, "must name columns from 0 to 2 of `weight`", [[-1, 0]]),
        (ValueError, "each of `groups` must be", [torch.tensor([True, False])]),
        (ValueError, "must name columns .* got 9 in `groups.1.`$", [[0], torch.arange(10)]),
        (ValueError, "non-empty list of columns, got torch.float32 of shape", [torch.ones(2000)]),
        (ValueError, r"got torch.int64 of shape \(2, 1\) for `groups.1.`", [[0], [[0], [1]]]),
        (TypeError, "`groups` must be an int or a sequence .* got str", "012"),
        (TypeError, "`groups.0.` must be a list of columns", ["01"]),
        (TypeError, "`groups.1.` must be a list of columns", [[0], None]),
        (TypeError, "`groups.0.` must be a list of columns", [[0, None]]),
        (TypeError, "`groups` must be an int .* got bool", np.bool_(True)),
    ],
)
def test_messages_of_group_energy(error, message, groups):
    with pytest.raises(error, match=message):
        comhe_ext.group_energy(ROWS, groups)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "`dim` must be an int, got float", (2, 4.0, 8), {}),
        (TypeError, "`num_projections` must be an int, got bool", (True, 4, 8), {}),
        (ValueError, "`num_projections` must be at least 1, got 0", (0, 4, 8), {}),
        (ValueError, "`in_features` must be at least 1, got -8", (2, 4, -8), {}),
        (TypeError, "`dtype` must be a floating-point dtype", (2, 4, 8), dict(dtype=torch.int64)),
    ],
)
def test_messages_of_random_projection(error, message, arguments, options):
    with pytest.raises(error, match=message):
        comhe_ext.random_projection(*arguments, **options)


def test_a_distributed_tensor_is_refused_by_name():
    class Sharded(torch.Tensor):  # a DTensor, as far as one can tell without a process group
        def full_tensor(self):
            return self

    weight = torch.ones(4, 3).as_subclass(Sharded)
    with pytest.raises(TypeError, match=r"DTensor.*pass weight.full_tensor\(\)"):
        comhe_ext.hyperspherical_energy(weight)


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    with pytest.raises(TypeError, match="`weight` must be a dense tensor"):
        comhe_ext.hyperspherical_energy(nested)


def test_a_backend_asked_for_by_name_never_falls_back():
    with pytest.raises((RuntimeError, ValueError), match=r"use backend=.*'torch'"):
        comhe_ext.hyperspherical_energy(torch.ones(4, 3), backend="triton")


def test_numpy_scalars_are_the_numbers_they_are(backend, device):
    weight = random_rows(9, 6, device=device)
    expected = comhe_ext.hyperspherical_energy(
        weight, 1.0, half_space=True, eps=0.5, min_distance=0.25, backend=backend
    )
    for real in (np.float16, np.float32, np.float64):
        actual = comhe_ext.hyperspherical_energy(
            weight,
            real(1),
            half_space=np.bool_(True),
            angular=np.bool_(False),
            eps=real(0.5),
            min_distance=real(0.25),
            backend=backend,
        )
        assert torch.equal(actual, expected)
    for whole in (np.int16, np.int64, np.uint8):
        actual = comhe_ext.hyperspherical_energy(weight, whole(1), backend=backend)
        assert torch.equal(actual, comhe_ext.hyperspherical_energy(weight, 1, backend=backend))
        groups = comhe_ext.group_energy(weight, whole(2), backend=backend)
        assert torch.equal(groups, comhe_ext.group_energy(weight, 2, backend=backend))
        assert comhe_ext.random_projection(whole(3), whole(4), whole(5)).shape == (3, 4, 5)
    projection = comhe_ext.projections.RandomProjection(np.int64(3), np.int64(4))
    assert type(projection.num_projections) is int
    assert type(projection.dim) is int


def test_more_columns_than_the_compiled_kernel_takes():
    weight = torch.zeros(2, 2**24 + 1)
    weight[0, 0] = weight[1, -1] = 3.0
    assert float(comhe_ext.hyperspherical_energy(weight)) == 0.5
    assert float(comhe_ext.group_energy(weight, [torch.arange(2**24 + 1)])) == 0.5
    message = "backend 'cpu' takes at most 16777216 columns, got 16777217: use backend='torch'"
    if backends.unavailable("cpu") is None:
        with pytest.raises(ValueError, match=message):
            comhe_ext.hyperspherical_energy(weight, backend="cpu")
        # projected rows have few columns again
        projection = torch.zeros(1, 2, 2**24 + 1)
        projection[0, 0, 0] = projection[0, 1, -1] = 1.0
        assert float(comhe_ext.compressive_energy(weight, projection, backend="cpu")) == 0.5
    options = options_of(backend="cpu")
    with pytest.raises(ValueError, match=message):
        torch.ops.comhe_ext.sweep([weight[None]], [None], False, *options.arguments)


@pytest.mark.parametrize("eps", [1e30, 1e39, 1e76, 1e78, 1e300])
@pytest.mark.parametrize("k", [4, 30])
def test_eps_whose_square_root_or_itself_leaves_float32(k, eps, backend, device):
    for size in (1.0, 1e19, 1e37):
        weight = random_rows(5, k, device=device)
        weight *= size / float(weight.abs().max())
        for options in (dict(), dict(half_space=True), dict(s=1.0, angular=True)):
            energy, gradient = energy_and_gradient(weight, backend, eps=eps, **options)
            expected, expected_gradient = exact_energy_and_gradient(weight, eps=eps, **options)
            assert relative_error(energy, expected) <= 1e-6
            # what is less than float32's least normal number may be lost
            assert relative_error(gradient, expected_gradient, floor=1e-34) <= 1e-4


def test_meta_tensors_give_shapes():
    weight = torch.ones(3, 4, 5, device="meta", dtype=torch.bfloat16)
    with torch.no_grad():
        options = options_of()
        energy, gradient = torch.ops.comhe_ext.sweep([weight], [None], True, *options.arguments)
    assert gradient.device.type == "meta"
    assert gradient.shape == (12, 5)
    assert energy.device.type == "meta"
    assert energy.shape == (3,)
    assert energy.dtype == torch.float32
