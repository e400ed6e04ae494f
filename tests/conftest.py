"""Fixtures: a fixed seed, the backends that work here, and uninitialized memory made visible."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from comhe_ext import backends
from comhe_ext.kernels.cpu import binding

# for `bench` and `tools`; last, so that the package that is tested stays the installed one
sys.path.append(str(Path(__file__).parents[1]))

BACKENDS = [name for name in ("torch", "cpu") if backends.unavailable(name) is None]
if torch.cuda.is_available() and backends.unavailable("triton") is None:
    BACKENDS.append("triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # the longest first, so that no process is left alone with them at the end
    items.sort(key=lambda item: "test_triton" not in item.nodeid)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=binding.instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiled kernel take each instruction set of this processor."""
    monkeypatch.setenv("COMHE_CPU_ISA", request.param)


@pytest.fixture
def device(backend: str) -> str:
    """Where the tensors of a test that takes `backend` have to live."""
    return "cuda" if backend == "triton" else "cpu"


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the package asks for uninitialized comes full of NaN, or of the largest integer.

    A result that is not written to its last element then shows it.
    """

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.partition(".")[0] == "comhe_ext":
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
                elif tensor.dtype != torch.bool:
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return poisoned

    # torch lists the functions that follow a default device once: not while some are replaced
    with torch.device("cpu"):
        torch.empty(0)
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
