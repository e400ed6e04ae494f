"""The pictures of sampled energies: the error by kind of rows, and against the time of a draw."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from bench.drawing import SMALL_NUMBERS, Theme
from bench.sampled import error_of
from bench.store import Row
from comhe_ext.testing.kinds import KINDS


def sampled_plot(theme: Theme, rows: Sequence[Row]) -> Figure:
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
    for offset, (method, (color, label)) in enumerate(methods.items()):
        points = [
            (place + 0.11 * (offset - 2.5), error)
            for place, kind in enumerate(KINDS)
            if (error := error_of(rows, kind, method)) is not None
        ]
        if points:
            by_kind.plot(*zip(*points, strict=True), "o", color=color, markersize=5, label=label)
    by_kind.set_yscale("log")
    by_kind.yaxis.set_major_formatter(SMALL_NUMBERS)
    by_kind.set_xticks(range(len(KINDS)), [kind.replace("-", "-\n") for kind in KINDS])
    by_kind.grid(visible=False, axis="x")
    by_kind.legend(frameon=False, fontsize=8, loc="lower left")
    by_kind.set_title("gradient error of one draw, relative")

    timed = [row for row in rows if row["part"] == "times" and row["kind"] == "clusters"]
    drawn = [row for row in timed if row["gradient_error"]]
    by_time.plot(
        [float(row["seconds"]) for row in drawn],
        [float(row["gradient_error"]) for row in drawn],
        "o-",
        color=theme.orange,
    )
    for row in drawn:
        samples = row["method"].rpartition(" ")[2]
        by_time.annotate(
            f"blocks of {int(samples):,}",
            (float(row["seconds"]), float(row["gradient_error"])),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=9,
        )
    for row in timed:
        if row["method"] == "exact":
            by_time.axvline(float(row["seconds"]), color=theme.ink, linestyle=(0, (4, 3)))
            by_time.annotate(
                "exact",
                (float(row["seconds"]), 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-4, -12),
                textcoords="offset points",
                ha="right",
                fontsize=9,
            )
    by_time.set_xscale("log")
    by_time.set_yscale("log")
    by_time.yaxis.set_minor_locator(NullLocator())
    by_time.yaxis.set_major_formatter(SMALL_NUMBERS)
    by_time.margins(x=0.3)
    by_time.xaxis.set_major_formatter(SMALL_NUMBERS)
    by_time.xaxis.set_minor_locator(NullLocator())
    by_time.set_xlabel("processor seconds, energy + gradient")
    by_time.set_title("clusters, error against time")
    return figure
