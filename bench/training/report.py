"""The table, the paired differences and the pictures of a plan's runs."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from bench.report.theme import save
from bench.training import cost
from bench.training.plans import HELD, NONE
from bench.training.runs import read_lines

CONFIDENCE = 0.95


def load(folder: Path) -> pd.DataFrame:
    """Read the lines of all runs in `folder`, one row an epoch.

    Raises:
        FileNotFoundError: there is none.
    """
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in read_lines(file)]
    if not lines:
        raise FileNotFoundError(f"no runs in {folder}")
    frame = pd.DataFrame(lines)
    # the layers' mean
    for name in ("energies", "norms"):
        frame[name] = [np.mean(list(x.values())) if isinstance(x, dict) else np.nan
                       for x in frame[name]]  # fmt: skip
    return frame


def last_epochs(frame: pd.DataFrame) -> pd.DataFrame:
    """Take the last line of the runs that came to their end."""
    return frame[frame.epoch == frame.epochs]


def summary(last: pd.DataFrame) -> pd.DataFrame:
    """Average each method over its seeds, in the order of the mean error; deviations of a run."""
    groups = last.groupby("method", sort=False)
    table = pd.DataFrame(
        {
            "runs": groups.size(),
            "test error, %": groups.test_error.mean(),
            "deviation": groups.test_error.std(),
            "training error, %": groups.train_error.mean(),
            "energy": groups.energies.mean(),
            "row norm": groups.norms.mean(),
            "lr": groups.lr.first(),
            "weight decay": groups.weight_decay.first(),
            "weights": groups.weight.first().map("{:g}".format)
            + " / "
            + groups.output_weight.first().map("{:g}".format),
        }
    )
    return table.sort_values("test error, %").reset_index()


def differences(last: pd.DataFrame) -> pd.DataFrame:
    """Compare each method with "none" and with "norms held", seed by seed.

    The interval is Student's, of one comparison. `differs` is after Holm's correction over all of
    them: the k-th smallest of m values of p must not be above (1 - confidence) / (m - k + 1), nor
    any before it.
    """
    errors = last.pivot(index="seed", columns="method", values="test_error")
    rows = []
    for control in (NONE, HELD):
        for method in errors.columns:
            if control not in errors or method == control or (control, method) == (HELD, NONE):
                continue
            paired = (errors[method] - errors[control]).dropna()
            if len(paired) < 2:
                continue
            test = stats.ttest_1samp(paired, 0.0)
            low, high = test.confidence_interval(CONFIDENCE)
            rows.append(
                {
                    "method": method,
                    "compared with": control,
                    "seeds": len(paired),
                    "difference, %": paired.mean(),
                    "low": low,
                    "high": high,
                    "p": test.pvalue,
                }
            )
    table = pd.DataFrame(
        rows,
        columns=["method", "compared with", "seeds", "difference, %", "low", "high", "p"],
    )
    order = table.p.sort_values().index
    allowed = [(1 - CONFIDENCE) / (len(order) - place) for place in range(len(order))]
    holds = (table.p[order].to_numpy() <= allowed).cumprod().astype(bool)
    table["differs"] = pd.Series(holds, index=order, dtype=object).map({True: "yes", False: "no"})
    return table


def as_text(table: pd.DataFrame) -> str:
    """Write a table as Markdown."""
    return table.to_markdown(index=False, floatfmt=".4g")


def report(folder: Path) -> None:
    """Print the tables of the runs in `folder`, and write them and the pictures into it."""
    frame = load(folder / "runs")
    last = last_epochs(frame)
    # there are differences from the second seed on
    parts = [as_text(table) for table in (summary(last), differences(last)) if len(table)]
    if costs := cost.table(folder.parent, folder.name):
        parts.append(f"Processor time of a step; {costs}")
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))
    pictures = {
        "errors": lambda: error_picture(last),
        "energies": lambda: energy_picture(frame),
    }
    if last.width.nunique() > 1:
        pictures["widths"] = lambda: width_picture(last)
    save(folder, pictures)


def error_picture(last: pd.DataFrame) -> Figure:
    """Draw each run's test error, and each method's mean."""
    order = list(summary(last).method)[::-1]
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(order) + 1))
    for place, method in enumerate(order):
        errors = last.test_error[last.method == method]
        axes.plot(errors, [place] * len(errors), "o", alpha=0.5, color="C0")
        axes.plot(errors.mean(), place, "|", markersize=18, color="black")
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(-0.5, len(order) - 0.5)
    axes.set_xlabel("test error, %: each run, and the mean")
    return figure


def energy_picture(frame: pd.DataFrame) -> Figure:
    """Draw the mean energy of the layers over the training, a line a method."""
    figure, axes = plt.subplots(figsize=(8, 4))
    for method, lines in frame.dropna(subset="energies").groupby("method", sort=False):
        axes.plot(lines.groupby("epoch").energies.mean(), label=method)
    axes.set_xlabel("epoch")
    axes.set_ylabel("energy, the layers' mean")
    figure.legend(loc="outside right upper")
    return figure


def width_picture(last: pd.DataFrame) -> Figure:
    """Draw the mean test error against the width."""
    figure, axes = plt.subplots(figsize=(8, 4))
    for method, runs in last.groupby("method", sort=False):
        errors = runs.groupby("width").test_error
        mean = errors.mean()
        axes.errorbar(mean.index, mean, errors.std(), capsize=3, label=method)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("channels of the first stage, logarithmic")
    axes.set_ylabel("test error, %, with the deviation of a run")
    figure.legend(loc="outside right upper")
    return figure
