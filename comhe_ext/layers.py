"""The layers of a model whose weights have neurons, found by type or by name."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from comhe_ext import weights
from comhe_ext.selectors import Selector, Split, as_patterns, as_selectors, check_pattern

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# taken by default
DEFAULT_TYPES = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
SUPPORTED_TYPES = (*DEFAULT_TYPES, *EMBEDDINGS, nn.MultiheadAttention)
NOWHERE_TO_TURN = "neurons of fewer than two inputs have nowhere to turn"
# factors of a low-rank update W + BA: Linear layers by type, but their rows are not neurons
ADAPTERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True)
class Layer:
    """A weight, or some rows of one, whose rows are neurons with a common energy."""

    name: str
    module: nn.Module
    attribute: str = "weight"
    first: int = 0
    size: int | None = None  # None: all rows from `first` on
    transpose: bool = False  # the neurons are the columns
    padding: int | None = None  # the row of an embedding's padding_idx, which is not a neuron
    shape: tuple[int, ...] = ()  # of the weight when it was found
    # sets, neurons of each, and inputs of a neuron: the shape of `rows`
    sizes: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        sets, neurons, inputs = self.rows(torch.empty(self.shape, device="meta")).shape
        object.__setattr__(self, "sizes", (sets, neurons, inputs))

    @property
    def weight(self) -> Tensor:
        """The weight that the next forward of the module would use; see `comhe_ext.weights`."""
        return weights.read(self.module, self.attribute)

    @property
    def dtype(self) -> torch.dtype:
        return weights.sources(self.module, self.attribute)[0].dtype

    @property
    def device(self) -> torch.device:
        return weights.sources(self.module, self.attribute)[0].device

    def learns(self) -> bool:
        """Tell whether the weight is trained, whatever the grad mode is now."""
        return weights.learns(self.module, self.attribute)

    def check(self, weight: Tensor) -> None:
        """Raise if the weight cannot be taken, or has another shape than when it was found."""
        reason = weights.refusal(weight)
        if reason is not None:
            raise weights.error_of(reason)(f"layer {self.name!r}: {reason}")
        if tuple(weight.shape) != self.shape:
            raise RuntimeError(
                f"layer {self.name!r} was found with a weight of shape {self.shape}, which now has "
                f"{tuple(weight.shape)}: call `refresh()` after changing the model"
            )

    def rows(self, weight: Tensor | None = None) -> Tensor:
        """View the neurons as [groups, N, d], a set for each group of a convolution."""
        rows = self._all_rows(self.weight if weight is None else weight)
        if self.padding is None:
            return rows
        # only a view where the padding is the first or the last row, as is usual
        before = rows[:, : max(self.padding - self.first, 0)]
        after = rows[:, max(self.padding - self.first + 1, 0) :]
        if before.shape[1] == 0 or after.shape[1] == 0:
            return after if before.shape[1] == 0 else before
        return torch.cat([before, after], 1)

    def _all_rows(self, weight: Tensor) -> Tensor:
        """View the neurons, and the padding row of an embedding."""
        if isinstance(self.module, TRANSPOSED):
            # [in, out / groups, ...]: the neurons are the columns of each group
            return weight.unflatten(0, (self.module.groups, -1)).transpose(1, 2).flatten(2)
        if isinstance(self.module, CONVOLUTIONS):
            return weight.unflatten(0, (self.module.groups, -1)).flatten(2)
        if self.transpose:
            weight = weight.mT
        if weight.dim() == 3:  # a parameter of several sets
            return weight
        size = weight.shape[0] - self.first if self.size is None else self.size
        return weight.narrow(0, self.first, size).unsqueeze(0)

    @torch.no_grad()
    def assign(self, rows: Tensor) -> None:
        """Write `rows` [groups, N, d] into the weight as its neurons."""
        weight = self.weight.detach().clone()
        every = self._all_rows(weight)
        if self.padding is not None:
            part = every.clone()
            part[:, self._neurons(every.shape[1])] = rows.to(part)
            rows = part
        if isinstance(self.module, TRANSPOSED):
            groups = weight.unflatten(0, (self.module.groups, -1)).transpose(1, 2)
            groups.copy_(rows.view(groups.shape))
        else:
            every.copy_(rows)
        weights.write(self.module, self.attribute, weight)

    def _neurons(self, count: int) -> list[int]:
        """List which of `count` rows are neurons."""
        padding = -1 if self.padding is None else self.padding - self.first
        return [i for i in range(count) if i != padding]

    def matches(self, pattern: str) -> bool:
        """Tell whether a glob pattern fits the name of the layer, or of what it is a part of."""
        return fnmatchcase(self.name, pattern) or fnmatchcase(self.name.rpartition(".")[0], pattern)


class LeftOut(NamedTuple):
    """A layer or parameter of the model that is not regularized, and why."""

    name: str
    reason: str


class Survey(NamedTuple):
    """What was found in a model."""

    layers: list[Layer]
    left_out: list[LeftOut]


class _Candidate(NamedTuple):
    """A module, or a parameter that is no module's weight, which may have neurons."""

    name: str
    module: nn.Module
    attribute: str | None = None  # of a bare parameter

    @property
    def bare(self) -> bool:
        return self.attribute is not None


