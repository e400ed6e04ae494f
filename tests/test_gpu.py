"""What only a GPU can show: graphs, streams, devices, addresses above 2^31, memory, launches.

The definition itself is checked by the other tests, which run with backend "triton" too where there
is a GPU.
"""

import pytest
import torch

import comhe_ext
from comhe_ext.potentials import Potential
from comhe_ext.testing import (
    exact_energy_and_gradient,
    paired_rows,
    random_rows,
    relative_error,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PATHS = [
    pytest.param(k, id=name) for k, name in ((3, "direct"), (40, "pairwise"), (200, "large_k"))
]


RIESZ_2 = Potential(2.0)


def sweep(points, sizes=None, pair=RIESZ_2, eps=0.0, with_gradient=True):
    from comhe_ext.kernels import gpu

    sizes = sizes or [points.shape[0]]
    scales = [1.0 / max(n * (n - 1) // 2, 1) for n in sizes]
    return gpu.sweep(points, sizes, scales, pair, eps, with_gradient)


def energy_and_gradient(weight, **options):
    weight = weight.detach().requires_grad_()
    energy = comhe_ext.hyperspherical_energy(weight, **options, backend="triton")
    (gradient,) = torch.autograd.grad(energy.sum(), weight)
    return energy.detach(), gradient


@pytest.mark.parametrize("k", [3, 16, 30, 64, 128, 256])
@pytest.mark.parametrize("n", [1000, 4096, 16384])
def test_accuracy_on_random_rows(n, k):
    weight = random_rows(n, k, device="cuda")
    expected, expected_gradient = exact_energy_and_gradient(weight, 2.0, min_distance=0.0)
    energy, gradient = energy_and_gradient(weight, min_distance=0.0)
    assert relative_error(energy, expected) <= 1e-6
    # in three dimensions the closest pairs of 16,384 rows are 1e-4 apart and rule the gradient
    assert relative_error(gradient, expected_gradient) <= (2e-6 if k > 8 else 1e-5)


@pytest.mark.parametrize("k", PATHS)
@pytest.mark.parametrize("s", [0.0, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("angular", [False, True])
def test_close_pairs(s, half_space, angular, k):
    for angle in (1e-2, 1e-3, 1e-4):
        options = dict(s=s, half_space=half_space, angular=angular, min_distance=0.0)
        weight = paired_rows(700, k, angle, antipodal=half_space, device="cuda")
        expected, expected_gradient = exact_energy_and_gradient(weight, **options)
        energy, gradient = energy_and_gradient(weight, **options)
        assert relative_error(energy, expected) <= 1e-6
        assert relative_error(gradient, expected_gradient) <= 1e-5


@pytest.mark.parametrize("k", PATHS)
def test_runs_are_equal_to_the_bit(k):
    points = paired_rows(5000, k, 1e-3, device="cuda")
    first = sweep(points, [3000, 2000])
    for _ in range(3):
        assert all(
            torch.equal(a, b) for a, b in zip(first, sweep(points, [3000, 2000]), strict=True)
        )


@pytest.mark.parametrize("k", PATHS)
def test_nothing_waits_for_the_gpu_and_a_graph_captures_it(k):
    points = random_rows(3000, k, device="cuda")
    other = paired_rows(3000, k, 1e-3, seed=1, device="cuda")
    expected = [sweep(rows) for rows in (points, other)]
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sweep(points)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    static = points.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sweep(static)
    for rows, (energy, gradient) in zip((points, other), expected, strict=True):
        static.copy_(rows)
        graph.replay()
        assert torch.equal(captured[0], energy)
        assert torch.equal(captured[1], gradient)


@pytest.mark.parametrize("k", PATHS)
def test_two_streams(k):
    inputs = [random_rows(3000, k, seed=seed, device="cuda") for seed in range(2)]
    expected = [sweep(rows) for rows in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for stream, rows in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(sweep(rows))
    torch.cuda.synchronize()
    for i, (energy, gradient) in enumerate(results):
        assert torch.equal(energy, expected[i % 2][0])
        assert torch.equal(gradient, expected[i % 2][1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("k", PATHS)
def test_second_device(k):
    points = random_rows(300, k)
    expected = sweep(points.cuda(0))
    result = sweep(points.cuda(1))
    assert result[0].device == torch.device("cuda", 1)
    assert torch.equal(result[0].cpu(), expected[0].cpu())
    assert torch.equal(result[1].cpu(), expected[1].cpu())


def test_more_than_2_to_31_elements():
    n, k, sets = 128, 128, 132_000
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    points = torch.randn(sets * n, k, device="cuda", dtype=torch.float16)
    assert points.numel() > 2**31
    energy, gradient = sweep(points, [n] * sets)
    for which in (0, sets // 2, sets - 1):
        rows = slice(which * n, (which + 1) * n)
        expected, expected_gradient = sweep(points[rows].contiguous())
        assert relative_error(energy[which], expected[0]) <= 1e-6
        assert relative_error(gradient[rows], expected_gradient) <= 2e-6


@pytest.mark.parametrize(
    ("n", "k"), [(4096, 30), (16384, 3), (16384, 9), (16384, 40), (65536, 64), (8192, 256)]
)
def test_memory(n, k):
    points = random_rows(n, k, device="cuda")
    sweep(points)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sweep(points)
    assert torch.cuda.max_memory_allocated() - before <= max(8 * 4 * n * k, 8 << 20)


def test_launches():
    """54 layers of a ResNet-50 with 20 projections each: five launches."""
    sizes = [64, 256, 512, 128, 1024, 2048] * 9 * 2
    points = torch.randn(sum(sizes), 40, device="cuda")
    sweep(points, sizes, Potential(2.0, True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sweep(points, sizes, Potential(2.0, True))
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type.name == "CUDA"]
    assert 0 < len(kernels) <= 5, [e.name for e in kernels]


@pytest.mark.parametrize(("precision", "bound"), [("high", 1e-3), ("medium", 2e-3)])
@pytest.mark.parametrize("k", [40, 200])
def test_cheaper_products(precision, bound, k):
    weight = random_rows(4096, k, device="cuda")
    _, expected = exact_energy_and_gradient(weight)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        _, gradient = energy_and_gradient(weight)
    finally:
        torch.set_float32_matmul_precision(before)
    assert relative_error(gradient, expected) <= bound


def test_a_tensor_elsewhere_is_refused():
    with pytest.raises((ValueError, RuntimeError), match="GPU|CUDA|cuda|triton"):
        comhe_ext.hyperspherical_energy(torch.randn(4, 3), backend="triton")
