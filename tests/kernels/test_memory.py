"""Memory above the inputs: what a process may not go beyond, it does not need.

The kernel's limit of a process's writable memory (RLIMIT_DATA) counts every allocation exactly, of
torch, of its libraries and of the compiled kernel; what is resident depends on the machine's load.
"""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import gc, re, resource, sys
from pathlib import Path

import torch
import comhe_ext
from comhe_ext import init, losses
from comhe_ext.kernels import portable
from comhe_ext.kernels.pair_functions import Riesz
from comhe_ext.kernels.sweep import NearestRequest, SweepRequest

torch.set_num_threads(1)
what, n, k, backend, budget = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4], int(sys.argv[5])


def energy(weight):
    comhe_ext.hyperspherical_energy(weight, backend=backend).backward()


def naive(weight):
    distance = torch.nn.functional.pdist(torch.nn.functional.normalize(weight))
    (distance**-2).mean().backward()


def cross(weight):
    rows, columns = weight.detach(), weight.detach().flip(0)
    ones = torch.ones(len(rows))
    request = SweepRequest(
        rows, [len(rows)], [1.0], Riesz(2.0), columns=columns, row_weights=ones, row_energies=True
    )
    portable.sweep(request)


def cross_second(weight):
    rows, columns = weight.detach(), weight.detach().flip(0)
    request = SweepRequest(rows, [len(rows)], [1.0], Riesz(2.0), columns=columns)
    portable.cross_hessian_vector_product(request, rows, columns, torch.ones(len(rows)))


def nearest(weight):
    portable.nearest(NearestRequest(weight.detach(), [len(weight)]))


def uniformity(weight):
    losses.uniformity(weight).backward()


def koleo(weight):
    losses.koleo(weight).backward()


def sphereface_plus(weight):
    losses.sphereface_plus(weight, torch.arange(512)).backward()


def sphereface_plus_dense(weight):
    unit = torch.nn.functional.normalize(weight)
    distance = torch.cdist(unit[:512], unit) + torch.eye(512, len(unit))
    (distance**-2).mean().backward()


def turn(weight):
    init.minimum_energy_(weight, steps=2)


def weight_of(rows):
    weight = torch.randn(rows, k)
    weight[1] = weight[0] + 1e-3  # the way of close pairs too
    return weight.requires_grad_()


def written():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmData:\\s*(\\d+) kB", status)[1]) * 1024


call = globals()[what]
call(weight_of(min(n, 2048)))  # libraries loaded, scratch buffers of the matrix product made
weight = weight_of(n)
gc.collect()
resource.setrlimit(resource.RLIMIT_DATA, (written() + budget, resource.RLIM_INFINITY))
try:
    call(weight)
except (MemoryError, RuntimeError) as error:
    print("more:", error)
else:
    print("enough")
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a limit that only Linux keeps")


def is_enough(budget, what, n, k, backend):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, what, str(n), str(k), backend, str(budget)],
        capture_output=True,
        text=True,
        # what is freed goes back at once, so that only what is needed at one time counts
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip() == "enough"


@pytest.mark.parametrize(("n", "k"), [(16384, 30), (8192, 256)])
def test_memory_of_energy_and_gradient(n, k, backend):
    if backend == "triton":
        pytest.skip("the memory of a GPU is measured elsewhere")
    # eight times the points, gradient included: at 16,384 x 30 that is 15 MiB
    assert is_enough(8 * n * k * 4, "energy", n, k, backend)


# cross sets: eight times the rows and columns, and thirty times for the Hessian product
@pytest.mark.parametrize(
    ("what", "n", "times"),
    [("cross", 20000, 16), ("cross_second", 8192, 60), ("nearest", 20000, 8)],
)
def test_memory_of_the_portable_tiles(what, n, times):
    assert is_enough(times * n * 30 * 4, what, n, 30, "torch")


# a matrix of cosines of 65,536 rows is 16 GiB, one of 512 of them with all is 128 MiB
@pytest.mark.parametrize(
    ("what", "times"), [("uniformity", 10), ("koleo", 8), ("sphereface_plus", 10)]
)
def test_memory_of_losses_of_many_rows(what, times):
    assert is_enough(times * 65536 * 16 * 4, what, 65536, 16, "default")


def test_the_limit_is_kept():
    assert not is_enough(16 * 2**20, "naive", 4096, 30, "torch")
    assert is_enough(2**30, "naive", 4096, 30, "torch")
    assert not is_enough(2**20, "energy", 16384, 30, "torch")
    assert not is_enough(24 * 65536 * 16 * 4, "sphereface_plus_dense", 65536, 16, "default")


@pytest.mark.long
def test_memory_of_the_initializer_of_a_large_layer():
    # the weight alone is 224 MiB
    assert is_enough(int(1.2 * 2**30), "turn", 14336, 4096, "default")
