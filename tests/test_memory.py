"""Memory above the inputs, measured on a process of its own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch, comhe_ext

torch.set_num_threads(1)
n, k, backend = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]


def resident(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024


def sweep(rows):
    weight = torch.randn(rows, k)
    weight[1] = weight[0] + 1e-3  # the way of close pairs too
    weight.requires_grad_()
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = resident("VmRSS")
    energy = comhe_ext.hyperspherical_energy(weight, backend=backend)
    energy.backward()
    return resident("VmHWM") - before


sweep(2048)  # libraries loaded, threads and scratch buffers of the matrix product made
print(sweep(n))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(("n", "k"), [(16384, 30), (8192, 256)])
def test_memory_of_energy_and_gradient(n, k, backend):
    if backend == "triton":
        pytest.skip("the memory of a GPU is measured elsewhere")
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(n), str(k), backend],
        capture_output=True,
        text=True,
        check=True,
        # what is freed goes back at once, so that the peak is what was needed at one time
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    ).stdout
    # eight times the points, gradient included; and at 16,384 x 30 no more than 16 MiB
    assert int(output) <= 8 * n * k * 4
    if (n, k) == (16384, 30):
        assert int(output) <= 16 * 2**20
