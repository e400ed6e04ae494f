"""Times of our own operations on one thread, to notice when a change makes one slower.

    pytest bench --benchmark-only

`test_yardstick` does not use comhe_ext: if its time changes, too, the machine has changed.
"""

import time
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import comhe_ext
from bench.cases.models import digits_network
from bench.cases.sweep import Shape, points
from bench.peers import METHODS, OURS, Mode, run
from comhe_ext import backends
from comhe_ext.functional import AngleKind

# on one thread the processor's time is less noisy than the wall clock
pytestmark = pytest.mark.benchmark(timer=time.process_time, min_rounds=9)

BACKENDS = [name for name in OURS if backends.unavailable(METHODS[name].backend or "torch") is None]
SHAPES = [Shape(1, 1024, 30), Shape(16, 512, 40), Shape(1, 4096, 30), Shape(1, 2048, 256)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", BACKENDS)
@pytest.mark.parametrize("mode", ["gradient", "energy"])
def test_energy(benchmark: BenchmarkFixture, mode: Mode, method: str, shape: Shape) -> None:
    benchmark(run, METHODS[method].load(), points(shape, "cpu"), mode)


@pytest.mark.parametrize("method", BACKENDS)
def test_second_order(benchmark: BenchmarkFixture, method: str) -> None:
    benchmark(run, METHODS[method].load(), points(SHAPES[0], "cpu"), "second order")


@pytest.mark.parametrize("kind", get_args(AngleKind))
@pytest.mark.parametrize("projections", [1, 8])
def test_angle_preserving_loss(
    benchmark: BenchmarkFixture, projections: int, kind: AngleKind
) -> None:
    weight = torch.randn(1024, 576)
    matrices = torch.randn(projections, 30, 576, requires_grad=True)

    def step() -> None:
        comhe_ext.angle_preserving_loss(weight, matrices, kind=kind).backward()

    benchmark(step)


def test_regularizer(benchmark: BenchmarkFixture) -> None:
    model = digits_network()
    comhe = comhe_ext.CoMHE(model)

    def step() -> None:
        comhe().backward()

    benchmark(step)


def test_yardstick(benchmark: BenchmarkFixture) -> None:
    left = torch.ones(512, 512)
    benchmark(lambda: (left @ left).reciprocal().sum())
