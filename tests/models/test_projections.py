"""The projections of a model against dense float64 autograd, their theory and their state."""

import copy
import io
import itertools
import math

import pytest
import torch
from torch import nn

import comhe_ext
from comhe_ext import CoMHE
from comhe_ext.projections import (
    AdversarialProjection,
    AngleProjection,
    GroupProjection,
    Projection,
    RandomProjection,
)
from comhe_ext.projections.draws import seed_of
from comhe_ext.testing import random_rows, reference, relative_error

MODES = ("alternating", "unrolled")


def network(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 7), nn.Linear(7, 4)).to(dtype)


def matrices_of(comhe):
    return comhe.projection.matrices()


def learned(projection, *names):
    """The matrices that a projection has learned so far for some layers."""
    return [projection.get_buffer(f"matrices/{name}").clone() for name in names]


# --- against the dense definition -----------------------------------------------------------------


def root_of_angles(weight, matrices, kind):
    """What an AngleProjection descends."""
    losses = [reference.angle_preserving_loss(weight, p.unsqueeze(0), kind) for p in matrices]
    return sum(loss if kind == "cosine" else loss.sqrt() for loss in losses)


def minus_energy(weight, matrices):
    """What an AdversarialProjection descends."""
    return -reference.compressive_energy(weight, matrices)


LEARNED = {
    "cosine": (AngleProjection, dict(kind="cosine"), lambda w, p: root_of_angles(w, p, "cosine")),
    "angle": (AngleProjection, dict(kind="angle"), lambda w, p: root_of_angles(w, p, "angle")),
    "adversarial": (AdversarialProjection, {}, minus_energy),
}


def descend(objective, weight, matrices, lr, decay, create_graph=False):
    matrices = matrices.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(
        objective(weight, matrices), matrices, create_graph=create_graph
    )
    return matrices - lr * (gradient + decay * matrices.detach())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", LEARNED)
def test_training_steps_of_learned_projections(which, mode):
    """Two steps of weights and matrices, by the package and by autograd of the dense definition."""
    kind, options, objective = LEARNED[which]
    settings = dict(lr=0.02, iterations=3, weight_decay=1e-2, mode=mode)
    projection = kind(2, 5, **options, **settings, seed=4)
    net = network()
    comhe = CoMHE(net, projection, output_weight=2.0, backend="torch")
    weights = [net[i].weight.detach().clone().requires_grad_() for i in (0, 2, 3)]
    names = ["0", "2"]
    matrices = learned(projection, *names)
    descent = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        descent.zero_grad()
        energy = comhe()
        energy.backward()
        descent.step()

        for index in range(2):
            for _ in range(3):
                matrices[index] = descend(
                    objective, weights[index].detach(), matrices[index], 0.02, 1e-2
                ).detach()
        ahead = matrices
        if mode == "unrolled":
            ahead = [
                descend(objective, w, m, 0.02, 0.0, create_graph=True)
                for w, m in zip(weights, matrices, strict=False)
            ]
        expected = 2.0 * reference.hyperspherical_energy(weights[2])
        for w, m in zip(weights, ahead, strict=False):
            expected = expected + reference.compressive_energy(w, m, half_space=True)
        gradients = torch.autograd.grad(expected, weights)
        assert relative_error(energy, expected) <= 1e-10
        for index, gradient in zip((0, 2, 3), gradients, strict=True):
            assert relative_error(net[index].weight.grad, gradient) <= 1e-10
        weights = [
            (w - 0.1 * g).detach().requires_grad_() for w, g in zip(weights, gradients, strict=True)
        ]
    for index, weight in zip((0, 2, 3), weights, strict=True):
        assert relative_error(net[index].weight, weight) <= 1e-10
    for actual, expected in zip(learned(projection, *names), matrices, strict=True):
        assert relative_error(actual, expected) <= 1e-10
        assert not actual.requires_grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", LEARNED)
