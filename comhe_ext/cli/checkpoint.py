"""The tensors of a checkpoint, one at a time, whatever the file holds.

    safetensors         read here: a file that was cut off still gives the tensors before the cut
    .pt .pth .bin .ckpt torch.load with weights_only=True, which runs no code of the file
    *.index.json        the shards of either kind
    a folder            the index in it, or else each of its files

Files are mapped into memory, and a mapping is given up with its tensor or after some tensors: what
is held at a time is one tensor, not the checkpoint.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

SAFETENSORS = (".safetensors",)
TORCH = (".pt", ".pth", ".bin", ".ckpt")
INDEX = ".index.json"
# what trainers save beside the weights
NO_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args).*")
SHARD = re.compile(r"(.*)-\d+-of-\d+(\.\w+)")
MOST_JSON = 100 << 20  # bytes; the reader of safetensors has the same limit


class Unreadable(Exception):
    """A file, or a tensor of it, that cannot be read, or is refused."""


@dataclass(frozen=True)
class Entry:
    """A tensor that a checkpoint says it has."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as PyTorch names it, where it has it
    size: int  # bytes
    read: Callable[[], Tensor]  # raises Unreadable


@dataclass
class Checkpoint:
    """The entries of a checkpoint, and what of it is no layer, or cannot be read: (what, why)."""

    path: Path
    entries: list[Entry] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    vectors: int = 0

    def add(self, path: Path) -> None:
        """Add the entries of a file."""
        try:
            self.entries += entries_of(path, self.unreadable)
        except (Unreadable, OSError) as error:
            self.unreadable.append((path.name, reason_of(error)))


def find_checkpoints(path: Path) -> list[Checkpoint]:
    """Open the checkpoint at a path, or those in a folder, or else in the folders in it."""
    if not path.is_dir():
        return [_open(path, [path])]
    folders = [path]
    if not _files_of(path):
        folders = sorted((x for x in path.iterdir() if x.is_dir()), key=lambda x: natural(x.name))
    found = [_open(*item) for folder in folders for item in _files_of(folder).items()]
    if found:
        return found
    return [Checkpoint(path, unreadable=[(path.name, "there is no checkpoint in this folder")])]


def entries_of(path: Path, unreadable: list[tuple[str, str]]) -> list[Entry]:
    """List the tensors of a file, and add to `unreadable` those that it does not have whole."""
    # these import much, and a reader of one kind of file does not need the other
    if path.suffix in SAFETENSORS:
        from comhe_ext.cli import safetensors_file

        return safetensors_file.entries(path, unreadable)
    if path.suffix in TORCH:
        from comhe_ext.cli import torch_file

        return torch_file.entries(path)
    kinds = ", ".join((*SAFETENSORS, *TORCH, INDEX))
    raise Unreadable(f"files of this kind are not known, but {kinds}")


def read_json(text: bytes) -> Any:
    """Read JSON of a file that nobody vouches for."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"this is no JSON: {error}") from error


def reason_of(error: BaseException) -> str:
    """Say in one line what an error was."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def natural(name: str) -> list[tuple[int, str]]:
    """Make a key that sorts layer 10 behind layer 9."""
    # numbers of very many digits are compared as text: Python refuses to read them
    return [
        (int(x), "") if x.isdecimal() and len(x) < 20 else (-1, x) for x in re.split(r"(\d+)", name)
    ]


def _open(path: Path, files: list[Path]) -> Checkpoint:
    checkpoint = Checkpoint(path)
    for file in files:
        if file.name.endswith(INDEX):
            _add_shards(checkpoint, file)
        else:
            checkpoint.add(file)
    return checkpoint


def _files_of(folder: Path) -> dict[Path, list[Path]]:
    """Group the files of a folder to checkpoints: {path that names it: its files}."""
    files = [x for x in sorted(folder.iterdir(), key=lambda x: natural(x.name)) if x.is_file()]
    for suffix in (f"safetensors{INDEX}", INDEX):
        if indices := [x for x in files if x.name.endswith(suffix)]:
            return {x: [x] for x in indices}
    # of the same weights in both formats the safetensors are enough
    both = any(x.suffix in SAFETENSORS for x in files)
    groups: dict[Path, list[Path]] = {}
    for file in files:
        if file.suffix not in (*SAFETENSORS, *TORCH) or NO_WEIGHTS.fullmatch(file.name):
            continue
        if both and file.name.startswith("pytorch_model"):
            continue
        shard = SHARD.fullmatch(file.name)
        name = file if shard is None else folder / (shard[1] + shard[2])
        groups.setdefault(name, []).append(file)
    return groups


def _add_shards(checkpoint: Checkpoint, index: Path) -> None:
    """Add the entries of the files that an index names."""
    try:
        if index.stat().st_size > MOST_JSON:
            raise Unreadable("this index is larger than any is")
        content = read_json(index.read_bytes())
        placed = content.get("weight_map") if isinstance(content, Mapping) else None
        if not isinstance(placed, Mapping):
            raise Unreadable("this index has no weight_map")
    except (Unreadable, OSError) as error:
        checkpoint.unreadable.append((index.name, reason_of(error)))
        return
    shards: dict[str, set[str]] = {}
    for name, file in placed.items():
        # an index must not lead out of its folder
        if not isinstance(file, str) or Path(file).name != file:
            checkpoint.unreadable.append((name, f"the index puts it into {file!r}, no file here"))
        else:
            shards.setdefault(file, set()).add(name)
    for file, names in shards.items():
        shard = Checkpoint(index.parent / file)
        shard.add(shard.path)
        checkpoint.unreadable += shard.unreadable
        checkpoint.entries += [entry for entry in shard.entries if entry.name in names]
        known = {entry.name for entry in shard.entries} | {what for what, _ in shard.unreadable}
        if file not in known:  # else the whole file cannot be read
            missing = sorted(names - known)
            checkpoint.unreadable += [(name, f"{file} does not have it") for name in missing]
