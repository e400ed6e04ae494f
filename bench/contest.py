"""Several ways to do the same thing, measured side by side.

Each runs in a fresh process of its own (`worker.py`): a first call whose result is checked, a call
for its peak memory, then rounds in which they take turns, so that a change in the machine's speed
affects them all. To fail, to be wrong, to run out of memory or to take too long is an outcome, too.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.worker import Job, Lost, Reply, Turn, Worker

MOST_ROUNDS, LEAST_ROUNDS = 9, 5
SLOW = 10.0  # seconds: no extra call for the memory is made where calls take longer
VERY_SLOW = 30.0  # such calls have fewer rounds than `LEAST_ROUNDS`
SHORT = 0.02  # a round lasts at least this long, of several calls if need be
MIB = 2.0**20

FIGURES = (
    *("status", "note", "wall_ms", "wall_min_ms", "wall_max_ms", "cpu_ms", "rounds", "calls"),
    *("first_s", "peak_mib"),
)


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
    """What takes part. `check` reads the first call's result from a file and says what is wrong."""

    job: Job
    check: Callable[[Path], str | None] = lambda result: None
    compiles: bool = False


@dataclass
class Outcome:
    """How an entry fared: status "ok", "wrong", "timeout", "out of memory" or "failed"."""

    status: str = "ok"
    note: str = ""
    first: float | None = None  # seconds of the first call, imports and compilation included
    peak: int | None = None  # bytes
    wall: list[float] = field(default_factory=list)  # seconds a call, one each round
    cpu: list[float] = field(default_factory=list)
    calls: int = 1  # in a round

    def figures(self) -> dict[str, object]:
        """Compute the columns of `FIGURES`."""
        timed = self.status == "ok" and bool(self.wall)
        return {
            "status": self.status,
            "note": self.note,
            "wall_ms": 1e3 * statistics.median(self.wall) if timed else None,
            "wall_min_ms": 1e3 * min(self.wall) if timed else None,
            "wall_max_ms": 1e3 * max(self.wall) if timed else None,
            "cpu_ms": 1e3 * statistics.median(self.cpu) if timed else None,
            "rounds": len(self.wall) if timed else None,
            "calls": self.calls if timed else None,
            "first_s": self.first,
            "peak_mib": None if self.peak is None else self.peak / MIB,
        }


class _Contestant:
    def __init__(self, entry: Entry, rules: Rules) -> None:
        self.entry, self.rules, self.outcome = entry, rules, Outcome()
        self.rounds = 0
        self.warm = False
        self.worker = Worker(entry.job)

    def begin(self, folder: Path) -> None:
        """Make the first calls, whose times decide the number of rounds."""
        result = folder / "result.pt"
        extra = self.rules.start + (self.rules.compilation if self.entry.compiles else 0.0)
        if (reply := self._ask(Turn(save=result), extra)) is None:
            return
        self.outcome.first, self.outcome.peak = reply.wall, reply.peak
        if (verdict := self.entry.check(result)) is not None:
            self._leave("wrong", verdict)
            return
        if reply.wall < SLOW or self.entry.compiles:
            # what libraries and compilers hold is not part of what the call needs
            if (reply := self._ask(Turn(memory=True))) is None:
                return
            self.outcome.peak = reply.peak
            if reply.wall >= SLOW:
                self._keep(reply)
        self.outcome.calls = math.ceil(SHORT / reply.wall)
        self.rounds = self.rules.number_of_rounds(self.outcome.calls * reply.wall)
        self.rounds -= len(self.outcome.wall)
        # with warm caches and running threads, where a warm-up costs little
        self.warm = reply.wall < (SLOW if self.entry.job.device == "cuda" else 1.0)

    def round(self) -> None:
        reply = self._ask(Turn(self.outcome.calls, warm=self.warm))
        if reply is not None:
            self._keep(reply)

    def _keep(self, reply: Reply) -> None:
        self.outcome.wall.append(reply.wall)
        self.outcome.cpu.append(reply.cpu)

    def _ask(self, turn: Turn, extra: float = 0.0) -> Reply | None:
        limit = (1 + turn.warm) * turn.calls * (self.rules.limit + extra)
        left = self.rules.deadline - time.monotonic()
        if left <= 0:
            raise OutOfTime
        try:
            return self.worker.ask(turn, min(limit, left))
        except Lost as lost:
            if lost.status == "timeout" and left < limit:
                raise OutOfTime from None
            self._leave(lost.status, lost.note)
            return None

    def _leave(self, status: str, note: str) -> None:
        self.outcome.status, self.outcome.note = status, note
        self.rounds = 0
        self.worker.close()


def hold(
    entries: Mapping[str, Entry], rules: Rules, say: Callable[[str], None]
) -> dict[str, Outcome]:
    """Measure all entries, and return the outcome of each; `OutOfTime` after the deadline."""
    contestants: dict[str, _Contestant] = {}
    try:
        for name, entry in entries.items():
            contestants[name] = _Contestant(entry, rules)
        with tempfile.TemporaryDirectory() as folder:
            for name, one in contestants.items():
                say(f"{name}, first calls")
                one.begin(Path(folder))
        most = max((one.rounds for one in contestants.values()), default=0)
        for turn in range(most):
            for name, one in contestants.items():
                if turn < one.rounds:
                    say(f"{name}, round {turn + 1} of {one.rounds}")
                    one.round()
    finally:
        for one in contestants.values():
            one.worker.close()
    return {name: one.outcome for name, one in contestants.items()}