def find_layers(
    model: nn.Module,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] = (),
    split: Mapping[str, Split] | None = None,
    transpose: str | Iterable[str] = (),
) -> list[Layer]:
    """Find the layers of two neurons or more, in the order of registration; see `survey`."""
    return survey(model, include, exclude, split, transpose).layers


def survey(
    model: nn.Module,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] = (),
    split: Mapping[str, Split] | None = None,
    transpose: str | Iterable[str] = (),
) -> Survey:
    """Find the layers of two neurons or more, in the order of registration, each weight once.

    Args:
        model: where to look.
        include: types and glob patterns of names; a layer is taken if one of them fits. None takes
            Linear, convolution and transposed convolution layers. An embedding, a Linear tied to
            one, the packed projections of nn.MultiheadAttention, and parameters of two or three
            dimensions that are no layer's weight are taken if something names them.
        exclude: types and patterns of layers to leave out although `include` fits.
        split: pattern -> the number of equal parts, or the rows of each part, that a weight is
            split into: 3 for queries, keys and values packed into one Linear.
        transpose: patterns of the Linear layers, embeddings and parameters whose neurons are the
            columns.

    Raises:
        TypeError: a selector is of the wrong kind, or a weight that learns is not a dense
            floating-point tensor.
        ValueError: a pattern fits nothing, a split does not fit, or a weight is not initialized.
    """
    chosen = DEFAULT_TYPES if include is None else as_selectors("include", include)
    unwanted = as_selectors("exclude", exclude)
    split = {} if split is None else split
    as_patterns("split", split)
    turned = as_patterns("transpose", transpose)
    candidates = list(_candidates(model))
    unsupported = dict(_unsupported(model, candidates))
    _check_types(chosen, candidates)
    for pattern in (*chosen, *unwanted, *split, *turned):
        if isinstance(pattern, str):
            _check_pattern(pattern, candidates, unsupported)

    layers: list[Layer] = []
    left_out: list[LeftOut] = []
    # the embeddings by the identity of their weights: a Linear may be tied to one
    embeddings = {
        weights.identity(x.module, "weight"): x
        for x in candidates
        if isinstance(x.module, EMBEDDINGS)
    }
    seen: dict[tuple[int, ...], str] = {}
    for candidate in candidates:
        name, module = candidate.name, candidate.module
        owner = None
        if not candidate.bare and not isinstance(module, nn.MultiheadAttention):
            owner = embeddings.get(weights.identity(module, "weight"))
        tied = isinstance(module, nn.Linear) and owner is not None
        if not _fits(candidate, chosen, tied):
            reason = "it is not included"
            if include is None:
                kind = "a parameter" if candidate.bare else type(module).__name__
                if tied and owner is not None:
                    kind = f"the weight of the embedding {owner.name!r}"
                reason = f"{kind} is taken on request only"
            if not (candidate.bare and name.rpartition(".")[0] in unsupported):
                left_out.append(LeftOut(name, reason))
            continue
        if _fits(candidate, unwanted, tied):
            left_out.append(LeftOut(name, "it is excluded"))
            continue
        named = any(isinstance(x, str) and fnmatchcase(name, x) for x in chosen)
        if not named and any(part in ADAPTERS for part in name.split(".")):
            left_out.append(LeftOut(name, "a factor of a low-rank update has no neurons"))
            continue
        refused = _why_not(candidate)
        if refused is not None:
            left_out.append(LeftOut(name, refused))
            continue
        padding = getattr(owner.module, "padding_idx", None) if owner is not None else None
        for layer in _parts(candidate, split, turned, padding):
            key = weights.identity(module, layer.attribute)
            if key in seen and layer.first == 0:
                left_out.append(LeftOut(name, f"its weight is that of {seen[key]!r}"))
                break
            seen[key] = name
            _, neurons, inputs = layer.sizes
            if neurons < 2:
                left_out.append(LeftOut(layer.name, "fewer than two neurons make no pair"))
            elif inputs < 2:
                left_out.append(LeftOut(layer.name, NOWHERE_TO_TURN))
            else:
                layers.append(layer)
    left_out += [LeftOut(name, reason) for name, reason in unsupported.items()]
    return Survey(layers, left_out)


