"""The named losses: their dense formulas in float64, derivatives, edges, mistakes."""

import functools
import inspect
import math
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from comhe_ext import Gaussian, Riesz, losses
from comhe_ext.testing import random_rows, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


# --- the formulas, dense and in float64 -----------------------------------------------------------


def unit(x):
    """Normalize rows; dead ones are 0."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, x / torch.where(norm > 0, norm, 1.0), 0.0)


def chord(v, w):
    """Compute the distances of unit rows, of a dead one sqrt(2); where rows coincide no gradient.

    From the differences of rows, as 2 - 2c has no digits for near ones.
    """
    dead = 2.0 - (v.square().sum(-1)[:, None] + w.square().sum(-1))
    squared = (v[:, None] - w).square().sum(-1) + dead.detach()
    zero = squared < 1e-30
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())


def pairs(x):
    """Compute the distances of all unordered pairs of rows."""
    v = unit(x)
    i, j = torch.triu_indices(len(v), len(v), offset=1)
    return chord(v, v)[i, j]


def others(x, y=None):
    """Compute all cosines, minus infinity on the diagonal."""
    cosine = unit(x) @ unit(x if y is None else y).mT
    return cosine.masked_fill(torch.eye(len(x), dtype=torch.bool), -math.inf)


def nearest(x, half_space=False):
    """Compute the distance of each row to the nearest other."""
    cosine, v = others(x), unit(x)
    cosine = torch.where(cosine.isinf(), cosine, cosine.abs()) if half_space else cosine
    index = cosine.argmax(1)
    w = v[index]
    if half_space:
        w = torch.where((v * w).sum(1, keepdim=True) < 0, -w, w)
    return chord(v, w).diagonal()


def angle(r):
    return 2.0 * (r / 2.0).arcsin()


def spread(cosine, tau):
    return (cosine / tau).exp().sum(1).log()


def dense_sphereface_plus(weight, labels, s=2.0):
    r = chord(unit(weight)[labels], unit(weight))
    return (r[labels[:, None] != torch.arange(len(weight))] ** -s).mean()


def at_pole(weight, pole, half_space):
    points = torch.cat([weight, -weight]) if half_space else weight
    return chord(unit(points), unit(pole[None])).squeeze(1)


def dense_hardness(features, weight, labels):
    theta = angle(chord(unit(features), unit(weight)))
    return theta.gather(1, labels[:, None]).squeeze(1) / theta.sum(1)


def dense_kcl(anchors, positives, function, gamma=16.0):
    own = chord(unit(anchors), unit(positives)).diagonal()
    energy = function(pairs(anchors)).mean() + function(pairs(positives)).mean()
    return gamma * energy - 2 * function(own).mean()


def dense_dhel(anchors, positives, tau=0.3):
    aligned = (unit(anchors) * unit(positives)).sum(1)
    return (spread(others(anchors), tau) + spread(others(positives), tau) - aligned / tau).mean()


def dense_gram(student, teacher):
    return (unit(student) @ unit(student).mT - unit(teacher) @ unit(teacher).mT).square().mean()


def off_diagonal(x):
    return others(x)[~torch.eye(len(x), dtype=torch.bool)]


# the loss of one set of rows -> how to call it, its formula
OF_ROWS = {
    "uniformity": (losses.uniformity, lambda x: (-2 * pairs(x) ** 2).exp().mean().log()),
    "uniformity, t = 0.5": (
        functools.partial(losses.uniformity, t=0.5),
        lambda x: (-0.5 * pairs(x) ** 2).exp().mean().log(),
    ),
    "dispersion": (
        losses.dispersion,
        lambda x: (-angle(pairs(x)) / math.pi / 0.5).exp().mean().log(),
    ),
    "koleo": (losses.koleo, lambda x: -(nearest(x) + 1e-8).log().mean()),
    "minimal_angle": (losses.minimal_angle, lambda x: -angle(nearest(x)).mean()),
    "minimal_angle, half space": (
        functools.partial(losses.minimal_angle, half_space=True),
        lambda x: -angle(nearest(x, True)).mean(),
    ),
    "separation": (losses.separation, lambda x: -(nearest(x).min() ** 2)),
    "separation, half space": (
        functools.partial(losses.separation, half_space=True),
        lambda x: -(nearest(x, True).min() ** 2),
    ),
    "regular_face": (losses.regular_face, lambda x: 1 - (nearest(x) ** 2).mean() / 2),
    "frame_potential": (losses.frame_potential, lambda x: off_diagonal(x).square().mean()),
    "mean_cosine": (losses.mean_cosine, lambda x: off_diagonal(x).mean()),
}


def labels_of(n, seed=0):
    return torch.randint(n, (11,), generator=torch.Generator().manual_seed(seed))


# losses of several tensors -> how to call it, its formula, the tensors for rows of so many columns
OF_TENSORS = {
    "sphereface_plus": (
        losses.sphereface_plus,
        dense_sphereface_plus,
        lambda n, d: (random_rows(n, d), labels_of(n)),
    ),
    "sphereface_plus, s = 1": (
        functools.partial(losses.sphereface_plus, s=1.0),
        functools.partial(dense_sphereface_plus, s=1.0),
        lambda n, d: (random_rows(n, d), labels_of(n, 1).int()),
    ),
    "polarization": (
        losses.polarization,
        lambda w, pole: (at_pole(w, pole, False) ** -2).mean(),
        lambda n, d: (random_rows(n, d), random_rows(1, d, seed=1)[0]),
    ),
    "polarization, half space": (
        functools.partial(losses.polarization, half_space=True),
        lambda w, pole: (at_pole(w, pole, True) ** -2).mean(),
        lambda n, d: (random_rows(n, d), random_rows(1, d, seed=1)[0]),
    ),
    "covering": (
        losses.covering,
        lambda w, pole: -(-10 * at_pole(w, pole, False) ** 2).exp().mean().log() / 10,
        lambda n, d: (random_rows(n, d), random_rows(1, d, seed=1)[0]),
    ),
    "covering, half space": (
        functools.partial(losses.covering, gamma=5.0, half_space=True),
        lambda w, pole: -(-5 * at_pole(w, pole, True) ** 2).exp().mean().log() / 5,
        lambda n, d: (random_rows(n, d), random_rows(1, d, seed=1)[0]),
    ),
    "angular_visual_hardness": (
        losses.angular_visual_hardness,
        dense_hardness,
        lambda n, d: (random_rows(11, d, seed=1), random_rows(n, d), labels_of(n)),
    ),
    "kcl": (
        losses.kcl,
        lambda a, p: dense_kcl(a, p, lambda r: (-2 * r**2).exp()),
        lambda n, d: (random_rows(n, d), random_rows(n, d, seed=1)),
    ),
    "kcl, Riesz": (
        functools.partial(losses.kcl, pair=Riesz(1.0), gamma=2.0),
        lambda a, p: dense_kcl(a, p, lambda r: r**-1.0, 2.0),
        lambda n, d: (random_rows(n, d), random_rows(n, d, seed=1)),
    ),
    "kcl, angular": (
        functools.partial(losses.kcl, pair=Gaussian(1.0, angular=True)),
        lambda a, p: dense_kcl(a, p, lambda r: (-(angle(r) ** 2)).exp()),
        lambda n, d: (random_rows(n, d), random_rows(n, d, seed=1)),
    ),
    "dhel": (
        losses.dhel,
        dense_dhel,
        lambda n, d: (random_rows(n, d), random_rows(n, d, seed=1)),
    ),
    "gram": (
        losses.gram,
        dense_gram,
        lambda n, d: (random_rows(n, d), random_rows(n, d + 3, seed=1)),
    ),
}
LOSSES = {
    **{name: (*both, lambda n, d: (random_rows(n, d),)) for name, both in OF_ROWS.items()},
    **OF_TENSORS,
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def call(name, *tensors, backend="torch"):
    """Call a loss of the table; those in closed form have no backend."""
    loss = LOSSES[name][0]
    more = {"backend": backend} if "backend" in inspect.signature(loss).parameters else {}
    return loss(*tensors, **more)


def value_and_gradients(function, tensors):
    """Compute a loss, and the gradients of its sum to all that can have one."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    value = function(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    return value, torch.autograd.grad(value.sum(), wanted)


