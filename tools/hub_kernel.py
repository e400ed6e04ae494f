"""Writes the package as a kernel of the Hugging Face Hub: `make hub-kernel`.

    python -m tools.hub_kernel [FOLDER]

The folder, build/hub-kernel if none is given, holds the sources as kernel-builder takes them
(build.toml, flake.nix, torch-ext/) and, in build/, what `kernels.get_local_kernel` loads from it.
Such a kernel is imported under a name of its own, beside other versions of itself: so all imports
become relative, and its operators go to a namespace that is derived from the sources.

    torch-cuda, torch-rocm   Triton and plain torch, wherever they run
    torch-cpu                plain torch
    torch-stable-abi26-cpu-* the compiled CPU kernel, where this checkout has built it: it needs
                             nothing of torch's ABI
"""

import base64
import hashlib
import json
import platform
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME = "comhe_ext"
LIBRARY = ROOT / "kernels/cpu/_pairwise.so"
# commands, other people's training loops, and what tests and benchmarks use
LEFT_OUT = ("__main__.py", "check.py", "cli", "integrations", "testing")
CUDA = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
ROCM = ("gfx90a", "gfx942", "gfx950")

BUILD = """[general]
name = "comhe-ext"
version = 0
edition = 5
license = "MIT"
backends = ["cpu", "cuda", "rocm"]

[torch-noarch]
"""
FLAKE = """{
  description = "Exact hyperspherical energy and its gradient";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
# kernel-builder writes the same into what it builds
OPS = '''"""The namespace of the operators of this build."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    """Name an operator of this build in full."""
    return f"{id}::{{op_name}}"
'''
# for versions of `kernels` that look for a folder of the kernel's name
ALIAS = '''"""The package one folder further up, under the name that older loaders look for."""

import importlib.util
import sys
from pathlib import Path

_name = "{id}"
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).parents[1] / "__init__.py")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
globals().update(vars(sys.modules[_name]))
'''


def portable(source: str, depth: int) -> str:
    """Rewrite a module, so many folders deep, to run under any name, beside others of its kind."""
    up = "." * (depth + 1)
    source = re.sub(rf"^(\s*)from {NAME}\.", rf"\1from {up}", source, flags=re.MULTILINE)
    source = re.sub(
        rf"^(\s*)from {NAME} import", rf"\1from {up} import", source, flags=re.MULTILINE
    )
    source = re.sub(
        rf"^(\s*)import {NAME}$", rf"\1from {up} import __version__", source, flags=re.MULTILINE
    )
    source = source.replace(f"{NAME}.__version__", "__version__")
    source = re.sub(rf'"{NAME}\.(kernels[\w.]*)"', r'f"{__package__}.\1"', source)
    own = source.replace(f"torch.ops.{NAME}", "ops")
    own = re.sub(rf'f"{NAME}::{{(\w+)}}"', r"add_op_namespace_prefix(\1)", own)
    own = re.sub(rf'"{NAME}::(\w+)"', r'add_op_namespace_prefix("\1")', own)
    own = own.replace(
        f'Library("{NAME}", "DEF")', 'Library(add_op_namespace_prefix("").rstrip(":"), "DEF")'
    )
    begin = re.search(r"^(?:from|import) ", own, flags=re.MULTILINE)
    if own == source or begin is None:
        return source
    names = [name for name in ("add_op_namespace_prefix", "ops") if re.search(rf"\b{name}\b", own)]
    line = f"from {up}_ops import {', '.join(names)}\n"
    return own[: begin.start()] + line + own[begin.start() :]


def sources() -> dict[str, str]:
    """Return {path in the package: text} of all modules of the kernel."""
    found = {}
    for folder, inside in ((ROOT / NAME, Path()), (ROOT / "kernels", Path("kernels"))):
        for path in sorted(folder.rglob("*.py")):
            place = inside / path.relative_to(folder)
            # comhe_ext/kernels is a link of an editable installation, to what comes after
            if place.parts[0] in LEFT_OUT or (not inside.parts and place.parts[0] == "kernels"):
                continue
            found[place.as_posix()] = portable(path.read_text(), len(place.parts) - 1)
    return found


def write(folder: Path, files: dict[str, str]) -> None:
    """Write texts to their paths in a folder."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def write_variant(folder: Path, files: dict[str, str], backend: dict[str, object]) -> None:
    """Write what a loader takes: the modules, their namespace and the metadata with digests."""
    digest = hashlib.sha256(json.dumps([folder.name, files]).encode()).hexdigest()[:10]
    name = f"_{NAME}_{backend['type']}_{digest}"
    write(folder, files)
    write(folder, {"_ops.py": OPS.format(id=name), f"{NAME}/__init__.py": ALIAS.format(id=name)})
    digests = {
        path.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    metadata = {
        "name": "comhe-ext",
        "id": name,
        "version": 0,
        "license": "MIT",
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def export(folder: Path) -> None:
    """Write the whole kernel into a folder, which is emptied before."""
    shutil.rmtree(folder, ignore_errors=True)
    files = sources()
    card = (ROOT / "README.md").read_text()
    write(folder, {"build.toml": BUILD, "flake.nix": FLAKE, "CARD.md": card})
    write(folder / "torch-ext" / NAME, files)
    built = folder / "build"
    write_variant(built / "torch-cuda", files, {"type": "cuda", "archs": list(CUDA)})
    write_variant(built / "torch-rocm", files, {"type": "rocm", "archs": list(ROCM)})
    write_variant(built / "torch-cpu", files, {"type": "cpu"})
    if LIBRARY.exists():
        system = f"{platform.machine()}-{platform.system().lower()}".replace("arm64", "aarch64")
        variant = built / f"torch-stable-abi26-cpu-{system}"
        (variant / "kernels/cpu").mkdir(parents=True)
        shutil.copy(LIBRARY, variant / "kernels/cpu")
        write_variant(variant, files, {"type": "cpu"})


if __name__ == "__main__":
    export(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build/hub-kernel")