def _check_types(selectors: Sequence[Selector], candidates: Sequence[_Candidate]) -> None:
    """Raise for a type of module whose neurons are unknown."""
    for selector in selectors:
        if isinstance(selector, str) or any(isinstance(x.module, selector) for x in candidates):
            continue
        if not any(issubclass(x, selector) or issubclass(selector, x) for x in SUPPORTED_TYPES):
            raise TypeError(
                f"{selector.__module__}.{selector.__qualname__} has no neurons that are known "
                "here: `include` takes the names of its parameters, if their rows are neurons"
            )


def _check_pattern(
    pattern: str, candidates: Sequence[_Candidate], unsupported: Mapping[str, str]
) -> None:
    """Raise for a pattern that fits no layer or parameter."""
    if any(fnmatchcase(candidate.name, pattern) for candidate in candidates):
        return
    kinds = {name: why for name, why in unsupported.items() if fnmatchcase(name, pattern)}
    if kinds:
        what = "; ".join(f"{name!r} {why}" for name, why in kinds.items())
        raise TypeError(f"pattern {pattern!r} matches no layer with neurons: {what}")
    check_pattern(pattern, [x.name for x in candidates if not x.bare])


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    """Yield the modules of supported types, then the bare parameters."""
    owned: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, SUPPORTED_TYPES) or has_columns(module):
            owned.update(map(id, module.parameters(recurse=False)))
            yield _Candidate(name, module)
    for name, module in model.named_modules():
        if "parametrizations" in name.split("."):
            continue  # another weight is computed from these
        for attribute, parameter in module.named_parameters(prefix="", recurse=False):
            if id(parameter) in owned or isinstance(parameter, nn.parameter.UninitializedParameter):
                continue
            if parameter.dim() in (2, 3):
                yield _Candidate(f"{name}.{attribute}" if name else attribute, module, attribute)


def _unsupported(model: nn.Module, candidates: Sequence[_Candidate]) -> Iterator[tuple[str, str]]:
    """Yield (name, what it is) of modules of other types that hold weights."""
    holders = {id(candidate.module) for candidate in candidates if candidate.bare}
    for name, module in model.named_modules():
        kind = type(module)
        is_quantized = "quantized" in kind.__module__ and hasattr(module, "weight")
        own = kind.__module__.startswith("torch.nn.modules") and id(module) in holders
        if is_quantized or own:
            hint = "" if is_quantized else ": `include` takes its parameters by name"
            quantized = "quantized " if is_quantized else ""
            yield name, f"is a {quantized}{kind.__name__}, of unknown neurons{hint}"


