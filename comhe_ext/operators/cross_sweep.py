"""The operators of rows against columns: what they take, their shapes, and their batching.

    comhe_ext::cross_sweep                   rows [B, N, k], columns [B, M, k] -> energy [B], row
                                             energies [B, N], gradients of both sides
    comhe_ext::cross_hessian_vector_product  the same and tangents of both sides -> like rows, like
                                             columns, derivatives of the row energies [B, N]

With weights a_i of the rows the energy is L = scale * sum_i a_i E_i, E_i = sum_j F(c_ij) over the
columns of another id. Neither has a derivative: `comhe_ext.operators.cross` puts them together.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comhe_ext import backends
from comhe_ext.kernels import portable
from comhe_ext.kernels.sweep import SweepRequest
from comhe_ext.operators.library import (
    LIBRARY,
    check_device,
    check_like,
    check_rows,
    compute_dtype,
    define,
    register_vmap,
)
from comhe_ext.operators.sweep import OPTIONS, SweepOptions, refuse_capture
from comhe_ext.verdicts import trusted

# --- raw operators --------------------------------------------------------------------------------


class _Cross(NamedTuple):
    """Rows against columns as the operators are handed them, checked."""

    rows: Tensor
    columns: Tensor
    row_ids: Tensor | None
    column_ids: Tensor | None
    weights: Tensor | None
    options: SweepOptions

    @classmethod
    def of(
        cls,
        rows: Tensor,
        columns: Tensor,
        row_ids: Tensor | None,
        column_ids: Tensor | None,
        weights: Tensor | None,
        arguments: Sequence[Any],
    ) -> "_Cross":
        options = SweepOptions.of(arguments)
        check_columns(rows, columns, row_ids, column_ids)
        if weights is not None:
            check_device("weights", weights, "rows", rows)
            if weights.shape != rows.shape[:2] or not weights.is_floating_point():
                raise ValueError(
                    f"`weights` must be floating-point of shape {tuple(rows.shape[:2])}, got "
                    f"{weights.dtype} {tuple(weights.shape)}"
                )
        return cls(rows, columns, row_ids, column_ids, weights, options)

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.rows, self.columns)

    def scale(self) -> float:
        """From the sum over the pairs of one set to its energy, as if all of them counted."""
        n, m = self.rows.shape[1], self.columns.shape[1]
        both_ends = 2.0 if self.options.pair.half_space else 1.0
        if self.options.reduction == "mean":
            return 1.0 / (both_ends * max(n * m, 1))
        return both_ends if self.options.reduction == "sum" else 1.0

    def requests(self, wanted: tuple[bool, bool], row_energies: bool) -> list[SweepRequest]:
        """Make what a backend is asked, one request a set."""
        dtype = self.rows.dtype if self.rows.dtype == self.columns.dtype else self.dtype
        rows, columns = (x.to(dtype).contiguous() for x in (self.rows, self.columns))
        weights = None if self.weights is None else self.weights.to(self.dtype).contiguous()
        n, scale, (pair, eps) = rows.shape[1], self.scale(), (self.options.pair, self.options.eps)
        return [
            SweepRequest(
                rows[index],
                (n,),
                (scale,),
                pair,
                eps,
                wanted[0],
                columns[index],
                None if self.row_ids is None else self.row_ids[index].contiguous(),
                None if self.column_ids is None else self.column_ids[index].contiguous(),
                None if weights is None else weights[index],
                row_energies,
                wanted[1],
            )
            for index in range(rows.shape[0])
        ]


def check_columns(
    rows: Tensor, columns: Tensor, row_ids: Tensor | None, column_ids: Tensor | None
) -> None:
    """Refuse columns that rows [B, N, k] cannot meet, and ids that do not belong to them."""
    check_rows("rows", rows, (3,))
    check_rows("columns", columns, (3,))
    check_device("columns", columns, "rows", rows)
    if rows.shape[0] != columns.shape[0] or rows.shape[2] != columns.shape[2]:
        raise ValueError(
            "`columns` must have as many sets and as wide rows as `rows`, got "
            f"{tuple(columns.shape)} and {tuple(rows.shape)}"
        )
    _check_ids("row_ids", row_ids, "rows", rows)
    _check_ids("column_ids", column_ids, "columns", columns)
    if (row_ids is None) != (column_ids is None):
        raise ValueError("`row_ids` and `column_ids` must be given together")


def _check_ids(name: str, ids: Tensor | None, other: str, like: Tensor) -> None:
    """Refuse ids that are not int32, one a row."""
    if ids is None:
        return
    check_device(name, ids, other, like)
    if ids.dtype != torch.int32 or ids.shape != like.shape[:2]:
        raise ValueError(
            f"`{name}` must be int32 of shape {tuple(like.shape[:2])}, got {ids.dtype} "
            f"{tuple(ids.shape)}"
        )


_CROSS = "Tensor rows, Tensor columns, Tensor? row_ids, Tensor? column_ids, Tensor? weights"


@define(
    f"cross_sweep({_CROSS}, bool rows_gradient, bool columns_gradient, bool row_energies, "
    f"{OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _cross_sweep(
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    weights: Tensor | None,
    rows_gradient: bool,
    columns_gradient: bool,
    row_energies: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    cross = _Cross.of(rows, columns, row_ids, column_ids, weights, arguments)
    wanted = rows_gradient, columns_gradient
    outputs = _empty(rows, columns, cross.dtype, wanted, row_energies)
    if rows.shape[0] == 0 or rows.shape[1] == 0 or columns.shape[1] == 0:
        return tuple(x.zero_() for x in outputs)
    requests = cross.requests(wanted, row_energies)
    name = cross.options.backend
    if name == backends.AUTO:
        pair, width = cross.options.pair, rows.shape[2]
        name = backends.choose(None, pair, rows.device, cross.dtype, width, "cross")
        if name == "triton" and not trusted(requests[0]):
            name = "torch"
    if name == "torch":
        refuse_capture(rows.device)
    backend = backends.load(name)
    for index, request in enumerate(requests):
        energy, to_rows, to_columns, energies = backend.sweep(request)
        results = energy.squeeze(0), energies, to_rows, to_columns
        for output, result in zip(outputs, results, strict=True):
            if result is not None:
                output[index].copy_(result)
    return outputs


@define(
    f"cross_hessian_vector_product({_CROSS}, Tensor? row_tangents, Tensor? column_tangents, "
    f"{OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
def _cross_hessian_vector_product(
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    weights: Tensor | None,
    row_tangents: Tensor | None,
    column_tangents: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    cross = _Cross.of(rows, columns, row_ids, column_ids, weights, arguments)
    tangents = (row_tangents, column_tangents)
    _check_tangents(cross, tangents)
    refuse_capture(rows.device)
    products = _empty_products(rows, columns, cross.dtype)
    if rows.shape[0] == 0 or rows.shape[1] == 0 or columns.shape[1] == 0:
        return tuple(x.zero_() for x in products)
    for index, request in enumerate(cross.requests((True, True), True)):
        along = [None if x is None else x[index].to(cross.dtype) for x in tangents]
        results = portable.cross_hessian_vector_product(request, *along)
        for product, result in zip(products, results, strict=True):
            product[index].copy_(result)
    return products


def _check_tangents(cross: _Cross, tangents: Sequence[Tensor | None]) -> None:
    for name, tangent, like in zip(("row", "column"), tangents, cross[:2], strict=True):
        if tangent is not None:
            check_like(f"{name}_tangents", tangent, f"{name}s", like)


def _empty(
    rows: Tensor,
    columns: Tensor,
    dtype: torch.dtype,
    wanted: tuple[bool, bool],
    row_energies: bool,
) -> tuple[Tensor, ...]:
    """Make what results are written to; of one that is not wanted a set has no element."""
    sets, n = rows.shape[:2]
    return (
        rows.new_empty(sets, dtype=dtype),
        rows.new_empty((sets, n) if row_energies else (sets, 0), dtype=dtype),
        rows.new_empty(rows.shape if wanted[0] else (sets, 0), dtype=dtype),
        rows.new_empty(columns.shape if wanted[1] else (sets, 0), dtype=dtype),
    )


def _empty_products(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    shapes = rows.shape, columns.shape, rows.shape[:2]
    return tuple(rows.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.register_fake("comhe_ext::cross_sweep", lib=LIBRARY)
def _(
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    weights: Tensor | None,
    rows_gradient: bool,
    columns_gradient: bool,
    row_energies: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    cross = _Cross.of(rows, columns, row_ids, column_ids, weights, arguments)
    wanted = rows_gradient, columns_gradient
    return _empty(rows, columns, cross.dtype, wanted, row_energies)


@torch.library.register_fake("comhe_ext::cross_hessian_vector_product", lib=LIBRARY)
def _(
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    weights: Tensor | None,
    row_tangents: Tensor | None,
    column_tangents: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    cross = _Cross.of(rows, columns, row_ids, column_ids, weights, arguments)
    _check_tangents(cross, (row_tangents, column_tangents))
    return _empty_products(rows, columns, cross.dtype)


register_vmap("cross_sweep", num_tensors=5)
register_vmap("cross_hessian_vector_product", num_tensors=7)
