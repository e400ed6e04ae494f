"""Two studies of the energy: every method at every shape, and on rows that are close or equal."""

from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

import comhe_ext
from bench.measure.contest import Entry, errors, judged
from bench.measure.store import Row
from bench.measure.study import Case, Options, Study
from bench.measure.worker import Call, Result
from bench.peers import METHODS, Method, Mode, naive_energy, replayed, run
from comhe_ext import testing


class Shape(NamedTuple):
    sets: int
    rows: int
    dim: int

    def __str__(self) -> str:
        sets = "" if self.sets == 1 else f"{self.sets:,} sets of "
        return f"{sets}{self.rows:,} × {self.dim:,}"

    @property
    def pairs(self) -> float:
        return self.sets * self.rows * (self.rows - 1) / 2

    @property
    def flop(self) -> float:
        """The useful work of energy and gradient: of each pair the cosine and both forces.

        Counted once a pair, whatever a method computes twice or pads.
        """
        return 6.0 * self.dim * self.pairs


# those that the project has goals for, on one thread of a processor and on a large GPU
MAIN = {
    "cpu": [
        *(Shape(1, 4096, 30), Shape(16, 2048, 30), Shape(1, 16384, 30)),
        *(Shape(1, 4096, 256), Shape(1, 4096, 1024)),
    ],
    "cuda": [
        *(Shape(1, 16384, 32), Shape(1, 4096, 128)),
        *(Shape(1, 131072, 64), Shape(1, 1_000_000, 64)),
    ],
}
# few rows, and many small sets: they show the fixed cost of a call
SMALL = [Shape(1, 1024, 30), Shape(1, 128, 40), Shape(1000, 64, 40)]
# layers as CoMHE sees them: projected to 40 dimensions, and two unprojected
LAYERS = {
    Shape(20, 2048, 40): "ResNet-50 stage 5",
    Shape(6, 3072, 40): "ViT-B fc1",
    Shape(2, 11008, 40): "LLaMA-7B up projection",
    Shape(1, 50257, 40): "GPT-2 vocabulary",
    Shape(1, 512, 4608): "ResNet-50 stage 5 convolution",
    Shape(1, 3072, 768): "ViT-B fc1",
}
# of the shapes with ever more rows
SCALING_DIM = {"cpu": 30, "cuda": 32}
# the paper's setting, in half space: 20 projections to 40 dimensions
PAPER = Shape(20, 4096, 40)
# more would take the definition minutes
MOST_ROWS = 32768


def case_of(shape: Shape, mode: Mode = "gradient") -> Case:
    return {**shape._asdict(), "mode": mode}


def shape_of(case: Case) -> Shape:
    return Shape(case["sets"], case["rows"], case["dim"])


def groups(device: str, quick: bool) -> dict[str, list[Case]]:
    if quick:
        return {"quick": [case_of(shape) for shape in (Shape(1, 512, 30), Shape(4, 300, 30))]}
    dim = SCALING_DIM[device]
    # on a processor more rows take minutes a call
    scaling = [Shape(1, 2**i, dim) for i in range(9, 15 if device == "cpu" else 19)]
    lists = {"main": MAIN[device], "small": SMALL, "layers": list(LAYERS), "scaling": scaling}
    cases = {name: [case_of(shape) for shape in shapes] for name, shapes in lists.items()}
    one = Shape(1, 4096, dim)
    modes = case_of(one, "energy"), case_of(one, "second order"), case_of(PAPER, "half space")
    return cases | {"modes": [*modes]}


def points(shape: Shape, device: str) -> Tensor:
    """Draw the same random rows for every method, [B, N, k]."""
    return testing.random_rows(shape.sets * shape.rows, shape.dim, device=device).view(shape)


