"""`comhe-ext check`: the Triton kernels of this GPU against the truth."""

import argparse

import torch

from comhe_ext import check

HELP = "check the Triton kernels on a GPU"
DESCRIPTION = """Run the Triton kernels that most calls need on a GPU, each twice, compare with the
portable backend in float64, and keep the verdicts for backend=None. In a process of its own:
nothing that a kernel does to it matters to another. Exit code 1: a kernel has failed, or none can
run here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--device", default="cuda", help="which GPU (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="two kernels only")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Run the checks, and return 1 if one has failed."""
    if not options.in_this_process:
        return 0 if check.check(options.device, options.quick) else 1
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    check.run_checks(device, options.quick)
    return 0
