"""`python -m bench plot`: the results drawn, each plot for light and for dark pages."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from bench import accuracy, compare, roofline, sampled, sweep
from bench.digits import METHODS as TRAININGS
from bench.digits import Layer, Run, energy_history
from bench.drawing import (
    FLOPS,
    MEGABYTES,
    MILLISECONDS,
    SMALL_NUMBERS,
    THEMES,
    Theme,
    logarithmic,
    name_line,
    part_names,
    save,
)
from bench.methods import METHODS, OURS
from bench.sampled_plots import sampled_plot
from bench.shapes import GOALS, LAYERS, SCALING_DIM, SMALL, WIDE_DIM, Case
from bench.store import Row

# the methods that get a line: one or two of each family
LINES = {
    "comhe-cpu": "orange",
    "comhe-triton": "orange",
    "comhe-torch": "orange",
    "row-blocks": "pink",
    "compile": "green",
    "pdist": "blue",
    "cdist-mm": "sky",
    "naive": "ink",
    "checkpoint": "faint",
    "keops": "yellow",
    "keops-native": "yellow",
}
DASHED = ("comhe-torch", "checkpoint", "keops")  # of two lines of one color, the less important one


def color_of(theme: Theme, method: str) -> str:
    return getattr(theme, LINES[method])


def is_best(method: str) -> bool:
    return METHODS[method].family == OURS and method not in DASHED


def draw_line(axes: Axes, points: Sequence[tuple[float, float]], method: str, color: str) -> None:
    axes.plot(
        *zip(*points, strict=True),
        color=color,
        linewidth=2.8 if is_best(method) else 1.5,
        linestyle=(0, (4, 2)) if method in DASHED else "-",
        marker="o",
        markersize=4 if is_best(method) else 2.5,
        zorder=3 if is_best(method) else 2,
    )


def setting_words(setting: compare.Setting) -> str:
    machine, device, threads = setting
    if device == "cuda":
        return machine
    return f"{machine.split(',')[0]}, {threads} thread" + ("" if threads == "1" else "s")


ENDS = {"out of memory": "x", "timeout": ">"}


def over_rows(
    theme: Theme, rows: Sequence[Row], value: Callable[[Row], float | None], dim: int
) -> tuple[Figure, Axes]:
    """Draw a line for each method over the rows of one set, with its name at the left end."""
    figure, axes = plt.subplots(figsize=(8.6, 4.8))
    wanted = [r for r in rows if (r["mode"], r["sets"], r["dim"]) == ("gradient", "1", str(dim))]
    numbers = sorted({int(row["rows"]) for row in wanted})
    names = []
    for method in LINES:
        mine = sorted((r for r in wanted if r["method"] == method), key=lambda r: int(r["rows"]))
        line = [(int(r["rows"]), y) for r in mine if (y := value(r)) is not None]
        if not line:
            continue
        color = color_of(theme, method)
        draw_line(axes, line, method, color)
        names.append(name_line(axes, *line[0], METHODS[method].label, color, "left"))
        beyond = next((r["status"] for r in mine if int(r["rows"]) > line[-1][0]), "")
        if beyond in ENDS:
            axes.plot(*line[-1], marker=ENDS[beyond], color=color, markersize=8, zorder=4)
    logarithmic(axes, MILLISECONDS)
    ticks = numbers[::2] if len(numbers) > 6 else numbers
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.yaxis.tick_right()
    axes.spines["left"].set_visible(False)
    axes.spines["right"].set_visible(True)
    axes.set_xlabel("N, rows in one set        × out of memory beyond      ▶ too slow beyond")
    figure.subplots_adjust(left=0.24, right=0.91, top=0.92, bottom=0.11)
    part_names(figure, names)
    return figure, axes


def time_plot(theme: Theme, rows: Sequence[Row], setting: compare.Setting, dim: int) -> Figure:
    figure, axes = over_rows(theme, rows, compare.milliseconds, dim)
    axes.set_title(f"Time of energy + gradient, k = {dim} ({setting_words(setting)})")
    return figure


def memory_plot(theme: Theme, rows: Sequence[Row], setting: compare.Setting, dim: int) -> Figure:
    def peak(row: Row) -> float | None:
        return 1.048576 * float(row["peak_mib"]) if row["peak_mib"] and row["wall_ms"] else None

    figure, axes = over_rows(theme, rows, peak, dim)
    axes.yaxis.set_major_formatter(MEGABYTES)
    axes.set_title(f"Peak memory above the points, k = {dim} ({setting_words(setting)})")
    return figure


BARS = (
    "row-blocks",
    "compile",
    "pdist",
    "cdist-mm",
    "checkpoint",
    "naive",
    "keops-native",
    "keops",
)
REASONS = {"timeout": "too slow", "": "not measured"}


def speed_plot(theme: Theme, rows: Sequence[Row], setting: compare.Setting) -> Figure | None:
    """Draw how many times as long each peer takes, a panel for each shape."""
    cases = compare.by_case(rows)
    projected = [shape for shape in LAYERS if shape.dim == 40]
    wanted = [Case(s, "gradient") for s in (*GOALS[setting[1]], *SMALL[setting[1]], *projected)]
    panels = [case for case in wanted if compare.ours(cases.get(case, [])) is not None]
    if not panels:
        return None
    here = {row["method"] for row in rows if row["status"] != "unavailable"}
    peers = [peer for peer in BARS if peer in here]
    columns, lines = 3, -(-len(panels) // 3)
    figure, grid = plt.subplots(
        lines, columns, figsize=(9.2, 0.5 + 2.1 * lines), sharex=True, sharey=True, squeeze=False
    )
    ratios: list[float] = []
    for axes, case in zip(grid.flat, panels, strict=False):
        mine = compare.ours(cases[case])
        found = {row["method"]: row for row in cases[case]}
        for place, peer in enumerate(peers):
            row = found.get(peer)
            ratio = None if row is None else compare.times_faster(mine, row)
            if ratio is None:
                status = "" if row is None else row["status"]
                words = REASONS.get(status, status)
                axes.text(1.08, place, words, color=theme.faint, va="center", fontsize=8)
                continue
            ratios.append(ratio)
            color = theme.blue if ratio >= 1 else theme.orange
            axes.barh(place, ratio - 1, left=1, height=0.64, color=color)
            text = f"{ratio:.2g}×" if ratio < 10 else f"{ratio:.0f}×"
            axes.text(1.08 * max(ratio, 1), place, text, va="center", fontsize=8.5)
        axes.axvline(1, color=theme.ink, linewidth=1)
        layer = LAYERS.get(case.shape, "").split(", ")[0]
        axes.set_title(f"{layer}\n{case.shape.words}".strip(), fontsize=9)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    first = grid.flat[0]
    first.set_xscale("log")
    first.set_xlim(0.8 * min(*ratios, 1.0), 3.0 * max(*ratios, 1.0))
    first.set_ylim(len(peers) - 0.4, -0.6)
    first.set_yticks(range(len(peers)), [METHODS[peer].label for peer in peers])
    for axes in grid.flat:
        axes.tick_params(axis="both", which="both", length=0, labelbottom=False)
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
    title = f"Times as long as comhe_ext, energy + gradient ({setting_words(setting)})"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.tight_layout(h_pad=1.2)
    return figure


ERROR_LINES = (
    *("comhe-cpu", "comhe-triton", "comhe-torch", "pdist", "keops", "keops-native"),
    *("cdist-mm", "compile", "naive"),
)


def accuracy_plot(theme: Theme, rows: Sequence[Row]) -> Figure:
    """Draw the gradient's error over the angle of the closest rows; not finite is at the top."""
    figure, axes = plt.subplots(figsize=(8.6, 4.4))
    angles = {case: angle for case, angle in accuracy.ANGLES.items() if angle is not None}
    names = []
    for method in ERROR_LINES:
        mine = {r["case"]: r for r in rows if r["method"] == method and r["gradient_error"]}
        errors = {c: float(mine[c]["gradient_error"]) for c in angles if c in mine}
        if not errors:
            continue
        line = [(angles[c], min(y, 1.0) if math.isfinite(y) else 1.0) for c, y in errors.items()]
        color = color_of(theme, method)
        draw_line(axes, line, method, color)
        names.append(name_line(axes, *line[-1], METHODS[method].label, color, "right"))
    logarithmic(axes, SMALL_NUMBERS)
    axes.invert_xaxis()
    axes.set_xticks(list(angles.values()), [SMALL_NUMBERS(angle) for angle in angles.values()])
    axes.set_xlabel(
        f"angle in radians of the {accuracy.PAIRS} closest pairs among {accuracy.ROWS} rows"
    )
    axes.set_title("Relative error of the gradient against float64")
    figure.subplots_adjust(left=0.07, right=0.76, top=0.92, bottom=0.13)
    part_names(figure, names)
    return figure


