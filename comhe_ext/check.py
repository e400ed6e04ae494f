"""`comhe-ext check`: the checks of `comhe_ext.verdicts` for the usual calls, in a process apart.

A kernel that reads where it must not, or hangs, takes its process with it: here that is one which
does nothing else, and the report says at which kernel it ended.
"""

import itertools
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from comhe_ext import backends
from comhe_ext.kernels.pair_functions import PairFunction, Riesz
from comhe_ext.kernels.sweep import (
    DifferenceRequest,
    NearestRequest,
    Projected,
    Request,
    SweepRequest,
)
from comhe_ext.verdicts import ALL, FEATURES, Verdict, VerdictFile, Verdicts, examine

# seconds that one kernel may take, with its compilation
PATIENCE = 300.0


def requests(device: torch.device, quick: bool = False) -> Iterator[tuple[str, Request]]:
    """Make the calls whose variants most users run, each with a precision of float32 products."""

    def request(
        k: int,
        pair: PairFunction,
        gradient: bool = True,
        projected: bool = False,
        n: int = 70,
        dtype: torch.dtype = torch.float32,
    ) -> SweepRequest:
        rows = torch.empty(n, FEATURES if projected else k, device=device, dtype=dtype)
        source: torch.Tensor | Projected = rows
        if projected:
            source = Projected([rows], [torch.empty(1, k, FEATURES, device=device)])
        return SweepRequest(source, [n], [1.0], pair, 0.0, gradient)

    full, half = Riesz(), Riesz(half_space=True)
    if quick:
        yield "highest", request(3, full)
        yield "highest", request(12, half)
        return
    for k in (3, 8, 16, 30, 40, 64, 128, 200):
        for pair in (full, half):
            for gradient in (True, False):
                yield "highest", request(k, pair, gradient)
    # large sets have tiles of their own
    for k in (32, 40, 64, 128):
        for pair in (full, half):
            yield "highest", request(k, pair, n=4096)
    for k in (32, 40):
        for gradient in (True, False):
            yield "highest", request(k, half, gradient, projected=True)
    for s, by_angle in ((0.0, False), (1.0, False), (1.5, False), (2.0, True)):
        for half_space in (False, True):
            yield "highest", request(40, Riesz(s, half_space=half_space, angular=by_angle))
    for k in (3, 40, 128, 200):
        rows, ids = torch.empty(70, k, device=device), torch.zeros(70, device=device).int()
        for pair in (full, half):
            alone = replace(request(k, pair), columns=rows)
            yield "highest", alone
            yield "highest", replace(alone, row_ids=ids, column_ids=ids, row_weights=rows[:, 0])
            yield "highest", NearestRequest(rows, [70], pair.half_space)
        yield "highest", NearestRequest(rows, [70], False, 0.0, rows, ids, ids)
    for d in (128, 576):
        # a layer and its projections, as the projection learns and as both do
        rows = torch.empty(1, 70, d, device=device).expand(2, -1, -1)
        projected = torch.empty(2, 70, 40, device=device)
        for angle, rows_gradient in itertools.product((False, True), repeat=2):
            yield "highest", DifferenceRequest(rows, projected, angle, rows_gradient)
    for precision in ("high", "medium"):
        for k in (40, 200):
            yield precision, request(k, half)
    for dtype in (torch.float16, torch.bfloat16):
        yield "highest", request(40, half, dtype=dtype)


def run_checks(device: torch.device, quick: bool = False) -> None:
    """Check one variant after the other, tell of each on a line of JSON, and keep the verdicts."""
    from comhe_ext.kernels.gpu.variant import variant_of

    verdicts = Verdicts.of(device)
    _tell(environment=verdicts.environment)
    all_passed, seen = True, set()
    before = torch.get_float32_matmul_precision()
    for precision, request in requests(device, quick):
        torch.set_float32_matmul_precision(precision)
        variant = variant_of(request)
        if variant is None or variant in seen:
            continue
        seen.add(variant)
        _tell(starts=str(variant))
        verdict = examine(variant, device)
        verdicts.keep(str(variant), verdict)
        _tell(ends=str(variant), passed=verdict.passed, detail=verdict.detail)
        all_passed = all_passed and verdict.passed
    torch.set_float32_matmul_precision(before)
    if not quick:
        verdicts.keep(ALL, Verdict(all_passed, f"{len(seen)} variants"))
    _tell(done=all_passed)


def _tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


def check(device: str, quick: bool = False, patience: float = PATIENCE) -> bool:
    """Run the checks in a process of its own and print a report; whether all have passed."""
    if (reason := backends.unavailable("triton")) is not None:
        print(f"nothing to check: {reason}")
        return False
    command = [sys.executable, "-m", "comhe_ext", "check", "--device", device, "--in-this-process"]
    command += ["--quick"] if quick else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            return _report(process, patience)
        finally:
            process.kill()


def _report(process: "subprocess.Popen[str]", patience: float) -> bool:
    assert process.stdout is not None
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    file: VerdictFile | None = None
    running, passed, failed = "the start", 0, 0
    while True:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            ended = f"hangs: nothing came of it for {patience:.0f} s"
            break
        if not line:
            ended = f"its process ended with {process.wait()}"
            break
        if not line.startswith("{"):
            print(line, end="")
            continue
        news = json.loads(line)
        if "environment" in news:
            file = VerdictFile(news["environment"])
            for name, value in news["environment"].items():
                print(f"{name + ':':<12} {value}")
            print(f"{'kept in:':<12} {file.path if _writable(file.path) else 'nowhere'}")
        elif "starts" in news:
            running = news["starts"]
        elif "ends" in news:
            print(f"{'ok    ' if news['passed'] else 'FAILED'} {running}: {news['detail']}")
            passed, failed = passed + news["passed"], failed + (not news["passed"])
        else:
            print(f"{passed} passed, {failed} failed")
            return bool(news["done"])
    print(f"FAILED {running}: {ended}")
    if file is not None:
        verdict = Verdict(False, ended)
        file.add({running: verdict, ALL: verdict})
    return False


def _read(stream: Iterator[str], lines: "queue.SimpleQueue[str]") -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _writable(path: Path) -> bool:
    """Whether a file could be made there."""
    folder = next((parent for parent in path.parents if parent.exists()), path)
    return os.access(folder, os.W_OK)
