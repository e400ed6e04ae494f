"""Several ways to do the same thing, measured side by side.

Each runs in a fresh process of its own (`worker.py`): a first call whose result is checked, a call
for its peak memory, then rounds in which they take turns, so that a change in the machine's speed
affects them all. To fail, to be wrong, to run out of memory or to take too long is an outcome, too.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame

from bench.measure import machine
from bench.measure.store import Row
from bench.measure.worker import Call, Job, Lost, Reply, Result, Turn, Worker

MOST_ROUNDS, LEAST_ROUNDS = 9, 5
SLOW = 10.0  # seconds: no extra call for the memory is made where calls take longer
VERY_SLOW = 30.0  # such calls have fewer rounds than `LEAST_ROUNDS`
SHORT = 0.02  # a round lasts at least this long, of several calls if need be


class OutOfTime(Exception):
    """The time for the whole run is up."""


@dataclass(frozen=True)
class Rules:
    """Limits of time, in seconds."""

    limit: float = 100.0  # of one call
    start: float = 30.0  # on top of that, for the imports of the first
    compilation: float = 240.0  # and for that of what compiles
    budget: float = 10.0  # of the rounds of one entry, but for `LEAST_ROUNDS`
    rounds: int = MOST_ROUNDS
    deadline: float = math.inf  # of `time.monotonic`

    def number_of_rounds(self, seconds: float) -> int:
        least = min(LEAST_ROUNDS, self.rounds) if seconds < VERY_SLOW else 1
        return max(least, min(self.rounds, int(self.budget / seconds)))


@dataclass(frozen=True)
class Entry:
    """What takes part.

    `make` loads it, in its own process. `check` makes columns of the first call's result; where
    they say that the status is "wrong", it is not timed.
    """

    make: Callable[[], Call]
    check: Callable[[Result], Row] = lambda result: {}
    compiles: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    version: str = ""  # of the package that it comes from
    timed: bool = True
    # what is known beforehand: why it cannot run, the bytes that it needs, and its work, to which
    # the time is proportional among entries of one method and one `alike`
    unavailable: str | None = None
    needs: float = 0.0
    work: float = 0.0
    alike: object = None


class Contestant:
    """An entry in its process, and its row of results."""

    def __init__(self, entry: Entry, contest: "Contest", cache: Path) -> None:
        self.entry, self.rules, self.cache = entry, contest.rules, cache
        self.row: dict[str, Any] = {"version": entry.version, "status": "ok"}
        self.replies: list[Reply] = []
        self.rounds, self.calls, self.warm = 0, 1, False
        # with warm caches and running threads, where a warm-up costs little
        self.cheap = SLOW if contest.device == "cuda" else 1.0
        cache.mkdir(exist_ok=True)
        # empty at first, so that the first call takes as long as a user's
        names = ("KEOPS_CACHE_FOLDER", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        environment = {**entry.environment, **dict.fromkeys(names, str(cache))}
        self.worker = Worker(Job(entry.make, contest.device, contest.threads, environment))

    def begin(self) -> None:
        """Make the first calls, whose times decide the number of rounds."""
        result, files = self.cache.parent / f"{self.cache.name}.pt", len([*self.cache.rglob("*")])
        extra = self.rules.start + self.rules.compilation * self.entry.compiles
        reply = self._ask(Turn(save=result), extra)
        compiled = len([*self.cache.rglob("*")]) > files
        self.row |= {"first_s": reply.wall, "compiled": "yes" if compiled else "no"}
        self.row |= self.entry.check(tuple(torch.load(result)))
        if not self.entry.timed or self.row["status"] != "ok":
            self.worker.close()
            return
        if reply.wall < SLOW or self.entry.compiles:
            # what libraries and compilers hold is not part of what the call needs
            reply = self._ask(Turn(memory=True))
            self.replies += [reply] * (reply.wall >= SLOW)
        self.row["peak_mib"] = reply.peak / 2**20
        self.calls = math.ceil(SHORT / reply.wall)
        self.rounds = self.rules.number_of_rounds(self.calls * reply.wall) - len(self.replies)
        self.warm = reply.wall < self.cheap

    def play(self, turn: int) -> None:
        """Make a round, or the first calls; what fails is an outcome."""
        try:
            if turn == 0:
                self.begin()
            else:
                self.replies.append(self._ask(Turn(self.calls, warm=self.warm)))
        except Lost as lost:
            self.row |= {"status": lost.status, "note": lost.note}
            self.rounds = 0
            self.worker.close()

    def end(self) -> None:
        """Put the times of the rounds into the row."""
        if self.row["status"] == "ok" and self.replies:
            wall, cpu = (DataFrame(self.replies)[name].mul(1e3) for name in ("wall", "cpu"))
            self.row |= {"wall_ms": wall.median(), "wall_min_ms": wall.min()}
            self.row |= {"wall_max_ms": wall.max(), "cpu_ms": cpu.median()}
            self.row |= {"rounds": len(self.replies), "calls": self.calls}

    def _ask(self, turn: Turn, extra: float = 0.0) -> Reply:
        limit = (1 + turn.warm) * turn.calls * (self.rules.limit + extra)
        left = self.rules.deadline - time.monotonic()
        if left <= 0:
            raise OutOfTime
        try:
            return self.worker.ask(turn, min(limit, left))
        except Lost as lost:
            if lost.status == "timeout" and left < limit:
                raise OutOfTime from None
            raise


@dataclass
class Contest:
    """Contests on one device, in which the times of one tell what the next would take."""

    device: str
    threads: int
    rules: Rules
    caches: Path  # of compilers, a folder for each method
    seconds: dict[object, dict[float, float]] = field(default_factory=dict)  # by the work

    def refusal(self, method: str, entry: Entry) -> Row | None:
        """Say of what need not be tried why."""
        if entry.unavailable is not None:
            return {"status": "unavailable", "note": entry.unavailable}
        if entry.needs > (free := machine.free_memory(self.device)):
            note = f"needs about {entry.needs / 2**30:.3g} GiB, {free / 2**30:.3g} GiB free"
            return {"status": "out of memory", "note": note}
        known = self.seconds.get((method, entry.alike), {})
        smaller = [work for work in known if work < entry.work]
        # unless that is too small for its fixed costs
        if smaller and (seconds := known[most := max(smaller)]) > 0.1:
            expected, limit = seconds * entry.work / most, self.rules.limit
            if expected > limit:
                note = f"about {expected:.0f} s expected, the limit is {limit:.0f} s"
                return {"status": "timeout", "note": note}
        return None

    def hold(
        self, entries: Mapping[str, Entry], say: Callable[[str], None] = lambda words: None
    ) -> dict[str, Row]:
        """Measure all entries, and return a row for each; `OutOfTime` after the deadline."""
        rows: dict[str, Row] = {}
        contestants: dict[str, Contestant] = {}
        with ExitStack() as stack:
            for name, entry in entries.items():
                if (refusal := self.refusal(name, entry)) is not None:
                    rows[name] = {"version": entry.version, **refusal}
                    continue
                one = Contestant(entry, self, self.caches / name.replace("/", "-"))
                contestants[name] = one
                rows[name] = one.row
                stack.callback(one.worker.close)
            for turn in range(1 + MOST_ROUNDS):
                for name, one in contestants.items():
                    if turn <= one.rounds:
                        say(f"{name}, round {turn} of {one.rounds or '?'}")
                        one.play(turn)
        for name, one in contestants.items():
            one.end()
            known = self.seconds.setdefault((name, one.entry.alike), {})
            if one.replies:
                known[one.entry.work] = min(reply.wall for reply in one.replies)
            elif one.row["status"] == "timeout":
                known[one.entry.work] = self.rules.limit
        return rows
