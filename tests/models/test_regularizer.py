"""CoMHE on whole models: which layers it takes, what it adds up, and that it trains."""

import copy
import io
import itertools
import math
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import comhe_ext
from comhe_ext import CoMHE, bounds
from comhe_ext.kernels.pair_functions import Riesz
from comhe_ext.projections import RandomProjection
from comhe_ext.testing import reference, relative_error

# torch's own tracer makes an instance of every autograd Function that it meets
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


class Net(nn.Module):
    """A small network with layers of every kind that has neurons, and some that do not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 16, 3, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)  # one filter a group: no pairs
        self.hidden = nn.Linear(16, 50)
        self.out = nn.Linear(50, 10)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        x = self.depthwise(self.grouped(x).relu()).relu().mean((2, 3))
        return self.out(self.hidden(x).relu())


def names(comhe):
    return [layer.name for layer in comhe.layers]


def test_finds_the_layers_that_have_pairs_of_neurons():
    comhe = CoMHE(Net())
    assert names(comhe) == ["conv", "grouped", "hidden", "out"]
    assert comhe.first_layer == "conv"
    assert comhe.output_layer == "out"
    assert "4 layers" in repr(comhe)
    assert "20 projections to 40 dimensions" in repr(comhe)
    # the layers belong to the model, not to the regularizer
    assert list(comhe.parameters()) == []
    assert all("weight" not in name for name in comhe.state_dict())


def test_energy_without_projection_is_the_sum_over_layers():
    net = Net()
    with torch.no_grad():
        energy = CoMHE(net, projection=None, weight=0.5, output_weight=3.0)()
        groups = net.grouped.weight.view(4, 4, -1)
        expected = 0.5 * reference.hyperspherical_energy(
            net.conv.weight.flatten(1), half_space=True
        )
        expected += 0.5 * reference.hyperspherical_energy(groups, half_space=True).mean()
        expected += 0.5 * reference.hyperspherical_energy(net.hidden.weight, half_space=True)
        expected += 3.0 * reference.hyperspherical_energy(net.out.weight)
    assert energy.shape == ()
    assert energy.dtype == torch.float32
    assert relative_error(energy, expected) <= 1e-6


def test_energy_with_projections_is_that_of_the_same_projections():
    net = nn.Sequential(nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 45), nn.Linear(45, 10))
    comhe = CoMHE(net, RandomProjection(3, 35), s=1.0)
    energy = comhe()
    # wider than dim: projected; else the weights as they are; the last one plain
    (matrices,) = comhe.projection.matrices().values()
    exact = [w.detach().double().requires_grad_() for w in (net[0].weight, net[2].weight)]
    output = net[3].weight.detach().double().requires_grad_()
    expected = reference.compressive_energy(exact[0], matrices, 1.0, half_space=True)
    expected = expected + reference.hyperspherical_energy(exact[1], 1.0, half_space=True)
    expected = expected + 10 * reference.hyperspherical_energy(output, 1.0)
    assert relative_error(energy, expected) <= 1e-6
    gradients = torch.autograd.grad(energy, [net[0].weight, net[2].weight, net[3].weight])
    truths = torch.autograd.grad(expected, [*exact, output])
    for gradient, truth in zip(gradients, truths, strict=True):
        assert relative_error(gradient, truth) <= 1e-5


def test_transposed_convolutions_have_their_neurons_in_columns():
    layer = nn.ConvTranspose2d(6, 8, 3, groups=2)
    energy = CoMHE(layer, projection=None, output_layer=None)()
    # [in, out / groups, h, w]: the filter of an output channel runs over the inputs of its group
    filters = [part.transpose(0, 1).flatten(1) for part in layer.weight.detach().chunk(2)]
    expected = sum(reference.hyperspherical_energy(f, half_space=True) for f in filters) / 2
    assert relative_error(energy, expected) <= 1e-6


def test_a_shared_weight_counts_once():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    net = nn.Sequential(first, second, nn.Linear(8, 4))
    assert names(CoMHE(net)) == ["0", "2"]


def test_a_frozen_weight_is_left_out():
    net = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 4))
    comhe = CoMHE(net, projection=None)
    net[0].weight.requires_grad_(False)
    expected = 10 * reference.hyperspherical_energy(net[1].weight.detach())
    assert relative_error(comhe(), expected) <= 1e-6


@pytest.mark.parametrize("wrap", ["weight_norm", "orthogonal"])
def test_parametrized_weights(wrap):
    parametrize = getattr(nn.utils.parametrizations, wrap)
    net = nn.Sequential(
        parametrize(nn.Linear(12, 9)), parametrize(nn.Linear(9, 9)), parametrize(nn.Linear(9, 9)),
        nn.Linear(9, 4),
    )  # fmt: skip
    comhe = CoMHE(net, projection=None)
    assert names(comhe) == ["0", "1", "2", "3"]
    comhe().backward()
    for layer in list(net)[:3]:
        for parameter in layer.parametrizations.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()


def test_a_weight_replaced_later_is_the_one_that_counts():
    net = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 4))
    comhe = CoMHE(net, projection=None, output_layer=None)
    net[1].weight = nn.Parameter(torch.eye(4, 9))
    net[0].weight = nn.Parameter(torch.eye(9, 8).roll(1, 0))
    expected = sum(
        reference.hyperspherical_energy(net[i].weight.detach(), half_space=True) for i in (0, 1)
    )
    assert relative_error(comhe(), expected) <= 1e-6


def test_output_layer_by_name_or_none():
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    hidden = [reference.hyperspherical_energy(x.weight.detach(), half_space=True) for x in net]
    output = [reference.hyperspherical_energy(x.weight.detach()) for x in net]
    energy = CoMHE(net, projection=None, output_layer=None)()
    assert relative_error(energy, hidden[0] + hidden[1]) <= 1e-6
    energy = CoMHE(net, projection=None, output_layer="0", output_weight=2.0)()
    assert relative_error(energy, 2 * output[0] + hidden[1]) <= 1e-6
    energy = CoMHE(net, projection=None, half_space=False, output_weight=1.0)()
    assert relative_error(energy, output[0] + output[1]) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_of_the_model(dtype):
    net = nn.Sequential(nn.Linear(50, 20), nn.Linear(20, 5)).to(dtype)
    energy = CoMHE(net)()
    assert energy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    energy.backward()
    assert all(layer.weight.grad.dtype == dtype for layer in net)


def test_training_lowers_the_energy_and_reaches_the_simplex():
    # 5 classes in 20 dimensions, nothing but the regularizer: the optimum is known
    net = nn.Sequential(nn.Linear(60, 20), nn.Linear(20, 5))
    comhe = CoMHE(net, half_space=True, output_weight=1.0)
    descent = torch.optim.Adam(net.parameters(), lr=0.02)
    before = float(CoMHE(net, projection=None)().detach())
    for _ in range(150):
        descent.zero_grad()
        comhe().backward()
        descent.step()
    assert float(CoMHE(net, projection=None)().detach()) < before
    output = comhe_ext.hyperspherical_energy(net[1].weight.detach())
    assert float(output) == pytest.approx(1 / (2 + 2 / 4), rel=1e-3)


def test_training_with_a_task():
    net = Net()
    comhe = CoMHE(net)
    descent = torch.optim.SGD(net.parameters(), lr=0.05)
    x, y = torch.randn(32, 3, 9, 9), torch.arange(32) % 10
    losses = []
    for _ in range(30):
        descent.zero_grad()
        task = nn.functional.cross_entropy(net(x), y)
        (task + comhe()).backward()
        descent.step()
        losses.append(task.item())
    assert losses[-1] < losses[0]
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_deepcopy_keeps_model_and_regularizer_together():
    both = nn.ModuleDict({"net": Net()})
    both["comhe"] = CoMHE(both["net"], projection=None)
    copied = copy.deepcopy(both)
    assert torch.equal(copied["comhe"](), both["comhe"]())
    with torch.no_grad():
        copied["net"].out.weight.copy_(torch.eye(10, 50))
    # the copy looks at the copied layers
    assert not torch.equal(copied["comhe"](), both["comhe"]())
    copied["comhe"]().backward()
    assert copied["net"].out.weight.grad is not None
    assert both["net"].out.weight.grad is None


def test_pickle_and_save():
    net = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 4))
    comhe = CoMHE(net, projection=None, s=1.0)
    expected = comhe()
    again_net, again = pickle.loads(pickle.dumps((net, comhe)))
    assert torch.equal(again(), expected)
    assert again._layers[0].module is again_net[0]
    buffer = io.BytesIO()
    torch.save(comhe, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(), expected)


@pytest.mark.parametrize("projection", ["random", "group", None])
def test_compile_of_a_training_loss(projection):
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))
    comhe, again = CoMHE(net, projection), CoMHE(net, projection)
    # both projections take the same seed, and the graph has to count the steps

    def loss(x, y):
        return nn.functional.cross_entropy(net(x), y) + comhe()

    x, y = torch.randn(16, 64), torch.arange(16) % 10
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            expected = nn.functional.cross_entropy(net(x), y) + again()
            gradients = torch.autograd.grad(expected, list(net.parameters()))
            actual = compiled(x, y)
            assert relative_error(actual, expected) <= 1e-6
            pairs = zip(torch.autograd.grad(actual, list(net.parameters())), gradients, strict=True)
            for one, other in pairs:
                assert relative_error(one, other) <= 1e-5


class Calls(TorchDispatchMode):
    """Counts the operators of the package, and the matrix products outside of them."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "comhe_ext" or "mm" in function.__name__:
            self.names.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


