"""What every picture needs: the colors of a page, axes, lines with their names, files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from PIL import Image

matplotlib.use("Agg")  # no window, whatever the machine has


@dataclass(frozen=True)
class Theme:
    """Colors of a page; the color-blind can tell those of the methods apart."""

    name: str
    paper: str
    ink: str
    faint: str  # for all that is not data
    rule: str
    orange: str
    blue: str
    sky: str
    green: str
    pink: str
    yellow: str

    def settings(self) -> Any:
        """Make matplotlib's settings."""
        return {
            **dict.fromkeys(
                ("figure.facecolor", "axes.facecolor", "savefig.facecolor"), self.paper
            ),
            **dict.fromkeys(("text.color", "axes.labelcolor"), self.ink),
            **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), self.ink),
            **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), self.faint),
            **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
            **{"font.size": 10, "font.family": "DejaVu Sans", "axes.axisbelow": True},
            **{"axes.grid": True, "grid.color": self.rule, "grid.linewidth": 0.7},
            **{"axes.titlesize": 11, "axes.titlelocation": "left"},
        }


LIGHT = Theme(
    *("light", "#ffffff", "#1f2328", "#6e7781", "#d8dee4"),
    *("#c84c00", "#0b62a4", "#3d9bd1", "#00805a", "#b0508c", "#9a7400"),
)
DARK = Theme(
    *("dark", "#0d1117", "#e6edf3", "#8b949e", "#30363d"),
    *("#ff9147", "#6cb0f0", "#9ad4f5", "#3fcf9f", "#ec94c4", "#e3c14a"),
)
THEMES = (LIGHT, DARK)


def save(
    folder: Path, pictures: Mapping[str, Callable[[Theme], Figure]], theme: Theme = LIGHT
) -> list[Path]:
    """Save pictures as PNG; the same results give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(theme.settings()):
        for name, make in pictures.items():
            pixels, figure = BytesIO(), make(theme)
            figure.savefig(pixels, format="png", dpi=150)
            plt.close(figure)
            written.append(folder / f"{name}.png")
            # with a palette of 64 colors a file has a quarter of the bytes
            Image.open(pixels).convert("RGB").quantize(64).save(written[-1], optimize=True)
    return written


# --- lines with their names beside them -----------------------------------------------------------


def name_line(axes: Axes, x: float, y: float, text: str, color: str, side: str) -> Annotation:
    """Write the name of a line beside its first point, or its last, and tie it to that point."""
    right = side == "right"
    return axes.annotate(
        text,
        (x, y),
        xytext=(30 if right else -30, 0),
        textcoords="offset points",
        color=color,
        ha="left" if right else "right",
        va="center",
        fontsize=9,
        annotation_clip=False,
        arrowprops={
            "arrowstyle": "-",
            "color": color,
            "linewidth": 0.6,
            "relpos": (1 - right, 0.5),
        },
    )


def part_names(figure: Figure, names: Sequence[Annotation]) -> None:
    """Move names up and down until none covers another; they stand in one column."""
    figure.canvas.draw()

    def height_of(name: Annotation) -> float:
        assert name.axes is not None
        return float(name.axes.transData.transform(name.xy)[1]) * 72 / figure.dpi

    names = sorted(names, key=height_of)
    places = [height_of(name) for name in names]
    for _ in range(100):
        for i in range(1, len(places)):
            if (overlap := places[i - 1] + 12.5 - places[i]) > 0:
                places[i - 1] -= overlap / 2
                places[i] += overlap / 2
    for name, place in zip(names, places, strict=True):
        name.xyann = (name.xyann[0], place - height_of(name))


# --- axes -----------------------------------------------------------------------------------------


def logarithmic(axes: Axes, formatter: FuncFormatter) -> None:
    """Make both axes logarithmic; only tens are marked, and only on the vertical axis."""
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log")
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_formatter(formatter)


def with_unit(*scales: tuple[float, str]) -> FuncFormatter:
    """Format numbers in the largest unit that they reach; the scales rise."""

    def text(value: float, _: object) -> str:
        scale, unit = next((s for s in reversed(scales) if value >= 0.999 * s[0]), scales[0])
        return f"{value / scale:.3g} {unit}"

    return FuncFormatter(text)


MILLISECONDS = with_unit((1e-3, "µs"), (1.0, "ms"), (1e3, "s"))
MEGABYTES = with_unit((1.0, "MB"), (1e3, "GB"))
SMALL_NUMBERS = FuncFormatter(
    lambda y, _: f"{y:g}" if y >= 0.01 else f"{y:.0e}".replace("e-0", "e-")
)