def _fits(candidate: _Candidate, selectors: Sequence[Selector], tied: bool) -> bool:
    """Tell whether a selector fits; by type, a Linear tied to an embedding is an embedding."""
    for selector in selectors:
        if isinstance(selector, str):
            fits = fnmatchcase(candidate.name, selector)
        elif candidate.bare:
            fits = False
        elif tied:
            fits = issubclass(nn.Embedding, selector)
        else:
            fits = isinstance(candidate.module, selector)
            # GPT-2's own Linear counts as a Linear
            fits |= selector is nn.Linear and has_columns(candidate.module)
        if fits:
            return True
    return False


def has_columns(module: nn.Module) -> bool:
    """Tell whether it is the Linear of Hugging Face's GPT-2, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _attributes(candidate: _Candidate) -> list[str]:
    """List the attributes that hold the weights of a candidate."""
    module = candidate.module
    if isinstance(module, nn.MultiheadAttention):
        separate = [f"{x}_proj_weight" for x in "qkv"]
        return separate if module.in_proj_weight is None else ["in_proj_weight"]
    return [candidate.attribute or "weight"]


def _why_not(candidate: _Candidate) -> str | None:
    """Say why a frozen weight cannot be taken, or None; raise if the weight learns."""
    name, module = candidate.name, candidate.module
    for attribute in _attributes(candidate):
        source = weights.sources(module, attribute)[0]
        if isinstance(source, nn.parameter.UninitializedParameter):
            raise ValueError(f"layer {name!r} is not initialized: run the model once before")
        reason = weights.refusal(source)
        if reason is None:
            continue
        if weights.learns(module, attribute):
            raise weights.error_of(reason)(f"layer {name!r}: {reason}")
        return f"it is frozen, and {reason}"
    return None


def _parts(
    candidate: _Candidate,
    split: Mapping[str, Split],
    transpose: Sequence[str],
    padding: int | None,
) -> list[Layer]:
    """Make the layer of a candidate, or the layers that are packed into its weight."""
    name, module = candidate.name, candidate.module
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            return [
                Layer(f"{name}.{x[0]}", module, x, shape=tuple(getattr(module, x).shape))
                for x in _attributes(candidate)
            ]
        width = module.embed_dim
        shape = tuple(module.in_proj_weight.shape)
        return [
            Layer(f"{name}.{x}", module, "in_proj_weight", i * width, width, shape=shape)
            for i, x in enumerate("qkv")
        ]
    turned = any(fnmatchcase(name, pattern) for pattern in transpose)
    convolution = isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
    if turned and convolution:
        raise ValueError(
            f"`transpose` must name Linear layers, embeddings or parameters, got the convolution "
            f"{name!r}"
        )
    attribute = candidate.attribute or "weight"
    shape = tuple(_shape(module, attribute))
    columns = turned != has_columns(module)
    # where columns are the neurons, the padding row is a coordinate, not a neuron
    padding = None if columns else padding
    whole = Layer(name, module, attribute, transpose=columns, padding=padding, shape=shape)
    pattern = next((pattern for pattern in split if fnmatchcase(name, pattern)), None)
    if pattern is None:
        return [whole]
    sets, n = (1, shape[-1] if columns else shape[0]) if len(shape) == 2 else (2, shape[0])
    parts = split[pattern]
    if isinstance(parts, int):
        fits = parts >= 1 and n % parts == 0
        sizes = [n // parts] * parts if fits else []
    else:
        sizes = list(parts)
        fits = sum(sizes) == n and min(sizes, default=0) >= 1
    if sets != 1 or convolution or not fits:
        raise ValueError(
            f"`split` must divide the {n} rows of a Linear or an embedding, got {parts!r} for "
            f"layer {name!r}"
        )
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        Layer(
            f"{name}.{i}",
            module,
            attribute,
            start,
            size,
            columns,
            padding if padding is not None and start <= padding < start + size else None,
            shape,
        )
        for i, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]


def _shape(module: nn.Module, attribute: str) -> Sequence[int]:
    """Find the shape of a weight, by computing the weight if it is not a parameter."""
    with torch.no_grad():
        return weights.read(module, attribute).shape
