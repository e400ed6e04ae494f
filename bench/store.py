"""Results as CSV files, one row a measurement, found again by its key."""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Row = dict[str, str]


class Table:
    """Rows of a CSV file with the columns `key` and `values`; no two have the same key."""

    def __init__(self, name: str, key: Sequence[str], values: Sequence[str]) -> None:
        self.name, self.key, self.columns = name, tuple(key), (*key, *values)

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}.csv"

    def read(self, folder: Path) -> list[Row]:
        path = self.path(folder)
        if not path.exists():
            return []
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            if set(row) != set(self.columns):
                raise ValueError(f"{path} must have the columns {', '.join(self.columns)}")
        return rows

    def newest(self, folder: Path) -> list[Row]:
        """Select the last measured of the rows that differ only in versions."""
        over = ("torch", "comhe_ext", "commit")
        kept: dict[tuple[str, ...], Row] = {}
        for row in sorted(self.read(folder), key=lambda row: row["date"]):
            kept[tuple(row[name] for name in self.key if name not in over)] = row
        return list(kept.values())

    def upsert(self, folder: Path, rows: Iterable[Mapping[str, object]]) -> None:
        """Add rows, in place of those with the same key; the file is replaced as a whole.

        A value that a row does not name is empty.
        """
        by_key = {self.key_of(row): row for row in self.read(folder)}
        for row in rows:
            if unknown := set(row) - set(self.columns):
                raise ValueError(f"{self.name} has no column {', '.join(sorted(unknown))}")
            text = {name: to_text(row.get(name)) for name in self.columns}
            by_key[self.key_of(row)] = text
        folder.mkdir(parents=True, exist_ok=True)
        path = self.path(folder)
        part = path.with_suffix(f".{os.getpid()}.part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(by_key.values())
        part.replace(path)

    def lacks(self, folder: Path, rows: Iterable[Mapping[str, object]]) -> bool:
        """Tell whether one of the rows, compared by their keys, has not been measured."""
        found = {self.key_of(row) for row in self.read(folder)}
        return any(self.key_of(row) not in found for row in rows)

    def key_of(self, row: Mapping[str, object]) -> tuple[str, ...]:
        return tuple(to_text(row[name]) for name in self.key)


def to_text(value: object) -> str:
    """Write None as nothing, and floats with five digits, as more of a timing is noise."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
