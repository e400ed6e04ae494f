"""The sweep on a GPU: project and normalize, then one of three ways to meet all pairs, then finish.

    k <= 8      direct      differences on the CUDA cores
    k <= 128    pairwise    tensor cores, near_pairs for what they cannot resolve
    k > 128     large_k     blocks of the cosine matrix through GEMMs

All sets go through the same launches. Shapes alone decide tables and launch shapes: nothing is
tuned at run time and nothing waits for the GPU, so a CUDA graph captures a call whose shapes were
seen before.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .direct import direct
from .finish import finish
from .large_k import large_k
from .near_pairs import near_pairs
from .pair_function import UNIT_SCALE, Pair, PairConstants, pair_constants
from .pairwise import pairwise
from .plan import (
    MAX_DIRECT,
    MAX_WIDTH,
    Plan,
    Tiles,
    make_plan,
    row_width,
    set_constants,
    splits_for,
    tiles_for,
)
from .project_normalize import UnitRows, normalize, project_normalize

# products of the fp16 halves kept (cosine, force), by torch.get_float32_matmul_precision():
# relative gradient error on random rows 3e-7, 3e-4 and 6e-4
TERMS = {"highest": (3, 3), "high": (3, 1), "medium": (1, 1)}
LARGE_K_BLOCK_M = 64
# tables that captured graphs read at every replay, so they may not leave with the cache
_CAPTURED: list[object] = []


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def target_of(device: torch.device) -> str:
    """Name of a device in the tile table: "sm_90", "gfx942", "interpreter"."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def check(points: Tensor) -> None:
    """Raise for what these kernels cannot take."""
    if points.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            "`points` must be float32, float16 or bfloat16 for backend 'triton', "
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
            f"`points` must be on a GPU for backend 'triton', got a {points.device.type} tensor: "
            "move it there or use another backend"
        )


@dataclass(frozen=True)
class Call:
    """What shapes and settings decide about one sweep."""

    sizes: tuple[int, ...]
    scales: tuple[float, ...]
    pair: PairConstants
    k: int
    with_gradient: bool
    device: torch.device

    @property
    def fast(self) -> bool:
        """Whether NVIDIA's approximate special functions are there."""
        return self.device.type == "cuda" and torch.version.hip is None

    @property
    def is_direct(self) -> bool:
        return self.k <= MAX_DIRECT

    @property
    def is_large(self) -> bool:
        return self.k > MAX_WIDTH

    @property
    def width(self) -> int:
        return self.k if self.is_direct else row_width(self.k)

    def tiles(self) -> Tiles:
        """Launch shape, of which large k knows only the rows of a tile."""
        if self.is_large:
            return Tiles(LARGE_K_BLOCK_M, LARGE_K_BLOCK_M, 4)
        target = target_of(self.device)
        return tiles_for(target, self.k, max(self.sizes), self.pair.angular)

    def plan(self, tiles: Tiles) -> Plan:
        """Tables; square with gradient, upper triangle without, one slot a row tile for large k."""
        splits, upper = 1, False
        if not self.is_large:
            row_numbers = 2 * self.width if self.is_direct else self.width
            splits = splits_for(self.sizes, tiles.block_m, self.k, row_numbers, self.with_gradient)
            upper = not self.with_gradient
        return make_plan(self.sizes, tiles.block_m, tiles.block_n, splits, upper, self.device)

    def on_device(self) -> AbstractContextManager[object]:
        """Kernels go to the current device: make it the tensors' own."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def sweep(
    points: Tensor,
    sizes: Sequence[int],
    scales: Sequence[float],
    pair: Pair,
    eps: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Scaled sum over the pairs of each set, and its gradient in the rows.

    Args:
        points: [T, k] contiguous raw rows of all sets one after another.
        sizes: rows of each set, B numbers that add up to T.
        scales: factor of each set's sum.
        pair: the pair function.
        eps: added to the squared norms.
        with_gradient: without it only the upper triangle is visited, and nothing but energies.

    Returns:
        Energy [B] and gradient [T, k] (or None), float32.
    """
    check(points)
    num_rows, k = points.shape
    if num_rows == 0:
        gradient = points.new_zeros(0, k, dtype=torch.float32)
        return gradient.new_zeros(len(sizes)), gradient if with_gradient else None
    if k == 0:
        # rows without columns are dead rows, and so are rows of one zero
        zeros = points.new_zeros(num_rows, 1)
        energy, of_zeros = sweep(zeros, sizes, scales, pair, eps, with_gradient)
        return energy, of_zeros[:, :0] if of_zeros is not None else None
    call = Call(tuple(sizes), tuple(scales), pair_constants(pair), k, with_gradient, points.device)
    with call.on_device():
        tiles = call.tiles()
        plan = call.plan(tiles)
        rows = normalize(points, plan, tiles.block_m, call.width, eps, call.is_direct)
        return _meet_pairs(call, points, rows, plan, tiles)


