"""Cheap random projections: their matrices, the theory of these, and their derivatives."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import comhe_ext
from comhe_ext import CoMHE
from comhe_ext.projections import RandomProjection, sketches
from comhe_ext.testing import random_rows, reference, relative_error

pytestmark = [
    # torch's own, in forward mode and under transforms
    pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

KINDS = ("sparse", "hadamard", "fourier")
ALL = ("gaussian", *KINDS)


def drawn(kind, count, dim, width, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(size):
        return torch.randn(size, generator=generator, dtype=dtype)

    return sketches.draw_sketch(normal, kind, count, dim, width)


def network(width, dtype=torch.float64):
    """Layers of one width, groups and the columns of a weight as neurons."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(width, 30),
        nn.Linear(width, 20),
        nn.Conv2d(2 * width, 12, 1, groups=2),
        nn.ConvTranspose2d(6, width, 1),
        nn.Linear(8, 4),
    ).to(dtype)


# --- against the dense definition -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "width"), [(8, 9), (8, 10), (8, 16), (7, 300), (40, 401)])
def test_energy_under_the_matrices(kind, dim, width):
    """More projections than fit into one order of the coordinates, and fewer."""
    net = network(width)
    comhe = CoMHE(net, RandomProjection(6, dim, kind=kind, seed=1), first_layer=None)
    energy = comhe()
    matrices = comhe.projection.matrices()
    expected = 10 * reference.hyperspherical_energy(net[4].weight)
    for i in range(4):
        weight = net[i].weight
        sets = weight.flatten(1).chunk(2) if i == 2 else [weight.flatten(1)]
        if i == 3:
            sets = [weight.transpose(0, 1).flatten(1)]
        if sets[0].shape[1] > dim:
            assert matrices[str(i)].shape == (6, dim, sets[0].shape[1])
            of_sets = [reference.compressive_energy(x, matrices[str(i)], half_space=True)
                       for x in sets]  # fmt: skip
        else:
            of_sets = [reference.hyperspherical_energy(x, half_space=True) for x in sets]
        expected = expected + sum(of_sets) / len(sets)
    assert relative_error(energy, expected) <= 1e-12
    weights = [layer.weight for layer in net]
    gradients = torch.autograd.grad(energy, weights)
    for one, other in zip(gradients, torch.autograd.grad(expected, weights), strict=True):
        assert relative_error(one, other) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_and_below(kind):
    net = network(96, torch.float32)
    comhe = CoMHE(net, RandomProjection(4, 20, kind=kind, seed=1), exclude=["2", "3"])
    matrices = comhe.projection.matrices()
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 5e-3)):
        net.to(dtype)
        energy = comhe.eval()()
        assert energy.dtype == torch.float32
        weights = [net[i].weight.detach().double().requires_grad_() for i in (0, 1)]
        expected = 10 * reference.hyperspherical_energy(net[4].weight.detach().double())
        for i, weight in enumerate(weights):
            expected = expected + reference.compressive_energy(
                weight, matrices[str(i)].double(), half_space=True
            )
        assert relative_error(energy, expected) <= 2e-6
        gradients = torch.autograd.grad(energy, [net[0].weight, net[1].weight])
        for one, other in zip(gradients, torch.autograd.grad(expected, weights), strict=True):
            assert one.dtype == dtype
            assert relative_error(one, other) <= bound


