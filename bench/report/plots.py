"""The results drawn, each picture for light and for dark pages."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from pandas import DataFrame

from bench.cases import sampled
from bench.cases.shapes import GOALS, LAYERS, SCALING_DIM, SMALL, Shape
from bench.cases.sweep import ACCURACY, ANGLES, PAIRS, ROWS
from bench.peers.energies import METHODS, OURS
from bench.report import theme as page
from bench.report.results import Sweep, newest
from bench.report.theme import SMALL_NUMBERS, Theme, logarithmic, name_line, part_names
from comhe_ext.testing.kinds import KINDS

# the methods that get a line: one or two of each family
COLORS = {
    **dict.fromkeys(("comhe-cpu", "comhe-triton", "comhe-torch"), "orange"),
    **{"row-blocks": "pink", "compile": "green", "pdist": "blue", "cdist-mm": "sky"},
    **{"naive": "ink", "checkpoint": "faint", "keops": "yellow", "keops-native": "yellow"},
}
DASHED = ("comhe-torch", "checkpoint", "keops")  # of two lines of one color, the less important one


def lines(
    theme: Theme, values: DataFrame, side: str, unit: FuncFormatter, title: str, words: str
) -> Figure:
    """Draw a line for each column over the index, with its name at one end."""
    figure, axes = plt.subplots(figsize=(8.6, 4.8))
    names = []
    for method, color in COLORS.items():
        line = values[method].dropna() if method in values else values.iloc[:0, 0]
        if line.empty:
            continue
        color, best = getattr(theme, color), method in OURS and method not in DASHED
        style = {"color": color, "marker": "o", "zorder": 3 if best else 2}
        style |= {"linewidth": 2.8 if best else 1.5, "markersize": 4 if best else 2.5}
        axes.plot(line, linestyle=(0, (4, 2)) if method in DASHED else "-", **style)
        end = 0 if side == "left" else -1
        point = line.index[end], line.iloc[end]
        names.append(name_line(axes, *point, METHODS[method].label, color, side))
    logarithmic(axes, unit)
    axes.set_title(title)
    axes.set_xlabel(words)
    if side == "left":
        axes.yaxis.tick_right()
        axes.spines["left"].set_visible(False)
        axes.spines["right"].set_visible(True)
    left, right = (0.26, 0.91) if side == "left" else (0.07, 0.73)
    figure.subplots_adjust(left=left, right=right, top=0.92, bottom=0.12)
    part_names(figure, names)
    return figure


def over_rows(theme: Theme, sweep: Sweep, column: str, unit: FuncFormatter, what: str) -> Figure:
    """Draw a column over the number of rows of one set; a cross where memory ends a line."""
    dim = SCALING_DIM[sweep.device]
    where = (1, slice(None), dim, "gradient")
    values, status = (sweep.table(name).loc[where] for name in (column, "status"))
    if column == "peak_mib":
        values = 1.048576 * values
    title = f"{what}, k = {dim} ({setting(sweep)})"
    figure = lines(theme, values, "left", unit, title, "N, rows in one set")
    (axes,), words = figure.axes, ""
    for method in values.columns.intersection(list(COLORS)):
        line = values[method].dropna()
        beyond = status[method].loc[line.index.max() :].eq("out of memory") if len(line) else line
        if beyond.any():
            mark = {"color": getattr(theme, COLORS[method]), "markersize": 8, "zorder": 4}
            axes.plot(line.index[-1], line.iloc[-1], marker="x", **mark)
            words = "      × out of memory beyond"
    ticks = list(values.index)[::2]
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.set_xlabel(f"N, rows in one set{words}")
    return figure


def setting(sweep: Sweep) -> str:
    row = sweep.rows.iloc[0]
    if sweep.device == "cuda":
        return str(row.machine)
    return f"{row.machine.split(',')[0]}, {row.threads} thread" + "s" * int(row.threads > 1)


BARS = ["row-blocks", "compile", "pdist", "cdist-mm", "checkpoint", "naive"]
BARS += ["keops-native", "keops"]
REASONS = {"timeout": "too slow", "nan": "not measured"}


def speed(theme: Theme, sweep: Sweep, panels: Sequence[Shape]) -> Figure:
    """Draw how many times as long each peer takes, a panel for each shape."""
    status = sweep.table("status")
    peers = [p for p in BARS if status[p].isin(["ok", "timeout", "out of memory"]).any()]
    height = -(-len(panels) // 3)
    size = (9.2, 0.8 + 2.1 * height)
    figure, grid = plt.subplots(height, 3, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axes, shape in zip(grid.flat, panels, strict=False):
        case = (*shape, "gradient")
        for place, peer in enumerate(peers):
            ratio = sweep.ratios.loc[case, peer]
            if np.isnan(ratio):
                why = str(status.loc[case, peer])
                text = REASONS.get(why, why)
                axes.text(1.08, place, text, color=theme.faint, va="center", fontsize=8)
                continue
            color = theme.blue if ratio >= 1 else theme.orange
            axes.barh(place, ratio - 1, left=1, height=0.64, color=color)
            text = f"{ratio:.2g}×" if ratio < 10 else f"{ratio:.0f}×"
            axes.text(1.08 * max(ratio, 1), place, text, va="center", fontsize=8.5)
        axes.axvline(1, color=theme.ink, linewidth=1)
        axes.set_title(f"{LAYERS.get(shape, '')}\n{shape}".strip(), fontsize=9)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    first, ratios = grid.flat[0], sweep.ratios[peers]
    first.set_xscale("log")
    first.set_xlim(0.8 * min(ratios.min(axis=None), 1.0), 3.0 * ratios.max(axis=None))
    first.set_ylim(len(peers) - 0.4, -0.6)
    first.set_yticks(range(len(peers)), [METHODS[peer].label for peer in peers])
    for axes in grid.flat:
        axes.tick_params(axis="both", which="both", length=0, labelbottom=False)
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
    title = f"Times as long as comhe_ext, energy + gradient ({setting(sweep)})"
    figure.suptitle(
        f"{title}\nlength of the bars: logarithmic, from 1", x=0.01, ha="left", fontsize=11
    )
    figure.tight_layout(h_pad=1.2)
    return figure


def accuracy(theme: Theme, rows: DataFrame) -> Figure:
    """Draw the gradient's error over the angle of the closest rows; not finite is at the top."""
    close = rows[rows.case.isin(ANGLES) & ~rows.method.isin(["checkpoint", "row-blocks"])]
    values = close.assign(x=close.case.map(ANGLES), y=close.gradient_error.clip(upper=1.0))
    values = values.pivot(index="x", columns="method", values="y")[::-1]
    words = f"angle in radians of the {PAIRS} closest pairs among {ROWS} rows"
    title = "Relative error of the gradient against float64"
    figure = lines(theme, values, "right", SMALL_NUMBERS, title, words)
    figure.axes[0].invert_xaxis()
    figure.axes[0].set_xticks(list(values.index), [SMALL_NUMBERS(x) for x in values.index])
    return figure


