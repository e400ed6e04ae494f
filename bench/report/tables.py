"""The tables of README.md and docs out of the results, as Markdown."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from pandas import DataFrame

from bench import demo
from bench.cases import losses, models, projections, sampled
from bench.cases.shapes import LAYERS, MAIN, SMALL, Shape
from bench.cases.sweep import ACCURACY, CLOSE, DUPLICATES
from bench.peers import METHODS, OURS, PEERS
from bench.report.results import Key, Sweep, newest

NOTHING = "Not measured yet."
NO_GPU = "**Nothing has run on a GPU yet.** No number here is from one."
# what is shown in place of a time
REASONS = {"ok": "", "out of memory": "memory", "timeout": "time"}
# of the short table; one where we lose
SHORT = [Shape(1, 128, 40), Shape(1, 4096, 30), Shape(20, 2048, 40), Shape(1, 3072, 768)]
SHORT += [Shape(1, 50257, 40)]


def block(rows: DataFrame, table: DataFrame) -> str:
    """Write a table, words to the left and numbers to the right, and say what rows it is of."""
    if rows.empty:
        return NOTHING
    sides = ["left"] + ["right"] * (len(table.columns) - 1)
    text = table.fillna("").to_markdown(index=False, disable_numparse=True, colalign=sides)
    return f"{caption(rows)}.\n\n{text}"


def caption(rows: DataFrame) -> str:
    """Say where and with what rows were measured."""

    def all_of(column: str) -> str:
        return ", ".join(map(str, rows[column].unique()))

    threads = "" if rows.device.iloc[0] == "cuda" else f", threads: {all_of('threads')}"
    versions = f"PyTorch {all_of('torch')}, comhe_ext {all_of('comhe_ext')} at {all_of('commit')}"
    return f"{rows.machine.iloc[0]}{threads}; {versions}"


def number(value: float) -> str:
    """Write three digits, or nothing for what was not measured."""
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(ratio: float) -> str:
    """Write how many times as long something takes, bold if that is less long."""
    text = f"{number(ratio)}×" if ratio == ratio else ""
    return f"**{text}**" if ratio < 1 else text


def error(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.0e}" if math.isfinite(value) else "not finite"


# --- the sweep ------------------------------------------------------------------------------------


def name_of(case: Key) -> str:
    shape, mode = Shape(*case[:3]), case[3]
    if mode != "gradient":
        return f"{shape}, {mode}"
    return f"{shape}, {LAYERS[shape]}" if shape in LAYERS else str(shape)


def speed(sweep: Sweep, shapes: Sequence[Shape], modes: bool = False) -> str:
    """Lay out our times, and how many times as long each peer takes, or why it has none."""
    cases = [case for shape in shapes if (case := (*shape, "gradient")) in sweep.ours.index]
    cases += [case for case in sweep.ours.index if modes and case[3] != "gradient"]
    two = Sweep(sweep.folder, sweep.device, 2, sweep.machine)
    faster = sweep.table("wall_ms")[OURS[0]] / two.table("wall_ms")[OURS[0]]
    why = sweep.table("status")[PEERS].replace(REASONS)
    figures = {
        "comhe_ext, ms": sweep.ours.map(number),
        "% of the peak": sweep.shares.mul(100).map(number),
        "two threads over one": faster.map(times),
        **{METHODS[x].label: sweep.ratios[x].map(times).mask(sweep.ratios[x].isna(), why[x])
           for x in PEERS},
    }  # fmt: skip
    table = DataFrame(figures).fillna("").loc[cases]
    table = table.loc[:, table.ne("").any()]
    table.insert(0, "rows × k", [name_of(case) for case in cases])
    found = block(sweep.of(cases), table)
    return NO_GPU if found == NOTHING and sweep.device == "cuda" else found


def methods(sweep: Sweep) -> str:
    """Make the table of all methods at one shape, the first."""
    shape = MAIN[sweep.device][0]
    rows = sweep.of([(*shape, "gradient")]).set_index("method")
    rows = rows.loc[[name for name in METHODS if name in rows.index]]
    table = DataFrame(
        {
            "": [METHODS[name].label for name in rows.index],
            "time, ms": rows.ms.map(number).where(rows.status == "ok", rows.status),
            "wall clock, ms": rows.wall_min_ms.map(number) + " to " + rows.wall_max_ms.map(number),
            "first call, s": rows.first_s.map(number),
            "compiles": rows.compiled.replace("no", ""),
            "peak, MiB": rows.peak_mib.map(number),
            "energy error": rows.value_error.map(error),
            "gradient error": rows.gradient_error.map(error),
        }
    )
    return f"{shape}; {block(rows, table)}" if len(rows) else NOTHING


# --- the other studies ----------------------------------------------------------------------------


def errors(rows: DataFrame) -> str:
    off = rows.pivot(index="method", columns="case", values="gradient_error")
    off = off.reindex(index=list(METHODS), columns=CLOSE[:-1]).dropna(how="all")
    energies = rows[rows.case == DUPLICATES].set_index("method").value
    table = off.map(error).assign(**{"energy with duplicates": energies.map(number)})
    table.insert(0, "error of the gradient", [METHODS[name].label for name in table.index])
    return block(rows, table)


def whole_models(rows: DataFrame) -> str:
    """Lay out a step's time and memory, regularizers by models."""
    cells = rows.wall_ms.map(number) + " ms, " + rows.peak_mib.map(number) + " MiB"
    cells = cells.where(rows.status == "ok", rows.status)
    table = rows.assign(cell=cells).pivot(index="method", columns=["model", "batch"], values="cell")
    table = table.reindex(models.METHODS).reindex(columns=list(models.MODELS), level="model")
    table.columns = [f"{models.MODELS[name].label}, batch {batch}" for name, batch in table]
    return block(rows, table.rename_axis("regularizer").reset_index())


