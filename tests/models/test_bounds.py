"""What energies are compared with: closed forms, known optima, and random draws."""

import math
from dataclasses import replace

import pytest
import torch

import comhe_ext
from comhe_ext import bounds, testing
from comhe_ext.kernels.pair_functions import Laplace, Riesz


def random_energy(n, d, s=2.0, *, min_distance=0.0, **space):
    return bounds.random_energy(n, d, Riesz(s, min_distance=min_distance, **space))


def lowest_energy(n, d, s=2.0, *, min_distance=1e-3, eps=0.0, dead=None, **space):
    return bounds.lowest_energy(
        n, d, Riesz(s, min_distance=min_distance, **space), eps=eps, dead=dead
    )


@pytest.mark.parametrize(
    ("d", "s1", "s2", "log"),
    [  # facts of the Beta distribution; the last column is of -log r^2
        (10, 0.74097, 0.57143, -0.63452),
        (40, 0.71412, 0.51351, -0.68016),
        (576, 0.70757, 0.50087, -0.69228),
        (4096, 0.70717, 0.50012, -0.69303),
    ],
)
def test_chords_of_random_directions(d, s1, s2, log):
    assert random_energy(9, d, 1.0) == pytest.approx(s1, abs=5e-6)
    assert random_energy(9, d, 2.0) == pytest.approx(s2, abs=5e-6)
    assert random_energy(9, d, 2.0) == pytest.approx((d - 2) / (2 * (d - 3)), rel=1e-12)
    assert 2 * random_energy(9, d, 0.0) == pytest.approx(log, abs=5e-6)


def test_angles_of_random_directions():
    # on the sphere E[1/theta] = Si(pi)/2, on the circle theta is uniform
    assert random_energy(9, 3, 1.0, angular=True) == pytest.approx(0.9259685259911, rel=1e-12)
    circle = random_energy(9, 2, 0.5, angular=True)
    assert circle == pytest.approx(2 / math.sqrt(math.pi), rel=1e-9)
    log = random_energy(9, 2, 0.0, angular=True)
    assert log == pytest.approx(1 - math.log(math.pi), rel=1e-9)


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize(("d", "s"), [(12, 0.0), (12, 1.0), (30, 2.0), (40, 3.5)])
def test_random_rows_have_it(d, s, angular, half_space):
    options = dict(half_space=half_space, angular=angular)
    sets = testing.random_rows(100 * 64, d).view(100, 64, d)
    energies = comhe_ext.hyperspherical_energy(sets, s, min_distance=0.0, **options).double()
    expected = random_energy(64, d, s, **options)
    assert abs(float(energies.mean()) - expected) <= 5 * float(energies.std()) / 10
    assert float(energies.min()) > lowest_energy(64, d, s, **options)


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize(
    "pair",
    [Riesz(-1.0), Riesz(-1.8), Riesz(-0.5, min_distance=0.0), Riesz(2.0, shift=0.5), Laplace(2.0)],
    ids=["s=-1", "s=-1.8", "s=-0.5", "shift", "Laplace"],
)
def test_random_rows_of_functions_without_a_singularity(pair, angular, half_space):
    pair = replace(pair, half_space=half_space, angular=angular)
    sets = testing.random_rows(100 * 64, 12, dtype=torch.float64).view(100, 64, 12)
    sets[:50] = torch.nn.functional.normalize(sets[:50]) + 0.5  # closer to each other
    energies = comhe_ext.pair_energy(sets, pair=pair)
    expected, lowest = bounds.random_energy(64, 12, pair), bounds.lowest_energy(64, 12, pair)
    rounding = 1e-12 * abs(expected)
    random = energies[50:]
    error = 5 * float(random.std()) / math.sqrt(50)
    assert abs(float(random.mean()) - expected) <= error + rounding
    assert float(energies.min()) >= lowest - rounding
    # all of them in two opposite directions, which large negative exponents prefer
    poles = torch.ones(64, 12, dtype=torch.float64)
    poles[::2] *= -1
    assert float(comhe_ext.pair_energy(poles, pair=pair)) >= lowest - rounding


def test_where_the_mean_does_not_exist():
    assert random_energy(5, 3, 2.0) == math.inf
    assert random_energy(5, 1, 0.0) == math.inf
    assert random_energy(1, 3, 2.0) == 0.0
    assert math.isfinite(random_energy(5, 3, 1.99, angular=True))
    # on a line, half of the pairs of directions coincide
    finite = random_energy(5, 1, 2.0, min_distance=0.5)
    assert finite == pytest.approx((3 * 0.5**-2 + 0.25) / 2)
    assert math.isfinite(random_energy(5, 3, 40.0, min_distance=1e-3))


