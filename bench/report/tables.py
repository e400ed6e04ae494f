"""The tables of README.md and docs out of the results, as Markdown."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from pandas import DataFrame, Series

from bench.cases import losses, models, projections, sampled
from bench.cases.sweep import ACCURACY, CLOSE, DUPLICATES, LAYERS, MAIN, SMALL, Shape
from bench.cases.sweep import STUDY as SWEEP
from bench.measure.machine import PEAKS
from bench.measure.store import Table
from bench.peers import METHODS, OURS, PEERS
from comhe_ext.testing.kinds import KINDS

NOTHING = "Not measured yet."
# what is shown in place of a time
REASONS = {"ok": "", "out of memory": "memory", "timeout": "time"}
BESIDE = ["comhe-graph", *PEERS]  # what is compared with the backend that is taken by default
# of the short table; one where we lose
SHORT = [Shape(1, 128, 40), Shape(1, 4096, 30), Shape(20, 2048, 40), Shape(1, 3072, 768)]
SHORT += [Shape(1, 50257, 40)]


# --- the newest results ---------------------------------------------------------------------------

CASE = ["sets", "rows", "dim", "mode"]
Key = tuple[int, int, int, str]


def newest(
    table: Table, folder: Path, device: str, threads: int | None = None, machine: str | None = None
) -> DataFrame:
    """Select the newest rows of a machine and its threads, of those measured last if not given.

    A call's time is `ms`, by the one clock: processor time of one thread, else the wall's.
    """
    rows = table.newest(folder)
    rows = rows[(rows.device == device) & (rows.threads == (threads or rows.threads))]
    rows = rows[rows.machine == (machine or rows.machine)]
    if "wall_ms" in rows:
        one = (rows.device == "cpu") & (rows.threads == 1)
        rows = rows.assign(ms=rows.cpu_ms.where(one, rows.wall_ms))
    last = rows.sort_values("date")[["machine", "threads"]].tail(1)
    return rows.merge(last)


class Sweep:
    """The sweep of a device, of a processor on one thread unless another number is given.

    `ours` has the times of the backend that is taken by default, by the case; `ratios` how many
    times as long the others take; `shares` what part of the peak is useful work.
    """

    def __init__(
        self, folder: Path, device: str, threads: int | None = None, machine: str | None = None
    ) -> None:
        self.folder, self.device = folder, device
        threads = threads or (1 if device == "cpu" else None)
        self.rows = newest(SWEEP.table, folder, device, threads, machine)
        self.machine = self.rows.machine.iloc[0] if len(self.rows) else "none"
        ms = self.table("ms")
        self.ours = ms[OURS].bfill(axis=1).iloc[:, 0].dropna()
        self.ratios = ms.loc[self.ours.index, BESIDE].div(self.ours, axis=0)
        peaks = newest(PEAKS, folder, device, threads, self.machine).flops.dropna()
        peak = peaks.iloc[-1] if len(peaks) else math.nan
        # of energy and gradient, not of other modes
        flop = [Shape(*x[:3]).flop if x[3] == "gradient" else math.nan for x in self.ours.index]
        self.shares = Series(flop, self.ours.index, float) / (1e-3 * self.ours * peak)

    @property
    def two_threads(self) -> Series:
        """How many times as fast two threads are."""
        two = Sweep(self.folder, self.device, 2, self.machine)
        return self.table("wall_ms")[OURS[0]] / two.table("wall_ms")[OURS[0]]

    def table(self, column: str) -> DataFrame:
        """Lay a column out, cases by methods in the order of the registry."""
        table = self.rows.pivot(index=CASE, columns="method", values=column)
        return table.reindex(columns=list(METHODS))

    def of(self, cases: Sequence[Key]) -> DataFrame:
        """Select the rows of some cases."""
        return self.rows[pd.MultiIndex.from_frame(self.rows[CASE]).isin(cases)]


# --- what is written ------------------------------------------------------------------------------


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
    """Write three digits, one of an error, or nothing for what was not measured."""
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "not finite"
    if 0.0 < value < 0.01:
        return f"{value:.0e}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(ratio: float) -> str:
    """Write how many times as long something takes, bold if that is less long."""
    text = f"{number(ratio)}×" if ratio == ratio else ""
    return f"**{text}**" if ratio < 1 else text


# --- the sweep ------------------------------------------------------------------------------------


def name_of(case: Key) -> str:
    shape, mode = Shape(*case[:3]), case[3]
    if mode != "gradient":
        return f"{shape}, {mode}"
    return f"{shape}, {LAYERS[shape]}" if shape in LAYERS else str(shape)


def speed(sweep: Sweep, shapes: Sequence[Shape], modes: bool = False) -> str:
    """Lay out our times, and how many times as long the others take, or why they have none."""
    cases = [case for shape in shapes if (case := (*shape, "gradient")) in sweep.ours.index]
    cases += [case for case in sweep.ours.index if modes and case[3] != "gradient"]
    why = sweep.table("status").loc[sweep.ours.index, BESIDE].replace(REASONS)
    beside = sweep.ratios.map(times).mask(sweep.ratios.isna(), why)
    figures = {
        "comhe_ext, ms": sweep.ours.map(number),
        "% of the peak": sweep.shares.mul(100).map(number),
        "two threads over one": sweep.two_threads.map(times),
    }
    table = DataFrame(figures).join(beside.rename(columns={m: METHODS[m].label for m in BESIDE}))
    table = table.loc[cases].fillna("")
    table = table.loc[:, table.ne("").any()]
    table.insert(0, "rows × k", [name_of(case) for case in cases])
    return block(sweep.of(cases), table)


# on one thread of a processor: how many times as long others take, at least, and parts of the peak
GOALS = {
    "naive": (25, 25, 60, 5, 3),
    "pdist and cdist": (10, 10, 10, math.nan, math.nan),
    "torch.compile": (4, 4, 4, 4, 4),
    "KeOps": (25, 25, 25, math.nan, math.nan),
    "% of the peak": (65, math.nan, 65, 65, 65),
    "two threads over one": (1.9, 1.9, 1.9, 1.9, 1.9),
}


def goals(sweep: Sweep) -> str:
    """Lay out what was reached of the project's goals, bold where it falls short of one."""
    cases = [case for shape in MAIN["cpu"] if (case := (*shape, "gradient")) in sweep.ours.index]
    wanted = DataFrame(GOALS, [(*shape, "gradient") for shape in MAIN["cpu"]]).loc[cases]
    reached = {
        "naive": sweep.ratios["naive"],
        "pdist and cdist": sweep.ratios[["pdist", "cdist-mm"]].min(axis=1),
        "torch.compile": sweep.ratios["compile"],
        "KeOps": sweep.ratios["keops"],
        "% of the peak": sweep.shares.mul(100),
        "two threads over one": sweep.two_threads,
    }
    table = DataFrame(index=range(len(cases)))
    for name, values in reached.items():
        pairs = zip(values.reindex(cases), wanted[name], strict=True)
        table[name] = [f"{met(got, least)} ({number(least)})" if least == least else ""
                       for got, least in pairs]  # fmt: skip
    table.insert(0, "reached (wanted, at least)", [name_of(case) for case in cases])
    return block(sweep.of(cases), table)


