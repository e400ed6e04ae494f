"""The machine: names and versions for the results, its free memory, and its peak rates."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import psutil
import torch

import comhe_ext
from bench.store import ROOT

# columns of every results file: where and with what a row was measured
STAMP = ("machine", "device", "threads", "torch", "comhe_ext", "commit")


def name(device: str) -> str:
    """Name the processor or the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = []
    if (info := Path("/proc/cpuinfo")).exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M)
    processor = names[0] if names else platform.machine() or "processor"
    return f"{processor}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} CPUs"


def stamp(device: str, threads: int) -> dict[str, object]:
    """Fill in the columns of `STAMP`, and the date."""
    return {
        "machine": name(device),
        "device": device,
        "threads": threads,
        "torch": torch.__version__,
        "comhe_ext": comhe_ext.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S"),
    }


def commit() -> str:
    """Name the commit of the checkout, with a plus if the code differs; empty without git."""

    def git(*arguments: str) -> str | None:
        if shutil.which("git") is None:
            return None
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=10", "HEAD")
    if head is None:
        return ""
    code = ("comhe_ext", "kernels", "setup.py", "bench/*.py")
    return head + ("+" if git("status", "--porcelain", "--", *code) else "")


def free_memory(device: str) -> int:
    """Count the bytes that a new process may take; in a container they may be few."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free


# --- peaks ----------------------------------------------------------------------------------------

# 24 independent accumulators of one vector: as many fused multiply-adds as the core can start
PEAK_SOURCE = """
typedef float vector __attribute__((vector_size(BYTES)));
float peak(long turns) {
    vector sums[24], a = {}, b = {};
    for (int i = 0; i < 24; i++) sums[i] = b;
    a += 1e-9f; b += 1.0f;
    for (long t = 0; t < turns; t++) {
        asm volatile("" : "+KIND"(a), "+KIND"(b));
        #pragma GCC unroll 24
        for (int i = 0; i < 24; i++) sums[i] += a * b;
    }
    vector sum = sums[0];
    for (int i = 1; i < 24; i++) sum += sums[i];
    return sum[0];
}
"""
TURNS = 1_000_000
REPEATS = 9


def fma_peak(threads: int) -> float:
    """Measure float32 operations a second of fused multiply-adds; needs a compiler."""
    compiler = next((c for c in ("gcc", "clang", "cc") if shutil.which(c)), None)
    if compiler is None:
        raise RuntimeError("no C compiler to build the peak of multiply-adds with")
    x86 = platform.machine() in ("x86_64", "AMD64")
    width = 16
    if x86:
        width = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 16)
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.c"), Path(folder, "peak.so")
        # the register class of vectors: x, or v where there are 32 of them; w on Arm
        kind = ("v" if width == 64 else "x") if x86 else "w"
        source.write_text(PEAK_SOURCE.replace("KIND", kind))
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        command = [compiler, *flags, f"-DBYTES={width}", str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{compiler} cannot build the peak of multiply-adds")
        peak = ctypes.CDLL(str(library)).peak
    peak.argtypes, peak.restype = [ctypes.c_long], ctypes.c_float

    def all_threads() -> None:
        workers = [threading.Thread(target=peak, args=(TURNS,)) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    work = threads * TURNS * 24 * (width // 4) * 2
    return work / shortest(all_threads, threads)


def copy_bandwidth(device: str, threads: int) -> float:
    """Measure bytes a second, read and written, of a copy larger than the caches."""
    elements = 2**28 if device == "cuda" else 2**26
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = shortest(lambda: target.copy_(source), threads, device)
    finally:
        torch.set_num_threads(before)
    return 2 * 4 * elements / seconds


def matrix_peak() -> float:
    """Measure operations a second of the GPU's matrix units: a large product in float16."""
    n = 8192
    left, right = (torch.randn(n, n, device="cuda", dtype=torch.float16) for _ in range(2))
    return 2 * n**3 / shortest(lambda: left @ right, 1, "cuda")


def shortest(call: Callable[[], object], threads: int, device: str = "cpu") -> float:
    """Time the fastest of several calls in seconds, by the clock that methods are timed by."""
    clock = time.process_time if device == "cpu" and threads == 1 else time.perf_counter
    seconds = []
    for _ in range(REPEATS):
        start = clock()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return min(seconds)
