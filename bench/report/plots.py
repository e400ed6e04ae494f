"""The results drawn: time and memory over the number of rows, errors of samples over their cost."""

import math
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from pandas import DataFrame

from bench.cases.sampled import DRAWS
from bench.cases.sampled import STUDY as SAMPLED
from bench.cases.sweep import SCALING_DIM
from bench.peers import METHODS
from bench.report.tables import Sweep, newest, number
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
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def error_over_cost(rows: DataFrame) -> Figure:
    """Draw the gradient's error of single draws: over their time, and by the kind of rows."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(2, 3))
    large = rows[rows.kind.eq("clusters") & rows.ms.notna()].set_index("method")
    drawn = large[large.index.str.startswith("sampled, ")]
    left.plot(drawn.ms, drawn.gradient_error, marker="o")
    for method, ms, error in drawn[["ms", "gradient_error"]].itertuples():
        left.annotate(f"  blocks of {method.split()[-1]}", (ms, error))
    exact = number(large.ms.get("exact", math.nan))
    left.set(title=f"65,536 rows in clusters (exact: {exact} ms)", xlabel="time of a draw, ms")
    left.set(ylabel="gradient's error", xlim=(0, 1.4 * drawn.ms.max()), ylim=(0, None))
    shown = ["degree 2", *(f"degree {degree}, list" for degree in DRAWS)]
    errors = rows[rows.kind.isin(KINDS) & rows.method.isin(shown)]
    table = errors.pivot(index="kind", columns="method", values="gradient_error")
    table.loc[list(KINDS), shown].plot(ax=right, logy=True, style=["x", *"osD^"], rot=20)
    right.set(title="16,384 rows in blocks of 1,024", xlabel="")
    right.legend(loc="lower left")
    return figure


def draw(results: Path) -> list[Path]:
    """Draw the results in a folder into it."""
    sweeps = {f"sweep-{device}": Sweep(results, device) for device in ("cpu", "cuda")}
    pictures = {
        name: partial(over_rows, sweep) for name, sweep in sweeps.items() if len(sweep.ours)
    }
    samples = newest(SAMPLED.table, results, "cpu")
    if samples.gradient_error.notna().any():
        pictures["sampled"] = partial(error_over_cost, samples)
    return save(results / "plots", pictures)
