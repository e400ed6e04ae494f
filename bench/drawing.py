"""What every plot needs: the colors of a page, axes, lines with their names, files."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
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


LIGHT = Theme(
    *("light", "#ffffff", "#1f2328", "#6e7781", "#d8dee4"),
    *("#c84c00", "#0b62a4", "#3d9bd1", "#00805a", "#b0508c", "#9a7400"),
)
DARK = Theme(
    *("dark", "#0d1117", "#e6edf3", "#8b949e", "#30363d"),
    *("#ff9147", "#6cb0f0", "#9ad4f5", "#3fcf9f", "#ec94c4", "#e3c14a"),
)
THEMES = (LIGHT, DARK)


@contextmanager
def drawn(theme: Theme) -> Iterator[None]:
    """Set the colors of a theme in matplotlib."""
    settings: Any = {
        "font.size": 10,
        "font.family": "DejaVu Sans",
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.faint,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.rule,
        "grid.linewidth": 0.7,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
    }
    with plt.rc_context(settings):
        yield


def save(
    folder: Path, pictures: dict[str, Callable[[Theme], Figure | None]], theme: Theme = LIGHT
) -> list[Path]:
    """Save the pictures that have results, as PNG; the same results give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with drawn(theme):
        for name, make in pictures.items():
            if (figure := make(theme)) is None:
                continue
            pixels = BytesIO()
            figure.savefig(pixels, format="png", dpi=150)
            plt.close(figure)
            written.append(folder / f"{name}.png")
            # with a palette of 64 colors a file has a quarter of the bytes
            Image.open(pixels).convert("RGB").quantize(64).save(written[-1], optimize=True)
    return written


# --- lines with their names beside them -----------------------------------------------------------


def name_line(axes: Axes, x: float, y: float, text: str, color: str, side: str) -> Annotation:
    """Write the name of a line beside its first point, or its last."""
    return axes.annotate(
        text,
        (x, y),
        xytext=(8 if side == "right" else -8, 0),
        textcoords="offset points",
        color=color,
        ha="left" if side == "right" else "right",
        va="center",
        fontsize=9,
        annotation_clip=False,
        path_effects=[withStroke(linewidth=2.5, foreground=plt.rcParams["figure.facecolor"])],
    )


def part_names(figure: Figure, names: Sequence[Annotation]) -> None:
    """Move names up and down until none covers another; they stand in one column."""
    figure.canvas.draw()
    point = figure.dpi / 72
    names = sorted(names, key=lambda name: name.get_window_extent().y0)
    height = max((name.get_window_extent().height for name in names), default=0.0)
    wanted = [name.get_window_extent().y0 for name in names]
    places = list(wanted)
    for _ in range(100):
        for i in range(1, len(places)):
            if (overlap := places[i - 1] + height - places[i]) > 0:
                places[i - 1] -= overlap / 2
                places[i] += overlap / 2
    floor = min((name.axes.bbox.y0 for name in names if name.axes), default=0.0)
    places = [max(place, floor + i * height) for i, place in enumerate(places)]
    for name, old, new in zip(names, wanted, places, strict=True):
        name.xyann = (name.xyann[0], name.xyann[1] + (new - old) / point)


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
FLOPS = with_unit((1e9, "Gflop/s"), (1e12, "Tflop/s"))
SMALL_NUMBERS = FuncFormatter(
    lambda y, _: f"{y:g}" if y >= 0.01 else f"{y:.0e}".replace("e-0", "e-")
)