def test_the_hidden_layers_share_one_draw_a_width_and_one_sweep():
    widths = [60, 60, 61, 61, 30, 60, 5]  # one too narrow to be projected
    net = nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
    comhe = CoMHE(net)
    with Calls() as calls:
        comhe()
    # the hidden layers of whatever width, and the output layer
    assert calls.names == [
        "gaussian",
        "gaussian",
        "sweep",
        "sweep",
    ]


def test_accumulate_gradients_is_backward():
    def nets(wrap=lambda x: x):
        torch.manual_seed(5)
        net = nn.Sequential(wrap(nn.Linear(60, 20)), nn.ReLU(), nn.Linear(20, 5))
        return net, CoMHE(net, RandomProjection(3, 8, seed=2), warm_up=4)

    for wrap in (lambda x: x, nn.utils.parametrizations.weight_norm):
        (net, comhe), (other, again) = nets(wrap), nets(wrap)
        x, y = torch.randn(9, 60), torch.arange(9) % 5
        for module in (net, other):
            nn.functional.cross_entropy(module(x), y).backward()
        expected = again()
        (0.5 * expected).backward()
        energy = comhe.accumulate_gradients(scale=0.5)
        assert torch.equal(energy, expected.detach())
        assert not energy.requires_grad
        for one, other_one in zip(net.parameters(), other.parameters(), strict=True):
            assert relative_error(one.grad, other_one.grad) <= 1e-6