def in_float64(tensors):
    return [x.double() if x.is_floating_point() else x for x in tensors]


def check(name, tensors, backend="torch", of_gradient=5e-6):
    """Compare a loss and its gradients with the formula."""
    value, gradients = value_and_gradients(functools.partial(call, name, backend=backend), tensors)
    truth, expected = value_and_gradients(LOSSES[name][1], in_float64(tensors))
    assert value.dtype == torch.float32
    assert value.shape == truth.shape
    # the mean cosine of random rows, and gradients of rows at even distances, are nearly 0
    assert relative_error(value, truth, floor=0.1) <= 1e-6
    for gradient, true in zip(gradients, expected, strict=True):
        assert relative_error(gradient, true, floor=1e-3) <= of_gradient


# --- tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (7, 5), (40, 12), (12, 40), (150, 16)], ids=str)
@every_loss
def test_it_is_the_formula(name, shape):
    check(name, LOSSES[name][2](*shape))


@every_loss
def test_every_backend_agrees(name, backend, device):
    if "backend" not in inspect.signature(LOSSES[name][0]).parameters:
        pytest.skip("in closed form")
    tensors = [x.to(device) for x in LOSSES[name][2](60, 20)]
    refusal = None
    try:
        ours = value_and_gradients(functools.partial(call, name, backend=backend), tensors)
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert backend != "torch"
        assert f"backend '{backend}'" in refusal
        pytest.skip(refusal)
    truth, expected = value_and_gradients(LOSSES[name][1], in_float64(LOSSES[name][2](60, 20)))
    assert relative_error(ours[0].cpu(), truth, floor=0.1) <= 1e-6
    for gradient, true in zip(ours[1], expected, strict=True):
        assert relative_error(gradient.cpu(), true, floor=1e-3) <= 5e-6


