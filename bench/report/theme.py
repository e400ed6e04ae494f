"""The look of every picture, which reads on light and on dark pages, and their files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

matplotlib.use("Agg")  # no window, whatever the machine has

STYLE: list[str | dict[str, Any]] = [
    "tableau-colorblind10",
    {
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"},
        **{"axes.grid": True, "grid.color": "#d8dee4", "legend.frameon": False},
        **{"axes.titlesize": "medium", "figure.constrained_layout.use": True, "savefig.dpi": 150},
    },
]


def save(folder: Path, pictures: Mapping[str, Callable[[], Figure]]) -> list[Path]:
    """Save pictures as PNG; the same results give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in pictures.items():
        with plt.style.context(STYLE):
            figure = make()
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1])
            plt.close(figure)
        # with a palette of 64 colors a file has a quarter of the bytes
        Image.open(written[-1]).convert("RGB").quantize(64).save(written[-1], optimize=True)
    return written
