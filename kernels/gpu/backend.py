"""The sweep on a GPU: project and normalize, one of three kernels for the pairs, then finish.

    k <= 8      direct      differences on the CUDA cores
    k <= 128    pairwise    tensor cores, near_pairs for what they cannot resolve
    k > 128     large_k     blocks of the cosine matrix through GEMMs

All sets go through the same launches. Tables and launch shapes follow from the sizes alone:
nothing is tuned at run time, and nothing waits for the GPU but the upload of tables when sizes are
new. So a CUDA graph captures a call whose sizes were seen before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import triton
from torch import Tensor

from ..sweep import Numbers, Projected, SweepRequest, SweepResult
from .direct import direct
from .finish import Units, finish
from .large_k import ROW_TILE, large_k
from .near_pairs import near_pairs
from .pair_function import pair_constants
from .pair_terms import SMALL_SET, UNIT_SCALE, PairConstants
from .pairwise import pairwise
from .plan import (
    MAX_DIRECT,
    MAX_WIDTH,
    MAX_WITH_REST,
    Plan,
    Tiles,
    hold,
    make_plan,
    row_width,
    set_constants,
    tiles_for,
)
from .project_normalize import UnitRows, normalize, project_normalize
from .splits import multiprocessors, splits_for

# products of the fp16 halves kept (cosine, force), by torch.get_float32_matmul_precision():
# relative gradient error on random rows 3e-7, 3e-4 and 6e-4
TERMS = {"highest": (3, 3), "high": (3, 1), "medium": (1, 1)}


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    # Triton before 3.4 has no knobs, and is refused before anything runs on it
    return hasattr(triton, "knobs") and bool(triton.knobs.runtime.interpret)


@lru_cache(maxsize=64)
def target_of(device: torch.device) -> str:
    """Name of a device in the tile table: "sm_90", "gfx942", "interpreter"."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def has_fast_functions(device: torch.device) -> bool:
    """Whether NVIDIA's approximate special functions are there."""
    return target_of(device).startswith("sm_")


def registers(device: torch.device, most: int) -> dict[str, int]:
    """Launch option by which NVIDIA's assembler takes up to `most` registers instead of spilling.

    Left alone it saves a few for more programs side by side. AMD's compiler has no such option.
    """
    return {"maxnreg": most} if target_of(device).startswith("sm_") else {}


def check(points: Tensor, name: str = "points") -> None:
    """Raise for what these kernels cannot take."""
    if points.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"`{name}` must be float32, float16 or bfloat16 for backend 'triton', "
            f"got {points.dtype}"
        )
    if points.device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(points.device) < (8, 0):
            raise RuntimeError(
                f"backend 'triton' needs compute capability 8.0 or later, "
                f"{torch.cuda.get_device_name(points.device)} is older: use backend='torch'"
            )
    elif not interpreted():
        raise ValueError(
            f"`{name}` must be on a GPU for backend 'triton', got a {points.device.type} tensor: "
            "move it there or use another backend"
        )


# the launch shape of a check, instead of the one that the shapes ask for
FORCED_TILES: ContextVar[Tiles | None] = ContextVar("forced tiles", default=None)


