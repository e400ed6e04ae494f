"""The portable sweep where a look at a tensor waits for the device, as on a GPU."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from comhe_ext.kernels import portable
from comhe_ext.kernels.pair_functions import Gaussian, Riesz
from comhe_ext.kernels.portable import near_pairs
from comhe_ext.kernels.sweep import NearestRequest, SweepRequest
from comhe_ext.testing import paired_rows, random_rows, relative_error

PAIRS = [
    Riesz(2.0),
    Riesz(0.0, half_space=True),
    Riesz(1.0, angular=True),
    Riesz(2.0, min_distance=0.3, half_space=True),
    Gaussian(2.0),
]


@pytest.fixture
def asynchronous(monkeypatch):
    """Let the processor count as a device that answers late."""

    def switch(on):
        monkeypatch.setattr(near_pairs, "answers_at_once", lambda device: not on)

    return switch


class Questions(TorchDispatchMode):
    """Counts the operators whose result Python has to wait for."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal"):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def request_of(rows, pair, sizes):
    return SweepRequest(rows, sizes, [pair.scale(n, "mean") for n in sizes], pair, 1e-4)


def cross_request_of(rows, columns, pair):
    ids = [(torch.arange(len(x)) % 50).int() for x in (rows, columns)]
    return SweepRequest(
        rows,
        [len(rows)],
        [1.0 / max(len(rows) * len(columns), 1)],
        pair,
        1e-4,
        columns=columns,
        row_ids=ids[0],
        column_ids=ids[1],
        row_weights=torch.linspace(0.5, 2.0, len(rows)),
        row_energies=True,
    )


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_near_pairs_found_after_the_last_tile_are_the_same(pair, asynchronous):
    # twins in one tile and in two, in several sets
    rows = torch.cat([paired_rows(n, 20, 1e-3, antipodal=pair.two_ended) for n in (60, 700, 60)])
    tangents = random_rows(*rows.shape, seed=3)
    request = request_of(rows, pair, [60, 700, 60])
    asynchronous(False)
    expected = portable.sweep(request), portable.hessian_vector_product(request, tangents)
    asynchronous(True)
    actual = portable.sweep(request), portable.hessian_vector_product(request, tangents)
    assert relative_error(actual[0].energy, expected[0].energy) <= 1e-7
    assert relative_error(actual[0].gradient, expected[0].gradient) <= 1e-7
    assert relative_error(actual[1], expected[1]) <= 1e-7


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_near_pairs_of_rows_and_columns_found_after_the_last_tile_are_the_same(pair, asynchronous):
    both = paired_rows(1200, 20, 1e-3, antipodal=pair.two_ended)
    request = cross_request_of(both[:570], both[570:], pair)
    tangents = random_rows(570, 20, seed=3)

    def results():
        product = portable.cross_hessian_vector_product(request, tangents)
        return *portable.sweep(request), *product

    asynchronous(False)
    expected = results()
    asynchronous(True)
    for x, y in zip(results(), expected, strict=True):
        assert relative_error(x, y) <= 1e-7


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_device_is_asked_once_a_sweep(pair, asynchronous):
    asynchronous(True)
    rows = torch.nn.functional.normalize(random_rows(1100, 40))  # many tiles, no near pair
    for call in (
        lambda: portable.sweep(request_of(rows, pair, [1100])),
        lambda: portable.hessian_vector_product(request_of(rows, pair, [1100]), rows.flip(0)),
        lambda: portable.sweep(cross_request_of(rows[:500], rows[500:], pair)),
        lambda: portable.cross_hessian_vector_product(
            cross_request_of(rows[:500], rows[500:], pair), rows[:500]
        ),
        lambda: portable.nearest(NearestRequest(rows, [1100])),
    ):
        with Questions() as questions:
            call()
        # the processor looks for subnormal numbers besides
        assert questions.seen["_local_scalar_dense"] <= 1
        assert not questions.seen["nonzero"]