def test_autocast_does_not_lower_the_precision():
    for kind in KINDS:
        net = network(96, torch.float32)
        comhe = CoMHE(net, RandomProjection(4, 20, kind=kind, seed=1)).eval()
        expected = torch.autograd.grad(comhe(), net[0].weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(torch.autograd.grad(comhe(), net[0].weight)[0], expected[0])
            with forward_ad.dual_level():
                tangent = torch.ones_like(net[0].weight)
                rows = forward_ad.make_dual(net[0].weight.detach(), tangent)
                sketch = drawn(kind, 4, 20, 96, dtype=torch.float32)
                projected = forward_ad.unpack_dual(sketch.project(rows[None]))
                assert torch.equal(projected.tangent, sketch.project(tangent[None]))


def test_rows_are_taken_in_parts(monkeypatch):
    """A processor takes some rows at a time; the last part is smaller."""
    net = network(70)
    comhe = {k: CoMHE(net, RandomProjection(4, 20, kind=k, seed=1)).eval() for k in KINDS}
    expected = {k: torch.autograd.grad(c(), net[0].weight)[0] for k, c in comhe.items()}
    monkeypatch.setattr(sketches, "ENTRIES_AT_ONCE", 70 * 7 // torch.get_num_threads())
    for kind in KINDS:
        (gradient,) = torch.autograd.grad(comhe[kind](), net[0].weight)
        assert relative_error(gradient, expected[kind]) <= 1e-13


# --- theory ---------------------------------------------------------------------------------------


def test_entries_of_sparse_matrices():
    for dim, width, zeros in ((40, 1280, 39 / 40), (40, 1281, 39 / 40), (40, 300, 7 / 8)):
        matrices = drawn("sparse", 5, dim, width).matrices()
        assert set(matrices.unique().tolist()) == {-1.0, 0.0, 1.0}
        # each column has as many signs as every other, and each row as many as there are inputs
        share = (matrices == 0).double().mean(1)
        assert relative_error(share, torch.full_like(share, zeros)) <= 1e-14
        per_row = (matrices != 0).sum(2)
        assert int(per_row.max() - per_row.min()) <= 40


@pytest.mark.parametrize(("kind", "width"), [("hadamard", 256), ("fourier", 250)])
def test_rows_of_transforms_are_orthogonal(kind, width):
    """As many projections as have coordinates of their own make an orthogonal matrix together."""
    count = width // 40
    matrices = drawn(kind, count, 40, width).matrices().flatten(0, 1)
    lengths = matrices.norm(dim=1, keepdim=True)
    gram = (matrices / lengths) @ (matrices / lengths).mT
    assert relative_error(gram, torch.eye(40 * count)) <= 1e-12
    # of the Fourier transform, the mean and the alternating sum weigh sqrt(2) times as much
    longest = math.sqrt(width) if kind == "hadamard" else math.sqrt(width / 2)
    assert float(lengths.median()) == pytest.approx(longest)
    assert float(matrices.abs().max()) <= 1 + 1e-12


@pytest.mark.parametrize("kind", ["hadamard", "fourier"])
def test_no_projection_takes_a_coordinate_twice(kind):
    for width in (41, 42, 64, 90, 130):
        indices = drawn(kind, 20, 40, width).indices
        assert indices.shape == (20, 40)
        assert all(len(of_one.unique()) == 40 for of_one in indices)
        # two halves of a complex number that are always zero
        assert kind == "hadamard" or not set(indices.unique().tolist()) & {1, width + 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [65, 90, 512])
def test_inner_products_are_unbiased(kind, width):
    """Over the draws, the mean of <P a, P b> is proportional to <a, b>."""
    rows = random_rows(12, width, dtype=torch.float64)
    rows[6:] = rows[:6] + 0.5 * rows[6:]
    # energy in few coordinates, which side by side would come into one block
    rows *= torch.linspace(-3, 3, width, dtype=torch.float64).exp()
    draws = 400
    of_draws = []
    for seed in range(draws):
        projected = drawn(kind, 3, 8, width, seed).project(rows[None])[0]
        of_draws.append((projected @ projected.mT).mean(0) / 8)
    products = torch.stack(of_draws)
    # the mean square of an entry of the matrices
    square = {
        "sparse": 1 / len(drawn("sparse", 3, 8, width).signs),
        "hadamard": 1.0,
        # the mean, and of an even width the alternating sum, have twice the weight of others
        "fourier": 0.5 + (2 - width % 2) / (2 * width),
    }
    expected = rows @ rows.mT * square[kind]
    deviation = products.std(0) / math.sqrt(draws)
    z = (products.mean(0) - expected) / deviation
    assert float(z.abs().max()) < 4.5
    assert float(deviation.max() / expected.abs().max()) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_cosines_spread_as_under_normal_matrices(kind):
    """The cosine of a pair after projection: the mean and the variance of the Gaussian kind."""
    a, b = torch.nn.functional.normalize(random_rows(2, 512, dtype=torch.float64))
    for cosine in (0.0, 0.5, 0.9):
        rows = torch.stack([a, cosine * a + math.sqrt(1 - cosine**2) * (b - (a @ b) * a)])
        found = {}
        for which in ("gaussian", kind):
            values = []
            for seed in range(150):
                if which == "gaussian":
                    generator = torch.Generator().manual_seed(seed)
                    p = rows @ torch.randn(4, 512, 40, generator=generator, dtype=rows.dtype)
                else:
                    p = drawn(which, 4, 40, 512, seed).project(rows[None])[0]
                values += torch.nn.functional.cosine_similarity(p[:, 0], p[:, 1], dim=1)
            found[which] = torch.stack(values)
        normal, ours = found["gaussian"], found[kind]
        difference = float(normal.mean() - ours.mean())
        assert abs(difference) < 4.5 * math.sqrt(float(normal.var() + ours.var()) / len(ours))
        # the standard error of a ratio of variances is sqrt(4 / n), here 0.08
        assert 0.65 < float(ours.var() / normal.var()) < 1.35


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_as_near_the_mean_as_that_of_normal_matrices(kind):
    torch.manual_seed(1)
    centers = torch.randn(20, 512)
    layer = nn.Linear(512, 300, bias=False)
    with torch.no_grad():
        # columns of very different lengths, by runs, as those of channels are
        scales = torch.randn(64).exp().repeat_interleave(8)
        layer.weight.copy_((centers[torch.arange(300) % 20] + torch.randn(300, 512)) * scales)

    def gradients(which, draws, seed):
        comhe = CoMHE(layer, RandomProjection(20, 40, kind=which, seed=seed), output_layer=None)
        return [torch.autograd.grad(comhe(), layer.weight)[0].double() for _ in range(draws)]

    mean = torch.stack(gradients("gaussian", 50, 1)).mean(0)
    errors = {
        which: [relative_error(g, mean) for g in gradients(which, 6, 2)]
        for which in ("gaussian", kind)
    }
    assert sum(errors[kind]) <= 1.05 * sum(errors["gaussian"])


# --- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [11, 12])
def test_derivatives(kind, width):
    sketch = drawn(kind, 3, 4, width)
    rows = random_rows(10, width, dtype=torch.float64).view(2, 5, width).requires_grad_()
    checks = dict(check_forward_ad=True, check_batched_grad=True)
    assert gradcheck(sketch.project, rows, **checks)
    assert gradgradcheck(lambda x: sketch.project(x).square(), rows)
    expected = torch.func.vmap(lambda x: x @ sketch.matrices().mT)(rows)
    assert relative_error(sketch.project(rows), expected) <= 1e-14
    batched = torch.func.vmap(sketch.project, in_dims=1)(rows.unsqueeze(1))
    assert torch.equal(batched[0], sketch.project(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_of_an_energy(kind):
    sketch = drawn(kind, 2, 6, 9)
    rows = random_rows(4, 9, dtype=torch.float64)[None].requires_grad_()

    def energies(rows):
        return comhe_ext.hyperspherical_energy(sketch.project(rows)[0], half_space=True)

    assert gradcheck(energies, rows, check_forward_ad=True)
    assert gradgradcheck(energies, rows)
    expected = reference.compressive_energy(rows[0], sketch.matrices(), half_space=True)
    assert relative_error(energies(rows).mean(), expected) <= 1e-12


# --- draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_a_function_of_seed_and_step(kind):
    def energies(seed, **options):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(60, 20), nn.Linear(20, 4))
        comhe = CoMHE(net, RandomProjection(3, 8, kind=kind, seed=seed, **options))
        return [float(comhe().detach()) for _ in range(6)]

    assert energies(1) == energies(1) != energies(2)
    assert len(set(energies(1))) == 6
    every = energies(1, every=3)
    assert every[0] == every[1] == every[2] != every[3] == every[4] == every[5]


@pytest.mark.parametrize("kind", ALL)
def test_layers_of_equal_width_share_a_draw(kind):
    net = nn.Sequential(nn.Linear(60, 70), nn.Linear(60, 9), nn.Linear(61, 70), nn.Linear(70, 3))
    projection = RandomProjection(dim=8, neurons_per_projection=10, kind=kind, seed=1)
    comhe = CoMHE(net, projection, half_space=False)
    matrices = comhe.projection.matrices()
    assert {name: len(x) for name, x in matrices.items()} == {"0": 7, "1": 1, "2": 7}
    assert torch.equal(matrices["1"], matrices["0"][:1])
    assert not torch.equal(matrices["2"][..., :60], matrices["0"])
    with torch.no_grad():
        expected = 10 * reference.hyperspherical_energy(net[3].weight)
        for name, x in matrices.items():
            expected = expected + reference.compressive_energy(net[int(name)].weight, x)
        assert relative_error(comhe.eval()(), expected) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_layers_are_left_out(kind):
    net = network(60)
    net[0].requires_grad_(False)
    comhe = CoMHE(net, RandomProjection(3, 8, kind=kind, seed=1))
    assert list(comhe.projection.matrices()) == ["1", "2"]
    comhe().backward()
    assert net[1].weight.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind):
    net = network(60, torch.float32)
    comhe = CoMHE(net, RandomProjection(3, 8, kind=kind, seed=1))
    expected = CoMHE(net, RandomProjection(3, 8, kind=kind, seed=1))
    compiled = torch.compile(comhe, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        energy, eager = compiled(), expected()
        assert relative_error(energy, eager) <= 1e-6
        weights = [net[i].weight for i in range(3)]
        gradients = torch.autograd.grad(energy, weights)
        for one, other in zip(gradients, torch.autograd.grad(eager, weights), strict=True):
            assert relative_error(one, other) <= 1e-6


def test_a_kind_that_is_none():
    for kind in ("dense", None, 3):
        with pytest.raises(ValueError, match=r"`kind` must be one of .*'fourier'.*, got "):
            RandomProjection(kind=kind)
    assert "sparse" in repr(RandomProjection(kind="sparse"))
