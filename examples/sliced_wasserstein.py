"""Compare the colours of two photos by sliced Wasserstein distances along few directions.

    python examples/sliced_wasserstein.py --picture errors.png

The sliced distance averages the distance of one-dimensional projections over all directions. With
few directions it matters where they are: independent ones leave gaps, orthogonal blocks do not know
of each other. Directions of least half-space energy, `comhe_ext.init.directions`, cover the sphere;
each of them alone is uniform, so that the average is as unbiased. Printed is the root mean square
error over several draws, beside independent directions, orthogonal blocks (Rowland et al., 2019)
and a Fibonacci lattice, turned at random.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_sample_images
from torch import Generator, Tensor
from torch.nn.functional import normalize

from comhe_ext import init

COUNTS = (12, 24, 48, 96)
Draw = Callable[[int, Generator], Tensor]


def normal(*shape: int, generator: Generator) -> Tensor:
    """Draw independent normal numbers."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def orthogonal_blocks(n: int, generator: Generator) -> Tensor:
    """Draw blocks of three orthogonal directions."""
    blocks = [torch.linalg.qr(normal(3, 3, generator=generator))[0] for _ in range(-(-n // 3))]
    return torch.cat(blocks)[:n]


def lattice(n: int) -> Tensor:
    """Place points of the Fibonacci lattice on the half sphere: a line has two ends."""
    place = torch.arange(n, dtype=torch.float64) + 0.5
    height, turn = 1 - place / n, math.pi * (1 + 5**0.5) * place
    radius = (1 - height.square()).sqrt()
    return torch.stack([radius * turn.cos(), radius * turn.sin(), height], 1)


METHODS: dict[str, Draw] = {
    "independent": lambda n, generator: normalize(normal(n, 3, generator=generator)),
    "orthogonal blocks": orthogonal_blocks,
    "Fibonacci lattice": lambda n, generator: lattice(n) @ orthogonal_blocks(3, generator),
    "least energy": lambda n, generator: init.directions(
        n, 3, generator=generator, dtype=torch.float64
    ),
}


def colours(count: int) -> tuple[Tensor, Tensor]:
    """Draw pixels of both photos, as points of the cube [0, 1]^3."""
    generator = Generator().manual_seed(0)
    first, second = (
        torch.from_numpy(photo.copy()).view(-1, 3).double() / 255
        for photo in load_sample_images().images
    )
    return (
        first[torch.randperm(len(first), generator=generator)[:count]],
        second[torch.randperm(len(second), generator=generator)[:count]],
    )


def sliced_distance(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """Average the squared Wasserstein distance of the projections to each direction."""
    apart = [
        (x @ part.T).sort(0).values - (y @ part.T).sort(0).values for part in directions.split(256)
    ]
    return torch.cat([part.square().mean(0) for part in apart]).mean()


def errors(pixels: int, draws: int) -> dict[str, list[float]]:
    """Measure the relative error of each method, root mean square, for each of `COUNTS`."""
    x, y = colours(pixels)
    truth = sliced_distance(x, y, lattice(5000))
    generator = Generator().manual_seed(1)
    found: dict[str, list[float]] = {}
    for method, draw in METHODS.items():
        found[method] = []
        for n in COUNTS:
            distances = [sliced_distance(x, y, draw(n, generator)) for _ in range(draws)]
            relative = torch.stack(distances) / truth - 1
            found[method].append(float(relative.square().mean().sqrt()))
    return found


def draw_errors(found: dict[str, list[float]], file: Path) -> None:
    """Draw the error against the number of directions."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    below = 0.0
    for method, values in sorted(found.items(), key=lambda entry: entry[1][-1]):
        (line,) = axes.plot(COUNTS, [100 * value for value in values], "o-")
        # labels stand at the ends of their lines, one above the other
        below = max(100 * values[-1], 1.35 * below)
        axes.annotate(method, (COUNTS[-1], below), xytext=(6, 0), va="center",
                      textcoords="offset points", color=line.get_color())  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(COUNTS, [str(n) for n in COUNTS])
    axes.minorticks_off()
    axes.set_xlim(COUNTS[0] * 0.9, COUNTS[-1] * 2)
    axes.set_xlabel("directions, logarithmic")
    axes.set_ylabel("error of the distance, %, logarithmic")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the ways to choose directions."""
    parser = argparse.ArgumentParser(description="Sliced distances along few directions.")
    parser.add_argument("--pixels", type=int, default=2000, help="of each photo")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--picture", type=Path, help="file to draw the errors into")
    options = parser.parse_args(arguments)
    found = errors(options.pixels, options.draws)
    print("directions         " + "".join(f"{n:>9}" for n in COUNTS))
    for method, values in found.items():
        print(f"{method:<19}" + "".join(f"{value:9.2%}" for value in values))
    if options.picture:
        draw_errors(found, options.picture)


if __name__ == "__main__":
    main()
