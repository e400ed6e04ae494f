"""The two plots of the demo."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from digits import METHODS, Layer, Run, energy_history
from measure import Cost

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

GREY, BLUE, ORANGE = "#777777", "#0072b2", "#d55e00"
METHOD_COLORS = {"none": GREY, "MHE": BLUE, "RP-CoMHE": ORANGE}
FORMULA_COLORS = {"naive": GREY, "comhe_ext": ORANGE}


def plot_energies(runs: Sequence[Run], layers: Sequence[Layer], path: Path) -> None:
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True, layout="constrained")
    steps = runs[0].steps
    for index, (axes, layer) in enumerate(zip(panels.flat, layers, strict=True)):
        lines = {METHODS[m]: energy_history(runs, m)[:, :, index] for m in METHOD_COLORS}
        ends = {label: float(history[:, -1].mean()) for label, history in lines.items()}
        colors = {METHODS[m]: color for m, color in METHOD_COLORS.items()}
        for label, history in lines.items():
            mean, deviation = history.mean(0), history.std(0, ddof=1)
            axes.plot(steps, mean, color=colors[label], linewidth=1.8)
            axes.fill_between(
                steps, mean - deviation, mean + deviation, color=colors[label], alpha=0.15, lw=0
            )
        levels = {"random vectors": layer.random(), "optimum": layer.optimum()}
        for label, level in levels.items():
            if level is not None:
                axes.axhline(level, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
                ends[label], colors[label] = level, "black"
        axes.margins(y=0.08)
        label_ends(axes, ends, colors)
        kind = "half space" if layer.half_space else "full space"
        axes.set_title(
            f"{layer.name}: {layer.rows} vectors of {layer.width}, {kind}", loc="left", fontsize=10
        )
        strip(axes)
        axes.set_xlim(0, steps[-1])
        axes.ticklabel_format(axis="y", useOffset=False)
    for axes in panels[-1]:
        axes.set_xlabel("training step")
    for axes in panels[:, 0]:
        axes.set_ylabel("energy, mean over pairs")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_costs(costs: Sequence[Cost], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for axes, column, title in (
        (left, "milliseconds", "time of energy + gradient, ms"),
        (right, "peak_mib", "peak memory above the input, MiB"),
    ):
        for method, color in FORMULA_COLORS.items():
            ran = [c for c in costs if c.method == method and getattr(c, column) is not None]
            if not ran:
                continue
            values = [getattr(c, column) for c in ran]
            axes.loglog([c.rows for c in ran], values, color=color, marker="o", linewidth=1.8)
            # at the line's own end: it may stop short of the other
            axes.annotate(
                method,
                (ran[-1].rows, values[-1]),
                xytext=(7, 0),
                textcoords="offset points",
                color=color,
                va="center",
            )
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("N")
        ticks = sorted({c.rows for c in costs})
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        strip(axes)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def strip(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def label_ends(axes: Axes, ends: dict[str, float], colors: dict[str, str]) -> None:
    """Name each line at its right end, moved apart where two would overlap."""
    low, high = axes.get_ylim()
    gap = 0.075 * (high - low)
    places: list[float] = []
    for label, end in sorted(ends.items(), key=lambda item: item[1]):
        place = max(end, places[-1] + gap) if places else end
        places.append(place)
        axes.annotate(
            label,
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            color=colors[label],
            va="center",
            fontsize=9,
            annotation_clip=False,
        )