def test_accumulate_gradients_without_gradients_before():
    net = nn.Sequential(nn.Linear(60, 20), nn.Linear(20, 5))
    net[0].bias.requires_grad_(False)
    comhe = CoMHE(net, None)
    comhe.accumulate_gradients()
    expected = torch.autograd.grad(comhe(), [net[0].weight, net[1].weight])
    assert torch.equal(net[0].weight.grad, expected[0])
    assert torch.equal(net[1].weight.grad, expected[1])
    assert net[1].bias.grad is None
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    with pytest.warns(UserWarning, match="adds nothing: all weights .* are frozen"):
        assert comhe.accumulate_gradients() == 0
    assert comhe.accumulate_gradients() == 0  # said once


def test_accumulate_gradients_at_the_scale_of_a_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    net = nn.Sequential(nn.Linear(60, 20), nn.Linear(20, 5))
    comhe = CoMHE(net, None)
    descent = torch.optim.SGD(net.parameters(), lr=0.1)
    (expected,) = torch.autograd.grad(comhe(), net[0].weight)
    scaler.scale(0.0 * net[0].weight.sum()).backward()
    comhe.accumulate_gradients(scaler)
    assert relative_error(net[0].weight.grad, 1024 * expected) <= 1e-6
    before = net[0].weight.detach().clone()
    scaler.step(descent)
    assert relative_error(before - net[0].weight.detach(), 0.1 * expected) <= 1e-4