@dataclass(frozen=True)
class Call:
    """What shapes and settings decide about one sweep."""

    sizes: Numbers
    scales: Numbers
    pair: PairConstants
    k: int
    with_gradient: bool
    device: torch.device
    precision: str

    @property
    def is_direct(self) -> bool:
        return self.k <= MAX_DIRECT

    @property
    def is_large(self) -> bool:
        return self.k > MAX_WIDTH

    @property
    def with_rest(self) -> bool:
        return MAX_DIRECT < self.k <= MAX_WITH_REST and self.precision == "highest"

    @property
    def terms(self) -> tuple[int, int]:
        cosine, force = TERMS[self.precision]
        return cosine + self.with_rest, force

    @property
    def width(self) -> int:
        return self.k if self.is_direct else row_width(self.k)

    @cached_property
    def tiles(self) -> Tiles:
        """Launch shape, of which large k knows only the rows of a tile."""
        if (forced := FORCED_TILES.get()) is not None:
            return forced
        if self.is_large:
            return Tiles(ROW_TILE, ROW_TILE, 4)
        target = target_of(self.device)
        return tiles_for(target, self.k, self.sizes.largest, self.pair.angle)

    @cached_property
    def plan(self) -> Plan:
        """Tables; square with gradient, upper triangle without, one slot a row tile for large k."""
        block_m, splits, upper = self.tiles.block_m, 1, False
        if not self.is_large:
            halves = 8 if self.is_direct else 6 if self.with_rest else 4
            row_bytes = halves * self.width + 12
            splits = splits_for(
                self.sizes,
                self.tiles,
                self.k,
                row_bytes,
                self.with_gradient,
                multiprocessors(self.device),
            )
            upper = not self.with_gradient
        return make_plan(self.sizes, block_m, self.tiles.block_n, splits, upper, self.device)

    def unit_rows(self) -> UnitRows:
        """Room for the unit rows."""
        return UnitRows.empty(
            self.plan.packed_rows, self.width, self.is_direct, self.with_rest, self.device
        )


def make_call(request: SweepRequest, k: int, device: torch.device) -> Call:
    """Make a call for rows of k columns under the settings of now."""
    return Call(
        Numbers.of(request.sizes),
        Numbers.of(request.scales),
        pair_constants(
            request.pair,
            has_fast_functions(device),
            small_sets=max(request.sizes, default=0) <= SMALL_SET,
            many_columns=k > MAX_WIDTH,
        ),
        k,
        request.gradient,
        device,
        torch.get_float32_matmul_precision(),
    )


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Kernels go to the current device: make it the tensors' own. Autocast is to lower no GEMM."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            yield


def sweep(request: SweepRequest) -> SweepResult:
    """Scaled sum over the pairs of each set, and its gradient in the rows, projected or not.

    Without the gradient only the upper triangle is visited, and nothing but energies.

    Returns:
        Energy [B] and gradient [T, k] (or None), float32; columns that a row lacks are zero.
    """
    if isinstance(request.source, Projected):
        return _sweep_projected(request, request.source)
    return _sweep_points(request, request.source)


def _sweep_points(request: SweepRequest, points: Tensor) -> SweepResult:
    check(points)
    num_rows, k = points.shape
    if num_rows == 0:
        gradient = points.new_zeros(0, k, dtype=torch.float32)
        energy = gradient.new_zeros(len(request.sizes))
        return SweepResult(energy, gradient if request.gradient else None)
    if k == 0:
        # rows without columns are dead rows, and so are rows of one zero
        energy, of_zeros, *_ = _sweep_points(request, points.new_zeros(num_rows, 1))
        return SweepResult(energy, None if of_zeros is None else of_zeros[:, :0])
    call = make_call(request, k, points.device)
    with on_device(call.device):
        rows = call.unit_rows()
        normalize(points, rows, call.plan, call.tiles.block_m, request.eps)
        return SweepResult(*_sweep_pairs(call, points, rows))


def _sweep_projected(request: SweepRequest, source: Projected) -> SweepResult:
    """One launch projects and normalizes all weights (128 a launch), whatever their widths.

    Nothing is launched, copied or waited for by weight or by matrix. Above k = 128 the products are
    GEMMs, one a weight.
    """
    weights, projections = source
    k = next((p.shape[1] for p in projections if p is not None), None)
    if k is None:
        k = max((w.shape[1] for w in weights), default=0)
    if not weights:
        raise ValueError("`weights` must hold at least one tensor, got none")
    for weight, projection in zip(weights, projections, strict=True):
        check(weight, "weights")
        _check_projected(weight, projection, weights[0], k)
    device = weights[0].device
    if not 0 < k <= MAX_WIDTH or not sum(request.sizes):
        with on_device(device):
            parts = [_project(w, p, k) for w, p in zip(weights, projections, strict=True)]
            points = torch.cat(parts)
        return _sweep_points(request, points)
    call = make_call(request, k, device)
    with on_device(device):
        points = torch.empty(sum(request.sizes), k, dtype=torch.float32, device=device)
        rows = call.unit_rows()
        sets = project_normalize(
            [w if w.stride(1) == 1 else w.contiguous() for w in weights],
            [p if p is None else p.contiguous() for p in projections],
            points,
            rows,
            call.plan,
            call.tiles.block_m,
            request.eps,
            projection_precision(device),
            # larger tiles take more than that, and the compiler gives it to them
            registers(device, 168) if call.tiles.block_m * row_width(k) <= 64 * 32 else {},
        )
        hold([sets])
        return SweepResult(*_sweep_pairs(call, points, rows))