def named_losses(rows: DataFrame) -> str:
    ms, peaks, status = (
        rows.pivot(index=["loss", "shape"], columns="method", values=column)
        for column in ("ms", "peak_mib", "status")
    )
    groups = losses.groups("cpu", False).values()
    order = [tuple(case.values()) for cases in groups for case in cases]
    table = DataFrame(index=[case for case in order if case in ms.index])
    table["loss"] = [f"`{loss}`" for loss, _ in table.index]
    table["inputs"] = [shape.replace("x", " × ") for _, shape in table.index]
    table["comhe_ext, ms"] = ms[losses.OURS].map(number)
    table["peak, MiB"] = peaks[losses.OURS].map(number)
    for method in ("dense", "row-blocks", "pdist", "published", "keops"):
        if method in ms:
            ratio = ms[method] / ms[losses.OURS]
            words = ratio.map(times) + ", " + peaks[method].map(number) + " MiB"
            table[method] = words.where(ratio.notna(), status[method].replace(REASONS))
    return block(rows, table)


def training(rows: DataFrame) -> str:
    by_method = rows.groupby("method", sort=False)
    accuracies = by_method.accuracy.agg(lambda x: f"{x.mean():.2f} ± {x.std():.2f}")
    table = DataFrame({"test accuracy, %": accuracies})
    for layer in demo.LAYERS:
        table[f"energy of {layer}"] = by_method[f"{layer}_last"].mean().map("{:.4f}".format)
    table["step, ms"] = by_method.step_ms.median().map("{:.1f}".format)
    seeds, steps = rows.seed.nunique(), rows.steps.max()
    text = block(rows, table.rename(demo.METHODS).rename_axis("").reset_index())
    return f"Mean ± deviation over {seeds} seeds of {steps} steps; {text}"


# --- projections and samples ----------------------------------------------------------------------


def laid_out(rows: DataFrame, what: str, names: Sequence[str]) -> DataFrame:
    """Lay out times or errors of projections: all methods by what they are of."""
    rows = rows[rows.what == what]
    figures = rows.assign(figure=rows.gradient_error if what == projections.ERROR else rows.ms)
    table = figures.pivot(index="method", columns="of", values="figure").astype(float)
    table = table.reindex(index=[*projections.KINDS, *projections.SAMPLED], columns=list(names))
    return table.rename(columns={name: model.label for name, model in models.MODELS.items()})


def kinds(rows: DataFrame) -> str:
    rows = rows[rows.method.isin(projections.KINDS)]
    networks = [name for name in projections.OF_KINDS if name in models.MODELS]
    layers = [name for name in projections.OF_KINDS if name not in models.MODELS]
    alone = laid_out(rows, projections.PROJECTIONS, networks)
    parts = [
        laid_out(rows, projections.STEP, networks).rename(columns="{}, ms".format),
        alone.rename(columns="of which projections, {}".format),
        laid_out(rows, projections.ERROR, layers).rename(columns="error, {}".format),
    ]
    table = pd.concat(parts, axis=1).loc[list(projections.KINDS)].map(number)
    return block(rows, table.rename_axis("projections").reset_index())


