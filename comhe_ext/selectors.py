"""Types and glob patterns by which layers are chosen."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from comhe_ext.checks import quote

Selector: TypeAlias = str | type[nn.Module]
# a number of equal parts, or the rows of each part
Split: TypeAlias = int | Sequence[int]


def check_pattern(pattern: str, names: Sequence[str]) -> None:
    """Raise if the pattern fits none of the names."""
    if not any(fnmatchcase(name, pattern) for name in names):
        raise ValueError(f"pattern {pattern!r} matches no layer; the layers are {list(names)}")


def as_selectors(argument: str, given: object) -> tuple[Selector, ...]:
    """Return a selector, or several, as a tuple."""
    if isinstance(given, (str, type)):
        given = (given,)
    if not isinstance(given, Iterable):
        raise TypeError(f"`{argument}` must hold patterns or module types, got {quote(given)}")
    selectors = tuple(given)
    for selector in selectors:
        is_type = isinstance(selector, type) and issubclass(selector, nn.Module)
        if not (isinstance(selector, str) or is_type):
            raise TypeError(
                f"`{argument}` must hold patterns or module types, got {quote(selector)}"
            )
    return selectors


def as_patterns(argument: str, given: str | Iterable[str]) -> tuple[str, ...]:
    """Return a glob pattern, or several, as a tuple."""
    patterns = tuple(x for x in as_selectors(argument, given) if isinstance(x, str))
    if len(patterns) < len(as_selectors(argument, given)):
        raise TypeError(f"`{argument}` must hold patterns, got {quote(given)}")
    return patterns
