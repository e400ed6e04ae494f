"""The op among PyTorch's transforms: registration, compile, func, autocast, export, import."""

import os
import subprocess
import sys

import pytest
import torch

import comhe_ext
from comhe_ext import ops
from comhe_ext.testing import random_rows, relative_error

# torch's own tracer makes an instance of every autograd Function that it meets
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def settings(backend, **options):
    return tuple(ops.Options(**options, backend=backend))


# --- registration ---------------------------------------------------------------------------------

OPERATORS = {
    "energy": lambda points, sizes, more: (points, sizes, *more),
    "energy_and_gradient": lambda points, sizes, more: (points, sizes, *more),
    "hessian_vector_product": lambda points, sizes, more: (points, points.flip(0), sizes, *more),
    "scale_rows": lambda points, sizes, more: (points, torch.rand(4).to(points), sizes),
    "dot_rows": lambda points, sizes, more: (points, points.flip(0), sizes),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(name, dtype, backend, device):
    # without requires_grad: the autograd Functions are around the operators, not in them
    if dtype == torch.float64:
        backend = "torch"
    more = settings(backend, s=1.0, half_space=True)
    op = getattr(torch.ops.comhe_ext, name).default
    packed = random_rows(10, 3, dtype=dtype, device=device)
    torch.library.opcheck(op, OPERATORS[name](packed, [5, 0, 1, 4], more))
    batch = random_rows(20, 3, dtype=dtype, device=device).view(4, 5, 3)
    torch.library.opcheck(op, OPERATORS[name](batch, [], more))


def test_sizes_that_do_not_add_up_are_refused(backend, device):
    points = random_rows(10, 3, device=device)
    for sizes in ([5, 10], [5, 4], [-5, 15], []):
        for op in (torch.ops.comhe_ext.energy, torch.ops.comhe_ext.energy_and_gradient):
            with pytest.raises((RuntimeError, ValueError)):
                op(points, sizes, *settings(backend))


# --- torch.compile --------------------------------------------------------------------------------


def loss_of(backend):
    def loss(weight):
        # terms around the op, so that there is a graph to compile
        return 3.0 * comhe_ext.hyperspherical_energy(2.0 * weight, backend=backend) + weight.mean()

    return loss


def compiled_forward_and_backward(function, compiled, sizes, width, device):
    for n in sizes:
        plain = random_rows(n, width, seed=n, device=device).requires_grad_()
        value = function(plain)
        (gradient,) = torch.autograd.grad(value, plain)
        again = plain.detach().clone().requires_grad_()
        compiled_value = compiled(again)
        (compiled_gradient,) = torch.autograd.grad(compiled_value, again)
        assert relative_error(compiled_value, value) <= 1e-6
        assert relative_error(compiled_gradient, gradient) <= 1e-6


# aot_eager: the whole of tracing and of the backward graph, without a C++ compiler
@pytest.mark.parametrize("dynamic", [True, False, None])
def test_compile_full_graph(dynamic, backend, device):
    torch._dynamo.reset()
    function = loss_of(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    compiled_forward_and_backward(function, compiled, (20, 33, 50), 6, device)


def test_compile_dynamic_traces_once(backend, device):
    torch._dynamo.reset()
    function = loss_of(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled_forward_and_backward(function, compiled, (20, 33, 50, 1031), 6, device)


def test_compile_with_the_default_backend_chosen_inside():
    torch._dynamo.reset()
    compiled = torch.compile(
        comhe_ext.hyperspherical_energy, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    weight = random_rows(30, 5)
    assert torch.equal(compiled(weight), comhe_ext.hyperspherical_energy(weight))


def test_compile_other_energies(backend, device):
    torch._dynamo.reset()

    def function(weight):
        projection = weight.detach()[:8].cos().reshape(2, 4, -1)
        energy = comhe_ext.compressive_energy(weight, projection, half_space=True, backend=backend)
        return energy + comhe_ext.group_energy(weight, 2, 1.0, backend=backend)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled_forward_and_backward(function, compiled, (20, 33), 8, device)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compile_by_inductor(backend, device):
    torch._dynamo.reset()
    function = loss_of(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    compiled_forward_and_backward(function, compiled, (20, 33), 6, device)


def test_compile_a_batch_of_changing_size(backend, device):
    torch._dynamo.reset()

    def function(weight):
        sets = weight.unflatten(0, (3, -1))
        return comhe_ext.hyperspherical_energy(sets, half_space=True, backend=backend).sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled_forward_and_backward(function, compiled, (30, 36, 51), 5, device)


# --- torch.func -----------------------------------------------------------------------------------


def test_func_grad(backend, device):
    weight = random_rows(20, 5, device=device)

    def energy(w):
        return comhe_ext.hyperspherical_energy(w, half_space=True, backend=backend)

    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(energy(leaf), leaf)
    assert torch.equal(torch.func.grad(energy)(weight), expected)
    gradient, value = torch.func.grad_and_value(energy)(weight)
    assert torch.equal(gradient, expected) and torch.equal(value, energy(weight))


def test_vmap_of_packed_sets(backend, device):
    points = random_rows(60, 5, device=device).view(4, 15, 5)

    def energies(p):
        return ops.energy(p, [7, 0, 8], ops.Options(s=1.0, half_space=True, backend=backend))

    expected = torch.stack([energies(p) for p in points])
    assert relative_error(torch.vmap(energies)(points), expected) <= 1e-6
    expected = torch.stack([torch.func.jacrev(energies)(p) for p in points])
    assert relative_error(torch.vmap(torch.func.jacrev(energies))(points), expected) <= 1e-6


@pytest.mark.parametrize("in_dims", [0, 1, -1])
def test_vmap(in_dims, backend, device):
    weight = random_rows(60, 5, device=device).view(4, 15, 5)

    def energy(w):
        return comhe_ext.hyperspherical_energy(w, 1.0, backend=backend)

    expected = comhe_ext.hyperspherical_energy(weight, 1.0, backend=backend)
    moved = weight.movedim(0, in_dims)
    assert relative_error(torch.vmap(energy, in_dims)(moved), expected) <= 1e-6
    expected = torch.stack([torch.func.grad(energy)(w) for w in weight])
    actual = torch.vmap(torch.func.grad(energy), in_dims)(moved)
    assert relative_error(actual, expected) <= 1e-6


def test_vmap_of_a_hessian_vector_product():
    weight = random_rows(24, 3, dtype=torch.float64).view(4, 6, 3)
    tangents = random_rows(24, 3, seed=1, dtype=torch.float64).view(4, 6, 3)

    def product(w, t):
        gradient = torch.func.grad(comhe_ext.hyperspherical_energy)
        return torch.func.vjp(gradient, w)[1](t)[0]

    expected = torch.stack([product(w, t) for w, t in zip(weight, tangents, strict=True)])
    assert relative_error(torch.vmap(product)(weight, tangents), expected) <= 1e-12


def test_vmap_over_projections_only(backend, device):
    weight = random_rows(20, 9, device=device)
    projection = random_rows(24, 9, seed=1, device=device).view(6, 1, 4, 9)

    def energy(p):
        return comhe_ext.compressive_energy(weight, p, backend=backend)

    expected = torch.stack([energy(p) for p in projection])
    assert relative_error(torch.vmap(energy)(projection), expected) <= 1e-6


# --- autocast, export, determinism ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [7, 40])  # float64 tiles and float32 tiles of the portable backend
def test_autocast_changes_nothing(k, dtype, backend, device):
    weight = random_rows(30, k, device=device).requires_grad_()
    expected = comhe_ext.hyperspherical_energy(weight, backend=backend)
    (expected_gradient,) = torch.autograd.grad(expected, weight)
    with torch.autocast(device, dtype=dtype):
        energy = comhe_ext.hyperspherical_energy(weight, backend=backend)
        (gradient,) = torch.autograd.grad(energy, weight, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), weight)
    assert torch.equal(energy, expected) and torch.equal(gradient, expected_gradient)
    assert second.dtype == torch.float32


def test_layer_under_autocast(backend, device):
    # the weight stays float32 while the layer computes in bfloat16
    layer = torch.nn.Linear(12, 20, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = layer(random_rows(4, 12, device=device))
        loss = output.float().square().mean()
        loss = loss + comhe_ext.hyperspherical_energy(layer.weight, backend=backend)
    loss.backward()
    assert output.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_export(backend, device):
    class Energy(torch.nn.Module):
        def forward(self, weight):
            return comhe_ext.hyperspherical_energy(weight, half_space=True, backend=backend)

    rows = torch.export.Dim("rows", min=2, max=10_000)
    example = random_rows(20, 6, device=device)
    program = torch.export.export(Energy(), (example,), dynamic_shapes=({0: rows},))
    for n in (20, 57):
        weight = random_rows(n, 6, seed=n, device=device)
        assert torch.equal(program.module()(weight), Energy()(weight))


def test_fake_tensors(backend, device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight = torch.empty(3, 100_000, 64, device=device, requires_grad=True)
        energy = comhe_ext.hyperspherical_energy(weight, backend=backend)
        (gradient,) = torch.autograd.grad(energy.sum(), weight)
    assert energy.shape == (3,) and gradient.shape == weight.shape


@pytest.mark.parametrize("n", [100, 1031])
def test_deterministic_to_the_bit(n, backend, device):
    weight = random_rows(n, 30, device=device)
    weight[1] = weight[0] + 1e-4  # a close pair too
    results = []
    for _ in range(3):
        leaf = weight.clone().requires_grad_()
        energy = comhe_ext.hyperspherical_energy(leaf, half_space=True, backend=backend)
        (gradient,) = torch.autograd.grad(energy, leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), leaf)
        results.append((energy, gradient, second))
    for again in results[1:]:
        for one, other in zip(results[0], again, strict=True):
            assert torch.equal(one, other)


def test_deterministic_algorithms_can_be_demanded(backend, device):
    weight = random_rows(40, 5, device=device)
    weight[1] = weight[0] + 1e-4
    torch.use_deterministic_algorithms(True)
    try:
        leaf = weight.requires_grad_()
        energy = comhe_ext.hyperspherical_energy(leaf, backend=backend)
        (gradient,) = torch.autograd.grad(energy, leaf)
    finally:
        torch.use_deterministic_algorithms(False)
    assert energy.isfinite() and gradient.isfinite().all()


def test_threads_of_the_caller(backend, device):
    # several Python threads at once, as data-parallel training in one process has them
    from concurrent.futures import ThreadPoolExecutor

    weights = [random_rows(200, 10, seed=i, device=device) for i in range(8)]

    def gradient(weight):
        leaf = weight.clone().requires_grad_()
        energy = comhe_ext.hyperspherical_energy(leaf, backend=backend)
        return torch.autograd.grad(energy, leaf)[0]

    expected = [gradient(w) for w in weights]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(gradient, weights), expected, strict=True):
            assert relative_error(one, other) <= 1e-6


# --- import ---------------------------------------------------------------------------------------

BARE = """
import sys

sys.modules["triton"] = None  # any import of it fails
import torch
import comhe_ext

assert not torch.cuda.is_initialized()
weight = torch.randn(50, 8, requires_grad=True)
energy = comhe_ext.hyperspherical_energy(weight)
energy.backward()
assert energy.isfinite() and weight.grad.isfinite().all()
try:
    comhe_ext.hyperspherical_energy(weight, backend="triton")
except RuntimeError as error:
    assert "triton" in str(error), error
else:
    raise AssertionError("backend='triton' fell back to another one")
print("fine")
"""


def test_import_without_triton_gpu_or_compiler(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    for variable in ("CC", "CXX"):
        environment.pop(variable, None)
    output = subprocess.run(
        [sys.executable, "-W", "error", "-c", BARE],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert output.returncode == 0, output.stderr
    assert output.stdout.strip() == "fine"


def test_import_does_not_load_triton_or_the_oracle(tmp_path):
    program = (
        "import sys, torch; before = set(sys.modules); import comhe_ext; "
        "new = set(sys.modules) - before; "
        "print([m for m in new if m.startswith(('triton', 'comhe_ext.reference'))])"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert output.stdout.strip() == "[]"