ROOFLINE_LINES = ("comhe-cpu", "comhe-triton", "row-blocks", "compile", "naive")


def roofline_plot(
    theme: Theme, rows: Sequence[Row], setting: compare.Setting, top: Row | None
) -> Figure | None:
    """Draw useful operations a second over those for each byte of points and gradient."""
    peak = roofline.peak(top)
    if top is None or peak is None:
        return None
    figure, axes = plt.subplots(figsize=(8.6, 4.8))
    names = []
    left, right = math.inf, 0.0
    for dim, style in ((SCALING_DIM[setting[1]], "-"), (WIDE_DIM, (0, (4, 2)))):
        for method in ROOFLINE_LINES:
            line = []
            for row in rows:
                case = compare.case_of(row)
                if row["method"] != method or (case.shape.sets, case.shape.dim) != (1, dim):
                    continue
                if (rate := roofline.rate(case, row)) is not None:
                    line.append((case.shape.flop / case.shape.bytes, rate))
            if not line:
                continue
            line.sort()
            left, right = min(left, line[0][0]), max(right, line[-1][0])
            color = color_of(theme, method)
            width = 2.8 if is_best(method) else 1.5
            axes.plot(
                *zip(*line, strict=True),
                color=color,
                linestyle=style,
                linewidth=width,
                marker="o",
                markersize=3,
            )
            label = f"{METHODS[method].label}, k = {dim}"
            names.append(name_line(axes, *line[-1], label, color, "right"))
    if not names:
        return None
    bandwidth = float(top["bytes_per_second"])
    ridge = peak / bandwidth
    roof = sorted({min(left, ridge) / 2, ridge, 1.2 * right})
    heights = [min(peak, x * bandwidth) for x in roof]
    axes.plot(roof, heights, color=theme.ink, linewidth=1.5)
    axes.annotate(
        f"peak, {FLOPS(peak)}",
        (roof[-1], peak),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
    )
    logarithmic(axes, FLOPS)
    axes.set_xlim(roof[0], roof[-1])
    axes.set_xlabel("useful operations for each byte of points and gradient, 3 (N - 1) / 8")
    axes.set_title(f"Useful rate below the roof of the machine ({setting_words(setting)})")
    figure.subplots_adjust(left=0.12, right=0.74, top=0.92, bottom=0.12)
    part_names(figure, names)
    return figure