@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize("s", [0.0, 1.0, 2.0, 2.5])
def test_known_optima_reach_the_bound(s, angular):
    for rows, half_space in (
        (testing.simplex(7), False),
        (torch.eye(6, dtype=torch.float64), True),
        (testing.icosahedron()[[0, 1, 4, 5, 8, 9]], True),  # six lines in space at equal angles
        (torch.eye(2, dtype=torch.float64)[:1], True),
    ):
        n, d = rows.shape
        d = d - 1 if not half_space else d  # the simplex lies in a hyperplane
        energy = comhe_ext.hyperspherical_energy(rows, s, half_space=half_space, angular=angular)
        options = dict(half_space=half_space, angular=angular)
        lowest = lowest_energy(n, d, s, dead=0, **options)
        if s == 0 and angular and not half_space:  # there it is not the optimum
            assert lowest < float(energy) < lowest + 0.05
        else:
            assert float(energy) == pytest.approx(lowest, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize("s", [1.0, 2.0, 3.5])
def test_dead_rows_reach_the_bound_of_half_space(s, angular):
    # d rows are orthogonal to each other; the others are dead, which is orthogonal to all
    rows = torch.zeros(7, 3, dtype=torch.float64)
    rows[[0, 2, 5]] = 4 * torch.eye(3, dtype=torch.float64)
    options = dict(half_space=True, angular=angular)
    energy = float(comhe_ext.hyperspherical_energy(rows, s, **options))
    assert energy == pytest.approx(lowest_energy(7, 3, s, **options), rel=1e-12)
    assert energy == pytest.approx(lowest_energy(7, 3, s, dead=4, **options), rel=1e-12)
    assert energy < lowest_energy(7, 3, s, dead=0, **options)
    all_dead = float(comhe_ext.hyperspherical_energy(torch.zeros_like(rows), s, **options))
    lowest = lowest_energy(7, 3, s, dead=7, **options)
    assert all_dead == pytest.approx(lowest, rel=1e-12)


def test_antipodal_pairs_are_better_than_the_simplex_by_the_logarithm_of_the_angle():
    for k in (2, 3, 6):
        energy = comhe_ext.hyperspherical_energy(testing.cross_polytope(k), 0.0, angular=True)
        simplex = comhe_ext.hyperspherical_energy(testing.simplex(2 * k), 0.0, angular=True)
        assert lowest_energy(2 * k, k, 0.0, angular=True) <= float(energy) < float(simplex)


def descended(rows, alive, steps=25, **options):
    """The least energy of each set met on the way down from where it starts."""
    rows = rows.clone().requires_grad_()
    descent = torch.optim.Adam([rows], lr=0.1)
    least = torch.full((len(rows),), math.inf, dtype=torch.float64)
    for _ in range(steps):
        energies = comhe_ext.hyperspherical_energy(rows * alive, **options)
        least = torch.minimum(least, energies.detach())
        descent.zero_grad()
        energies.sum().backward()
        descent.step()
    return least


@pytest.mark.parametrize("min_distance", [1e-3, 0.7, 1.5, 1.95])
@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize("half_space", [False, True])
def test_no_rows_undercut_it(half_space, angular, eps, min_distance):
    shared = dict(half_space=half_space, angular=angular, eps=eps, min_distance=min_distance)
    for n, d in ((3, 2), (4, 2), (6, 3), (9, 3), (5, 6)):
        starts = testing.random_rows(12 * n, d, dtype=torch.float64).view(12, n, d)
        alive = torch.ones(12, n, 1, dtype=torch.float64)
        # opposite rows and equal rows, short rows and dead rows
        axes = torch.eye(d, dtype=torch.float64)
        row = torch.arange(n)
        starts[0] = axes[row // 2 % d] * (1 - 2 * (row % 2)).unsqueeze(1) + 0.01 * starts[0]
        starts[1] = axes[row % d] * (1 - 2 * (row // d % 2)).unsqueeze(1) + 0.01 * starts[1]
        starts[2] = axes[row % d] + 1e-6 * starts[2]
        starts[3:6] *= 0.1
        for index in range(6, 12):
            alive[index, : index - 5] = 0
        for s in (0.0, 1.0, 5.0):
            least = descended(starts, alive, s=s, **shared)
            lowest = lowest_energy(n, d, s, **shared)
            assert math.isfinite(lowest)
            assert float(least.min()) >= lowest - 1e-9 * abs(lowest), (n, d, s)
            if eps == 0:
                for index in range(12):
                    dead = int((alive[index] == 0).sum())
                    bound = lowest_energy(n, d, s, dead=dead, **shared)
                    assert bound >= lowest - 1e-12 * abs(lowest), (n, d, s)
                    assert float(least[index]) >= bound - 1e-9 * abs(bound), (n, d, s)


@pytest.mark.parametrize("d", [2, 3, 12])
def test_random_energy_with_a_tangent_line(d):
    if d == 3:  # r^2 is uniform on the sphere
        for m in (1e-3, 0.5, 1.9):
            expected = 5 / 12 + math.log(2 / m) / 2
            assert random_energy(9, 3, 2.0, min_distance=m) == pytest.approx(expected, rel=1e-12)
    if d == 12:  # a tangent line below all distances changes nothing
        for s in (0.0, 1.0, 2.5):
            assert random_energy(9, d, s, min_distance=1e-3) == pytest.approx(
                random_energy(9, d, s), rel=1e-12
            )
    sets = testing.random_rows(200 * 40, d, dtype=torch.float64).view(200, 40, d)
    for angular in (False, True):
        for half_space in (False, True):
            options = dict(angular=angular, half_space=half_space, min_distance=0.6)
            for s in (0.0, 1.0, 3.0):
                energies = comhe_ext.hyperspherical_energy(sets, s, **options)
                expected = random_energy(40, d, s, **options)
                deviation = float(energies.std()) / math.sqrt(200)
                assert abs(float(energies.mean()) - expected) <= 5 * deviation, (s, options)


def test_nothing_to_compare():
    for function in (random_energy, lowest_energy):
        assert function(0, 5, half_space=True) == 0.0
        assert function(1, 5) == 0.0
        assert function(1, 5, half_space=True) == pytest.approx(0.25)  # a row and its antipode
