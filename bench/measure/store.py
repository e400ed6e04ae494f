"""Results as CSV files: a row for each measurement, found again by its key."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame

Row = Mapping[str, Any]

# where and with what a row was measured, in every file
STAMP = ("machine", "device", "threads", "torch", "comhe_ext", "commit")
# what a method did with a case
FIGURES = (
    *("status", "note", "wall_ms", "wall_min_ms", "wall_max_ms", "cpu_ms", "rounds"),
    *("calls", "first_s", "peak_mib", "value", "value_error", "gradient_error"),
)
# the columns that hold words; empty where there is none, while a number would be NaN
WORDS = (
    *("machine", "device", "torch", "comhe_ext", "commit", "date", "status", "note"),
    *("method", "mode", "case", "loss", "shape", "model", "kind", "what", "of", "plan"),
)


@dataclass(frozen=True)
class Table:
    """The rows of a CSV file; no two have the same stamp and the same key."""

    name: str
    key: tuple[str, ...]
    values: tuple[str, ...] = FIGURES

    @property
    def index(self) -> list[str]:
        return [*STAMP, *self.key]

    @property
    def columns(self) -> list[str]:
        return [*self.index, "date", *self.values]

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}.csv"

    def read(self, folder: Path) -> DataFrame:
        """Read the columns that are known: an older file may have more of values, or fewer."""
        path = self.path(folder)
        frame = pd.read_csv(path, dtype=str) if path.exists() else DataFrame(columns=self.columns)
        if missing := set(self.index) - set(frame.columns):
            raise ValueError(f"{path} must have the columns {', '.join(sorted(missing))}")
        return self._typed(frame)

    def _typed(self, frame: DataFrame) -> DataFrame:
        frame = frame.reindex(columns=self.columns)
        words, numbers = frame.columns.intersection(WORDS), frame.columns.difference(WORDS)
        frame[words] = frame[words].astype(object).fillna("").astype(str)
        frame[numbers] = frame[numbers].apply(pd.to_numeric)
        return frame

    def newest(self, folder: Path) -> DataFrame:
        """Select the last measured of the rows that differ only in versions."""
        rows = self.read(folder).sort_values("date", kind="stable")
        return rows.drop_duplicates(["machine", "device", "threads", *self.key], keep="last")

    def upsert(self, folder: Path, rows: Iterable[Row]) -> None:
        """Add rows, in place of those with the same key; the file is replaced as a whole."""
        new = DataFrame(list(rows))
        if unknown := set(new.columns) - set(self.columns):
            raise ValueError(f"{self.name} has no column {', '.join(sorted(unknown))}")
        new = self._typed(new)
        both = pd.concat([self.read(folder), new]) if self.path(folder).exists() else new
        both = both.set_index(self.index)
        frame = both[~both.index.duplicated("last")].reindex(both.index.unique()).reset_index()
        folder.mkdir(parents=True, exist_ok=True)
        part = self.path(folder).with_suffix(f".{os.getpid()}.part")
        # five digits, as more of a timing is noise
        frame[self.columns].to_csv(part, index=False, float_format="%.5g")
        part.replace(self.path(folder))

    def lacks(self, folder: Path, rows: Iterable[Row]) -> bool:
        """Tell whether one of the rows, compared by stamp and key, has not been measured."""
        found = set(self.read(folder)[self.index].itertuples(index=False, name=None))
        return any(tuple(row[name] for name in self.index) not in found for row in rows)
