"""Pair functions that are bounded where rows coincide, run by Triton's interpreter.

Collected only for `test_triton_interpreter.py`, as `triton_interpreter_checks.py` is.
"""

import pytest
import torch

from comhe_ext.kernels import gpu
from comhe_ext.kernels.pair_functions import Laplace, Riesz
from comhe_ext.testing import paired_rows, random_rows, reference, relative_error, sweep_of

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    # the interpreter computes what a mask discards, in numpy, and numpy says so
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    # Triton 3.6's own, under numpy 2.3; from numpy 2.4 on its interpreter does not work
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning:triton"),
]

PAIRS = [
    Riesz(-0.5),
    Riesz(-1.0),
    Riesz(-1.5, min_distance=0.05),
    Riesz(-1.0, half_space=True),
    Riesz(-0.5, angular=True),
    Riesz(-1.5, angular=True, min_distance=0.05),
    Riesz(2.0, shift=0.5),
    Riesz(0.0, shift=0.3),
    Riesz(0.0, shift=1.0, half_space=True),
    Riesz(3.0, shift=1e-3),
    Riesz(1.0, shift=10.0, half_space=True),
    Riesz(-1.0, shift=0.2, half_space=True),
    Riesz(1.0, shift=0.1, angular=True),
    Riesz(0.0, shift=0.5, angular=True),
    Laplace(2.0),
    Laplace(0.5, half_space=True),
    Laplace(3.0, angular=True),
    Laplace(2.0, half_space=True, angular=True),
    Laplace(30.0),
]


def truth(points, pair, eps):
    """Energy and gradient of a set, float64."""
    points = points.double().requires_grad_()
    function = (
        (lambda t: (-pair.tau * t).exp())
        if isinstance(pair, Laplace)
        else (lambda t: reference._pair_function(t, pair.s, pair.min_distance, pair.shift))
    )
    energy = reference.pair_energy(
        points, function, half_space=pair.half_space, angular=pair.angular, eps=eps
    )
    (gradient,) = torch.autograd.grad(energy, points)
    return energy.detach(), gradient


def check(points, pair, eps=0.0, gradient_bound=2e-6):
    n = len(points)
    scale = pair.scale(n, "mean")
    energy, gradient = sweep_of(gpu, points, [n], [scale], pair, eps, True)
    alone, _ = sweep_of(gpu, points, [n], [scale], pair, eps, False)
    expected, expected_gradient = truth(points, pair, eps)
    assert relative_error(energy[0], expected, 0.1) <= 1e-6
    assert relative_error(alone[0], expected, 0.1) <= 1e-6
    assert gradient.isfinite().all()
    assert relative_error(gradient, expected_gradient) <= gradient_bound
    return gradient


# on the CUDA cores all of them, on tensor cores every third, and all in the long suite
every_pair_and_width = pytest.mark.parametrize(
    ("pair", "k"),
    [
        pytest.param(pair, k, marks=[pytest.mark.long] if k > 8 and number % 3 else [])
        for number, pair in enumerate(PAIRS)
        for k in (3, 20)
    ],
    ids=str,
)


@every_pair_and_width
def test_bounded_pair_functions(pair, k):
    assert gpu.supports(pair)
    check(random_rows(70, k), pair)
    antipodal = pair.two_ended
    for angle in (1e-2, 1e-4):
        check(paired_rows(40, k, angle, pairs=1, antipodal=antipodal), pair, 1e-6, 1e-5)


@pytest.mark.parametrize("pair", [PAIRS[i] for i in (1, 3, 6, 8, 15)], ids=str)
def test_bounded_pair_functions_of_many_columns(pair):
    check(random_rows(40, 130), pair)


@every_pair_and_width
def test_bounded_pair_functions_of_coincident_rows(pair, k):
    points = random_rows(9, k)
    points[7] = 3.0 * points[2]
    check(points, pair, gradient_bound=1e-5)
    _, gradient = sweep_of(gpu, points[[2, 2]], [2], [1.0], pair, 0.0, True)
    # no direction, or nearly none
    assert gradient.abs().max() <= 1e-5


def test_pair_functions_whose_sides_cancel_are_left_to_others():
    for pair in (
        Riesz(-1.5, half_space=True),
        Riesz(-0.5, half_space=True, angular=True),
        Riesz(1.0, shift=0.5, half_space=True, angular=True),
        Laplace(0.5, half_space=True, angular=True),
    ):
        assert not gpu.supports(pair)
