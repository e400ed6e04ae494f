"""Every Triton kernel and every branch of it, run by Triton's interpreter against the definition.

Collected only by `test_triton_interpreter.py`, in a process of its own: TRITON_INTERPRET=1 is read
when the kernels are defined.
"""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from comhe_ext import reference
from comhe_ext.kernels import gpu
from comhe_ext.kernels.gpu import (
    backend,
    direct,
    finish,
    large_k,
    near_pairs,
    pair_function,
    pairwise,
    plan,
    project_normalize,
)
from comhe_ext.potentials import Potential
from comhe_ext.testing import paired_rows, random_rows, relative_error

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    # the interpreter computes what a mask discards, in numpy, and numpy says so
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

LAUNCHES: Counter[str] = Counter()
SEEN: set[tuple[object, ...]] = set()
# the constants that open or close a branch
BRANCHES = ("KIND", "HALF", "ANGLE", "WITH_FORCE", "UPPER")


class Recorded:
    """A kernel that counts its launches and notes the constants it was launched with."""

    def __init__(self, module, name):
        self.kernel, self.name = getattr(module, name), name
        setattr(module, name, self)

    def __getitem__(self, grid):
        launch = self.kernel[grid]

        def run(*args, **constants):
            LAUNCHES[self.name] += 1
            SEEN.add((self.name, *(constants.get(c) for c in BRANCHES)))
            for constant in ("COSINE_TERMS", "FORCE_TERMS", "COLUMNS", "K", "WIDTH"):
                if constant in constants:
                    SEEN.add((self.name, constant, constants[constant]))
            return launch(*args, **constants)

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

PAIRS = [
    Potential(s, half_space, angular)
    for s, half_space, angular in itertools.product(
        (0.0, 1.0, 2.0, 1.5), (False, True), (False, True)
    )
]


def truth(points, sizes, scales, pair, eps):
    """Scaled energies [B] and the gradient [T, k] of their sum, float64."""
    points = points.double().requires_grad_()
    energies = [
        scale
        / 2
        * reference.hyperspherical_energy(
            rows,
            pair.s,
            half_space=pair.half_space,
            angular=pair.angular,
            reduction="sum",
            eps=eps,
            min_distance=pair.min_distance,
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
    energy, gradient = gpu.sweep(points, sizes, scales, pair, eps, True)
    alone, nothing = gpu.sweep(points, sizes, scales, pair, eps, False)
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


@pytest.mark.parametrize("k", [3, 20, 129], ids=["direct", "pairwise", "large_k"])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_every_pair_function(pair, k):
    mirrored = pair.half_space or pair.angular
    n = 66 if k < 129 else 34
    close = paired_rows(n, k, 1e-2, pairs=1, seed=1)
    if mirrored:
        close[1] = -2.0 * paired_rows(n, k, 2e-2, pairs=1, seed=1)[n - 1]
    points = torch.cat([random_rows(1, k), close, random_rows(9, k, seed=3)])
    sizes = [1, n, 9]
    # short rows, so that eps shows in every digit
    check(0.1 * points, pair, 1e-4, sizes, gradient_bound=1e-5)


@pytest.mark.parametrize("k", [4, 12, 130], ids=["direct", "pairwise", "large_k"])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_random_rows(pair, k):
    check(random_rows(97 if k < 129 else 70, k), pair)


# around the tile edges: 64 rows or 128, 64 columns or 32 or 16
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_sizes_around_the_tiles(n):
    check(random_rows(n, 12), Potential(2.0))
    check(random_rows(n, 2), Potential(1.0))


# exactly 8, 16, 32, 64, 128 columns, and one more: the next path or the next width
@pytest.mark.parametrize("k", [1, 2, 5, 6, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 200])
def test_every_width(k):
    pair = Potential(2.0, min_distance=0.1)
    check(random_rows(67, k), pair, 1e-3, gradient_bound=1e-5 if k < 3 else 2e-6)


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
    monkeypatch.setattr(backend, "tiles_for", lambda *_: replace(tiles, maxnreg=None))
    check(paired_rows(150, k, 1e-2, pairs=2), Potential(2.0), gradient_bound=1e-5)


def test_long_rows_are_summed_in_parts(monkeypatch):
    monkeypatch.setattr(pairwise, "TILES_PER_SUM", 2)
    monkeypatch.setattr(plan, "ITEMS_WANTED", 1)
    plan.make_plan.cache_clear()
    check(random_rows(449, 10), Potential(2.0))
    check(random_rows(449, 10), Potential(0.0))
    plan.make_plan.cache_clear()


def test_blocks_of_the_cosine_matrix(monkeypatch):
    """More than one block in rows and in columns, with close pairs across them."""
    monkeypatch.setattr(large_k, "BLOCK_ELEMENTS", (1, 64 * 128))
    monkeypatch.setattr(large_k, "BLOCK_COLS", 128)
    points = paired_rows(150, 129, 1e-3, pairs=3)
    check(points, Potential(2.0), 1e-6, gradient_bound=1e-5)
    check(
        torch.cat([random_rows(20, 129, seed=4), points]),
        Potential(0.0, True),
        sizes=[20, 150],
        gradient_bound=1e-5,
    )


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "angle"), [*itertools.product((3, 16), (0.1, 1e-2, 1e-3, 1e-4)), (132, 1e-4)]
)
@pytest.mark.parametrize(
    ("pair", "eps"),
    [
        (Potential(2.0, min_distance=0.0), 0.0),
        (Potential(1.0, min_distance=0.0), 1e-4),
        (Potential(0.0, True, min_distance=0.0), 1e-6),
        (Potential(2.0, True, min_distance=0.0), 0.0),
        (Potential(2.0, False, True, min_distance=0.0), 0.0),
        (Potential(1.0, True, True, min_distance=0.0), 1e-6),
    ],
    ids=str,
)
def test_close_pairs(pair, eps, angle, k):
    check(paired_rows(36, k, angle, pairs=1), pair, eps, gradient_bound=1e-5)
    if pair.half_space or pair.angular:
        points = paired_rows(36, k, angle, pairs=1, antipodal=True)
        check(points, pair, eps, gradient_bound=1e-5)


