"""The tensors of a file that torch.save has written."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from comhe_ext.cli.checkpoint import Entry, Unreadable, reason_of

# under which training scripts keep the weights, beside optimizers and counters
STATES = ("state_dict", "model_state_dict", "model", "module", "net", "params", "weights")
NO_WEIGHTS = re.compile(r"optim|.*scheduler|.*scaler", re.IGNORECASE)
# what torch.load names of a pickle that it refuses
CAUSE = re.compile(r"GLOBAL ([\w.]+)")
# bytes read from a mapping until it is given up for a new one: its pages count as our memory
REMAP = 256 << 20


def entries(path: Path) -> list[Entry]:
    """List the tensors of a file."""
    return _TorchFile(path).entries()


class _TorchFile:
    """A file, mapped where its format allows, and mapped anew from time to time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mapped = zipfile.is_zipfile(path)
        with path.open("rb") as file:
            if file.read(2) == b"PK" and not self.mapped:
                raise Unreadable("truncated: this zip archive has no end")
        self.tensors = self._load()
        self.read_bytes = 0

    def entries(self) -> list[Entry]:
        found = []
        for name, x in self.tensors.items():
            dtype = str(x.dtype).removeprefix("torch.")
            if x.layout is not torch.strided:
                dtype = f"sparse {dtype}"
            size = x.numel() * x.element_size()
            found.append(Entry(name, tuple(x.shape), dtype, size, partial(self._read, name)))
        return found

    def _read(self, name: str) -> Tensor:
        if self.mapped and self.read_bytes > REMAP:
            self.tensors = {}  # before the new mapping, so that the old one is gone
            self.tensors, self.read_bytes = self._load(), 0
        tensor = self.tensors[name].detach()
        if tensor.is_meta:
            raise Unreadable("it was saved without its numbers")
        size = tensor.numel() * tensor.element_size()
        if size > tensor.untyped_storage().nbytes():
            raise Unreadable(f"{tensor.numel()} numbers share the memory of fewer")
        self.read_bytes += size
        return tensor

    def _load(self) -> dict[str, Tensor]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old formats
                content = torch.load(
                    self.path, map_location="cpu", weights_only=True, mmap=self.mapped
                )
        except pickle.UnpicklingError as error:
            found = CAUSE.search(str(error))
            what = f"more than weights, {found[1]}" if found else "more than weights, or is damaged"
            raise Unreadable(f"refused: it holds {what}") from error
        except Exception as error:  # whatever a damaged pickle can raise
            raise Unreadable(f"torch.load refuses it: {reason_of(error)}") from error
        return dict(_walk(_state_of(content)))


def _state_of(content: object) -> object:
    """Choose the weights of what a training script has saved."""
    if not isinstance(content, Mapping):
        return content
    for key in STATES:
        if isinstance(content.get(key), Mapping):
            return content[key]
    return {key: x for key, x in content.items() if not NO_WEIGHTS.match(str(key))}


def _walk(content: object) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested mappings and lists, with dotted names."""
    # a pickle may hold itself, and be deeper than Python's own stack
    stack, seen = [("", content)], set()
    while stack:
        name, value = stack.pop()
        if isinstance(value, Tensor):
            yield name or "tensor", value
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            inner = [(f"{name}.{key}" if name else str(key), x) for key, x in items]
            stack.extend(reversed(inner))
