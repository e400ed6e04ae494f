"""The tensors of a safetensors file.

The format: 8 bytes with the length of a header, the header, {name: {dtype, shape, data_offsets}} in
JSON, and the numbers of the tensors. Read here without the package safetensors, which refuses a
file as a whole for one bad tensor.

Source: https://huggingface.co/docs/safetensors
"""

import math
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from comhe_ext.cli.checkpoint import MOST_JSON, Entry, Unreadable, natural, read_json

# {name in the file: (PyTorch's, bits)}
DTYPES = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "F4": ("float4_e2m1fn", 4),
    "C64": ("complex64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "I8": ("int8", 8),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
}


def entries(path: Path, unreadable: list[tuple[str, str]]) -> list[Entry]:
    """List the tensors of a file; add to `unreadable` those that it does not have whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise Unreadable(f"truncated: {size} bytes do not hold the header")
        if length > MOST_JSON:
            raise Unreadable(f"its header is said to have {length} bytes, more than any has")
        header = read_json(file.read(length))
    if not isinstance(header, Mapping):
        raise Unreadable("its header is no JSON object")
    found = []
    for name, spec in header.items():
        if name == "__metadata__":
            continue
        try:
            found.append(_entry(path, name, spec, 8 + length, size))
        except Unreadable as error:
            unreadable.append((name, str(error)))
    return sorted(found, key=lambda entry: natural(entry.name))


def _entry(path: Path, name: str, spec: object, start: int, end: int) -> Entry:
    """Check what the header says of a tensor, whose numbers lie somewhere from start to end."""
    if not isinstance(spec, Mapping):
        raise Unreadable("its entry in the header is no JSON object")
    code, shape, offsets = (spec.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str):
        raise Unreadable(f"its dtype is {code!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise Unreadable(f"its shape is {shape!r} and its place {offsets!r}")
    first, last = (start + offset for offset in offsets)
    if not first <= last:
        raise Unreadable(f"its place is {offsets!r}")
    if last > end:
        raise Unreadable(f"truncated: its numbers end {last - end} bytes behind the file")
    dtype, bits = DTYPES.get(code, (code, None))
    if bits is not None and math.prod(shape) * bits != 8 * (last - first):
        raise Unreadable(f"{last - first} bytes are not {dtype} of shape {tuple(shape)}")
    return Entry(name, tuple(shape), dtype, last - first, _reader(path, dtype, shape, first, last))


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)


def _reader(
    path: Path, dtype: str, shape: list[int], first: int, last: int
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        element: torch.dtype = getattr(torch, dtype)
        before = first % mmap.ALLOCATIONGRANULARITY
        try:
            with path.open("rb") as file:
                # private: PyTorch wants memory that could be written; nothing writes it
                memory = mmap.mmap(
                    file.fileno(),
                    before + last - first,
                    access=mmap.ACCESS_COPY,
                    offset=first - before,
                )
        except (OSError, ValueError) as error:
            raise Unreadable(str(error)) from error
        flat = torch.frombuffer(memory, dtype=element, count=math.prod(shape), offset=before)
        if first % element.itemsize:
            flat = flat.clone()  # kernels count on numbers at multiples of their size
        return flat.view(shape)

    return read
