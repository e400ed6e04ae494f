"""What only a GPU can show: graphs, streams, devices, addresses above 2^31, memory, launches.

The definition itself is checked by the other tests: where there is a GPU, the fixture `backend` of
conftest.py runs every one that takes it with backend "triton" too.
"""

from dataclasses import replace

import pytest
import torch

import comhe_ext
from comhe_ext.kernels.sweep import NearestRequest, SweepRequest
from comhe_ext.testing import (
    exact_energy_and_gradient,
    paired_rows,
    random_rows,
    relative_error,
    riesz,
    sweep_of,
    sweep_projected,
)
from comhe_ext.testing.architectures import neuron_shapes, resnet50

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PATHS = [
    pytest.param(k, id=name)
    for k, name in ((3, "direct"), (12, "with_rest"), (40, "pairwise"), (200, "large_k"))
]


RIESZ_2 = riesz(2.0)


def sweep(points, sizes=None, pair=RIESZ_2, eps=0.0, with_gradient=True):
    from comhe_ext.kernels import gpu

    sizes = sizes or [points.shape[0]]
    scales = [1.0 / max(n * (n - 1) // 2, 1) for n in sizes]
    return sweep_of(gpu, points, sizes, scales, pair, eps, with_gradient)


def energy_and_gradient(weight, **options):
    weight = weight.detach().requires_grad_()
    energy = comhe_ext.hyperspherical_energy(weight, **options, backend="triton")
    (gradient,) = torch.autograd.grad(energy.sum(), weight)
    return energy.detach(), gradient


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("k", [3, 8, 9, 16, 24, 30, 64, 128, 256])
@pytest.mark.parametrize("n", [1000, 4096, 16384])
def test_accuracy_on_random_rows(n, k, half_space):
    weight = random_rows(n, k, device="cuda")
    options = dict(half_space=half_space, min_distance=0.0)
    expected, expected_gradient = exact_energy_and_gradient(weight, 2.0, **options)
    energy, gradient = energy_and_gradient(weight, **options)
    assert relative_error(energy, expected) <= 1e-6
    assert relative_error(gradient, expected_gradient) <= 2e-6


@pytest.mark.parametrize("k", PATHS)
@pytest.mark.parametrize("s", [0.0, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("angular", [False, True])
def test_near_pairs(s, half_space, angular, k):
    for angle in (1e-2, 1e-3, 1e-4):
        options = dict(s=s, half_space=half_space, angular=angular, min_distance=0.0)
        weight = paired_rows(700, k, angle, antipodal=half_space, device="cuda")
        expected, expected_gradient = exact_energy_and_gradient(weight, **options)
        energy, gradient = energy_and_gradient(weight, **options)
        assert relative_error(energy, expected) <= 1e-6
        assert relative_error(gradient, expected_gradient) <= 1e-5


@pytest.mark.parametrize("k", PATHS)
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_sets(k, weighted):
    from comhe_ext.kernels import gpu, portable

    both = paired_rows(4000, k, 1e-3, device="cuda")
    rows, columns = both[:1000], both[1000:]  # twins on either side
    ids = [torch.arange(n, device="cuda").int() % 7 for n in (1000, 3000)]
    request = SweepRequest(rows, [1000], [1e-6], RIESZ_2, columns=columns, row_energies=True)
    if weighted:
        weights = torch.rand(1000, device="cuda")
        request = replace(request, row_ids=ids[0], column_ids=ids[1], row_weights=weights)
    results = gpu.sweep(request)
    again = gpu.sweep(request)
    exact = portable.sweep(
        replace(
            request,
            source=rows.double(),
            columns=columns.double(),
            row_weights=weights.double() if weighted else None,
        )
    )
    bounds = (1e-6, 1e-5, 1e-5, 1e-6)
    for result, same, expected, bound in zip(results, again, exact, bounds, strict=True):
        assert torch.equal(result, same)
        assert relative_error(result, expected) <= bound


@pytest.mark.parametrize("k", PATHS)
@pytest.mark.parametrize("half_space", [False, True])
def test_nearest_rows(k, half_space):
    from comhe_ext.kernels import gpu, portable

    rows = paired_rows(3000, k, 1e-4, device="cuda")
    ids = torch.arange(3000, device="cuda").int() % 7
    for columns, of in ((None, None), (rows.flip(0), None), (rows.flip(0), ids)):
        request = NearestRequest(rows, [3000], half_space, 0.0, columns, of, of)
        exact = replace(
            request, points=rows.double(), columns=None if columns is None else columns.double()
        )
        assert torch.equal(gpu.nearest(request), portable.nearest(exact))


@pytest.mark.parametrize("angle", [False, True])
@pytest.mark.parametrize(("d", "k"), [(24, 5), (576, 40), (200, 200)])
def test_two_spaces(d, k, angle):
    from comhe_ext.kernels import gpu, portable

    rows = paired_rows(700, d, 1e-3, device="cuda")
    sets = rows.expand(3, -1, -1)
    projected = sets @ random_rows(3 * d, k, seed=1, device="cuda").view(3, d, k)
    results = gpu.angle_difference(sets, projected, angle, True)
    exact = portable.angle_difference(sets.double(), projected.double(), angle, True)
    for result, expected, bound in zip(results, exact, (1e-6, 3e-6, 3e-6), strict=True):
        assert relative_error(result, expected) <= bound
    again = gpu.angle_difference(sets, projected, angle, True)
    assert all(torch.equal(x, y) for x, y in zip(results, again, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gpu.angle_difference(sets, projected, angle, True)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(results, captured, strict=True))


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
    ("n", "k"),
    [(4096, 30), (16384, 3), (16384, 9), (16384, 20), (16384, 40), (65536, 64), (8192, 256)],
)
def test_memory(n, k):
    points = random_rows(n, k, device="cuda")
    sweep(points)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sweep(points)
    assert torch.cuda.max_memory_allocated() - before <= max(8 * 4 * n * k, 8 << 20)


def project_sweep(weights, count, k):
    """The sweep under fresh matrices, and the matrices."""
    from comhe_ext.kernels import gpu

    matrices = [torch.randn(count, k, w.shape[1], device="cuda") for w in weights]
    pair = riesz(2.0, True)
    scales = [pair.scale(w.shape[0], "mean") for w in weights for _ in range(count)]
    return *sweep_projected(gpu, weights, matrices, scales, pair, 0.0, True), matrices


def test_a_resnet50_takes_five_launches():
    from comhe_ext.kernels import gpu

    weights = [torch.randn(n, d, device="cuda") for n, d in neuron_shapes(resnet50)]
    assert len(weights) == 54
    _, _, matrices = project_sweep(weights, 20, 40)
    # new addresses, as of parametrized weights: nothing may depend on having seen them
    weights = [w.clone() for w in weights]
    scales, pair = [1.0] * (54 * 20), riesz(2.0, True)
    sweep_projected(gpu, weights, matrices, scales, pair, 0.0, True)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sweep_projected(gpu, weights, matrices, scales, pair, 0.0, True)
        torch.cuda.synchronize()
    events = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert 0 < len(events) <= 5, events


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projection_is_as_accurate_as_a_float32_product(dtype):
    weights = [random_rows(n, d, dtype=dtype, device="cuda") for n, d in ((300, 4608), (100, 64))]
    energy, gradient, matrices = project_sweep(weights, 2, 40)
    first = 0
    for i, (w, m) in enumerate(zip(weights, matrices, strict=True)):
        for c in range(2):
            exact = w.double() @ m[c].double().mT
            truth = exact_energy_and_gradient(exact, half_space=True)
            rounded = exact_energy_and_gradient(w.float() @ m[c].mT, half_space=True)
            rows = slice(first, first + len(w))
            first += len(w)
            assert relative_error(energy[2 * i + c], truth[0]) <= 1e-6
            of_product = relative_error(rounded[1], truth[1])
            assert relative_error(gradient[rows], truth[1]) <= 2e-6 + 2 * of_product


def test_a_graph_captures_projection_with_fresh_matrices():
    """Weights and matrices may lie anywhere: their addresses are arguments of the kernels."""
    from comhe_ext.kernels import gpu

    weights = [torch.randn(n, d, device="cuda") for n, d in ((300, 147), (70, 64), (64, 576))]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        project_sweep(weights, 3, 40)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        energy, gradient, matrices = project_sweep([w.clone() for w in weights], 3, 40)
    for _ in range(3):
        weights[0].normal_()
        graph.replay()
        pair = riesz(2.0, True)
        scales = [pair.scale(w.shape[0], "mean") for w in weights for _ in range(3)]
        expected = sweep_projected(gpu, weights, matrices, scales, pair, 0.0, True)
        assert torch.equal(energy, expected[0])
        assert torch.equal(gradient, expected[1])


def test_new_shapes_are_refused_in_a_capture():
    points = random_rows(1237, 20, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(graph):
        sweep(points + 1.0)
    torch.cuda.synchronize()


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
    with pytest.raises((ValueError, RuntimeError), match=r"GPU|CUDA|cuda|triton"):
        comhe_ext.hyperspherical_energy(torch.randn(4, 3), backend="triton")