def project_sweep(
    weights: Sequence[Tensor],
    matrices: Sequence[Tensor],
    scales: Sequence[float],
    pair: Pair,
    eps: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The sweep of the projected rows of several weights, projection included.

    One launch projects and normalizes all of them, whatever their widths.

    Args:
        weights: [N_l, d_l] each, of one dtype.
        matrices: [C_l, k, d_l] each, of that dtype, one k. Weight l makes C_l sets of N_l rows.
        scales: factor of each set's sum.
        pair, eps, with_gradient: as for `sweep`.

    Returns:
        Energy of each set and the gradient in the projected rows [sum C_l N_l, k] (or None),
        float32; `projection_gradients` carries it on.
    """
    weights = [weight.contiguous() for weight in weights]
    matrices = [matrix.contiguous() for matrix in matrices]
    k = matrices[0].shape[1]
    sizes = tuple(
        n for w, m in zip(weights, matrices, strict=True) for n in [w.shape[0]] * m.shape[0]
    )
    check(weights[0])
    if not 0 < k <= MAX_WIDTH or not sum(sizes):
        projected = [
            (w.float() @ m.float().mT).flatten(0, 1) for w, m in zip(weights, matrices, strict=True)
        ]
        return sweep(torch.cat(projected), sizes, scales, pair, eps, with_gradient)
    call = Call(sizes, tuple(scales), pair_constants(pair), k, with_gradient, weights[0].device)
    with call.on_device():
        tiles = call.tiles()
        plan = call.plan(tiles)
        points, rows = project_normalize(
            weights,
            matrices,
            plan,
            tiles.block_m,
            call.width,
            eps,
            call.is_direct,
            projection_precision(call.device),
        )
        return _meet_pairs(call, points, rows, plan, tiles)


def projection_precision(device: torch.device) -> str:
    """Triton's name of the float32 product that torch's setting asks for."""
    if device.type == "cuda" and torch.version.hip is not None:
        return "bf16x6"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def projection_gradients(
    gradient: Tensor, weight: Tensor, matrices: Tensor
) -> tuple[Tensor, Tensor]:
    """From the gradient in the projected rows [C, N, k] to those in the weight and the matrices.

    Two products: dW = sum_c g_c P_c over the depth C k, and dP_c = g_c^T W.
    """
    num_matrices, k, d = matrices.shape
    by_row = gradient.transpose(0, 1).reshape(weight.shape[0], num_matrices * k)
    grad_weight = by_row @ matrices.reshape(num_matrices * k, d).to(gradient.dtype)
    grad_matrices = by_row.mT @ weight.to(gradient.dtype)
    return grad_weight, grad_matrices.view(num_matrices, k, d)


def _meet_pairs(
    call: Call, points: Tensor, rows: UnitRows, plan: Plan, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    """From unit rows to energies and the gradient in `points`."""
    pair, with_gradient, fast = call.pair, call.with_gradient, call.fast
    terms = TERMS[torch.get_float32_matmul_precision()]
    if call.is_direct:
        slots = direct(rows, plan, tiles, pair, with_gradient, fast)
    elif call.is_large:
        slots = large_k(
            points, rows, call.sizes, plan, tiles.block_m, pair, with_gradient, terms, fast
        )
    else:
        slots = pairwise(rows, call.k, plan, tiles, pair, with_gradient, terms, fast)
        near_pairs(points, rows, slots, plan, tiles, pair, with_gradient, fast)

    # half space counts every pair twice; the square meets it twice, the upper triangle once
    twice = 2.0 if pair.half_space else 1.0
    once = twice * (1.0 if not with_gradient else 0.5)
    units, offset = (once, twice, twice), 0.0
    if not call.is_direct:
        offset = twice * pair.energy_offset
        force_unit = twice * pair.force_unit
        units = (once * pair.energy_unit, force_unit / UNIT_SCALE.value, force_unit)
    constants = set_constants(call.sizes, call.scales, offset, call.device)
    if call.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _CAPTURED.append((plan, constants))
    return finish(
        points, rows, slots, plan, tiles.block_m, pair, units, constants, with_gradient, fast
    )
