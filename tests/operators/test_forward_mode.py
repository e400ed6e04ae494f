"""Forward-mode derivatives, alone and mixed with reverse mode, under every transform of torch."""

import contextlib
import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import comhe_ext
from comhe_ext.testing import (
    options_of,
    packed_energy,
    random_rows,
    reference,
    relative_error,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    # torch's own: transforms make instances of autograd Functions, make_dual scripts formulas
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*insert a get_attr Node:UserWarning"),  # linearize
]

GROUPS = [[0, 1, 2], [3, 1]]


def of_weight(name, **options):
    """A public function of the weight alone, and its float64 definition."""

    def actual(weight, **backend):
        return getattr(comhe_ext, name)(weight, *arguments, **options, **backend)

    def definition(weight):
        return getattr(reference, name)(weight, *arguments, **options)

    arguments = [GROUPS] if name == "group_energy" else []
    return actual, definition


def loss(kind):
    def actual(weight, projection, **_):
        return comhe_ext.angle_preserving_loss(weight, projection, kind=kind)

    def definition(weight, projection):
        return reference.angle_preserving_loss(weight, projection, kind)

    return actual, definition


def folded(weight, projection, **backend):
    return comhe_ext.compressive_energy(weight, projection, 1.0, half_space=True, **backend)


def folded_definition(weight, projection):
    return reference.compressive_energy(weight, projection, 1.0, half_space=True)


ENERGIES = {
    "chord": of_weight("hyperspherical_energy"),
    "half space": of_weight("hyperspherical_energy", s=1.0, half_space=True, eps=1e-2),
    "angle": of_weight("hyperspherical_energy", s=0, angular=True, reduction="sum"),
    "tangent line": of_weight("hyperspherical_energy", s=3.0, min_distance=1.2),
    "groups": of_weight("group_energy", s=1.0),
}
PROJECTED = {
    "compressive": (comhe_ext.compressive_energy, reference.compressive_energy),
    "compressive, half space": (folded, folded_definition),
    "cosines": loss("cosine"),
    "angles": loss("angle"),
}
SECOND_ORDER = {
    "reverse over reverse": lambda f, argnums: jacrev(jacrev(f, argnums), argnums),
    "forward over reverse": hessian,
    "reverse over forward": lambda f, argnums: jacrev(jacfwd(f, argnums), argnums),
    "forward over forward": lambda f, argnums: jacfwd(jacfwd(f, argnums), argnums),
}


def matrices(count, dim, features, *, seed=7, dtype=torch.float64, device=None):
    flat = random_rows(count * dim, features, seed=seed, dtype=dtype, device=device)
    return flat.view(count, dim, features)


def flat(derivatives):
    """All blocks of a jacobian or a hessian, one after another."""
    if isinstance(derivatives, torch.Tensor):
        return derivatives.flatten()
    return torch.cat([flat(block) for block in derivatives])


# --- first order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENERGIES)
def test_jvp_of_energies(name, backend, device):
    actual, definition = ENERGIES[name]
    for dtype, n, bound in (
        (torch.float32, 40, 1e-5),
        (torch.float32, 531, 1e-5),
        (torch.bfloat16, 40, 1e-5),
        (torch.float16, 40, 1e-5),
    ):
        weight = random_rows(n, 4, seed=1, dtype=dtype, device=device)
        tangents = random_rows(n, 4, seed=2, dtype=dtype, device=device)
        value, slope = jvp(lambda w: actual(w, backend=backend), (weight,), (tangents,))
        assert value.dtype == slope.dtype == torch.float32
        assert torch.equal(value, actual(weight, backend=backend))
        gradient = grad(definition)(weight.double())
        # <gradient, tangent> may cancel: the error is measured by the two lengths
        scale = float(gradient.norm() * tangents.double().norm())
        expected = float((gradient * tangents.double()).sum())
        assert float(slope) == pytest.approx(expected, rel=0, abs=bound * scale)