def test_every_and_warm_up():
    def energies(**options):
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(60, 20), nn.Linear(20, 5))
        comhe = CoMHE(net, RandomProjection(3, 8, seed=2), **options)
        return torch.stack([comhe().detach() for _ in range(6)])

    plain = energies()
    every = energies(every=3)
    assert every[[0, 1, 3, 4]].tolist() == [0.0] * 4
    # only steps that count make new draws
    torch.testing.assert_close(every[[2, 5]], 3 * plain[:2])
    ramp = torch.tensor([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    torch.testing.assert_close(energies(warm_up=4), ramp * plain)


def test_a_skipped_step_is_a_loss_like_any_other():
    net = nn.Sequential(nn.Linear(60, 20), nn.Linear(20, 5))
    comhe = CoMHE(net, every=2)
    x = torch.randn(4, 60)
    for _ in range(4):
        (net(x).square().mean() + comhe()).backward()
        comhe.accumulate_gradients()
    assert net[0].weight.grad.isfinite().all()


def test_weights_by_pattern():
    net = Net()
    with torch.no_grad():
        plain = CoMHE(net, None).energies()
        for weight, output_weight, factors in (
            ({"conv": 3.0, "g*": 0.5}, 2.0, dict(conv=3.0, grouped=0.5, hidden=1.0, out=2.0)),
            ({"conv": 3.0, "g*": 0.5}, None, dict(conv=3.0, grouped=0.5, hidden=1.0, out=10.0)),
            # the default does not override a factor that names the output layer
            ({"out": 7.0}, None, dict(conv=1.0, grouped=1.0, hidden=1.0, out=7.0)),
            ({"o*": 0.0, "*": 2.0}, None, dict(conv=2.0, grouped=2.0, hidden=2.0, out=0.0)),
            ({"*": 2.0}, 3.0, dict(conv=2.0, grouped=2.0, hidden=2.0, out=3.0)),
            (0.5, None, dict(conv=0.5, grouped=0.5, hidden=0.5, out=10.0)),
        ):
            comhe = CoMHE(net, None, weight=weight, output_weight=output_weight)
            assert {layer.name: layer.factor for layer in comhe.layers} == factors
            expected = sum(factor * plain[name].energy for name, factor in factors.items())
            assert float(comhe()) == pytest.approx(expected, rel=1e-6)


def test_the_first_convolution_is_not_projected():
    net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Flatten(), nn.Linear(50, 9), nn.Linear(9, 4))

    def projected(**options):
        comhe = CoMHE(net, RandomProjection(2, 8), **options)
        return list(comhe.projection.matrices())

    assert projected() == ["2"]
    assert projected(first_layer=None) == ["0", "2"]
    assert projected(first_layer="2") == ["0"]
    # the first Linear of a transformer is a hidden layer like the others
    assert CoMHE(net[2:]).first_layer is None
    # nor is a later convolution the first layer of the model
    assert CoMHE(nn.Sequential(nn.Linear(3, 4), *net)).first_layer is None
    assert CoMHE(net, exclude=["0"]).first_layer is None


def test_the_model_names_its_output_layer():
    class Classifier(nn.Module):
        def __init__(self, tied=False):
            super().__init__()
            self.head = nn.Linear(8, 5)
            self.embed = nn.Embedding(5, 8)
            self.body = nn.Linear(8, 8)
            if tied:
                self.head.weight = self.embed.weight

        def get_output_embeddings(self):
            return self.head

    assert CoMHE(Classifier()).output_layer == "head"
    assert CoMHE(Classifier(), exclude=["head"]).output_layer is None
    # a tied head is left out with its embedding, and comes back with it
    assert CoMHE(Classifier(tied=True)).output_layer is None
    both = CoMHE(Classifier(tied=True), include=[nn.Linear, nn.Embedding])
    assert both.output_layer == "head"
    assert "embed" not in names(both)


def test_energies_beside_what_they_may_be():
    net = Net()
    comhe = CoMHE(net, s=1.0)
    energies = comhe.energies()
    assert list(energies) == names(comhe)
    weight = net.hidden.weight.detach()
    exact = reference.hyperspherical_energy(weight, 1.0, half_space=True)
    hidden = energies["hidden"]
    assert hidden.energy == pytest.approx(float(exact), rel=1e-6)
    pair = Riesz(1.0, half_space=True)
    expected = bounds.random_energy(50, 16, pair)
    assert hidden.random == expected
    assert hidden.lowest == bounds.lowest_energy(50, 16, pair, dead=0)
    assert energies["out"].lowest == bounds.lowest_energy(10, 50, Riesz(1.0))
    assert all(e.lowest < e.energy < 1.1 * e.random for e in energies.values())
    net.hidden.weight.requires_grad_(False)
    assert "hidden" in comhe.energies()
    table = energies.table()
    assert all(name in table for name in [*energies, "energy", "random", "lowest"])
    assert f"{hidden.energy:.4f}" in table


@pytest.mark.parametrize("options", [{}, dict(eps=1e-4), dict(min_distance=1.9), dict(s=0.0)])
def test_no_layer_undercuts_its_bound(options):
    net = nn.Sequential(nn.Linear(10, 50), nn.Linear(50, 30), nn.Linear(30, 8), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].weight.zero_()
        net[1].weight.mul_(1e-2)
        net[2].weight[3:] = 0.0
        net[3].weight.copy_(torch.eye(3, 8))
    for half_space in (True, False):
        comhe = CoMHE(net, None, half_space=half_space, output_layer=None, **options)
        for name, layer in comhe.energies().items():
            assert layer.energy >= layer.lowest - 1e-6 * abs(layer.lowest), name


def test_parametrized_weights_count_without_gradients_too():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(60, 20)), nn.Linear(20, 5))
    comhe = CoMHE(net, None)
    with torch.no_grad():
        without = comhe()
    assert torch.equal(without, comhe())


