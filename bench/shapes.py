"""What is measured: sets of points, as (sets, rows, dimensions), and the lists of them."""

import re
from typing import NamedTuple

from bench.methods import MODES, Mode


class Shape(NamedTuple):
    sets: int
    rows: int
    dim: int

    def __str__(self) -> str:
        return f"{self.sets}x{self.rows}x{self.dim}"

    @property
    def words(self) -> str:
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

    @property
    def bytes(self) -> float:
        """The bytes that have to be moved at least: the points in, the gradient out."""
        return 8.0 * self.sets * self.rows * self.dim

    @staticmethod
    def parse(text: str) -> "Shape":
        if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)):
            raise ValueError(f"a shape must be written SETSxROWSxDIM, as 1x4096x30, got {text!r}")
        return Shape(*map(int, match.groups()))


class Case(NamedTuple):
    """A shape, and what is computed of it."""

    shape: Shape
    mode: Mode


# the goals of the project, for one thread of a processor and for a large GPU
GOALS = {
    "cpu": [
        Shape(1, 4096, 30),
        Shape(16, 2048, 30),
        Shape(1, 16384, 30),
        Shape(1, 4096, 256),
        Shape(1, 4096, 1024),
    ],
    "cuda": [
        Shape(1, 16384, 32),
        Shape(20, 4096, 32),
        Shape(1, 131072, 64),
        Shape(1, 1_000_000, 64),
    ],
}
# few rows, and many small sets: they show the fixed cost of a call
SMALL = {
    "cpu": [Shape(1, 1024, 30), Shape(1, 128, 40), Shape(1000, 64, 40)],
    "cuda": [Shape(1, 1024, 32), Shape(1, 128, 40), Shape(1000, 64, 40)],
}
# layers as CoMHE sees them: projected to 40 dimensions, and two unprojected
LAYERS = {
    Shape(20, 2048, 40): "ResNet-50 stage 5, 20 projections",
    Shape(6, 3072, 40): "ViT-B fc1, 6 projections",
    Shape(2, 11008, 40): "LLaMA-7B up projection, 2 projections",
    Shape(1, 50257, 40): "GPT-2 vocabulary, 1 projection",
    Shape(1, 93431, 40): "face head of 93,431 classes, 1 projection",
    Shape(1, 512, 4608): "ResNet-50 stage 5 convolution, unprojected",
    Shape(1, 3072, 768): "ViT-B fc1, unprojected",
}
SCALING_DIM = {"cpu": 30, "cuda": 32}
WIDE_DIM = 256
SCALING_ROWS = [2**i for i in range(9, 19)]
WIDE_ROWS = [1024, 4096, 16384]
QUICK = [Shape(1, 512, 30), Shape(4, 512, 30), Shape(1, 2048, 30)]


def scaling(device: str) -> list[Shape]:
    return [Shape(1, rows, SCALING_DIM[device]) for rows in SCALING_ROWS]


def groups(device: str) -> dict[str, list[Case]]:
    """Name the lists for the command line."""
    lists = {
        "goals": GOALS[device],
        "small": SMALL[device],
        "layers": list(LAYERS),
        "scaling": scaling(device),
        "wide": [Shape(1, rows, WIDE_DIM) for rows in WIDE_ROWS],
        "quick": QUICK,
    }
    cases = {name: [Case(shape, "gradient") for shape in shapes] for name, shapes in lists.items()}
    # the energy alone, and the second derivative
    one = Shape(1, 4096, SCALING_DIM[device])
    cases["modes"] = [Case(one, mode) for mode in MODES if mode != "gradient"]
    return cases


def cases(names: list[str], device: str) -> list[Case]:
    """List the cases of groups and of shapes as 1x4096x30, each once; or ValueError."""
    lists = groups(device)
    found = [c for n in names for c in lists.get(n) or [Case(Shape.parse(n), "gradient")]]
    return list(dict.fromkeys(found))
