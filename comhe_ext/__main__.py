"""The command comhe-ext, also `python -m comhe_ext`.

info     what is installed, and which backends work here and why not
check    run the Triton kernels on this GPU against the truth
"""

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
    """Give the lines of the report that a bug report should carry, as (name, value)."""
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
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="comhe-ext",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, backends and the instruction set in use")
    checks = commands.add_parser(
        "check",
        help="check the Triton kernels on a GPU",
        description="Run the Triton kernels that most calls need on a GPU, each twice, compare "
        "with the portable backend in float64, and keep the verdicts for backend=None. In a "
        "process of its own: nothing that a kernel does to it matters to another.",
    )
    checks.add_argument("--device", default="cuda", help="which GPU (default: cuda)")
    checks.add_argument("--quick", action="store_true", help="two kernels only")
    checks.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.command == "info":
        for name, value in info():
            print(f"{name + ':':<17} {value}")
        return
    from comhe_ext import check

    if options.in_this_process:
        device = torch.device(options.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        check.run_checks(device, options.quick)
    elif not check.check(options.device, options.quick):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
