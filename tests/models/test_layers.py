"""Which weights of a model are found, under which names, and as which rows."""

import pytest
import torch
from torch import nn

from comhe_ext import CoMHE
from comhe_ext.layers import find_layers, survey
from comhe_ext.testing import reference


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
    assert grouped[1].matches("qkv.1")
    assert grouped[1].matches("qkv")
    assert grouped[1].matches("q*")


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
    assert conv.rows().shape == (2, 4, 9)
    assert grouped.rows().shape == (2, 4, 27)
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
        (TypeError, "`transpose` must hold patterns", dict(transpose=[nn.Linear])),
        (TypeError, "`include` must hold .* got 3", dict(include=3)),
        (ValueError, "pattern 'w' matches no layer", dict(transpose="w")),
    ],
)  # fmt: skip
def test_messages(error, message, options):
    with pytest.raises(error, match=message):
        find_layers(Attention(), **options)


def test_a_convolution_is_not_split():
    with pytest.raises(ValueError, match="of a Linear or an embedding"):
        find_layers(nn.Conv2d(3, 6, 3), split={"*": 2})


def test_one_selector_is_not_read_letter_by_letter():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(12)])
    assert names(model, exclude="10") == [str(i) for i in range(12) if i != 10]
    assert names(model, include="1*") == ["1", "10", "11"]
    assert names(model, include=nn.Linear, exclude="1?") == [str(i) for i in range(10)]
    assert names(model, include=(x for x in ("3", "5"))) == ["3", "5"]
    assert [layer.name for layer in CoMHE(model, include=("1", "11"), exclude="11").layers] == ["1"]


# --- parameters that are no layer's weight --------------------------------------------------------


class Dictionary(nn.Module):
    """A sparse autoencoder, a codebook, and what is none of both."""

    def __init__(self):
        super().__init__()
        self.W_enc = nn.Parameter(torch.randn(8, 30))
        self.W_dec = nn.Parameter(torch.randn(30, 8))
        self.experts = nn.Parameter(torch.randn(3, 6, 8))
        self.bias = nn.Parameter(torch.randn(30))
        self.codes = nn.ParameterList([nn.Parameter(torch.randn(5, 8)) for _ in range(2)])
        self.inner = nn.Linear(8, 9)
        self.recurrent = nn.GRU(8, 4)


def test_parameters_by_name():
    model = Dictionary()
    assert names(model) == ["inner"]
    assert names(model, ["W_dec", nn.Linear]) == ["inner", "W_dec"]
    assert names(model, "codes.*") == ["codes.0", "codes.1"]
    assert names(model, ["recurrent.weight_ih*"]) == ["recurrent.weight_ih_l0"]
    layers = find_layers(model, ["W_*", "experts"], transpose="W_enc")
    assert [layer.name for layer in layers] == ["W_enc", "W_dec", "experts"]
    assert [layer.sizes for layer in layers] == [(1, 30, 8), (1, 30, 8), (3, 6, 8)]
    assert torch.equal(layers[0].rows()[0], model.W_enc.T)
    assert torch.equal(layers[2].rows(), model.experts)
    assert dict(survey(model).left_out)["W_dec"] == "a parameter is taken on request only"
    for layer in layers:
        rows = torch.randn_like(layer.rows())
        layer.assign(rows)
        assert torch.equal(layer.rows(), rows)


def test_the_energy_of_parameters():
    model = Dictionary()
    comhe = CoMHE(model, None, include=["W_*", "experts"], transpose=["W_enc"], output_layer=None)
    expected = sum(
        reference.hyperspherical_energy(w.detach(), half_space=True).mean()
        for w in (model.W_enc.T, model.W_dec, model.experts)
    )
    assert float(comhe().detach()) == pytest.approx(float(expected), rel=1e-6)
    comhe().backward()
    assert model.W_enc.grad is not None
    assert model.experts.grad is not None
    assert model.inner.weight.grad is None
    # under its own name as an output layer, too
    head = CoMHE(model, None, include="codes.0", output_layer="codes.0")
    expected = 10 * reference.hyperspherical_energy(model.codes[0].detach())
    assert float(head().detach()) == pytest.approx(float(expected), rel=1e-6)


def test_columns_of_a_linear():
    linear = nn.Linear(8, 5)
    (layer,) = find_layers(linear, transpose="")
    assert torch.equal(layer.rows()[0], linear.weight.T)
    with pytest.raises(ValueError, match=r"`transpose` must name Linear .* the convolution '0'"):
        find_layers(nn.Sequential(nn.Conv2d(3, 4, 3)), transpose="0")
    parts = find_layers(linear, transpose="*", split={"*": 2})
    assert torch.equal(torch.cat([part.rows()[0] for part in parts]), linear.weight.T)


@pytest.mark.parametrize(
    ("include", "message"),
    [
        (nn.LSTM, r"LSTM has no neurons that are known here: `include` takes the names of its"),
        (nn.Bilinear, "Bilinear has no neurons"),
        ("recurrent", "pattern 'recurrent' matches no layer .*: 'recurrent' is a GRU"),
        ("quantized", "'quantized' is a quantized Linear"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_types_without_known_neurons_are_named(include, message):
    model = Dictionary()
    model.quantized = torch.ao.nn.quantized.dynamic.Linear(8, 4)
    with pytest.raises(TypeError, match=message):
        find_layers(model, include)
    left_out = dict(survey(model).left_out)
    assert "GRU" in left_out["recurrent"]
    assert "quantized" in left_out["quantized"]


# --- padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 3, 6, -1, None])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_the_padding_of_an_embedding_is_no_neuron(kind, padding):
    embedding = kind(7, 5, padding_idx=padding)
    comhe = CoMHE(embedding, None, include=kind, output_layer=None)
    index = list(range(7))
    if padding is not None:
        del index[padding]
    expected = reference.hyperspherical_energy(embedding.weight.detach()[index], half_space=True)
    assert float(comhe().detach()) == pytest.approx(float(expected), rel=1e-6)
    comhe().backward()
    gradient = embedding.weight.grad
    assert bool((gradient[index] != 0).any(1).all())
    if padding is not None:
        assert bool((gradient[padding] == 0).all())
    (layer,) = find_layers(embedding, kind)
    assert layer.sizes == (1, len(index), 5)
    before = embedding.weight.detach().clone()
    layer.assign(torch.ones(1, len(index), 5))
    assert bool((embedding.weight[index] == 1).all())
    if padding is not None:
        assert torch.equal(embedding.weight[padding], before[padding])


def test_padding_of_parts_and_of_tied_heads():
    model = Language()  # padding_idx=0, and a head of the same weight
    (head,) = find_layers(model, "head")
    assert torch.equal(head.rows()[0], model.head.weight[1:])
    parts = find_layers(model, "embed", split={"embed": [8, 12]})
    assert [layer.sizes for layer in parts] == [(1, 7, 8), (1, 12, 8)]
    assert torch.equal(parts[0].rows()[0], model.embed.weight[1:8])
    assert torch.equal(parts[1].rows()[0], model.embed.weight[8:])
