"""The newest results beside each other: one machine, one clock, how many times as long."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from pandas import DataFrame, Series

from bench.cases.sweep import STUDY as SWEEP
from bench.cases.sweep import Shape
from bench.measure.machine import PEAKS
from bench.measure.store import Table
from bench.peers import METHODS, OURS, PEERS

CASE = ["sets", "rows", "dim", "mode"]
Key = tuple[int, int, int, str]


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
    """The sweep of a device, of a processor on one thread unless another number is given.

    `ours` has the times of the backend that is taken by default, by the case; `ratios` how many
    times as long each peer takes; `shares` what part of the peak is useful work.
    """

    def __init__(
        self, folder: Path, device: str, threads: int | None = None, machine: str | None = None
    ) -> None:
        self.folder, self.device = folder, device
        threads = threads or (1 if device == "cpu" else None)
        self.rows = newest(SWEEP.table, folder, device, threads, machine)
        self.machine = self.rows.machine.iloc[0] if len(self.rows) else "none"
        ms = self.table("ms")
        self.ours = ms[OURS].bfill(axis=1).iloc[:, 0].dropna()
        self.ratios = ms.loc[self.ours.index, PEERS].div(self.ours, axis=0)
        peaks = newest(PEAKS, folder, device, threads, self.machine).flops.dropna()
        peak = peaks.iloc[-1] if len(peaks) else math.nan
        flop = [
            Shape(*case[:3]).flop if case[3] == "gradient" else math.nan for case in self.ours.index
        ]
        self.shares = Series(flop, self.ours.index, float) / (1e-3 * self.ours * peak)

    def table(self, column: str) -> DataFrame:
        """Lay a column out, cases by methods in the order of the registry."""
        table = self.rows.pivot(index=CASE, columns="method", values=column)
        return table.reindex(columns=list(METHODS))

    def of(self, cases: Sequence[Key]) -> DataFrame:
        """Select the rows of some cases."""
        return self.rows[pd.MultiIndex.from_frame(self.rows[CASE]).isin(cases)]