def test_learned_projections_in_float32(which, mode, backend, device):
    kind, options, objective = LEARNED[which]
    projection = kind(1, 5, **options, iterations=1, lr=0.02, mode=mode, seed=4)
    net = network(torch.float32).to(device)
    comhe = CoMHE(net, projection, output_layer=None, exclude=["3"], backend=backend)
    before = [matrices.double() for matrices in learned(projection, "0", "2")]
    energy = comhe()
    gradients = torch.autograd.grad(energy, [net[0].weight, net[2].weight])
    weights = [net[i].weight.detach().double().requires_grad_() for i in (0, 2)]
    after = [
        descend(objective, w.detach(), m, 0.02, 5e-7) for w, m in zip(weights, before, strict=True)
    ]
    if mode == "unrolled":
        after = [
            descend(objective, w, m, 0.02, 0.0, True) for w, m in zip(weights, after, strict=True)
        ]
    expected = sum(
        reference.compressive_energy(w, m, half_space=True)
        for w, m in zip(weights, after, strict=True)
    )
    assert relative_error(energy, expected) <= 1e-5
    for one, other in zip(gradients, torch.autograd.grad(expected, weights), strict=True):
        assert relative_error(one, other) <= 1e-4


def test_grouped_convolutions_share_the_matrices_of_their_layer():
    torch.manual_seed(1)
    layer = nn.Conv2d(8, 12, 3, groups=2).double()
    projection = AngleProjection(1, 6, lr=0.02, mode="alternating", weight_decay=0.0, seed=1)
    comhe = CoMHE(layer, projection, first_layer=None, output_layer=None)
    (before,) = projection.matrices().values()
    energy = comhe()
    groups = layer.weight.detach().view(2, 6, 36)
    after = descend(
        lambda w, p: sum(root_of_angles(group, p, "cosine") for group in w), groups, before, 0.02, 0
    )
    expected = sum(reference.compressive_energy(g, after, half_space=True) for g in groups) / 2
    assert relative_error(energy, expected) <= 1e-12


# --- random ---------------------------------------------------------------------------------------


def draws(comhe, steps):
    drawn = []
    for _ in range(steps):
        comhe()
        drawn.append(matrices_of(comhe)["0"])
    return drawn


def test_random_matrices_are_normal_and_fresh():
    net = nn.Sequential(nn.Linear(300, 50), nn.Linear(50, 4))
    comhe = CoMHE(net, RandomProjection(seed=5))
    first, second = draws(comhe, 2)
    assert first.shape == (20, 40, 300)
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)
    for matrices in (first, second):
        count = matrices.numel()
        assert abs(float(matrices.mean())) < 6 / count**0.5
        assert float(matrices.var()) == pytest.approx(1.0, abs=6 * (2 / count) ** 0.5)
    correlation = float((first * second).mean())
    assert abs(correlation) < 6 / first.numel() ** 0.5


def test_the_seed_decides():
    def energies(seed, **options):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(60, 20), nn.Linear(20, 4))
        comhe = CoMHE(net, RandomProjection(3, 8, seed=seed, **options))
        return [float(comhe().detach()) for _ in range(6)]

    assert energies(1) == energies(1) != energies(2)
    assert len(set(energies(1))) == 6
    every = energies(1, every=3)
    assert every[0] == every[1] == every[2] != every[3] == every[4] == every[5]
    torch.manual_seed(1)
    default = RandomProjection()._state[0]
    torch.manual_seed(2)
    assert RandomProjection()._state[0] != default


def test_nearby_seeds_and_steps_share_no_draw():
    net = nn.Sequential(nn.Linear(60, 20), nn.Linear(20, 4))
    firsts = [
        float(matrices[0, 0, 0])
        for seed in range(8)
        for matrices in draws(CoMHE(net, RandomProjection(2, 8, seed=seed)), 8)
    ]
    assert len(set(firsts)) == 64
    # a generator may look at 32 bits of its seed alone
    seeds = {seed_of(*x) % 2**32 for x in itertools.product(range(20), range(20), range(-5, 5))}
    assert len(seeds) == 4000


def test_drawing_leaves_torch_s_generator_alone():
    comhe = CoMHE(nn.Sequential(nn.Linear(60, 20), nn.Linear(20, 4)), "random")
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    comhe()
    assert torch.equal(torch.rand(1), expected)


def test_equal_widths_share_a_draw_and_others_do_not():
    net = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 50), nn.Linear(50, 50), nn.Linear(50, 3))
    drawn = matrices_of(CoMHE(net, RandomProjection(seed=1)))
    assert drawn["0"].data_ptr() == drawn["1"].data_ptr()
    assert not torch.equal(drawn["1"][..., :50], drawn["2"])


