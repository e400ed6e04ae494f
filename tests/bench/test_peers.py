"""What is measured computes what it claims, and the truth catches what does not."""

import math
import sys
from pathlib import Path

import pytest
import torch

import comhe_ext
from comhe_ext import backends, testing

# it belongs to the checkout and is not installed; last, so that the checkout hides no package
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.cases import losses, models, projections, sampled, sweep
from bench.cases.sweep import Shape
from bench.measure.contest import errors, judged
from bench.peers import METHODS, naive_energy, run

SHAPE = Shape(2, 70, 9)
HERE = [
    (name, mode)
    for name, method in METHODS.items()
    if "cpu" in method.devices and not method.compiles
    if method.backend is None or backends.unavailable(method.backend) is None
    for mode in method.modes
]


@pytest.mark.parametrize(("name", "mode"), HERE)
def test_every_method_computes_the_energy(name, mode):
    energies, derivatives = run(METHODS[name].load(), sweep.points(SHAPE, "cpu"), mode)
    assert energies.shape == (2,)
    found = errors((energies, derivatives), sweep.truth(SHAPE, mode, "cpu"))
    assert found["value_error"] < 1e-6
    assert found.get("gradient_error", 0.0) < 2e-5
    assert ("gradient_error" not in found) == (mode == "energy")


@pytest.mark.parametrize("s", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("half_space", [False, True])
def test_the_naive_formula_is_the_definition(s, half_space):
    rows = testing.random_rows(40, 7, dtype=torch.float64)
    energy, gradient = testing.exact_energy_and_gradient(
        rows, s, half_space=half_space, min_distance=0.0
    )
    leaf = rows.requires_grad_()
    naive = naive_energy(leaf, s, half_space=half_space)
    assert testing.relative_error(naive, energy) < 1e-12
    (naive_gradient,) = torch.autograd.grad(naive, leaf)
    assert testing.relative_error(naive_gradient, gradient) < 1e-12


def test_the_truth_of_many_rows_is_that_of_few(monkeypatch):
    shape = Shape(2, 700, 5)
    whole = sweep.truth(shape, "gradient", "cpu")
    sweep.truth.cache_clear()
    monkeypatch.setattr(sweep, "MOST_ROWS", 600)
    found = errors(sweep.truth(shape, "gradient", "cpu"), whole)
    sweep.truth.cache_clear()
    assert 0.0 < found["value_error"] + found["gradient_error"] < 1e-10


@pytest.mark.parametrize("wrong", ["factor", "scaled gradient", "one row", "nan"])
def test_the_gate_catches_a_wrong_result(wrong):
    right = sweep.truth(SHAPE, "gradient", "cpu")
    energies, gradients = run(METHODS["naive"].load(), sweep.points(SHAPE, "cpu"), "gradient")
    assert gradients is not None
    assert "status" not in judged(errors((energies, gradients), right))
    if wrong == "factor":
        energies = energies * 1.001
    elif wrong == "scaled gradient":
        gradients = gradients * 1.01
    elif wrong == "one row":
        gradients[0, 3] = 0
    else:
        gradients[1, 5, 2] = math.nan
    assert judged(errors((energies, gradients), right))["status"] == "wrong"


def test_useful_work_is_counted_once_a_pair():
    assert Shape(3, 5, 7).pairs == 30
    assert Shape(3, 5, 7).flop == 30 * 6 * 7


# --- losses ---------------------------------------------------------------------------------------

LOSSES = [(name, method) for name, loss in losses.LOSSES.items() for method in loss.methods]


@pytest.mark.parametrize(("name", "method"), LOSSES)
def test_every_method_computes_the_loss(name, method):
    assert method in losses.METHODS
    loss = losses.LOSSES[name]
    shape = tuple(min(n, 70) for n in loss.shapes[0])
    result = losses.run(loss.methods[method], loss.inputs(*shape, "cpu"))
    found = errors(result, losses.truth(name, shape, "cpu"))
    assert found["value_error"] < 1e-6
    assert found["gradient_error"] < 2e-5


@pytest.mark.parametrize("rows", [5, 64, 200])
def test_row_blocks_are_the_whole(rows, monkeypatch):
    monkeypatch.setattr(losses, "block_rows", lambda columns: 64)
    formula = losses.Formula(losses.mean_of_others(torch.exp))
    x = testing.random_rows(rows, 6, dtype=torch.float64)
    whole = losses.run(lambda x: losses.dense(formula, x), [x])
    blocks = losses.run(lambda x: losses.in_row_blocks(formula, x), [x])
    for a, b in zip(blocks, whole, strict=True):
        assert testing.relative_error(a, b) < 1e-12


# --- models, projections, samples -----------------------------------------------------------------


def test_the_naive_regularizer_is_the_same():
    torch.manual_seed(0)
    net = models.digits_network()
    weights = [p for p in net.parameters() if p.dim() > 1]
    found = []
    for regularizer in (
        comhe_ext.CoMHE(net, projection=None, min_distance=0.0),
        models.NaiveCoMHE(net, None, "auto"),
    ):
        value = regularizer()
        found.append([value, *torch.autograd.grad(value, weights)])
    for ours, naive in zip(*found, strict=True):
        assert testing.relative_error(ours, naive) < 1e-5


@pytest.mark.parametrize("method", models.METHODS)
def test_a_step_of_a_model_with_and_without(method):
    step = models.make_step("digits", method, "cpu")
    assert models.check(step()) == models.check(step()) == {}
    assert models.check((torch.tensor(math.nan),))["status"] == "wrong"


@pytest.mark.parametrize("name", [*list(projections.KINDS)[:4], "fourier 20, blocks of 64"])
def test_kinds_of_projections_cost_and_err(name):
    method = {**projections.KINDS, **projections.SAMPLED}[name]
    projections.make_step("digits", method)()
    projections.make_projections("digits", method)()
    result = projections.make_gradients("2048 x 512", method, 1)()
    found = projections.check("2048 x 512", 1, result)
    # one draw against another of 20 Gaussian ones
    assert 0.0 < found["gradient_error"] < 3.0
    assert found["note"] == "1 draws against 20 Gaussian projections"


def test_draws_are_compared_with_the_exact_energy():
    call = sampled.make_draws("clusters", 2048, 256, 2, 4, 3)
    found = sampled.check_draws("clusters", 2048, call())
    energy = comhe_ext.hyperspherical_energy(sampled.points("clusters", 2048))
    assert found["value"] == pytest.approx(float(energy))
    assert found["draws"] == 3
    assert 0.0 < found["value_error"] < 0.1
    assert 0.0 < found["gradient_error"] < 1.0
    whole = sampled.make_draws("clusters", 2048, 2048, 2, 4, 1)()
    assert sampled.check_draws("clusters", 2048, whole)["gradient_error"] < 1e-5
