"""A fresh process for everything that is measured; it makes calls when told to.

What runs out of memory or time ends only its own process. Methods take turns across processes:
one works while the others sleep.
"""

import contextlib
import ctypes
import math
import multiprocessing
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.measure import machine

LONGEST = 1e6  # seconds; what a connection waits for has to fit 31 bits of milliseconds

Result = tuple[Any, ...]  # of tensors, or None
Call = Callable[[], Result]
Maker = Callable[[], Call]  # loads in the process what is to be called; can be pickled

# a server that has imported torch forks a fresh process in milliseconds
CONTEXT = multiprocessing.get_context("forkserver")


class Turn(NamedTuple):
    """A number of calls to make, after one that is not timed if `warm`."""

    calls: int = 1
    warm: bool = False
    memory: bool = False  # give free memory back before, so that the peak is the call's own
    save: Path | None = None  # where to put the result of the last call


class Reply(NamedTuple):
    wall: float  # seconds a call
    cpu: float  # of all threads
    peak: float  # bytes above what was held before; at least a page, so that ratios exist


class Lost(Exception):
    """Raised with a status and a note when the process ended or the call failed."""


class Worker:
    """The handle of a process. After `ask` has raised `Lost`, only `close` may be called."""

    def __init__(self, make: Maker, device: str, threads: int, environment: dict[str, str]) -> None:
        CONTEXT.set_forkserver_preload(["torch", "pandas", "comhe_ext"])
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(
            target=_serve, args=(theirs, make, device, threads, environment)
        )
        self.process.start()
        theirs.close()

    def ask(self, turn: Turn, limit: float) -> Reply:
        try:
            self.connection.send(turn)
            if not self.connection.poll(min(limit, LONGEST)):
                raise Lost("timeout", f"more than {limit:.0f} s")
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            if self.process.exitcode == -signal.SIGKILL:
                raise Lost("out of memory", "ended by the system, short of memory") from None
            raise Lost("failed", f"the process ended with {self.process.exitcode}") from None
        if isinstance(answer, Lost):
            raise answer
        return answer

    def close(self) -> None:
        """End the process, together with compilers that it may have started."""
        self.connection.close()
        if self.process.is_alive() and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # not yet a group of its own
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        self.process.join()


def _serve(
    connection: Connection, make: Maker, device: str, threads: int, environment: dict[str, str]
) -> None:
    """Serve as the process: make calls until it is ended."""
    os.setsid()
    end_with_parent()
    # compilers write much, which would break the progress bar on the screen
    sink = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(sink, stream)
    os.environ.update(environment)
    if device == "cpu":
        _give_way()
    torch.set_num_threads(threads)
    call: Call | None = None
    with contextlib.suppress(EOFError):
        while True:
            turn = connection.recv()
            try:
                start = _clocks()
                call = call or make()
                connection.send(_take(call, turn, device, start))
            except Exception as error:
                short = isinstance(error, MemoryError | torch.OutOfMemoryError)
                short |= bool(re.search("can't allocate|not enough memory", str(error)))
                note = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                connection.send(Lost("out of memory" if short else "failed", note))
                return


def end_with_parent() -> None:
    """End this process as soon as the one that began it has ended, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _take(call: Call, turn: Turn, device: str, start: tuple[float, float]) -> Reply:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if turn.warm:
        call()
    if turn.memory and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # of GNU's allocator
        libc.malloc_trim(0)
    before = _peak_bytes(device, reset=True)
    if turn.warm or turn.memory:
        wait()
        start = _clocks()
    for _ in range(turn.calls):
        result = call()
    wait()
    wall, cpu = ((b - a) / turn.calls for a, b in zip(start, _clocks(), strict=True))
    peak = max(_peak_bytes(device) - before, resource.getpagesize())
    if turn.save is not None:
        torch.save([part if part is None else part.cpu() for part in result], turn.save)
    if device == "cuda":
        torch.cuda.empty_cache()  # the other processes need the memory
    return Reply(wall, cpu, peak)


def _peak_bytes(device: str, reset: bool = False) -> float:
    """Read the peak of memory since the last reset; with `reset`, what is held now."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if not (status := Path("/proc/self/status")).exists():
        return math.nan  # only Linux tells
    if reset:
        # where that is not allowed, what was held at an earlier time hides what is smaller
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return int(re.findall(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.M)[0]) * 1024


def _give_way() -> None:
    """Let this process run out of memory before the machine does, or at least be killed first."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return
    # threads and libraries reserve addresses without memory, which are not scarce
    most = held + machine.free_memory() + 2**31
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