@lru_cache(maxsize=1)
def truth(shape: Shape, mode: Mode, device: str) -> Result:
    """Compute energies and derivatives of `points(shape, device)` in float64.

    By the definition; of very many rows by our portable backend, which tests compare with it.
    """
    rows = points(shape, device).double()
    ours = partial(comhe_ext.hyperspherical_energy, backend="torch")
    if mode == "second order" or shape.rows > MOST_ROWS:
        return run(naive_energy if mode == "second order" else ours, rows, mode)
    # random rows: no two are closer than `min_distance`
    exact = partial(testing.exact_energy_and_gradient, half_space=mode == "half space")
    both = [exact(one) for one in rows]
    return torch.stack([e for e, _ in both]), torch.stack([g for _, g in both])


def make_call(method: str, shape: Shape, mode: Mode, device: str) -> Call:
    """Load the method and make the points, in the process that measures."""
    call = partial(run, METHODS[method].load(), points(shape, device), mode)
    return replayed(call) if METHODS[method].graph else call


def check(shape: Shape, mode: Mode, device: str, result: Result) -> Row:
    """Compare a method's result with float64."""
    return judged(errors(result, truth(shape, mode, device)))


def taking_part(options: Options) -> dict[str, Method]:
    """List the methods of a device; to compile would take most of a quick run."""
    found = {name: x for name, x in METHODS.items() if options.device in x.devices}
    return {name: x for name, x in found.items() if not (options.quick and x.compiles)}


def entries(case: Case, options: Options) -> dict[str, Entry]:
    place = shape_of(case), case["mode"], options.device
    checked = partial(check, *place)
    return {
        name: Entry(partial(make_call, name, *place), checked, method.environment)
        for name, method in taking_part(options).items()
        if case["mode"] in method.modes
    }


STUDY = Study(
    *("sweep", "time, memory and error of every method at every shape", 40),
    key=("sets", "rows", "dim", "mode"),
    groups=groups,
    entries=entries,
)

# --- rows that are close, or equal ----------------------------------------------------------------

ROWS, DIM, PAIRS = 1024, 30, 8
# name -> angle of the near rows in radians
ANGLES = {"0.1 rad": 0.1, "0.01 rad": 1e-2, "1e-3 rad": 1e-3, "1e-4 rad": 1e-4}
DUPLICATES, COLLAPSED = "duplicates", "collapsed"
CLOSE = ("random", *ANGLES, COLLAPSED, DUPLICATES)


def close_points(case: str, device: str) -> Tensor:
    """[N, k]: random rows of which some have a near twin, or an equal one; or all in a heap."""
    if case in ANGLES:
        return testing.paired_rows(ROWS, DIM, ANGLES[case], pairs=PAIRS, device=device)
    if case == COLLAPSED:
        return testing.collapsed_rows(ROWS, DIM, 1e-2, device=device)
    rows = testing.random_rows(ROWS, DIM, device=device)
    if case == DUPLICATES:
        rows[-PAIRS:] = rows[:PAIRS]
    return rows


def make_close_call(method: str, case: str, device: str) -> Call:
    """The pure definition; with duplicates that is infinite, so there ours has `min_distance`."""
    energies = METHODS[method].load()
    if METHODS[method].backend is not None and case != DUPLICATES:
        energies = partial(energies, min_distance=0.0)
    return partial(run, energies, close_points(case, device)[None], "gradient")


def check_close(case: str, device: str, result: Result) -> Row:
    rows, distance = close_points(case, device), 1e-3 if case == DUPLICATES else 0.0
    energy, gradient = testing.exact_energy_and_gradient(rows, min_distance=distance)
    return {"value": float(result[0]), **errors(result, (energy[None], gradient[None]))}


def close_entries(case: Case, options: Options) -> dict[str, Entry]:
    place = case["case"], options.device
    checked = partial(check_close, *place)
    return {
        name: Entry(partial(make_close_call, name, *place), checked, method.environment, False)
        for name, method in taking_part(options).items()
        if not method.graph
    }


ACCURACY = Study(
    *("accuracy", "errors on far, close and equal rows", 2),
    key=("case",),
    groups=lambda device, quick: {case: [{"case": case}] for case in CLOSE},
    entries=close_entries,
    threads=0,
)
