"""The sweep over two spaces at once: how far projections turn rows against each other.

    S   = sum_{i != j} phi(a_ij, b_ij)       a = <v_i, v_j>, b = <u_i, u_j> of the projected rows
    phi = (b - a)^2  or  (arccos b - arccos a)^2
    dS/dp_i = (G_i - v_i <v_i, G_i>) / nu_i,  G_i = 2 sum_j dphi/da v_j      likewise for u and b

Blocks of both matrices of cosines come from GEMMs, as in `large_k`. The kernels of `angle_pairs`
turn them into phi and its derivatives, and GEMMs multiply those back onto the rows.

The products keep all halves, whatever precision is asked for: phi squares a small difference.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import backend
from .angle_pairs import SLOPE_SCALE, SpaceRows, difference_kernel, near_difference_kernel
from .finish import store_gradient
from .large_k import (
    BLOCK_ELEMENTS,
    COEFFICIENT_COLS,
    COEFFICIENT_ROWS,
    NEAR_COLUMNS,
    ROW_TILE,
    Block,
    Operands,
    blocks,
)
from .pair_terms import UNIT_SCALE
from .plan import NEAR_BLOCK, Plan, hold, load_row_tile, make_plan
from .project_normalize import UnitRows, normalize

# products of the fp16 halves in a cosine and in a force
TERMS = (3, 3)


@triton.jit(do_not_specialize=["num_rows", "packed_rows"])
def difference_gradient_kernel(
    space,
    tiles_ptr,
    force_ptr,
    gradient_ptr,
    k,
    slot_width,
    num_rows,
    packed_rows,
    SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (row tiles of all sets,). Gradient [M N, k] f32.

    SHARED: the space has the rows of one set, num_rows of them, packed as packed_rows.
    """
    row0, source0, valid, slot0, num_slots, index = load_row_tile(tiles_ptr, tl.program_id(0))
    lane = tl.arange(0, BLOCK_M)
    mask_m = lane < valid
    points_ptr = space.points
    offs_m = row0.to(tl.int64) + lane
    if SHARED:
        points_ptr -= index.to(tl.int64) * num_rows * k
        offs_m -= index.to(tl.int64) * packed_rows
    inv_nu = tl.load(space.rows.inv_nu + offs_m)
    store_gradient(
        (points_ptr, gradient_ptr, (source0.to(tl.int64) + lane) * k, mask_m, inv_nu),
        (force_ptr, slot0.to(tl.int64) * BLOCK_M + lane, num_slots, slot_width),
        tl.zeros((BLOCK_M,), dtype=tl.float64),
        2.0 / UNIT_SCALE,
        inv_nu,
        k,
        BLOCK_M,
        BLOCK_K,
    )


