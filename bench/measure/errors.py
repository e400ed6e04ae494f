"""How far results are off, and what is too far."""

import math

from torch import Tensor

from bench.measure.store import Row
from bench.measure.worker import Result
from comhe_ext import testing

# far above the rounding of any float32 formula on random rows, far below a wrong factor or a
# missing term
VALUE_BOUND = 1e-5
GRADIENT_BOUND = 2e-3


def error(found: Tensor, exact: Tensor) -> float:
    """Compute the relative error in the L2 norm; infinite where something is not finite."""
    off = testing.relative_error(found, exact)
    return off if math.isfinite(off) else math.inf


def errors(found: Result, exact: Result) -> Row:
    """Make the columns of the errors of a value, and of its derivative where there is one."""
    names = ("value_error", "gradient_error")
    pairs = zip(names, found, exact, strict=True)
    return {name: error(a, b) for name, a, b in pairs if a is not None and b is not None}


def judged(row: Row) -> Row:
    """Say of errors that are too large that the result is wrong."""
    for name, bound in (("value", VALUE_BOUND), ("gradient", GRADIENT_BOUND)):
        if (off := row.get(f"{name}_error", 0.0)) > bound:
            return {**row, "status": "wrong", "note": f"{name} off by {off:.1e}, not {bound:.0e}"}
    return row