def test_one_projection_for_so_many_neurons():
    net = nn.Sequential(nn.Linear(60, 70), nn.Linear(70, 9), nn.Linear(9, 3))
    comhe = CoMHE(net, RandomProjection(dim=8, neurons_per_projection=10, seed=1))
    assert {k: len(v) for k, v in matrices_of(comhe).items()} == {"0": 7, "1": 1}
    expected = 10 * reference.hyperspherical_energy(net[2].weight.detach())
    for name, matrices in matrices_of(comhe).items():
        weight = net[int(name)].weight.detach()
        expected = expected + reference.compressive_energy(weight, matrices, half_space=True)
    with torch.no_grad():
        assert relative_error(comhe(), expected) <= 1e-6


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "strided", "channels"])
def test_groups_are_selections_of_coordinates(layout):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(7, 10, 3), nn.Conv2d(10, 9, (2, 1)), nn.Linear(9, 5)).double()
    comhe = CoMHE(net, GroupProjection(3, layout), first_layer=None)
    selected = matrices_of(comhe)
    assert list(selected) == ["0", "1"]
    expected = 10 * reference.hyperspherical_energy(net[2].weight.detach())
    for name, matrices in selected.items():
        weight = net[int(name)].weight.detach().flatten(1)
        # every coordinate in one group, and a group is nothing but coordinates
        assert torch.equal(matrices.sum((0, 1)), torch.ones(weight.shape[1], dtype=torch.float64))
        assert set(matrices.unique().tolist()) <= {0.0, 1.0}
        expected = expected + reference.compressive_energy(weight, matrices, half_space=True)
    assert relative_error(comhe(), expected) <= 1e-12
    kernel = 9 if layout == "channels" else 1
    widths = selected["0"].sum((1, 2)).tolist()
    assert all(width % kernel == 0 for width in widths)
    assert max(widths) - min(widths) <= kernel
    if layout == "strided":
        assert selected["0"][1].argmax(1).tolist() == list(range(1, 63, 3))


def test_one_group_is_plain_energy():
    net = network()
    assert torch.equal(CoMHE(net, GroupProjection(1))(), CoMHE(net, None)())