@pytest.mark.parametrize("name", [*OF_ROWS, "gram"])
def test_batches_are_sets_of_their_own(name):
    batch = [
        torch.stack(x)
        for x in zip(*(in_float64(LOSSES[name][2](9, 5)) for _ in range(3)), strict=True)
    ]
    batch = [(x + torch.arange(3)[:, None, None]).float() for x in batch]
    together, gradients = value_and_gradients(functools.partial(call, name), batch)
    assert together.shape == (3,)
    for index in range(3):
        alone = value_and_gradients(functools.partial(call, name), [x[index] for x in batch])
        assert relative_error(together[index], alone[0], floor=0.1) <= 1e-6
        for ours, theirs in zip(gradients, alone[1], strict=True):
            assert relative_error(ours[index], theirs, floor=1e-3) <= 1e-6
    by_vmap = torch.func.vmap(functools.partial(call, name))(*batch)
    assert relative_error(by_vmap, together, floor=0.1) <= 1e-6


@pytest.mark.parametrize("name", [*OF_ROWS, "gram", "dhel"])
@pytest.mark.parametrize("shape", [(0, 4), (1, 4)], ids=str)
@pytest.mark.parametrize("first", [1.0, torch.nan])
def test_without_pairs_all_is_zero(name, shape, first):
    tensors = [torch.ones(shape) for _ in LOSSES[name][2](2, 4)]
    if name != "gram":  # a row has a cosine with itself
        for x in tensors:
            x[:1, :1] = first
    if name in OF_ROWS:
        tensors = [x.expand(2, *shape) for x in tensors]
    value, gradients = value_and_gradients(functools.partial(call, name), tensors)
    assert value.tolist() == ([0.0, 0.0] if name in OF_ROWS else 0.0)
    assert not any(x.any() for x in gradients)