def met(got: float, least: float) -> str:
    return number(got) if got >= least else f"**{number(got) or 'not measured'}**"


FIGURES = {"ms": "ms", "wall_min_ms": "least, by wall clock", "wall_max_ms": "most"}
FIGURES |= {"first_s": "first call, s", "peak_mib": "peak, MiB"}
ERRORS = {"value_error": "energy's error", "gradient_error": "gradient's error"}


def methods(sweep: Sweep) -> str:
    """Make the table of all methods at one shape, the first."""
    shape = MAIN[sweep.device][0]
    rows = sweep.of([(*shape, "gradient")]).set_index("method")
    rows = rows.loc[[name for name in METHODS if name in rows.index]]
    return f"{shape}; {block(rows, of_methods(rows[[*FIGURES, *ERRORS]]))}"


def of_methods(figures: DataFrame) -> DataFrame:
    """Write out figures of methods of the sweep, under their labels."""
    table = figures.astype(float).map(number).rename(columns=FIGURES | ERRORS)
    table.insert(0, "", [METHODS[name].label for name in table.index])
    return table


# --- the other studies ----------------------------------------------------------------------------


def errors(rows: DataFrame) -> str:
    off = rows.pivot(index="method", columns="case", values="gradient_error")
    off = off.reindex(index=list(METHODS), columns=CLOSE[:-1]).dropna(how="all")
    equal = rows[rows.case == DUPLICATES].set_index("method")
    # a result that is not a number leaves no number in the file
    energies = equal.value.mask(equal.value.isna() & (equal.status == "ok"), math.inf)
    return block(rows, of_methods(off.assign(**{"energy with duplicates": energies})))