def sampled_errors(theme: Theme, rows: DataFrame) -> Figure:
    """Draw the gradient errors by kind and method, and error against processor time."""
    figure, (by_kind, by_time) = plt.subplots(
        1, 2, figsize=(9.6, 4.4), width_ratios=(1.5, 1), layout="constrained"
    )
    methods = {
        "degree 0": (theme.faint, "blocks alone"),
        "degree 2": (theme.sky, "and a polynomial of degree 2"),
        "degree 0, list": (theme.pink, "and a list of near pairs"),
        "degree 2, list": (theme.orange, "and both: the default"),
        "degree 3, list": (theme.blue, "and both, degree 3"),
        "degree 4, list": (theme.green, "and both, degree 4"),
    }
    table = rows[rows.method.isin(methods)].pivot(
        index="kind", columns="method", values="gradient_error"
    )
    for offset, (method, (color, label)) in enumerate(methods.items()):
        if method in table:
            places = np.arange(len(KINDS)) + 0.11 * (offset - 2.5)
            errors = table[method].reindex(list(KINDS))
            by_kind.plot(places, errors, "o", color=color, markersize=5, label=label)
    by_kind.set_xticks(range(len(KINDS)), [kind.replace("-", "-\n") for kind in KINDS])
    by_kind.legend(frameon=False, fontsize=8, loc="lower left")
    by_kind.set_title("gradient error of one draw, relative")

    timed = rows[(rows.kind == "clusters") & rows.cpu_ms.notna()].assign(s=rows.cpu_ms / 1e3)
    drawn = timed.dropna(subset="gradient_error")
    by_time.plot(drawn.s, drawn.gradient_error, "o-", color=theme.orange)
    near = {"textcoords": "offset points", "fontsize": 9}
    for _, row in drawn.iterrows():
        words = f"blocks of {int(row.method.split()[-1]):,}"
        by_time.annotate(words, (row.s, row.gradient_error), xytext=(6, 4), **near)
    for exact in timed[timed.method == "exact"].s:
        by_time.axvline(exact, color=theme.ink, linestyle=(0, (4, 3)))
        top = {"xycoords": ("data", "axes fraction"), "xytext": (-4, -12), "ha": "right"}
        by_time.annotate("exact", (exact, 1.0), **top, **near)
    logarithmic(by_time, SMALL_NUMBERS)
    by_time.xaxis.set_major_formatter(SMALL_NUMBERS)
    by_time.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    by_time.margins(x=0.3)
    by_time.set_xlabel("processor seconds, energy + gradient")
    by_time.set_title("clusters, error against time")
    by_kind.set_yscale("log")
    by_kind.yaxis.set_major_formatter(SMALL_NUMBERS)
    by_kind.grid(visible=False, axis="x")
    return figure