@dataclass(frozen=True)
class Space:
    """The rows of all sets in one space, or of the one set that all have, and their forces."""

    arguments: SpaceRows
    operands: Operands
    num_sets: int
    num_rows: int  # of a set
    packed_rows: int
    force: Tensor | None  # [M packed_rows, width], UNIT_SCALE G / 2 but for the part along v

    @classmethod
    def of(cls, points: Tensor, num_sets: int, shared: bool, with_force: bool) -> "Space":
        """Normalize and pack the rows of `num_sets` sets, one after another or `shared`."""
        num_rows, k = len(points) // (1 if shared else num_sets), points.shape[1]
        plan = _plan(num_rows, 1 if shared else num_sets, points.device)
        # a GEMM needs no power of two
        width = -(-k // 16) * 16
        rows = UnitRows.empty(plan.packed_rows, width, False, False, points.device)
        normalize(points, rows, plan, ROW_TILE, 0.0)
        hold([plan.row_tiles])
        packed_rows = -(-num_rows // ROW_TILE) * ROW_TILE
        force = None
        if with_force:
            force = torch.zeros(num_sets * packed_rows, width, device=points.device)
        operands = Operands.of(rows, TERMS)
        return cls(SpaceRows(points, rows), operands, num_sets, num_rows, packed_rows, force)

    @property
    def k(self) -> int:
        return self.arguments.points.shape[1]

    @property
    def shared(self) -> bool:
        """Whether all sets have the same rows."""
        return len(self.arguments.points) < self.num_sets * self.num_rows

    def begin(self, index: int) -> int:
        """Where a set begins among the packed rows."""
        return 0 if self.shared else index * self.packed_rows

    def shift(self, index: int) -> int:
        """How far a packed row of a set is from the caller's row."""
        return 0 if self.shared else index * (self.packed_rows - self.num_rows)

    def cosines(self, index: int, block: Block) -> Tensor:
        """COSINE_SCALE c of a block of a set."""
        begin = self.begin(index)
        return self.operands.cosine_block(_after(begin, block.rows), _after(begin, block.cols))

    def slopes(self, block: Block) -> Tensor:
        """Room for the derivatives of a block; without forces nothing."""
        rows, cols = (part.stop - part.start for part in (block.rows, block.cols))
        shape = (0,) if self.force is None else (rows, 2, cols)
        return torch.empty(shape, dtype=torch.float16, device=self.arguments.points.device)

    def force_of(self, index: int, block: Block) -> Tensor | None:
        """Select the forces on the rows of a block of a set."""
        if self.force is None:
            return None
        return self.force[_after(index * self.packed_rows, block.rows)]

    def gradient(self, plan: Plan) -> Tensor | None:
        """Gradient [M, N, k] float32, from the forces without their part along v."""
        if self.force is None:
            return None
        gradient = torch.empty(
            self.num_sets, self.num_rows, self.k, dtype=torch.float32, device=self.force.device
        )
        difference_gradient_kernel[(plan.num_row_tiles,)](
            self.arguments,
            plan.row_tiles,
            self.force,
            gradient,
            self.k,
            self.force.shape[1],
            self.num_rows,
            self.packed_rows,
            SHARED=self.shared,
            BLOCK_M=ROW_TILE,
            BLOCK_K=min(2048 // ROW_TILE, triton.next_power_of_2(self.k)),
        )
        return gradient


def is_shared(x: Tensor) -> bool:
    """Whether the sets [M, N, k] are one set, expanded."""
    return len(x) > 1 and x.stride(0) == 0


def _after(begin: int, part: slice) -> slice:
    return slice(begin + part.start, begin + part.stop)


def _plan(num_rows: int, num_sets: int, device: torch.device) -> Plan:
    """Tables of sets of one size, a slot a row tile."""
    return make_plan((num_rows,) * num_sets, ROW_TILE, ROW_TILE, 1, False, device)


def angle_difference(
    rows: Tensor,
    projected: Tensor,
    angle: bool,
    rows_gradient: bool,
    projected_gradient: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum phi over the ordered pairs of each set, and compute its gradient in both arguments.

    Args:
        rows: [M, N, d]; one set expanded to M is normalized and multiplied once.
        projected: [M, N, k], the same rows projected.
        angle: compare angles, not cosines.
        rows_gradient, projected_gradient: which of both are wanted.

    Returns:
        [M], [M, N, d] and [M, N, k], float32; None for a gradient that is not wanted.

    Raises:
        TypeError: a dtype other than float32, float16 and bfloat16.
        ValueError: tensors elsewhere than on a GPU.
    """
    backend.check(rows, "rows")
    backend.check(projected, "projected")
    num_sets, num_rows, _ = projected.shape
    wanted = (rows_gradient, projected_gradient)
    points = []
    for x in (rows, projected):
        # rows without columns are dead rows, and so are rows of one zero
        points.append(x if x.shape[2] else x.new_zeros(*x.shape[:2], 1))
    if not num_sets or not num_rows:
        zeros = (torch.zeros(x.shape, device=x.device) for x in (rows, projected))
        gradients = [x if in_demand else None for x, in_demand in zip(zeros, wanted, strict=True)]
        return torch.zeros(num_sets, device=rows.device), gradients[0], gradients[1]
    with backend.on_device(rows.device):
        spaces = []
        for x, in_demand in zip(points, wanted, strict=True):
            shared = is_shared(x)
            packed = (x[0] if shared else x.flatten(0, 1)).contiguous()
            spaces.append(Space.of(packed, num_sets, shared, in_demand))
        plan = _plan(num_rows, num_sets, rows.device)
        total = _sweep(spaces[0], spaces[1], angle)
        gradients = [space.gradient(plan) for space in spaces]
        hold([plan.row_tiles])
    to_rows, to_projected = (
        gradient if gradient is None else gradient[..., : x.shape[2]]
        for gradient, x in zip(gradients, (rows, projected), strict=True)
    )
    return total, to_rows, to_projected


def _sweep(a_space: Space, b_space: Space, angle: bool) -> Tensor:
    """Sum phi of each set [M], float32, and leave the forces in the spaces."""
    num_sets, num_rows = b_space.num_sets, b_space.num_rows
    device = b_space.arguments.points.device
    sums = torch.zeros(num_sets, b_space.packed_rows, dtype=torch.float64, device=device)
    low, high = BLOCK_ELEMENTS
    elements = min(max(num_rows * (a_space.k + b_space.k), low), high)
    plan = _plan(num_rows, 1, device)
    for block in blocks((num_rows,), plan, ROW_TILE, elements, False):
        a = None
        for index in range(num_sets):
            if a is None or not a_space.shared:
                a = a_space.cosines(index, block)
            b = b_space.cosines(index, block)
            _add_block(index, block, (a_space, a), (b_space, b), sums[index, block.rows], angle)
    return sums[:, :num_rows].sum(1).float()


def _add_block(
    index: int,
    block: Block,
    a_side: tuple[Space, Tensor],
    b_side: tuple[Space, Tensor],
    sums: Tensor,
    angle: bool,
) -> None:
    """Add what the columns of a block do to its rows in both spaces; the sides have the cosines."""
    sides = (a_side, b_side)
    num_rows, num_cols = a_side[1].shape
    near = torch.empty(num_rows, dtype=torch.int32, device=sums.device)
    slopes = [space.slopes(block) for space, _ in sides]
    forces = [space.force_of(index, block) for space, _ in sides]
    difference_kernel[(triton.cdiv(num_rows, COEFFICIENT_ROWS),)](
        a_side[1],
        b_side[1],
        slopes[0],
        slopes[1],
        sums,
        near,
        num_cols,
        block.valid_cols,
        block.diagonal,
        ANGLE=angle,
        A_SLOPES=forces[0] is not None,
        B_SLOPES=forces[1] is not None,
        FAST=backend.has_fast_functions(sums.device),
        BLOCK_M=COEFFICIENT_ROWS,
        BLOCK_N=COEFFICIENT_COLS,
        num_warps=4,
    )
    for (space, _), slope, force in zip(sides, slopes, forces, strict=True):
        if force is not None:
            cols = _after(space.begin(index), block.cols)
            space.operands.add_force(force, slope, cols, 1.0 / SLOPE_SCALE.value)
    if not angle:
        return
    for own, other, force in ((b_side, a_side, forces[1]), (a_side, b_side, forces[0])):
        with_sum = own is b_side
        if force is None and not with_sum:
            continue
        parts = 1 if force is None else triton.cdiv(own[0].k, NEAR_COLUMNS)
        near_difference_kernel[(triton.cdiv(num_rows, NEAR_BLOCK), parts)](
            own[1],
            other[1],
            own[0].arguments,
            other[0].arguments,
            sums,
            sums if force is None else force,
            near,
            num_cols,
            block.valid_rows,
            block.valid_cols,
            block.diagonal,
            block.rows.start,
            block.cols.start,
            own[0].begin(index),
            own[0].shift(index),
            other[0].begin(index),
            other[0].shift(index),
            own[0].k,
            other[0].k,
            own[1].shape[1] if force is None else force.shape[1],
            WITH_SUM=with_sum,
            WITH_FORCE=force is not None,
            BLOCK_M=NEAR_BLOCK,
            BLOCK_N=NEAR_BLOCK,
            BLOCK_K=NEAR_COLUMNS,
            num_warps=4,
        )
