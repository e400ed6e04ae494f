"""Values and gradients of the authors' TensorFlow code, its steps rewritten in numpy."""

import numpy as np
import pytest
import torch

import comhe_ext
from comhe_ext.testing import random_rows


def authors_energy(columns, power, half_space, angular=False):
    """One layer's term of the released code; `columns` [d, N], a neuron is a column."""
    if half_space:
        columns = np.concatenate([columns, -columns], axis=1)
    n = columns.shape[1]
    norms = np.sqrt((columns**2).sum(0) + 1e-4)
    cosines = (columns.T @ columns) / np.outer(norms, norms)
    if angular:
        distance = np.arccos(cosines) / np.pi + 1e-4
    else:
        distance = 2.0 - 2.0 * cosines + np.eye(n)  # the square, the diagonal made harmless
    if power == 0:
        terms = -np.log(distance)
    else:
        terms = distance ** (-power if angular else -power / 2)
    return np.triu(terms, 1).sum() / (n * (n - 1) / 2)


def authors_gradient(columns, *options):
    """Central differences, at a step that float64 answers to eight digits."""
    gradient = np.zeros_like(columns)
    step = 1e-5 * np.linalg.norm(columns, axis=0).min()
    for index in np.ndindex(*columns.shape):
        there, back = columns.copy(), columns.copy()
        there[index] += step
        back[index] -= step
        rise = authors_energy(there, *options) - authors_energy(back, *options)
        gradient[index] = rise / (2 * step)
    return gradient


CASES = [(0.0, 2.0), (1.0, 1.0), (2.0, 1.0)]  # s, and what the code's value is of ours


@pytest.mark.parametrize(("s", "times"), CASES)
@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("size", [1.0, 0.02])  # in short rows eps = 1e-4 is no longer small
def test_energy_of_a_layer(s, times, half_space, size):
    weight = (size * random_rows(9, 5, dtype=torch.float64)).requires_grad_()
    energy = comhe_ext.hyperspherical_energy(weight, s, half_space=half_space, eps=1e-4)
    energy.backward()
    columns = weight.detach().numpy().T
    assert times * energy.item() == pytest.approx(authors_energy(columns, s, half_space), rel=1e-12)
    expected = authors_gradient(columns, s, half_space).T
    error = np.linalg.norm(times * weight.grad.numpy() - expected)
    assert error <= 1e-7 * np.linalg.norm(expected)


@pytest.mark.parametrize(("s", "times"), CASES)
@pytest.mark.parametrize("half_space", [False, True])
def test_energy_of_a_layer_in_float32(s, times, half_space, backend, device):
    weight = random_rows(150, 27, device=device)
    energy = comhe_ext.hyperspherical_energy(
        weight, s, half_space=half_space, eps=1e-4, backend=backend
    )
    columns = weight.double().cpu().numpy().T
    assert times * energy.item() == pytest.approx(authors_energy(columns, s, half_space), rel=1e-6)


@pytest.mark.parametrize("half_space", [False, True])
def test_energy_of_a_projected_layer(half_space):
    weight = random_rows(8, 11, dtype=torch.float64).requires_grad_()
    projection = comhe_ext.random_projection(3, 4, 11, dtype=torch.float64)
    energy = comhe_ext.compressive_energy(weight, projection, 2.0, half_space=half_space, eps=1e-4)
    energy.backward()

    def mean(columns):
        parts = [authors_energy(p @ columns, 2.0, half_space) for p in projection.numpy()]
        return sum(parts) / len(parts)

    columns = weight.detach().numpy().T
    assert energy.item() == pytest.approx(mean(columns), rel=1e-12)
    parts = [p.T @ authors_gradient(p @ columns, 2.0, half_space) for p in projection.numpy()]
    expected = (sum(parts) / len(parts)).T
    error = np.linalg.norm(weight.grad.numpy() - expected)
    assert error <= 1e-7 * np.linalg.norm(expected)


def test_two_equal_rows_are_kept_finite_by_eps():
    # the code's only guard: r^2 = 2 * 1e-4 / (|w|^2 + 1e-4)
    weight = torch.tensor([[0.6, 0.8], [0.6, 0.8]], dtype=torch.float64)
    energy = comhe_ext.hyperspherical_energy(weight, 2.0, eps=1e-4, min_distance=0.0)
    assert energy.item() == pytest.approx((1 + 1e-4) / 2e-4, rel=1e-9)


def test_conversion_of_the_angle():
    # theirs: arccos(c) / pi + 1e-4; without the 1e-4 the energies differ by powers of pi
    weight = random_rows(12, 6, dtype=torch.float64)
    ours = comhe_ext.hyperspherical_energy(weight, 1.0, angular=True, eps=1e-4)
    theirs = authors_energy(weight.numpy().T, 1.0, False, angular=True)
    assert np.pi * ours.item() == pytest.approx(theirs, rel=1e-3)
