"""`python -m bench.host_time`: what a call costs before, between and after its kernels.

Of the Triton path without a GPU: Triton binds, specializes and looks up the kernels of an sm_90 as
it does on one, and a stub stands where the driver would be called. What a driver adds is missing,
a few microseconds a launch and an allocation. Tensors are on the CPU, whose allocator is as quick
as the caching one of a GPU. Of the compiled CPU kernel the whole call is measured, work included.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import comhe_ext
from bench import machine
from bench.screen import make_console, make_table
from bench.store import RESULTS, Table
from comhe_ext import backends, verdicts
from comhe_ext.kernels.pair_functions import Riesz
from comhe_ext.kernels.sweep import Numbers, SweepRequest
from comhe_ext.settings import pair_settings

TABLE = Table(
    "host_time",
    key=("case", "what", *machine.STAMP),
    values=("date", "median_us", "min_us", "launches", "rounds"),
)
# sets, rows, columns; of many sets so few rows that what torch does with them takes no time
CASES = {"128 x 40": (1, 128, 40), "1,000 sets of 4 x 40": (1000, 4, 40)}
PAIR = Riesz(half_space=True)


LAUNCHES: Counter[str] = Counter()


class StubKernel:
    """A compiled kernel whose launch does nothing."""

    function = packed_metadata = None

    def __init__(self, name: str) -> None:
        self.name = name

    def launch_metadata(self, *_: object) -> None:
        return None

    def run(self, *_: object) -> None:
        LAUNCHES[self.name] += 1


@contextmanager
def stubbed_launcher() -> Iterator[None]:
    """Backend "triton" on CPU tensors, as the best there, with kernels that do nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    from comhe_ext.kernels import gpu
    from comhe_ext.kernels.gpu import backend, variant

    class StubDriver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    def compile_nothing(kernel: Any, key: str, signature: Any, device: int, *_: Any) -> StubKernel:
        return kernel.device_caches[device][0].setdefault(key, StubKernel(kernel.__name__))

    on_cpu = {"triton": "cpu", "cpu": "cpu"}
    passed = verdicts.Verdict(True, "not run")
    with ExitStack() as patches:
        for owner, name, value in (
            (driver, "_active", StubDriver()),
            (jit.JITFunction, "_do_compile", compile_nothing),
            (backend, "check", lambda *_: None),
            (backend, "target_of", lambda device: "sm_90"),
            (variant, "target_of", lambda device: "sm_90"),
            (gpu, "unavailable", lambda: None),
            (backends, "_BEST_ON", {"cpu": "triton"}),
            (backends, "_DEVICE_OF", on_cpu),
            (verdicts, "examine", lambda *_: passed),
            (verdicts.VerdictFile, "read", lambda self: {}),
            (verdicts.VerdictFile, "add", lambda self, found: None),
            (verdicts.Verdicts, "_all", {}),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        yield


def calls(backend: str, sets: int, rows: int, columns: int) -> dict[str, Callable[[], object]]:
    """The layers of one call, from the kernels outwards, energy and gradient each."""
    weight = torch.randn(sets, rows, columns, requires_grad=True)
    points = weight.detach()
    sizes, scales = Numbers([rows] * sets), Numbers([PAIR.scale(rows, "mean")] * sets)
    module = backends.load(backend)
    arguments = pair_settings(PAIR, "mean", 0.0, None).options([weight]).arguments

    def sweep() -> object:
        packed = points.view(sets * rows, columns)
        return module.sweep(SweepRequest(packed, sizes, scales, PAIR, 0.0, True))

    def operator() -> object:
        return torch.ops.comhe_ext.sweep([points], [None], True, *arguments)

    leaf = weight[0].detach().requires_grad_() if sets == 1 else weight

    def public() -> None:
        leaf.grad = None
        comhe_ext.hyperspherical_energy(leaf, half_space=True).sum().backward()

    def torch_alone() -> None:
        leaf.grad = None
        (leaf * leaf).sum().backward()

    return {
        f"{backend}, sweep": sweep,
        f"{backend}, operator": operator,
        f"{backend}, public with backward": public,
        "two operators of torch with backward": torch_alone,
    }


def measure(backend: str, rounds: int) -> Iterator[dict[str, object]]:
    """A row for each case and layer; they take turns, so that a busy moment meets them all."""
    stamp = machine.stamp("cpu", torch.get_num_threads())
    for case, shape in CASES.items():
        layers = calls(backend, *shape)
        times: dict[str, list[float]] = {name: [] for name in layers}
        launches = {}
        for name, call in layers.items():
            call()  # tables are made at the first call, and specialization settles at the second
            LAUNCHES.clear()
            call()
            launches[name] = LAUNCHES.total()
        for _ in range(rounds):
            for name, call in layers.items():
                begin = time.perf_counter()
                call()
                times[name].append(1e6 * (time.perf_counter() - begin))
        for name, found in times.items():
            found.sort()
            yield {
                **stamp,
                "case": case,
                "what": name,
                "median_us": found[len(found) // 2],
                "min_us": found[0],
                "launches": launches[name] if backend == "triton" else None,
                "rounds": rounds,
            }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(measure("cpu", options.rounds)) if backends.unavailable("cpu") is None else []
    with stubbed_launcher():
        rows += measure("triton", options.rounds)
    TABLE.upsert(options.out, rows)
    lines = [
        [
            *(str(row["case"]), str(row["what"])),
            *(f"{row['median_us']:.0f}", f"{row['min_us']:.0f}"),
            "" if row["launches"] is None else str(row["launches"]),
        ]
        for row in rows
    ]
    headings = ("case", "what", "median, us", "least, us", "launches")
    make_console().print(make_table("Host time of a call, one thread", headings, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
