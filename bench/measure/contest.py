"""Several ways to do the same thing, measured side by side.

Each runs in a fresh process of its own (`worker.py`): a first call whose result is checked, a call
for its peak memory, then rounds in which they take turns, so that a change in the machine's speed
affects them all. To fail, to be wrong, to run out of memory or to take too long is an outcome, too.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pandas import DataFrame
from torch import Tensor

from bench.measure.store import Row
from bench.measure.worker import Lost, Maker, Reply, Result, Turn, Worker
from comhe_ext import testing

MOST_ROUNDS = 9
# seconds: such calls have three rounds at least, shorter ones five; they need no warm-up, and that
# for the memory counts as a round
LONG = 1.0
SHORT = 0.02  # seconds: a round lasts at least as long, of several calls if need be
# empty at first, so that the first call takes as long as a user's
CACHES = ("KEOPS_CACHE_FOLDER", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class Rules(NamedTuple):
    """Limits of time, in seconds."""

    limit: float = 40.0  # of one call
    first: float = 120.0  # on top of that, for the imports and compilers of the first
    budget: float = 5.0  # of the rounds of one entry, but for the fewest
    rounds: int = MOST_ROUNDS

    def number_of_rounds(self, seconds: float) -> int:
        fewest = 5 if seconds < LONG else 3
        return min(self.rounds, max(fewest, int(self.budget / seconds)))


class Entry(NamedTuple):
    """What takes part.

    `make` loads it, in its own process. `check` makes columns of the first call's result; where
    they say that the status is "wrong", it is not timed.
    """

    make: Maker
    check: Callable[[Result], Row] = lambda result: {}
    environment: Mapping[str, str] = {}
    timed: bool = True


# far above the rounding of any float32 formula on random rows, far below a wrong factor or a
# missing term
VALUE_BOUND = 1e-5
GRADIENT_BOUND = 2e-3


def error(found: Tensor, exact: Tensor) -> float:
    """Compute the relative error in the L2 norm; infinite where something is not finite."""
    off = testing.relative_error(found, exact)
    return off if math.isfinite(off) else math.inf


def errors(found: Result, exact: Result) -> Row:
    """Make the columns of the errors of a value, and of its derivative where there is one."""
    names = ("value_error", "gradient_error")
    pairs = zip(names, found, exact, strict=True)
    return {name: error(a, b) for name, a, b in pairs if a is not None and b is not None}


def judged(row: Row) -> Row:
    """Say of errors that are too large that the result is wrong."""
    for name, bound in (("value", VALUE_BOUND), ("gradient", GRADIENT_BOUND)):
        if (off := row.get(f"{name}_error", 0.0)) > bound:
            return {**row, "status": "wrong", "note": f"{name} off by {off:.1e}, not {bound:.0e}"}
    return row


class Contestant:
    """An entry in its process, and its row of results."""

    def __init__(self, entry: Entry, device: str, threads: int, rules: Rules, cache: Path) -> None:
        self.entry, self.rules, self.result = entry, rules, cache.with_suffix(".pt")
        self.row: dict[str, Any] = {"status": "ok"}
        self.replies: list[Reply] = []
        self.rounds, self.calls, self.warm = 0, 1, False
        environment = {**entry.environment, **dict.fromkeys(CACHES, str(cache))}
        self.worker = Worker(entry.make, device, threads, environment)

    def play(self, turn: int) -> None:
        """Make a round, or the first calls; what fails is an outcome."""
        try:
            if turn == 0:
                self.begin()
            else:
                self.replies.append(self.ask(Turn(self.calls, warm=self.warm)))
        except Lost as lost:
            self.row |= dict(zip(("status", "note"), lost.args, strict=True))
        if self.row["status"] != "ok" or not self.entry.timed:
            self.rounds = 0
            self.worker.close()

    def begin(self) -> None:
        """Make the first calls, whose times decide the number of rounds."""
        self.row["first_s"] = self.ask(Turn(save=self.result), self.rules.first).wall
        self.row |= self.entry.check(tuple(torch.load(self.result)))
        if not self.entry.timed or self.row["status"] != "ok":
            return
        # what libraries and compilers hold is not part of what the call needs
        reply = self.ask(Turn(memory=True))
        self.row["peak_mib"] = reply.peak / 2**20
        self.warm = reply.wall < LONG
        self.replies += [reply] * (not self.warm)
        self.calls = math.ceil(SHORT / reply.wall)
        self.rounds = self.rules.number_of_rounds(self.calls * reply.wall) - len(self.replies)

    def ask(self, turn: Turn, extra: float = 0.0) -> Reply:
        return self.worker.ask(turn, (1 + turn.warm) * turn.calls * (self.rules.limit + extra))

    def end(self) -> dict[str, Any]:
        """Return the row, with the times of the rounds."""
        if self.row["status"] == "ok" and self.replies:
            wall, cpu = (DataFrame(self.replies)[name].mul(1e3) for name in ("wall", "cpu"))
            self.row |= {"wall_ms": wall.median(), "wall_min_ms": wall.min()}
            self.row |= {"wall_max_ms": wall.max(), "cpu_ms": cpu.median()}
            self.row |= {"rounds": len(self.replies), "calls": self.calls}
        return self.row


def hold(
    entries: Mapping[str, Entry], device: str, threads: int, rules: Rules, caches: Path
) -> dict[str, Row]:
    """Measure all entries, and return a row for each.

    In `caches` the compilers keep what they made, in a folder for each method.
    """
    found = {}
    with ExitStack() as stack:
        for name, entry in entries.items():
            found[name] = Contestant(entry, device, threads, rules, caches / name)
            stack.callback(found[name].worker.close)
        for turn in range(1 + MOST_ROUNDS):
            for one in found.values():
                if turn <= one.rounds:
                    one.play(turn)
    return {name: one.end() for name, one in found.items()}
