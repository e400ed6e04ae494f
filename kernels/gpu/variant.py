"""What decides which code a sweep compiles, so that it can be checked before it is relied on."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..pair_functions import Gaussian, Laplace, PairFunction, Riesz
from ..sweep import (
    DifferenceRequest,
    NearestRequest,
    Numbers,
    Projected,
    Request,
    SweepRequest,
    SweepResult,
)
from . import angle_loss, backend, cross_sweep, nearest_rows
from .large_k import ROW_TILE
from .plan import Tiles


@dataclass(frozen=True)
class Variant:
    """Sweeps that run the same code."""

    k: int
    dtype: torch.dtype
    projected: bool
    gradient: bool
    # one of all that a kernel cannot tell apart but by the numbers it is handed
    pair: PairFunction
    # torch.get_float32_matmul_precision()
    precision: str
    tiles: Tiles
    # which kernels: "" those of sets, else those of cross sets, of the nearest or of two spaces
    kind: str = ""
    # columns and dtype of the rows that are compared with their projections
    compared: tuple[int, torch.dtype] | None = None

    @cached_property
    def _hash(self) -> int:
        flags = self.projected, self.gradient, self.kind
        return hash((self.k, self.dtype, *flags, self.pair, self.tiles, self.compared))

    def __hash__(self) -> int:
        """Hash once: verdicts are looked up at every call."""
        return self._hash

    def __str__(self) -> str:
        """Say it in words; the key under which a verdict is kept."""
        t, compared = self.tiles, ""
        if self.compared is not None:
            compared = f"d={self.compared[0]}, {str(self.compared[1]).removeprefix('torch.')}, "
        return (
            f"{self.kind + ', ' * bool(self.kind)}{compared}"
            f"k={self.k}, {self.pair}, {'gradient' if self.gradient else 'energy'}"
            f"{', projected' if self.projected else ''}, {str(self.dtype).removeprefix('torch.')}, "
            f"{self.precision}, tiles {t.block_m}x{t.block_n}, {t.num_warps} warps, "
            f"{t.num_stages} stages, {t.maxnreg or 'any'} registers"
        )


def variant_of(request: Request) -> Variant | None:
    """Name the variant that a request runs; None where it runs no kernel."""
    if isinstance(request, DifferenceRequest):
        return _variant_of_difference(request)
    if isinstance(request, NearestRequest):
        return _variant_of_nearest(request)
    if request.columns is not None:
        return _variant_of_columns(request, request.columns)
    source = request.source
    if isinstance(source, Projected):
        weights, matrices = source
        first, projected = weights[0], any(m is not None for m in matrices)
        widths = [m.shape[1] for m in matrices if m is not None]
        k = widths[0] if widths else max(w.shape[1] for w in weights)
    else:
        first, projected, k = source, False, source.shape[1]
    return _variant(
        Numbers.of(request.sizes),
        request.pair,
        request.gradient,
        k,
        first.dtype,
        projected,
        first.device,
        torch.get_float32_matmul_precision(),
    )


@lru_cache(maxsize=512)
def _variant(
    sizes: Numbers,
    pair: PairFunction,
    gradient: bool,
    k: int,
    dtype: torch.dtype,
    projected: bool,
    device: torch.device,
    precision: str,
) -> Variant | None:
    if k == 0 or not any(sizes):
        return None
    alike = SweepRequest(torch.empty(0, device="cpu"), sizes, (), pair, 0.0, gradient)
    tiles = backend.make_call(alike, k, device).tiles
    return Variant(k, dtype, projected, gradient, _representative(pair), precision, tiles)


def _variant_of_columns(request: SweepRequest, columns: Tensor) -> Variant | None:
    k = columns.shape[1]
    if 0 in (k, len(request.points), len(columns)):
        return None
    call = cross_sweep.make_call(request, columns)
    kind = "columns" + ", ids" * call.with_ids + ", weights" * call.with_weights
    pair = _representative(request.pair)
    return Variant(
        k, columns.dtype, False, any(request.wanted), pair, call.precision, call.tiles, kind
    )


def _variant_of_nearest(request: NearestRequest) -> Variant | None:
    num_rows, k = request.points.shape
    if num_rows == 0 or k == 0 or (request.columns is not None and len(request.columns) == 0):
        return None
    of = "" if request.columns is None else " columns" + ", ids" * (request.row_ids is not None)
    pair = Riesz(half_space=request.half_space)
    return Variant(
        k, request.points.dtype, False, False, pair, "highest", nearest_rows.TILES, f"nearest{of}"
    )


def _variant_of_difference(request: DifferenceRequest) -> Variant | None:
    rows, projected = request.rows, request.projected
    if not (rows.numel() and projected.numel()):
        return None
    shared = (angle_loss.is_shared(rows), angle_loss.is_shared(projected))
    words = (
        "angles" if request.angle else "cosines",
        *("rows' gradient",) * request.rows_gradient,
        *("shared rows",) * shared[0],
        *("shared projection",) * shared[1],
    )
    return Variant(
        projected.shape[2],
        projected.dtype,
        False,
        request.projected_gradient,
        Riesz(),
        "highest",
        Tiles(ROW_TILE, ROW_TILE, 4),
        ", ".join(words),
        (rows.shape[2], rows.dtype),
    )


@lru_cache(maxsize=256)
def _representative(pair: PairFunction) -> PairFunction:
    """Name the pair function that stands for all that run the same code."""
    if isinstance(pair, Riesz):
        others = 1.5 if pair.s > 0 or pair.shift else -0.5
        plain = (0.0,) if pair.shift else (0.0, 1.0, 2.0)
        s = pair.s if pair.s in plain else others
        return replace(pair, s=s, shift=0.5 * bool(pair.shift), min_distance=Riesz.min_distance)
    if isinstance(pair, Gaussian):
        # tiles of half space have another form where it is wide
        return replace(pair, tau=0.5 if pair.tau < 1.0 else 2.0)
    if isinstance(pair, Laplace):
        return replace(pair, tau=1.0)
    return pair


def sweep_as(variant: Variant, request: Request) -> SweepResult | tuple[Tensor | None, ...]:
    """Sweep with the tiles of a variant, whatever the sizes would ask for."""
    token = backend.FORCED_TILES.set(variant.tiles)
    try:
        if isinstance(request, NearestRequest):
            return (nearest_rows.nearest(request),)
        if isinstance(request, DifferenceRequest):
            wanted = request.rows_gradient, request.projected_gradient
            return angle_loss.angle_difference(
                request.rows, request.projected, request.angle, *wanted
            )
        return (backend if request.columns is None else cross_sweep).sweep(request)
    finally:
        backend.FORCED_TILES.reset(token)


def target_of(device: torch.device) -> str:
    """Name of what the kernels are compiled for: "sm_90", "gfx942", "interpreter"."""
    return backend.target_of(device)


@lru_cache(maxsize=1)
def sources() -> str:
    """Hash all that the kernels are made of."""
    folder = Path(__file__).parent
    content = hashlib.sha256()
    for file in sorted([*folder.glob("*.py"), folder.parent / "pair_functions.py"]):
        content.update(file.name.encode() + file.read_bytes())
    return content.hexdigest()[:16]


def device_of(request: Request) -> torch.device:
    """Return where the rows of a request are."""
    if isinstance(request, DifferenceRequest):
        return request.rows.device
    if isinstance(request, NearestRequest):
        return request.points.device
    source: Tensor | Projected = request.source
    return source.weights[0].device if isinstance(source, Projected) else source.device
