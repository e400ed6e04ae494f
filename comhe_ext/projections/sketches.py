"""Random projections that cost less than products with dense matrices, all C of them together.

    comhe_ext::sketch          rows [V, N, d] -> projected rows [V, C, N, k]
    comhe_ext::sketch_adjoint  gradient in those [V, C, N, k] -> in the rows [V, N, d]

A dense matrix takes C k multiplications for each entry of the rows. Here they are

- `sparse`: s of the k entries of a column are random signs, the others zero. The coordinates, in
  random order, are cut into k / s blocks, and each block has s outputs of its own: small dense
  products, C s multiplications an entry.
- `hadamard`, `fourier`: the coordinates get random signs and are turned by an orthogonal transform,
  which spreads every row over all coordinates; each projection takes k of them at random. One
  transform serves all C projections, and no two of them take the same coordinate as long as there
  are enough. So they cover the space more evenly than independent matrices do.

Both operators are linear, each the derivative of the other.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from comhe_ext.operators.library import (
    LIBRARY,
    define,
    forward_mode,
    leave_trace,
    product,
    register_vmap,
)
from comhe_ext.operators.rows import pad

SketchKind: TypeAlias = Literal["sparse", "hadamard", "fourier"]
SKETCHES: tuple[str, ...] = get_args(SketchKind)

# Inputs of a block of `sparse`, at least: signs of few inputs are too far from a normal mixture
BLOCK_WIDTH = 32
# Entries of rows that a processor takes at a time, so that what lies between two steps stays in its
# caches. Fresh memory of the size of a weight would cost more than the transforms
ENTRIES_AT_ONCE = 2**18


class Sketch(NamedTuple):
    """C projections of d coordinates to k.

    Args:
        signs: [d]; of `sparse` [blocks, inputs of a block, C, outputs of a block].
        indices: the coordinates of a transform that each projection takes, [C, k]; of `sparse` the
            order of the inputs, [d].
        kind: see the top of this file.
    """

    signs: Tensor
    indices: Tensor
    kind: str

    def first(self, count: int) -> "Sketch":
        """Select the first projections."""
        if self.kind == "sparse":
            return Sketch(self.signs[:, :, :count], self.indices, self.kind)
        return Sketch(self.signs, self.indices[:count], self.kind)

    def project(self, rows: Tensor) -> Tensor:
        """Project rows [V, N, d] -> [V, C, N, k], in the dtype of the signs."""
        if not forward_mode():
            projected: Tensor = torch.ops.comhe_ext.sketch(rows, *self)
            return projected
        leave_trace()
        # torch's own operators carry tangents
        flat = _project(rows.to(self.signs.dtype).flatten(0, 1), *self)
        return flat.unflatten(0, rows.shape[:2]).transpose(1, 2)

    def matrices(self) -> Tensor:
        """Write the projections as dense matrices [C, k, d]."""
        width = self.indices.shape[0] if self.kind == "sparse" else self.signs.shape[0]
        identity = torch.eye(width, dtype=self.signs.dtype, device=self.signs.device)
        return self.project(identity.unsqueeze(0)).squeeze(0).mT


def draw_sketch(
    normal: Callable[[int], Tensor], kind: str, count: int, dim: int, width: int
) -> Sketch:
    """Draw `count` projections of `width` coordinates to `dim`.

    Args:
        normal: returns so many independent standard normal numbers.
        kind: see the top of this file.
    """
    if kind == "sparse":
        blocks, inputs = _blocks(dim, width)
        shape = (blocks, inputs, count, dim // blocks)
        numbers = normal(blocks * inputs * count * (dim // blocks) + width)
        # sorting independent numbers gives every order the same chance
        return Sketch(_signs(numbers[width:]).view(shape), numbers[:width].argsort(), kind)
    # in one order of all coordinates no projection meets another; those that are too many for it
    # take further orders, as few as they can, since full orders cover the space most evenly
    coordinates, each = _coordinates(kind, width), _projections_of_an_order(kind, dim, width)
    orders = -(-count // each)
    numbers = normal(width + orders * coordinates)
    order = numbers[width:].view(orders, -1).argsort(1)[:, : each * dim]
    if kind == "fourier":
        # real and imaginary parts alternate, and the first imaginary part is always zero
        order = order + (order > 0)
    return Sketch(_signs(numbers[:width]), order.reshape(-1, dim)[:count], kind)


def _signs(numbers: Tensor) -> Tensor:
    return torch.ones_like(numbers).copysign(numbers)


def _blocks(dim: int, width: int) -> tuple[int, int]:
    """Choose how many blocks to cut the coordinates into, and how wide they are."""
    fits = [b for b in range(1, dim + 1) if dim % b == 0 and width >= b * BLOCK_WIDTH]
    blocks = max(fits, default=1)
    return blocks, -(-width // blocks)


def _coordinates(kind: str, width: int) -> int:
    """Count the coordinates that a transform makes."""
    return _power_of_two(width) if kind == "hadamard" else width


def _projections_of_an_order(kind: str, dim: int, width: int) -> int:
    """Count how many projections find coordinates of their own."""
    return max(_coordinates(kind, width) // dim, 1)


def _power_of_two(width: int) -> int:
    return 1 << (width - 1).bit_length()


def _sizes(signs: Tensor, indices: Tensor, kind: str) -> tuple[int, int]:
    if kind == "sparse":
        return signs.shape[2], signs.shape[0] * signs.shape[3]
    return indices.shape[0], indices.shape[1]


# --- of rows [R, d] -------------------------------------------------------------------------------


def _project(rows: Tensor, signs: Tensor, indices: Tensor, kind: str) -> Tensor:
    """Project rows [R, d] -> [R, C, k]."""
    count, dim = _sizes(signs, indices, kind)
    if kind == "sparse":
        blocks, inputs = signs.shape[:2]
        parts = pad(rows.index_select(1, indices), blocks * inputs).unflatten(1, (blocks, inputs))
        outputs = product(parts.transpose(0, 1), signs.flatten(2))  # [blocks, R, C s]
        return outputs.unflatten(2, (count, -1)).permute(1, 2, 0, 3).flatten(2)
    if kind == "hadamard":
        columns = _hadamard_transform(pad(rows * signs, _power_of_two(rows.shape[1])))
    else:
        columns = torch.view_as_real(torch.fft.rfft(rows * signs)).flatten(1)
    return columns.index_select(1, indices.flatten()).unflatten(1, (count, dim))


def _pull_back(gradient: Tensor, signs: Tensor, indices: Tensor, kind: str, width: int) -> Tensor:
    """From the gradient in projected rows [R, C, k] to that in the rows [R, d]."""
    if kind == "sparse":
        blocks, _, _, outputs = signs.shape
        parts = gradient.unflatten(2, (blocks, outputs)).permute(2, 0, 1, 3).flatten(2)
        ordered = product(parts, signs.flatten(2).mT).transpose(0, 1).flatten(1)
        return ordered.index_select(1, indices.argsort())
    size = _power_of_two(width) if kind == "hadamard" else width // 2 * 2 + 2
    columns = gradient.new_zeros(gradient.shape[0], size)
    # order by order: a GPU adds what comes to one place at once in any sequence
    each = _projections_of_an_order(kind, indices.shape[1], width)
    for taken, part in zip(indices.split(each), gradient.split(each, 1), strict=True):
        columns.index_add_(1, taken.flatten(), part.flatten(1))
    if kind == "hadamard":
        return _hadamard_transform(columns)[:, :width] * signs
    # the inverse takes all frequencies twice, but the first and, of an even width, the last
    columns[:, 0] *= 2
    if width % 2 == 0:
        columns[:, width] *= 2
    spectrum = torch.view_as_complex(columns.unflatten(1, (-1, 2)))
    return torch.fft.irfft(spectrum, n=width, norm="forward") * (0.5 * signs)


def _hadamard_transform(rows: Tensor) -> Tensor:
    """Multiply rows [R, 2^p] by the Hadamard matrix, as the product of two small ones.

    Two products are faster than p passes of additions, each of which would go through memory.
    """
    power = rows.shape[1].bit_length() - 1
    left, right = (_hadamard_matrix(p, rows) for p in (power // 2, power - power // 2))
    square = rows.unflatten(1, (left.shape[0], right.shape[0]))
    return product(left, product(square, right)).flatten(1)


def _hadamard_matrix(power: int, like: Tensor) -> Tensor:
    matrix = like.new_ones(1, 1)
    for _ in range(power):
        top, bottom = torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)
        matrix = torch.cat([top, bottom])
    return matrix


# --- the operators --------------------------------------------------------------------------------


def _rows_at_once(rows: int, width: int, device: torch.device) -> int:
    if device.type != "cpu":
        return max(rows, 1)
    return max(ENTRIES_AT_ONCE * torch.get_num_threads() // width, 1)


@define("sketch(Tensor rows, Tensor signs, Tensor indices, str kind) -> Tensor")
def _sketch(rows: Tensor, signs: Tensor, indices: Tensor, kind: str) -> Tensor:
    sets, n, width = rows.shape
    flat = rows.reshape(-1, width)
    # neuron by neuron: the sweep copies its rows anyway, set by set
    out = signs.new_empty(sets, n, *_sizes(signs, indices, kind))
    step = _rows_at_once(sets * n, width, rows.device)
    for part, to in zip(flat.split(step), out.flatten(0, 1).split(step), strict=True):
        to.copy_(_project(part.to(signs.dtype), signs, indices, kind))
    return out.transpose(1, 2)


@define(
    "sketch_adjoint(Tensor gradient, Tensor signs, Tensor indices, str kind, SymInt width)"
    " -> Tensor"
)
def _sketch_adjoint(
    gradient: Tensor, signs: Tensor, indices: Tensor, kind: str, width: int
) -> Tensor:
    sets, _, n, _ = gradient.shape
    out = signs.new_empty(sets, n, width)
    step = _rows_at_once(n, width, gradient.device)
    for part, to in zip(gradient.transpose(1, 2), out, strict=True):
        for g, rows in zip(part.split(step), to.split(step), strict=True):
            rows.copy_(_pull_back(g.to(signs.dtype), signs, indices, kind, width))
    return out


@torch.library.register_fake("comhe_ext::sketch", lib=LIBRARY)
def _(rows: Tensor, signs: Tensor, indices: Tensor, kind: str) -> Tensor:
    return signs.new_empty(*rows.shape[:2], *_sizes(signs, indices, kind)).transpose(1, 2)


@torch.library.register_fake("comhe_ext::sketch_adjoint", lib=LIBRARY)
def _(gradient: Tensor, signs: Tensor, indices: Tensor, kind: str, width: int) -> Tensor:
    return signs.new_empty(gradient.shape[0], gradient.shape[2], width)


def _setup_sketch(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, signs, indices, ctx.kind = inputs
    ctx.width, ctx.dtype = rows.shape[2], rows.dtype
    ctx.save_for_backward(signs, indices)


def _sketch_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    to_rows = torch.ops.comhe_ext.sketch_adjoint(gradient, *ctx.saved_tensors, ctx.kind, ctx.width)
    return to_rows.to(ctx.dtype), None, None, None


def _setup_adjoint(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gradient, signs, indices, ctx.kind, _ = inputs
    ctx.dtype = gradient.dtype
    ctx.save_for_backward(signs, indices)


def _adjoint_backward(ctx: Any, rows: Tensor) -> tuple[Tensor | None, ...]:
    projected = torch.ops.comhe_ext.sketch(rows, *ctx.saved_tensors, ctx.kind)
    return projected.to(ctx.dtype), None, None, None, None


torch.library.register_autograd(
    "comhe_ext::sketch", _sketch_backward, setup_context=_setup_sketch, lib=LIBRARY
)
torch.library.register_autograd(
    "comhe_ext::sketch_adjoint", _adjoint_backward, setup_context=_setup_adjoint, lib=LIBRARY
)
register_vmap("sketch", 1)
register_vmap("sketch_adjoint", 1)
