"""A picture of the energies of checkpoints, layer by layer."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from comhe_ext.cli import screen
from comhe_ext.cli.layer import LayerReport

MOST_NAMES = 60  # below the axis


def save(path: Path, labels: Sequence[str], reports: Sequence[Sequence[LayerReport]]) -> None:
    """Draw the energies, divided by those of random directions, in full and in half space."""
    names = list(dict.fromkeys(layer.name for layers in reports for layer in layers))
    place = {name: x for x, name in enumerate(names)}
    figure = Figure(figsize=(max(6.4, min(0.25 * len(names) + 2, 20)), 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, field, space in ((above, "energy", "full"), (below, "half_space", "half")):
        bounds: dict[int, float] = {}
        every: list[float] = []
        for label, layers in zip(labels, reports, strict=True):
            energies = [(place[x.name], getattr(x, field)) for x in layers if getattr(x, field)]
            # no ratio to 0, nor to infinity
            known = [(x, e) for x, e in energies if 0 < abs(e.random) < math.inf]
            if known:
                ratios = [e.value / e.random for _, e in known]
                axes.plot([x for x, _ in known], ratios, "o-", ms=4, lw=0.8, label=label)
                bounds.update((x, e.lowest / e.random) for x, e in known)
                every += ratios
        axes.plot(list(bounds), list(bounds.values()), "_", color="0.4", label="least possible")
        axes.axhline(1.0, color="0.7", linewidth=0.8)
        if min(every, default=0.0) > 0 and max(every) > 10:  # duplicates add a thousandfold
            axes.set_yscale("log")
        axes.set_title(f"energy in {space} space, random directions = 1", loc="left", fontsize=10)
    above.legend(fontsize=8)
    shown = names[:: -(-len(names) // MOST_NAMES)]
    texts = [screen.shorten(screen.printable(name), 40).replace("$", r"\$") for name in shown]
    below.set_xticks([place[name] for name in shown], texts, rotation=90, fontsize=7)
    figure.savefig(path, dpi=150)
