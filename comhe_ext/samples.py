"""Cross sets, rows whose nearest are sought, and rows in two spaces, by which kernels are checked.

`comhe_ext.verdicts` does so.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from comhe_ext.kernels.sweep import DifferenceRequest, NearestRequest, SweepRequest

if TYPE_CHECKING:  # imports Triton
    from comhe_ext.kernels.gpu.variant import Variant


def integers(generator: torch.Generator, largest: int, *shape: int) -> Tensor:
    """Draw small integers, which every arithmetic holds exactly."""
    return torch.randint(
        -largest, largest + 1, shape, generator=generator, device="cpu", dtype=torch.float64
    )


def sample_columns(variant: "Variant", device: torch.device) -> SweepRequest:
    """Make rows and columns: several tiles and ragged ones, a near and an antipodal pair."""
    generator = torch.Generator("cpu").manual_seed(0)
    n, m = 2 * variant.tiles.block_m + 37, 3 * variant.tiles.block_n + 6
    rows, columns = (integers(generator, 127, count, variant.k) for count in (n, m))
    columns[-1], columns[-2] = rows[0], -rows[1]
    columns[-2:, 0] -= columns[-2:, 0].sign() + (columns[-2:, 0] == 0)
    rows, columns = (x.to(device, variant.dtype) for x in (rows, columns))
    request = SweepRequest(
        rows, [n], [1.0 / (n * m)], variant.pair, 0.0, variant.gradient, columns, row_energies=True
    )
    if "ids" in variant.kind:
        ids = [torch.arange(count, dtype=torch.int32, device=device) % 7 for count in (n, m)]
        # the rows of the two pairs and their columns have others
        ids[1][-2:] = 7
        request = replace(request, row_ids=ids[0], column_ids=ids[1])
    if "weights" in variant.kind:
        request = replace(request, row_weights=torch.arange(1.0, n + 1.0, device=device) / n)
    return request


def sample_nearest(variant: "Variant", device: torch.device) -> NearestRequest:
    """Make such rows, and columns and ids where the variant has them."""
    columns = sample_columns(variant, device)
    rows = columns.points
    rows[-1], rows[-2] = 3 * rows[0], -rows[1]
    request = NearestRequest(rows, [len(rows)], variant.pair.half_space)
    if "columns" not in variant.kind:
        return request
    return replace(
        request,
        columns=columns.columns,
        row_ids=columns.row_ids,
        column_ids=columns.column_ids,
    )


def sample_difference(variant: "Variant", device: torch.device) -> DifferenceRequest:
    """Make two sets in two spaces: each has a near pair there, and an antipodal one in both."""
    assert variant.compared is not None
    generator = torch.Generator("cpu").manual_seed(0)
    n = 2 * variant.tiles.block_m + 37
    spaces = []
    for (k, dtype), shared, first in (
        (variant.compared, "shared rows" in variant.kind, 0),
        ((variant.k, variant.dtype), "shared projection" in variant.kind, 1),
    ):
        rows = integers(generator, 127, 1 if shared else 2, n, k)
        rows[:, -1], rows[:, -2] = rows[:, first], -rows[:, 2]
        rows[:, -2:, 0] -= rows[:, -2:, 0].sign() + (rows[:, -2:, 0] == 0)
        spaces.append(rows.to(device, dtype).expand(2, -1, -1))
    flags = "angles" in variant.kind, "rows' gradient" in variant.kind, variant.gradient
    return DifferenceRequest(spaces[0], spaces[1], *flags)
