"""Random numbers that are a function of a seed and of the step of training."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from comhe_ext.operators.library import LIBRARY, define
from comhe_ext.steps import numbers_of, set_number


def refuse_capture_of_draws(device: torch.device) -> None:
    """Say why a CUDA graph cannot hold random draws."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "random numbers cannot be drawn while a CUDA graph is captured, which would repeat "
            "one draw for ever: call the regularizer outside of the graph"
        )


@define(
    "gaussian(Tensor state, int every, int stream, SymInt[] shape, ScalarType dtype, Device device)"
    " -> Tensor"
)
def _gaussian(
    state: Tensor,
    every: int,
    stream: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Draw the normal numbers of step state[1] and seed state[0], new ones every `every` steps."""
    if device.type == "meta":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    refuse_capture_of_draws(device)
    seed, steps, _ = numbers_of(state)
    generator = Generator(device).manual_seed(seed_of(seed, max(steps - 1, 0) // every, stream))
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=device)


def seed_of(*numbers: int) -> int:
    """Mix whole numbers into the seed of a generator.

    By the function with which the SplitMix64 generator scatters a counter, for numbers of few
    different bits give seeds that have nothing in common then, in whichever place they stand.

    Source: Steele, Lea and Flood (2014), Fast Splittable Pseudorandom Number Generators.
    """
    seed = 0
    for number in numbers:
        seed = (seed + number + 0x9E3779B97F4A7C15) % 2**64
        seed = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        seed = (seed ^ (seed >> 27)) * 0x94D049BB133111EB % 2**64
        seed ^= seed >> 31
    return seed


@define("permutations(Tensor step, int stream, SymInt sets, SymInt n, Device device) -> Tensor")
def _permutations(step: Tensor, stream: int, sets: int, n: int, device: torch.device) -> Tensor:
    """Draw a uniform permutation of n rows for each of the sets, a function of step and stream."""
    if device.type == "meta":
        return torch.empty(sets, n, dtype=torch.int64, device=device)
    refuse_capture_of_draws(device)
    # all ranks count the same steps: they need no common seed
    generator = Generator(device).manual_seed(seed_of(numbers_of(step)[0], stream))
    drawn = [torch.randperm(n, generator=generator, device=device) for _ in range(sets)]
    return torch.stack(drawn)


@torch.library.register_fake("comhe_ext::permutations", lib=LIBRARY)
def _(step: Tensor, stream: int, sets: int, n: int, device: torch.device) -> Tensor:
    return torch.empty(sets, n, dtype=torch.int64, device=device)


@torch.library.register_fake("comhe_ext::gaussian", lib=LIBRARY)
def _(
    state: Tensor,
    every: int,
    stream: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@define("advance(Tensor(a!) state) -> ()")
def advance(state: Tensor) -> None:
    """Count a step; before the first one, agree on a seed with the other ranks."""
    seed, steps, is_common = numbers_of(state)
    if not is_common:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            seeds = [seed]
            torch.distributed.broadcast_object_list(seeds)
            set_number(state, 0, seeds[0])
        set_number(state, 2, 1)
    set_number(state, 1, steps + 1)


@torch.library.register_fake("comhe_ext::advance", lib=LIBRARY)
def _(state: Tensor) -> None:
    pass
