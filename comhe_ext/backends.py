"""Which backend computes a sweep here, and why not another."""

import importlib
import os
import sys
import threading
import warnings
from typing import cast

import torch

from comhe_ext.kernels.pair_functions import PairFunction
from comhe_ext.kernels.sweep import Backend

BACKENDS = ("triton", "cpu", "torch")
# what operators are told where nobody asked for a backend: they choose in their body, which has
# real tensors, and tracing never sees the choice
AUTO = "auto"
_MODULES = {
    "triton": "comhe_ext.kernels.gpu",
    "cpu": "comhe_ext.kernels.cpu.binding",
    "torch": "comhe_ext.kernels.portable",
}
# what a backend may lack, by its name in `Offers`
_KERNELS = {
    "cross": "kernel for rows against columns",
    "nearest": "kernel for the nearest rows",
    "distance": "kernel for distances of rows",
    "angle_difference": "kernel for differences of angles",
}
# torch calls ROCm devices "cuda" too
_DEVICE_OF = {"triton": "cuda", "cpu": "cpu"}
_BEST_ON = {device: name for name, device in _DEVICE_OF.items()}

_loaded: dict[str, Backend] = {}


def load(name: str) -> Backend:
    """Return the module of a backend, imported at first use: importing us never needs Triton."""
    if name not in _loaded:
        _loaded[name] = cast(Backend, importlib.import_module(_MODULES[name]))
    return _loaded[name]


def unavailable(name: str) -> str | None:
    """Why a backend cannot be used here, and the remedy; None if it can."""
    try:
        module = load(name)
    except ImportError as error:
        return f"backend {name!r} is not part of this installation ({error}): use backend='torch'"
    return module.unavailable()


_untold = threading.Lock()  # taken by the one thread that warns, and never given back


def _tell_what_is_missing(name: str) -> None:
    """Warn once a process where it could have a compiled kernel, which its build left out quietly.

    pip hides what a build prints, so a compiler that fails would go unnoticed.
    """
    if sys.platform in ("linux", "darwin") and _untold.acquire(blocking=False):
        warnings.warn(
            f"{unavailable(name)}. Until then backend 'torch' does its work, several times slower "
            "(backend='torch' asks for it without this warning). The kernel needs g++ or "
            "clang++; `pip install -v` shows what the compiler says",
            stacklevel=3,
        )


# a constant to torch.compile: tracing must not follow the search for libraries and GPUs. This is
# all that torch.compiler.assume_constant_result does, but that imports Dynamo and with it Triton
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def asked_by_environment() -> str | None:
    """Read which backend COMHE_BACKEND names: for backend=None, where it takes the tensors."""
    name = os.environ.get("COMHE_BACKEND")
    if name and name not in BACKENDS:
        raise ValueError(f"COMHE_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name or None


def choose(
    name: str | None,
    pair: PairFunction | None,
    device: torch.device,
    dtype: torch.dtype,
    columns: int = 1,
    needs: str = "",
) -> str:
    """Choose the backend: the one asked for, which must work here, or the best that does.

    `name` is one of BACKENDS, see `checks.check_backend`, or None. `needs` is what the backend has
    to offer, see `kernels.sweep.Offers`.
    """
    if name is None:
        asked = asked_by_environment()
        best = _BEST_ON.get(device.type, "torch")
        if asked == "torch" or best == "torch":
            check_float64(device)
            return "torch"
        reason = unavailable(best)
        if reason is not None and asked == best:
            raise RuntimeError(f"COMHE_BACKEND={asked}, but {reason}")
        # only a backend that is there can be asked what it takes: Triton may be missing
        if reason is None:
            return best if misfit(best, pair, dtype, columns, needs) is None else "torch"
        if best == "cpu" and misfit(best, pair, dtype, columns, needs) is None:
            _tell_what_is_missing(best)
        return "torch"
    if name == "torch":
        check_float64(device)
        return name
    if (reason := unavailable(name)) is not None:
        raise RuntimeError(reason)
    if _DEVICE_OF[name] != device.type:
        raise ValueError(
            f"backend {name!r} needs tensors on {_DEVICE_OF[name]}, got {device}: "
            "use backend='torch'"
        )
    if (error := misfit(name, pair, dtype, columns, needs)) is not None:
        raise error
    return name


def check_float64(device: torch.device) -> None:
    """Refuse a device that lacks what the portable tiles compute close pairs in."""
    if device.type == "mps" or (
        device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64
    ):
        raise ValueError(
            f"device {device} has no float64, in which close pairs are computed: move the tensors "
            "to the CPU"
        )


def misfit(
    name: str, pair: PairFunction | None, dtype: torch.dtype, columns: int, needs: str = ""
) -> Exception | None:
    """Why a backend cannot take a pair function, a dtype or so many columns; None if it can."""
    if name == "torch":
        return None
    backend = load(name)
    if dtype == torch.float64 and not backend.OFFERS.float64:
        return TypeError(f"backend {name!r} computes in float32, got float64: use backend='torch'")
    if columns > backend.OFFERS.max_columns:
        return ValueError(
            f"backend {name!r} takes at most {backend.OFFERS.max_columns} columns, got {columns}: "
            "use backend='torch'"
        )
    if needs and not getattr(backend.OFFERS, needs):
        return ValueError(f"backend {name!r} has no {_KERNELS[needs]}: use backend='torch'")
    if pair is not None and not backend.supports(pair):
        return ValueError(f"backend {name!r} does not know {pair}: use backend='torch'")
    return None
