"""The angle-preserving loss: value, both gradients and second order against the dense float64."""

import itertools

import pytest
import torch

import comhe_ext
from comhe_ext import backends
from comhe_ext.operators import angle_loss
from comhe_ext.testing import collapsed_rows, paired_rows, random_rows, reference, relative_error

pytestmark = pytest.mark.usefixtures("poisoned_empty")

KINDS = ("cosine", "angle")


def inputs(n=40, d=24, count=2, k=8, dtype=torch.float32):
    weight = random_rows(n, d, dtype=dtype)
    projection = random_rows(count * k, d, seed=1, dtype=dtype).view(count, k, d)
    return weight.requires_grad_(), projection.requires_grad_()


def compare(weight, projection, kind, value_bound=1e-6, gradient_bound=3e-6):
    exact = [x.detach().double().requires_grad_() for x in (weight, projection)]
    loss = comhe_ext.angle_preserving_loss(weight, projection, kind=kind)
    expected = reference.angle_preserving_loss(*exact, kind=kind)
    assert loss.shape == ()
    assert relative_error(loss, expected) <= value_bound
    gradients = torch.autograd.grad(loss, (weight, projection))
    for gradient, truth in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert relative_error(gradient, truth) <= gradient_bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "d", "count", "k"),
    # the last goes by second moments
    [(40, 24, 2, 8), (33, 6, 1, 9), (530, 40, 1, 10), (600, 16, 3, 20), (1030, 24, 2, 8)],
)
def test_value_and_gradients(n, d, count, k, kind):
    compare(*inputs(n, d, count, k), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_pair(kind):
    # nothing averages the rounding of two float32 cosines, which a squared difference doubles
    compare(*inputs(2, 5, 1, 3), kind=kind, value_bound=4e-6, gradient_bound=4e-6)
    compare(
        *inputs(2, 5, 1, 3, dtype=torch.float64), kind=kind, value_bound=1e-14, gradient_bound=1e-13
    )


@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_exact(kind):
    compare(*inputs(dtype=torch.float64), kind=kind, value_bound=1e-13, gradient_bound=1e-12)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_without_pairs_there_is_nothing_to_keep(n, kind):
    weight, projection = inputs(n)
    loss = comhe_ext.angle_preserving_loss(weight, projection, kind=kind)
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, (weight, projection)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("antipodal", [False, True])
@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-4])
def test_close_pairs(angle, antipodal, kind):
    weight = paired_rows(60, 24, angle, antipodal=antipodal).requires_grad_()
    # the float32 projection is rounded too, which moves the angle of a pair at `angle` by 1e-7
    compare(weight, inputs()[1], kind, gradient_bound=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_collapsed_rows(kind):
    weight = collapsed_rows(30, 24, 1e-2, dtype=torch.float64).requires_grad_()
    compare(weight, inputs(dtype=torch.float64)[1], kind, 1e-9, 1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [40, 1030])
def test_dead_and_equal_rows(n, kind):
    weight, projection = inputs(n)
    with torch.no_grad():
        weight[3] = 0
        weight[5] = 2 * weight[7]
        weight[9] = -weight[11]
    compare(weight, projection, kind)
    (gradient,) = torch.autograd.grad(
        comhe_ext.angle_preserving_loss(weight, projection, kind=kind), weight
    )
    assert not gradient[3].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [40, 1030])
def test_nan_reaches_the_loss(n, kind):
    weight, projection = inputs(n)
    with torch.no_grad():
        weight[4, 2] = float("nan")
    assert comhe_ext.angle_preserving_loss(weight, projection, kind=kind).isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_an_isometry_loses_nothing(kind):
    weight, _ = inputs(dtype=torch.float64)
    rotation = torch.linalg.qr(random_rows(24, 24, seed=2, dtype=torch.float64)).Q
    rotation = rotation.unsqueeze(0).requires_grad_()
    loss = comhe_ext.angle_preserving_loss(weight, rotation, kind=kind)
    assert float(loss.detach()) <= 1e-12
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (weight, rotation)))


