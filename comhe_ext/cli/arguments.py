"""Kinds of arguments of the command line that are checked before any work."""

import argparse

import torch


def device(text: str) -> torch.device:
    """Read a device that this machine has."""
    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(str(error).partition("\n")[0]) from None
    return found


def count(text: str) -> int:
    """Read a positive number."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return number