def _check_projected(weight: Tensor, projection: Tensor | None, first: Tensor, k: int) -> None:
    """Raise where a weight and its projection do not fit together, or to the others."""
    if weight.dtype != first.dtype:
        raise TypeError(f"`weights` must be of one dtype, got {first.dtype} and {weight.dtype}")
    if projection is None:
        if weight.shape[1] > k:
            raise ValueError(
                f"a weight without projection must have at most {k} columns, got {weight.shape[1]}"
            )
        return
    if projection.dtype != torch.float32:
        raise TypeError(f"`projections` must be float32, got {projection.dtype}")
    if projection.dim() != 3 or projection.shape[1:] != (k, weight.shape[1]):
        raise ValueError(
            f"a projection must be [C, {k}, {weight.shape[1]}], got shape {tuple(projection.shape)}"
        )
    if weight.device != first.device or projection.device != first.device:
        raise ValueError(
            f"`weights` and `projections` must be on one device, got {first.device}, "
            f"{weight.device} and {projection.device}"
        )


def _project(weight: Tensor, projection: Tensor | None, k: int) -> Tensor:
    """Project the rows of one weight, [C N, k] float32, by a GEMM."""
    if projection is None:
        return torch.nn.functional.pad(weight.float(), (0, k - weight.shape[1]))
    return (weight.float() @ projection.mT).flatten(0, 1)


def projection_precision(device: torch.device) -> str:
    """Triton's name of the float32 product that torch's setting asks for."""
    exact = torch.get_float32_matmul_precision() == "highest"
    if target_of(device).startswith("gfx"):
        return "bf16x6" if exact else "bf16x3"
    return "tf32x3" if exact else "tf32"


def _sweep_pairs(call: Call, points: Tensor, rows: UnitRows) -> tuple[Tensor, Tensor | None]:
    """From unit rows to energies and the gradient in `points`."""
    pair, plan, tiles = call.pair, call.plan, call.tiles
    with_gradient = call.with_gradient
    if call.is_direct:
        slots = direct(rows, plan, tiles, pair, with_gradient)
    elif call.is_large:
        slots = large_k(
            points,
            rows,
            call.sizes,
            plan,
            tiles.block_m,
            pair,
            with_gradient,
            call.terms,
            registers(points.device, 128),
        )
    else:
        slots = pairwise(rows, call.k, plan, tiles, pair, with_gradient, call.terms)
        # the near-pair kernel has no cheaper product
        cosine_terms = max(call.terms[0], 3)
        near_pairs(points, rows, slots, plan, tiles, pair, with_gradient, cosine_terms)

    # half space counts every pair twice; the square meets it twice, the upper triangle once
    twice = 2.0 if pair.half_space else 1.0
    once = twice * (1.0 if not with_gradient else 0.5)
    energy_unit, force_unit, scale, offset = once, twice, 1.0, 0.0
    if not call.is_direct:
        energy_unit, force_unit = once * pair.energy_unit, twice * pair.force_unit
        scale, offset = UNIT_SCALE.value, twice * pair.energy_offset
    in_slots = pair.arguments.range_unit
    units = Units(
        energy=energy_unit / in_slots,
        force=force_unit / scale / in_slots,
        axial=force_unit / in_slots,
        antipode_energy=2.0**pair.value_bits,
        antipode_force=2.0**pair.range_bits,
    )
    constants = set_constants(call.sizes, call.scales, offset, call.device)
    hold([plan.items, plan.row_tiles, plan.set_tiles, *constants])
    return finish(points, rows, slots, plan, tiles.block_m, pair, units, constants, with_gradient)
