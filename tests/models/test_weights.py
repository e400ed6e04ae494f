"""Weights that something else computes: read as the next forward would, and nothing is changed."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from comhe_ext import CoMHE, weights
from comhe_ext.testing import reference, relative_error

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*weight_norm. is deprecated:FutureWarning",
    # torch's own tracer makes an instance of every autograd Function that it meets
    "ignore:.*should not be instantiated:DeprecationWarning",
)


def spectral_norm(module):
    return nn.utils.spectral_norm(module)


def weight_norm(module):
    return nn.utils.weight_norm(module)


def pruned(module):
    return prune.random_unstructured(module, "weight", 0.4)


def pruned_twice(module):
    prune.random_unstructured(module, "weight", 0.3)
    return prune.random_structured(module, "weight", 0.2, dim=1)


def pruned_direction(module):
    return prune.l1_unstructured(weight_norm(module), "weight_v", 0.3)


def low_rank(module):
    class Update(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.randn(module.weight.shape[0], 2))
            self.b = nn.Parameter(torch.randn(2, module.weight.shape[1]))

        def forward(self, weight):
            return weight + self.a @ self.b

    parametrize.register_parametrization(module, "weight", Update())
    module.parametrizations.weight.original.requires_grad_(False)
    return module


MAKERS = [
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    parametrizations.orthogonal,
    weight_norm,
    spectral_norm,
    pruned,
    pruned_twice,
    pruned_direction,
    low_rank,
]
every_kind = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def states(module):
    """All tensors of a module, also those that are left in a weight's place."""
    tensors = {name: x.clone() for name, x in module.state_dict().items()}
    left = module.__dict__.get("weight")
    return tensors if left is None else tensors | {"weight": left.detach().clone()}


def direction(weight):
    return nn.functional.normalize(weight.detach(), dim=1)


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_reading_is_what_the_next_forward_uses(make, training):
    module = make(nn.Linear(12, 9, bias=False)).train(training)
    with torch.no_grad():  # as an optimizer would: what is left from construction is stale
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    weight = weights.read(module, "weight")
    module(
        torch.eye(12)
    )  # the first of two hooks works with what the second one left in the last forward
    used = module(torch.eye(12)).mT
    if "spectral" in make.__name__:  # but for its scale, which the power iteration changes
        torch.testing.assert_close(direction(weight), direction(used))
    else:
        torch.testing.assert_close(weight, used)


@every_kind
def test_reading_changes_nothing(make):
    net = nn.Sequential(make(nn.Linear(60, 50)), nn.ReLU(), make(nn.Linear(50, 8)))
    before = [states(net[0]), states(net[2])]
    comhe = CoMHE(net)
    comhe.energies()
    comhe().backward()
    comhe.accumulate_gradients()
    with torch.no_grad():
        comhe()
    with parametrize.cached():
        comhe()
    for module, state in zip((net[0], net[2]), before, strict=True):
        after = states(module)
        assert after.keys() == state.keys()
        assert all(torch.equal(after[name], value) for name, value in state.items())


@every_kind
def test_value_and_gradient_in_every_mode(make):
    torch.manual_seed(3)
    net = nn.Sequential(make(nn.Linear(12, 9)), nn.ReLU(), make(nn.Linear(9, 7)))
    comhe = CoMHE(net, None, output_layer=None)
    # the definition, on weights computed anew, with the gradient in their sources
    parts = [weights.read(module, "weight") for module in (net[0], net[2])]
    expected = sum(reference.hyperspherical_energy(w, half_space=True) for w in parts)
    sources = [p for p in net.parameters() if p.requires_grad]
    truths = torch.autograd.grad(expected, sources, allow_unused=True)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert relative_error(comhe(), expected) <= 1e-6
            assert comhe.energies()["0"].energy + comhe.energies()["2"].energy == pytest.approx(
                float(expected.detach()), rel=1e-6
            )
    # after a task's backward, too, whose graph is gone
    net(torch.randn(4, 12)).sum().backward()
    net.zero_grad()
    comhe.accumulate_gradients()
    size = sum(float(truth.square().sum()) for truth in truths if truth is not None) ** 0.5
    for parameter, truth in zip(sources, truths, strict=True):
        if truth is None:
            assert parameter.grad is None
        else:
            # the energy does not depend on some sources, as on lengths: only rounding is left
            assert relative_error(parameter.grad, truth, floor=size + 1e-3) <= 1e-5


