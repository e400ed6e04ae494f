"""Every Triton kernel and every branch of it, run by Triton's interpreter against the definition.

Collected only for `test_triton_interpreter.py`, in a process of its own: TRITON_INTERPRET=1 is read
when the kernels are defined. The checks of a section that goes through all branches assert that
they were taken.
"""

import heapq
import itertools
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from comhe_ext.kernels import gpu
from comhe_ext.kernels.gpu import (
    backend,
    direct,
    finish,
    large_k,
    near_pairs,
    pair_function,
    pair_terms,
    pairwise,
    plan,
    project_normalize,
    splits,
)
from comhe_ext.kernels.pair_functions import Gaussian, Riesz
from comhe_ext.kernels.sweep import Numbers
from comhe_ext.operators.energy import energy as projected_energy
from comhe_ext.testing import (
    options_of,
    paired_rows,
    random_rows,
    reference,
    relative_error,
    riesz,
    sweep_of,
    sweep_projected,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty", "nothing_launched"),
    # the interpreter computes what a mask discards, in numpy, and numpy says so
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    # Triton 3.6's own, under numpy 2.3; from numpy 2.4 on its interpreter does not work
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning:triton"),
]

LAUNCHES: Counter[str] = Counter()  # of each kernel
TAKEN: set[tuple[object, ...]] = set()  # branches of kernels, by the constants of their launches
inside = False  # a kernel runs: what torch is asked for is the interpreter's business


@pytest.fixture
def nothing_launched():
    LAUNCHES.clear()
    TAKEN.clear()


def pair_branch(pair):
    """The branches that a pair function takes: its device functions and its flags."""
    return pair.exact.__name__, bool(pair.half_space), bool(pair.angle)


class Recorded:
    """A kernel that counts its launches and notes the branches that they take."""

    def __init__(self, module, name):
        self.kernel, self.name = getattr(module, name), name.removesuffix("_kernel")
        setattr(module, name, self)

    def __getitem__(self, grid):
        launch = self.kernel[grid]

        def run(*args, **constants):
            global inside
            LAUNCHES[self.name] += 1
            for pair in args:
                if isinstance(pair, pair_terms.PairArguments):
                    TAKEN.add((self.name, pair_branch(pair), constants["WITH_FORCE"]))
            TAKEN.update((self.name, *constant) for constant in constants.items())
            inside = True
            try:
                return launch(*args, **constants)
            finally:
                inside = False

        return run


KERNELS = (
    (project_normalize, "normalize_kernel"),
    (project_normalize, "project_normalize_kernel"),
    (pairwise, "pairwise_kernel"),
    (near_pairs, "near_pairs_kernel"),
    (direct, "direct_kernel"),
    (large_k, "coefficient_kernel"),
    (large_k, "near_block_kernel"),
    (finish, "finish_kernel"),
    (finish, "total_kernel"),
)
for where, kernel in KERNELS:
    Recorded(where, kernel)

RIESZ = [
    riesz(s, half_space, angular)
    for s, half_space, angular in itertools.product(
        (0.0, 1.0, 2.0, 1.5), (False, True), (False, True)
    )
]
GAUSSIANS = [
    Gaussian(tau, half_space=half_space, angular=angular)
    for tau, half_space, angular in itertools.product((2.0,), (False, True), (False, True))
]
PAIRS = RIESZ + GAUSSIANS


def function_of(pair):
    """The pair function of a distance, once more."""
    if isinstance(pair, Gaussian):
        return lambda t: (-pair.tau * t.square()).exp()
    return lambda t: reference._pair_function(t, pair.s, pair.min_distance)


def truth(points, sizes, scales, pair, eps):
    """Scaled energies [B] and the gradient [T, k] of their sum, float64."""
    points = points.double().requires_grad_()
    energies = [
        scale
        / 2
        * reference.pair_energy(
            rows,
            function_of(pair),
            half_space=pair.half_space,
            angular=pair.angular,
            reduction="sum",
            eps=eps,
        )
        for rows, scale in zip(points.split(sizes), scales, strict=True)
    ]
    energy = torch.stack(energies)
    (gradient,) = torch.autograd.grad(energy.sum() + 0 * points.sum(), points)
    return energy.detach(), gradient


