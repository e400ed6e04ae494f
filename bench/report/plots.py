"""The results drawn: time and memory over the number of rows."""

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from bench.cases.sweep import SCALING_DIM
from bench.peers import METHODS
from bench.report.tables import Sweep
from bench.report.theme import save


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
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw(results: Path) -> list[Path]:
    """Draw the results in a folder into it."""
    sweeps = {f"sweep-{device}": Sweep(results, device) for device in ("cpu", "cuda")}
    drawn = {name: sweep for name, sweep in sweeps.items() if len(sweep.ours)}
    return save(results / "plots", {name: partial(over_rows, drawn[name]) for name in drawn})
