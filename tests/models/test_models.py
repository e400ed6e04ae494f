"""CoMHE on real architectures: the layers it finds, and two steps of training in every manner."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from comhe_ext import CoMHE
from comhe_ext.projections import RandomProjection
from comhe_ext.testing.architectures import Llama, ViT, resnet50

# torch's own tracer makes an instance of every autograd Function that it meets
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def names(comhe):
    return [layer.name for layer in comhe.layers]


@pytest.mark.parametrize(("make", "parameters"), [(resnet50, 25_557_032), (ViT, 86_567_656)])
def test_models_are_the_published_ones(make, parameters):
    with torch.device("meta"):
        model = make()
        outputs = model(torch.empty(2, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert outputs.shape == (2, 1000)


def test_layers_of_resnet50():
    comhe = CoMHE(resnet50())
    found = names(comhe)
    assert len(found) == 54
    assert found[0] == "conv1"
    assert found[-1] == "fc"
    assert "layer4.0.downsample.0" in found
    assert "layer2.3.conv2" in found
    assert comhe.first_layer == "conv1"
    assert comhe.output_layer == "fc"
    rows = [layer.rows().shape for layer in comhe._layers]
    # known facts: its sets of filters, and its 25.5 million parameters
    assert sum(shape[1] for shape in rows) == 27_560
    assert sum(shape[1] ** 2 for shape in rows) == 29_209_152
    assert sum(shape.numel() for shape in rows) == 25_502_912
    assert len(comhe.projection.matrices()) == 52


def test_layers_of_a_vision_transformer():
    model = ViT(depth=2)
    block = ("qkv", "proj", "fc1", "fc2")
    blocks = [f"blocks.{i}.{part}" for i in range(2) for part in block]
    comhe = CoMHE(model)
    assert names(comhe) == ["patch", *blocks, "head"]
    assert comhe.first_layer == "patch"
    assert comhe.output_layer == "head"
    split = CoMHE(model, split={"*.qkv": 3})
    assert [x for x in names(split) if "qkv" in x] == [
        f"blocks.{i}.qkv.{j}" for i in range(2) for j in range(3)
    ]
    assert split._layers[1].rows().shape == (1, 768, 768)


def test_layers_of_a_language_model():
    sizes = dict(depth=2, width=64, inner=172, heads=4, kv_heads=2, vocabulary=90)
    parts = ("q", "k", "v", "o", "gate", "up", "down")
    blocks = [f"blocks.{i}.{part}_proj" for i in range(2) for part in parts]
    untied = CoMHE(Llama(**sizes))
    assert names(untied) == [*blocks, "head"]
    assert untied.first_layer is None
    assert untied.output_layer == "head"
    tied = Llama(**sizes, tied=True)
    assert names(CoMHE(tied)) == blocks
    assert CoMHE(tied).output_layer is None
    both = CoMHE(tied, include=[nn.Linear, nn.Embedding])
    assert names(both) == ["embed", *blocks]
    assert both.output_layer == "embed"


def small(kind):
    """Layers as in the large model, narrower."""
    torch.manual_seed(1)
    if kind == "resnet":
        model = resnet50(10)
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            del stage[1:]
        del model.layer4  # three quarters of all pairs
        model.fc = nn.Linear(1024, 10)
        return model, torch.randn(4, 3, 64, 64)
    if kind == "vit":
        return ViT(2, 96, 4, 8, 32, 10), torch.randn(2, 3, 32, 32)
    return Llama(2, 96, 260, 4, 2, 200, tied=True), torch.randint(200, (2, 12))


def train_two_steps(model, x, comhe, forward=None, **autocast):
    descent = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        descent.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast.get("enabled", False)):
            loss = (forward or model)(x).float().square().mean() + comhe()
        loss.backward()
        descent.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    return losses


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["resnet", "vit", "llama"])
def test_trains(kind, autocast):
    model, x = small(kind)
    # both steps under the same matrices, so that a step lowers the energy
    comhe = CoMHE(model, RandomProjection(4, 16, every=2, seed=1))
    losses = train_two_steps(model, x, comhe, enabled=autocast)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_trains_compiled(kind):
    torch._dynamo.reset()
    model, x = small(kind)
    expected = train_two_steps(model, x, CoMHE(model, RandomProjection(4, 16, seed=1)))
    model, x = small(kind)
    comhe = CoMHE(model, RandomProjection(4, 16, seed=1))
    compiled = torch.compile(lambda x: (model(x), comhe()), fullgraph=True, backend="aot_eager")
    energies = []

    def forward(x):
        y, energy = compiled(x)
        energies.append(energy)
        return y

    losses = train_two_steps(model, x, lambda: energies[-1], forward)
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_trains_with_activation_checkpointing(kind):
    model, x = small(kind)
    expected = train_two_steps(model, x, CoMHE(model, RandomProjection(4, 16, seed=1)))
    model, x = small(kind)
    comhe = CoMHE(model, RandomProjection(4, 16, seed=1))
    for block in model.blocks:
        block.forward = _checkpointed(block.forward)
    assert train_two_steps(model, x, comhe) == pytest.approx(expected, rel=1e-6)


def _checkpointed(forward):
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


RANK = """
import os, sys, torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from comhe_ext import CoMHE
from comhe_ext.projections import AngleProjection

rank, meeting = int(sys.argv[1]), "file://" + sys.argv[2]
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
torch.manual_seed(rank)  # as one does for the data
net = nn.Sequential(nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 5))
model = DistributedDataParallel(net)
for way, projection in (("loss", "random"), ("grad", "random"),
                        ("loss", AngleProjection(1, 8)), ("grad", AngleProjection(1, 8))):
    comhe = CoMHE(net, projection)
    descent = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(2):
        descent.zero_grad()
        task = model(torch.randn(4, 60)).square().mean()
        (task + comhe() if way == "loss" else task).backward()
        if way == "grad":
            comhe.accumulate_gradients()
        descent.step()
    matrices = comhe.projection.matrices()["0"].detach()
    for tensor in (matrices, *net.parameters()):
        others = [torch.empty_like(tensor) for _ in range(2)]
        torch.distributed.all_gather(others, tensor.detach())
        assert torch.equal(*others), (way, projection)
torch.distributed.destroy_process_group()
print("equal on both ranks")
"""


ONE_RANK_ALONE = """
import os, sys, torch
from torch import nn
from comhe_ext import CoMHE

rank, meeting = int(sys.argv[1]), "file://" + sys.argv[2]
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
torch.manual_seed(rank)
net = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 5))
if rank == 0:  # the rank that logs
    for projection in ("random", "angle-preserving", "adversarial", "group", None):
        comhe = CoMHE(net, projection)
        comhe.energies()
        comhe.eval()()
        with torch.no_grad():
            comhe.train()()
        print(comhe.summary() and "")
total = torch.ones(2)
torch.distributed.all_reduce(total)
assert total.tolist() == [2.0, 2.0]
torch.distributed.destroy_process_group()
print("fine")
"""


def test_looking_on_one_rank_alone_waits_for_nobody(tmp_path):
    for out, err in on_two_ranks(ONE_RANK_ALONE, tmp_path):
        assert "fine" in out, err


def test_two_ranks_draw_and_learn_the_same(tmp_path):
    for out, err in on_two_ranks(RANK, tmp_path):
        assert "equal on both ranks" in out, err


def on_two_ranks(program, folder):
    """What a program prints that is run with its rank and a place to meet, once a rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program, str(rank), str(folder / "meeting")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    return [process.communicate() for process in ranks]
