"""The angle-preserving loss of rows that are spread over ranks, by cosines.

The squares of all cosines' differences follow from moments,

    sum (c'_ij - c_ij)^2 = |V'^T V'|^2 - 2 |V'^T V|^2 + |V^T V|^2

of the unit rows V and, after the projection, V', so that k k + k d numbers of each projection, and
d (d + 1) / 2 of all, are added up over the ranks, and no row travels. Angles have no such moments.
"""

import torch
from torch import Tensor

from comhe_ext.operators.library import compute_dtype, product
from comhe_ext.operators.rows import unit_rows
from comhe_ext.sampled.recompute import recomputed
from comhe_ext.sharded.collectives import total
from comhe_ext.sharded.rows import ShardedRows
from comhe_ext.sharded.sampled import packed

# numbers of unit rows, in float64, that exist at a time
CHUNK = 1 << 22


def cosine_differences(rows: ShardedRows, matrices: Tensor) -> Tensor:
    """Square the differences of cosines, and sum them over ordered pairs of rows -> [V, C].

    The same on all ranks, and differentiable as often as torch's operators are.

    Args:
        rows: spread over ranks by rows alone.
        matrices: [C, k, d], that project them, the same on all ranks.
    """
    local = rows.local.to(compute_dtype(rows.local, matrices))
    sets, _, d = local.shape
    count, k = matrices.shape[:2]
    projected = rows.points(matrices).unflatten(0, (sets, count))
    step = max(CHUNK // max(sets * (count * k + d), 1), 1)
    parts = zip(local.split(step, 1), projected.split(step, 2), strict=True)
    moments = torch.stack([recomputed(_moments, *part) for part in parts]).sum(0)
    moments = total(moments, rows.rows.groups)
    own, of_rows = moments.split([count * (k * k + k * d + 1), d * (d + 1) // 2], 1)
    squares, across, themselves = own.unflatten(1, (count, -1)).split([k * k, k * d, 1], 2)
    sums = squares.square().sum(2) - 2.0 * across.square().sum(2)
    sums = sums + of_rows.square().sum(1, keepdim=True) - themselves.squeeze(2)
    # rounding may leave less than nothing where all cosines are kept
    return sums.clamp_min(0.0).to(local.dtype)


def _moments(rows: Tensor, projected: Tensor) -> Tensor:
    """Sum over rows [V, n, d] and [V, C, n, k] what the loss consists of, [V, numbers], float64."""
    v, p = unit_rows(rows).double(), unit_rows(projected).double()
    across = product(p.mT, v.unsqueeze(1).expand(-1, p.shape[1], -1, -1))
    # a row differs from itself where one of both is dead
    themselves = (p.square().sum(-1) - v.square().sum(-1)[:, None]).square().sum(-1, keepdim=True)
    own = torch.cat([product(p.mT, p).flatten(2), across.flatten(2), themselves], 2)
    return torch.cat([own.flatten(1), packed(product(v.mT, v))], 1)