def sampled_rows(rows: DataFrame, *what: str) -> DataFrame:
    """Select what compares sampled with exact energies; nothing as long as that has no rows."""
    rows = rows[rows.of.isin(projections.OF_SAMPLES) & rows.what.isin(what)]
    return rows if rows.method.isin(projections.SAMPLED).any() else rows[:0]


def sampled_steps(rows: DataFrame) -> str:
    """Compare steps, and what the pairs take of them, with 20 Gaussian projections, exact."""
    rows = sampled_rows(rows, projections.STEP, projections.PROJECTIONS)
    networks = [name for name in projections.OF_SAMPLES if name in models.MODELS]
    steps = laid_out(rows, projections.STEP, networks)
    alone = laid_out(rows, projections.PROJECTIONS, networks)
    # what the projections take depends on their kind alone
    pairs = steps - alone.loc[[name.split(",")[0] for name in steps.index]].set_axis(steps.index)
    parts = [
        (figures / figures.loc["gaussian 20"]).rename(columns=words.format)
        for figures, words in ((steps, "{}, step"), (pairs, "pairs alone, {}"))
    ]
    table = pd.concat(parts, axis=1).loc[[*projections.TWO, *projections.SAMPLED]]
    return block(rows, table.map(number).rename_axis("projections").reset_index())


def sampled_gradients(rows: DataFrame) -> str:
    """Compare errors of gradients with that of 20 Gaussian projections without sampling."""
    rows = sampled_rows(rows, projections.ERROR)
    layers = [name for name in projections.OF_SAMPLES if name not in models.MODELS]
    off = laid_out(rows, projections.ERROR, layers)
    table = (off / off.loc["gaussian 20"]).loc[[*projections.TWO, *projections.SAMPLED]]
    return block(rows, table.map(number).rename_axis("projections").reset_index())


def sampled_sets(rows: DataFrame) -> str:
    """Say what part of an exact energy's time a sampled one takes, by the number of rows."""
    rows = rows[rows.kind == sampled.PROJECTED]
    ms = rows.pivot(index="method", columns="rows", values="ms")
    table = ms.div(rows[rows.method == "exact"].set_index("rows").ms)
    table = table.reindex([f"sampled, {samples}" for samples in sampled.SMALL_BLOCKS])
    return block(rows, table.map(number).rename_axis("rows").reset_index())


def sampled_times(rows: DataFrame) -> str:
    rows = rows[(rows.kind != sampled.PROJECTED) & rows.ms.notna()]
    rows = rows.sort_values("rows", kind="stable")
    table = DataFrame(
        {
            "rows": rows["rows"].map("{:,}".format) + ", " + rows.kind,
            "": rows.method,
            "s": rows.ms.div(1e3).map(number),
            "peak, MiB": rows.peak_mib.map(number),
            "error of the energy": rows.value_error.map(error),
            "of the gradient": rows.gradient_error.map(error),
        }
    )
    return block(rows, table)


# the blocks that are made of the newest rows of one study
BLOCKS = {
    "accuracy": (ACCURACY.table, errors),
    "models": (models.STUDY.table, whole_models),
    "losses": (losses.STUDY.table, named_losses),
    "training": (demo.TABLE, training),
    "projections": (projections.STUDY.table, kinds),
    "sampled sets": (sampled.STUDY.table, sampled_sets),
    "sampled times": (sampled.STUDY.table, sampled_times),
    "sampled steps": (projections.STUDY.table, sampled_steps),
    "sampled gradients": (projections.STUDY.table, sampled_gradients),
}


def parts(folder: Path) -> dict[str, str]:
    """Make the text of each block, by its name."""
    cpu, cuda = Sweep(folder, "cpu"), Sweep(folder, "cuda")
    texts = {"shapes": speed(cpu, SHORT), "methods": methods(cpu)}
    for sweep in (cpu, cuda):
        shapes = [*MAIN[sweep.device], *SMALL, *LAYERS]
        texts[f"speed {sweep.device}"] = speed(sweep, shapes, modes=True)
    for name, (table, make) in BLOCKS.items():
        rows = newest(table, folder, "cpu")
        texts[name] = make(rows) if len(rows) else NOTHING
    return texts
