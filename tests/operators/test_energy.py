"""Energy and gradient against the float64 definition: options, sizes, dtypes, close pairs."""

import itertools

import pytest
import torch

import comhe_ext
from comhe_ext.testing import (
    exact_energy_and_gradient,
    options_of,
    packed_energy,
    paired_rows,
    random_rows,
    reference,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


TRUTHS = {}


def dense_energy_and_gradient(weight, **options):
    exact = weight.double().requires_grad_()
    energy = reference.hyperspherical_energy(exact, **options)
    return energy.detach(), torch.autograd.grad(energy.sum(), exact)[0]


def known(truth, weight, **options):
    """`truth` of these rows, computed once for all backends: it takes most of the time."""
    rows = weight.detach().cpu().double()
    key = truth, rows.shape, hash(rows.numpy().tobytes()), *sorted(options.items())
    if key not in TRUTHS:
        TRUTHS[key] = truth(rows, **options)
    return TRUTHS[key]


def check(
    weight,
    backend,
    energy_bound=1e-6,
    gradient_bound=2e-6,
    truth=dense_energy_and_gradient,
    **options,
):
    """Compare the op on `weight` with `truth`; bounds are relative, Euclidean for the gradient."""
    weight = weight.detach().requires_grad_()
    energy = comhe_ext.hyperspherical_energy(weight, **options, backend=backend)
    (gradient,) = torch.autograd.grad(energy.sum(), weight)
    with torch.no_grad():
        alone = comhe_ext.hyperspherical_energy(weight, **options, backend=backend)
    expected, expected_gradient = known(truth, weight, **options)
    assert energy.dtype == (torch.float64 if weight.dtype == torch.float64 else torch.float32)
    assert gradient.dtype == weight.dtype
    assert gradient.shape == weight.shape
    assert energy.shape == expected.shape
    assert relative_error(energy, expected) <= energy_bound
    assert relative_error(alone, expected) <= energy_bound
    # where symmetry makes the gradient 0, its error is measured against the energy
    floor = 1e-6 * float(expected.abs().sum())
    assert relative_error(gradient, expected_gradient, floor) <= gradient_bound


OPTIONS = [
    dict(s=s, angular=angular, half_space=half_space, eps=eps)
    for s, angular, half_space, eps in itertools.product(
        (0.0, 0.5, 1.0, 2.0, 3.0), (False, True), (False, True), (0.0, 1e-4)
    )
]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options, reduction, backend, device):
    # short rows, so that eps = 1e-4 shows in every digit
    weight = 0.1 * random_rows(67, 12, device=device)
    check(weight, backend, reduction=reduction, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_on_two_blocks_of_a_batch(options, backend, device):
    weight = 0.1 * torch.stack([random_rows(131, 5, seed=i, device=device) for i in range(2)])
    check(weight, backend, **options)


SIZES = [
    (0, 3, "no rows"),
    (1, 3, "no pairs in full space"),
    (2, 1, "one pair on a line: coincident or antipodal"),
    (3, 1, "a line cannot hold three rows apart"),
    (2, 2, "one pair"),
    (3, 300, "wider than tall"),
    (5, 7, "fewer rows than any tile"),
    (11, 8, "just below 12, a register tile of 6 or 12 rows"),
    (12, 15, "exactly 12"),
    (13, 16, "just above 12; a whole vector register"),
    (23, 17, "just above a vector register"),
    (31, 31, "just below 32"),
    (32, 32, "exactly 32"),
    (33, 33, "just above 32"),
    (47, 48, "prime below 48"),
    (63, 63, "just below 64"),
    (64, 64, "exactly 64"),
    (65, 65, "just above 64"),
    (97, 96, "prime above 96"),
    (127, 127, "just below 128"),
    (128, 128, "exactly 128"),
    (129, 129, "just above 128"),
    (191, 20, "prime below 192"),
    (257, 256, "just above 256"),
    (383, 9, "prime below 384"),
    (511, 30, "one row less than a portable block"),
    (512, 30, "one portable block"),
    (513, 30, "a second block of one row"),
    (521, 300, "the first prime after, wide"),
    (1031, 40, "three blocks, the last almost empty"),
    (1543, 13, "four blocks, the last almost empty"),
]


@pytest.mark.parametrize(("n", "k", "why"), SIZES, ids=[f"{n}x{k}" for n, k, _ in SIZES])
def test_sizes(n, k, why, backend, device):
    weight = random_rows(n, k, seed=n, device=device)
    for options in (dict(s=2.0), dict(s=1.0, half_space=True), dict(s=0.0, angular=True)):
        check(weight, backend, truth=exact_energy_and_gradient, **options)


@pytest.mark.parametrize("k", [1, 2, 3, 24, 25, 100, 299])
def test_widths(k, backend, device):
    weight = random_rows(53, k, seed=k, device=device)
    check(weight, backend, s=2.0, half_space=True)
    check(weight, backend, s=0.5, angular=True)


@pytest.mark.parametrize("shape", [(1, 40, 6), (3, 17, 5), (70, 3, 4), (5, 1, 4), (5, 0, 4)])
def test_batches(shape, backend, device):
    weight = random_rows(shape[0] * shape[1], shape[2], device=device).view(shape)
    for half_space in (False, True):
        check(weight, backend, half_space=half_space)


def test_batch_of_no_sets(backend, device):
    weight = torch.zeros(0, 4, 3, device=device, requires_grad=True)
    energy = comhe_ext.hyperspherical_energy(weight, backend=backend)
    assert energy.shape == (0,)
    energy.sum().backward()
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize(
    "sizes",
    [
        [5, 0, 1, 513, 2, 37],  # unequal, an empty set, a single row, two blocks
        [7, 7, 7, 8, 8, 0, 0, 7],  # runs of equal sets
        [0, 0],
        [],
        [1030, 3],
    ],
    ids=str,
)
@pytest.mark.parametrize("half_space", [False, True])
def test_packed_sets(sizes, half_space, backend, device):
    points = random_rows(sum(sizes), 6, device=device).requires_grad_()
    weights = torch.randn(len(sizes), device=device)
    options = options_of(s=1.0, half_space=half_space, backend=backend)
    energy = packed_energy(points, sizes, options)
    (gradient,) = torch.autograd.grad((energy * weights).sum(), points)
    parts = [
        exact_energy_and_gradient(part, 1.0, half_space=half_space)
        for part in points.detach().split(sizes)
    ]
    assert energy.shape == (len(sizes),)
    for value, factor, rows, (expected, expected_gradient) in zip(
        energy, weights, gradient.split(sizes), parts, strict=True
    ):
        assert relative_error(value, expected) <= 1e-6
        floor = 1e-6 * float(expected)
        assert relative_error(rows, factor.double() * expected_gradient, floor) <= 2e-6


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float16, 2**-11), (torch.bfloat16, 2**-8), (torch.float32, 0.0)],
    ids=str,
)
def test_dtypes(dtype, rounding, backend, device):
    # the truth is that of the rounded rows; the gradient is rounded once, at the end
    weight = random_rows(131, 20, dtype=dtype, device=device)
    for options in (dict(), dict(s=1.0, half_space=True), dict(s=0.0, angular=True, eps=1e-4)):
        check(weight, backend, gradient_bound=2e-6 + rounding, reduction="sum", **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float64(options):
    weight = 0.1 * random_rows(67, 12, dtype=torch.float64)
    check(weight, None, energy_bound=1e-14, gradient_bound=1e-13, **options)


@pytest.mark.parametrize(
    ("n", "k", "options"),
    [
        (100, 4, dict(s=3.0)),  # in few dimensions random rows are close to each other
        (521, 10, dict(s=3.0)),
        (1021, 3, dict(s=1.0)),
        (1021, 5, dict(s=1.0)),
        (2039, 6, dict(s=2.0)),
        (4001, 10, dict(s=2.0)),
        (1021, 40, dict(s=2.0)),
        (2039, 64, dict(s=0.0)),
        (4093, 40, dict(s=2.0, half_space=True)),
        (4096, 30, dict(s=1.0)),
        (4099, 30, dict(s=2.0, angular=True)),
        (12007, 16, dict(s=2.0, half_space=True)),
        (16384, 30, dict(s=2.0)),
    ],
    ids=str,
)
def test_accuracy_on_random_rows(n, k, options, backend, device):
    weight = random_rows(n, k, seed=n, device=device)
    check(weight, backend, truth=exact_energy_and_gradient, min_distance=0.0, **options)


@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize(
    "options",
    [
        dict(s=2.0),
        dict(s=0.0),
        dict(s=3.0),
        dict(s=1.0, angular=True),
        dict(s=2.0, half_space=True),
        dict(s=1.0, half_space=True, angular=True),
        dict(s=2.0, eps=1e-4),
        dict(s=2.0, half_space=True, eps=1e-4),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [100, 600])  # twins in one tile, and in two
def test_accuracy_on_close_pairs(n, options, angle, backend, device):
    for antipodal in (False, True) if options.get("half_space") else (False,):
        weight = paired_rows(n, 16, angle, antipodal=antipodal, device=device)
        check(
            weight,
            backend,
            energy_bound=1e-5,
            gradient_bound=1e-5,
            truth=exact_energy_and_gradient,
            min_distance=0.0,
            **options,
        )


@pytest.mark.parametrize("min_distance", [1e-3, 0.05, 0.5, 1.5, 1.99])
@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("angular", [False, True])
def test_tangent_line(min_distance, half_space, angular, backend, device):
    weight = paired_rows(80, 4, 5e-4, antipodal=half_space, device=device)
    for s in (0.0, 1.0, 2.0, 2.5):
        check(
            weight,
            backend,
            s=s,
            half_space=half_space,
            angular=angular,
            min_distance=min_distance,
        )


def test_default_backend_is_one_of_those_that_work():
    weight = random_rows(50, 8)
    energy = comhe_ext.hyperspherical_energy(weight)
    assert relative_error(energy, reference.hyperspherical_energy(weight)) <= 1e-6
