"""The checks of arguments, once: from what a user gives to what the operators take."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor

from comhe_ext import backends
from comhe_ext.kernels.pair_functions import PairFunction, Riesz
from comhe_ext.operators.library import DTYPES, compute_dtype
from comhe_ext.operators.sweep import SweepOptions

Reduction = Literal["mean", "sum"]
BackendName = Literal["triton", "cpu", "torch"]


@dataclass(frozen=True)
class Settings:
    """All of an energy that is not a tensor, as its user asked for it."""

    pair: PairFunction
    reduction: str = "mean"
    eps: float = 0.0
    backend: str | None = None

    def in_full_space(self) -> "Settings":
        """The same, whatever it says, in full space."""
        return replace(self, pair=replace(self.pair, half_space=False))

    def options(self, tensors: Sequence[Tensor], columns: int | None = None) -> SweepOptions:
        """The same for what is computed from `tensors`, with the backend chosen.

        columns: of the rows that are swept; those of the first tensor if None.
        """
        first = tensors[0]
        columns = first.shape[-1] if columns is None else columns
        dtype = compute_dtype(*tensors)
        backend = backends.choose(self.backend, self.pair, first.device, dtype, columns)
        if torch.compiler.is_compiling():
            return SweepOptions(self.pair, self.reduction, self.eps, backend)
        return _options(self, backend)


@lru_cache(maxsize=256)
def _options(settings: Settings, backend: str) -> SweepOptions:
    return SweepOptions(settings.pair, settings.reduction, settings.eps, backend)


def energy_settings(
    s: float = 2.0,
    half_space: bool = False,
    angular: bool = False,
    reduction: str = "mean",
    eps: float = 0.0,
    min_distance: float = 1e-3,
    backend: str | None = None,
) -> Settings:
    """The keywords that all energies share, checked."""
    check = _checked if torch.compiler.is_compiling() else _checked_once
    try:
        return check(s, half_space, angular, reduction, eps, min_distance, backend)
    except TypeError:
        # an argument that cannot be hashed: the check says what is wrong with it
        return _checked(s, half_space, angular, reduction, eps, min_distance, backend)


def _checked(
    s: float,
    half_space: bool,
    angular: bool,
    reduction: str,
    eps: float,
    min_distance: float,
    backend: str | None,
) -> Settings:
    pair = Riesz(
        check_number("s", s),
        check_number("min_distance", min_distance),
        half_space=check_flag("half_space", half_space),
        angular=check_flag("angular", angular),
    )
    return pair_settings(pair, reduction, eps, backend)


def pair_settings(pair: PairFunction, reduction: str, eps: float, backend: str | None) -> Settings:
    """The same for a pair function that is one already."""
    if not isinstance(pair, PairFunction):
        raise TypeError(f"`pair` must be a pair function, as Riesz(2.0), got {quote(pair)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"`reduction` must be 'mean' or 'sum', got {quote(reduction)}")
    if backend is not None and backend not in backends.BACKENDS:
        raise ValueError(
            f"`backend` must be one of {backends.BACKENDS} or None, got {quote(backend)}"
        )
    return Settings(pair, reduction, check_factor("eps", eps), backend)


# typed: True is no number, though it equals 1
_checked_once = lru_cache(maxsize=256, typed=True)(_checked)


def quote(value: object) -> str:
    """A wrong value as it was given if that is short, else its type: a tensor fills pages."""
    short = value is None or isinstance(value, (str, type, int, float))
    return repr(value) if short else type(value).__name__


def check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"`{name}` must be a plain tensor, got a DTensor, of which each rank holds a part: "
            f"pass {name}.full_tensor()"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"`{name}` must be a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"`{name}` must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
        )


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """Sets of rows, one or a batch of them."""
    check_tensor(name, weight)
    if weight.dim() not in (2, 3):
        raise ValueError(f"`{name}` must be 2-D or 3-D, got shape {tuple(weight.shape)}")
    if weight.shape[-1] == 0:
        raise ValueError(f"`{name}` must have at least one column, got shape {tuple(weight.shape)}")


def check_projection(weight: Tensor, projection: Tensor) -> None:
    check_tensor("projection", projection)
    if projection.dim() != 3:
        raise ValueError(f"`projection` must be 3-D [C, k, d], got shape {tuple(projection.shape)}")
    count, dim, features = projection.shape
    if count == 0 or dim == 0:
        raise ValueError(
            "`projection` must hold at least one matrix of at least one row, "
            f"got shape {tuple(projection.shape)}"
        )
    if features != weight.shape[-1]:
        raise ValueError(
            f"`projection` must have as many columns as `weight`, got {features} and "
            f"{weight.shape[-1]}"
        )
    if projection.device != weight.device:
        raise ValueError(
            f"`projection` must be on the device of `weight`, got {projection.device} and "
            f"{weight.device}"
        )


def check_count(name: str, value: int, least: int = 1) -> int:
    """A whole number of at least `least` (symbolic under torch.compile), NumPy's too."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
        raise TypeError(f"`{name}` must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}")
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)


def check_number(name: str, value: float) -> float:
    """A real number, NumPy's too; a tensor is none, for no gradient would reach it."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}")
    return float(value)


def check_flag(name: str, value: bool) -> bool:
    """True or False, NumPy's too, which are known by name: NumPy may not be there."""
    kind = type(value)
    if kind is not bool and (kind.__module__, kind.__name__) not in _NUMPY_BOOLS:
        raise TypeError(f"`{name}` must be a bool, got {kind.__name__}")
    return bool(value)


_NUMPY_BOOLS = (("numpy", "bool"), ("numpy", "bool_"))


def check_factor(name: str, value: float) -> float:
    """A finite number of at least 0."""
    value = check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be finite and at least 0, got {value}")
    return value
