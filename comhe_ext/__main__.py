"""`python -m comhe_ext info`: what is installed, and which backends work here and why not."""

import argparse
import platform
from collections.abc import Iterator
from importlib import metadata

import torch

import comhe_ext
from comhe_ext import backends


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def info() -> Iterator[tuple[str, str]]:
    """The lines of the report that a bug report should carry, as (name, value)."""
    yield "comhe_ext", comhe_ext.__version__
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    yield "triton", _version("triton")
    yield "threads", str(torch.get_num_threads())
    if torch.cuda.is_available():
        yield "gpu", torch.cuda.get_device_name()
    for backend in backends.BACKENDS:
        reason = backends.unavailable(backend)
        yield f"backend {backend}", "available" if reason is None else f"not available: {reason}"
    if backends.unavailable("cpu") is None:
        from comhe_ext.kernels.cpu import binding

        yield "instruction set", binding.instruction_set()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m comhe_ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, backends and the instruction set in use")
    parser.parse_args()
    for name, value in info():
        print(f"{name + ':':<17} {value}")


if __name__ == "__main__":
    main()
