"""`comhe-ext info`: what is installed here, and what works."""

import argparse
import platform
from collections.abc import Iterator
from importlib import metadata

import torch

import comhe_ext
from comhe_ext import backends

HELP = "print versions, backends and the instruction set in use"
DESCRIPTION = """Print what a report of a bug should carry: versions, the device, which backends
work here and why others do not, and the instruction set of the compiled kernel."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take no options."""


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    for name, value in info():
        print(f"{name + ':':<17} {value}")
    return 0


def info() -> Iterator[tuple[str, str]]:
    """Give the lines of the report, as (name, value)."""
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


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
