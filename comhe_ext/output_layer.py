"""Which layer a model ends in, and how that is known."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from comhe_ext import weights
from comhe_ext.layers import DEFAULT_TYPES, SUPPORTED_TYPES, Layer, has_columns


class OutputLayer(NamedTuple):
    """The layer that a model ends in, and how that is known."""

    name: str | None
    reason: str
    guessed: bool = False

    def warn_of_guess(self, factor: float, stacklevel: int) -> None:
        """Warn of what follows from a guess, for a caller so many calls up."""
        if not self.guessed:
            return
        warnings.warn(
            f"CoMHE takes layer {self.name!r} for the output layer, {self.reason}: its energy is "
            f"that of full space, unprojected, with weight {factor:g}. Say which it is "
            f"(output_layer={self.name!r}), or that there is none (output_layer=None)",
            stacklevel=stacklevel + 1,
        )


def find_output_layer(model: nn.Module, layers: Sequence[Layer]) -> OutputLayer:
    """Find which of `layers` the model ends in.

    The outermost module that has a method for it is asked (`get_output_embeddings` in Hugging
    Face's models, `get_classifier` in timm's). Where none has, the last layer of the whole model is
    taken by its position, if it is among `layers` and no module with parameters follows it.
    """
    answer = _ask(model)
    if answer is not None:
        question, head = answer
        for module in reversed(list(head.modules())):
            has_weight = isinstance(module, SUPPORTED_TYPES) or has_columns(module)
            if isinstance(module, nn.MultiheadAttention) or not has_weight:
                continue
            key = weights.identity(module, "weight")
            for layer in layers:
                # compared by weight, because only one of several tied layers is listed
                if weights.identity(layer.module, layer.attribute) == key:
                    whole = layer.size is None
                    return OutputLayer(layer.name if whole else None, f"by `{question}`")
            return OutputLayer(None, f"the head that `{question}` names is not regularized")
        return OutputLayer(None, f"`{question}` names no head")
    name, module = _last_with_parameters(model)
    for layer in layers:
        if layer.module is module and layer.name == name and isinstance(module, DEFAULT_TYPES):
            if _is_inside(model, name):
                return OutputLayer(None, "the model ends in the last layer of an encoder")
            return OutputLayer(name, "by position: it is the last layer of the model", True)
    return OutputLayer(None, "the last layer of the model is not among those regularized")


def _ask(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Ask the modules, from the outermost in, for the head, and by which method it was named."""
    for name, module in sorted(model.named_modules(), key=lambda x: x[0].count(".") + bool(x[0])):
        for question in ("get_output_embeddings", "get_classifier"):
            method = getattr(module, question, None)
            if not callable(method):
                continue
            try:
                head = method()
            except (NotImplementedError, AttributeError, TypeError):
                continue  # many models only inherit the method
            if isinstance(head, (tuple, list)):
                head = next((x for x in head if isinstance(x, nn.Module)), None)
            if isinstance(head, nn.Module):
                return f"{name}.{question}" if name else question, head
    return None


def _last_with_parameters(model: nn.Module) -> tuple[str, nn.Module]:
    """Find the module registered last that has parameters of its own, or computed ones."""
    last = ("", model)
    for name, module in model.named_modules():
        parts = name.split(".")
        if "parametrizations" in parts:
            continue
        if any(True for _ in module.parameters(recurse=False)) or hasattr(
            module, "parametrizations"
        ):
            last = (name, module)
    return last


def _is_inside(model: nn.Module, name: str) -> bool:
    """Tell whether a layer is inside attention or an encoder, whose last layer is hidden."""
    for parent, module in model.named_modules():
        if parent and not name.startswith(f"{parent}."):
            continue
        if isinstance(
            module, (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerDecoder)
        ):
            return True
        # Hugging Face: a model that is its own base model has no head
        has_base = getattr(type(module), "base_model_prefix", None) is not None
        if has_base and getattr(module, "base_model", None) is module:
            return True
    return False
