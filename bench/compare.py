"""Rows of the sweep beside each other: the one clock, who is ours, how many times faster."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from bench.methods import METHODS, MODES, OURS
from bench.shapes import Case, Shape
from bench.store import Row

Setting = tuple[str, str, str]  # machine, device, threads


def setting_of(row: Row) -> Setting:
    return row["machine"], row["device"], row["threads"]


def by_setting(rows: Iterable[Row]) -> dict[Setting, list[Row]]:
    """Rows that may be compared: of one machine and one number of threads."""
    groups: dict[Setting, list[Row]] = defaultdict(list)
    for row in rows:
        groups[setting_of(row)].append(row)
    return groups


def by_case(rows: Iterable[Row]) -> dict[Case, list[Row]]:
    """Rows of one setting, a list for each case, in the order of the registry."""
    groups: dict[Case, list[Row]] = defaultdict(list)
    for row in rows:
        if row["method"] in METHODS:  # it may have been renamed since
            groups[case_of(row)].append(row)
    order = list(METHODS)
    for group in groups.values():
        group.sort(key=lambda row: order.index(row["method"]))
    return groups


def case_of(row: Row) -> Case:
    mode = next(mode for mode in MODES if mode == row["mode"])
    return Case(Shape(int(row["sets"]), int(row["rows"]), int(row["dim"])), mode)


def milliseconds(row: Row) -> float | None:
    """A call's median, by the one clock: processor time of one thread, else the wall's."""
    one_thread = row["device"] == "cpu" and row["threads"] == "1"
    text = row["cpu_ms"] if one_thread else row["wall_ms"]
    return float(text) if text else None


def ours(rows: Sequence[Row]) -> Row | None:
    """The row of the backend that is taken by default, of the rows of one case."""
    timed = (row for row in rows if METHODS[row["method"]].family == OURS and row["wall_ms"])
    return next(timed, None)


def peers(rows: Sequence[Row]) -> list[Row]:
    """Those that compute the same energy without us."""
    return [
        row
        for row in rows
        if METHODS[row["method"]].family != OURS and METHODS[row["method"]].same_energy
    ]


def times_faster(mine: Row | None, other: Row) -> float | None:
    """How many times as long the other takes."""
    if mine is None:
        return None
    a, b = milliseconds(mine), milliseconds(other)
    return None if a is None or b is None else b / a


def nearest(rows: Sequence[Row]) -> tuple[Row, float] | None:
    """The fastest of the peers, and how many times as long it takes."""
    mine = ours(rows)
    ratios = [(row, times_faster(mine, row)) for row in peers(rows)]
    timed = [(row, ratio) for row, ratio in ratios if ratio is not None]
    return min(timed, key=lambda item: item[1], default=None)
