"""Which weights of a model are found, under which names, and as which rows."""

import pytest
import torch
from torch import nn

from comhe_ext.layers import find_layers


def names(model, *args, **kwargs):
    return [layer.name for layer in find_layers(model, *args, **kwargs)]


class Attention(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)


class Language(nn.Module):
    """Embedding, blocks, and a head tied to the embedding."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_types_and_patterns():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(4, 5)))
    assert names(model) == ["0", "2.0"]
    assert names(model, [nn.Linear]) == ["2.0"]
    assert names(model, ["2.*"]) == ["2.0"]
    assert names(model, ["0", nn.Linear]) == ["0", "2.0"]
    assert names(model, exclude=[nn.Conv2d]) == ["2.0"]
    assert names(model, exclude=["2.0"]) == ["0"]


def test_embeddings_and_tied_heads_on_request():
    model = Language()
    blocks = [f"blocks.{i}.{part}" for i in range(2) for part in ("qkv", "out")]
    assert names(model) == blocks
    assert names(model, [nn.Embedding]) == ["embed"]  # the head is the same weight
    assert names(model, ["head"]) == ["head"]
    assert names(model, [nn.Linear, nn.Embedding]) == ["embed", *blocks]
    untied = Language(tied=False)
    assert names(untied) == [*blocks, "head"]
    assert names(untied, [nn.Linear, nn.Embedding]) == ["embed", *blocks, "head"]


def test_parts_of_packed_weights():
    model = Attention()
    parts = find_layers(model, split={"*qkv": 3})
    assert [layer.name for layer in parts] == ["qkv.0", "qkv.1", "qkv.2", "out"]
    packed = model.qkv.weight.chunk(3)
    for layer, rows in zip(parts[:3], packed, strict=True):
        assert torch.equal(layer.rows(), rows.unsqueeze(0))
    grouped = find_layers(model, split={"qkv": [16, 4, 4]})
    assert [layer.rows().shape[1] for layer in grouped] == [16, 4, 4, 8]
    assert grouped[1].matches("qkv.1") and grouped[1].matches("qkv") and grouped[1].matches("q*")


@pytest.mark.parametrize("same", [True, False])
def test_multihead_attention_on_request(same):
    sizes = {} if same else dict(kdim=5, vdim=6)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, **sizes)})
    assert names(model) == ["attention.out_proj"]
    layers = find_layers(model, [nn.Linear, nn.MultiheadAttention])
    assert [x.name for x in layers] == [*(f"attention.{x}" for x in "qkv"), "attention.out_proj"]
    attention = model["attention"]
    weights = attention.in_proj_weight.chunk(3) if same else (
        attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    )  # fmt: skip
    for layer, weight in zip(layers, weights, strict=False):
        assert torch.equal(layer.rows()[0], weight)


def test_linear_of_gpt2_has_its_neurons_in_columns():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.ModuleDict({"c_attn": conv1d(24, 8), "c_proj": conv1d(8, 8)})
    layers = find_layers(model, split={"c_attn": 3})
    assert [x.name for x in layers] == ["c_attn.0", "c_attn.1", "c_attn.2", "c_proj"]
    assert torch.equal(layers[1].rows()[0], model["c_attn"].weight[:, 8:16].T)
    layers[1].assign(torch.ones(1, 8, 8))
    assert bool((model["c_attn"].weight[:, 8:16] == 1).all())
    assert not bool((model["c_attn"].weight[:, :8] == 1).any())


def layers_of_every_kind():
    torch.manual_seed(1)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))
    return nn.ModuleList(
        [
            nn.Linear(5, 4),
            nn.Conv1d(6, 8, 3, groups=2),
            nn.Conv3d(2, 4, 2),
            nn.ConvTranspose1d(4, 6, 3),
            nn.ConvTranspose2d(6, 8, 3, groups=2),
            nn.Embedding(7, 5),
            nn.MultiheadAttention(4, 2),
            parametrized,
        ]
    )


def test_rows_are_what_is_multiplied_with_the_input():
    linear, conv, _, transposed, grouped, *_ = find_layers(layers_of_every_kind())
    assert conv.rows().shape == (2, 4, 9) and grouped.rows().shape == (2, 4, 27)
    assert torch.equal(linear.rows()[0], linear.weight)
    # one output position of a transposed convolution is a product with the rows
    x = torch.randn(1, 4, 1)
    y = nn.functional.conv_transpose1d(x, transposed.weight)
    by_rows = transposed.rows()[0].unflatten(1, (4, 3)) * x[0]
    torch.testing.assert_close(y[0], by_rows.sum(1))


def test_assign_is_the_inverse_of_rows():
    model = layers_of_every_kind()
    types = [nn.Linear, nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d]
    layers = find_layers(model, [*types, nn.Embedding, nn.MultiheadAttention])
    assert len(layers) == 11
    for layer in layers:
        rows = torch.randn_like(layer.rows())
        before = layer.weight.clone()
        layer.assign(rows)
        torch.testing.assert_close(layer.rows(), rows)
        assert not torch.equal(layer.weight, before)


def test_every_weight_once():
    shared = nn.Linear(4, 4)
    twin = nn.Linear(4, 4)
    twin.weight = shared.weight
    assert names(nn.Sequential(shared, nn.ReLU(), shared, twin, nn.Linear(4, 3))) == ["0", "4"]
    both = Attention()
    again = nn.Linear(8, 24)
    again.weight = both.qkv.weight
    model = nn.ModuleDict({"a": both, "b": again})
    assert names(model, split={"a.qkv": 3}) == ["a.qkv.0", "a.qkv.1", "a.qkv.2", "a.out"]


def test_weight_norm_of_either_kind_is_read_through():
    for make in (nn.utils.parametrizations.weight_norm, _old_weight_norm):
        module = make(nn.Linear(5, 4))
        (layer,) = find_layers(module)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name != "bias":
                    parameter.mul_(2.0)
        gradients = torch.autograd.grad(layer.rows().sum(), find_parameters(module))
        assert all(g.abs().sum() > 0 for g in gradients)
        assert layer.learns()
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        assert not layer.learns()


def _old_weight_norm(module):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(module)


def find_parameters(module):
    return [p for name, p in module.named_parameters() if name != "bias"]


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"pattern 'enc\.\*' matches no layer; the layers are \['qkv', 'out'\]",
         dict(include=["enc.*"])),
        (ValueError, "pattern 'head' matches no layer", dict(exclude=["head"])),
        (ValueError, "pattern 'qk' matches no layer", dict(split={"qk": 3})),
        (ValueError, "divide the 24 rows .* got 5 for layer 'qkv'", dict(split={"qkv": 5})),
        (ValueError, r"divide the 24 rows .* got \[20, 5\]", dict(split={"qkv": [20, 5]})),
        (ValueError, "divide the 24 rows .* got 0", dict(split={"qkv": 0})),
        (TypeError, "`include` must hold patterns or module types, got 3", dict(include=[3])),
        (TypeError, "`exclude` must hold .* <class 'int'>", dict(exclude=[int])),
        (TypeError, "`split` must hold patterns", dict(split={nn.Linear: 3})),
    ],
)  # fmt: skip
def test_messages(error, message, options):
    with pytest.raises(error, match=message):
        find_layers(Attention(), **options)


def test_a_convolution_is_not_split():
    with pytest.raises(ValueError, match="of a Linear or an embedding"):
        find_layers(nn.Conv2d(3, 6, 3), split={"*": 2})
