"""CoMHE on whole models: which layers it takes, what it adds up, and that it trains."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import comhe_ext
from comhe_ext import CoMHE, reference
from comhe_ext.testing import relative_error

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
    return [name for name, _ in comhe._layers]


def test_finds_the_layers_that_have_pairs_of_neurons():
    comhe = CoMHE(Net())
    assert names(comhe) == ["conv", "grouped", "hidden", "out"]
    assert comhe.output_layer == "out"
    assert "4 layers" in repr(comhe) and "20 random projections to 40" in repr(comhe)
    # the layers belong to the model, not to the regularizer
    assert list(comhe.parameters()) == [] and comhe.state_dict() == {}


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
    assert energy.shape == () and energy.dtype == torch.float32
    assert relative_error(energy, expected) <= 1e-6


def test_energy_with_projections_is_that_of_the_same_projections():
    net = nn.Sequential(nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 45), nn.Linear(45, 10))
    comhe = CoMHE(net, num_projections=3, dim=35, generator=torch.Generator().manual_seed(7), s=1.0)
    energy = comhe()
    generator = torch.Generator().manual_seed(7)
    # wider than dim: projected; else the weights as they are; the last one plain
    matrices = comhe_ext.random_projection(3, 35, 64, generator=generator)
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


def test_projections_are_drawn_afresh_each_step():
    net = nn.Sequential(nn.Linear(64, 30), nn.Linear(30, 10))
    comhe = CoMHE(net)
    assert float(comhe().detach()) != float(comhe().detach())
    torch.manual_seed(4)
    first = comhe()
    torch.manual_seed(4)
    assert torch.equal(comhe(), first)
    plain = CoMHE(net, projection=None)
    assert torch.equal(plain(), plain())


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
            assert parameter.grad is not None and parameter.grad.isfinite().all()


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
    assert copied["net"].out.weight.grad is not None and both["net"].out.weight.grad is None


def test_pickle_and_save():
    net = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 4))
    comhe = CoMHE(net, projection=None, s=1.0)
    expected = comhe()
    again_net, again = pickle.loads(pickle.dumps((net, comhe)))
    assert torch.equal(again(), expected)
    assert again._layers[0][1] is again_net[0]
    buffer = io.BytesIO()
    torch.save(comhe, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(), expected)


@pytest.mark.parametrize("projection", ["random", None])
def test_compile_of_a_training_loss(projection):
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))
    comhe = CoMHE(net, projection)

    def loss(x, y):
        return nn.functional.cross_entropy(net(x), y) + comhe()

    x, y = torch.randn(16, 64), torch.arange(16) % 10
    torch.manual_seed(1)
    expected = loss(x, y)
    gradients = torch.autograd.grad(expected, list(net.parameters()))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    actual = compiled(x, y)
    assert relative_error(actual, expected) <= 1e-6
    pairs = zip(torch.autograd.grad(actual, list(net.parameters())), gradients, strict=True)
    for one, other in pairs:
        assert relative_error(one, other) <= 1e-5


def test_hidden_layers_share_one_sweep():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sweeps(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.comhe_ext.energy_and_gradient.default
            return function(*args, **(kwargs or {}))

    net = nn.Sequential(*[nn.Linear(60 + i, 61 + i) for i in range(6)])
    comhe = CoMHE(net)
    with Sweeps() as sweeps:
        comhe()
    assert sweeps.count == 2  # the hidden layers, and the output layer


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "`model` must be a torch.nn.Module, got Tensor", (torch.ones(3, 3),), {}),
        (ValueError, "`model` must have a Linear or convolution layer", (nn.ReLU(),), {}),
        (ValueError, "two or more neurons, found none", (nn.Linear(5, 1),), {}),
        (ValueError, "`projection` must be 'random' or None, got 'gaussian'", (), "gaussian"),
        (ValueError, "`num_projections` must be at least 1, got 0", (), dict(num_projections=0)),
        (TypeError, "`dim` must be an int, got float", (), dict(dim=40.0)),
        (ValueError, r"`output_layer` must be one of \['0', '1'\]", (), dict(output_layer="head")),
        (TypeError, "`weight` must be a number, got str", (), dict(weight="1")),
        (TypeError, "`output_weight` must be a number", (), dict(output_weight=None)),
        (ValueError, "`s` must be finite", (), dict(s=-1.0)),
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
