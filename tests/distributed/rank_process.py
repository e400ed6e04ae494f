"""Runs checks of `rank_checks*.py` on several ranks, one by one, as `test_ranks.py` asks.

Called with the number of ranks. All is imported once, then the ranks are forked. It tells the names
of the checks; then, for each name that it reads, what failed on which rank, or nothing. A line of
JSON each. A process group of the backend gloo joins the ranks.
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

# of the group: an exchange that hangs ends with an error
TIMEOUT = timedelta(seconds=60)
# what other ranks are given once one has failed
GRACE = 10


def load_checks(size: int) -> dict[str, Any]:
    """Find the functions of all files that are for so many ranks."""
    here = Path(__file__).parent
    sys.path.insert(0, str(here))
    checks = {}
    for path in sorted(here.glob("rank_[cf]*.py")):
        for name, value in vars(importlib.import_module(path.stem)).items():
            if name.startswith(("check_", "fail_")) and size in getattr(value, "sizes", (2, 3, 4)):
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
        else:
            connection.send("")


def main() -> None:
    size = int(sys.argv[1])
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what checks print goes elsewhere
    checks = load_checks(size)
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(size)]
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(size):
            arguments = (rank, size, folder, pipes, checks, requests, answers)
            context.Process(target=run_rank, args=arguments, daemon=True).start()
        for _, theirs in pipes:
            theirs.close()
        connections = [ours for ours, _ in pipes]
        print(json.dumps(list(checks)), file=answers, flush=True)
        for line in requests:
            for connection in connections:
                connection.send(line.rstrip("\n"))
            failures = dict(_outcomes(connections))
            print(json.dumps(failures), file=answers, flush=True)
            if failures:  # the ranks may be at different places now
                break


def _outcomes(connections: list[Connection]) -> Any:
    """Yield (rank, what failed), as long as there may be more."""
    waiting: dict[Any, int] = {connection: rank for rank, connection in enumerate(connections)}
    failed = False
    while waiting:
        ready = wait(list(waiting), GRACE if failed else 2 * TIMEOUT.total_seconds())
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
                failed = True
                yield rank, text


if __name__ == "__main__":
    main()