@pytest.mark.parametrize("name", PROJECTED)
@pytest.mark.parametrize("which", ["both", "weight", "projection"])
def test_jvp_of_weight_and_projection(name, which, backend, device):
    actual, definition = PROJECTED[name]
    weight, projection = (
        random_rows(33, 9, device=device),
        matrices(3, 4, 9, dtype=torch.float32, device=device),
    )
    weight_tangents = random_rows(33, 9, seed=3, device=device)
    projection_tangents = matrices(3, 4, 9, seed=4, dtype=torch.float32, device=device)
    gradients = grad(definition, (0, 1))(weight.double(), projection.double())
    expected = scale = 0.0
    with forward_ad.dual_level():
        primals = [weight, projection]
        for index, (one, tangents) in enumerate(
            (("weight", weight_tangents), ("projection", projection_tangents))
        ):
            if which in ("both", one):
                primals[index] = forward_ad.make_dual(primals[index], tangents)
                expected += float((gradients[index] * tangents.double()).sum())
                scale += float(gradients[index].norm() * tangents.double().norm())
        value, slope = forward_ad.unpack_dual(actual(*primals, backend=backend))
    assert float(slope) == pytest.approx(expected, rel=0, abs=2e-5 * scale)
    assert relative_error(value, actual(weight, projection, backend=backend)) <= 1e-6


def test_half_precision_weight_and_double_projection():
    weight, projection = random_rows(20, 6, dtype=torch.float16), matrices(2, 3, 6)
    tangents = random_rows(20, 6, seed=1, dtype=torch.float16), matrices(2, 3, 6, seed=2)
    value, slope = jvp(comhe_ext.compressive_energy, (weight, projection), tangents)
    _, expected = jvp(
        reference.compressive_energy,
        (weight.double(), projection),
        (tangents[0].double(), tangents[1]),
    )
    assert value.dtype == slope.dtype == torch.float64
    assert relative_error(slope, expected) <= 1e-12


def test_jacobian_of_batches(backend, device):
    batch = random_rows(60, 5, device=device).view(4, 15, 5)

    def energies(w):
        return comhe_ext.hyperspherical_energy(w, half_space=True, backend=backend)

    expected = jacrev(energies)(batch)
    assert relative_error(jacfwd(energies)(batch), expected) <= 1e-5
    # sets are independent
    assert (jacfwd(energies)(batch)[0, 1:] == 0).all()


def test_packed_sets_of_many_sizes(backend, device):
    points = random_rows(17, 4, device=device)
    sizes = [5, 0, 1, 4, 4, 3]

    def energies(p):
        factors = [1.0, 2.0, 3.0, -4.0, 5.0, 6.0]
        options = options_of(s=1.0, half_space=True, backend=backend, factors=factors)
        return packed_energy(p, sizes, options)

    expected = jacrev(energies)(points)
    assert expected.shape == (6, 17, 4)
    assert float(expected[3].norm()) > 0
    assert relative_error(jacfwd(energies)(points), expected) <= 1e-5
    tangents = random_rows(17, 4, seed=3, device=device)
    slopes = jvp(energies, (points,), (tangents,))[1]
    assert relative_error(slopes, (expected * tangents).sum((1, 2))) <= 1e-5


def test_linearize(backend, device):
    weight, tangents = random_rows(20, 5, device=device), random_rows(20, 5, seed=1, device=device)

    def energy(w):
        return comhe_ext.hyperspherical_energy(w, backend=backend)

    value, slope = linearize(energy, weight)
    assert relative_error(value, energy(weight)) <= 1e-6
    assert relative_error(slope(tangents), (grad(energy)(weight) * tangents).sum()) <= 1e-5


@pytest.mark.parametrize("mode", ["no grad", "inference", "autocast"])
def test_tangents_in_every_grad_mode(mode, backend, device):
    weight, projection = (
        random_rows(30, 20, device=device),
        matrices(2, 8, 20, dtype=torch.float32, device=device),
    )
    tangents = random_rows(30, 20, seed=1, device=device)

    def energy(w):
        one = comhe_ext.hyperspherical_energy(w, backend=backend)
        return one + comhe_ext.compressive_energy(w, projection, backend=backend)

    expected = jvp(energy, (weight,), (tangents,))
    assert float(expected[1]) != 0
    contexts: dict[str, contextlib.AbstractContextManager[object]] = {
        "no grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast(device, dtype=torch.bfloat16),
    }
    with contexts[mode]:
        if not jvp(torch.sum, (weight,), (tangents,))[1]:
            pytest.skip("this PyTorch (before 2.8) has no tangents in inference mode")
        actual = jvp(energy, (weight,), (tangents,))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_functional_call(backend, device):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 20, device=device)

        def forward(self):
            return comhe_ext.hyperspherical_energy(self.layer.weight, backend=backend)

    model = Model()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in weights.items()}
    slope = jvp(lambda w: functional_call(model, w, ()), (weights,), (tangents,))[1]
    model().backward()
    expected = (model.layer.weight.grad * tangents["layer.weight"]).sum()
    assert relative_error(slope, expected) <= 1e-5


