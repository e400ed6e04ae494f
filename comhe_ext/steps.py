"""What counts as a step of training, for a module that sees only calls.

A regularizer draws new matrices at each step. Each call in training mode with gradients enabled is
a step, with two exceptions: all calls inside one step of an optimizer that evaluates its closure
several times (LBFGS) are one, and a call that activation checkpointing repeats in the backward was
counted the first time.
"""

import ctypes
import itertools
import threading
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

_optimizer = threading.local()
_numbers = itertools.count(1)


def host_tensor(values: int | list[int]) -> Tensor:
    """Make whole numbers on the host, whatever the default device and mode are."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int64, device="cpu")


def set_number(tensor: Tensor, index: int, value: int) -> None:
    """Write a number into a `host_tensor`.

    This is no torch operator, because a regularizer may run inside functional transforms, which
    refuse to change a tensor from outside of them in place.
    """
    ctypes.c_int64.from_address(tensor.data_ptr() + 8 * index).value = value


def numbers_of(tensor: Tensor) -> list[int]:
    """Read a `host_tensor`; functional transforms of PyTorch before 2.9 refuse tolist(), too."""
    return list((ctypes.c_int64 * tensor.numel()).from_address(tensor.data_ptr()))


def loaded(state: Tensor) -> Tensor:
    """Copy a `host_tensor` out of a state_dict, which may lie on any device."""
    if state.is_meta:
        raise ValueError("the state was saved on the meta device and holds no numbers")
    return state.detach().to("cpu", torch.int64, copy=True)


@cache
def _watch_optimizers() -> None:
    """Keep track, from now on, of which thread is inside an optimizer's step."""

    def begin(*_: Any) -> None:
        _optimizer.step = next(_numbers)

    def end(*_: Any) -> None:
        _optimizer.step = None

    register_optimizer_step_pre_hook(begin)
    register_optimizer_step_post_hook(end)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


# PyTorch 2.6 does not tell which hooks are in force
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _under_checkpoint() -> bool:
    """Tell whether activation checkpointing will run this code again in the backward."""
    hooks = _top_hooks(True) if _top_hooks else None
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def unseen_by_checkpoint() -> AbstractContextManager[object]:
    """Hide saved tensors from a checkpoint, which counts them, where a repetition saves none."""
    if torch.compiler.is_compiling() or (_top_hooks and not _under_checkpoint()):
        return nullcontext()
    if torch._C._are_functorch_transforms_active():  # they refuse hooks, and checkpoints need some
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class StepCounter:
    """Decides which calls are steps."""

    def __init__(self) -> None:
        _watch_optimizers()
        self._counted = False  # whether any call was a step
        self._optimizer_step: int | None = None  # the last one that was counted
        self._shared = False  # the last step was under a checkpoint, to be repeated in its backward
        self._repeated = False  # that backward has begun
        self._looked = False  # a call without gradients came after the last step
        self._due = False  # that call was a step, as its backward repeated it with gradients

    def new_steps(self) -> int:
        """Count the steps that a call in training mode stands for: mostly 1, or 0."""
        if torch.compiler.is_compiling():
            return int(torch.is_grad_enabled())
        if _in_backward():
            # a reentrant checkpoint runs its forward without gradients: the step is counted late
            self._due |= self._looked
            self._repeated = True
            return 0
        if not torch.is_grad_enabled():
            due, self._due, self._looked = self._due, False, True
            first = not self._counted
            self._counted |= due
            return due * (1 + first)  # the very first step was not counted when it was made
        self._due = self._looked = False
        number = getattr(_optimizer, "step", None)
        if number is not None and number == self._optimizer_step:
            return 0
        self._optimizer_step = number
        under_checkpoint = _under_checkpoint()
        if under_checkpoint and self._shared and not self._repeated:
            # both calls will be repeated in a backward, which could not tell their steps apart
            return 0
        self._shared, self._repeated = under_checkpoint, False
        self._counted = True
        return 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "StepCounter":
        return StepCounter()

    def __reduce__(self) -> Any:
        return StepCounter, ()
