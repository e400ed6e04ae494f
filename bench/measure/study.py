"""The engine of the benchmark: a study's cases, by its methods, into its file of results."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.progress import Progress

from bench.measure import machine
from bench.measure.contest import Entry, Rules, hold
from bench.measure.store import FIGURES, Row, Table

LEFT_OVER = 3  # exit status when the time is up before the end
Case = dict[str, Any]  # the columns that tell a study's cases apart


@dataclass(frozen=True)
class Options:
    """Where to measure what and how long, and where the results go."""

    device: str
    threads: int
    out: Path
    rules: Rules = field(default_factory=Rules)
    deadline: float = math.inf  # of `time.monotonic`, after which no case begins
    methods: Sequence[str] = ()  # all, if empty
    resume: bool = False  # skip what has been measured
    quick: bool = False


@dataclass(frozen=True)
class Study:
    """A question: its cases, and for each of them what takes part, by method.

    `groups` has the cases of a device, of few and small ones for a quick run, under the names that
    the command line takes. `parse` reads other cases.
    """

    name: str
    words: str
    minutes: int  # of two quiet cores, about
    key: tuple[str, ...]
    groups: Callable[[str, bool], Mapping[str, Sequence[Case]]]
    entries: Callable[[Case, Options], Mapping[str, Entry]]
    parse: Callable[[str], Case] | None = None
    threads: int | None = 1  # None: as many as PyTorch takes
    values: tuple[str, ...] = ()  # columns beside the usual ones
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def table(self) -> Table:
        return Table(self.name, (*self.key, "method"), (*FIGURES, *self.values))

    def cases(self, names: Sequence[str], options: Options) -> list[Case]:
        """List the cases of these names, each once; ValueError if there is no such case."""
        groups = self.groups(options.device, options.quick)
        found: list[Case] = []
        for name in names or groups:
            if name not in groups and self.parse is None:
                raise ValueError(f"{name!r} is none of {', '.join(groups)}")
            cases = groups[name] if name in groups else [self.parse(name)]  # type: ignore[misc]
            found += [case for case in cases if case not in found]
        return found

    def check(self, names: Sequence[str], options: Options) -> None:
        """Raise ValueError if there is no such case, or no such method."""
        cases = self.cases(names, options)
        known = dict.fromkeys(m for case in cases for m in self.entries(case, options))
        if unknown := [method for method in options.methods if method not in known]:
            raise ValueError(f"{unknown[0]!r} is no method of these cases: {', '.join(known)}")

    def taking_part(self, case: Case, options: Options) -> dict[str, Entry]:
        entries = self.entries(case, options)
        return {m: entry for m, entry in entries.items() if m in (options.methods or entries)}

    def measure(self, options: Options, names: Sequence[str] = ()) -> int:
        """Measure cases, store each once it is complete, and return how many are left over."""
        stamp = machine.stamp(options.device, options.threads)

        def wanted(case: Case) -> bool:
            keys = [{**stamp, **case, "method": m} for m in self.taking_part(case, options)]
            return bool(keys) and not (options.resume and not self.table.lacks(options.out, keys))

        cases = list(filter(wanted, self.cases(names, options)))
        expected = "" if names or options.quick else f", about {self.minutes} minutes"
        print(
            f"{self.name}: {len(cases)} cases{expected}; {stamp['machine']}, threads: "
            f"{options.threads}, PyTorch {stamp['torch']}, comhe_ext at {stamp['commit'] or '?'}"
        )
        where = options.device, options.threads, options.rules
        with TemporaryDirectory() as caches, Progress(disable=not sys.stdout.isatty()) as progress:
            task = progress.add_task("", total=len(cases))
            for index, case in enumerate(cases):
                if time.monotonic() >= options.deadline:
                    return len(cases) - index
                title = " ".join(map(str, case.values()))
                progress.update(task, description=title)
                rows = hold(self.taking_part(case, options), *where, Path(caches))
                self.table.upsert(
                    options.out, [{**stamp, **case, "method": m, **row} for m, row in rows.items()]
                )
                print(f"{title}: " + ", ".join(f"{m} {brief(row)}" for m, row in rows.items()))
                progress.advance(task)
        return 0


def brief(row: Row) -> str:
    """Say in a word or two what came of a method."""
    if row["status"] != "ok":
        return str(row["status"])
    words = [f"{row['cpu_ms']:.3g} ms"] if "cpu_ms" in row else []
    if row.get("gradient_error") is not None:
        words.append(f"(error {row['gradient_error']:.0e})")
    return " ".join(words) or "ok"
