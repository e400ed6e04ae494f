"""Whether a Triton kernel may serve backend=None on this machine: each variant is checked once.

A kernel that compiles may still be wrong on a GPU, with a driver or under a compiler that nobody
has tried. So before a variant serves somebody who did not ask for Triton, it sweeps two small sets
with one near and one antipodal pair each, twice: both runs have to be equal to the bit, and as
close to the portable backend in float64 as the kernels are meant to be. The verdict is kept in a
file in Triton's cache; what fails is replaced by the portable backend, with a warning.

COMHE_BACKEND=triton takes Triton without a check, COMHE_BACKEND=torch the portable backend.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from comhe_ext import backends
from comhe_ext.kernels.sweep import (
    DifferenceRequest,
    NearestRequest,
    Projected,
    Request,
    SweepRequest,
)
from comhe_ext.samples import integers, sample_columns, sample_difference, sample_nearest

if TYPE_CHECKING:  # imports Triton
    from comhe_ext.kernels.gpu.variant import Variant

# for these the kernels of sets have been compiled and their machine code executed in an emulator,
# those of cross sets, nearest rows and two spaces only compiled; the others of both only compiled,
# and they are served once `comhe-ext check` has passed
SERVED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
SERVED_ONCE_CHECKED = ("sm_100", "sm_103", "gfx942", "gfx90a", "gfx950")
# relative errors
ENERGY_BOUND = 1e-6
GRADIENT_BOUNDS = {"highest": 5e-6, "high": 1e-3, "medium": 2e-3}
# columns of the weights that a check projects: more than one step of the kernel's loop, and ragged
FEATURES = 70
# under which the verdict of `comhe-ext check` is kept
ALL = "all"


class Verdict(NamedTuple):
    """What came of a check, and the errors or what went wrong."""

    passed: bool
    detail: str
    # whether it holds for later processes: what raises may have other reasons than the kernel
    lasting: bool = True


def trusted(request: Request) -> bool:
    """Whether Triton may serve a request that did not ask for it; checks it at first.

    Raises:
        RuntimeError: a CUDA graph is being captured, which a check cannot be part of.
    """
    if backends.asked_by_environment() == "triton":
        return True
    from comhe_ext.kernels.gpu import variant as gpu

    if isinstance(request, SweepRequest) and request.wanted == (False, True):
        # the energies are those of the kernel without a gradient, which is another one
        rest = replace(request, columns_gradient=False)
        if not trusted(rest):
            return False
    variant = gpu.variant_of(request)
    if variant is None:
        return True
    verdicts = Verdicts.of(gpu.device_of(request))
    return verdicts.serves and verdicts.find(variant).passed


class Verdicts:
    """The verdicts on all variants that a device has run."""

    _all: ClassVar[dict[torch.device, "Verdicts"]] = {}
    _making = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        from comhe_ext.kernels.gpu import variant as gpu

        self.device = device
        self.target = gpu.target_of(device)
        self.environment = environment(device)
        self.file = VerdictFile(self.environment)
        self.kept = self.file.read()
        self.found: dict[Variant, Verdict] = {}
        self.lock = threading.Lock()
        self.has_warned = False

    @classmethod
    def of(cls, device: torch.device) -> "Verdicts":
        """Return the one object of a device."""
        if device not in cls._all:
            with cls._making:
                if device not in cls._all:
                    cls._all[device] = cls(device)
        return cls._all[device]

    @property
    def serves(self) -> bool:
        """Whether the device is one on which Triton may serve at all."""
        if self.target in SERVED:
            return True
        return self.target in SERVED_ONCE_CHECKED and ALL in self.kept and self.kept[ALL].passed

    def find(self, variant: "Variant") -> Verdict:
        """Find the verdict on a variant, of this process or kept by an earlier one, or make it."""
        if (verdict := self.found.get(variant)) is not None:
            return verdict
        with self.lock:
            if (verdict := self.found.get(variant)) is not None:
                return verdict
            verdict = self.kept.get(str(variant))
            if verdict is None:
                if _capturing(self.device):
                    raise RuntimeError(
                        "backend 'triton' has not been checked for this call yet, and cannot be "
                        "while a CUDA graph is captured: call once before the capture with tensors "
                        "of these shapes"
                    )
                verdict = examine(variant, self.device)
                if verdict.lasting:
                    self.keep(str(variant), verdict)
            self.found[variant] = verdict
            if not verdict.passed and not self.has_warned:
                self.has_warned = True
                self._warn(variant, verdict)
        return verdict

    def keep(self, name: str, verdict: Verdict) -> None:
        self.kept[name] = verdict
        self.file.add({name: verdict})

    def _warn(self, variant: "Variant", verdict: Verdict) -> None:
        warnings.warn(
            f"comhe_ext: a Triton kernel failed its check on {self.environment['device']} "
            f"({variant}: {verdict.detail}). Backend 'torch' does the work of such kernels here, "
            "several times slower; COMHE_BACKEND=torch asks for it without this warning. "
            "Please report what `comhe-ext check` prints; it checks again after an update of the "
            f"driver or of Triton, as does removing {self.file.path}",
            stacklevel=2,
        )


# --- the check ------------------------------------------------------------------------------------


def examine(variant: "Variant", device: torch.device) -> Verdict:
    """Run a variant and compare what it gives with the truth; whatever it raises is a failure."""
    from comhe_ext.kernels.gpu import variant as gpu

    request: Request
    if variant.compared is not None:
        request = sample_difference(variant, device)
    elif variant.kind.startswith("nearest"):
        request = sample_nearest(variant, device)
    elif variant.kind:
        request = sample_columns(variant, device)
    else:
        request = sample_request(variant, device)
    try:
        first, second = gpu.sweep_as(variant, request), gpu.sweep_as(variant, request)
        results = [_on_host(result) for result in (first, second)]
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as error:
        detail = f"{type(error).__name__}: {str(error).strip()[:300]}"
        return Verdict(False, detail, lasting=False)
    bits = [[x.view(torch.int32) for x in result] for result in results]
    if not all(torch.equal(a, b) for a, b in zip(*bits, strict=True)):
        return Verdict(False, "two runs differ")
    if isinstance(request, NearestRequest):
        return _compare_nearest(request, results[0][0])
    if isinstance(request, DifferenceRequest):
        return _compare_difference(request, results[0])
    if request.columns is not None:
        return _compare_columns(variant, request, results[0])
    return _compare(variant, request, results[0])


def sample_request(variant: "Variant", device: torch.device) -> SweepRequest:
    """Two sets for a check: several tiles and ragged ones, near and antipodal pairs.

    All entries are small integers, and the projections of small integers by small integers: what
    they project to is exact in any arithmetic, so that an error is one of the sweep.
    """
    sizes = [2 * variant.tiles.block_m + 37, 70]
    scales = [variant.pair.scale(n, "mean") for n in sizes]
    generator = torch.Generator("cpu").manual_seed(0)
    width = FEATURES if variant.projected else variant.k
    rows = [integers(generator, 127, n, width) for n in sizes]
    for part in rows:
        part[-1], part[-2] = part[0], -part[1]
        part[-2:, 0] -= part[-2:, 0].sign() + (part[-2:, 0] == 0)
    source: Tensor | Projected
    if variant.projected:
        weights = [part.to(device, variant.dtype) for part in rows]
        matrices = [
            integers(generator, 3, 1, variant.k, FEATURES).to(device, torch.float32) for _ in sizes
        ]
        source = Projected(weights, list(matrices))
    else:
        source = torch.cat(rows).to(device, variant.dtype)
    return SweepRequest(source, sizes, scales, variant.pair, 0.0, variant.gradient)


def _on_host(result: Sequence[Tensor | None]) -> list[Tensor]:
    return [x.cpu() for x in result if x is not None]


def exact_points(request: SweepRequest) -> Tensor:
    """Compute the rows of a sample that are swept, in float64 on the host."""
    source = request.source
    if not isinstance(source, Projected):
        return source.cpu().double()
    parts = []
    for weight, matrices in zip(*source, strict=True):
        assert matrices is not None
        parts.append((weight.cpu().double() @ matrices.cpu().double().mT).flatten(0, 1))
    return torch.cat(parts)


def _compare(variant: "Variant", request: SweepRequest, result: Sequence[Tensor]) -> Verdict:
    """Errors relative to the length of what is compared: near rows must not hide the others."""
    exact = backends.load("torch").sweep(replace(request, source=exact_points(request)))
    compared = [("energy", result[0], exact.energy, ENERGY_BOUND)]
    if exact.gradient is not None:
        bound, begin = GRADIENT_BOUNDS[variant.precision], 0
        for n in request.sizes:
            near = torch.zeros(len(exact.gradient), dtype=torch.bool, device="cpu")
            near[[begin, begin + 1, begin + n - 2, begin + n - 1]] = True
            others = torch.zeros_like(near)
            others[begin : begin + n] = True
            for name, rows in (("near rows", near), ("other rows", others & ~near)):
                name = f"gradient of {name} of {n}"
                compared.append((name, result[1][rows], exact.gradient[rows], bound))
            begin += n
    return _judge(compared)


def _compare_columns(
    variant: "Variant", request: SweepRequest, result: Sequence[Tensor]
) -> Verdict:
    assert request.columns is not None
    exact = backends.load("torch").sweep(
        replace(
            request,
            source=request.points.cpu().double(),
            columns=request.columns.cpu().double(),
            row_ids=None if request.row_ids is None else request.row_ids.cpu(),
            column_ids=None if request.column_ids is None else request.column_ids.cpu(),
            row_weights=None if request.row_weights is None else request.row_weights.cpu().double(),
        )
    )
    assert exact.row_energies is not None
    # cheaper products are as wrong in a row's energy as in its gradient
    bound = GRADIENT_BOUNDS[variant.precision]
    of_rows = ENERGY_BOUND if variant.precision == "highest" else bound
    compared = [
        ("energy", result[0], exact.energy, ENERGY_BOUND),
        ("row energies", result[-1], exact.row_energies, of_rows),
    ]
    if exact.gradient is not None and exact.columns_gradient is not None:
        gradients = (
            ("rows", exact.gradient, slice(2)),
            ("columns", exact.columns_gradient, slice(-2, None)),
        )
        for actual, (name, expected, of_pairs) in zip(result[1:3], gradients, strict=True):
            near = torch.zeros(len(expected), dtype=torch.bool, device="cpu")
            near[of_pairs] = True
            for kind, some in (("near", near), ("other", ~near)):
                name_of = f"gradient of {kind} {name}"
                compared.append((name_of, actual[some], expected[some], bound))
    return _judge(compared)


def _compare_nearest(request: NearestRequest, index: Tensor) -> Verdict:
    exact = backends.load("torch").nearest(
        replace(
            request,
            points=request.points.cpu().double(),
            columns=None if request.columns is None else request.columns.cpu().double(),
            row_ids=None if request.row_ids is None else request.row_ids.cpu(),
            column_ids=None if request.column_ids is None else request.column_ids.cpu(),
        )
    )
    wrong = int((index != exact).sum())
    if wrong:
        return Verdict(False, f"{wrong} of {len(exact)} rows have another row for the nearest")
    return Verdict(True, f"the nearest of {len(exact)} rows")


def _compare_difference(request: DifferenceRequest, result: Sequence[Tensor]) -> Verdict:
    points = [x.cpu().double() for x in (request.rows, request.projected)]
    wanted = request.rows_gradient, request.projected_gradient
    exact = backends.load("torch").angle_difference(points[0], points[1], request.angle, *wanted)
    compared = [("energy", result[0], exact[0], ENERGY_BOUND)]
    gradients = [(x, "rows" if x is exact[1] else "projection") for x in exact[1:] if x is not None]
    for actual, (expected, name) in zip(result[1:], gradients, strict=True):
        # rows of one column have nowhere to turn: what there is, is rounding
        for index in range(len(expected)) if expected.shape[2] > 1 else ():
            name_of = f"gradient of {name} of set {index}"
            bound = GRADIENT_BOUNDS["highest"]
            compared.append((name_of, actual[index], expected[index], bound))
    return _judge(compared)


def _judge(compared: Sequence[tuple[str, Tensor, Tensor, float]]) -> Verdict:
    """Compare results, by name, with the exact ones, each with the bound of its error."""
    worst = []
    for name, actual, expected, bound in compared:
        length = float(torch.linalg.vector_norm(expected))
        if "energ" in name:
            length = max(length, 0.5)  # where logarithms cancel, the mean of their sizes
        error = float(torch.linalg.vector_norm(actual.double() - expected)) / (length or 1.0)
        if not error <= bound:  # NaN neither
            return Verdict(False, f"error of {error:.1e} in the {name}, more than {bound:.0e}")
        worst.append(error)
    gradients = [error for (name, *_), error in zip(compared, worst, strict=True) if "grad" in name]
    gradient = f", gradient {max(gradients):.0e}" if gradients else ""
    return Verdict(True, f"errors: energy {worst[0]:.0e}{gradient}")


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# --- what is kept ---------------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, str]:
    """All that a verdict is good for, beside the variant."""
    import triton

    import comhe_ext
    from comhe_ext.kernels.gpu import variant as gpu

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "sources": gpu.sources(),
        "comhe_ext": comhe_ext.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": _driver(),
        "device": name,
        "target": gpu.target_of(device),
    }


def _driver() -> str:
    """Name the GPU's driver, as exactly as the system tells it."""
    for file in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(file).read_text().splitlines()[0]
    if torch.version.hip is None and torch.cuda.is_available():
        return str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]
    return torch.version.hip or "unknown"


class VerdictFile:
    """The file in Triton's cache that keeps the verdicts of one environment."""

    def __init__(self, environment: dict[str, str]) -> None:
        import triton

        self.environment = environment
        name = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:16]
        self.path = Path(triton.knobs.cache.dir) / "comhe_ext" / f"verdicts-{name}.json"

    def read(self) -> dict[str, Verdict]:
        """Read the verdicts kept for this environment; none where the file cannot be read."""
        try:
            content: Any = json.loads(self.path.read_text())
            if content["environment"] != self.environment:
                return {}
            return {
                name: Verdict(bool(passed), str(detail))
                for name, (passed, detail) in content["verdicts"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def add(self, verdicts: dict[str, Verdict]) -> None:
        """Add to what is there, as a whole or not at all; where nothing can be written, do not."""
        kept = {name: verdict[:2] for name, verdict in {**self.read(), **verdicts}.items()}
        content = {"environment": self.environment, "verdicts": kept}
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, written = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(content, file, indent=1)
                os.replace(written, self.path)
            except OSError:
                os.unlink(written)
                raise
