"""CoMHE of sampled layers: the exact energies in the mean, the same draws where they must be."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from comhe_ext import CoMHE, compressive_energy
from comhe_ext.packing import Partitions
from comhe_ext.projections import AdversarialProjection, GroupProjection, RandomProjection
from comhe_ext.testing import relative_error

# torch's own tracer makes an instance of every autograd Function that it meets
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def network(hidden=90):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(24, hidden), nn.Tanh(), nn.Linear(hidden, 70), nn.Linear(70, 6))


def fixed():
    """Matrices that stay, so that nothing but the blocks is drawn anew."""
    return RandomProjection(2, 8, every=10**6, seed=1)


def regularizer(net, projection, **options):
    return CoMHE(net, projection, method="sampled", samples=10, output_layer="3", **options)


def draw(comhe):
    return comhe().detach()


@pytest.mark.parametrize("half_space", [True, False])
@pytest.mark.parametrize("projection", [fixed, lambda: GroupProjection(3), lambda: None])
def test_the_mean_of_many_steps_is_the_exact_sum(projection, half_space):
    net = network()
    options = {"half_space": half_space, "output_layer": "3"}
    exact = CoMHE(net, projection(), **options)()
    comhe = CoMHE(net, projection(), method="sampled", samples=10, **options)
    draws = torch.stack([draw(comhe) for _ in range(100)])
    assert draws.unique().numel() > 90
    z = (draws.double().mean() - exact.detach()) / (draws.double().std() / len(draws) ** 0.5)
    assert abs(float(z)) < 4.0


def test_auto_samples_large_layers_alone():
    net = network()
    comhe = CoMHE(net, fixed(), method="auto", samples=10, above=80, output_layer="3")
    assert [layer.sampled for layer in comhe.layers] == [True, False, False]
    assert "sampled" in comhe.summary()
    comhe = CoMHE(net, fixed(), method="auto", output_layer="3")
    assert not any(layer.sampled for layer in comhe.layers)
    assert torch.equal(comhe(), CoMHE(net, fixed(), output_layer="3")())
    # two blocks save nothing
    comhe = CoMHE(net, fixed(), method="sampled", samples=40, output_layer="3")
    assert [layer.sampled for layer in comhe.layers] == [True, False, False]


def test_auto_asks_whether_one_pass_does_it():
    for dtype, sampled in ((torch.float32, True), (torch.float64, False)):
        net = nn.Sequential(nn.Linear(24, 600), nn.Linear(600, 6)).to(dtype)
        comhe = CoMHE(net, fixed(), method="auto", output_layer="1")
        assert [layer.sampled for layer in comhe.layers] == [sampled, False]


def test_the_size_of_blocks_follows_the_rows_unless_it_is_given():
    sizes = {150: 64, 768: 64, 1024: 85, 1536: 128, 10**6: 128}
    assert {n: Partitions("sampled").samples_of(n) for n in sizes} == sizes
    assert {Partitions("sampled", 10).samples_of(n) for n in sizes} == {10}
    hidden = {150: False, 300: True}
    for size, sampled in hidden.items():
        comhe = CoMHE(network(size), fixed(), method="auto", output_layer="3")
        assert [layer.sampled for layer in comhe.layers] == [sampled, False, False]
        given = CoMHE(network(size), fixed(), method="auto", output_layer="3", samples=64)
        assert torch.equal(draw(comhe), draw(given))
    # two blocks of the default save nothing
    comhe = CoMHE(network(128), fixed(), method="sampled", output_layer="3")
    assert not any(layer.sampled for layer in comhe.layers)


def test_layers_whose_moments_would_cost_more_than_they_save_are_exact():
    net = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 300), nn.Linear(300, 300))
    options = {"method": "sampled", "samples": 20, "output_layer": "3"}
    # in full space wide rows have a polynomial of degree 1, which needs no moments to speak of
    comhe = CoMHE(net, None, **options)
    assert [layer.sampled for layer in comhe.layers] == [False, False, True]
    comhe = CoMHE(net, None, half_space=False, **options)
    assert all(layer.sampled for layer in comhe.layers)
    comhe = CoMHE(net, GroupProjection(10), **options)
    assert [layer.sampled for layer in comhe.layers] == [True, True, True]
    exact = CoMHE(net, None, output_layer="3", half_space=False)()
    draws = torch.stack([draw(CoMHE(net, None, half_space=False, **options)) for _ in range(2)])
    assert torch.equal(draws[0], draws[1])
    assert relative_error(draws[0], exact.detach()) < 1e-3


def test_a_step_s_blocks_are_its_own_and_come_again():
    net = network()
    comhe, other = regularizer(net, fixed()), regularizer(net, fixed())
    torch.manual_seed(7)  # of ranks, none has the other's
    first = [draw(comhe) for _ in range(3)]
    assert len({float(x) for x in first}) == 3
    torch.manual_seed(8)
    assert torch.equal(torch.stack(first), torch.stack([draw(other) for _ in range(3)]))
    # what is no step repeats the last
    with torch.no_grad():
        assert torch.equal(comhe(), first[-1])
    assert torch.equal(comhe.eval()(), first[-1])
    # and a saved state goes on
    state = copy.deepcopy(other.state_dict())
    following = draw(other)
    third = regularizer(net, fixed())
    third.load_state_dict(state)
    assert torch.equal(draw(third), following)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_repeats_the_blocks(reentrant):
    net = network()
    expected = regularizer(net, fixed())
    expected().backward()
    gradient = net[0].weight.grad.clone()
    net.zero_grad()
    comhe = regularizer(net, fixed())
    flag = torch.ones((), requires_grad=True)
    total = checkpoint(lambda one: one * comhe(), flag, use_reentrant=reentrant)
    total.backward()
    if not reentrant:  # whose first step is counted in the backward
        assert torch.equal(net[0].weight.grad, gradient)
    assert int(comhe.get_extra_state()) <= 2


def test_every_and_warm_up():
    net = network()
    plain = [draw(x) for x in [regularizer(net, fixed())] for _ in range(4)]
    comhe = regularizer(net, fixed(), every=2, warm_up=4)
    draws = [draw(comhe) for _ in range(4)]
    assert draws[0] == draws[2] == 0.0
    assert relative_error(draws[1], 2 * 0.5 * plain[1]) < 1e-6
    assert relative_error(draws[3], 2 * plain[3]) < 1e-6


@pytest.mark.parametrize("mode", ["unrolled", "alternating"])
def test_adversarial_matrices_learn_from_samples(mode):
    net = network(300)
    projection = AdversarialProjection(2, 8, mode=mode, seed=1, lr=10.0)
    comhe = CoMHE(net, projection, method="sampled", samples=50, output_layer="3")
    before = projection.matrices()["0"].detach().clone()
    comhe().backward()
    assert net[0].weight.grad.isfinite().all()
    after = projection.matrices()["0"].detach()
    rows = net[0].weight.detach()
    assert compressive_energy(rows, after) > compressive_energy(rows, before)


def test_angle_preserving_matrices():
    net = network()
    comhe = regularizer(net, "angle-preserving")
    comhe().backward()
    assert net[0].weight.grad.isfinite().all()


def test_compile():
    net = network()
    torch.compiler.reset()
    eager, compiled = regularizer(net, fixed()), regularizer(net, fixed())
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        net.zero_grad()
        expected = eager()
        expected.backward()
        gradient = net[0].weight.grad.clone()
        net.zero_grad()
        found = call()
        found.backward()
        assert relative_error(found, expected) < 1e-6
        assert relative_error(net[0].weight.grad, gradient) < 1e-5


def test_mistakes_are_told():
    net = network()
    for options, error, words in (
        ({"method": "fast"}, ValueError, "`method` must be 'exact', 'sampled' or 'auto'"),
        ({"method": "auto", "samples": 1}, ValueError, "`samples`"),
        ({"method": "auto", "above": -1}, ValueError, "`above`"),
        ({"method": "auto", "above": 1.5}, TypeError, "`above`"),
    ):
        with pytest.raises(error, match=words):
            CoMHE(net, output_layer="3", **options)