def test_contiguous_groups_are_those_of_group_energy():
    net = network()
    comhe = CoMHE(net, "group", exclude=["2"], output_layer=None)
    energies = [
        comhe_ext.group_energy(net[i].weight, min(4, net[i].in_features // 2), half_space=True)
        for i in (0, 3)
    ]
    assert relative_error(comhe(), sum(energies)) <= 1e-14


@pytest.mark.parametrize("layout", ["contiguous", "strided", "channels"])
def test_no_group_has_a_single_coordinate(layout):
    # in one dimension neurons cannot turn: an energy of a million, and no gradient
    layer = nn.Linear(7, 5).double()
    comhe = CoMHE(layer, GroupProjection(8, layout), output_layer=None)
    columns = [[0, 3, 6], [1, 4], [2, 5]] if layout == "strided" else [[0, 1, 2], [3, 4], [5, 6]]
    expected = comhe_ext.group_energy(layer.weight, columns, half_space=True)
    assert relative_error(comhe(), expected) <= 1e-14
    conv = nn.Conv2d(3, 5, 3).double()
    comhe = CoMHE(conv, GroupProjection(8, layout), output_layer=None, first_layer=None)
    widths = comhe.projection.matrices()[""].sum((1, 2))
    assert float(widths.min()) >= (9 if layout == "channels" else 2)
    assert len(widths) <= 8
    narrow = nn.Linear(3, 5).double()
    comhe = CoMHE(narrow, GroupProjection(2, layout), output_layer=None)
    assert torch.equal(comhe(), CoMHE(narrow, None, output_layer=None)())


# --- theory ---------------------------------------------------------------------------------------


def test_angle_bounds_of_random_projection_hold_with_their_probability():
    # Lin et al. (2020): with probability at least (1 - 2 exp(-k e^2 / 8))^2,
    # (cos t - e)/(1 + e) < cos t_P < (cos t + e)/(1 - e)
    rows = random_rows(2000, 50, dtype=torch.float64)
    rows[1000:] += rows[:1000] * torch.linspace(-2, 2, 1000, dtype=torch.float64)[:, None]
    a, b = rows[:1000], rows[1000:]
    for k, e in ((40, 0.7), (60, 0.8), (200, 0.35)):
        matrices = comhe_ext.random_projection(20, k, 50, dtype=torch.float64)
        cosine = nn.functional.cosine_similarity(a, b)
        projected = nn.functional.cosine_similarity(a @ matrices.mT, b @ matrices.mT, dim=-1)
        inside = (projected > (cosine - e) / (1 + e)) & (projected < (cosine + e) / (1 - e))
        assert float(inside.double().mean()) >= (1 - 2 * math.exp(-k * e**2 / 8)) ** 2


@pytest.mark.parametrize("kind", ["cosine", "angle"])
def test_angle_projection_lowers_the_error_of_the_angles(kind):
    net = nn.Sequential(nn.Linear(80, 60), nn.Linear(60, 4))
    projection = AngleProjection(1, 20, kind=kind, iterations=100, mode="alternating", seed=2)
    comhe = CoMHE(net, projection)

    def errors():
        matrices = projection.matrices()["0"]
        return [
            float(comhe_ext.angle_preserving_loss(net[0].weight.detach(), matrices, kind=k))
            for k in ("cosine", "angle")
        ]

    before = errors()
    comhe()
    after = errors()
    assert after[0] < 0.9 * before[0]
    assert after[1] < 0.8 * before[1]


def test_adversarial_projection_raises_the_energy_that_the_weights_lower():
    net = nn.Sequential(nn.Linear(80, 60), nn.Linear(60, 4))
    projection = AdversarialProjection(1, 10, mode="alternating", lr=1.0, seed=2)
    CoMHE(net, projection)
    energies = []
    for _ in range(4):
        matrices = projection.matrices()["0"]
        energies.append(float(comhe_ext.compressive_energy(net[0].weight.detach(), matrices)))
        projection.step()
    assert energies == sorted(energies)
    assert energies[-1] > 1.01 * energies[0]


# --- state ----------------------------------------------------------------------------------------

KINDS = {
    "random": lambda: RandomProjection(3, 5, seed=1),
    "sparse": lambda: RandomProjection(3, 5, kind="sparse", seed=1),
    "hadamard": lambda: RandomProjection(3, 5, kind="hadamard", seed=1),
    "fourier": lambda: RandomProjection(3, 5, kind="fourier", seed=1),
    "angle": lambda: AngleProjection(1, 5, lr=0.01, seed=1),
    "adversarial": lambda: AdversarialProjection(1, 5, iterations=2, lr=0.01, seed=1),
    "group": lambda: GroupProjection(2),
}


def train(net, comhe, steps):
    descent = torch.optim.SGD(net.parameters(), lr=0.05)
    energies = []
    for _ in range(steps):
        descent.zero_grad()
        energy = comhe()
        energy.backward()
        descent.step()
        energies.append(energy.detach())
    return torch.stack(energies)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_goes_on_bit_by_bit(kind):
    net = network(torch.float32)
    comhe = CoMHE(net, KINDS[kind](), warm_up=6)
    train(net, comhe, 3)
    buffer = io.BytesIO()
    torch.save({"net": net.state_dict(), "comhe": comhe.state_dict()}, buffer)
    expected = train(net, comhe, 3)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = network(torch.float32)
    projection = KINDS[kind]()
    again = CoMHE(other, projection, warm_up=6)
    other.load_state_dict(saved["net"])
    again.load_state_dict(saved["comhe"])
    assert torch.equal(train(other, again, 3), expected)
    assert all(map(torch.equal, other.parameters(), net.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_their_own_way(kind):
    both = nn.ModuleDict({"net": network(torch.float32)})
    both["comhe"] = CoMHE(both["net"], KINDS[kind]())
    train(both["net"], both["comhe"], 2)
    copied = copy.deepcopy(both)
    expected = train(both["net"], both["comhe"], 2)
    assert torch.equal(train(copied["net"], copied["comhe"], 2), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_copies(kind):
    both = nn.ModuleDict({"net": network(torch.float32)})
    both["comhe"] = CoMHE(both["net"], KINDS[kind]())
    average = torch.optim.swa_utils.AveragedModel(
        both, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    for _ in range(2):
        train(both["net"], both["comhe"], 1)
        average.update_parameters(both)
    energy = average.module["comhe"].eval()()
    assert energy.isfinite()
    assert not torch.equal(average.module["net"][0].weight, both["net"][0].weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_another_dtype(kind, dtype):
    both = nn.ModuleDict({"net": network(torch.float32)})
    both["comhe"] = CoMHE(both["net"], KINDS[kind]())
    before = {name: x.clone() for name, x in both["comhe"].named_buffers()}
    both.to(dtype)
    # the matrices keep what they have learned
    assert all(torch.equal(x, before[name]) for name, x in both["comhe"].named_buffers())
    energies = train(both["net"], both["comhe"], 2)
    assert energies.isfinite().all()
    assert energies.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_no_step_without_training():
    net = network(torch.float32)
    for kind in KINDS.values():
        comhe = CoMHE(net, kind())
        first = comhe()
        with torch.no_grad():
            assert comhe() == comhe()
        state = copy.deepcopy(comhe.state_dict())
        comhe.eval()
        assert torch.equal(comhe(), comhe())
        for name, value in comhe.state_dict().items():
            assert torch.equal(value, state[name])
        comhe.train()
        assert first.requires_grad
        assert comhe().requires_grad


# --- where the state lives, and when it is made ---------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("together", [False, True])
def test_models_that_are_made_without_memory(kind, together):
    def make():
        both = nn.ModuleDict({"net": network(torch.float32)})
        both["comhe"] = CoMHE(both["net"], KINDS[kind](), warm_up=5)
        return both

    def materialize(both):
        both["net"].to_empty(device="cpu")
        if together:
            both["comhe"].to_empty(device="cpu")
        both["net"].load_state_dict(expected["net"].state_dict())

    expected = make()
    with torch.device("meta"):
        both = make()
    assert both["net"][0].weight.is_meta
    assert both["comhe"].get_extra_state().device.type == "cpu"
    materialize(both)
    poison = [torch.full((2, 5, 12), float("nan")) for _ in range(20)]
    del poison
    ours = train(both["net"], both["comhe"], 3)
    assert torch.equal(ours, train(expected["net"], expected["comhe"], 3))
    # a state can be loaded in either direction
    with torch.device("meta"):
        again = make()
    again["comhe"].load_state_dict(both["comhe"].state_dict())
    materialize_state = {k: v.clone() for k, v in both["net"].state_dict().items()}
    again["net"].to_empty(device="cpu")
    again["net"].load_state_dict(materialize_state)
    actual = train(again["net"], again["comhe"], 2)
    assert torch.equal(actual, train(both["net"], both["comhe"], 2))


def test_a_state_without_numbers_is_refused():
    comhe = CoMHE(network(), RandomProjection(3, 5, seed=1))
    state = {name: x.to("meta") for name, x in comhe.state_dict().items()}
    with pytest.raises(ValueError, match="meta device"):
        comhe.load_state_dict(state)


def test_state_is_on_the_host_whatever_the_default_device():
    for context in (torch.device("meta"), torch.inference_mode(), torch.no_grad()):
        with context:
            comhe = CoMHE(network(), RandomProjection(3, 5, seed=1))
        for state in comhe.state_dict().values():
            assert state.device.type == "cpu"
            assert not state.is_inference()
    for context in (torch.inference_mode(), torch.no_grad()):
        with context:
            net = network(torch.float32)
            comhe = CoMHE(net, "adversarial")
        expected = CoMHE(network(torch.float32), "adversarial")
        assert torch.equal(comhe().detach(), expected().detach())


@pytest.mark.parametrize("kind", ["angle", "adversarial"])
def test_learned_matrices_of_layers_of_any_name(kind):
    names = ["mode", "step", "kind", "dim", "training", "lr", "matrices", "forward", "a/b", "a%2Fb"]
    net = nn.Module()
    for name in names:
        net._modules[name] = nn.Linear(12, 9)
    net._modules["a"] = nn.Module()
    net._modules["a"]._modules["b"] = nn.Linear(12, 9)
    comhe = CoMHE(net, KINDS[kind](), output_layer=None)
    assert comhe().isfinite()
    found = comhe.projection.matrices()
    assert sorted(found) == sorted([*names, "a.b"])
    assert len({float(m.detach().sum()) for m in found.values()}) == len(names) + 1
    again = CoMHE(net, KINDS[kind](), output_layer=None)
    again.load_state_dict(comhe.state_dict())
    assert torch.equal(again(), comhe())


# --- bad use --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "`num_projections` must be at least 1, got 0", lambda: RandomProjection(0)),
        (ValueError, "`dim` must be at least 1, got 0", lambda: RandomProjection(dim=0)),
        (TypeError, "`dim` must be an int, got float", lambda: RandomProjection(dim=4.0)),
        (ValueError, "`every` must be at least 1", lambda: RandomProjection(every=0)),
        (
            ValueError,
            "exclude each other",
            lambda: RandomProjection(3, neurons_per_projection=2),
        ),
        (
            ValueError,
            "`neurons_per_projection` must be",
            lambda: RandomProjection(neurons_per_projection=0),
        ),
        (TypeError, "`seed` must be an int or None, got str", lambda: RandomProjection(seed="1")),
        (ValueError, "`groups` must be at least 1", lambda: GroupProjection(0)),
        (ValueError, "`layout` must be .* got 'random'", lambda: GroupProjection(2, "random")),
        (ValueError, "`kind` must be 'cosine' or 'angle'", lambda: AngleProjection(kind="x")),
        (ValueError, "`mode` must be 'unrolled' or 'al", lambda: AngleProjection(mode="x")),
        (TypeError, "`lr` must be a number", lambda: AngleProjection(lr=None)),
        (
            ValueError,
            "`lr` must be finite and at least 0, got nan",
            lambda: AngleProjection(lr=math.nan),
        ),
        (ValueError, "`lr` must be finite .* got -0.1", lambda: AdversarialProjection(lr=-0.1)),
        (ValueError, "`lr` must be finite", lambda: setattr(AngleProjection(), "lr", math.inf)),
        (ValueError, "`weight_decay` must be finite", lambda: AngleProjection(weight_decay=-1e-3)),
        (
            ValueError,
            "`dim` must be at least 2: .* nowhere to turn",
            lambda: RandomProjection(dim=1),
        ),
        (ValueError, "`dim` must be at least 2", lambda: AngleProjection(dim=1)),
        (
            ValueError,
            "`iterations` must be at least 1",
            lambda: AdversarialProjection(iterations=0),
        ),
        (ValueError, "`dim` must be at least 1", lambda: AdversarialProjection(dim=0)),
    ],
)
def test_messages(error, message, make):
    with pytest.raises(error, match=message):
        make()


def test_a_projection_belongs_to_one_regularizer():
    projection = RandomProjection()
    CoMHE(nn.Sequential(nn.Linear(60, 20), nn.Linear(20, 4)), projection)
    with pytest.raises(ValueError, match="already belongs to a regularizer"):
        CoMHE(nn.Sequential(nn.Linear(60, 20), nn.Linear(20, 4)), projection)


@pytest.mark.parametrize(
    ("error", "message", "returned"),
    [
        (TypeError, "`Wrong.matrices` must return a dict .* got list", []),
        (ValueError, "a tensor for every layer, got none for '0', only ", {}),
        (TypeError, "`matrices of layer '0'` must be a torch.Tensor", {"0": None}),
        (ValueError, r"`matrices of layer '0'` must be \[C, k, 12\], got shape \(3, 12\)",
         {"0": torch.ones(3, 12)}),
        (ValueError, r"must be \[C, k, 12\], got shape \(1, 3, 11\)", {"0": torch.ones(1, 3, 11)}),
        (ValueError, r"must be \[C, k, 12\], got shape \(0, 3, 12\)", {"0": torch.ones(0, 3, 12)}),
        (TypeError, "must be float16, bfloat16", {"0": torch.ones(1, 3, 12).long()}),
        (ValueError, "must be on cpu, got meta", {"0": torch.ones(1, 3, 12, device="meta")}),
    ],
)  # fmt: skip
def test_what_a_projection_of_one_s_own_returns_is_checked(error, message, returned):
    class Wrong(Projection):
        def matrices(self, rows=None):
            return returned

    comhe = CoMHE(nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 4)), Wrong())
    with pytest.raises(error, match=message):
        comhe()


def test_a_projection_of_one_s_own():
    class Halves(Projection):
        """Keeps the first half of the coordinates."""

        def matrices(self, rows=None):
            return {
                layer.name: torch.eye(layer.rows().shape[2] // 2, layer.rows().shape[2])[None]
                for layer in self.learning()
            }

    net = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 4))
    expected = reference.hyperspherical_energy(net[0].weight.detach()[:, :6], half_space=True)
    expected = expected + 10 * reference.hyperspherical_energy(net[1].weight.detach())
    assert relative_error(CoMHE(net, Halves())(), expected) <= 1e-6
