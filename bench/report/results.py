"""The newest results beside each other: one machine, one clock, how many times as long."""

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd
from pandas import DataFrame, Series

from bench.cases.shapes import Shape
from bench.cases.sweep import STUDY as SWEEP
from bench.measure.machine import PEAKS
from bench.measure.store import Table
from bench.peers.energies import METHODS, OURS, PEERS

CASE = ["sets", "rows", "dim", "mode"]


def newest(
    table: Table, folder: Path, device: str, threads: int | None = None, machine: str | None = None
) -> DataFrame:
    """Select the newest rows of a machine and its threads, of those measured last if not given.

    A call's time is `ms`, by the one clock: processor time of one thread, else the wall's.
    """
    rows = table.newest(folder)
    rows = rows[(rows.device == device) & (rows.threads == (threads or rows.threads))]
    rows = rows[rows.machine == (machine or rows.machine)]
    if "wall_ms" in rows:
        one = (rows.device == "cpu") & (rows.threads == 1)
        rows = rows.assign(ms=rows.cpu_ms.where(one, rows.wall_ms))
    last = rows.sort_values("date")[["machine", "threads"]].tail(1)
    return rows.merge(last)


class Sweep:
    """The sweep of a device, of a processor on one thread unless another number is given."""

    def __init__(
        self, folder: Path, device: str, threads: int | None = None, machine: str | None = None
    ) -> None:
        self.folder, self.device = folder, device
        threads = threads or (1 if device == "cpu" else None)
        rows = newest(SWEEP.table, folder, device, threads, machine)
        self.rows = rows[rows.method.isin(METHODS)]  # one may have been renamed since
        self.machine = rows.machine.iloc[0] if len(rows) else ""
        peaks = newest(PEAKS, folder, device, threads, self.machine or "none").flops.dropna()
        self.peak = float(peaks.iloc[-1]) if len(peaks) else None

    def table(self, column: str) -> DataFrame:
        """Lay a column out, cases by methods in the order of the registry."""
        return self.rows.pivot(index=CASE, columns="method", values=column).reindex(
            columns=list(METHODS)
        )

    @cached_property
    def ms(self) -> DataFrame:
        return self.table("ms")

    @cached_property
    def ours(self) -> Series:
        """The times of the backend that is taken by default, of the cases that have one."""
        return self.ms[OURS].bfill(axis=1).iloc[:, 0].dropna()

    @cached_property
    def ratios(self) -> DataFrame:
        """How many times as long each peer takes."""
        return self.ms.loc[self.ours.index, PEERS].div(self.ours, axis=0)

    def has(self, shape: Shape) -> bool:
        return key(shape) in self.ours.index

    def over(self, shape: Shape, *peers: str) -> float:
        """Compute how many times as long the fastest of some peers takes."""
        if not self.has(shape):
            return math.nan
        return float(self.ratios.loc[key(shape), list(peers)].min())

    def share(self, shape: Shape) -> float:
        """Compute the share of the peak that is useful work."""
        if self.peak is None or not self.has(shape):
            return math.nan
        return float(shape.flop / (1e-3 * self.ours[key(shape)]) / self.peak)

    def value(self, shape: Shape, column: str, mode: str = "gradient", method: str = "") -> float:
        """Read a column of our own row, or of a method's."""
        table = self.table(column)
        if key(shape, mode) not in table.index:
            return math.nan
        return float(table.loc[key(shape, mode), [method] if method else OURS].bfill().iloc[0])

    def of(self, shapes: Sequence[Shape]) -> DataFrame:
        """Select the rows of some shapes, energy and gradient."""
        wanted = pd.MultiIndex.from_tuples([key(shape) for shape in shapes])
        return self.rows[self.rows.set_index(CASE).index.isin(wanted)]


def key(shape: Shape, mode: str = "gradient") -> tuple[int | str, ...]:
    return (*shape, mode)