def test_a_read_inside_cached_leaves_no_graph_free_weight_to_the_model():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(12, 9)), nn.Linear(9, 4))
    comhe = CoMHE(net, None)
    with parametrize.cached():
        with torch.no_grad():
            comhe()
        net(torch.randn(3, 12)).sum().backward()
    assert net[0].parametrizations.weight.original1.grad is not None


def test_energy_first_then_a_forward_that_goes_on_with_the_power_iteration():
    for make in (spectral_norm, parametrizations.spectral_norm):
        net = nn.Sequential(make(nn.Linear(12, 9)), make(nn.Linear(9, 4)))
        comhe = CoMHE(net, None)
        energy = comhe()
        (energy + net(torch.randn(3, 12)).sum()).backward()
        assert all(p.grad is not None for n, p in net.named_parameters() if "bias" not in n)


@every_kind
def test_writing_is_read_again(make):
    module = make(nn.Linear(12, 9))
    target = nn.init.orthogonal_(torch.empty(9, 12))
    if make is low_rank:
        with pytest.raises(RuntimeError, match="right_inverse"):
            weights.write(module, "weight", target)
        return
    weights.write(module, "weight", target)
    actual = weights.read(module, "weight").detach()
    if "pruned" in make.__name__:
        mask = module.get_buffer("weight_v_mask" if make is pruned_direction else "weight_mask")
        if make is pruned_direction:
            torch.testing.assert_close(direction(actual), direction(target * mask))
        else:
            torch.testing.assert_close(actual, target * mask)
    else:
        torch.testing.assert_close(direction(actual), direction(target))


def test_identity_is_that_of_what_a_weight_is_made_of():
    embedding = parametrizations.weight_norm(nn.Embedding(9, 12))
    net = nn.ModuleDict({"embed": embedding})
    for i in range(20):  # ids of temporary weights repeat
        net[f"linear{i}"] = nn.Linear(12, 9)
    for _ in range(20):
        found = [layer.name for layer in CoMHE(net, None, output_layer=None).layers]
        assert found == [f"linear{i}" for i in range(20)]
    embed, tied = nn.Embedding(9, 12), nn.Linear(12, 9)
    net = nn.ModuleDict({"embed": embed, "head": tied, "other": nn.Linear(12, 9)})
    tied.weight = embed.weight
    parametrize.register_parametrization(net["other"], "weight", nn.Identity())
    assert [layer.name for layer in CoMHE(net, None).layers] == ["other"]


def test_a_sum_of_parameters_learns_where_one_of_them_does():
    module = low_rank(nn.Linear(12, 9))
    net = nn.Sequential(module, nn.Linear(9, 4))
    comhe = CoMHE(net, None)
    comhe().backward()
    update = module.parametrizations.weight[0]
    assert update.a.grad is not None
    assert update.b.grad is not None
    assert module.parametrizations.weight.original.grad is None


def test_threads_with_models_of_their_own():
    def train(number, results):
        torch.manual_seed(number)
        net = nn.Sequential(parametrizations.weight_norm(nn.Linear(24, 20)), nn.Linear(20, 5))
        comhe = CoMHE(net, None)
        expected = comhe().detach()
        start.wait()
        try:
            for _ in range(50):
                energy = comhe()
                energy.backward()
                assert torch.equal(energy.detach(), expected)
            results[number] = "fine"
        except Exception as error:
            results[number] = repr(error)

    start, results = threading.Barrier(4), {}
    threads = [threading.Thread(target=train, args=(i, results)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), "fine")


def test_copies_read_their_own_weights():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(12, 9)), nn.Linear(9, 4))
    both = nn.ModuleDict({"net": net, "comhe": CoMHE(net, None)})
    copied = copy.deepcopy(both)
    with torch.no_grad():
        copied["net"][0].parametrizations.weight.original1.copy_(torch.eye(9, 12))
    assert not torch.equal(copied["comhe"](), both["comhe"]())


@pytest.mark.parametrize("make", [parametrizations.spectral_norm, spectral_norm, pruned])
def test_compiled(make):
    torch._dynamo.reset()
    net = nn.Sequential(make(nn.Linear(12, 9)), nn.Linear(9, 4))
    comhe = CoMHE(net, None)
    expected = comhe()
    before = states(net[0])
    compiled = torch.compile(comhe, fullgraph=True, backend="aot_eager")
    actual = compiled()
    assert relative_error(actual, expected) <= 1e-6
    actual.backward()
    assert all(torch.equal(x, before[name]) for name, x in states(net[0]).items())
