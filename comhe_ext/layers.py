"""The layers of a model whose weights have neurons, found by type or by name."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

Selector: TypeAlias = str | type[nn.Module]
# a number of equal parts, or the rows of each part
Split: TypeAlias = int | Sequence[int]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# found where nothing else is asked for
DEFAULT_TYPES = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
SUPPORTED_TYPES = (*DEFAULT_TYPES, nn.Embedding, nn.MultiheadAttention)


class Layer(NamedTuple):
    """A weight, or some rows of one, whose rows are neurons that meet each other."""

    name: str
    module: nn.Module
    attribute: str = "weight"
    first: int = 0
    size: int | None = None  # None: all rows from `first` on

    @property
    def weight(self) -> Tensor:
        """Read at each use: it may have been replaced, or be computed by a parametrization."""
        for hook in self.module._forward_pre_hooks.values():
            # torch.nn.utils.weight_norm leaves a tensor of the last forward in its place
            if isinstance(hook, WeightNorm) and hook.name == self.attribute:
                return cast(Tensor, hook.compute_weight(self.module))
        return cast(Tensor, getattr(self.module, self.attribute))

    def learns(self) -> bool:
        """Whether a gradient of the weight goes anywhere."""
        with torch.enable_grad():
            return self.weight.requires_grad

    def rows(self) -> Tensor:
        """The neurons, one set a convolution group: [groups, N, d]."""
        weight = self.weight
        if isinstance(self.module, TRANSPOSED):
            # [in, out / groups, ...]: the neurons are the columns of each group
            return weight.unflatten(0, (self.module.groups, -1)).transpose(1, 2).flatten(2)
        if isinstance(self.module, CONVOLUTIONS):
            return weight.unflatten(0, (self.module.groups, -1)).flatten(2)
        return self._part(weight).unsqueeze(0)

    @torch.no_grad()
    def assign(self, rows: Tensor) -> None:
        """Make `rows` [groups, N, d] the neurons."""
        weight = self.weight.detach().clone()
        if isinstance(self.module, TRANSPOSED):
            groups = weight.unflatten(0, (self.module.groups, -1)).transpose(1, 2)
            groups.copy_(rows.view(groups.shape))
        elif isinstance(self.module, CONVOLUTIONS):
            weight.copy_(rows.view(weight.shape))
        else:
            self._part(weight).copy_(rows[0])
        if parametrize.is_parametrized(self.module, self.attribute):
            setattr(self.module, self.attribute, weight)  # by the inverse of the parametrization
        else:
            getattr(self.module, self.attribute).copy_(weight)

    def _part(self, weight: Tensor) -> Tensor:
        """The rows of a Linear or an embedding that are this layer's, [N, d]."""
        if _has_columns(self.module):
            weight = weight.mT
        size = weight.shape[0] - self.first if self.size is None else self.size
        return weight.narrow(0, self.first, size)

    def matches(self, pattern: str) -> bool:
        """Whether a glob pattern fits the name of the layer, or of what it is a part of."""
        return fnmatchcase(self.name, pattern) or fnmatchcase(self.name.rpartition(".")[0], pattern)


def _has_columns(module: nn.Module) -> bool:
    """Whether it is the Linear of Hugging Face's GPT-2, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def find_layers(
    model: nn.Module,
    include: Iterable[Selector] | None = None,
    exclude: Iterable[Selector] = (),
    split: Mapping[str, Split] | None = None,
) -> list[Layer]:
    """Layers of two neurons or more, in the order of registration; every weight once.

    Args:
        model: where to look.
        include: types and glob patterns of names; a layer is taken if one of them fits. None takes
            Linear, convolution and transposed convolution layers. An embedding, a Linear tied to
            one, and the packed projections of nn.MultiheadAttention count if asked for.
        exclude: types and patterns of what is left out all the same.
        split: pattern -> into how many equal parts, or parts of how many rows, a weight is to be
            split: 3 for queries, keys and values packed into one Linear.
    """
    include = DEFAULT_TYPES if include is None else tuple(include)
    exclude, split = tuple(exclude), dict(split or {})
    for name, selectors in (("include", include), ("exclude", exclude), ("split", tuple(split))):
        for selector in selectors:
            is_type = isinstance(selector, type) and issubclass(selector, nn.Module)
            if not (isinstance(selector, str) or (is_type and name != "split")):
                raise TypeError(f"`{name}` must hold patterns or module types, got {selector!r}")
    candidates = list(_candidates(model))
    names = [name for name, _ in candidates]
    for pattern in (x for x in (*include, *exclude, *split) if isinstance(x, str)):
        check_pattern(pattern, names)

    layers: list[Layer] = []
    embeddings = {id(module.weight) for _, module in candidates if isinstance(module, nn.Embedding)}
    seen: dict[int, Tensor] = {}  # by id; kept alive, for a parametrized weight is a temporary
    for name, module in candidates:
        tied = isinstance(module, nn.Linear) and id(module.weight) in embeddings
        if not _fits(name, module, include, tied) or _fits(name, module, exclude, tied):
            continue
        for layer in _parts(name, module, split):
            weight = layer.weight
            key = id(weight)
            if isinstance(weight, nn.parameter.UninitializedParameter):
                raise ValueError(f"layer {name!r} is not initialized: run the model once before")
            if key in seen and layer.first == 0:
                break
            seen[key] = weight
            if layer.rows().shape[1] > 1:
                layers.append(layer)
    return layers


def check_pattern(pattern: str, names: Sequence[str]) -> None:
    """Raise if the pattern fits none of the names."""
    if not any(fnmatchcase(name, pattern) for name in names):
        raise ValueError(f"pattern {pattern!r} matches no layer; the layers are {list(names)}")


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, SUPPORTED_TYPES) or _has_columns(module):
            yield name, module


def _fits(name: str, module: nn.Module, selectors: Sequence[Selector], tied: bool) -> bool:
    """Whether a selector fits; to types, a Linear tied to an embedding is one itself."""
    for selector in selectors:
        if isinstance(selector, str):
            fits = fnmatchcase(name, selector)
        elif tied:
            fits = issubclass(nn.Embedding, selector)
        else:
            fits = isinstance(module, selector)
            # GPT-2's Linear goes where a Linear would
            fits |= selector is nn.Linear and _has_columns(module)
        if fits:
            return True
    return False


def _parts(name: str, module: nn.Module, split: Mapping[str, Split]) -> list[Layer]:
    """The layer itself, or the parts that it packs."""
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            return [Layer(f"{name}.{x}", module, f"{x}_proj_weight") for x in "qkv"]
        width = module.embed_dim
        return [
            Layer(f"{name}.{x}", module, "in_proj_weight", i * width, width)
            for i, x in enumerate("qkv")
        ]
    whole = Layer(name, module)
    pattern = next((pattern for pattern in split if fnmatchcase(name, pattern)), None)
    if pattern is None:
        return [whole]
    sets, n, _ = whole.rows().shape
    parts = split[pattern]
    if isinstance(parts, int):
        fits = parts >= 1 and n % parts == 0
        sizes = [n // parts] * parts if fits else []
    else:
        sizes = list(parts)
        fits = sum(sizes) == n and min(sizes, default=0) >= 1
    if sets != 1 or isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) or not fits:
        raise ValueError(
            f"`split` must divide the {n} rows of a Linear or an embedding, got {parts!r} for "
            f"layer {name!r}"
        )
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        Layer(f"{name}.{i}", module, "weight", start, size)
        for i, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]
