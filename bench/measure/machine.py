"""The machine: names and versions for the results, its free memory, and the peak of a core."""

import ctypes
import os
import platform
import re
import subprocess
import tempfile
import time
import timeit
from datetime import datetime, timezone
from pathlib import Path

import psutil
import torch

import comhe_ext
from bench import ROOT
from bench.measure.store import Table


def name(device: str) -> str:
    """Name the processor or the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.M)
    processor = names[0] if names else platform.machine() or "processor"
    return f"{processor}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} CPUs"


def stamp(device: str, threads: int) -> dict[str, object]:
    """Fill in the columns that say where and with what a row was measured, and the date."""
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

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    code = ("comhe_ext", "kernels", "setup.py", "bench/*.py")
    try:
        changed = git("status", "--porcelain", "--", *code)
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def free_memory() -> int:
    """Count the bytes that a new process may take; in a container they may be few."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free


# --- the peak -------------------------------------------------------------------------------------

PEAKS = Table("peaks", (), ("flops",))
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
TURNS, REPEATS = 1_000_000, 9


def measure_peak(folder: Path) -> None:
    """Measure the most operations a second of one core, and store them."""
    try:
        PEAKS.upsert(folder, [{**stamp("cpu", 1), "flops": fma_peak()}])
    except (OSError, subprocess.SubprocessError) as error:
        print(f"the peak is not measured: no C compiler, {error}")


def fma_peak() -> float:
    """Measure float32 operations a second of fused multiply-adds; needs a C compiler."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    wide = {"AVX512": 64, "AVX2": 32} if x86 else {}
    width = wide.get(torch.backends.cpu.get_cpu_capability(), 16)
    # the register class of vectors: x, or v where there are 32 of them; w on Arm
    kind = ("v" if width == 64 else "x") if x86 else "w"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.c"), Path(folder, "peak.so")
        source.write_text(PEAK_SOURCE.replace("KIND", kind).replace("BYTES", str(width)))
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, source, "-o", library], check=True, capture_output=True)
        peak = ctypes.CDLL(str(library)).peak
    peak.argtypes, peak.restype = [ctypes.c_long], ctypes.c_float
    seconds = timeit.repeat(lambda: peak(TURNS), timer=time.process_time, number=1, repeat=REPEATS)
    return TURNS * 24 * (width // 4) * 2 / min(seconds)
