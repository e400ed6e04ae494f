"""Place N points on the sphere at least energy: the Thomson problem, with a picture.

    python examples/thomson.py --points 12 --picture thomson.png

The energy is the sum of 1/r over all pairs of points, s = 1. The best known values are those of
Wales and Ulker (2006); that of 12 points, the icosahedron, is proved to be the least.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from comhe_ext import Riesz, pair_energy

BEST_KNOWN = {
    2: 0.5,
    3: 1.732050808,
    4: 3.674234614,
    5: 6.474691495,
    6: 9.985281374,
    8: 19.675287861,
    12: 49.165253058,
    24: 223.347074052,
    32: 412.261274651,
}


def energy(points: Tensor) -> Tensor:
    """Compute the energy as physics counts it, each pair once."""
    return pair_energy(points, pair=Riesz(1.0, min_distance=0.0), reduction="sum") / 2.0


def solve(n: int, steps: int, generator: torch.Generator) -> tuple[float, Tensor]:
    """Minimize from one random start, [n, 3] float64; points need not be of unit length."""
    points = torch.randn(n, 3, dtype=torch.float64, generator=generator).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [points],
        max_iter=steps,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = energy(points)
        loss.backward()
        return loss

    optimizer.step(closure)
    unit = torch.nn.functional.normalize(points.detach())
    return float(energy(unit)), unit


def draw(points: Tensor, path: Path) -> None:
    """Draw the points, and lines between those at the least distance or little more."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    distance = torch.cdist(points, points).fill_diagonal_(torch.inf)
    figure = pyplot.figure(figsize=(5, 5))
    axes = figure.add_subplot(projection="3d")
    for i, j in (distance < 1.05 * distance.min()).nonzero().tolist():
        if i < j:
            axes.plot(*points[[i, j]].T.tolist(), color="tab:blue", linewidth=1)
    axes.scatter(*points.T.tolist(), color="black", s=40)
    axes.set_box_aspect((1, 1, 1))
    axes.set_axis_off()
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Solve, compare with the best known value, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--starts", type=int, default=5, help="random starts, the best is kept")
    parser.add_argument("--steps", type=int, default=500, help="iterations of L-BFGS a start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="where to put a picture (needs matplotlib)")
    options = parser.parse_args(arguments)

    generator = torch.Generator().manual_seed(options.seed)
    found = [solve(options.points, options.steps, generator) for _ in range(options.starts)]
    for value, _ in found:
        print(f"a random start ends at  {value:.9f}")
    least, points = min(found, key=lambda x: x[0])
    print(f"the best of them:       {least:.9f}")
    if options.points in BEST_KNOWN:
        print(f"the best known:         {BEST_KNOWN[options.points]:.9f}")
    if options.picture is not None:
        draw(points, options.picture)
        print(f"drawn in {options.picture}")


if __name__ == "__main__":
    main()
