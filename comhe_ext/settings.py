"""From the keywords of an energy, checked, to the options that the operators take."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, TypedDict, TypeVar, cast

import torch
from torch import Tensor

from comhe_ext import backends
from comhe_ext.checks import (
    check_backend,
    check_factor,
    check_flag,
    check_number,
    check_reduction,
    quote,
)
from comhe_ext.kernels.pair_functions import PairFunction, Riesz
from comhe_ext.operators.library import compute_dtype
from comhe_ext.operators.sweep import SweepOptions

Reduction = Literal["mean", "sum"]
PairReduction = Literal["mean", "sum", "rows"]
BackendName = Literal["triton", "cpu", "torch"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Settings:
    """All arguments of an energy that are not tensors, as the user gave them."""

    pair: PairFunction
    reduction: str = "mean"
    eps: float = 0.0
    backend: str | None = None

    def in_full_space(self) -> "Settings":
        """Copy the settings, with a pair function in full space."""
        return replace(self, pair=replace(self.pair, half_space=False))

    def options(
        self, tensors: Sequence[Tensor], columns: int | None = None, needs: str = ""
    ) -> SweepOptions:
        """Make the options that the operators take; a backend asked for has to take `tensors`.

        Args:
            tensors: what the energy is computed from.
            columns: of the rows that are swept; None: those of the first tensor.
            needs: what the backend has to offer, see `kernels.sweep.Offers`.
        """
        first = tensors[0]
        columns = first.shape[-1] if columns is None else columns
        dtype = compute_dtype(*tensors)
        backend = backends.AUTO
        if self.backend is not None:
            backend = backends.choose(self.backend, self.pair, first.device, dtype, columns, needs)
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
    """Check the keywords that all energies share."""
    check = _checked if torch.compiler.is_compiling() else _checked_once
    try:
        return check(s, half_space, angular, reduction, eps, min_distance, backend)
    except TypeError:
        # an argument that cannot be hashed has the wrong type: the checks say which
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
    # by name: torch.compile of PyTorch 2.8 takes numbers by position for the flags of the base
    pair = Riesz(
        s=check_number("s", s),
        min_distance=check_number("min_distance", min_distance),
        half_space=check_flag("half_space", half_space),
        angular=check_flag("angular", angular),
    )
    return pair_settings(pair, reduction, eps, backend)


class EnergyOptions(TypedDict, total=False):
    """Those keywords of an energy that what is built on energies hands on without naming them.

    They mean what they mean to `comhe_ext.hyperspherical_energy`, but `pair`, which is a pair
    function in place of s, angular and min_distance. A keyword that is new there is added here, and
    in `energy_settings`.
    """

    pair: PairFunction | None
    angular: bool
    eps: float
    min_distance: float
    backend: BackendName | None


def mean_settings(s: float, half_space: bool, options: EnergyOptions) -> Settings:
    """Check the keywords of a mean energy, some of which were handed on as `options`."""
    for name in options:
        if name not in EnergyOptions.__annotations__:
            raise TypeError(f"got an unexpected keyword argument {name!r}")
    keywords: dict[str, Any] = dict(options)
    pair = keywords.pop("pair", None)
    if pair is None:
        return energy_settings(s, half_space, **keywords)
    given: list[str] = [name for name in ("angular", "min_distance") if name in keywords]
    given += ["s"] if s != Riesz.s else []
    if given:
        raise ValueError(f"`pair` takes the place of `{given[0]}`: give one of them")
    # the arguments that both have are checked by the one, the function itself by the other
    settings = energy_settings(Riesz.s, half_space, **keywords)
    settings = pair_settings(pair, settings.reduction, settings.eps, settings.backend)
    return replace(settings, pair=replace(pair, half_space=bool(half_space) or pair.half_space))


def take_energy_options(keywords: dict[str, Any]) -> EnergyOptions:
    """Take the `EnergyOptions` out of keywords that hold others, too."""
    names = EnergyOptions.__annotations__.keys() & keywords.keys()
    return cast(EnergyOptions, {name: keywords.pop(name) for name in names})


def lists_energy_options(function: F) -> F:
    """Name the `EnergyOptions` in the signature of a function that takes them as keywords.

    So `help` and `inspect.signature` show them; type checkers read `Unpack[EnergyOptions]`.
    """
    signature = inspect.signature(function)
    *named, rest = signature.parameters.values()
    options = inspect.signature(energy_settings).parameters
    listed = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=options[name].default if name in options else None,
            annotation=annotation,
        )
        for name, annotation in EnergyOptions.__annotations__.items()
    ]
    # `rest`, the keywords by which they come, may hold others, too
    others = [rest] if rest.name != "options" else []
    signature = signature.replace(parameters=[*named, *listed, *others])
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def pair_settings(
    pair: PairFunction,
    reduction: str,
    eps: float,
    backend: str | None,
    reductions: Sequence[str] = ("mean", "sum"),
) -> Settings:
    """Check the keywords of an energy whose pair function is given as an object."""
    if not isinstance(pair, PairFunction):
        raise TypeError(f"`pair` must be a pair function, as Riesz(2.0), got {quote(pair)}")
    check_reduction(reduction, reductions)
    if backend is not None:
        check_backend(backend)
    return Settings(pair, reduction, check_factor("eps", eps), backend)


# typed, because True equals 1 but is no number
_checked_once = lru_cache(maxsize=256, typed=True)(_checked)