@pytest.mark.parametrize(
    "view",
    [lambda t: t.mT.contiguous().mT, lambda t: t[..., :1].expand_as(t), lambda t: t.flip(0)],
    ids=["transposed", "expanded", "flipped"],
)
def test_strided_tangents(view, backend, device):
    weight = random_rows(20, 5, device=device)
    tangents = view(random_rows(20, 5, seed=1, device=device))

    def energy(w):
        return comhe_ext.hyperspherical_energy(w, backend=backend)

    for function in (energy, grad(energy)):
        expected = jvp(function, (weight,), (tangents.contiguous().clone(),))[1]
        assert torch.equal(jvp(function, (weight,), (tangents,))[1], expected)


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (2, 0, 3), (4, 1, 3)])
def test_too_few_rows_for_a_pair(shape, backend, device):
    weight, tangents = torch.ones(shape, device=device), torch.ones(shape, device=device)

    def energy(w):
        return comhe_ext.hyperspherical_energy(w, backend=backend).sum()

    assert float(jvp(energy, (weight,), (tangents,))[1]) == 0
    product = jvp(grad(energy), (weight,), (tangents,))[1]
    assert product.shape == shape
    assert (product == 0).all()


def test_dead_rows_and_duplicates(backend, device):
    weight, tangents = random_rows(30, 6, device=device), random_rows(30, 6, seed=1, device=device)
    weight[[0, 7]] = 0.0
    weight[5] = weight[6]
    for options in (dict(), dict(half_space=True), dict(s=0.0, angular=True)):

        def energy(w, options=options):
            return comhe_ext.hyperspherical_energy(w, **options, backend=backend)

        slope = jvp(energy, (weight,), (tangents,))[1]
        assert relative_error(slope, (grad(energy)(weight) * tangents).sum()) <= 1e-5
        assert jvp(grad(energy), (weight,), (tangents,))[1].isfinite().all()
        # along the dead rows alone nothing changes
        alone = torch.zeros_like(weight)
        alone[[0, 7]] = tangents[[0, 7]]
        assert float(jvp(energy, (weight,), (alone,))[1]) == 0


# --- second order ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENERGIES)
@pytest.mark.parametrize("mode", SECOND_ORDER)
def test_second_order_of_energies(mode, name, backend, device):
    actual, definition = ENERGIES[name]
    weight = random_rows(9, 4, seed=1, device=device)
    expected = hessian(definition)(weight.double())
    product = SECOND_ORDER[mode](lambda w: actual(w, backend=backend), 0)(weight)
    assert product.dtype == torch.float32
    assert relative_error(product, expected) <= 1e-5


@pytest.mark.parametrize("name", ENERGIES)
@pytest.mark.parametrize("mode", SECOND_ORDER)
def test_second_order_in_float64(mode, name):
    actual, definition = ENERGIES[name]
    weight = random_rows(6, 4, seed=1, dtype=torch.float64)
    expected = hessian(definition)(weight)
    assert relative_error(SECOND_ORDER[mode](actual, 0)(weight), expected) <= 1e-11


@pytest.mark.parametrize("name", PROJECTED)
@pytest.mark.parametrize("mode", SECOND_ORDER)
def test_second_order_in_weight_and_projection(mode, name):
    actual, definition = PROJECTED[name]
    arguments = random_rows(6, 5, dtype=torch.float64), matrices(2, 3, 5)
    expected = flat(hessian(definition, (0, 1))(*arguments))
    blocks = SECOND_ORDER[mode](actual, (0, 1))(*arguments)
    assert relative_error(flat(blocks), expected) <= 1e-11
    # and of one where the other is a constant
    for argnum in (0, 1):
        expected = hessian(definition, argnum)(*arguments)
        assert relative_error(SECOND_ORDER[mode](actual, argnum)(*arguments), expected) <= 1e-11


@pytest.mark.parametrize("mode", SECOND_ORDER)
def test_second_order_of_compressive_energy(mode, backend, device):
    arguments = (
        random_rows(12, 6, device=device),
        matrices(2, 4, 6, dtype=torch.float32, device=device),
    )
    expected = hessian(reference.compressive_energy, (0, 1))(*(x.double() for x in arguments))

    def energy(w, p):
        return comhe_ext.compressive_energy(w, p, backend=backend)

    blocks = SECOND_ORDER[mode](energy, (0, 1))(*arguments)
    assert relative_error(flat(blocks), flat(expected)) <= 1e-5


