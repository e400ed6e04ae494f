"""The launches that calls of the Triton backend make on a GPU that need not be there.

The launchers run as they are, on tensors of the processor; in place of a launch its kernel is noted
with all that the compiler has to know. So every variant is one that a call asks for.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from comhe_ext.kernels import gpu
from comhe_ext.kernels.gpu import backend, plan
from comhe_ext.kernels.pair_functions import Gaussian, Laplace, PairFunction, Riesz
from comhe_ext.kernels.sweep import NearestRequest, Projected, SweepRequest

# by name, with what is in the name of its matrix instructions
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "HMMA"),
    "sm_90": (GPUTarget("cuda", 90, 32), "HGMMA"),
    "sm_100": (GPUTarget("cuda", 100, 32), "UTCHMMA"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "v_mfma"),
}
FOUR: dict[str, PairFunction] = {
    "s=0": Riesz(0.0),
    "s=1": Riesz(1.0),
    "s=2": Riesz(2.0),
    "any s": Riesz(1.5),
}
FOUR |= {"gaussian": Gaussian(), "laplace": Laplace()}
# those that know half space and the angle, but not both at once
THREE = {"s<0": Riesz(-0.5), "shift": Riesz(1.5, shift=0.5), "shift s=0": Riesz(0.0, shift=0.5)}
PAIRS: dict[str, PairFunction] = {
    name + " half" * half + " angle" * angular: replace(pair, half_space=half, angular=angular)
    for name, pair in {**FOUR, **THREE}.items()
    for half, angular in itertools.product((False, True), repeat=2)
    if name in FOUR or not (half and angular)
}
# whose sides are subtracted in another way
PAIRS["wide gaussian half"] = Gaussian(0.5, half_space=True)
# weights of a projecting launch, as many as a ResNet-50 has
NUM_WEIGHTS = 54


@dataclass
class Launch:
    """A kernel, specialized as a launch asked for it."""

    target: str
    kernel: str
    variant: str
    source: ASTSource
    options: Any
    constants: dict[str, Any] = field(repr=False)
    num_warps: int = 4
    pair: str | None = None  # None for kernels that know none

    @property
    def key(self) -> tuple[str, str, str]:
        return self.target, self.kernel, self.variant

    def compile(self) -> triton.compiler.CompiledKernel:
        options = self.options.__dict__
        return triton.compile(self.source, target=TARGETS[self.target][0], options=options)


TILE = "{BLOCK_M}x{BLOCK_N}x{WIDTH}"
# what tells the variants of a kernel apart, in words
VARIANTS = {
    "pairwise_kernel": f"{{pair}} {TILE} {{COSINE_TERMS}}+{{force}}",
    "near_pairs_kernel": "{pair} {columns}x{WIDTH} {COSINE_TERMS}{energy}",
    "direct_kernel": "{pair} k={K}{energy}",
    "cross_kernel": f"{{pair}} {TILE} {{COSINE_TERMS}}+{{force}}{{ids}}{{weights}}",
    "cross_near_kernel": "{pair} {ITEM_M}x{WIDTH} {COSINE_TERMS}{energy}{ids}{weights}",
    "cross_direct_kernel": "{pair} k={K}{energy}{ids}{weights}",
    "cross_finish_kernel": "rows={BLOCK_M}{energy}{ids}{weights}{each}",
    "nearest_kernel": "{of}{half} {BLOCK_N}x{WIDTH}",
    "nearest_choose_kernel": "{of}{half} {BLOCK_N}x{WIDTH}",
    "difference_kernel": "{angle}{rows}{projected}",
    "near_difference_kernel": "{sum}{part}",
    "difference_gradient_kernel": "{shared}",
    "coefficient_kernel": "{pair}{halves}",
    "near_block_kernel": "{pair}{energy}",
    "finish_kernel": "{pair} rows={BLOCK_M}{energy}",
    "total_kernel": "",
    "normalize_kernel": "{dtype} rows={BLOCK_M}{form}",
    "project_normalize_kernel": "{dtype} rows={BLOCK_M} k={WIDTH}{form} {PRECISION}",
}


def variant_of(kernel: str, pair: str, given: dict[str, Any], args: tuple[Any, ...]) -> str:
    """Fill in the words for what a launch was given."""
    known = defaultdict(int, given)
    force = known["WITH_FORCE"] if "WITH_FORCE" in given else True
    source = args[0][0] if isinstance(args[0], tuple) else args[0]
    words = {"pair": pair, "force": known["FORCE_TERMS"] * force, "part": "force" * force}
    words |= {"energy": "" if force else " energy", "each": " each" * known["WITH_ENERGY"]}
    words |= {"halves": f" {known['FORCE_HALVES']}" if force else " energy"}
    words |= {"columns": known["BLOCK_N"] * known["TILES_RATIO"], "sum": "sum " * known["WITH_SUM"]}
    ids, half = " ids" * known["WITH_IDS"], " half" * known["HALF_SPACE"]
    words |= {"ids": ids, "weights": " weights" * known["WITH_WEIGHTS"], "half": half}
    words |= {"of": "set" if known["SELF"] else f"columns{ids}"}
    words |= {"angle": "angle" if known["ANGLE"] else "cosine", "rows": " rows" * known["A_SLOPES"]}
    words |= {"projected": " projected" * known["B_SLOPES"]}
    words |= {"shared": "shared" if known["SHARED"] else "sets"}
    words |= {"dtype": str(source.dtype)[6:] if isinstance(source, Tensor) else ""}
    words |= {"form": " columns" * known["COLUMNS"] + " rest" * known["WITH_REST"]}
    return VARIANTS[kernel].format(**given, **words).rstrip()


# the name of its pair function, if any; torch's setting for float32 products; the call
Call = tuple[str, str, Callable[[], object]]


def sweep(k: int, pair: str = "s=2", precision: str = "highest", **wanted: Any) -> Call:
    """Sweep a set of rows."""
    rows = torch.ones(70, k, dtype=wanted.pop("dtype", None))
    request = SweepRequest(rows, [70], [1.0], PAIRS[pair], **wanted)
    return pair, precision, partial(gpu.sweep, request)


def projected(k: int, dtype: torch.dtype, precision: str) -> Call:
    """Sweep weights that are projected in the same launch."""
    weights = [torch.ones(2, 48, dtype=dtype)] * NUM_WEIGHTS
    source = Projected(weights, [torch.ones(1, k, 48)] * NUM_WEIGHTS)
    sizes, scales = [2] * NUM_WEIGHTS, [1.0] * NUM_WEIGHTS
    return "s=2", precision, partial(gpu.sweep, SweepRequest(source, sizes, scales, PAIRS["s=2"]))


def cross(k: int, pair: str = "s=2", weighted: bool = False, gradient: bool = True) -> Call:
    """Sweep rows against columns, with ids and weights or without."""
    ids = torch.ones(70, dtype=torch.int32)
    options: dict[str, Any] = {"columns": torch.ones(70, k), "gradient": gradient}
    if weighted:
        options |= {"row_ids": ids, "column_ids": ids, "row_weights": torch.ones(70)}
    return sweep(k, pair, **options)


def nearest(k: int, half_space: bool, *columns_and_ids: Tensor) -> Call:
    """Find the nearest row, or column, of each row."""
    request = NearestRequest(torch.ones(70, k), [70], half_space, 0.0, *columns_and_ids)
    return "", "highest", partial(gpu.nearest, request)


def difference(angle: bool, *gradients: bool) -> Call:
    """Compare cosines or angles of rows in two spaces, with the gradients in both."""
    rows, projected = torch.ones(1, 70, 200).expand(2, -1, -1), torch.ones(2, 70, 40)
    return "", "highest", partial(gpu.angle_difference, rows, projected, angle, *gradients)


def calls(pairs: Collection[str]) -> Iterator[Call]:
    """Make calls that take every branch of every kernel, of some pair functions beside s = 2.

    The widest come first: of several launches with one name the first is compiled.
    """
    for pair, gradient in itertools.product(pairs, (True, False)):
        # on tensor cores the fourth product of the cosine comes with few columns; on the others the
        # first and the last width of each tile shape
        for k in (128, 40, 32, 24, 16, 200, 8, 5, 4, 1):
            yield sweep(k, pair, gradient=gradient)
    # of what depends on the pair function these take the fewest and the most registers
    for pair in sorted({*pairs} & {"s=2", "any s half angle"}):
        yield from (cross(k, pair, weighted=True) for k in (128, 40, 32, 16, 200, 4))
    for k in (40, 32, 4):
        yield from (cross(k, gradient=gradient) for gradient in (True, False))
    ids = torch.ones(70, dtype=torch.int32)
    for k in (200, 128, 40, 32):
        yield nearest(k, False)
        yield nearest(k, True, torch.ones(70, k), ids, ids)
    for angle in (False, True):
        for wanted in ((True, True), (False, True), (False, False)):
            yield difference(angle, *wanted)
    # neither the cheaper products nor the dtype differ in what depends on the pair function
    for precision, gradient in (("high", True), ("medium", True), ("medium", False)):
        yield from (sweep(k, precision=precision, gradient=gradient) for k in (128, 40, 32, 16))
    yield from (sweep(200, pair, "high") for pair in pairs)
    for dtype, k in itertools.product((torch.float16, torch.bfloat16), (64, 16, 3)):
        yield sweep(k, dtype=dtype)
    for dtype, precision in itertools.product((torch.float32, torch.bfloat16), ("highest", "high")):
        yield from (projected(k, dtype, precision) for k in (128, 64, 32, 16, 8, 3))


def launches(target: str, pairs: Collection[str] = tuple(PAIRS)) -> list[Launch]:
    """List every variant of every kernel that a GPU is asked to run for these pair functions."""
    compiler = make_backend(TARGETS[target][0])
    found: dict[tuple[str, str, str], Launch] = {}

    def note(
        kernel: jit.JITFunction[Any], *args: Any, grid: Any, warmup: bool, **given: Any
    ) -> None:
        variant = variant_of(kernel.__name__, asked[0], given, args)
        if (target, kernel.__name__, variant) in found:
            return
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, compiler)
        bound, specialization, options = bind(*args, **given)
        options, signature, constants, attributes = kernel._pack_args(
            compiler, given, bound, specialization, options
        )
        source = ASTSource(kernel, signature, constants, attributes)
        num_warps = given.get("num_warps", 4)
        pair = asked[0] if asked[0] and variant.startswith(asked[0]) else None
        launch = Launch(target, kernel.__name__, variant, source, options, given, num_warps, pair)
        found[launch.key] = launch

    before = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, before)
        for where, name, stand_in in (
            (jit.JITFunction, "run", note),
            (backend, "check", lambda *_: None),
            (backend, "target_of", lambda _: target),
        ):
            stack.enter_context(patch.object(where, name, stand_in))
        for large_set, asked in itertools.product((plan.LARGE_SET, 1), calls(pairs)):
            _, precision, call = asked
            torch.set_float32_matmul_precision(precision)
            with patch.object(plan, "LARGE_SET", large_set):
                call()
    return list(found.values())