def test_layers_of_several_dtypes():
    net = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 45).bfloat16(), nn.Linear(45, 5).double())
    comhe = CoMHE(net, RandomProjection(2, 8, seed=1))
    matrices = comhe.projection.matrices()
    expected = 10 * reference.hyperspherical_energy(net[2].weight.detach())
    for name, projection in matrices.items():
        weight = net[int(name)].weight.detach()
        expected = expected + reference.compressive_energy(weight, projection, half_space=True)
    energy = comhe()
    assert relative_error(energy, expected) <= 1e-6
    energy.backward()
    assert all(layer.weight.grad.dtype == layer.weight.dtype for layer in net)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "`model` must be a torch.nn.Module, got Tensor", (torch.ones(3, 3),), {}),
        (ValueError, "`model` must have a layer of two or more neurons", (nn.ReLU(),), {}),
        (ValueError, "two or more neurons .* found none", (nn.Linear(5, 1),), {}),
        (ValueError, "`projection` must be one of .*'group'.* got 'gaussian'", (), "gaussian"),
        (ValueError, "`projection` must be one of .* got 40", (), dict(projection=40)),
        (ValueError, "`first_layer` must be one of", (), dict(first_layer="conv")),
        (ValueError, "pattern 'conv' matches no layer", (), dict(weight={"conv": 2.0})),
        (TypeError, "`weight` must be a number, got str", (), dict(weight={"*": "2"})),
        (ValueError, "pattern 'conv' matches no layer", (), dict(include=["conv"])),
        (ValueError, "must have a layer of two or more neurons that", (), dict(exclude=["*"])),
        (ValueError, "`every` must be at least 1", (), dict(every=0)),
        (ValueError, "`warm_up` must be at least 0", (), dict(warm_up=-1)),
        (ValueError, r"`output_layer` must be one of \['0', '1'\]", (), dict(output_layer="head")),
        (TypeError, "`weight` must be a number, got str", (), dict(weight="1")),
        (ValueError, "`weight` must be finite and at least 0, got nan", (), dict(weight=math.nan)),
        (ValueError, "`weight` must be finite and .* got -1", (), dict(weight={"0": -1.0})),
        (ValueError, "`output_weight` must be finite", (), dict(output_weight=math.inf)),
        (
            ValueError,
            "must not both name the output layer '1', got 3 and 2",
            (),
            dict(weight={"1": 3.0}, output_weight=2.0),
        ),
        (TypeError, "`weight` must have patterns for keys", (), dict(weight={nn.Linear: 1.0})),
        (TypeError, "`output_weight` must be a number", (), dict(output_weight="10")),
        (ValueError, "`s` must be finite", (), dict(s=-2.0)),
        (ValueError, "`min_distance` must be", (), dict(min_distance=3.0)),
        (ValueError, "`backend` must be one of", (), dict(backend="numpy")),
        (ValueError, "is not initialized", (nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 2)),), {}),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_messages(error, message, arguments, options):
    model = arguments or (nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)),)
    if isinstance(options, str):
        options = dict(projection=options)
    with pytest.raises(error, match=message):
        CoMHE(*model, **options)


# --- the output layer -----------------------------------------------------------------------------


def body(*head):
    return nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), *head)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (body(nn.Linear(50, 1)), {}),
        (body(nn.Linear(50, 10)), dict(exclude="4")),
        (body(nn.Linear(50, 10)), dict(include=["0", "2"])),
        (body(nn.Linear(50, 10), nn.LayerNorm(10)), {}),
        (body(nn.MultiheadAttention(50, 5)), {}),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1), {}),
    ],
    ids=["one logit", "excluded", "not included", "a norm behind", "attention", "encoder"],
)
def test_a_hidden_layer_is_not_taken_for_the_output_layer(model, options):
    comhe = CoMHE(model, None, **options)
    assert comhe.output_layer is None
    assert {layer.role for layer in comhe.layers} == {"hidden"}
    assert {layer.factor for layer in comhe.layers} == {1.0}
    expected = sum(e.energy for e in comhe.energies().values())
    assert float(comhe().detach()) == pytest.approx(expected, rel=1e-6)


