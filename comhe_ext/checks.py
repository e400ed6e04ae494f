"""The checks of arguments: each refuses what a user got wrong before any kernel runs.

TypeError for kinds, ValueError for shapes and ranges. What is a number or a flag comes back as
Python's own, where NumPy's is taken, too.
"""

import math
import operator
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from comhe_ext.backends import BACKENDS
from comhe_ext.operators.library import DTYPES

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def quote(value: object) -> str:
    """Show a wrong value as it was given if that is short, else its type: a tensor fills pages."""
    short = value is None or isinstance(value, (str, type, int, float))
    return repr(value) if short else type(value).__name__


def check_reduction(reduction: str, known: Sequence[str] = ("mean", "sum")) -> None:
    """Refuse any reduction but the `known` ones."""
    if reduction not in known:
        names = " or ".join(map(repr, known))
        raise ValueError(f"`reduction` must be {names}, got {quote(reduction)}")


def check_backend(name: str) -> None:
    """Refuse what is not the name of a backend; `backends.choose` finds out if it works here."""
    if name not in BACKENDS:
        raise ValueError(f"`backend` must be one of {BACKENDS} or None, got {quote(name)}")


def is_dtensor(tensor: object) -> "TypeIs[DTensor]":
    """Tell whether it is a tensor of which each rank holds a part."""
    if not torch.distributed.is_available():
        return False
    # a trace finds no attributes of a DTensor
    if not torch.compiler.is_compiling() and not hasattr(tensor, "full_tensor"):
        return False
    from torch.distributed.tensor import DTensor  # its import takes long, and few need it

    return isinstance(tensor, DTensor)


def check_tensor(name: str, tensor: Tensor, *, sharded: bool = False) -> None:
    """Refuse what is not a dense floating-point tensor, in one place unless `sharded`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "full_tensor") and not (sharded and is_dtensor(tensor)):
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


def check_weight(weight: Tensor, name: str = "weight", *, sharded: bool = False) -> None:
    """Refuse what is not a set of rows [N, d] or a batch of sets [B, N, d]."""
    check_tensor(name, weight, sharded=sharded)
    if weight.dim() not in (2, 3):
        raise ValueError(f"`{name}` must be 2-D or 3-D, got shape {tuple(weight.shape)}")
    if weight.shape[-1] == 0:
        raise ValueError(f"`{name}` must have at least one column, got shape {tuple(weight.shape)}")


def check_pairing(
    rows: Tensor, columns: Tensor | None, row_ids: Tensor | None, column_ids: Tensor | None
) -> None:
    """Refuse columns that `rows` cannot meet, and ids that do not belong to them."""
    if columns is None:
        if row_ids is not None or column_ids is not None:
            raise ValueError("`row_ids` and `column_ids` need `columns`, which may be the rows")
        return
    check_weight(columns, "columns")
    if columns.shape[:-2] != rows.shape[:-2] or columns.shape[-1] != rows.shape[-1]:
        raise ValueError(
            "`columns` must have as many sets and as wide rows as `rows`, got "
            f"{tuple(columns.shape)} and {tuple(rows.shape)}"
        )
    if columns.device != rows.device:
        raise ValueError(
            f"`columns` must be on the device of `rows`, got {columns.device} and {rows.device}"
        )
    if (row_ids is None) != (column_ids is None):
        raise ValueError("`row_ids` and `column_ids` must be given together")
    for name, ids, points in (("row_ids", row_ids, rows), ("column_ids", column_ids, columns)):
        if ids is None:
            continue
        if not isinstance(ids, Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor, got {type(ids).__name__}")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"`{name}` must be integers, got {ids.dtype}")
        shapes = (tuple(points.shape[-2:-1]), tuple(points.shape[:-1]))
        if tuple(ids.shape) not in shapes:
            expected = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
            raise ValueError(f"`{name}` must have shape {expected}, got {tuple(ids.shape)}")
        if ids.device != points.device:
            raise ValueError(
                f"`{name}` must be on the device of the rows, got {ids.device} and {points.device}"
            )


def check_projection(weight: Tensor, projection: Tensor) -> None:
    """Refuse what is not a stack of matrices [C, k, d] that can project `weight`."""
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
    """Return a whole number of at least `least`, NumPy's too; symbolic under torch.compile."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
        raise TypeError(f"`{name}` must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}")
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)


def check_number(name: str, value: float) -> float:
    """Return a real number, NumPy's too. A tensor is refused, as no gradient would reach it."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}")
    return float(value)


def check_flag(name: str, value: bool) -> bool:
    """Return True or False, NumPy's too, known by their names: NumPy may not be installed."""
    kind = type(value)
    if kind is not bool and (kind.__module__, kind.__name__) not in _NUMPY_BOOLS:
        raise TypeError(f"`{name}` must be a bool, got {kind.__name__}")
    return bool(value)


_NUMPY_BOOLS = (("numpy", "bool"), ("numpy", "bool_"))


def check_factor(name: str, value: float) -> float:
    """Return a finite number of at least 0."""
    value = check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be finite and at least 0, got {value}")
    return value
