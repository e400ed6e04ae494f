"""What energies are compared with: closed forms, known optima, and random draws."""

import math

import pytest
import torch

import comhe_ext
from comhe_ext import bounds, testing


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
    assert bounds.random_energy(9, d, 1.0) == pytest.approx(s1, abs=5e-6)
    assert bounds.random_energy(9, d, 2.0) == pytest.approx(s2, abs=5e-6)
    assert bounds.random_energy(9, d, 2.0) == pytest.approx((d - 2) / (2 * (d - 3)), rel=1e-12)
    assert 2 * bounds.random_energy(9, d, 0.0) == pytest.approx(log, abs=5e-6)


def test_angles_of_random_directions():
    # on the sphere E[1/theta] = Si(pi)/2, on the circle theta is uniform
    assert bounds.random_energy(9, 3, 1.0, angular=True) == pytest.approx(
        0.9259685259911, rel=1e-12
    )
    circle = bounds.random_energy(9, 2, 0.5, angular=True)
    assert circle == pytest.approx(2 / math.sqrt(math.pi), rel=1e-9)
    log = bounds.random_energy(9, 2, 0.0, angular=True)
    assert log == pytest.approx(1 - math.log(math.pi), rel=1e-9)


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize(("d", "s"), [(12, 0.0), (12, 1.0), (30, 2.0), (40, 3.5)])
def test_random_rows_have_it(d, s, angular, half_space):
    options = dict(half_space=half_space, angular=angular)
    sets = testing.random_rows(100 * 64, d).view(100, 64, d)
    energies = comhe_ext.hyperspherical_energy(sets, s, min_distance=0.0, **options).double()
    expected = bounds.random_energy(64, d, s, **options)
    assert abs(float(energies.mean()) - expected) <= 5 * float(energies.std()) / 10
    assert float(energies.min()) > bounds.lowest_energy(64, d, s, **options)


def test_where_the_mean_does_not_exist():
    assert bounds.random_energy(5, 3, 2.0) == math.inf
    assert bounds.random_energy(5, 1, 0.0) == math.inf
    assert bounds.random_energy(1, 3, 2.0) == 0.0
    assert math.isfinite(bounds.random_energy(5, 3, 1.99, angular=True))


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
        lowest = bounds.lowest_energy(n, d, s, half_space=half_space, angular=angular)
        assert float(energy) == pytest.approx(lowest, rel=1e-12, abs=1e-14)


def test_nothing_to_compare():
    for function in (bounds.random_energy, bounds.lowest_energy):
        assert function(0, 5, half_space=True) == 0.0
        assert function(1, 5) == 0.0
        assert function(1, 5, half_space=True) == pytest.approx(0.25)  # a row and its antipode
