"""Sets of points, as (sets, rows, dimensions), and the lists of them that are measured."""

import re
from typing import NamedTuple


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

    @staticmethod
    def parse(text: str) -> "Shape":
        if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)):
            raise ValueError(f"a shape must be written SETSxROWSxDIM, as 1x4096x30, got {text!r}")
        return Shape(*map(int, match.groups()))


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
SCALING_DIM = {"cpu": 30, "cuda": 32}
# on a processor more rows take minutes a call
SCALING = {
    device: [Shape(1, 2**i, SCALING_DIM[device]) for i in range(9, most)]
    for device, most in (("cpu", 16), ("cuda", 19))
}
# the paper's setting, in half space: 20 projections to 40 dimensions
PAPER = Shape(20, 4096, 40)
QUICK = [Shape(1, 512, 30), Shape(4, 512, 30), Shape(1, 2048, 30)]
