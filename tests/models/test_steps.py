"""What counts as a step, and that value and gradient are of one step."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from comhe_ext import CoMHE
from comhe_ext.projections import AngleProjection, RandomProjection
from comhe_ext.testing import relative_error


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 6))


def regularizer(net, **options):
    return CoMHE(net, RandomProjection(2, 8, seed=1), **options)


def steps(comhe):
    return int(comhe.get_extra_state())


def gradients(net):
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def test_each_training_call_is_a_step_and_no_other():
    comhe = regularizer(network())
    for _ in range(3):
        comhe()
    assert steps(comhe) == 3
    with torch.no_grad():
        comhe()
    with torch.inference_mode():
        comhe()
    comhe.energies()
    comhe.eval()()
    assert steps(comhe) == 3


# of LBFGS itself, in PyTorch 2.8
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")
def test_an_optimizer_s_closure_is_one_step_however_often_it_is_called():
    net = network()
    comhe = regularizer(net)
    descent = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=5)
    x = torch.randn(9, 24)
    draws = []

    def closure():
        descent.zero_grad()
        loss = net(x).square().mean() + comhe()
        loss.backward()
        draws[-1].append(comhe.projection.matrices()["0"])
        return loss

    for _ in range(3):
        draws.append([])
        descent.step(closure)
    assert steps(comhe) == 3
    assert all(len(step) > 1 for step in draws)
    for step in draws:
        assert all(torch.equal(matrices, step[0]) for matrices in step)
    assert not torch.equal(draws[0][0], draws[1][0])
    comhe()  # outside of the optimizer again
    assert steps(comhe) == 4


def test_a_step_that_fails_does_not_stop_the_counting():
    net = network()
    comhe = regularizer(net)
    descent = torch.optim.SGD(net.parameters(), lr=0.1)

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        descent.step(fail)
    before = steps(comhe)
    for _ in range(3):
        comhe().backward()
        descent.step()
    assert steps(comhe) == before + 3


def test_steps_by_hand():
    net = network()
    comhe = regularizer(net, auto_step=False, every=2, warm_up=4)
    full = regularizer(net)
    energies = []
    for _ in range(4):
        comhe.step()
        batches = [float(comhe().detach()) for _ in range(3)]
        assert batches == [batches[0]] * 3
        energies.append(batches[0])
    first, second = (float(full().detach()) for _ in range(2))
    assert energies == pytest.approx([0, 2 * 0.5 * first, 0, 2 * second], rel=1e-6)
    assert steps(comhe) == 4
    with pytest.raises(RuntimeError, match="auto_step=False"):
        full.step()
    with pytest.raises(TypeError, match="`auto_step` must be a bool, got int"):
        regularizer(net, auto_step=1)


def test_factors_belong_to_training_steps():
    net = network()
    plain = CoMHE(net, None)
    for options in (dict(every=4), dict(warm_up=100), dict(every=3, warm_up=5)):
        comhe = CoMHE(net, None, **options)
        comhe()
        expected = plain().detach()
        with torch.no_grad():
            assert torch.equal(comhe(), expected)
        assert torch.equal(comhe.eval()().detach(), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["random", "angle"])
def test_activation_checkpointing_gives_the_gradient_of_the_value(kind, reentrant):
    def make():
        net = network()
        projection = (
            RandomProjection(2, 8, seed=1)
            if kind == "random"
            else AngleProjection(1, 8, lr=0.01, seed=1)
        )
        return net, CoMHE(net, projection)

    (net, comhe), (other, again) = make(), make()
    trigger = torch.zeros(1, requires_grad=True)
    for step in range(3):
        energy = checkpoint(lambda x: comhe() + x.sum(), trigger, use_reentrant=reentrant)
        energy.backward()
        expected = again()
        expected.backward()
        if kind == "random" or not reentrant:
            assert float(energy.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
            for one, two in zip(gradients(net), gradients(other), strict=True):
                assert relative_error(one, two) <= 1e-6
        else:
            # the first forward runs without gradients, and its step is counted at the next call
            assert energy.isfinite()
        if not reentrant:
            assert steps(comhe) == steps(again) == step + 1


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="PyTorch 2.6 does not tell whether a checkpoint is on; docs/versions.md says so",
)
def test_two_checkpoints_before_one_backward_share_a_draw():
    net = network()
    comhe = regularizer(net)
    both = sum(checkpoint(lambda: comhe(), use_reentrant=False) for _ in range(2))
    (actual,) = torch.autograd.grad(both, net[0].weight)
    plain = regularizer(network())
    parameter = next(plain._layers[0].module.parameters())
    (expected,) = torch.autograd.grad(2 * plain(), parameter)
    assert relative_error(actual, expected) <= 1e-6
    checkpoint(lambda: comhe(), use_reentrant=False)
    assert steps(comhe) == 2


def test_saved_tensors_elsewhere_are_no_checkpoint():
    comhe = regularizer(network())
    with torch.autograd.graph.save_on_cpu():
        energies = [float(comhe().detach()) for _ in range(3)]
    assert len(set(energies)) == 3
    assert steps(comhe) == 3


def test_functional_transforms():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.regularizer = regularizer(self.net)

        def forward(self):
            return self.regularizer()

    module = Wrapped()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    twin = copy.deepcopy(module)

    def energy(parameters):
        return torch.func.functional_call(module, parameters, ())

    for _ in range(2):
        actual = torch.func.grad(energy)(parameters)
        names, leaves = zip(*twin.named_parameters(), strict=True)
        expected = torch.autograd.grad(twin(), leaves, allow_unused=True)
        for name, truth in zip(names, expected, strict=True):
            if truth is not None:
                assert relative_error(actual[name], truth) <= 1e-6