@pytest.mark.parametrize("kind", KINDS)
def test_second_order(kind):
    weight, projection = inputs(7, 5, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        weight[2] = weight[4] * 1.5 + 1e-3 * weight[0]  # exact by differences

    def loss(w, p):
        return comhe_ext.angle_preserving_loss(w, p, kind=kind)

    assert torch.autograd.gradcheck(loss, (weight, projection))
    assert torch.autograd.gradgradcheck(loss, (weight, projection), atol=1e-4, rtol=1e-4)
    # the second derivatives of the close pair are large: against autograd of the dense one
    tangents = [torch.randn_like(x) for x in (weight, projection)]
    for function in (loss, lambda w, p: reference.angle_preserving_loss(w, p, kind)):
        firsts = torch.autograd.grad(function(weight, projection), tangents_of(weight, projection),
                                     create_graph=True)  # fmt: skip
        dot = sum((f * t).sum() for f, t in zip(firsts, tangents, strict=True))
        seconds = torch.autograd.grad(dot, (weight, projection))
        if function is loss:
            ours = seconds
    for one, other in zip(ours, seconds, strict=True):
        assert relative_error(one, other) <= 1e-8


def tangents_of(*tensors):
    return tensors


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_through_the_gradient_of_the_projection_alone(kind):
    weight, projection = inputs()

    def outer(function, w, p):
        (first,) = torch.autograd.grad(function(w, p), p, create_graph=True)
        return torch.autograd.grad(first.square().sum(), w)[0]

    actual = outer(
        lambda w, p: comhe_ext.angle_preserving_loss(w, p, kind=kind), weight, projection
    )
    exact = [x.detach().double().requires_grad_() for x in (weight, projection)]
    expected = outer(lambda w, p: reference.angle_preserving_loss(w, p, kind), *exact)
    assert relative_error(actual, expected) <= 1e-4


def test_third_order_is_refused():
    weight, projection = inputs(5, 4, 1, 3, dtype=torch.float64)
    loss = comhe_ext.angle_preserving_loss(weight, projection)
    (first,) = torch.autograd.grad(loss, weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        second.sum().backward()


def test_batches_dtypes_and_frozen_arguments():
    weight, projection = inputs(60)
    batch = weight.detach().view(3, 20, 24)
    losses = comhe_ext.angle_preserving_loss(batch, projection)
    expected = [reference.angle_preserving_loss(w, projection) for w in batch]
    assert relative_error(losses, torch.stack(expected)) <= 1e-6
    half = batch.bfloat16().requires_grad_()
    losses = comhe_ext.angle_preserving_loss(half, projection.detach())
    assert losses.dtype == torch.float32
    (gradient,) = torch.autograd.grad(losses.sum(), half)
    assert gradient.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(
        comhe_ext.angle_preserving_loss(batch, projection).sum(), projection
    )
    assert gradient.shape == projection.shape


def test_autocast_does_not_lower_it():
    weight, projection = inputs()
    expected = comhe_ext.angle_preserving_loss(weight, projection)
    with torch.autocast("cpu", torch.bfloat16):
        actual = comhe_ext.angle_preserving_loss(weight, projection)
    assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_compile_and_transforms(kind):
    torch._dynamo.reset()
    weight, projection = inputs(dtype=torch.float64)

    def loss(w, p):
        return 2.0 * comhe_ext.angle_preserving_loss(w, p, kind=kind)

    gradients = torch.autograd.grad(loss(weight, projection), (weight, projection))
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    again = torch.autograd.grad(compiled(weight, projection), (weight, projection))
    functional = torch.func.grad(loss, argnums=(0, 1))(weight.detach(), projection.detach())
    for gradient, one, other in zip(gradients, again, functional, strict=True):
        assert relative_error(one, gradient) <= 1e-12
        assert relative_error(other, gradient) <= 1e-12
    weights = torch.stack([weight.detach(), weight.detach().flip(0).roll(1, 1)])
    expected = torch.stack([torch.func.grad(loss)(w, projection.detach()) for w in weights])
    actual = torch.vmap(torch.func.grad(loss), (0, None))(weights, projection.detach())
    assert relative_error(actual, expected) <= 1e-12


def test_opcheck():
    rows = random_rows(20, 3).view(4, 5, 3)
    projected = random_rows(20, 2, seed=1).view(4, 5, 2)
    for angle in (False, True):
        op = torch.ops.comhe_ext.angle_difference.default
        torch.library.opcheck(op, (rows, projected, angle, True))
        torch.library.opcheck(op, (rows, projected, angle, False))
        torch.library.opcheck(op, (rows, projected, angle, True, False))
        torch.library.opcheck(op, (rows[:1].expand(4, 5, 3), projected, angle, False, False))
        op = torch.ops.comhe_ext.angle_difference_hvp.default
        torch.library.opcheck(op, (rows, projected, rows.flip(1), None, angle))
        torch.library.opcheck(op, (rows, projected, None, projected.flip(1), angle))
        torch.library.opcheck(op, (rows[:1].expand(4, 5, 3), projected, None, projected, angle))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_every_backend_shares_the_cosines_of_one_set(backend, kind, monkeypatch):
    if (reason := backends.unavailable(backend)) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("COMHE_BACKEND", backend)
    weight, projection = inputs(70, 24, 3, 8)
    compare(weight, projection, kind)
    # two sets of rows by three matrices, and three by two
    for sets, count in ((2, 3), (3, 2), (0, 2)):
        batch = weight.detach()[: 20 * sets].view(sets, 20, 24).requires_grad_()
        matrices = projection.detach()[:count].clone().requires_grad_()
        losses = comhe_ext.angle_preserving_loss(batch, matrices, kind=kind)
        assert losses.shape == (sets,)
        gradients = torch.autograd.grad(losses.sum(), (batch, matrices))
        exact = [x.detach().double().requires_grad_() for x in (batch, matrices)]
        each = [reference.angle_preserving_loss(w, exact[1], kind) for w in exact[0]]
        expected = torch.stack(each) if each else losses.detach()
        assert relative_error(losses, expected) <= 1e-6
        if sets == 0:
            assert not gradients[1].any()
            continue
        for one, other in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
            assert relative_error(one, other) <= 3e-6


def test_float64_and_a_missing_library_go_by_the_portable_tiles(monkeypatch):
    weight, projection = inputs()
    expected = comhe_ext.angle_preserving_loss(weight, projection)
    double = comhe_ext.angle_preserving_loss(weight.double(), projection.double())
    assert double.dtype == torch.float64
    assert relative_error(expected, double) <= 1e-6
    monkeypatch.setenv("COMHE_BACKEND", "torch")
    portable = comhe_ext.angle_preserving_loss(weight, projection)
    monkeypatch.delenv("COMHE_BACKEND")
    monkeypatch.setattr(backends.load("cpu"), "unavailable", lambda: "there is no library")
    monkeypatch.setattr(backends, "_tell_what_is_missing", lambda name: None)
    assert torch.equal(comhe_ext.angle_preserving_loss(weight, projection), portable)


@pytest.mark.parametrize("angle", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_only_the_gradients_that_are_asked_for_are_made(backend, angle, monkeypatch):
    if (reason := backends.unavailable(backend)) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("COMHE_BACKEND", backend)
    rows = random_rows(40, 12).view(2, 20, 12)
    projected = random_rows(40, 5, seed=1).view(2, 20, 5)
    op = torch.ops.comhe_ext.angle_difference
    total, *gradients = op(rows, projected, angle, True, True)
    made = []

    def recorded(*arguments):
        made.append(arguments[3:])
        return op(*arguments)

    monkeypatch.setattr(torch.ops.comhe_ext, "angle_difference", recorded)
    for wanted in itertools.product([True, False], repeat=2):
        points = [
            x.clone().requires_grad_(want)
            for x, want in zip((rows, projected), wanted, strict=True)
        ]
        actual = angle_loss.angle_difference(points[0], points[1], angle)
        assert made.pop() == wanted
        assert torch.equal(actual.detach(), total)
        asked = [x for x in points if x.requires_grad]
        if not asked:
            continue
        results = torch.autograd.grad(actual.sum(), asked, create_graph=True)
        expected = [g for g, want in zip(gradients, wanted, strict=True) if want]
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
        # of one of them there is a second derivative, too
        seconds = torch.autograd.grad(torch.cat(results, -1).square().sum(), asked)
        exact = [
            x.detach().double().requires_grad_(want) for x, want in zip(points, wanted, strict=True)
        ]
        asked = [x for x in exact if x.requires_grad]
        kind = KINDS[angle]
        sums = [reference.angle_difference(x, y, kind) for x, y in zip(*exact, strict=True)]
        firsts = torch.autograd.grad(torch.stack(sums).sum(), asked, create_graph=True)
        products = torch.autograd.grad(torch.cat(firsts, -1).square().sum(), asked)
        for one, other in zip(seconds, products, strict=True):
            assert relative_error(one, other) <= 1e-5


@pytest.mark.parametrize(
    ("error", "message", "arguments", "kind"),
    [
        (TypeError, "`weight` must be a torch.Tensor, got list", ([1.0], torch.ones(1, 1, 1)), "x"),
        (ValueError, "`weight` must be 2-D or 3-D", (torch.ones(3), torch.ones(1, 1, 3)), "x"),
        (ValueError, "`projection` must be 3-D", (torch.ones(3, 3), torch.ones(1, 3)), "x"),
        (ValueError, "as many columns", (torch.ones(3, 3), torch.ones(1, 2, 4)), "cosine"),
        (ValueError, "'cosine' or 'angle'", (torch.ones(3, 3), torch.ones(1, 2, 3)), "radians"),
        (ValueError, "got Tensor$", (torch.ones(3, 3), torch.ones(1, 2, 3)), torch.ones(9)),
    ],
)
def test_messages(error, message, arguments, kind):
    with pytest.raises(error, match=message):
        comhe_ext.angle_preserving_loss(*arguments, kind=kind)
