"""What each kind of random projection costs, and how good it is.

The cost: a step of the regularizer of a whole model with its gradient, and of the projections
alone, forward and backward, draws included. The quality: how far the gradient of one step is from
the mean over a thousand Gaussian projections, for layers whose neurons come in clusters.
"""

from collections.abc import Iterator
from functools import lru_cache, partial

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

# kind, C; with fewer projections, those that are as near to the mean as 20 Gaussian ones
KINDS = [("gaussian", 20), ("sparse", 20), ("hadamard", 20), ("fourier", 20)]
KINDS += [("hadamard", 16), ("hadamard", 12), ("fourier", 16), ("fourier", 12)]
# neurons, inputs
LAYERS = {"2048 x 512": (2048, 512), "3072 x 768": (3072, 768), "2048 x 2048": (2048, 2048)}
LAYERS["2048 x 512, scaled"] = (2048, 512)
STEP, PROJECTIONS, ERROR = "step", "projections", "error"
DRAWS, REFERENCE = 10, 50  # of the kinds, and of 20 Gaussian projections
SEED, SEED_OF_REFERENCE = 1, 2


# --- cost -----------------------------------------------------------------------------------------


def make_step(name: str, what: str, kind: str, count: int) -> Call:
    spec = MODELS[name]
    torch.manual_seed(0)
    model = spec.make()
    projection = RandomProjection(count, kind=kind, seed=SEED)  # type: ignore[arg-type]
    comhe = CoMHE(model, projection, output_layer=spec.output_layer)

    def step() -> Result:
        model.zero_grad(set_to_none=True)
        comhe().backward()
        return ()

    def only_project() -> Result:
        """Project all layers and pull a gradient back, as a step does around its sweep."""
        model.zero_grad(set_to_none=True)
        projection.step()
        rows = comhe._projected(comhe._read()[0])
        outputs = [
            sets if matrices is None else project(sets, matrices)
            for sets, matrices in projection.views(rows).values()
        ]
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
        return ()

    return step if what == STEP else only_project


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


def gradients(name: str, kind: str, count: int, draws: int, seed: int) -> Iterator[Tensor]:
    layer = clustered(name)
    projection = RandomProjection(count, kind=kind, seed=seed)  # type: ignore[arg-type]
    comhe = CoMHE(layer, projection, output_layer=None)
    for _ in range(draws):
        yield torch.autograd.grad(comhe(), layer.weight)[0]


def make_gradients(name: str, kind: str, count: int, draws: int) -> Call:
    return lambda: (torch.stack(list(gradients(name, kind, count, draws, SEED))),)


@lru_cache(maxsize=1)
def reference(name: str, draws: int) -> Tensor:
    found = gradients(name, "gaussian", 20, draws, SEED_OF_REFERENCE)
    return sum((g.double() for g in found), torch.zeros(())) / draws


def check(name: str, draws: int, result: Result) -> Row:
    (found,), mean = result, reference(name, draws)
    errors = (found.double() - mean).flatten(1).norm(dim=1) / mean.norm()
    note = f"{len(found)} draws against {20 * draws} Gaussian projections"
    return {"gradient_error": float(errors.mean()), "note": note}


def entries(case: Case, options: Options) -> dict[str, Entry]:
    what, of = case["what"], case["of"]
    if what != ERROR:
        return {f"{k} {c}": Entry(partial(make_step, of, what, k, c)) for k, c in KINDS}
    draws, reference = (1, 1) if options.quick else (DRAWS, REFERENCE)
    checked = partial(check, of, reference)
    return {
        f"{k} {c}": Entry(partial(make_gradients, of, k, c, draws), checked, timed=False)
        for k, c in KINDS
    }


def groups(device: str) -> dict[str, list[Case]]:
    cases = {
        name: [{"what": what, "of": name} for what in (STEP, PROJECTIONS)]
        for name in MODELS
        if name != "digits"
    }
    cases |= {name: [{"what": ERROR, "of": name}] for name in LAYERS}
    quick = [{"what": STEP, "of": "digits"}, {"what": PROJECTIONS, "of": "digits"}]
    return cases | {"quick": [*quick, {"what": ERROR, "of": "2048 x 512"}]}


STUDY = Study(
    *("projections", "cost and quality of each kind of random projection"),
    key=("what", "of"),
    groups=groups,
    entries=entries,
    devices=("cpu",),
)
