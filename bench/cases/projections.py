"""What random projections cost and how good they are, of each kind, exact and sampled.

The cost: a step of the regularizer of a whole model with its gradient, and of the projections
alone, forward and backward, draws included; what is left of a step is that of the pairs. The
quality: how far the gradient of one step is from the mean over 600 Gaussian projections, for layers
whose neurons come in clusters.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases.models import MODELS
from bench.measure.contest import Entry
from bench.measure.store import Row
from bench.measure.study import Case, Options, Study
from bench.measure.worker import Call, Result
from comhe_ext import CoMHE
from comhe_ext.operators.rows import project
from comhe_ext.projections import RandomProjection

# the kind, C, and the rows of a block: None for those that CoMHE chooses, 0 for exact energies
Method = tuple[str, int, int | None]
STEP, PROJECTIONS, ERROR = "step", "projections", "error"
DRAWS, REFERENCE = 8, 30  # of a method, and of 20 Gaussian projections
SEED, SEED_OF_REFERENCE = 1, 2


def named(*methods: Method) -> dict[str, Method]:
    how = {0: "", None: ", sampled"}
    return {f"{k} {c}" + how.get(n, f", blocks of {n}"): (k, c, n) for k, c, n in methods}


TWO = named(("gaussian", 20, 0), ("fourier", 20, 0))
# with fewer projections, those that are as near to the mean as 20 Gaussian ones
KINDS = named(("gaussian", 20, 0), ("sparse", 20, 0), ("hadamard", 20, 0), ("fourier", 20, 0))
KINDS |= named(("fourier", 16, 0), ("fourier", 12, 0))
SAMPLED = named(*((kind, 20, n) for kind in ("gaussian", "fourier") for n in (None, 64, 128)))
# models, and layers as neurons x inputs, for which kinds are compared, and sampled with exact ones
OF_KINDS = ("resnet50", "vit-b", "2048 x 512", "3072 x 768", "2048 x 2048")
OF_SAMPLES = ("resnet50", "vit-b", "llama", "512 x 512", "1024 x 512", "2048 x 512", "8192 x 256")


def methods_of(case: Case) -> dict[str, Method]:
    found = KINDS if case["of"] in OF_KINDS else TWO
    sampled = case["of"] in OF_SAMPLES and case["what"] != PROJECTIONS
    return {**found, **SAMPLED} if sampled else found


def regularized(name: str, method: Method) -> tuple[nn.Module, CoMHE]:
    model = MODELS[name].make()
    return model, regularizer(model, method, SEED, MODELS[name].output_layer)


def regularizer(model: nn.Module, method: Method, seed: int, output: str | None) -> CoMHE:
    kind, count, samples = method
    projection = RandomProjection(count, kind=kind, seed=seed)  # type: ignore[arg-type]
    options: dict[str, Any] = {} if samples == 0 else {"method": "sampled", "samples": samples}
    return CoMHE(model, projection, output_layer=output, **options)


# --- cost -----------------------------------------------------------------------------------------


def make_step(name: str, method: Method) -> Call:
    model, comhe = regularized(name, method)

    def step() -> Result:
        model.zero_grad(set_to_none=True)
        comhe().backward()
        return ()

    return step


def make_projections(name: str, method: Method) -> Call:
    """Project all layers and pull a gradient back, as a step does around its sweep."""
    model, comhe = regularized(name, method)
    projection = comhe.projection
    assert projection is not None
    layers = [layer.name for layer in comhe.layers if layer.projected]

    def only_project() -> Result:
        model.zero_grad(set_to_none=True)
        projection.step()
        weights = {layer: model.get_parameter(f"{layer}.weight") for layer in layers}
        views = projection.views({layer: w.flatten(1)[None] for layer, w in weights.items()})
        outputs = [rows if p is None else project(rows, p) for rows, p in views.values()]
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
        return ()

    return only_project


# --- quality --------------------------------------------------------------------------------------


def clustered(name: str) -> nn.Linear:
    """Make a layer whose neurons lie around 50 centers."""
    n, d = map(int, name.split(" x "))
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(50, d, generator=generator)
    rows = centers[torch.randint(50, (n,), generator=generator)]
    layer = nn.Linear(d, n, bias=False)
    with torch.no_grad():
        layer.weight.copy_(rows + 0.7 * torch.randn(n, d, generator=generator))
    return layer


def gradients(name: str, method: Method, draws: int, seed: int) -> Iterator[Tensor]:
    layer = clustered(name)
    comhe = regularizer(layer, method, seed, None)
    for _ in range(draws):
        yield torch.autograd.grad(comhe(), layer.weight)[0]


def make_gradients(name: str, method: Method, draws: int) -> Call:
    return lambda: (torch.stack(list(gradients(name, method, draws, SEED))),)


@lru_cache(maxsize=1)
def reference(name: str, draws: int) -> Tensor:
    found = gradients(name, ("gaussian", 20, 0), draws, SEED_OF_REFERENCE)
    return sum((g.double() for g in found), torch.zeros(())) / draws


def check(name: str, draws: int, result: Result) -> Row:
    (found,), mean = result, reference(name, draws)
    errors = (found.double() - mean).flatten(1).norm(dim=1) / mean.norm()
    note = f"{len(found)} draws against {20 * draws} Gaussian projections"
    return {"gradient_error": float(errors.mean()), "note": note}


def entries(case: Case, options: Options) -> dict[str, Entry]:
    what, of, methods = case["what"], case["of"], methods_of(case)
    if what != ERROR:
        make = make_step if what == STEP else make_projections
        return {name: Entry(partial(make, of, method)) for name, method in methods.items()}
    draws, reference = (1, 1) if options.quick else (DRAWS, REFERENCE)
    checked = partial(check, of, reference)
    calls = {name: partial(make_gradients, of, method, draws) for name, method in methods.items()}
    return {name: Entry(call, checked, timed=False) for name, call in calls.items()}


def groups(device: str, quick: bool) -> dict[str, list[Case]]:
    names = ("digits", "2048 x 512") if quick else dict.fromkeys([*OF_KINDS, *OF_SAMPLES])
    whats = {name: (STEP, PROJECTIONS) if name in MODELS else (ERROR,) for name in names}
    return {name: [{"what": what, "of": name} for what in found] for name, found in whats.items()}


STUDY = Study(
    *("projections", "random projections of each kind, exact and sampled: cost and quality", 12),
    key=("what", "of"),
    groups=groups,
    entries=entries,
    devices=("cpu",),
)
