"""Rows to compute the energy of, from random ones to the hardest.

They are made in float64 and rounded to the dtype asked for, so the exact energy has to be computed
from the rounded rows.
"""

import math

import torch
from torch import Tensor


def random_rows(
    n: int,
    k: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw [n, k] Gaussian rows: uniform directions, lengths about sqrt(k)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, k, generator=generator, dtype=torch.float64)
    return rows.to(device=device, dtype=dtype)


def paired_rows(
    n: int,
    k: int,
    angle: float,
    *,
    pairs: int = 8,
    antipodal: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw random rows, the first `pairs` with a twin at `angle` radians among the last ones.

    antipodal: the twin lies at `angle` from the opposite of the row.
    """
    rows = random_rows(n, k, seed=seed, dtype=torch.float64)
    unit = torch.nn.functional.normalize(rows[:pairs])
    across = random_rows(pairs, k, seed=seed + 1, dtype=torch.float64)
    across = across - unit * (across * unit).sum(1, keepdim=True)
    across = torch.nn.functional.normalize(across)
    twins = math.cos(angle) * unit + math.sin(angle) * across
    # a length of its own: nothing may depend on twins being equally long
    lengths = rows[n - pairs :].norm(dim=1, keepdim=True)
    rows[n - pairs :] = (-lengths if antipodal else lengths) * twins
    return rows.to(device=device, dtype=dtype)


def collapsed_rows(
    n: int,
    k: int,
    spread: float,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw rows within about `spread` radians of one direction; 0 makes them equal."""
    rows = random_rows(n + 1, k, seed=seed, dtype=torch.float64)
    unit = torch.nn.functional.normalize(rows)
    return (unit[:1] + spread * unit[1:]).to(device=device, dtype=dtype)