ALTERNATIVES = {
    "time": "Time of energy and gradient over the number of rows",
    "memory": "Peak memory over the number of rows",
    "speed": "How many times as long the others take",
    "roofline": "Rates below the roof of the machine",
    "accuracy": "Error of the gradient over the angle between close rows",
}


# --- files ----------------------------------------------------------------------------------------


def main_setting(rows: Sequence[Row], device: str) -> compare.Setting | None:
    """Choose what is drawn: the machine measured last, and of a processor one thread."""
    wanted = [r for r in rows if r["device"] == device]
    if device == "cpu":
        wanted = [r for r in wanted if r["threads"] == "1"]
    newest = max(wanted, key=lambda row: row["date"], default=None)
    return None if newest is None else compare.setting_of(newest)


def figures(folder: Path) -> dict[str, Callable[[Theme], Figure | None]]:
    """List what can be drawn from the results in a folder, by the names of the files."""
    found: dict[str, Callable[[Theme], Figure | None]] = {}
    measured = sweep.TABLE.newest(folder)
    for device in ("cpu", "cuda"):
        if (setting := main_setting(measured, device)) is None:
            continue
        rows = compare.by_setting(measured)[setting]
        dim = SCALING_DIM[device]
        top = roofline.peaks(setting, folder)
        found[f"time-{device}"] = partial(time_plot, rows=rows, setting=setting, dim=dim)
        found[f"memory-{device}"] = partial(memory_plot, rows=rows, setting=setting, dim=dim)
        found[f"speed-{device}"] = partial(speed_plot, rows=rows, setting=setting)
        found[f"roofline-{device}"] = partial(roofline_plot, rows=rows, setting=setting, top=top)
    for device in ("cpu", "cuda"):
        errors = [row for row in accuracy.TABLE.newest(folder) if row["device"] == device]
        if errors:
            found[f"accuracy-{device}"] = partial(accuracy_plot, rows=errors)
    if estimates := sampled.TABLE.newest(folder):
        found["sampled"] = partial(sampled_plot, rows=estimates)
    return found


def draw(results: Path) -> list[Path]:
    """Draw the results in a folder into it, for light and for dark pages."""
    written = []
    for theme in THEMES:
        pictures = {f"{name}-{theme.name}": make for name, make in figures(results).items()}
        written += save(results / "plots", pictures, theme)
    return written


# --- the demo's training --------------------------------------------------------------------------


def energies_plot(theme: Theme, runs: Sequence[Run], layers: Sequence[Layer]) -> Figure:
    """Draw the energy of each layer over the steps, mean and deviation over the seeds."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True)
    colors = {"none": theme.faint, "MHE": theme.blue, "RP-CoMHE": theme.orange}
    steps = runs[0].steps
    names: list[list[Annotation]] = []
    for index, (axes, layer) in enumerate(zip(panels.flat, layers, strict=True)):
        names.append([])
        for method, color in colors.items():
            history = energy_history(runs, method)[:, :, index]
            mean, deviation = history.mean(0), history.std(0, ddof=1)
            axes.plot(steps, mean, color=color, linewidth=1.8)
            axes.fill_between(
                steps, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0
            )
            names[-1].append(
                name_line(axes, steps[-1], mean[-1], TRAININGS[method], color, "right")
            )
        for label, level in (("random vectors", layer.random()), ("optimum", layer.optimum())):
            if level is not None:
                axes.axhline(level, color=theme.ink, linewidth=0.8, linestyle=(0, (4, 3)))
                names[-1].append(name_line(axes, steps[-1], level, label, theme.ink, "right"))
        kind = "half space" if layer.half_space else "full space"
        axes.set_title(f"{layer.name}: {layer.rows} vectors of {layer.width}, {kind}", fontsize=10)
        axes.set_xlim(0, steps[-1])
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(visible=False)
    for axes in panels[-1]:
        axes.set_xlabel("training step")
    for axes in panels[:, 0]:
        axes.set_ylabel("energy, mean over pairs")
    figure.subplots_adjust(left=0.09, right=0.86, top=0.95, bottom=0.08, wspace=0.68)
    for column in names:
        part_names(figure, column)
    return figure
