"""What a call costs before, between and after its kernels.

Of the Triton path without a GPU: Triton binds, specializes and looks up the kernels of an sm_90 as
it does on one, and a stub stands where the driver would be called. What a driver adds is missing,
a few microseconds a launch and an allocation. Tensors are on the CPU, whose allocator is as quick
as the caching one of a GPU. Of the compiled CPU kernel the whole call is measured, work included.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import comhe_ext
from bench.measure.contest import Entry
from bench.measure.store import Row
from bench.measure.study import Case, Options, Study
from bench.measure.worker import Call, Result
from comhe_ext import backends, verdicts
from comhe_ext.kernels.pair_functions import Riesz
from comhe_ext.kernels.sweep import Numbers, SweepRequest
from comhe_ext.settings import pair_settings

# sets, rows, columns; of many sets so few rows that what torch does with them takes no time
SHAPES = {"128 x 40": (1, 128, 40), "1,000 sets of 4 x 40": (1000, 4, 40)}
LAYERS = ("sweep", "operator", "public with backward")
TORCH = "two operators of torch with backward"
PAIR = Riesz(half_space=True)
LAUNCHES: Counter[str] = Counter()


class StubKernel:
    """A compiled kernel whose launch does nothing."""

    function = packed_metadata = None

    def __init__(self, name: str) -> None:
        self.launch_metadata = lambda *_: None
        self.run = lambda *_: LAUNCHES.update([name])


def stub_launcher() -> None:
    """Make backend "triton" the best for CPU tensors in this process, with empty kernels."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    from comhe_ext.kernels import gpu
    from comhe_ext.kernels.gpu import backend, variant

    driver_of_nothing = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )

    def compile_nothing(kernel: Any, key: str, signature: Any, device: int, *_: Any) -> StubKernel:
        return kernel.device_caches[device][0].setdefault(key, StubKernel(kernel.__name__))

    passed = verdicts.Verdict(True, "not run")
    for owner, name, value in (
        (driver, "_active", driver_of_nothing),
        (jit.JITFunction, "_do_compile", compile_nothing),
        (backend, "check", lambda *_: None),
        (backend, "target_of", lambda device: "sm_90"),
        (variant, "target_of", lambda device: "sm_90"),
        (gpu, "unavailable", lambda: None),
        (backends, "_BEST_ON", {"cpu": "triton"}),
        (backends, "_DEVICE_OF", {"triton": "cpu", "cpu": "cpu"}),
        (verdicts, "examine", lambda *_: passed),
        (verdicts.VerdictFile, "read", lambda self: {}),
        (verdicts.VerdictFile, "add", lambda self, found: None),
        (verdicts.Verdicts, "_all", {}),
    ):
        mock.patch.object(owner, name, value).start()


def make_call(backend: str, layer: str, shape: tuple[int, int, int]) -> Call:
    """Make a layer of a call, from the kernels outwards, energy and gradient each."""
    if backend == "triton":
        stub_launcher()
    sets, rows, columns = shape
    weight = torch.randn(sets, rows, columns, requires_grad=True)
    packed = weight.detach().view(sets * rows, columns)
    sizes, scales = Numbers([rows] * sets), Numbers([PAIR.scale(rows, "mean")] * sets)
    arguments = pair_settings(PAIR, "mean", 0.0, None).options([weight]).arguments
    leaf = weight[0].detach().requires_grad_() if sets == 1 else weight

    def public() -> None:
        leaf.grad = None
        comhe_ext.hyperspherical_energy(leaf, half_space=True).sum().backward()

    def torch_alone() -> None:
        leaf.grad = None
        (leaf * leaf).sum().backward()

    work: Callable[[], object] = {
        "sweep": lambda: backends.load(backend).sweep(
            SweepRequest(packed, sizes, scales, PAIR, 0.0, True)
        ),
        "operator": lambda: torch.ops.comhe_ext.sweep([weight.detach()], [None], True, *arguments),
        "public with backward": public,
        TORCH: torch_alone,
    }[layer]

    def call() -> Result:
        LAUNCHES.clear()
        work()
        return (torch.tensor(LAUNCHES.total()),)

    work()  # tables are made at the first call
    return call


def check(result: Result) -> Row:
    return {"launches": int(result[0])}


def entries(case: Case, options: Options) -> dict[str, Entry]:
    shape = SHAPES[case["case"]]
    missing = None if find_spec("triton") else "triton is not installed"
    reasons = {"cpu": backends.unavailable("cpu"), "triton": missing}
    found = {
        f"{name}, {layer}": Entry(partial(make_call, name, layer, shape), check, unavailable=reason)
        for name, reason in reasons.items()
        for layer in LAYERS
    }
    return found | {TORCH: Entry(partial(make_call, "torch", TORCH, shape), check)}


STUDY = Study(
    *("host-time", "what a call costs besides its kernels"),
    key=("case",),
    groups=lambda device: {name: [{"case": name}] for name in SHAPES},
    entries=entries,
    values=("launches",),
    devices=("cpu",),
)
