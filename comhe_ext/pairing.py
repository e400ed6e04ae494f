"""Rows against columns: ids, counts of pairs, and the calls of the operators."""

from dataclasses import dataclass

import torch
from torch import Tensor

from comhe_ext.operators.cross import cross_energy
from comhe_ext.operators.distance import antipode_energies, distance_to
from comhe_ext.operators.nearest import nearest_index
from comhe_ext.operators.sweep import SweepOptions


@dataclass(frozen=True)
class NumberedIds:
    """Ids of rows [B, N] and columns [B, M], numbered from 0 on, int32."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(
        cls, row_ids: Tensor | None, column_ids: Tensor | None, rows: Tensor, columns: Tensor
    ) -> "NumberedIds | None":
        """Give the ids of each set, any integers, numbers from 0 on; a GPU is not waited for."""
        if row_ids is None or column_ids is None:
            return None
        n, sets = rows.shape[1], rows.shape[0]
        both = torch.cat(
            [row_ids.long().expand(sets, -1), column_ids.long().expand(sets, -1)], dim=1
        )
        ordered, order = both.sort(dim=1)
        new = torch.zeros_like(ordered)
        new[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).long()
        numbers = torch.zeros_like(both).scatter(1, order, new.cumsum(1)).int()
        return cls(numbers[:, :n], numbers[:, n:])

    def sum_of_met(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Sum over each row's columns of another id the value of a column -> like `rows` [B, N].

        Args:
            rows: [B, N], what it is for.
            columns: [B, M] values, of the dtype of the result.
        """
        total = columns.sum(1, keepdim=True)
        width = rows.shape[1] + columns.shape[1]
        of_id = columns.new_zeros(columns.shape[0], width)
        of_id = of_id.scatter_add(1, self.columns.long(), columns)
        return total - of_id.gather(1, self.rows.long())


def tensors_of(ids: NumberedIds | None) -> tuple[Tensor | None, Tensor | None]:
    """Give the ids as the operators take them."""
    return (None, None) if ids is None else (ids.rows, ids.columns)


def cross_energies(
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    options: SweepOptions,
) -> Tensor:
    """Energy of rows [.., N, d] against columns [.., M, d]; see `functional.pair_energy`."""
    batched = rows.dim() == 3
    if not batched:
        rows, columns = rows.unsqueeze(0), columns.unsqueeze(0)
    ids = NumberedIds.of(row_ids, column_ids, rows, columns)
    energies = cross_energy(rows, columns, *tensors_of(ids), options)
    if ids is not None and options.reduction == "mean":
        # the operator has divided by the number of all pairs
        met = count_met(ids, rows, columns)
        factor = rows.shape[1] * columns.shape[1] / met.clamp_min(1.0)
        energies = energies * factor.to(energies.dtype)
    return energies if batched else energies.squeeze(0)


def count_met(ids: NumberedIds | None, rows: Tensor, columns: Tensor) -> Tensor:
    """Count the pairs of rows [B, N, d] and columns [B, M, d] that meet, float64 [B]."""
    if ids is not None:
        ones = torch.ones(columns.shape[:2], dtype=torch.float64, device=columns.device)
        return ids.sum_of_met(rows, ones).sum(1)
    count = rows.shape[1] * columns.shape[1]
    return torch.full(rows.shape[:1], count, dtype=torch.float64, device=rows.device)


def row_energies(rows: Tensor, options: SweepOptions) -> Tensor:
    """Sum over all others of each of rows [.., N, d]; see `functional.pair_energy`."""
    numbers = torch.arange(rows.shape[-2], device=rows.device)
    energies = cross_energies(rows, rows, numbers, numbers, options)
    if not options.pair.half_space:
        return energies
    antipodes = antipode_energies(rows, options.pair, options.eps)
    return energies + antipodes.to(energies.dtype)


def nearest_rows(
    rows: Tensor,
    columns: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    half_space: bool,
    angular: bool,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Distance and index of the nearest of each row; see `functional.nearest`."""
    batched = rows.dim() == 3
    if not batched:
        rows = rows.unsqueeze(0)
        columns = None if columns is None else columns.unsqueeze(0)
    others = rows if columns is None else columns
    ids = tensors_of(NumberedIds.of(row_ids, column_ids, rows, others))
    index = nearest_index(rows, columns, *ids, half_space, eps, backend)
    distance = distance_to(rows, columns, index, half_space, angular, eps, backend)
    return (distance, index) if batched else (distance.squeeze(0), index.squeeze(0))
