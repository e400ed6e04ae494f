"""Runs checks of `rank_checks*.py` on several ranks, one by one, as `test_ranks.py` asks.

All is imported once, then ranks are forked. For each line that it reads, a number of ranks and the
name of a check, it tells what failed on which rank, or nothing, as a line of JSON. A process group
of the backend gloo joins the ranks, which stay for the checks that follow, until another number is
asked for or one of them fails.
"""

import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

# Of the group: an exchange that hangs ends with an error. Long, as it must not end checks on a
# busy machine.
TIMEOUT = timedelta(minutes=2)


def load_checks() -> dict[str, Any]:
    """Find the functions of all files."""
    here = Path(__file__).parent
    sys.path.insert(0, str(here))
    checks = {}
    for path in sorted(here.glob("rank_[cf]*.py")):
        for name, value in vars(importlib.import_module(path.stem)).items():
            if name.startswith(("check_", "fail_")):
                checks[name] = value
    return checks


def run_rank(rank: int, size: int, folder: str, pipes: Any, checks: Any, *files: Any) -> None:
    connection: Connection = pipes[rank][1]
    # what is left open here would keep the others waiting after the main process has ended
    for inherited in (*files, *[x for pipe in pipes for x in pipe if x is not connection]):
        inherited.close()
    warnings.simplefilter("error")
    # of torch's own forward mode
    warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")
    address = f"file://{folder}/store"
    dist.init_process_group("gloo", address, rank=rank, world_size=size, timeout=TIMEOUT)
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                checks[name]()
        except BaseException:
            connection.send(traceback.format_exc())
            # As a program that fails does: a rank that waits for this one learns of it by the
            # connection that is closed, and would otherwise wait until the group's timeout.
            os._exit(1)
        connection.send("")


class Ranks:
    """Ranks that are joined by a process group, and wait for checks."""

    def __init__(self, size: int, checks: dict[str, Any], *files: Any) -> None:
        context = multiprocessing.get_context("fork")
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(size)]
        self._processes = [
            context.Process(
                target=run_rank,
                args=(rank, size, self._folder.name, pipes, checks, *files),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        self._connections = [ours for ours, _ in pipes]

    def run(self, check: str) -> dict[int, str]:
        """Run a check on all ranks, and return {rank: what failed}."""
        for connection in self._connections:
            connection.send(check)
        return dict(_outcomes(self._connections))

    def stop(self) -> None:
        """End all ranks, wherever they are."""
        for process, connection in zip(self._processes, self._connections, strict=True):
            connection.close()
            process.kill()
            process.join()
        self._folder.cleanup()


def main() -> None:
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what checks print goes elsewhere
    checks = load_checks()
    ranks: Ranks | None = None
    for line in requests:
        number, name = line.split()
        if ranks is None or ranks.size != int(number):
            if ranks is not None:
                ranks.stop()
            ranks = Ranks(int(number), checks, requests, answers)
        failures = ranks.run(name)
        if failures:  # the ranks may be at different places now
            ranks.stop()
            ranks = None
        print(json.dumps(failures), file=answers, flush=True)


def _outcomes(connections: list[Connection]) -> Any:
    """Yield (rank, what failed), as long as there may be more."""
    waiting: dict[Any, int] = {connection: rank for rank, connection in enumerate(connections)}
    while waiting:
        ready = wait(list(waiting), 2 * TIMEOUT.total_seconds())
        if not ready:
            for rank in waiting.values():
                yield rank, "no answer"
            return
        for connection in cast(list[Connection], ready):
            rank = waiting.pop(connection)
            try:
                text = connection.recv()
            except EOFError:
                text = "the process ended"
            if text:
                yield rank, text


if __name__ == "__main__":
    main()