def with_memory(rows: DataFrame, time: Series) -> DataFrame:
    """Add a column `cell` with times and the memory beside them, or why there is none."""
    cell = time + ", " + rows.peak_mib.map(number) + " MiB"
    return rows.assign(cell=cell.where(rows.status == "ok", rows.status.replace(REASONS)))


def whole_models(rows: DataFrame) -> str:
    rows = with_memory(rows, rows.wall_ms.map(number) + " ms")
    table = rows.pivot(index="method", columns=["model", "batch"], values="cell")
    table = table.reindex(list(models.METHODS)).reindex(columns=list(models.MODELS), level="model")
    table.columns = [f"{models.MODELS[name].label}, batch {batch}" for name, batch in table]
    return block(rows, table.rename_axis("regularizer").reset_index())


def named_losses(rows: DataFrame) -> str:
    """Lay out our times, and how many times as long the others take."""
    case, mine = ["loss", "shape"], rows.method == losses.OURS
    ours = rows[case].merge(rows[mine][[*case, "ms"]], how="left").ms
    rows = with_memory(rows, (rows.ms / ours).map(times).mask(mine, rows.ms.map(number) + " ms"))
    table = rows.pivot(index=case, columns="method", values="cell")
    names = [name for name in losses.METHODS if name in table]
    return block(rows, table.reindex(losses.LOSSES, level="loss")[names].reset_index())


# --- projections and samples ----------------------------------------------------------------------


def laid_out(rows: DataFrame, *what: str) -> DataFrame:
    """Lay out times and errors of projections: methods by what was measured, and of what."""
    labels = {name: model.label for name, model in models.MODELS.items()}
    rows = rows[rows.what.isin(what)]
    rows = rows.assign(figure=rows.ms.fillna(rows.gradient_error), of=rows.of.replace(labels))
    table = rows.pivot(index="method", columns=["what", "of"], values="figure").astype(float)
    table = table.reindex([*projections.KINDS, *projections.SAMPLED])
    return table[[*rows[["what", "of"]].drop_duplicates().itertuples(index=False, name=None)]]


def of_projections(rows: DataFrame, table: DataFrame) -> str:
    table = table.dropna(how="all").map(number)
    table.columns = [", ".join(names) for names in table]
    return block(rows, table.rename_axis("projections").reset_index())


def kinds(rows: DataFrame) -> str:
    """Lay out times in milliseconds, and errors."""
    rows = rows[rows.of.isin(projections.OF_KINDS) & rows.method.isin(projections.KINDS)]
    whats = projections.STEP, projections.PROJECTIONS, projections.ERROR
    return of_projections(rows, laid_out(rows, *whats))


def sampled_rows(rows: DataFrame, *what: str) -> DataFrame:
    """Select what compares sampled with exact energies; nothing as long as that has no rows."""
    rows = rows[rows.of.isin(projections.OF_SAMPLES) & rows.what.isin(what)]
    rows = rows[rows.method.isin({**projections.TWO, **projections.SAMPLED})]
    return rows if rows.method.isin(projections.SAMPLED).any() else rows[:0]


