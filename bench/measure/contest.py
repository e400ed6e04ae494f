"""Several ways to do the same thing, measured side by side.

Each runs in a fresh process of its own (`worker.py`): a first call whose result is checked, a call
for its peak memory, then rounds in which they take turns, so that a change in the machine's speed
affects them all. To fail, to be wrong, to run out of memory or to take too long is an outcome, too.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame

from bench.measure.store import Row
from bench.measure.worker import Call, Job, Lost, Reply, Result, Turn, Worker

MOST_ROUNDS = 9
SLOW = 5.0  # seconds: such calls have three rounds at least, shorter ones five
LONG = 1.0  # seconds: the call for the memory of such calls counts as a round
SHORT = 0.02  # seconds: a round lasts at least as long, of several calls if need be
# empty at first, so that the first call takes as long as a user's
CACHES = ("KEOPS_CACHE_FOLDER", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@dataclass(frozen=True)
class Rules:
    """Limits of time, in seconds."""

    limit: float = 60.0  # of one call
    first: float = 240.0  # on top of that, for the imports and compilers of the first
    budget: float = 10.0  # of the rounds of one entry, but for the fewest
    rounds: int = MOST_ROUNDS

    def number_of_rounds(self, seconds: float) -> int:
        fewest = 5 if seconds < SLOW else 3
        return min(self.rounds, max(fewest, int(self.budget / seconds)))


@dataclass(frozen=True)
class Entry:
    """What takes part.

    `make` loads it, in its own process. `check` makes columns of the first call's result; where
    they say that the status is "wrong", it is not timed.
    """

    make: Callable[[], Call]
    check: Callable[[Result], Row] = lambda result: {}
    environment: Mapping[str, str] = field(default_factory=dict)
    timed: bool = True


class Contestant:
    """An entry in its process, and its row of results."""

    def __init__(self, entry: Entry, device: str, threads: int, rules: Rules, cache: Path) -> None:
        self.entry, self.device, self.rules, self.cache = entry, device, rules, cache
        self.row: dict[str, Any] = {"status": "ok"}
        self.replies: list[Reply] = []
        self.rounds, self.calls, self.warm = 0, 1, False
        cache.mkdir(exist_ok=True)
        environment = {**entry.environment, **dict.fromkeys(CACHES, str(cache))}
        self.worker = Worker(Job(entry.make, device, threads, environment))

    def play(self, turn: int) -> None:
        """Make a round, or the first calls; what fails is an outcome."""
        try:
            if turn == 0:
                self.begin()
            else:
                self.replies.append(self._ask(Turn(self.calls, warm=self.warm)))
        except Lost as lost:
            self.row |= {"status": lost.status, "note": lost.note}
        if self.row["status"] != "ok":
            self.rounds = 0
            self.worker.close()

    def begin(self) -> None:
        """Make the first calls, whose times decide the number of rounds."""
        result, files = self.cache.with_suffix(".pt"), len([*self.cache.rglob("*")])
        reply = self._ask(Turn(save=result), self.rules.first)
        compiled = len([*self.cache.rglob("*")]) > files
        self.row |= {"first_s": reply.wall, "compiled": "yes" if compiled else "no"}
        self.row |= self.entry.check(tuple(torch.load(result)))
        if not self.entry.timed or self.row["status"] != "ok":
            return
        # what libraries and compilers hold is not part of what the call needs
        reply = self._ask(Turn(memory=True))
        self.replies += [reply] * (reply.wall >= LONG)
        self.row["peak_mib"] = reply.peak / 2**20
        self.calls = math.ceil(SHORT / reply.wall)
        self.rounds = self.rules.number_of_rounds(self.calls * reply.wall) - len(self.replies)
        # with warm caches and running threads, where a warm-up costs little
        self.warm = reply.wall < (10.0 if self.device == "cuda" else 1.0)

    def end(self) -> None:
        """Put the times of the rounds into the row."""
        if self.row["status"] == "ok" and self.replies:
            wall, cpu = (DataFrame(self.replies)[name].mul(1e3) for name in ("wall", "cpu"))
            self.row |= {"wall_ms": wall.median(), "wall_min_ms": wall.min()}
            self.row |= {"wall_max_ms": wall.max(), "cpu_ms": cpu.median()}
            self.row |= {"rounds": len(self.replies), "calls": self.calls}

    def _ask(self, turn: Turn, extra: float = 0.0) -> Reply:
        limit = (1 + turn.warm) * turn.calls * (self.rules.limit + extra)
        return self.worker.ask(turn, limit)


def hold(
    entries: Mapping[str, Entry],
    device: str,
    threads: int,
    rules: Rules,
    caches: Path,
) -> dict[str, Row]:
    """Measure all entries, and return a row for each.

    In `caches` the compilers keep what they made, in a folder for each method.
    """
    rows: dict[str, Row] = {}
    contestants: list[Contestant] = []
    with ExitStack() as stack:
        for name, entry in entries.items():
            one = Contestant(entry, device, threads, rules, caches / name.replace("/", "-"))
            stack.callback(one.worker.close)
            contestants.append(one)
            rows[name] = one.row
        for turn in range(1 + MOST_ROUNDS):
            for one in contestants:
                if turn <= one.rounds:
                    one.play(turn)
    for one in contestants:
        one.end()
    return rows
