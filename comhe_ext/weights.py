"""Reading the weight of a module, whatever computes it, without changing the module.

A weight may be a parameter, or be computed from others before each forward: by a parametrization
(`torch.nn.utils.parametrizations`), or by the older forward hooks `weight_norm`, `spectral_norm`
and `prune`, which leave the tensor of the last forward in the weight's place. What is read here is
what the next forward would use, with its graph where gradients are enabled. Buffers stay as they
are: the power iteration of a spectral norm belongs to the forward of the model alone.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from comhe_ext.checks import check_tensor, is_dtensor


def read(module: nn.Module, attribute: str) -> Tensor:
    """Compute the tensor that the next forward of `module` would find under `attribute`."""
    if parametrize.is_parametrized(module, attribute):
        return _read_parametrized(module, attribute)
    weight: Tensor
    hook = _hook(module, attribute)
    if isinstance(hook, WeightNorm):
        v, g = read(module, f"{attribute}_v"), read(module, f"{attribute}_g")
        weight = torch._weight_norm(v, g, hook.dim)
        return weight
    if isinstance(hook, SpectralNorm):
        weight = read(module, f"{attribute}_orig")
        matrix = hook.reshape_weight_to_matrix(weight)
        # copies, because the next forward changes both vectors in place
        u, v = (getattr(module, f"{attribute}_{x}").clone() for x in "uv")
        return weight / torch.dot(u, torch.mv(matrix, v))
    if isinstance(hook, BasePruningMethod):
        weight = read(module, f"{attribute}_orig")
        mask: Tensor = getattr(module, f"{attribute}_mask")
        return mask.to(weight.dtype) * weight
    weight = getattr(module, attribute)
    return weight


def _read_parametrized(module: nn.Module, attribute: str) -> Tensor:
    # not getattr(module, attribute): inside `parametrize.cached()` that would cache what is read
    # now, maybe without a graph, for the model's own forward
    chain = _chain(module, attribute)
    weight: Tensor
    if chain.training and any(True for _ in chain.buffers()):
        # in training mode a spectral norm updates its buffers: it gets copies
        copies = {name: buffer.clone() for name, buffer in chain.named_buffers()}
        weight = torch.func.functional_call(chain, copies, ())
    else:
        weight = chain()
    return weight


def write(module: nn.Module, attribute: str, weight: Tensor) -> None:
    """Make `read` return `weight`, as far as what computes it allows.

    Pruned entries stay zero; under a spectral norm the weight keeps its directions.
    """
    hook = _hook(module, attribute)
    with torch.no_grad():
        if parametrize.is_parametrized(module, attribute):
            setattr(module, attribute, weight)  # by the inverse of the parametrization
        elif isinstance(hook, WeightNorm):
            write(module, f"{attribute}_v", weight)
            write(module, f"{attribute}_g", torch.norm_except_dim(weight, 2, hook.dim))
        elif isinstance(hook, (SpectralNorm, BasePruningMethod)):
            write(module, f"{attribute}_orig", weight)
        else:
            getattr(module, attribute).copy_(weight)


def sources(module: nn.Module, attribute: str) -> list[Tensor]:
    """List the tensors that a weight is computed from; a parameter is its own source."""
    if parametrize.is_parametrized(module, attribute):
        return list(_chain(module, attribute).parameters()) or [read(module, attribute)]
    hook = _hook(module, attribute)
    if isinstance(hook, WeightNorm):
        return [x for part in "vg" for x in sources(module, f"{attribute}_{part}")]
    if isinstance(hook, (SpectralNorm, BasePruningMethod)):
        return sources(module, f"{attribute}_orig")
    return [getattr(module, attribute)]


def identity(module: nn.Module, attribute: str) -> tuple[int, ...]:
    """Identify a weight by its sources: shared and tied weights have the same identity.

    Valid while the sources live. A computed weight is a temporary, so its own id says nothing.
    """
    return tuple(id(source) for source in sources(module, attribute))


def learns(module: nn.Module, attribute: str) -> bool:
    """Tell whether the weight is trained, whatever the grad mode is now."""
    return any(source.requires_grad for source in sources(module, attribute))


def refusal(weight: object) -> str | None:
    """Say why the energies cannot take a weight, or None."""
    if not isinstance(weight, Tensor):
        return f"`weight` must be a torch.Tensor, got {type(weight).__name__}"
    if weight.numel() == 0 and weight.dim() < 2:
        return (
            "`weight` is empty: its numbers are elsewhere between uses, as under DeepSpeed's "
            "ZeRO-3. Call inside `deepspeed.zero.GatheredParameters`"
        )
    try:
        check_tensor("weight", weight, sharded=True)
    except TypeError as error:
        return str(error)
    if is_dtensor(weight):
        partial = any(placement.is_partial() for placement in weight.placements)
        return f"`weight` has placements {weight.placements}: redistribute it" if partial else None
    if is_traceable_wrapper_subclass(weight):
        return f"`weight` must be a plain tensor, got {type(weight).__name__}"
    return None


def error_of(reason: str) -> type[Exception]:
    """Choose the exception for a `refusal`."""
    return ValueError if "is empty" in reason else TypeError


def _chain(module: nn.Module, attribute: str) -> nn.Module:
    """Return the parametrizations of a weight: one module whose call computes it."""
    chain: nn.Module = module.parametrizations[attribute]  # type: ignore[index,assignment]
    return chain


def _hook(module: nn.Module, attribute: str) -> object:
    """Find the hook of torch.nn.utils that computes the weight before each forward, or None."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == attribute:
            return hook
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == attribute:
            return hook
    return None