def sampled_steps(rows: DataFrame) -> str:
    """Compare steps, and what the pairs take of them, with 20 Gaussian projections, exact."""
    rows = sampled_rows(rows, projections.STEP, projections.PROJECTIONS)
    steps, alone = laid_out(rows, projections.STEP), laid_out(rows, projections.PROJECTIONS)
    # what the projections take depends on their kind alone
    alone = alone.loc[[name.split(",")[0] for name in steps.index]].set_axis(steps.index)
    pairs = steps - alone.rename(columns={projections.PROJECTIONS: projections.STEP})
    table = steps.join(pairs.rename(columns={projections.STEP: "pairs alone"}))
    return of_projections(rows, table / table.loc["gaussian 20"])


def sampled_gradients(rows: DataFrame) -> str:
    """Compare errors of gradients with that of 20 Gaussian projections without sampling."""
    rows = sampled_rows(rows, projections.ERROR)
    table = laid_out(rows, projections.ERROR)
    return of_projections(rows, table / table.loc["gaussian 20"])


def sampled_errors(rows: DataFrame) -> str:
    """Lay out the errors of single draws, kinds of rows by what is estimated how."""
    rows = rows[rows.kind.isin(KINDS) & rows.method.str.startswith("degree")]
    table = rows.pivot(index="method", columns="kind", values="gradient_error")
    table = table.reindex(columns=list(KINDS)).map(number)
    return block(rows, table.rename_axis("").reset_index())


def sampled_sets(rows: DataFrame) -> str:
    """Say what part of an exact energy's time a sampled one takes, by the number of rows."""
    rows = rows[rows.kind == sampled.PROJECTED]
    ms = rows.pivot(index="method", columns="rows", values="ms")
    table = ms.div(rows[rows.method == "exact"].set_index("rows").ms)
    table = table.reindex([f"sampled, {samples}" for samples in sampled.SMALL_BLOCKS])
    return block(rows, table.map(number).rename_axis("rows").reset_index())


def sampled_times(rows: DataFrame) -> str:
    rows = rows[rows.ms.notna() & (rows.kind != sampled.PROJECTED)]
    rows = rows.sort_values("rows", kind="stable")
    numbers = rows[["ms", "peak_mib", *ERRORS]].map(number).rename(columns=FIGURES | ERRORS)
    return block(rows, rows[["kind", "rows", "method"]].join(numbers).astype(str))


# the blocks that are made of the newest rows of one study
BLOCKS = {
    "accuracy": (ACCURACY.table, errors),
    "models": (models.STUDY.table, whole_models),
    "losses": (losses.STUDY.table, named_losses),
    "projections": (projections.STUDY.table, kinds),
    "sampled errors": (sampled.STUDY.table, sampled_errors),
    "sampled sets": (sampled.STUDY.table, sampled_sets),
    "sampled times": (sampled.STUDY.table, sampled_times),
    "sampled steps": (projections.STUDY.table, sampled_steps),
    "sampled gradients": (projections.STUDY.table, sampled_gradients),
}


def parts(folder: Path) -> dict[str, str]:
    """Make the text of each block, by its name."""
    cpu, cuda = Sweep(folder, "cpu"), Sweep(folder, "cuda")
    texts = {"shapes": speed(cpu, SHORT), "methods": methods(cpu), "goals": goals(cpu)}
    for sweep in (cpu, cuda):
        shapes = [*MAIN[sweep.device], *SMALL, *LAYERS]
        texts[f"speed {sweep.device}"] = speed(sweep, shapes, modes=True)
    for name, (table, make) in BLOCKS.items():
        rows = newest(table, folder, "cpu")
        texts[name] = make(rows) if len(rows) else NOTHING
    for plan in ("small", "cnn9"):  # of `python -m bench.training`, which writes its own tables
        report = folder / "training" / plan / "report.md"
        texts[f"training {plan}"] = report.read_text().strip() if report.exists() else NOTHING
    return texts
