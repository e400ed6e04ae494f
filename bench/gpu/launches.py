"""The launches that calls of the Triton backend make on a GPU that need not be there.

The launchers run as they are, on tensors of the processor; in place of a launch its kernel is noted
with all that the compiler has to know. So every variant is one that a call asks for.
"""

import itertools
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
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
PAIRS: dict[str, PairFunction] = {
    name + " half" * half + " angle" * angular: replace(pair, half_space=half, angular=angular)
    for name, pair in (
        ("s=0", Riesz(0.0)),
        ("s=1", Riesz(1.0)),
        ("s=2", Riesz(2.0)),
        ("any s", Riesz(1.5)),
        ("gaussian", Gaussian()),
    )
    for half, angular in itertools.product((False, True), repeat=2)
}
# whose sides are subtracted in another way
PAIRS["wide gaussian half"] = Gaussian(0.5, half_space=True)
# bounded ones
PAIRS |= {
    "s<0": Riesz(-0.5),
    "s<0 half": Riesz(-0.5, half_space=True),
    "s<0 angle": Riesz(-0.5, angular=True),
    "shift": Riesz(1.5, shift=0.5),
    "shift half": Riesz(1.5, shift=0.5, half_space=True),
    "shift angle": Riesz(1.5, shift=0.5, angular=True),
    "shift s=0": Riesz(0.0, shift=0.5),
    "shift s=0 half": Riesz(0.0, shift=0.5, half_space=True),
    "shift s=0 angle": Riesz(0.0, shift=0.5, angular=True),
    "laplace": Laplace(),
    "laplace half": Laplace(half_space=True),
    "laplace angle": Laplace(angular=True),
    "laplace half angle": Laplace(half_space=True, angular=True),
}
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


def variant_of(kernel: str, pair: str, given: dict[str, Any], args: tuple[Any, ...]) -> str:
    """What tells the variants of a kernel apart, in words."""
    energy = "" if given.get("WITH_FORCE", True) else " energy"
    if kernel == "pairwise_kernel":
        force = given["FORCE_TERMS"] * given["WITH_FORCE"]
        tile = f"{given['BLOCK_M']}x{given['BLOCK_N']}x{given['WIDTH']}"
        return f"{pair} {tile} {given['COSINE_TERMS']}+{force}"
    if kernel == "near_pairs_kernel":
        columns = given["BLOCK_N"] * given["TILES_RATIO"]
        return f"{pair} {columns}x{given['WIDTH']} {given['COSINE_TERMS']}{energy}"
    if kernel == "direct_kernel":
        return f"{pair} k={given['K']}{energy}"
    if kernel.startswith("cross"):
        energy += " ids" * given.get("WITH_IDS", False) + " weights" * given["WITH_WEIGHTS"]
    if kernel == "cross_kernel":
        force = given["FORCE_TERMS"] * given["WITH_FORCE"]
        tile = f"{given['BLOCK_M']}x{given['BLOCK_N']}x{given['WIDTH']}"
        return f"{pair} {tile} {given['COSINE_TERMS']}+{force}{energy.removeprefix(' energy')}"
    if kernel == "cross_near_kernel":
        return f"{pair} {given['ITEM_M']}x{given['WIDTH']} {given['COSINE_TERMS']}{energy}"
    if kernel == "cross_direct_kernel":
        return f"{pair} k={given['K']}{energy}"
    if kernel == "cross_finish_kernel":
        return f"rows={given['BLOCK_M']}{energy}" + " each" * given["WITH_ENERGY"]
    if kernel.startswith("nearest"):
        of = "set" if given["SELF"] else "columns" + " ids" * given["WITH_IDS"]
        return f"{of}{' half' * given['HALF_SPACE']} {given['BLOCK_N']}x{given['WIDTH']}"
    if kernel == "difference_kernel":
        slopes = " rows" * given["A_SLOPES"] + " projected" * given["B_SLOPES"]
        return f"{'angle' if given['ANGLE'] else 'cosine'}{slopes}"
    if kernel == "near_difference_kernel":
        return ("sum " * given["WITH_SUM"] + "force" * given["WITH_FORCE"]).rstrip()
    if kernel == "difference_gradient_kernel":
        return "shared" if given["SHARED"] else "sets"
    if kernel == "coefficient_kernel":
        return pair + (energy or f" {given['FORCE_HALVES']}")
    if kernel == "near_block_kernel":
        return pair + energy
    if kernel == "finish_kernel":
        return f"{pair} rows={given['BLOCK_M']}{energy}"
    if kernel == "total_kernel":
        return ""
    form = " columns" * given["COLUMNS"] + " rest" * given["WITH_REST"]
    if kernel == "normalize_kernel":
        return f"{str(args[0].dtype)[6:]} rows={given['BLOCK_M']}{form}"
    rows = f"{str(args[0][0].dtype)[6:]} rows={given['BLOCK_M']}"
    return f"{rows} k={given['WIDTH']}{form} {given['PRECISION']}"


