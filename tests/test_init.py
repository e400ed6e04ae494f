"""The initializer of least energy: known optima, what it keeps, when it stops."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import comhe_ext
from comhe_ext import bounds
from comhe_ext.init import minimum_energy_, minimum_energy_model_
from comhe_ext.testing import random_rows, relative_error


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def excess(weight, **options):
    """What is left of the distance from random directions to the lower bound."""
    n, d = weight.shape
    random, lowest = (f(n, d, **options) for f in (bounds.random_energy, bounds.lowest_energy))
    energy = float(comhe_ext.hyperspherical_energy(weight.detach().double(), **options))
    return (energy - lowest) / (random - lowest)


def test_unprojected_rows_reach_the_simplex_and_the_orthogonal_rows():
    weight = minimum_energy_(random_rows(12, 30), half_space=False)
    assert excess(weight) < 1e-3
    cosines = nn.functional.normalize(weight) @ nn.functional.normalize(weight).T
    off_diagonal = cosines[~torch.eye(12, dtype=torch.bool)]
    assert bool((off_diagonal + 1 / 11).abs().max() < 1e-2)
    assert excess(minimum_energy_(random_rows(12, 30)), half_space=True) < 1e-3


@pytest.mark.parametrize(("n", "d"), [(64, 64), (100, 50), (40, 120)])
def test_projected_rows_come_near_the_bound(n, d):
    weight = random_rows(n, d)
    assert excess(weight, half_space=True) > 0.9
    minimum_energy_(weight, steps=200, generator=generator())
    assert excess(weight, half_space=True) < 0.06


def test_lengths_and_dead_rows_stay():
    weight = random_rows(30, 60)
    weight[4] = 0
    lengths = weight.norm(dim=1)
    assert minimum_energy_(weight, steps=5, generator=generator()) is weight
    assert relative_error(weight.norm(dim=1), lengths) <= 1e-6
    assert not weight[4].any()


def test_a_generator_decides():
    first, second, third = (random_rows(30, 60) for _ in range(3))
    minimum_energy_(first, steps=5, generator=generator())
    minimum_energy_(second, steps=5, generator=generator())
    minimum_energy_(third, steps=5, generator=generator(2))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_stops_on_a_plateau():
    calls = []

    def count(weight, **options):
        drawn = generator()
        minimum_energy_(weight, generator=drawn, num_projections=1, **options)
        calls.append(drawn.get_state())
        return weight

    # at its optimum from the start: nothing is won, so two windows are enough
    optimum = nn.init.orthogonal_(torch.empty(50, 50), generator=generator())
    count(optimum.clone(), steps=300, patience=20)
    count(optimum.clone(), steps=40, patience=20, tolerance=0.0)
    assert torch.equal(*calls)
    # without tolerance all steps are made
    calls.clear()
    weight = random_rows(50, 50)
    count(weight.clone(), steps=60, patience=20, tolerance=0.0)
    drawn = generator()
    for _ in range(60):
        comhe_ext.random_projection(1, 40, 50, generator=drawn)
    assert torch.equal(calls[0], drawn.get_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_shapes(dtype):
    weight = random_rows(20, 54, dtype=dtype).view(20, 6, 3, 3)
    before = float(comhe_ext.hyperspherical_energy(weight.flatten(1), half_space=True))
    minimum_energy_(weight, steps=50, generator=generator())
    assert weight.dtype == dtype
    assert float(comhe_ext.hyperspherical_energy(weight.flatten(1), half_space=True)) < before


def test_parameters_stay_leaves():
    layer = nn.Linear(60, 30)
    minimum_energy_(layer.weight, steps=3)
    assert layer.weight.is_leaf and layer.weight.requires_grad and layer.weight.grad is None


def test_every_layer_of_a_model():
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(4, 16, 3, groups=2),
        nn.ConvTranspose2d(16, 12, 3),
        nn.utils.parametrizations.weight_norm(nn.Linear(60, 30)),
        nn.Linear(30, 5),
    )
    head = net[3].weight.detach().clone()
    before = comhe_ext.CoMHE(net, output_layer=None).energies()
    norms = net[2].parametrizations.weight.original0.detach().clone()
    assert minimum_energy_model_(net, exclude=["3"], steps=60, generator=generator()) is net
    after = comhe_ext.CoMHE(net, output_layer=None).energies()
    assert torch.equal(net[3].weight, head)
    for name in ("0", "1", "2"):
        assert after[name].energy < before[name].energy
    assert relative_error(net[2].parametrizations.weight.original0, norms) <= 1e-6


def test_progress_bar(capsys):
    minimum_energy_(random_rows(5, 3), steps=3, progress=True)
    assert "minimum_energy_: 100%" in capsys.readouterr().err
    minimum_energy_model_(nn.Sequential(nn.Linear(4, 5)), steps=3, progress=True)
    assert "0: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "`steps` must be at least 1, got 0", dict(steps=0)),
        (ValueError, "`num_projections` must be at least 1", dict(num_projections=0)),
        (ValueError, "`patience` must be at least 1", dict(patience=0)),
        (ValueError, "`lr` must be at least 0, got -1", dict(lr=-1)),
        (TypeError, "`tolerance` must be a number", dict(tolerance=None)),
        (ValueError, "`s` must be finite", dict(s=-1.0)),
        (ValueError, "`backend` must be one of", dict(backend="numpy")),
    ],
)
def test_messages(error, message, options):
    weight = random_rows(5, 4)
    before = weight.clone()
    with pytest.raises(error, match=message):
        minimum_energy_(weight, **options)
    net = nn.Linear(4, 5)
    with pytest.raises(error, match=message):
        minimum_energy_model_(net, **options)
    assert torch.equal(weight, before)


def test_what_is_not_a_weight():
    with pytest.raises(ValueError, match="at least 2-D"):
        minimum_energy_(torch.ones(3))
    with pytest.raises(TypeError, match="must be a torch.Tensor"):
        minimum_energy_([1.0])


@pytest.mark.long
def test_memory_of_a_large_layer():
    # in a process of its own: the peak is the process's. The weight alone is 224 MiB
    code = """
import re, torch
from pathlib import Path
from comhe_ext.init import minimum_energy_

def peak():
    return int(re.findall(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[0])

weight = torch.randn(14336, 4096)
minimum_energy_(torch.randn(100, 60), steps=2)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
minimum_energy_(weight, steps=2)
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) <= 1.2 * 1024**2
