"""The op among PyTorch's transforms: registration, compile, func, autocast, export, import."""

import os
import subprocess
import sys

import pytest
import torch

import comhe_ext
from comhe_ext.testing import (
    options_of,
    packed_energy,
    random_rows,
    relative_error,
)

# torch's own tracer makes an instance of every autograd Function that it meets
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def settings(
    backend, s=2.0, half_space=False, min_distance=1e-3, reduction="mean", eps=0.0, factors=()
):
    """Those of an operator, right or wrong."""
    return "riesz", [float(half_space), 0.0, s, 0.0, min_distance], reduction, eps, backend, factors


# --- registration ---------------------------------------------------------------------------------


def sets_of(points, sizes):
    """Points of either form as the weights and matrices of a sweep."""
    weights = [points] if points.dim() == 3 else [p[None] for p in points.split(sizes)]
    return weights, [None] * len(weights)


def result_of(points):
    return torch.float64 if points.dtype == torch.float64 else torch.float32


OPERATORS = {
    "sweep": lambda points, sizes, more: (*sets_of(points, sizes), True, *more),
    "hessian_vector_product": lambda points, sizes, more: (
        points,
        points.flip(0),
        torch.rand_like(points, dtype=result_of(points)),
        sizes,
        *more,
    ),
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


OPS = torch.ops.comhe_ext
POINTS, BATCH = torch.ones(10, 3), torch.ones(2, 5, 3)
WEIGHT, MATRICES = torch.ones(2, 5, 6), torch.ones(4, 3, 6)
SETTINGS = settings("torch")


def changed(**options):
    return settings("torch", **options)


# an operator, the tensors and sizes it is handed, the settings, and the error that has to come
MISTAKES = [
    (
        "hessian_vector_product",
        (POINTS, POINTS, POINTS, [5, 4]),
        SETTINGS,
        "ValueError: `sizes` must be .* add up to 10 rows",
    ),
    (
        "hessian_vector_product",
        (POINTS, POINTS, POINTS, [-5, 15]),
        SETTINGS,
        "ValueError: `sizes` must be at least 0",
    ),
    (
        "hessian_vector_product",
        (POINTS, POINTS, POINTS, []),
        SETTINGS,
        "ValueError: `sizes` must be at least 0 and add up",
    ),
    (
        "hessian_vector_product",
        (BATCH, BATCH, BATCH, [5, 5]),
        SETTINGS,
        "ValueError: `sizes` must be empty where `points` is 3",
    ),
    (
        "hessian_vector_product",
        (POINTS[0], POINTS[0], POINTS[0], []),
        SETTINGS,
        "ValueError: `points` must be 2-D or",
    ),
    (
        "sweep",
        ([POINTS[None, :, :0]], [None], True),
        SETTINGS,
        "ValueError: `weights` must have at least one col",
    ),
    (
        "sweep",
        ([BATCH.int()], [None], True),
        SETTINGS,
        "TypeError: `weights` must be float16, .*int32",
    ),
    (
        "sweep",
        ([BATCH + 0j], [None], True),
        SETTINGS,
        "TypeError: `weights` must be float16, .*complex64",
    ),
    (
        "sweep",
        ([POINTS[None]], [None], True),
        changed(reduction="avg"),
        "ValueError: `reduction` .* got 'avg'",
    ),
    (
        "sweep",
        ([POINTS[None]], [None], True),
        settings("numpy"),
        "ValueError: `backend` must be .* got 'numpy'",
    ),
    (
        "sweep",
        ([POINTS[None]], [None], True),
        changed(s=-2.0),
        "ValueError: `s` must be finite and greater than -2",
    ),
    (
        "sweep",
        ([POINTS[None]], [None], True),
        changed(s=float("nan")),
        "ValueError: `s` must be finite",
    ),
    (
        "sweep",
        ([POINTS[None]], [None], True),
        changed(eps=float("nan")),
        "ValueError: `eps` must be finite",
    ),
    (
        "sweep",
        ([POINTS[None]], [None], True),
        changed(eps=float("inf")),
        "ValueError: `eps` must be finite",
    ),
    (
        "sweep",
        ([POINTS[None]], [None], True),
        changed(min_distance=2.0),
        "ValueError: `min_distance` must be",
    ),
    (
        "sweep",
        ([POINTS[None]], [None], True),
        changed(min_distance=float("nan")),
        "ValueError: `min_distance`",
    ),
    (
        "sweep",
        ([POINTS[None]], [None], True),
        changed(factors=[1.0, 2.0]),
        r"ValueError: `factors` .*\(1\), got 2",
    ),
    (
        "sweep",
        ([BATCH], [None], True),
        changed(factors=[1.0]),
        r"ValueError: `factors` .*\(2\), got 1",
    ),
    (
        "sweep",
        ([BATCH], [None], True),
        changed(factors=[1.0, float("nan")]),
        "ValueError: `factors` .* nan",
    ),
    (
        "sweep",
        ([BATCH.double()], [None], True),
        settings("cpu"),
        "TypeError: backend 'cpu' computes in fl",
    ),
    (
        "hessian_vector_product",
        (POINTS, POINTS.view(5, 6), POINTS, [10]),
        SETTINGS,
        r"ValueError: `tangents` must have the shape of `points`, got \(5, 6\) and \(10, 3\)",
    ),
    (
        "hessian_vector_product",
        (BATCH, POINTS, BATCH, []),
        SETTINGS,
        "ValueError: `tangents` must be 3-D",
    ),
    (
        "hessian_vector_product",
        (BATCH, BATCH.int(), BATCH, []),
        SETTINGS,
        "TypeError: `tangents` must be",
    ),
    (
        "hessian_vector_product",
        (BATCH, BATCH, BATCH[0], []),
        SETTINGS,
        "ValueError: `gradient` must be 3-D",
    ),
    (
        "hessian_vector_product",
        (BATCH, BATCH, BATCH.double(), []),
        SETTINGS,
        "TypeError: `gradient` must be torch.float32, as a sweep gives it, got torch.float64",
    ),
    (
        "sweep",
        ([BATCH], [None], True),
        ("coulomb", *SETTINGS[1:]),
        "ValueError: `pair` must be one of .*'riesz'.*, got 'coulomb'",
    ),
    (
        "sweep",
        ([BATCH], [None], True),
        ("riesz", [0.0, 0.0, 2.0], *SETTINGS[2:]),
        "ValueError: `parameters` of 'riesz' must be 5 numbers, got 3",
    ),
    ("scale_rows", (POINTS, torch.ones(3), [5, 5]), (), "ValueError: `factors` must be one a set"),
    ("scale_rows", (BATCH, torch.ones(1), []), (), "ValueError: `factors` must be one a set"),
    ("scale_rows", (BATCH, torch.ones(2, 1), []), (), "ValueError: `factors` must be one a set"),
    ("scale_rows", (POINTS, torch.ones(2), [5, 4]), (), "ValueError: `sizes` must be at least 0"),
    ("dot_rows", (POINTS, POINTS[:, :1], [10]), (), "ValueError: `right` must have the shape of"),
    ("dot_rows", (POINTS, POINTS, [11]), (), "ValueError: `sizes` must be at least 0"),
    ("sweep", ([], [], True), SETTINGS, "ValueError: `weights` must hold at least one tensor"),
    (
        "sweep",
        ([WEIGHT, WEIGHT], [MATRICES], True),
        SETTINGS,
        r"ValueError: `matrices` must have one entry a weight \(2\), got 1",
    ),
    (
        "sweep",
        ([WEIGHT, WEIGHT], [MATRICES, None], True),
        SETTINGS,
        "ValueError: `weights` without matrices must have at most the 3 columns",
    ),
    (
        "sweep",
        ([WEIGHT], [MATRICES[..., :5]], True),
        SETTINGS,
        r"ValueError: `matrices` must be \[C, 3, 6\] for a weight .* got shape \(4, 3, 5\)",
    ),
    (
        "sweep",
        ([WEIGHT, WEIGHT], [MATRICES, MATRICES[:, :2]], True),
        SETTINGS,
        r"ValueError: `matrices` must be \[C, 3, 6\] for a weight .* got shape \(4, 2, 6\)",
    ),
    ("sweep", ([WEIGHT], [MATRICES[:0]], True), SETTINGS, "ValueError: `matrices` must be"),
    ("sweep", ([WEIGHT], [MATRICES[:, :0]], True), SETTINGS, "ValueError: `matrices` must"),
    ("sweep", ([WEIGHT[0]], [MATRICES], True), SETTINGS, "ValueError: `weights` must be 3-D"),
    (
        "sweep",
        ([WEIGHT], [MATRICES[0]], True),
        SETTINGS,
        "ValueError: `matrices` must be 3",
    ),
    ("sweep", ([WEIGHT], [MATRICES.int()], True), SETTINGS, "TypeError: `matrices` must b"),
    (
        "sweep",
        ([WEIGHT], [MATRICES], True),
        changed(factors=[1.0, 2.0]),
        r"ValueError: `factors` must be empty or one a set \(8\), got 2",
    ),
    (
        "sweep",
        ([WEIGHT.half()], [MATRICES.double()], True),
        settings("cpu"),
        "TypeError: backend 'cpu' computes in float32, got float64",
    ),
    ("angle_difference", (POINTS, BATCH), (True, True), "ValueError: `rows` must be 3-D"),
    ("angle_difference", (BATCH, BATCH[:, 1:]), (True, True), "ValueError: `projected` must have"),
    ("angle_difference", (BATCH, BATCH.int()), (True, True), "TypeError: `projected` must be fl"),
    (
        "angle_difference_hvp",
        (BATCH, BATCH, BATCH[..., :2], None),
        (True,),
        "ValueError: `rows_tangents` must have the shape of `rows`",
    ),
    (
        "angle_difference_hvp",
        (BATCH, BATCH, None, BATCH[:1]),
        (True,),
        "ValueError: `projected_tangents` must have the shape of `projected`",
    ),
]


def refused(words):
    name, message = words.split(": ", 1)
    return pytest.raises({"TypeError": TypeError, "ValueError": ValueError}[name], match=message)


def every_tensor(change, arguments):
    if isinstance(arguments, torch.Tensor):
        return change(arguments)
    if isinstance(arguments, list | tuple):
        return type(arguments)(every_tensor(change, x) for x in arguments)
    return arguments


@pytest.mark.parametrize(("name", "arguments", "more", "error"), MISTAKES)
def test_what_an_operator_cannot_mean_is_refused(name, arguments, more, error):
    from torch._subclasses.fake_tensor import FakeTensorMode

    op = getattr(OPS, name)
    with refused(error):
        op(*arguments, *more)
    # by the shapes alone, where nothing is computed
    mode = FakeTensorMode()
    with mode, refused(error):
        op(*every_tensor(mode.from_tensor, arguments), *more)
    if "cpu" not in more:
        with refused(error):
            op(*every_tensor(lambda x: x.to("meta"), arguments), *more)
    # and of each element of a batch; messages may count the rows of all of them
    kind = TypeError if error.startswith("TypeError") else ValueError
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    if tensors and name != "angle_difference_hvp":
        rest = arguments[len(tensors) :]
        with pytest.raises(kind):
            torch.vmap(lambda *x: op(*x, *rest, *more))(*[torch.stack([x, x]) for x in tensors])


@pytest.mark.parametrize("gradient", [True, False])
def test_an_operator_never_falls_back_to_another_device(gradient):
    with refused("ValueError: backend 'cpu' needs tensors on cpu, got meta"):
        OPS.sweep([BATCH.to("meta")], [None], gradient, *settings("cpu"))
    with pytest.raises((RuntimeError, ValueError), match="triton"):
        OPS.sweep([BATCH], [None], gradient, *settings("triton"))
    for arguments, message in (
        ((POINTS, POINTS.to("meta"), POINTS, [10], *SETTINGS), "`tangents` must be on the device"),
        ((POINTS.to("meta"), POINTS, POINTS, [10], *SETTINGS), "`tangents` must be on the device"),
        ((POINTS, POINTS, POINTS.to("meta"), [10], *SETTINGS), "`gradient` must be on the device"),
    ):
        with pytest.raises(ValueError, match=message):
            OPS.hessian_vector_product(*arguments)
    with refused("ValueError: `matrices` must be on the device of `weights`, got meta and cpu"):
        OPS.sweep([WEIGHT], [MATRICES.to("meta")], True, *SETTINGS)
    with refused("ValueError: `factors` must be on the device of `rows`, got meta and cpu"):
        OPS.scale_rows(BATCH, torch.ones(2, device="meta"), [])


def test_factors_belong_to_the_sets_of_every_element_of_a_batch(backend, device):
    points = random_rows(24, 3, device=device).view(2, 12, 3)
    more = settings(backend, s=1.0, factors=[1.0, -2.0, 0.5])
    plain = settings(backend, s=1.0)

    def energy_of(p, sizes, more):
        return OPS.sweep(*sets_of(p, sizes), False, *more)[0]

    for sizes, sets in (([], points.view(2, 3, 4, 3)), ([4, 4, 4], points)):
        energies = torch.vmap(lambda p, sizes=sizes: energy_of(p, sizes, more))(sets)
        expected = torch.stack([energy_of(p, sizes, plain) for p in sets])
        expected = expected * torch.tensor([1.0, -2.0, 0.5], device=device)
        assert relative_error(energies, expected) <= 1e-6
    weight, matrices = random_rows(8, 6, device=device).view(2, 1, 4, 6), random_rows(9, 6)
    matrices = matrices.view(3, 3, 6).to(device)
    energies = torch.vmap(lambda w: OPS.sweep([w], [matrices], False, *more)[0])(weight)
    expected = torch.stack([OPS.sweep([w], [matrices], False, *plain)[0] for w in weight])
    expected = expected * torch.tensor([1.0, -2.0, 0.5], device=device)
    assert relative_error(energies, expected) <= 1e-6


@pytest.mark.parametrize("mixed", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_several_dtypes_in_one_sweep(mixed):
    weights = [WEIGHT * torch.arange(1.0, 7.0) + random_rows(10, 6).view(2, 5, 6)] * 2
    weights = [weights[0].to(mixed), weights[1]]
    matrices = [random_rows(12, 6).view(4, 3, 6), random_rows(6, 6, seed=1).view(2, 3, 6)]
    energies, _ = OPS.sweep(weights, matrices, False, *SETTINGS)
    expected = torch.cat(
        [
            OPS.sweep([w.double()], [m.double()], False, *SETTINGS)[0]
            for w, m in zip(weights, matrices, strict=True)
        ]
    )
    assert energies.dtype == (torch.float64 if mixed == torch.float64 else torch.float32)
    assert relative_error(energies, expected) <= 1e-5


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


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:DeprecationWarning",
    "ignore:.*not a leaf Tensor is being accessed:UserWarning",  # by Dynamo itself
)
def test_compile_gives_up_what_it_would_get_wrong():
    # Dynamo drops the jvp of a Function without a word, and vmap hides who asks for a gradient
    batch = random_rows(24, 4).view(3, 8, 4)
    tangents = random_rows(24, 4, seed=1).view(3, 8, 4)
    projection = random_rows(6, 4, seed=2).view(1, 6, 4)

    def energy(w):
        one = comhe_ext.hyperspherical_energy(w) + comhe_ext.compressive_energy(w, projection)
        return one + comhe_ext.angle_preserving_loss(w, projection)

    def slope(w, t):
        return torch.func.jvp(energy, (w,), (t,))[1]

    def energies(w):
        return torch.vmap(energy)(w)

    for function, arguments in ((slope, (batch, tangents)), (energies, (batch,))):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager")
        leaf = batch.clone().requires_grad_()
        expected = function(leaf, *arguments[1:])
        (gradient,) = torch.autograd.grad(expected.sum(), leaf)
        assert float(gradient.norm()) > 0
        actual = compiled(leaf, *arguments[1:])
        assert relative_error(actual, expected) <= 1e-6
        assert relative_error(torch.autograd.grad(actual.sum(), leaf)[0], gradient) <= 1e-6
        torch._dynamo.reset()
        disabled = r"torch\.(compiler|_dynamo)\.disable"
        with pytest.raises(torch._dynamo.exc.Unsupported, match=disabled):
            torch.compile(function, backend="aot_eager", fullgraph=True)(*arguments)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda w: torch.vmap(comhe_ext.hyperspherical_energy)(w),
            backend="aot_eager",
            fullgraph=True,
        )
        assert torch.equal(compiled(batch), comhe_ext.hyperspherical_energy(batch))


# --- torch.func -----------------------------------------------------------------------------------


def test_func_grad(backend, device):
    weight = random_rows(20, 5, device=device)

    def energy(w):
        return comhe_ext.hyperspherical_energy(w, half_space=True, backend=backend)

    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(energy(leaf), leaf)
    assert torch.equal(torch.func.grad(energy)(weight), expected)
    gradient, value = torch.func.grad_and_value(energy)(weight)
    assert torch.equal(gradient, expected)
    assert torch.equal(value, energy(weight))


def test_vmap_of_packed_sets(backend, device):
    points = random_rows(60, 5, device=device).view(4, 15, 5)

    def energies(p):
        return packed_energy(p, [7, 0, 8], options_of(s=1.0, half_space=True, backend=backend))

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
    assert torch.equal(energy, expected)
    assert torch.equal(gradient, expected_gradient)
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
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.isfinite().all()


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
    assert energy.shape == (3,)
    assert gradient.shape == weight.shape


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
    assert energy.isfinite()
    assert gradient.isfinite().all()


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
        "print([m for m in new if m.startswith(('triton', 'comhe_ext.testing'))])"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert output.stdout.strip() == "[]"