@dataclass(frozen=True)
class Call:
    """A sweep over rows of k columns, as they are or projected."""

    k: int
    pair: str = "s=2"
    gradient: bool = True
    dtype: torch.dtype = torch.float32
    precision: str = "highest"  # torch's setting of float32 products
    projected: bool = False
    # rows against columns, with ids and weights
    cross: bool = False
    weighted: bool = False

    def make(self) -> None:
        rows = torch.ones(70, self.k, dtype=self.dtype)
        source: Tensor | Projected = rows
        extra: dict[str, Any] = {}
        if self.cross:
            extra["columns"] = rows
        if self.weighted:
            ids = torch.ones(70, dtype=torch.int32)
            extra |= {"row_ids": ids, "column_ids": ids, "row_weights": torch.ones(70)}
        sizes = [70]
        if self.projected:
            weights = [torch.ones(2, 48, dtype=self.dtype)] * NUM_WEIGHTS
            source = Projected(weights, [torch.ones(1, self.k, 48)] * NUM_WEIGHTS)
            sizes = [2] * NUM_WEIGHTS
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        try:
            scales = [1.0] * len(sizes)
            pair = PAIRS[self.pair]
            gpu.sweep(SweepRequest(source, sizes, scales, pair, gradient=self.gradient, **extra))
        finally:
            torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class NearestCall:
    """The nearest of rows of k columns, or of columns of their own."""

    k: int
    half_space: bool
    columns: bool = False
    ids: bool = False
    pair: str = ""

    def make(self) -> None:
        rows = torch.ones(70, self.k)
        ids = torch.ones(70, dtype=torch.int32) if self.ids else None
        columns = rows if self.columns else None
        gpu.nearest(NearestRequest(rows, [70], self.half_space, 0.0, columns, ids, ids))


@dataclass(frozen=True)
class DifferenceCall:
    """Cosines or angles of rows in two spaces, and the gradients in both."""

    angle: bool
    rows_gradient: bool = True
    projected_gradient: bool = True
    pair: str = ""

    def make(self) -> None:
        rows, projected = torch.ones(1, 70, 200).expand(2, -1, -1), torch.ones(2, 70, 40)
        wanted = self.rows_gradient, self.projected_gradient
        gpu.angle_difference(rows, projected, self.angle, *wanted)


def calls(pairs: Collection[str]) -> Iterator[Call | NearestCall | DifferenceCall]:
    """Calls that take every branch of every kernel, of some pair functions beside s = 2.

    The widest come first: of several launches with one name the first is compiled.
    """
    for pair, gradient in itertools.product(pairs, (True, False)):
        # on tensor cores the fourth product of the cosine comes with few columns; on the others the
        # first and the last width of each tile shape
        for k in (128, 40, 32, 24, 16, 200, 8, 5, 4, 1):
            yield Call(k, pair, gradient)
    # of what depends on the pair function these take the fewest and the most registers
    for pair in sorted({*pairs} & {"s=2", "any s half angle"}):
        for k in (128, 40, 32, 16, 200, 4):
            yield Call(k, pair, cross=True, weighted=True)
    for k in (40, 32, 4):
        yield from (Call(k, gradient=gradient, cross=True) for gradient in (True, False))
    for k in (200, 128, 40, 32):
        yield NearestCall(k, False)
        yield NearestCall(k, True, True, True)
    for angle in (False, True):
        for wanted in ((True, True), (False, True), (False, False)):
            yield DifferenceCall(angle, *wanted)
    # neither the cheaper products nor the dtype differ in what depends on the pair function
    for precision, gradient in (("high", True), ("medium", True), ("medium", False)):
        for k in (128, 40, 32, 16):
            yield Call(k, gradient=gradient, precision=precision)
    yield from (Call(200, pair, precision="high") for pair in pairs)
    for dtype, k in itertools.product((torch.float16, torch.bfloat16), (64, 16, 3)):
        yield Call(k, dtype=dtype)
    for dtype, precision in itertools.product((torch.float32, torch.bfloat16), ("highest", "high")):
        for k in (128, 64, 32, 16, 8, 3):
            yield Call(k, dtype=dtype, precision=precision, projected=True)


def launches(target: str, pairs: Collection[str] = tuple(PAIRS)) -> list[Launch]:
    """Every variant of every kernel that a GPU is asked to run for these pair functions."""
    compiler = make_backend(TARGETS[target][0])
    found: dict[tuple[str, str, str], Launch] = {}

    def note(
        kernel: jit.JITFunction[Any], *args: Any, grid: Any, warmup: bool, **given: Any
    ) -> None:
        variant = variant_of(kernel.__name__, call.pair, given, args)
        if (target, kernel.__name__, variant) in found:
            return
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, compiler)
        bound, specialization, options = bind(*args, **given)
        options, signature, constants, attributes = kernel._pack_args(
            compiler, given, bound, specialization, options
        )
        source = ASTSource(kernel, signature, constants, attributes)
        num_warps = given.get("num_warps", 4)
        pair = call.pair if call.pair and variant.startswith(call.pair) else None
        launch = Launch(target, kernel.__name__, variant, source, options, given, num_warps, pair)
        found[launch.key] = launch

    with ExitStack() as stack:
        for where, name, stand_in in (
            (jit.JITFunction, "run", note),
            (backend, "check", lambda *_: None),
            (backend, "target_of", lambda _: target),
        ):
            stack.enter_context(patch.object(where, name, stand_in))
        for large_set, call in itertools.product((plan.LARGE_SET, 1), calls(pairs)):
            with patch.object(plan, "LARGE_SET", large_set):
                call.make()
    return list(found.values())
