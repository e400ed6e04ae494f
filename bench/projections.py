"""`python -m bench.projections`: what each kind of random projection costs, and how good it is.

The cost: processor time on one thread of the regularizer of a whole model with its gradient, and of
the projections alone, forward and backward, draws included. The quality: how far the gradient of
one step is from the mean over a thousand Gaussian projections, for layers whose neurons come in
clusters.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import machine
from bench.model import MODELS
from bench.screen import make_console, make_table
from bench.store import RESULTS, Table
from comhe_ext import CoMHE
from comhe_ext.operators.rows import project
from comhe_ext.projections import RandomProjection

COSTS = Table(
    "projection_costs",
    key=("model", "kind", "projections", *machine.STAMP),
    values=("date", "step_ms", "projection_ms", "rounds"),
)
ERRORS = Table(
    "projection_errors",
    key=("layer", "kind", "projections", *machine.STAMP),
    values=("date", "error", "error_of_mean", "draws", "reference"),
)
# kind, C; with fewer projections, those that are as near to the mean as 20 Gaussian ones
KINDS = [
    *(("gaussian", 20), ("sparse", 20), ("hadamard", 20), ("fourier", 20)),
    *(("hadamard", 16), ("hadamard", 12), ("fourier", 16), ("fourier", 12)),
]
# neurons, inputs
LAYERS = {
    "2048 x 512": (2048, 512),
    "3072 x 768": (3072, 768),
    "2048 x 512, scaled": (2048, 512),
    "2048 x 2048": (2048, 2048),
}


# far apart: draws of seeds and steps of nearly the same bits may be the same
SEED, SEED_OF_REFERENCE = 1, 10**12


def make_projection(kind: str, count: int, seed: int = SEED) -> RandomProjection:
    return RandomProjection(count, kind=kind, seed=seed)  # type: ignore[arg-type]


# --- cost -----------------------------------------------------------------------------------------


def step(comhe: CoMHE) -> None:
    comhe().backward()


def only_project(comhe: CoMHE) -> None:
    """Project all layers and pull a gradient back, as a step does around its sweep."""
    projection = comhe.projection
    assert projection is not None
    projection.step()
    rows = comhe._projected(comhe._read()[0])
    outputs = [
        sets if matrices is None else project(sets, matrices)
        for sets, matrices in projection.views(rows).values()
    ]
    torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])


def costs(name: str, rounds: int) -> Iterator[dict[str, object]]:
    """Time a step of each kind in turn, and yield the medians."""
    spec = MODELS["cpu"][name]
    torch.manual_seed(0)
    model = spec.make()
    output_layer = None if spec.classes is None else "auto"
    calls: dict[tuple[str, int, str], Callable[[], object]] = {}
    for kind, count in KINDS:
        comhe = CoMHE(model, make_projection(kind, count), output_layer=output_layer)
        calls[kind, count, "step_ms"] = partial(step, comhe)
        calls[kind, count, "projection_ms"] = partial(only_project, comhe)
    times: dict[tuple[str, int, str], list[float]] = {key: [] for key in calls}
    for turn in range(rounds + 1):
        for key, call in calls.items():
            model.zero_grad(set_to_none=True)
            begin = time.process_time()
            call()
            if turn > 0:  # the first one makes tables and fills caches
                times[key].append(1e3 * (time.process_time() - begin))
    for kind, count in KINDS:
        found = {
            what: sorted(times[kind, count, what])[rounds // 2]
            for what in ("step_ms", "projection_ms")
        }
        yield {"model": name, "kind": kind, "projections": count, "rounds": rounds, **found}


# --- quality --------------------------------------------------------------------------------------


def clustered(name: str) -> nn.Linear:
    """Make neurons around 50 centers; "scaled", with channels of eight inputs of unequal size."""
    n, d = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(50, d, generator=generator)
    rows = centers[torch.randint(50, (n,), generator=generator)]
    rows = rows + 0.7 * torch.randn(n, d, generator=generator)
    if name.endswith("scaled"):
        rows *= torch.randn(d // 8, generator=generator).exp().repeat_interleave(8)
    layer = nn.Linear(d, n, bias=False)
    with torch.no_grad():
        layer.weight.copy_(rows)
    return layer


def gradients(layer: nn.Linear, kind: str, count: int, draws: int, seed: int) -> Iterator[Tensor]:
    comhe = CoMHE(layer, make_projection(kind, count, seed), output_layer=None)
    for _ in range(draws):
        yield torch.autograd.grad(comhe(), layer.weight)[0].double()


def errors(name: str, draws: int, reference: int) -> Iterator[dict[str, object]]:
    layer = clustered(name)
    mean = torch.zeros(layer.weight.shape, dtype=torch.float64)
    for gradient in gradients(layer, "gaussian", 20, reference // 20, SEED_OF_REFERENCE):
        mean += gradient / (reference // 20)
    for kind, count in KINDS:
        total, found = torch.zeros_like(mean), []
        for gradient in gradients(layer, kind, count, draws, SEED):
            found.append(float((gradient - mean).norm() / mean.norm()))
            total += gradient / draws
        yield {
            **{"layer": name, "kind": kind, "projections": count},
            "error": sum(found) / draws,
            "error_of_mean": float((total - mean).norm() / mean.norm()),
            **{"draws": draws, "reference": reference},
        }


def show(title: str, rows: Sequence[dict[str, object]], columns: Sequence[str]) -> None:
    lines = [
        [f"{row['kind']}, C = {row['projections']}", *(f"{row[name]:.4g}" for name in columns)]
        for row in rows
    ]
    make_console().print(make_table(title, ("", *columns), lines))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.projections", description=__doc__)
    models = [name for name in MODELS["cpu"] if name != "digits"]
    parser.add_argument("--models", nargs="*", choices=MODELS["cpu"], default=models)
    parser.add_argument("--layers", nargs="*", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--reference", type=int, default=1000, help="Gaussian projections")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stamp = machine.stamp("cpu", 1)
    for name in options.models:
        rows = list(costs(name, options.rounds))
        COSTS.upsert(options.out, [stamp | row for row in rows])
        show(MODELS["cpu"][name].label, rows, ("step_ms", "projection_ms"))
    for name in options.layers:
        rows = list(errors(name, options.draws, options.reference))
        ERRORS.upsert(options.out, [stamp | row for row in rows])
        show(f"{name}, in clusters", rows, ("error", "error_of_mean"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