class Language(nn.Module):
    """A head that is registered first, and says so."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 20)
        self.body = nn.Linear(8, 8)

    def get_output_embeddings(self):
        return self.head


class Wrapper(nn.Module):
    """What DistributedDataParallel or a LightningModule looks like."""

    def __init__(self, module, *others):
        super().__init__()
        self.module = module
        self.others = nn.ModuleList(others)


def test_the_outermost_module_that_knows_its_head_is_asked():
    assert CoMHE(Wrapper(Language())).output_layer == "module.head"
    assert CoMHE(Wrapper(Wrapper(Language()), nn.Linear(8, 7))).output_layer == "module.module.head"

    class Outer(Wrapper):
        def get_classifier(self):
            return self.others[0]

    comhe = CoMHE(Outer(Language(), nn.Linear(8, 7)))
    assert comhe.output_layer == "others.0"
    assert "by `get_classifier`" in repr(comhe)
    # a head of several modules: its last layer
    several = Outer(Language(), nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6)))
    assert CoMHE(several).output_layer == "others.0.2"
    # the answer "none", as timm's models without classes give it
    comhe = CoMHE(Outer(nn.Linear(8, 8), nn.Identity()))
    assert comhe.output_layer is None
    assert "names no head" in repr(comhe)


def test_who_cannot_answer_is_passed_over():
    class Abstract(Wrapper):
        def get_output_embeddings(self):
            raise NotImplementedError

        def get_classifier(self):
            return None

    assert CoMHE(Abstract(Language())).output_layer == "module.head"
    assert CoMHE(Abstract(body(nn.Linear(50, 10)))).output_layer == "module.4"


def test_a_guess_by_position_is_said():
    model = body(nn.Linear(50, 10))
    with pytest.warns(UserWarning, match=r"takes layer '4' .* by position.* with weight 10"):
        comhe = CoMHE(model)
    assert "by position" in repr(comhe)
    assert "by position" in comhe.summary()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CoMHE(model, output_layer="4")
        CoMHE(model, output_layer=None)
        CoMHE(Language())


def test_heads_of_hugging_face_models():
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=100, hidden_size=48, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=96, num_labels=3,
    )  # fmt: skip
    config = transformers.BertConfig(**sizes)
    classifier = transformers.BertForSequenceClassification(config)
    assert CoMHE(classifier).output_layer == "classifier"
    assert CoMHE(Wrapper(classifier)).output_layer == "module.classifier"
    # an encoder has no head, wherever it is in the model
    encoder = transformers.BertModel(config)
    assert CoMHE(encoder).output_layer is None
    assert CoMHE(Wrapper(encoder)).output_layer is None
    gpt2 = transformers.GPT2Config(
        n_layer=1, n_embd=64, n_head=2, vocab_size=100, n_positions=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    for model in (
        transformers.GPT2LMHeadModel(gpt2),
        transformers.GPT2Model(gpt2),
        Wrapper(transformers.GPT2LMHeadModel(gpt2)),
    ):
        comhe = CoMHE(model)
        assert comhe.output_layer is None
        assert all(layer.factor == 1.0 for layer in comhe.layers)


# --- what it tells of itself ----------------------------------------------------------------------


def test_layers_and_what_is_left_out():
    net = Net()
    net.embed = nn.Embedding(7, 5)
    net.lstm = nn.LSTM(5, 6)
    net.narrow = nn.Linear(1, 9)
    net.odd = nn.Linear(8, 9)
    net.odd.weight = nn.Parameter(torch.ones(9, 8, dtype=torch.int8), requires_grad=False)
    net.hidden.weight.requires_grad_(False)
    comhe = CoMHE(net, output_layer="out", exclude=["conv"], weight={"grouped": 2.0})
    found = {layer.name: layer for layer in comhe.layers}
    assert list(found) == ["grouped", "hidden", "out"]
    assert found["grouped"][2:6] == (4, 4, 27, 2.0)
    assert found["hidden"].neurons == 50
    assert not found["hidden"].learns
    assert found["out"].role == "output"
    assert not found["out"].half_space
    assert not found["out"].projected
    assert found["out"].factor == 10
    left_out = dict(comhe.left_out)
    for name, reason in {
        "conv": "excluded",
        "depthwise": "fewer than two neurons",
        "embed": "on request",
        "lstm": "LSTM",
        "narrow": "nowhere to turn",
        "odd": "frozen, and .* got torch.int8",
    }.items():
        assert re.search(reason, left_out[name]), (name, left_out[name])
    text = comhe.summary()
    assert all(name in text for name in [*found, *left_out])
    assert "hidden, frozen" in text
    assert "Output layer: 'out', as given" in text
    assert set(comhe.energies()) == set(found)


def test_one_input_adds_nothing():
    net = nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 20), nn.Linear(20, 5))
    rest = net[2:]
    expected = CoMHE(rest, None)()
    assert torch.equal(CoMHE(net, None)(), expected)
    with pytest.raises(ValueError, match="'': neurons of fewer than two inputs have nowhere"):
        CoMHE(nn.Linear(1, 30))


# --- models that change ---------------------------------------------------------------------------


def change(what, net):
    if what == "replaced":
        net[0] = nn.Linear(60, 20)
    elif what == "added":
        net.append(nn.Linear(5, 4))
    elif what == "removed":
        del net[2]
    elif what == "resized":
        net[0].weight = nn.Parameter(torch.randn(25, 60))
    elif what == "wrapped":
        net[0] = nn.Sequential(net[0])


@pytest.mark.parametrize("kind", ["random", "adversarial", "group", None])
@pytest.mark.parametrize("what", ["replaced", "added", "removed", "resized", "wrapped"])
def test_a_changed_model_is_noticed_and_found_again(what, kind):
    net = nn.Sequential(nn.Linear(60, 20), nn.ReLU(), nn.Linear(20, 5))
    comhe = CoMHE(net, kind)
    comhe()
    change(what, net)
    for call in (comhe, comhe.accumulate_gradients, comhe.energies):
        with pytest.raises(RuntimeError, match=r"refresh\(\)"):
            call()
    comhe.refresh()
    fresh = CoMHE(net, None)
    assert names(comhe) == names(fresh)
    assert comhe.output_layer == fresh.output_layer
    assert comhe().isfinite()
    comhe().backward()
    if kind is None:
        assert torch.equal(comhe(), fresh())


def test_changes_that_are_none():
    net = nn.Sequential(nn.Linear(60, 20), nn.ReLU(), nn.Linear(20, 5))
    comhe = CoMHE(net, None)
    net[1] = nn.GELU()
    nn.utils.parametrizations.weight_norm(net[0])
    net.regularizer = comhe
    net[2].weight = nn.Parameter(torch.randn(5, 20))
    assert torch.equal(comhe(), CoMHE(net, None)())


def test_refresh_keeps_what_was_learned_and_is_all_or_nothing():
    net = nn.Sequential(nn.Linear(60, 20), nn.Linear(20, 40), nn.Linear(40, 5))
    comhe = CoMHE(net, "adversarial", exclude="2")
    comhe()
    learned = comhe.projection.matrices().get("1")
    before = comhe.projection.get_buffer("matrices/0").clone()
    net[1] = nn.Linear(20, 41)
    comhe.refresh()
    assert torch.equal(comhe.projection.get_buffer("matrices/0"), before)
    assert learned is None
    assert int(comhe.get_extra_state()) == 1
    del net[2]
    with pytest.raises(ValueError, match="pattern '2' matches no layer"):
        comhe.refresh()
    assert names(comhe) == ["0", "1"]


# --- weights that cannot be taken -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_weights_of_the_wrong_kind_are_refused_by_name():
    net = nn.Sequential(nn.Linear(64, 50), nn.Linear(50, 10, dtype=torch.complex64))
    with pytest.raises(
        TypeError, match=r"layer '1': `weight` must be float16, .* torch\.complex64"
    ):
        CoMHE(net)
    net = nn.Sequential(nn.Linear(64, 50), nn.Linear(50, 10))
    comhe = CoMHE(net)
    net[0].to(torch.complex64)
    with pytest.raises(TypeError, match=r"layer '0': .* torch\.complex64"):
        comhe()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.complex64])
def test_a_frozen_odd_layer_is_left_out_by_name(dtype):
    net = nn.Sequential(nn.Linear(64, 50), nn.Linear(50, 10))
    net[0].weight = nn.Parameter(torch.ones(50, 64).to(dtype), requires_grad=False)
    comhe = CoMHE(net, None)
    assert list(comhe.energies()) == ["1"]
    assert str(dtype) in dict(comhe.left_out)["0"]
    assert torch.equal(comhe(), CoMHE(net[1:], None)())


def test_weights_that_are_emptied_between_uses():
    net = nn.Sequential(nn.Linear(64, 50), nn.Linear(50, 10))
    comhe = CoMHE(net)
    for parameter in net.parameters():
        parameter.data = torch.empty(0)
    for call in (comhe, comhe.energies, lambda: CoMHE(net)):
        with pytest.raises(ValueError, match=r"layer '0': .* is empty: .*GatheredParam"):
            call()


def test_low_rank_updates():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(64, 50)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(64, 4, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 50, bias=False)})
            self.base_layer.requires_grad_(False)

    net = nn.Sequential(Adapted(), nn.ReLU(), nn.Linear(50, 10).requires_grad_(False))
    comhe = CoMHE(net)
    assert names(comhe) == ["0.base_layer", "2"]
    assert "low-rank" in dict(comhe.left_out)["0.lora_A.default"]
    with pytest.warns(UserWarning, match="all weights that it regularizes are frozen.*W \\+ BA"):
        assert comhe() == 0
    assert comhe() == 0


# --- gradients by accumulate_gradients ------------------------------------------------------------


def both_ways(make, **options):
    """The gradients of parameters by accumulate_gradients and by backward, twice."""
    results = []
    for accumulate in (True, False):
        torch.manual_seed(7)
        net, parameters = make()
        comhe = CoMHE(net, RandomProjection(2, 8, seed=3), output_layer=None, **options)
        for scale in (1.0, 0.25):
            if accumulate:
                comhe.accumulate_gradients(scale=scale)
            else:
                (scale * comhe()).backward()
        results.append([parameter.grad for parameter in parameters])
    return zip(*results, strict=True)


def plain():
    net = nn.Sequential(nn.Linear(60, 20), nn.Linear(20, 5))
    return net, [net[0].weight, net[1].weight]


def strided():
    net = nn.Sequential(nn.ConvTranspose2d(6, 8, 3), nn.Conv2d(8, 4, 3))
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net, [net[0].weight, net[1].weight]


def sum_of_two():
    class Delta(nn.Module):
        def __init__(self):
            super().__init__()
            self.d = nn.Parameter(torch.zeros(20, 60))

        def forward(self, w):
            return w + self.d

    net, _ = plain()
    nn.utils.parametrize.register_parametrization(net[0], "weight", Delta())
    chain = net[0].parametrizations.weight
    return net, [chain.original, chain[0].d, net[1].weight]


def of_another_module():
    base = nn.Parameter(torch.randn(20, 60))
    net, _ = plain()
    del net[0].weight
    net[0].weight = base * 2
    return net, [base, net[1].weight]


def half_precision():
    net, parameters = plain()
    return net.bfloat16(), parameters


@pytest.mark.parametrize("make", [plain, strided, sum_of_two, of_another_module, half_precision])
def test_accumulated_gradients_are_those_of_backward_bit_for_bit(make):
    if make is of_another_module:  # its graph can be used for one backward, like any
        net, (base, weight) = make()
        comhe = CoMHE(net, None)
        comhe.accumulate_gradients()
        actual = base.grad.clone(), weight.grad.clone()
        base.grad = weight.grad = None
        comhe().backward()
        assert torch.equal(actual[0], base.grad)
        assert torch.equal(actual[1], weight.grad)
        return
    for actual, expected in both_ways(make):
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()
        assert actual.dtype == expected.dtype
    pointers = [actual.data_ptr() for actual, _ in both_ways(make)]
    assert len(set(pointers)) == len(pointers)


def test_accumulated_gradients_beside_sparse_ones():
    results = []
    for accumulate in (True, False):
        torch.manual_seed(7)
        net = nn.ModuleDict({"embed": nn.Embedding(30, 12, sparse=True), "out": nn.Linear(12, 5)})
        comhe = CoMHE(net, None, include=[nn.Linear, nn.Embedding], output_layer="out")
        net["out"](net["embed"](torch.tensor([1, 2]))).sum().backward()
        assert net["embed"].weight.grad.is_sparse
        comhe.accumulate_gradients() if accumulate else comhe().backward()
        results.append(net["embed"].weight.grad)
    assert not results[0].is_sparse
    assert torch.equal(*results)


def test_accumulating_runs_the_hooks_of_tensors_but_not_those_of_accumulation():
    net, (weight, _) = plain()
    comhe = CoMHE(net, None, output_layer=None)
    comhe.accumulate_gradients()
    expected, weight.grad = 2 * weight.grad, None
    weight.register_hook(lambda g: 2 * g)
    accumulated = []
    weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(p))
    comhe.accumulate_gradients()
    assert torch.equal(weight.grad, expected)
    assert not accumulated
    with pytest.raises(ValueError, match="`scale` must be finite"):
        comhe.accumulate_gradients(scale=math.nan)