# by the first word of the files' names
ALTERNATIVES = {
    "time": "Time of energy and gradient over the number of rows",
    "memory": "Peak memory over the number of rows",
    "speed": "How many times as long the others take",
    "accuracy": "Error of the gradient over the angle between close rows",
}


def figures(folder: Path) -> dict[str, Callable[[Theme], Figure]]:
    """List what can be drawn from the results in a folder, by the names of the files."""
    found: dict[str, Callable[[Theme], Figure]] = {}
    for device in ("cpu", "cuda"):
        sweep, errors = Sweep(folder, device), newest(ACCURACY.table, folder, device)
        if len(sweep.ours):
            draw = partial(over_rows, sweep=sweep)
            found[f"time-{device}"] = partial(
                draw, column="ms", unit=page.MILLISECONDS, what="Time of energy + gradient"
            )
            found[f"memory-{device}"] = partial(
                draw, column="peak_mib", unit=page.MEGABYTES, what="Peak memory above the points"
            )
        projected = [shape for shape in LAYERS if shape.dim == 40]
        wanted = [*GOALS[device], *SMALL[device], *projected]
        if panels := [shape for shape in wanted if sweep.has(shape)]:
            found[f"speed-{device}"] = partial(speed, sweep=sweep, panels=panels)
        if len(errors):
            found[f"accuracy-{device}"] = partial(accuracy, rows=errors)
    if len(estimates := newest(sampled.STUDY.table, folder, "cpu")):
        found["sampled"] = partial(sampled_errors, rows=estimates)
    return found


def draw(results: Path) -> list[Path]:
    """Draw the results in a folder into it, for light and for dark pages."""
    return [
        path
        for theme in page.THEMES
        for path in page.save(
            results / "plots",
            {f"{name}-{theme.name}": make for name, make in figures(results).items()},
            theme,
        )
    ]