@pytest.mark.parametrize(
    ("k", "min_distance"), [*itertools.product((3, 16), (1e-3, 0.04, 0.5, 1.9)), (132, 1.9)]
)
def test_tangent_line(min_distance, k):
    points = paired_rows(36, k, 3e-4, pairs=1)
    for half_space, angular in itertools.product((False, True), (False, True)):
        pair = Potential(2.0, half_space, angular, min_distance)
        check(points, pair, 1e-5, gradient_bound=1e-5)


@pytest.mark.parametrize("k", [2, 16, 132], ids=["direct", "pairwise", "large_k"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("pair", [p for p in PAIRS if p.s != 1.0], ids=str)
def test_coincident_and_antipodal_rows(pair, sign, k):
    points = random_rows(9, k)
    points[7] = sign * points[2]
    check(points, pair, gradient_bound=1e-5)
    _, gradient = gpu.sweep(points[[2, 7]], [2], [1.0], pair, 0.0, True)
    assert gradient.abs().max() <= 1e-6  # no direction, or at the top of the pair function
    if sign > 0 and k != 2:
        pure = replace(pair, min_distance=0.0)
        energy, gradient = gpu.sweep(points, [9], [1.0], pure, 0.0, True)
        assert energy.item() == math.inf and torch.isfinite(gradient).all()


@pytest.mark.parametrize("s", [2.5, 4.0, 8.0, 16.0])
@pytest.mark.parametrize("half_space", [False, True])
def test_large_exponents(s, half_space):
    """The coefficients stay inside the range of fp16 at any exponent."""
    check(random_rows(130, 12), Potential(s, half_space), gradient_bound=3e-6, energy_bound=3e-6)


def test_range_of_the_fp16_split():
    """Coefficients: below the largest fp16 at the near chord, resolved to 2^-19 at r = sqrt 2.

    Unit rows: 256 v is 256 at most, and an entry that is lost below the smallest subnormal low half
    changes a cosine by less than float32 rounds it.
    """
    largest, smallest = 65504.0, 2.0**-24
    for s, half_space, angular in itertools.product(
        (0.0, 1e-3, 0.5, 1.0, 1.7, 2.0, 3.0, 4.0, 8.0, 16.0, 64.0), (False, True), (False, True)
    ):
        constants = pair_function.pair_constants(Potential(s, half_space, angular))
        near = 2.0 - 2.0 * constants.near_cosine
        x = torch.tensor([near, 2.0], dtype=torch.float64)
        _, slope, _ = Potential(s, False, angular, 0.0).one_sided(x, 4.0 - x)
        raw = slope / constants.force_unit
        assert raw[0] < largest
        assert smallest / 2 / raw[1] <= 1.001 * 2.0**-19
    scale = pair_function.UNIT_SCALE.value
    assert scale * 1.001 < largest
    # an error of half the smallest subnormal in each of k = 128 entries, against an entry of 1
    assert math.sqrt(128) * smallest / 2 / scale < 2.0**-25


@pytest.mark.parametrize("k", [20, 131], ids=["pairwise", "large_k"])
@pytest.mark.parametrize(
    ("precision", "energy_bound", "gradient_bound"),
    [("high", 1e-6, 1e-3), ("medium", 1e-4, 2e-3)],
)
def test_cheaper_products(precision, energy_bound, gradient_bound, k):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        points = random_rows(150, k)
        check(points, Potential(2.0), 0.0, None, energy_bound, gradient_bound)
        points = paired_rows(70, k, 1e-3, pairs=1)
        check(points, Potential(2.0), 0.0, None, energy_bound, gradient_bound)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [3, 20, 131])
def test_half_precision_rows_are_exact(dtype, k):
    check(random_rows(70, k, dtype=dtype), Potential(2.0))


@pytest.mark.parametrize("k", [3, 20, 131])
@pytest.mark.parametrize("magnitude", [1e-25, 1e25])
def test_magnitude_of_rows(magnitude, k):
    points = random_rows(40, k)
    points[::2] *= magnitude
    pair = Potential(2.0)
    energy, gradient = gpu.sweep(points, [40], [1.0], pair, 0.0, True)
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
    _, gradient = check(points, Potential(2.0, half_space), eps)
    if eps == 0.0:
        assert (gradient[[0, 40, 65]] == 0).all()


@pytest.mark.parametrize("k", [3, 20, 131])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "pair", [Potential(2.0), Potential(0.0, True), Potential(1.0, True, True)], ids=str
)
def test_bad_rows_stay_in_their_set(pair, bad, k):
    points = random_rows(90, k)
    points[50, k - 1] = bad
    for with_gradient in (True, False):
        energy, gradient = gpu.sweep(points, [40, 30, 20], [1.0] * 3, pair, 0.0, with_gradient)
        assert energy.isnan().tolist() == [False, True, False]
    expected, _ = truth(points[:40], [40], [1.0], pair, 0.0)
    assert relative_error(energy[0], expected[0]) <= 1e-6
    assert torch.isfinite(gradient[:40]).all() if gradient is not None else True