@pytest.mark.parametrize("name", ENERGIES)
def test_gradcheck_in_all_modes_of_energies(name):
    actual, _ = ENERGIES[name]
    for shape in ((5, 4), (2, 4, 4)):
        weight = random_rows(math.prod(shape[:-1]), 4, dtype=torch.float64).view(shape)
        weight.requires_grad_()
        assert torch.autograd.gradcheck(
            actual,
            weight,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        assert torch.autograd.gradgradcheck(
            actual, weight, check_fwd_over_rev=True, check_rev_over_rev=True
        )


@pytest.mark.parametrize("name", PROJECTED)
def test_gradcheck_in_all_modes_of_weight_and_projection(name):
    actual, _ = PROJECTED[name]
    arguments = random_rows(4, 5, dtype=torch.float64), matrices(2, 3, 5)
    for needed in ((True, True), (True, False), (False, True)):
        tensors = [
            x.clone().requires_grad_(wanted) for x, wanted in zip(arguments, needed, strict=True)
        ]
        assert torch.autograd.gradcheck(
            actual,
            tensors,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        assert torch.autograd.gradgradcheck(
            actual, tensors, check_fwd_over_rev=True, check_rev_over_rev=True
        )


def test_gradcheck_in_all_modes_of_packed_sets():
    points = random_rows(12, 3, dtype=torch.float64).requires_grad_()

    def energy(p):
        return packed_energy(p, [5, 0, 1, 4, 2], options_of(s=2.0, half_space=True))

    assert torch.autograd.gradcheck(
        energy,
        points,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        energy, points, check_fwd_over_rev=True, check_rev_over_rev=True
    )


@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
def test_products_and_hessian_of_torch_autograd_functional(strategy):
    functional = torch.autograd.functional
    weight, tangents = (random_rows(6, 4, seed=i, dtype=torch.float64) for i in (1, 2))
    projection = matrices(2, 3, 4)
    for actual, definition in (
        ENERGIES["half space"],
        (
            lambda w: comhe_ext.compressive_energy(w, projection),
            lambda w: reference.compressive_energy(w, projection),
        ),
        (
            lambda w: comhe_ext.angle_preserving_loss(w, projection, kind="angle"),
            lambda w: reference.angle_preserving_loss(w, projection, "angle"),
        ),
    ):
        expected = functional.hvp(definition, weight, tangents)[1]
        for product in (functional.hvp, functional.vhp):
            assert relative_error(product(actual, weight, tangents)[1], expected) <= 1e-11
        matrix = functional.hessian(
            actual, weight, vectorize=True, outer_jacobian_strategy=strategy
        )
        expected = functional.hessian(definition, weight)
        assert relative_error(matrix, expected) <= 1e-11


def test_a_second_derivative_stays_differentiable_in_its_tangents():
    # <t, H t> is a function of t too: its gradient there is 2 H t
    weight, tangents = (random_rows(6, 4, seed=i, dtype=torch.float64) for i in (1, 2))

    def curvature(t):
        product = jvp(grad(comhe_ext.hyperspherical_energy), (weight,), (t,))[1]
        return (product * t).sum()

    matrix = hessian(reference.hyperspherical_energy)(weight)
    expected = 2.0 * torch.einsum("ijkl,kl->ij", matrix, tangents)
    assert relative_error(grad(curvature)(tangents), expected) <= 1e-11
    assert relative_error(hessian(curvature)(tangents), 2.0 * matrix) <= 1e-11


def test_tangent_of_the_incoming_gradient_alone(backend, device):
    # the graph was made before the level: only the incoming gradient has a tangent
    weight = random_rows(30, 5, device=device).view(2, 15, 5).requires_grad_()
    energy = comhe_ext.hyperspherical_energy(weight, backend=backend)
    incoming, tangents = torch.rand(2, device=device), torch.rand(2, device=device)
    expected = torch.autograd.grad(energy, weight, tangents, retain_graph=True)[0]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(incoming, tangents)
        (gradient,) = torch.autograd.grad(energy, weight, dual)
        assert relative_error(forward_ad.unpack_dual(gradient).tangent, expected) <= 1e-6


def test_second_order_under_autocast(backend, device):
    weight, projection = (
        random_rows(12, 20, device=device),
        matrices(2, 8, 20, dtype=torch.float32, device=device),
    )

    def energy(w):
        one = comhe_ext.hyperspherical_energy(w, backend=backend)
        return one + comhe_ext.compressive_energy(w, projection, backend=backend)

    for mode in SECOND_ORDER.values():
        expected = mode(energy, 0)(weight)
        assert expected.isfinite().all()
        assert float(expected.norm()) > 0
        with torch.autocast(device, dtype=torch.bfloat16):
            assert relative_error(mode(energy, 0)(weight), expected) <= 1e-6


# --- vmap -----------------------------------------------------------------------------------------


def test_derivatives_of_vmapped_energies(backend, device):
    # under vmap no tensor says that it is being differentiated
    weight = random_rows(60, 5, device=device).view(4, 15, 5)
    tangents = random_rows(60, 5, seed=1, device=device).view(4, 15, 5)

    def energy(w):
        return comhe_ext.hyperspherical_energy(w, 1.0, backend=backend)

    def total(w):
        return vmap(energy)(w).sum()

    expected = torch.stack([grad(energy)(w) for w in weight])
    assert relative_error(grad(total)(weight), expected) <= 1e-6
    leaf = weight.clone().requires_grad_()
    total(leaf).backward()
    assert relative_error(leaf.grad, expected) <= 1e-6
    slopes = jvp(vmap(energy), (weight,), (tangents,))[1]
    assert relative_error(slopes, (expected * tangents).sum((1, 2))) <= 1e-5
    products = [jvp(grad(energy), (w,), (t,))[1] for w, t in zip(weight, tangents, strict=True)]
    actual = jvp(vmap(grad(energy)), (weight,), (tangents,))[1]
    assert relative_error(actual, torch.stack(products)) <= 1e-5


@pytest.mark.parametrize("name", [*ENERGIES, *PROJECTED])
def test_vmap_of_derivatives(name):
    actual, definition = {**ENERGIES, **PROJECTED}[name]
    batch = random_rows(18, 5, dtype=torch.float64).view(3, 6, 5)
    directions = random_rows(18, 5, seed=1, dtype=torch.float64).view(3, 6, 5)
    extra = (matrices(2, 3, 5),) if name in PROJECTED else ()

    def slope(function):
        return lambda w, t: jvp(lambda x: function(x, *extra), (w,), (t,))[1]

    def product(function):
        return lambda w, t: jvp(grad(lambda x: function(x, *extra)), (w,), (t,))[1]

    for derivative in (slope, product):
        expected = torch.stack(
            [derivative(definition)(w, t) for w, t in zip(batch, directions, strict=True)]
        )
        assert relative_error(vmap(derivative(actual))(batch, directions), expected) <= 1e-11
        # many directions at one point, and one direction at many points
        expected = torch.stack([derivative(definition)(batch[0], t) for t in directions])
        along = vmap(derivative(actual), (None, 0))(batch[0], directions)
        assert relative_error(along, expected) <= 1e-11
        expected = torch.stack([derivative(definition)(w, directions[0]) for w in batch])
        at = vmap(derivative(actual), (0, None))(batch, directions[0])
        assert relative_error(at, expected) <= 1e-11
    expected = torch.stack([hessian(definition)(w, *extra) for w in batch])
    for mode in SECOND_ORDER.values():
        blocks = vmap(lambda w, mode=mode: mode(actual, 0)(w, *extra))(batch)
        assert relative_error(blocks, expected) <= 1e-11


@pytest.mark.parametrize("name", [*ENERGIES, *PROJECTED])
def test_derivatives_of_vmap(name):
    actual, definition = {**ENERGIES, **PROJECTED}[name]
    batch = random_rows(18, 5, dtype=torch.float64).view(3, 6, 5)
    directions = random_rows(18, 5, seed=1, dtype=torch.float64).view(3, 6, 5)
    extra = (matrices(2, 3, 5),) if name in PROJECTED else ()

    def total(function):
        return lambda w: vmap(lambda x: function(x, *extra))(w).sum()

    def by_set(w):
        return torch.stack([definition(x, *extra) for x in w]).sum()

    expected = hessian(by_set)(batch)
    for mode in SECOND_ORDER.values():
        assert relative_error(mode(total(actual), 0)(batch), expected) <= 1e-11
    # the derivative under vmap, its tangents outside
    for outer in (
        lambda f: jvp(f, (batch,), (directions,))[1],
        lambda f: vjp(f, batch)[1](directions)[0],
    ):
        product = outer(vmap(grad(lambda x: actual(x, *extra))))
        assert relative_error(product, torch.einsum("abcdef,def->abc", expected, directions)) <= (
            1e-11
        )
    slopes = vmap(lambda x, t: jvp(lambda y: actual(y, *extra), (x,), (t,))[1])
    product = jvp(lambda w: slopes(w, directions).sum(), (batch,), (directions,))[1]
    curvature = (torch.einsum("abcdef,def->abc", expected, directions) * directions).sum()
    assert relative_error(product, curvature) <= 1e-11


def test_vmap_over_projections():
    weight = random_rows(6, 5, dtype=torch.float64)
    projections = torch.stack([matrices(2, 3, 5, seed=i) for i in range(3)])
    for name in PROJECTED:
        actual, definition = PROJECTED[name]
        expected = torch.stack([hessian(definition, 1)(weight, p) for p in projections])
        blocks = vmap(lambda p, f=actual: hessian(f, 1)(weight, p))(projections)
        assert relative_error(blocks, expected) <= 1e-11


def test_vmap_of_packed_sets_with_factors():
    points = random_rows(24, 3, dtype=torch.float64).view(2, 12, 3)
    tangents = random_rows(24, 3, seed=1, dtype=torch.float64).view(2, 12, 3)
    options = options_of(s=1.0, factors=[1.0, -2.0, 3.0])

    def energies(p):
        return packed_energy(p, [5, 3, 4], options)

    def slopes(p, t):
        return jvp(energies, (p,), (t,))[1]

    expected = torch.stack([slopes(p, t) for p, t in zip(points, tangents, strict=True)])
    assert relative_error(vmap(slopes)(points, tangents), expected) <= 1e-12
    assert relative_error(vmap(energies)(points), torch.stack([energies(p) for p in points])) == 0


def test_batched_gradients(backend, device):
    weight = random_rows(30, 5, device=device).view(2, 15, 5).requires_grad_()
    energy = comhe_ext.hyperspherical_energy(weight, backend=backend)
    incoming = torch.rand(3, 2, device=device)
    expected = torch.stack(
        [torch.autograd.grad(energy, weight, g, retain_graph=True)[0] for g in incoming]
    )
    for create_graph in (False, True):
        (actual,) = torch.autograd.grad(
            energy,
            weight,
            incoming,
            is_grads_batched=True,
            retain_graph=True,
            create_graph=create_graph,
        )
        assert relative_error(actual, expected) <= 1e-6


# --- third order ----------------------------------------------------------------------------------

REFUSED = pytest.raises(NotImplementedError, match="third derivatives are not implemented")


def directional(function, tangents):
    """Derivative along fixed tangents, by forward mode."""
    return lambda x: jvp(function, (x,), (tangents,))[1]


def pulled(function, tangents):
    """The same by reverse mode, of a function of one number."""

    def slope(x):
        value, pull = vjp(function, x)
        return (pull(torch.ones_like(value))[0] * tangents).sum()

    return slope


@pytest.mark.parametrize("name", ["chord", "groups", "compressive", "cosines", "angles"])
@pytest.mark.parametrize("modes", [f"{i:03b}" for i in range(8)])
def test_third_derivatives_are_refused_in_every_mix(modes, name):
    actual, _ = {**ENERGIES, **PROJECTED}[name]
    extra = (matrices(2, 3, 5),) if name in PROJECTED else ()
    weight, tangents = (random_rows(6, 5, seed=i, dtype=torch.float64) for i in (1, 2))

    def function(w):
        return actual(w, *extra)

    for mode in modes[:2]:
        function = (directional if mode == "1" else pulled)(function, tangents)
    assert function(weight).isfinite()
    with REFUSED:
        (directional if modes[2] == "1" else pulled)(function, tangents)(weight)


def test_third_derivatives_are_refused_among_dual_numbers():
    weight = random_rows(6, 4, dtype=torch.float64).requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, torch.ones_like(weight))
        energy = comhe_ext.hyperspherical_energy(dual)
        slope = forward_ad.unpack_dual(energy).tangent
        (second,) = torch.autograd.grad(slope, weight, create_graph=True)
        with REFUSED:
            torch.autograd.grad(second.sum(), weight)
