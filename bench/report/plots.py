"""The results drawn: time and memory over the number of rows, errors of sampled energies."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from pandas import DataFrame

from bench.cases import sampled
from bench.cases.shapes import SCALING_DIM
from bench.peers import METHODS
from bench.report.results import Sweep, newest
from bench.report.theme import save
from comhe_ext.testing.kinds import KINDS


def over_rows(sweep: Sweep) -> Figure:
    """Draw time and memory over the number of rows; a line ends where a method fails."""
    dim, labels = SCALING_DIM[sweep.device], {m: METHODS[m].label for m in METHODS}
    figure, panels = plt.subplots(1, 2, figsize=(10, 5.2))
    time = "ms", 1e-3, "s", "time of energy and gradient"
    memory = "peak_mib", 2.0**20, "B", "peak memory above the rows"
    for axes, (column, factor, unit, title) in zip(panels, (time, memory), strict=True):
        values = factor * sweep.table(column).loc[1, :, dim, "gradient"]
        values = values.dropna(axis=1, how="all").rename(columns=labels)
        values.plot(ax=axes, loglog=True, marker=".", legend=False)
        axes.lines[0].set_linewidth(3.5)  # ours
        axes.yaxis.set_major_formatter(EngFormatter(unit))
        axes.set(title=f"{title}, {dim} columns", xlabel="rows of one set")
    names = panels[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=4)
    return figure


def sampled_errors(rows: DataFrame) -> Figure:
    """Draw the gradient's error by the kind of rows and by what is estimated how."""
    words = {
        "degree 0": "blocks alone",
        "degree 2": "and a polynomial of degree 2",
        "degree 0, list": "and a list of near pairs",
        "degree 2, list": "and both: the default",
        "degree 3, list": "and both, degree 3",
        "degree 4, list": "and both, degree 4",
    }
    table = rows[rows.method.isin(words)].pivot(
        index="kind", columns="method", values="gradient_error"
    )
    figure, axes = plt.subplots(figsize=(8, 4.2))
    drawn = table.reindex(index=list(KINDS), columns=list(words)).rename(columns=words)
    marks = {"style": ["o", "x", "s", "+", "^", "v"], "fillstyle": "none"}
    drawn.plot(ax=axes, logy=True, **marks, xlabel="", legend=False)
    axes.set_title("gradient error of one draw, relative")
    figure.legend(loc="outside right upper")
    return figure


def figures(folder: Path) -> dict[str, Callable[[], Figure]]:
    """List what can be drawn from the results in a folder, by the names of the files."""
    sweeps = {f"sweep-{device}": Sweep(folder, device) for device in ("cpu", "cuda")}
    found: dict[str, Callable[[], Figure]] = {
        name: partial(over_rows, sweep) for name, sweep in sweeps.items() if len(sweep.ours)
    }
    rows = newest(sampled.STUDY.table, folder, "cpu")
    return found | ({"sampled": partial(sampled_errors, rows)} if len(rows) else {})


def draw(results: Path) -> list[Path]:
    """Draw the results in a folder into it."""
    return save(results / "plots", figures(results))
