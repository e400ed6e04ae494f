"""The engine of the benchmark: a study's cases, by its methods, into its file of results."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from pandas import DataFrame
from rich.progress import track

from bench.measure import machine
from bench.measure.contest import Entry, Rules, hold
from bench.measure.store import FIGURES, Table

SHOWN = ["status", "cpu_ms", "peak_mib", "gradient_error"]  # of a row, on the screen
LEFT_OVER = 3  # exit status when the time is up before the end
Case = dict[str, Any]  # the columns that tell a study's cases apart


class Options(NamedTuple):
    """Where to measure what and how long, and where the results go."""

    device: str
    threads: int  # 0: as many as the study asks for
    out: Path
    rules: Rules = Rules()
    deadline: float = math.inf  # of `time.monotonic`, after which no case begins
    methods: Sequence[str] = ()  # all, if empty
    resume: bool = False  # skip what has been measured
    quick: bool = False


@dataclass(frozen=True)
class Study:
    """A question: its cases, and for each of them what takes part, by method.

    `groups` has the cases of a device, few and small ones for a quick run, under the names that the
    command line takes.
    """

    name: str
    words: str
    minutes: int  # of two quiet cores, about
    key: tuple[str, ...]
    groups: Callable[[str, bool], Mapping[str, Sequence[Case]]]
    entries: Callable[[Case, Options], Mapping[str, Entry]]
    threads: int = 1  # 0: as many as PyTorch takes
    values: tuple[str, ...] = ()  # columns beside the usual ones
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def table(self) -> Table:
        return Table(self.name, (*self.key, "method"), (*FIGURES, *self.values))

    def cases(self, names: Sequence[str], options: Options) -> list[Case]:
        """List the cases of these names, each once; ValueError if there is no such case."""
        groups = self.groups(options.device, options.quick)
        if unknown := [name for name in names if name not in groups]:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(groups)}")
        chosen = [case for name in names or groups for case in groups[name]]
        return [case for i, case in enumerate(chosen) if case not in chosen[:i]]

    def check(self, names: Sequence[str], options: Options) -> None:
        """Raise ValueError if there is no such case, or no such method, or not on this device."""
        if options.device not in self.devices:
            raise ValueError(f"{self.name} is measured on {', '.join(self.devices)}")
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
        shown = track(cases, self.name, disable=not sys.stdout.isatty())
        with TemporaryDirectory() as caches:
            for index, case in enumerate(shown):
                if time.monotonic() >= options.deadline:
                    return len(cases) - index
                rows = hold(self.taking_part(case, options), *where, Path(caches))
                self.table.upsert(
                    options.out, [{**stamp, **case, "method": m, **row} for m, row in rows.items()]
                )
                table = DataFrame.from_dict(rows, orient="index").reindex(columns=SHOWN)
                print(*case.values())
                print(table.dropna(axis=1, how="all").to_string(na_rep=""), flush=True)
        return 0