def test_no_rows():
    for k in (0, 3):
        energy, gradient = gpu.sweep(torch.zeros(0, k), [0, 0], [1.0, 1.0], Potential(), 0.0, True)
        assert energy.tolist() == [0.0, 0.0] and gradient.shape == (0, k)
    points = random_rows(3, 2)
    energy, gradient = gpu.sweep(points, [0, 1, 0, 2], [1.0] * 4, Potential(), 0.0, True)
    assert energy[:3].tolist() == [0.0, 0.0, 0.0] and energy[3] > 0
    assert gradient[0].tolist() == [0.0, 0.0]


def test_no_columns():
    energy, gradient = gpu.sweep(torch.zeros(4, 0), [4], [1.0], Potential(2.0), 0.0, True)
    assert abs(energy.item() - 3.0) <= 1e-6 and gradient.shape == (4, 0)


def test_float64_is_refused():
    with pytest.raises(TypeError, match="float32, float16 or bfloat16"):
        gpu.sweep(torch.zeros(4, 3, dtype=torch.float64), [4], [1.0], Potential(), 0.0, True)


# --- projection -----------------------------------------------------------------------------------


# in eight dimensions the rows are far enough apart not to feel that p is rounded to float32
@pytest.mark.parametrize("k", [8, 40, 130], ids=["direct", "pairwise", "large_k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projection_of_weights_of_any_width(dtype, k):
    weights = [random_rows(70, 50, dtype=dtype), random_rows(33, 27, seed=1, dtype=dtype)]
    matrices = [
        random_rows(c * k, w.shape[1], seed=2 + c, dtype=dtype).view(c, k, -1)
        for c, w in zip((2, 1), weights, strict=True)
    ]
    sizes, scales, pair = [70, 70, 33], [1.0, 2.0, 3.0], Potential(2.0, k != 8)
    LAUNCHES.clear()
    energy, gradient = backend.project_sweep(weights, matrices, scales, pair, 1e-4, True)
    if k < 130:
        assert sum(LAUNCHES.values()) <= 5
    exact = [w.double().requires_grad_() for w in (*weights, *matrices)]
    rows = torch.cat([(w @ m.mT).flatten(0, 1) for w, m in zip(exact[:2], exact[2:], strict=True)])
    expected, _ = truth(rows.detach(), sizes, scales, pair, 1e-4)
    assert relative_error(energy, expected) <= 1e-6
    _, row_gradient = truth(rows.detach(), sizes, scales, pair, 1e-4)
    assert relative_error(gradient, row_gradient) <= 2e-6
    wanted = torch.autograd.grad(rows, exact, row_gradient)
    first = 0
    for i, (w, m) in enumerate(zip(weights, matrices, strict=True)):
        end = first + m.shape[0] * w.shape[0]
        part = gradient[first:end].view(m.shape[0], w.shape[0], k)
        grad_weight, grad_matrix = backend.projection_gradients(part, w, m)
        assert relative_error(grad_weight, wanted[i]) <= 2e-6
        assert relative_error(grad_matrix, wanted[2 + i]) <= 2e-6
        first = end


# --- launches and tables --------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "most"), [(3, 4), (20, 5)])
def test_launches_do_not_grow_with_the_sets(k, most):
    counts = []
    for sizes in ([20], [3, 20, 64, 1, 65, 7]):
        points = random_rows(sum(sizes), k)
        LAUNCHES.clear()
        gpu.sweep(points, sizes, [1.0] * len(sizes), Potential(), 0.0, True)
        counts.append(sum(LAUNCHES.values()))
    assert counts[0] == counts[1] <= most


def test_runs_are_equal_to_the_bit():
    points = paired_rows(140, 20, 1e-3)
    runs = [gpu.sweep(points, [75, 65], [1.0, 2.0], Potential(), 0.0, True) for _ in range(2)]
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


def test_memory_of_the_slots_is_bounded():
    for n, k in ((4096, 32), (16384, 32), (1_000_000, 64)):
        splits = plan.splits_for((n,), 128, k, plan.row_width(k), True)
        work = plan.make_plan((n,), 128, 64, splits, False, torch.device("cpu"))
        slots = work.num_items * 128 * (4 * k + 12)
        rows = work.packed_rows * (4 * plan.row_width(k) + 12) + 4 * n * k
        assert slots + rows <= max(8 * n * k * 4, 2 * plan.SMALL_BYTES)


def test_too_many_rows():
    with pytest.raises(ValueError, match="at most 2\\^31"):
        plan.make_plan((2**31,), 128, 64, 1, False, torch.device("cpu"))


def test_nothing_was_left_out():
    """Runs last: every constant branch of every kernel was taken above."""
    wanted = set()
    for kind, half, angle, force in itertools.product(range(4), *[(False, True)] * 3):
        pair = (kind, half, angle, force)
        wanted.add(("finish_kernel", *pair, None))
        for name in (
            "pairwise_kernel",
            "near_pairs_kernel",
            "direct_kernel",
            "coefficient_kernel",
            "near_block_kernel",
        ):
            wanted.add((name, *pair, not force))
    wanted |= {(f"{name}_kernel", *[None] * 5) for name in ("normalize", "total")}
    wanted |= {("project_normalize_kernel", "COLUMNS", columns) for columns in (False, True)}
    wanted |= {("direct_kernel", "K", k) for k in range(1, plan.MAX_DIRECT + 1)}
    wanted |= {("normalize_kernel", "COLUMNS", columns) for columns in (False, True)}
    for width in (16, 32, 64, 128):
        wanted |= {(f"{name}_kernel", "WIDTH", width) for name in ("pairwise", "near_pairs")}
    for terms in (1, 3):
        wanted |= {("pairwise_kernel", f"{what}_TERMS", terms) for what in ("COSINE", "FORCE")}
        wanted.add(("coefficient_kernel", "FORCE_TERMS", terms))
    assert not wanted - SEEN