def check(points, pair, eps=0.0, sizes=None, energy_bound=1e-6, gradient_bound=2e-6):
    """Energy, gradient and the energy alone against the definition."""
    sizes = sizes or [points.shape[0]]
    scales = [(1.0 + i) / max(n * (n - 1) // 2, 1) for i, n in enumerate(sizes)]
    energy, gradient = sweep_of(gpu, points, sizes, scales, pair, eps, True)
    alone, nothing = sweep_of(gpu, points, sizes, scales, pair, eps, False)
    expected, expected_gradient = truth(points, sizes, scales, pair, eps)
    assert nothing is None
    assert energy.dtype == alone.dtype == gradient.dtype == torch.float32
    assert energy.shape == alone.shape == (len(sizes),)
    assert gradient.shape == points.shape
    for e, a, t in zip(energy, alone, expected, strict=True):
        assert relative_error(e, t, 1e-6) <= energy_bound
        assert relative_error(a, t, 1e-6) <= energy_bound
    assert torch.isfinite(gradient).all()
    floor = 1e-6 * float(expected.abs().sum())
    assert relative_error(gradient, expected_gradient, floor) <= gradient_bound
    return energy, gradient


# --- every branch ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "kernels"),
    [
        (3, ("direct", "finish")),
        (20, ("pairwise", "near_pairs", "finish")),
        (129, ("coefficient", "near_block", "finish")),
    ],
    ids=["direct", "pairwise", "large_k"],
)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_every_pair_function(pair, k, kernels):
    mirrored = pair.half_space or pair.angular
    n = 66 if k < 129 else 34
    near = paired_rows(n, k, 1e-2, pairs=1, seed=1)
    if mirrored:
        near[1] = -2.0 * paired_rows(n, k, 2e-2, pairs=1, seed=1)[n - 1]
    points = torch.cat([random_rows(1, k), near, random_rows(9, k, seed=3)])
    sizes = [1, n, 9]
    # short rows, so that eps shows in every digit
    check(0.1 * points, pair, 1e-4, sizes, gradient_bound=1e-5)
    branch = pair_branch(pair_function.pair_constants(pair).arguments)
    for kernel, with_force in itertools.product(kernels, (True, False)):
        assert (kernel, branch, with_force) in TAKEN


@pytest.mark.parametrize(
    ("pair", "k"),
    [
        *itertools.product(PAIRS, (4, 12)),
        *((p, 130) for p in GAUSSIANS),
        *((p, 130) for p in RIESZ if p.s == 2.0),
    ],
    ids=str,
)
def test_random_rows(pair, k):
    check(random_rows(97 if k < 129 else 70, k), pair)


# around the tile edges: 64 rows or 128, 64 columns or 32 or 16
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_sizes_around_the_tiles(n):
    check(random_rows(n, 12), riesz(2.0))
    check(random_rows(n, 2), riesz(1.0))


# every width of `direct`; exactly 16, 32, 64, 128 columns, and one more: the next width or path
@pytest.mark.parametrize("k", [*range(1, 10), 16, 17, 24, 25, 32, 33, 64, 65, 128, 129, 200])
def test_every_width(k):
    pair = riesz(2.0, min_distance=0.1)
    check(random_rows(67, k), pair, 1e-3, gradient_bound=1e-5 if k < 3 else 2e-6)
    is_direct, with_rest = k <= 8, 8 < k <= 24
    assert {("normalize", "COLUMNS", is_direct), ("normalize", "WITH_REST", with_rest)} <= TAKEN
    if is_direct:
        assert ("direct", "K", k) in TAKEN
    elif k <= 128:
        width, terms = max(16, 1 << (k - 1).bit_length()), 4 if with_rest else 3
        for kernel in ("pairwise", "near_pairs"):
            assert {(kernel, "WIDTH", width), (kernel, "COSINE_TERMS", terms)} <= TAKEN


SHAPES = sorted(
    {
        (width, tiles)
        for table in plan.TILE_TABLE.values()
        for width, row in table.items()
        for tiles in row
    },
    key=str,
)


@pytest.mark.parametrize(("k", "tiles"), SHAPES, ids=str)
def test_every_tile_shape(k, tiles, monkeypatch):
    monkeypatch.setattr(backend, "tiles_for", lambda *_: tiles)
    check(paired_rows(150, k, 1e-2, pairs=2), riesz(2.0), gradient_bound=1e-5)


def test_long_rows_are_summed_in_parts(monkeypatch):
    monkeypatch.setattr(pairwise, "TILES_PER_SUM", 2)
    monkeypatch.setattr(backend, "splits_for", lambda *_: 1)
    plan.make_plan.cache_clear()
    check(random_rows(449, 10), riesz(2.0))
    check(random_rows(449, 10), riesz(0.0))
    plan.make_plan.cache_clear()


def test_blocks_of_the_cosine_matrix(monkeypatch):
    """More than one block in rows and in columns, with near pairs across them."""
    monkeypatch.setattr(large_k, "BLOCK_ELEMENTS", (1, 64 * 128))
    monkeypatch.setattr(large_k, "BLOCK_COLS", 128)
    points = paired_rows(150, 129, 1e-3, pairs=3)
    check(points, riesz(2.0), 1e-6, gradient_bound=1e-5)
    check(
        torch.cat([random_rows(20, 129, seed=4), points]),
        riesz(0.0, True),
        sizes=[20, 150],
        gradient_bound=1e-5,
    )
    # several products deep
    monkeypatch.setattr(large_k, "BLOCK_ELEMENTS", (1, 192 * 128 * 2))
    check(points, riesz(2.0), 1e-6, gradient_bound=1e-5)


def test_operands_of_large_k_are_made_once():
    """A block takes a fixed number of products, and nothing is copied or stacked for it."""
    n, k = 140, 1100
    asked = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not inside:
                asked[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    for blocks in (1, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(large_k, "BLOCK_ELEMENTS", (192 * 192 // blocks,) * 2)
            patch.setattr(large_k, "BLOCK_COLS", 192 // blocks)
            asked.clear()
            with Counting():
                sweep_of(gpu, random_rows(n, k), [n], [1.0], riesz(2.0), 0.0, True)
        # three parts of k, of two products each, and three products for the force
        assert asked["mm"] == blocks
        assert asked["addmm_"] == 8 * blocks
        assert asked["cat"] == 3
        assert not asked.keys() & {"stack", "clone", "flip", "add", "add_", "copy_"}, asked


def test_products_of_large_k_in_float32(monkeypatch):
    """On ROCm, where GEMMs return no float32 of fp16 matrices."""
    monkeypatch.setattr(large_k, "takes_halves", lambda _: False)
    check(paired_rows(70, 140, 1e-3, pairs=1), riesz(2.0), gradient_bound=1e-5)


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "angle"), [*itertools.product((3, 16), (0.1, 1e-2, 1e-3, 1e-4)), (132, 1e-4)]
)
@pytest.mark.parametrize(
    ("pair", "eps"),
    [
        (riesz(2.0, min_distance=0.0), 0.0),
        (riesz(1.0, min_distance=0.0), 1e-4),
        (riesz(0.0, True, min_distance=0.0), 1e-6),
        (riesz(2.0, True, min_distance=0.0), 0.0),
        (riesz(2.0, False, True, min_distance=0.0), 0.0),
        (riesz(1.0, True, True, min_distance=0.0), 1e-6),
    ],
    ids=str,
)
def test_near_pairs(pair, eps, angle, k):
    check(paired_rows(36, k, angle, pairs=1), pair, eps, gradient_bound=1e-5)
    if pair.half_space or pair.angular:
        points = paired_rows(36, k, angle, pairs=1, antipodal=True)
        check(points, pair, eps, gradient_bound=1e-5)


@pytest.mark.parametrize(
    ("k", "min_distance"), [*itertools.product((3, 16), (1e-3, 0.04, 0.5, 1.9)), (132, 0.5)]
)
def test_tangent_line(min_distance, k):
    points = paired_rows(36, k, 3e-4, pairs=1)
    for half_space, angular in itertools.product((False, True), (False, True)):
        pair = riesz(2.0, half_space, angular, min_distance)
        check(points, pair, 1e-5, gradient_bound=1e-5)


# above k = 128 the same functions meet such pairs as in `near_pairs`
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("pair", "k"),
    [
        *itertools.product([p for p in RIESZ if p.s != 1.0], (2, 16)),
        *itertools.product([p for p in RIESZ if p.s == 2.0], (132,)),
    ],
    ids=str,
)
def test_coincident_and_antipodal_rows(pair, sign, k):
    points = random_rows(9, k)
    points[7] = sign * points[2]
    check(points, pair, gradient_bound=1e-5)
    _, gradient = sweep_of(gpu, points[[2, 7]], [2], [1.0], pair, 0.0, True)
    assert gradient.abs().max() <= 1e-6  # no direction, or at the top of the pair function
    if sign > 0 and k != 2:
        pure = replace(pair, min_distance=0.0)
        energy, gradient = sweep_of(gpu, points, [9], [1.0], pure, 0.0, True)
        assert energy.item() == math.inf
        assert torch.isfinite(gradient).all()


# `direct` takes for one direction what 48 bits do not tell apart; with eps above that
@pytest.mark.parametrize("factor", [3.0, -49.0])
@pytest.mark.parametrize(
    ("pair", "k", "eps"),
    [
        *itertools.product([p for p in RIESZ if p.s in (0.0, 2.0)], (5, 20), (0.0, 1e-6)),
        *itertools.product([riesz(2.0, True), riesz(6.0)], (20, 131), (0.0, 1e-10)),
    ],
    ids=str,
)
def test_multiples_of_a_row(pair, k, eps, factor):
    points = random_rows(9, k)
    points[2] = torch.arange(1.0, k + 1).remainder(5.0) - 2.0
    points[7] = factor * points[2]
    duplicates = points.clone()
    duplicates[7] = math.copysign(1.0, factor) * points[2]
    _, gradient = check(points, pair, eps, gradient_bound=1e-5)
    if eps == 0.0:
        _, expected = truth(duplicates, [9], [1.0 / 36], pair, eps)
        expected[7] /= abs(factor)
        assert relative_error(gradient[[2, 7]], expected[[2, 7]]) <= 1e-5
        if factor > 0.0 or pair.half_space:
            pure = replace(pair, min_distance=0.0)
            energy, gradient = sweep_of(gpu, points, [9], [1.0], pure, 0.0, True)
            assert energy.item() == math.inf
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("k", [4, 20, 131])
@pytest.mark.parametrize(
    "pair",
    [
        riesz(10.0),
        riesz(12.0, True),
        riesz(12.0, False, True),
        riesz(40.0),
        riesz(0.0, min_distance=0.0),
        riesz(1.0, True, min_distance=0.0),
        riesz(2.0, min_distance=0.0),
        riesz(2.0, True, True, min_distance=0.0),
    ],
    ids=str,
)
def test_forces_beyond_float32(pair, k):
    """What is finite in the result comes out, whatever was on the way; else infinity."""
    side = -1.0 if pair.half_space else 1.0
    for distance in (1e-5, 1e-7, 1e-10):
        points = random_rows(7, k)
        points[1] = 0.0
        points[1, 0] = 1.0
        points[5] = side * points[1]
        points[5, 1] = distance
        energy, gradient = sweep_of(gpu, points, [7], [1.0 / 21], pair, 0.0, True)
        expected, expected_gradient = truth(points, [7], [1.0 / 21], pair, 0.0)
        bound = max(1e-5, 2 * pair.s * 2.0**-23)
        assert not gradient.isnan().any()
        rounded = expected_gradient.float()
        held = rounded.isfinite().all(1)
        assert relative_error(gradient[held], expected_gradient[held]) <= bound
        # the entry that parts the rows; others may be too small to know that they are infinite
        assert torch.equal(gradient[~held, 1], rounded[~held, 1])
        if expected.float().isfinite().all():
            assert relative_error(energy, expected) <= bound
        else:
            assert energy.item() == math.inf


@pytest.mark.parametrize("s", [2.5, 4.0, 10.0, 16.0, 50.0])
@pytest.mark.parametrize("half_space", [False, True])
def test_large_exponents(s, half_space):
    """The coefficients stay inside the range of fp16 at any exponent."""
    # an error of a distance, that of float32, is multiplied by the exponent
    bound = max(2e-6, s * 2.0**-23)
    energy_bound = max(1e-6, s * 2.0**-23)
    points = random_rows(130, 12)
    check(points, riesz(s, half_space), 0.0, None, energy_bound, bound)


# above k = 128 the same functions meet such pairs as in `near_pairs`
@pytest.mark.parametrize(
    ("tau", "k", "eps"), [(0.5, 4, 0.0), (0.5, 20, 1e-4), (100.0, 4, 1e-4), (100.0, 20, 0.0)]
)
@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("angular", [False, True])
def test_gaussians_wide_and_narrow(tau, k, eps, half_space, angular):
    """Near, coincident and antipodal pairs beside typical ones, at any width."""
    pair = Gaussian(tau, half_space=half_space, angular=angular)
    # an error of a squared distance, that of float32, is multiplied by tau
    bound = max(1.0, tau / 2.0)
    points = paired_rows(40, k, 1e-3, pairs=2)
    points[5], points[6] = points[7], -points[8]
    check(points, pair, eps, None, bound * 1e-6, bound * 2e-6)


@pytest.mark.parametrize(
    ("pair", "k"),
    [
        *((riesz(s, True), 1000) for s in (0.2, 1.0, 1.5)),
        *((Gaussian(tau, half_space=True), k) for tau in (0.05, 0.5) for k in (30, 1000)),
        *((Gaussian(tau, half_space=True), k) for tau in (0.01, 0.9) for k in (2, 8)),
    ],
    ids=str,
)
def test_sides_that_nearly_cancel(pair, k):
    """In many dimensions, or for a wide Gaussian, F'(c) of the two sides is almost the same."""
    check(random_rows(33, k), pair, 0.0, None, 1e-6, 1e-6)


@pytest.mark.parametrize("k", [9, 17, 40])
def test_one_pair_of_a_small_set(k):
    """The error of a pair just beyond what is always near, with hardly another pair beside it."""
    for seed in range(4):
        for chord in (0.26, 0.52):
            check(paired_rows(5, k, chord, pairs=1, seed=seed), riesz(2.0))


@pytest.fixture
def approximate_functions(monkeypatch):
    """Special functions of float32 as far off as NVIDIA's approximate instructions may be."""

    def log2(_, x):
        with numpy.errstate(all="ignore"):
            exact = numpy.log2(x.data)
        if exact.dtype == numpy.float32:
            exact = exact * numpy.where(abs(exact) > 1, numpy.float32(1 + 2.0**-22), 1)
            exact += numpy.where(abs(exact) > 1, 0, numpy.float32(2.0**-22))
        return interpreter.TensorHandle(exact, x.dtype.scalar)

    def exp2(_, x):
        with numpy.errstate(all="ignore"):
            exact = numpy.exp2(x.data)
        if exact.dtype == numpy.float32:
            # right where only an exponent has to be set
            exact *= numpy.where(x.data == numpy.rint(x.data), 1, numpy.float32(1 - 2.0**-22.5))
        return interpreter.TensorHandle(exact, x.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_log2", log2)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_exp2", exp2)


@pytest.mark.parametrize("s", [0.3, 2.5, 3.7])
@pytest.mark.parametrize(("half_space", "angular"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("angle", [1e-2, 1e-4])
def test_near_pairs_with_approximate_powers(approximate_functions, s, half_space, angular, angle):
    """A power whose logarithm is large: its error must not grow with the logarithm."""
    pair = riesz(s, half_space, angular, min_distance=0.0)
    points = paired_rows(100, 3, angle, antipodal=half_space)
    check(points, pair, gradient_bound=1e-5)


def test_range_of_the_fp16_split():
    """Coefficients: below the largest fp16 at the near chord, resolved to 2^-19 at r = sqrt 2.

    Unit rows: 256 v is 256 at most, and an entry that is lost below the smallest subnormal low half
    changes a cosine by less than float32 rounds it.
    """
    largest, smallest = 65504.0, 2.0**-24
    kinds = [riesz(s) for s in (0.0, 1e-3, 0.5, 1.0, 1.7, 2.0, 3.0, 4.0, 8.0, 10.0, 16.0, 50.0)]
    kinds += [Gaussian(tau) for tau in (1e-3, 0.1, 1.0, 3.0, 6.0, 7.0, 20.0, 27.0)]
    for kind, half_space, angular in itertools.product(kinds, (False, True), (False, True)):
        constants = pair_function.pair_constants(
            replace(kind, half_space=half_space, angular=angular)
        )
        near = max(2.0 - 2.0 * constants.arguments.near_cosine, 0.0)
        x = torch.tensor([near, 2.0, 4.0 - near], dtype=torch.float64)
        pure = replace(kind, angular=angular)
        if isinstance(pure, Riesz):
            pure = replace(pure, min_distance=0.0)
        _, slope, _ = pure.one_sided(x, 4.0 - x)
        raw = slope / constants.force_unit
        assert raw[0] < largest
        assert raw[2] < largest or not angular
        assert smallest / 2 / raw[1] <= 1.001 * 2.0**-19
    scale = pair_terms.UNIT_SCALE.value
    assert scale * 1.001 < largest
    # an error of half the smallest subnormal in each of k = 128 entries, against an entry of 1
    assert math.sqrt(128) * smallest / 2 / scale < 2.0**-25


@pytest.mark.parametrize("k", [20, 131], ids=["pairwise", "large_k"])
@pytest.mark.parametrize(
    ("precision", "cosine_terms", "energy_bound", "gradient_bound"),
    [("high", 3, 1e-6, 1e-3), ("medium", 1, 1e-4, 2e-3)],
)
def test_cheaper_products(precision, cosine_terms, energy_bound, gradient_bound, k):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        points = random_rows(150, k)
        check(points, riesz(2.0), 0.0, None, energy_bound, gradient_bound)
        points = paired_rows(70, k, 1e-3, pairs=1)
        check(points, riesz(2.0), 0.0, None, energy_bound, gradient_bound)
    finally:
        torch.set_float32_matmul_precision(before)
    if k == 20:
        assert ("pairwise", "COSINE_TERMS", cosine_terms) in TAKEN
        assert ("pairwise", "FORCE_TERMS", 1) in TAKEN
    else:
        assert ("coefficient", "FORCE_HALVES", 1) in TAKEN


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [3, 20, 131])
def test_half_precision_rows_are_exact(dtype, k):
    check(random_rows(70, k, dtype=dtype), riesz(2.0))


@pytest.mark.parametrize("k", [3, 20, 131])
@pytest.mark.parametrize("magnitude", [1e-25, 1e25])
def test_magnitude_of_rows(magnitude, k):
    points = random_rows(40, k)
    points[::2] *= magnitude
    pair = riesz(2.0)
    energy, gradient = sweep_of(gpu, points, [40], [1.0], pair, 0.0, True)
    expected, expected_gradient = truth(points, [40], [1.0], pair, 0.0)
    assert relative_error(energy, expected) <= 1e-6
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        assert relative_error(gradient[rows], expected_gradient[rows]) <= 2e-6


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 20, 131])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("half_space", [False, True])
def test_dead_rows(eps, half_space, k):
    points = random_rows(66, k)
    points[[0, 40, 65]] = 0.0
    _, gradient = check(points, riesz(2.0, half_space), eps)
    if eps == 0.0:
        assert (gradient[[0, 40, 65]] == 0).all()


@pytest.mark.parametrize("k", [3, 20, 131])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("pair", [riesz(2.0), riesz(0.0, True), riesz(1.0, True, True)], ids=str)
def test_bad_rows_stay_in_their_set(pair, bad, k):
    points = random_rows(90, k)
    points[50, k - 1] = bad
    for with_gradient in (True, False):
        energy, gradient = sweep_of(gpu, points, [40, 30, 20], [1.0] * 3, pair, 0.0, with_gradient)
        assert energy.isnan().tolist() == [False, True, False]
    expected, _ = truth(points[:40], [40], [1.0], pair, 0.0)
    assert relative_error(energy[0], expected[0]) <= 1e-6
    assert torch.isfinite(gradient[:40]).all() if gradient is not None else True


def test_no_rows():
    for k in (0, 3):
        energy, gradient = sweep_of(gpu, torch.zeros(0, k), [0, 0], [1.0, 1.0], riesz(), 0.0, True)
        assert energy.tolist() == [0.0, 0.0]
        assert gradient.shape == (0, k)
    points = random_rows(3, 2)
    energy, gradient = sweep_of(gpu, points, [0, 1, 0, 2], [1.0] * 4, riesz(), 0.0, True)
    assert energy[:3].tolist() == [0.0, 0.0, 0.0]
    assert energy[3] > 0
    assert gradient[0].tolist() == [0.0, 0.0]


def test_no_columns():
    energy, gradient = sweep_of(gpu, torch.zeros(4, 0), [4], [1.0], riesz(2.0), 0.0, True)
    assert abs(energy.item() - 3.0) <= 1e-6
    assert gradient.shape == (4, 0)


def test_float64_is_refused():
    with pytest.raises(TypeError, match="float32, float16 or bfloat16"):
        sweep_of(gpu, torch.zeros(4, 3, dtype=torch.float64), [4], [1.0], riesz(), 0.0, True)


# --- projection -----------------------------------------------------------------------------------


def project_truth(weights, projections, k, scales, pair, eps):
    """Energies, gradient in the projected rows, gradients in weights and projections, float64."""
    leaves = [t.double().requires_grad_() if t is not None else None for t in projections]
    weights = [w.double().requires_grad_() for w in weights]
    parts = [
        torch.nn.functional.pad(w, (0, k - w.shape[1])) if p is None else (w @ p.mT).flatten(0, 1)
        for w, p in zip(weights, leaves, strict=True)
    ]
    sizes = [
        w.shape[0]
        for w, p in zip(weights, leaves, strict=True)
        for _ in range(1 if p is None else p.shape[0])
    ]
    rows = torch.cat(parts)
    energy, gradient = truth(rows.detach(), sizes, scales, pair, eps)
    wanted = torch.autograd.grad(rows, [*weights, *(p for p in leaves if p is not None)], gradient)
    return energy, gradient, wanted


def matrices(count, k, d, seed):
    return random_rows(count * k, d, seed=seed).view(count, k, d)


# in eight dimensions the rows are far enough apart not to feel that p is rounded to float32
@pytest.mark.parametrize("k", [8, 20, 40, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_projection_of_weights_of_any_width(dtype, k):
    """Rows of any stride and dtype, float32 matrices, and a weight too narrow to project."""
    wide = random_rows(50, 70, dtype=dtype).t()  # columns are not contiguous
    part = random_rows(33, 40, seed=1, dtype=dtype)[:, 5:32]  # rows are not contiguous
    narrow = random_rows(9, min(k - 1, 20), seed=2, dtype=dtype)
    weights = [wide, part, narrow, random_rows(0, 5, dtype=dtype)]
    projections = [
        matrices(2, k, 50, 3),
        matrices(27, k, 1, 4).permute(2, 1, 0),
        None,
        matrices(2, k, 5, 5),
    ]
    scales = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    pair = Gaussian(half_space=True) if k == 20 else riesz(2.0, k != 8)
    LAUNCHES.clear()
    energy, gradient = sweep_projected(gpu, weights, projections, scales, pair, 1e-4, True)
    if k < 130:
        assert 0 < sum(LAUNCHES.values()) <= 5
        assert ("project_normalize", "COLUMNS", k <= 8) in TAKEN
        assert ("project_normalize", "WITH_REST", 8 < k <= 24) in TAKEN
    expected, row_gradient, wanted = project_truth(weights, projections, k, scales, pair, 1e-4)
    assert energy.dtype == gradient.dtype == torch.float32
    assert relative_error(energy, expected) <= 1e-6
    assert relative_error(gradient, row_gradient) <= 2e-6
    assert (
        gradient[173:, narrow.shape[1] :] == 0
    ).all()  # columns that the narrow weight does not have
    alone, nothing = sweep_projected(gpu, weights, projections, scales, pair, 1e-4, False)
    assert nothing is None
    assert relative_error(alone, expected) <= 1e-6
    # what the caller makes of it: two GEMMs a weight
    first, leaf = 0, len(weights)
    for i, (w, p) in enumerate(zip(weights, projections, strict=True)):
        count = 1 if p is None else p.shape[0]
        part = gradient[first : first + count * w.shape[0]].view(count, w.shape[0], k)
        first += count * w.shape[0]
        if p is None:
            assert relative_error(part[0, :, : w.shape[1]], wanted[i]) <= 2e-6
            continue
        assert relative_error((part @ p).sum(0), wanted[i]) <= 2e-6
        assert relative_error(part.mT @ w.float(), wanted[leaf]) <= 2e-6
        leaf += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projection_of_weights_whose_rows_are_aligned(dtype):
    """Widths and strides that are multiples of 8 take a loop of their own."""
    weights = [
        random_rows(20, 64, dtype=dtype),
        random_rows(70, 48, seed=1, dtype=dtype)[:, :40],
        random_rows(9, 24, seed=2, dtype=dtype)[:, 3:19],
        random_rows(9, 41, seed=3, dtype=dtype)[:, :40],
    ]
    projections = [matrices(2, 12, w.shape[1], i) for i, w in enumerate(weights)]
    scales, pair = [1.0] * 8, riesz(2.0)
    energy, gradient = sweep_projected(gpu, weights, projections, scales, pair, 0.0, True)
    expected, row_gradient, _ = project_truth(weights, projections, 12, scales, pair, 0.0)
    assert relative_error(energy, expected) <= 1e-6
    assert relative_error(gradient, row_gradient) <= 2e-6


@pytest.mark.parametrize("k", [3, 12])
def test_unprojected_weights_are_taken_as_they_are(k):
    weights = [random_rows(20, k), random_rows(30, 2, seed=1)]
    pair = riesz(2.0)
    energy, gradient = sweep_projected(gpu, weights, [None, None], [1.0, 1.0], pair, 0.0, True)
    padded = torch.nn.functional.pad(weights[1], (0, k - 2))
    swept, same = sweep_of(
        gpu, torch.cat([weights[0], padded]), [20, 30], [1.0, 1.0], pair, 0.0, True
    )
    assert torch.equal(energy, swept)
    assert torch.equal(gradient, same)


def test_more_weights_than_a_launch_takes(monkeypatch):
    monkeypatch.setattr(project_normalize, "MAX_WEIGHTS", 3)
    project_normalize.set_table.cache_clear()
    weights = [random_rows(5 + i, 9 + i, seed=i) for i in range(7)]
    projections = [matrices(2, 12, 9 + i, i) if i % 3 else None for i in range(7)]
    scales, pair = [1.0] * 11, riesz(1.0)
    energy, gradient = sweep_projected(gpu, weights[:1], [None], [1.0], pair, 0.0, True)
    LAUNCHES.clear()
    projections = [matrices(2, 15, 9 + i, i) if i % 3 else None for i in range(7)]
    energy, gradient = sweep_projected(gpu, weights, projections, scales, pair, 0.0, True)
    assert LAUNCHES["project_normalize"] == 3
    expected, row_gradient, _ = project_truth(weights, projections, 15, scales, pair, 0.0)
    assert relative_error(energy, expected) <= 1e-6
    assert relative_error(gradient, row_gradient) <= 2e-6
    project_normalize.set_table.cache_clear()


def test_a_resnet50_takes_five_launches_and_no_copy():
    """54 weights, of which two are not projected; few neurons and matrices for the interpreter."""
    weights = [random_rows(2, 3 + i, seed=i) for i in range(54)]
    projections = [None if i < 2 else matrices(1, 40, 3 + i, i) for i in range(54)]
    arguments = [1.0] * 54, riesz(2.0, True), 0.0, True
    asked = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not inside:
                asked[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    sweep_projected(gpu, weights, projections, *arguments)
    # new tensors, as parametrized weights and fresh matrices are
    weights = [w.clone() for w in weights]
    LAUNCHES.clear()
    with Counting():
        sweep_projected(gpu, weights, projections, *arguments)
    assert sum(LAUNCHES.values()) == 5
    # tables come from the cache, results are memory that the kernels fill, poisoned by the fixture
    assert set(asked) <= {"empty", "fill_", "slice"}, asked


def test_operators_of_weights_reach_the_projecting_kernel():
    weights = [random_rows(40, 20).view(2, 20, 20).bfloat16(), random_rows(9, 7)[None].bfloat16()]
    projections = [matrices(3, 12, 20, 0), None]
    results = []
    for name in ("triton", "torch"):
        options = options_of(s=1.0, half_space=True, backend=name, factors=[1.0, 2.0] * 3 + [1.0])
        leaves = [w.clone().requires_grad_() for w in weights]
        matrix = projections[0].clone().requires_grad_()
        LAUNCHES.clear()
        energies = projected_energy(leaves, [matrix, None], options)
        launches = sum(LAUNCHES.values())
        assert (0 < launches <= 5) == (name == "triton")
        factors = torch.linspace(1.0, 2.0, 7)
        gradients = torch.autograd.grad((energies * factors).sum(), [*leaves, matrix])
        results.append([energies, *gradients])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one, other) <= 4e-3
    assert relative_error(results[0][0], results[1][0]) <= 1e-6
    assert relative_error(results[0][3], results[1][3]) <= 2e-6


def test_addresses_of_weights_are_not_remembered():
    pair = riesz(2.0)
    for seed in range(3):
        weights, projections = [random_rows(20, 30, seed=seed)], [matrices(2, 12, 30, seed)]
        energy, _ = sweep_projected(gpu, weights, projections, [1.0, 1.0], pair, 0.0, True)
        expected, *_ = project_truth(weights, projections, 12, [1.0, 1.0], pair, 0.0)
        assert relative_error(energy, expected) <= 1e-6
    assert project_normalize.set_table.cache_info().currsize <= 64


def test_what_does_not_fit_together_is_refused():
    w, p = random_rows(4, 6), matrices(2, 3, 6, 0)

    def project_sweep(weights, projections):
        return sweep_projected(gpu, weights, projections, [1.0] * 4, riesz(), 0.0, True)

    with pytest.raises(ValueError, match="at least one tensor"):
        project_sweep([], [])
    with pytest.raises(TypeError, match="one dtype"):
        project_sweep([w, w.half()], [p, p])
    with pytest.raises(TypeError, match="`weights` must be float32"):
        project_sweep([w.double()], [p])
    with pytest.raises(TypeError, match="`projections` must be float32"):
        project_sweep([w], [p.half()])
    with pytest.raises(ValueError, match=r"must be \[C, 3, 6\], got shape \(2, 4, 6\)"):
        project_sweep([w, w], [p, matrices(2, 4, 6, 0)])
    with pytest.raises(ValueError, match="at most 3 columns"):
        project_sweep([w, w], [p, None])


@pytest.mark.parametrize("k", [20, 131])
def test_autocast_lowers_nothing(k):
    weights, projections = [random_rows(40, 150)], [matrices(1, k, 150, 0)]
    pair = riesz(2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        swept = sweep_of(gpu, random_rows(40, k), [40], [1.0], pair, 0.0, True)
        projected = sweep_projected(gpu, weights, projections, [1.0], pair, 0.0, True)
    expected = sweep_of(gpu, random_rows(40, k), [40], [1.0], pair, 0.0, True)
    assert all(torch.equal(a, b) for a, b in zip(swept, expected, strict=True))
    expected = sweep_projected(gpu, weights, projections, [1.0], pair, 0.0, True)
    assert all(torch.equal(a, b) for a, b in zip(projected, expected, strict=True))


# --- tensor cores that truncate -------------------------------------------------------------------


def truncating_dot(builder, a, b, total, input_precision, max_num_imprecise_acc):
    """What a step of an NVIDIA tensor core does: 16 products and the sum so far are cut to two bits
    more than float32 of the largest has, added, and cut to float32, all towards zero.
    """
    left, right = a.data.astype(numpy.float64), b.data.astype(numpy.float64)
    sums = total.data.astype(numpy.float64)

    def cut(x, largest, bits):
        unit = numpy.ldexp(1.0, numpy.frexp(largest)[1] - bits)
        return numpy.trunc(x / unit) * unit

    for k in range(0, left.shape[1], 16):
        products = left[:, k : k + 16, None] * right[None, k : k + 16, :]
        largest = numpy.maximum(numpy.abs(products).max(1), numpy.abs(sums))
        sums = cut(sums, largest, 26) + cut(products, largest[:, None], 26).sum(1)
        sums = cut(sums, sums, 24)
    return interpreter.TensorHandle(sums.astype(total.data.dtype), total.dtype.scalar)


@pytest.fixture
def one_row_tile(monkeypatch):
    """Tensor cores that truncate, and only the first row tile meets anybody: for large N."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", truncating_dot)

    def make_plan(sizes, block_m, *rest):
        whole = plan.make_plan(sizes, block_m, *rest)
        items = whole.items.clone()
        idle = items[:, 0] > 0
        items[idle, 2] = items[idle, 1]
        return replace(whole, items=items)

    monkeypatch.setattr(backend, "make_plan", make_plan)


def gradient_of_first_rows(points, count, pair):
    """dE/dp of the first rows, float64; eps = 0."""
    v = normalize(points.double())
    rows = points[:count].double().requires_grad_()
    parts = []
    for i in range(count):
        u, others = normalize(rows[i], dim=0), torch.cat([v[:i], v[i + 1 :]])
        value = function_of(pair)((u - others).norm(dim=1)).sum()
        if pair.half_space:
            # 4 - |u - v|^2 would lose the digits of nearly opposite rows
            value = 2 * (value + function_of(pair)((u + others).norm(dim=1)).sum())
        parts.append(value)
    (gradient,) = torch.autograd.grad(torch.stack(parts).sum(), rows)
    return gradient


def check_first_rows(n, k, pair):
    points = random_rows(n, k)
    _, gradient = sweep_of(gpu, points, [n], [1.0], pair, 0.0, True)
    expected = gradient_of_first_rows(points, 32, pair)
    assert relative_error(gradient[:32], expected) <= 2e-6


@pytest.mark.parametrize(("n", "k"), [(4096, 16)])
def test_truncation_does_not_add_up(one_row_tile, n, k, monkeypatch):
    monkeypatch.setattr(
        backend, "splits_for", lambda *_: 1
    )  # all columns in one item, the longest sum
    check_first_rows(n, k, riesz(2.0, True, min_distance=0.0))


@pytest.mark.long
@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("s", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("k", [2, 3, 8, 9, 10, 16, 17, 24, 25, 32, 64, 128])
def test_accuracy_of_16384_rows(one_row_tile, k, s, half_space):
    check_first_rows(16384, k, riesz(s, half_space, min_distance=0.0))


# --- launches and tables --------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "most"), [(3, 4), (20, 5)])
def test_launches_do_not_grow_with_the_sets(k, most):
    counts = []
    for sizes in ([20], [3, 20, 64, 1, 65, 7]):
        points = random_rows(sum(sizes), k)
        LAUNCHES.clear()
        sweep_of(gpu, points, sizes, [1.0] * len(sizes), riesz(), 0.0, True)
        counts.append(sum(LAUNCHES.values()))
    assert counts[0] == counts[1] <= most


def test_runs_are_equal_to_the_bit():
    points = paired_rows(140, 20, 1e-3)
    runs = [sweep_of(gpu, points, [75, 65], [1.0, 2.0], riesz(), 0.0, True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize(("block_m", "block_n"), [(64, 64), (128, 64), (64, 16)])
def test_work_items_meet_every_tile_once(block_m, block_n, upper):
    sizes = (1, 0, 64, 65, 700, 128)
    work = plan.make_plan(sizes, block_m, block_n, 5, upper, torch.device("cpu"))
    met = Counter()
    for row0, begin, end, _, slot, _ in work.items.tolist():
        assert begin < end
        for tile in range(begin, end):
            met[row0, tile] += 1
        met["slot", slot] += 1
    expected = Counter({("slot", slot): 1 for slot in range(work.num_items)})
    for first, n in zip(work.first_packed_row, sizes, strict=True):
        assert first % block_m == 0
        for row0 in range(first, first + n, block_m):
            start = row0 if upper else first
            for col in range(start - start % block_n, first + n, block_n):
                expected[row0, col // block_n] += 1
    assert met == expected
    slots = sorted(
        slot
        for _, _, _, first, count, _ in work.row_tiles.tolist()
        for slot in range(first, first + count)
    )
    assert slots == list(range(work.num_items))


TILES = plan.Tiles(128, 64, 8)


def test_memory_of_the_slots_is_bounded():
    for n, k in ((4096, 32), (16384, 32), (1_000_000, 64)):
        width = plan.row_width(k)
        count = splits.splits_for(Numbers([n]), TILES, k, 4 * width + 12, True, 10_000)
        work = plan.make_plan((n,), 128, 64, count, False, torch.device("cpu"))
        slots = work.num_items * 128 * (4 * k + 12)
        rows = work.packed_rows * (4 * plan.row_width(k) + 12) + 4 * n * k
        assert slots + rows <= max(8 * n * k * 4, 2 * splits.SMALL_BYTES)


@pytest.mark.parametrize("with_force", [False, True])
@pytest.mark.parametrize("sizes", [(4096,), (16384,), (4096,) * 20, (70, 2048, 512, 1000)], ids=str)
@pytest.mark.parametrize("processors", [16, 108, 132])
def test_splits_fill_the_device(processors, sizes, with_force, monkeypatch):
    """Where free programs take the next item, no number of splits ends sooner."""

    def duration(count):
        """When the last item ends."""
        items = plan.make_plan(sizes, 128, 64, count, not with_force, torch.device("cpu")).items
        ends = [0] * (processors * TILES.programs)
        for tiles in (items[:, 2] - items[:, 1]).tolist():
            heapq.heapreplace(ends, ends[0] + tiles + splits.ITEM_OVERHEAD)
        return max(ends)

    monkeypatch.setattr(splits, "MEMORY_FACTOR", 1e3)
    chosen = splits.splits_for(Numbers(sizes), TILES, 40, 172, with_force, processors)
    assert duration(chosen) == min(duration(count) for count in range(1, 65))


def test_splits_follow_from_the_device(monkeypatch):
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    splits.multiprocessors.cache_clear()
    assert splits.multiprocessors(torch.device("cuda", 0)) == 132
    splits.multiprocessors.cache_clear()
    # 32 row tiles of 128 column tiles, one program a multiprocessor: 128 items in one round
    one = plan.Tiles(128, 32, 8, programs=1)
    assert splits.splits_for(Numbers([4096]), one, 128, 524, True, 132) == 4
    # a quarter of the multiprocessors, and no splits are needed
    assert splits.splits_for(Numbers([4096]), one, 128, 524, True, 33) == 1
    assert splits.splits_for(Numbers(), one, 128, 524, True, 132) == 1


def test_too_many_rows():
    with pytest.raises(ValueError, match="at most 2\\^31"):
        plan.make_plan((2**31,), 128, 64, 1, False, torch.device("cpu"))