def test_without_rows_or_classes_the_others_are_zero():
    empty, pole = torch.empty(0, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    for value in (
        losses.sphereface_plus(empty, none),
        losses.sphereface_plus(torch.ones(4, 3, requires_grad=True), none),
        losses.sphereface_plus(torch.ones(1, 3, requires_grad=True), torch.tensor([0, 0])),
        losses.polarization(empty, pole),
        losses.covering(empty, pole),
        losses.kcl(empty, empty),
    ):
        assert value == 0
        value.backward()
    assert not pole.grad.any()
    assert losses.angular_visual_hardness(empty, torch.ones(4, 3), none).shape == (0,)


@every_loss
def test_dead_rows_are_orthogonal_to_all(name):
    tensors = LOSSES[name][2](7, 5)
    tensors[0][3] = 0.0
    if name in ("kcl", "dhel", "gram"):
        tensors[1][4] = 0.0
    check(name, tensors)
    gradient = value_and_gradients(functools.partial(call, name), tensors)[1][0]
    assert not gradient[3].any()


@pytest.mark.parametrize("name", [*OF_ROWS, "kcl", "dhel", "gram"])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_duplicates(name, factor):
    tensors = LOSSES[name][2](9, 5)
    tensors[0][6] = factor * tensors[0][2]
    check(name, tensors)


@pytest.mark.parametrize("name", ["kcl", "dhel", "gram"])
def test_positives_that_are_the_anchors(name):
    x = random_rows(9, 5)
    value, gradients = value_and_gradients(functools.partial(call, name), [x, x.clone()])
    truth, expected = value_and_gradients(LOSSES[name][1], in_float64([x, x]))
    assert relative_error(value, truth, floor=0.1) <= 1e-6
    for gradient, true in zip(gradients, expected, strict=True):
        assert relative_error(gradient, true, floor=1e-2) <= 5e-6


@every_loss
def test_nan_comes_out(name):
    for position, x in enumerate(LOSSES[name][2](7, 5)):
        if not x.is_floating_point():
            continue
        tensors = list(LOSSES[name][2](7, 5))
        tensors[position].view(-1)[3] = torch.nan
        value = call(name, *tensors)
        assert value.isnan().any()
        if value.dim() == 0 or position == 1:  # the weights of all samples
            assert value.isnan().all()


@every_loss
def test_derivatives(name):
    tensors = in_float64(LOSSES[name][2](4, 3))
    tensors = [x.requires_grad_() if x.is_floating_point() else x for x in tensors]
    function = functools.partial(call, name)
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@every_loss
def test_torch_func_and_forward_mode(name):
    tensors = in_float64(LOSSES[name][2](5, 4))
    function = functools.partial(call, name)
    loss = lambda *tensors: function(*tensors).sum()  # noqa: E731
    gradient = torch.func.grad(loss)(*tensors)
    expected = value_and_gradients(function, tensors)[1][0]
    assert relative_error(gradient, expected) <= 1e-12
    tangent = random_rows(*tensors[0].shape, seed=5, dtype=torch.float64)
    slope = torch.func.jvp(lambda x: loss(x, *tensors[1:]), (tensors[0],), (tangent,))[1]
    assert relative_error(slope, (expected * tangent).sum()) <= 1e-10


@every_loss
def test_compile_full_graph(name):
    torch._dynamo.reset()
    function, tensors = functools.partial(call, name), LOSSES[name][2](20, 6)
    compiled = torch.compile(
        lambda *x: function(*x).sum(), fullgraph=True, dynamic=False, backend="aot_eager"
    )
    ours, theirs = (value_and_gradients(f, tensors) for f in (compiled, function))
    assert relative_error(ours[0], theirs[0].sum(), floor=0.1) <= 1e-6
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert relative_error(a, b, floor=1e-3) <= 1e-6


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in(name, dtype):
    tensors = [x.to(dtype) if x.is_floating_point() else x for x in LOSSES[name][2](30, 8)]
    value, gradients = value_and_gradients(functools.partial(call, name), tensors)
    assert value.dtype == torch.float32
    assert relative_error(value, LOSSES[name][1](*in_float64(tensors)), floor=0.1) <= 1e-6
    assert {x.dtype for x in gradients} == {dtype}


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(name, dtype):
    tensors = [x.to(dtype) if x.is_floating_point() else x for x in LOSSES[name][2](30, 8)]
    value, gradients = value_and_gradients(functools.partial(call, name), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        cast_value, cast_gradients = value_and_gradients(functools.partial(call, name), tensors)
    assert torch.equal(value, cast_value)
    for cast, exact in zip(cast_gradients, gradients, strict=True):
        assert relative_error(cast, exact) <= 1e-6  # rounding; products in bfloat16 have 2e-3


@every_loss
def test_strides_do_not_matter(name):
    tensors = LOSSES[name][2](7, 5)
    strided = [x.mT.contiguous().mT if x.dim() == 2 else x for x in tensors]
    function = functools.partial(call, name)
    for a, b in zip(
        *(value_and_gradients(function, x)[1] for x in (tensors, strided)), strict=True
    ):
        assert relative_error(a, b, floor=1e-3) <= 1e-6


def test_gradients_go_to_the_side_that_asks():
    weight, pole = random_rows(9, 4), random_rows(1, 4, seed=1)[0]
    both = value_and_gradients(losses.polarization, [weight, pole])[1]
    for side in (0, 1):
        points = [weight, pole]
        points[side] = points[side].clone().requires_grad_()
        (one,) = torch.autograd.grad(losses.polarization(*points, backend="torch"), points[side])
        assert relative_error(one, both[side]) <= 1e-6


def test_a_pole_that_learns_finds_the_gap():
    # rows along the axes leave the diagonals free: there the distance to the nearest is largest
    weight = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    for loss, sign in ((losses.polarization, 1.0), (losses.covering, -1.0)):
        pole = torch.tensor([0.9, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([pole], lr=0.2)
        for _ in range(300):
            optimizer.zero_grad()
            (sign * loss(weight, pole)).backward()
            optimizer.step()
        cosines = (pole / pole.norm()).abs()
        assert cosines.tolist() == pytest.approx([3**-0.5] * 3, abs=1e-3)


def test_closed_forms():
    from comhe_ext.testing import cross_polytope, simplex

    rows = simplex(5)
    # c = -1/4 and r^2 = 5/2 for all pairs
    assert float(losses.uniformity(rows)) == pytest.approx(-5.0, rel=1e-12)
    assert float(losses.koleo(rows, eps=0.0)) == pytest.approx(-0.5 * math.log(2.5), rel=1e-12)
    assert float(losses.regular_face(rows)) == pytest.approx(-0.25, rel=1e-12)
    assert float(losses.minimal_angle(rows)) == pytest.approx(-math.acos(-0.25), rel=1e-12)
    assert float(losses.separation(rows)) == pytest.approx(-2.5, rel=1e-12)
    assert float(losses.mean_cosine(rows)) == pytest.approx(-0.25, rel=1e-12)
    assert float(losses.frame_potential(rows)) == pytest.approx(1 / 16, rel=1e-12)
    # a tight frame: the frame potential is the least that 2k rows can have, (2k/k - 1)/(2k - 1)
    assert float(losses.frame_potential(cross_polytope(4))) == pytest.approx(1 / 7, rel=1e-12)


def mistakes():
    x, y = torch.ones(4, 3), torch.ones(5, 3)
    labels = torch.tensor([0, 1, 2, 3])
    loss: Any
    for loss in {getattr(x, "func", x) for x, _ in OF_ROWS.values()}:
        yield loss, ([[1.0]],), TypeError, "must be a torch.Tensor"
        yield loss, (torch.ones(3),), ValueError, "must be 2-D or 3-D"
        yield loss, (torch.ones(3, 2, dtype=torch.int64),), TypeError, "must be float16"
    for loss in (losses.kcl, losses.dhel):
        yield loss, (x, y), ValueError, "`positives` must have the shape of `anchors`"
        yield loss, (x[None], x[None]), ValueError, "`anchors` must be 2-D"
        yield loss, (x, x.to("meta")), ValueError, "`positives` must be on the device"
    yield losses.gram, (x, y), ValueError, "as many sets and rows as `student`"
    yield losses.gram, (x, x.to("meta")), ValueError, "`teacher` must be on the device"
    yield losses.polarization, (x[None], x[0]), ValueError, "`weight` must be 2-D"
    for loss in (losses.polarization, losses.covering):
        yield loss, (x, x), ValueError, "`pole` must be 1-D"
        yield loss, (x, torch.ones(4)), ValueError, "as wide rows"
    for bad, error, message in (
        ([0, 1], TypeError, "`labels` must be a torch.Tensor"),
        (labels.float(), TypeError, "`labels` must be int32 or int64"),
        (labels[None], ValueError, "`labels` must be"),
        (labels.to("meta"), ValueError, "`labels` must be on the device"),
    ):
        yield losses.sphereface_plus, (x, bad), error, message
        yield losses.angular_visual_hardness, (x, y, bad), error, message
    yield losses.sphereface_plus, (x, labels + 1), IndexError, "out of range"
    yield losses.angular_visual_hardness, (x, x, labels - 1), IndexError, "out of range"
    yield losses.angular_visual_hardness, (x, y, labels[:3]), ValueError, "of shape"


@pytest.mark.parametrize(
    ("loss", "tensors", "error", "message"),
    list(mistakes()),
    ids=lambda x: getattr(x, "__name__", None),
)
def test_wrong_tensors_are_told(loss, tensors, error, message):
    with pytest.raises(error, match=message):
        loss(*tensors)


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (losses.uniformity, {"t": 0.0}, ValueError, "`t` must be finite and greater than 0"),
        (losses.uniformity, {"t": "2"}, TypeError, "`t` must be a number"),
        (losses.uniformity, {"backend": "gpu"}, ValueError, "`backend` must be one of"),
        (losses.dispersion, {"tau": -1.0}, ValueError, "`tau` must be finite and greater"),
        (losses.koleo, {"eps": -1.0}, ValueError, "`eps` must be finite and at least 0"),
        (losses.koleo, {"backend": "gpu"}, ValueError, "`backend` must be one of"),
        (losses.minimal_angle, {"half_space": 1}, TypeError, "`half_space` must be a bool"),
        (losses.separation, {"half_space": None}, TypeError, "`half_space` must be a bool"),
    ],
)
def test_wrong_options_are_told(loss, options, error, message):
    with pytest.raises(error, match=message):
        loss(torch.ones(3, 2), **options)


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (losses.kcl, {"pair": 2.0}, TypeError, "`pair` must be a pair function"),
        (losses.kcl, {"pair": Gaussian(half_space=True)}, ValueError, "full space"),
        (losses.kcl, {"gamma": "16"}, TypeError, "`gamma` must be a number"),
        (losses.dhel, {"tau": 0}, ValueError, "`tau` must be finite and greater"),
    ],
)
def test_wrong_options_of_two_views_are_told(loss, options, error, message):
    with pytest.raises(error, match=message):
        loss(torch.ones(3, 2), torch.ones(3, 2), **options)


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (losses.polarization, {"s": "2"}, TypeError, "`s` must be a number"),
        (losses.polarization, {"half_space": 1}, TypeError, "`half_space` must be a bool"),
        (losses.covering, {"gamma": 0.0}, ValueError, "`gamma` must be finite and greater"),
        (losses.covering, {"half_space": 1}, TypeError, "`half_space` must be a bool"),
    ],
)
def test_wrong_options_of_poles_are_told(loss, options, error, message):
    with pytest.raises(error, match=message):
        loss(torch.ones(3, 2), torch.ones(2), **options)
