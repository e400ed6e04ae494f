"""The tables of README.md and docs out of the results, as Markdown."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pandas import DataFrame

from bench.cases import losses, models, projections
from bench.cases.digits import METHODS as TRAININGS
from bench.cases.digits import TABLE as TRAINING
from bench.cases.shapes import GOALS, K30, LAYERS, ON_GPU, PAPER, SMALL, Shape
from bench.cases.sweep import ACCURACY, CLOSE, DUPLICATES
from bench.peers.energies import METHODS
from bench.report import plots
from bench.report.results import CASE, Sweep, key, newest

NOTHING = "Nothing measured yet."
NO_GPU = "**Nothing has run on a GPU yet.** No number here is from one."
TO_ROOT = "TO_ROOT/"  # stands for the way from a page to the root


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # words to the left, numbers to the right
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows))


def number(value: float, unit: str = "") -> str:
    """Write three digits and a unit, or nothing for what was not measured."""
    if math.isnan(value):
        return ""
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") + unit


def error(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.0e}" if math.isfinite(value) else "not finite"


def caption(rows: DataFrame) -> str:
    """Say where and with what rows were measured."""

    def all_of(column: str) -> str:
        return ", ".join(str(x) for x in dict.fromkeys(rows[column]))

    threads = "" if rows.device.iloc[0] == "cuda" else f", threads: {all_of('threads')}"
    versions = f"PyTorch {all_of('torch')}, comhe_ext {all_of('comhe_ext')} at {all_of('commit')}"
    return f"{rows.machine.iloc[0]}{threads}; {versions}"


# --- the sweep ------------------------------------------------------------------------------------

# heading -> the methods whose fastest is shown
COLUMNS = {
    "naive": ["naive"],
    "naive, set by set": ["naive-by-set"],
    "row blocks": ["row-blocks"],
    "checkpoint": ["checkpoint"],
    "pdist": ["pdist"],
    "cdist": ["cdist-mm", "cdist-direct"],
    "torch.compile": ["compile"],
    "KeOps": ["keops"],
    "KeOps, one sweep": ["keops-analytic"],
    "the same, native flags": ["keops-native"],
}
REASONS = {"out of memory": "memory", "timeout": "time", "unavailable": "-", "nan": ""}
WORDS = {"gradient": "energy + gradient"}
CLOSEST = 5
# of the short table; one where we lose
SHAPES = [Shape(1, 128, 40), Shape(1, 4096, 30), Shape(20, 2048, 40), Shape(1, 3072, 768)]
SHAPES += [Shape(1, 50257, 40)]


def speed(sweep: Sweep) -> str:
    wanted = [*GOALS[sweep.device], *SMALL[sweep.device], *LAYERS]
    wanted = [shape for shape in wanted if sweep.has(shape)]
    if not wanted:
        return NO_GPU if sweep.device == "cuda" else NOTHING
    status = sweep.table("status")
    columns = {h: ms for h, ms in COLUMNS.items() if status[ms].notna().any(axis=None)}
    lines = []
    for shape in wanted:
        share = sweep.share(shape)
        cells = ["" if math.isnan(share) else f"{share:.0%}"]
        for methods in columns.values():
            why = str(status.loc[key(shape), methods[0]])
            cells.append(number(sweep.over(shape, *methods), "×") or REASONS.get(why, ""))
        lines.append([name_of(shape), number(sweep.ours[key(shape)]), *cells])
    headings = ["rows × k", "comhe_ext, ms", "of the peak", *columns]
    return f"{caption(sweep.of(wanted))}.\n\n{markdown(headings, lines)}"


def shapes(sweep: Sweep) -> str:
    """Make the short table: beside the naive formula, and beside the best of all others."""
    lines = []
    for shape in filter(sweep.has, SHAPES):
        naive = number(sweep.over(shape, "naive"), "×")
        memory = [number(sweep.value(shape, "peak_mib", method=m)) for m in ("", "naive")]
        why = str(sweep.table("status").loc[key(shape), "naive"])
        ratios = sweep.ratios.loc[key(shape)]
        best = number(ratios.min(), "×") if ratios.min() >= 1 else f"**{number(ratios.min())}×**"
        cells = [number(sweep.ours[key(shape)]), naive or REASONS.get(why, ""), best]
        cells += [METHODS[ratios.idxmin()].label, memory[0], memory[1] or REASONS.get(why, "")]
        lines.append([name_of(shape), *cells])
    headings = ["rows × k", "comhe_ext, ms", "naive", "best peer", "which is", "our peak, MiB"]
    table = markdown([*headings, "naive's"], lines)
    return f"{caption(sweep.of(SHAPES))}.\n\n{table}" if lines else NOTHING


def name_of(shape: Shape) -> str:
    return f"{shape}, {LAYERS[shape]}" if shape in LAYERS else str(shape)


def slower(sweep: Sweep) -> str:
    """List every case in which a peer was faster, and those where one came closest."""
    found = sweep.ratios.stack().dropna().sort_values(kind="stable")
    if found.empty:
        return NOTHING

    def words(entries: Any) -> str:
        return "\n".join(
            f"- {Shape(*case[:3])}, {WORDS.get(case[3], case[3])}: "
            f"{METHODS[case[4]].label} takes {ratio:.2f} times as long."
            for case, ratio in entries.items()
        )

    lost = found[found < 1]
    count, cases = (rows.reset_index()[CASE].drop_duplicates() for rows in (lost, found))
    text = f"Of {len(cases)} cases, a peer was faster in {len(count)}" + (":" if len(lost) else ".")
    closest = found[len(lost) : len(lost) + CLOSEST]
    parts = [text, words(lost), "The next closest:", words(closest)]
    return "\n\n".join(part for part in parts if part)


def methods(sweep: Sweep) -> str:
    """Make the table of all methods at one shape, the first."""
    shape = GOALS[sweep.device][0]
    if not sweep.has(shape):
        return NOTHING
    rows, lines = sweep.of([shape]), []
    for name, method in METHODS.items():
        for _, row in rows[rows.method == name].iterrows():
            label = method.label
            if method.backend is not None:
                label = f"comhe_ext, backend `{method.backend}`" + ", CUDA graph" * method.graph
            elif method.package != "torch":
                label += f" {row.version}"
            if row.status != "ok":
                lines.append([label, f"{row.status}: {row.note}", *[""] * 5])
                continue
            first = number(row.first_s) + " (compiles)" * (row.compiled == "yes")
            wall = f"{number(row.wall_min_ms)} to {number(row.wall_max_ms)}"
            off = error(row.value_error), error(row.gradient_error)
            lines.append([label, number(row.ms), wall, first, number(row.peak_mib), *off])
    headings = ["", "time, ms", "wall clock, ms", "first call, s", "peak, MiB"]
    headings += ["energy error", "gradient error"]
    return f"{shape}; {caption(rows)}.\n\n{markdown(headings, lines)}"


def modes(sweep: Sweep) -> str:
    rows = sweep.rows[sweep.rows["mode"] != "gradient"]
    lines = []
    for case, ours in sweep.ours.items():
        if case[3] == "gradient":
            continue
        ratios = sweep.ratios.loc[case].dropna()
        cells = [number(ours), number(sweep.ratios.loc[case, "naive"], "×")]
        peer = (
            [number(ratios.min(), "×"), METHODS[ratios.idxmin()].label] if len(ratios) else ["", ""]
        )
        lines.append([f"{case[3]}, {Shape(*case[:3])}", *cells, *peer])
    headings = ["", "comhe_ext, ms", "naive", "fastest peer", "which is"]
    return f"{caption(rows)}.\n\n{markdown(headings, lines)}" if lines else NOTHING


# --- the goals ------------------------------------------------------------------------------------

Goal = tuple[str, str, float, str, float]  # words, at least or at most, bound, unit, reached


def goals_of(sweep: Sweep) -> Iterator[Goal]:
    """List the goals of the project for one thread of a processor, and for a large GPU."""
    if sweep.device == "cuda":
        bounds = zip([*ON_GPU, PAPER], (180, 50, 17_000, 1_000_000, 320), strict=True)
        for shape, most in bounds:
            mode = "half space" if shape == PAPER else "gradient"
            reached = 1e3 * sweep.value(shape, "wall_ms", mode, "comhe-graph")
            yield f"{shape}, {mode}", "most", most, " µs", reached
        return

    def over(words: str, bounds: Mapping[Shape, float], *peers: str) -> Iterator[Goal]:
        for shape, least in bounds.items():
            yield f"{shape}, over {words}", "least", least, " times", sweep.over(shape, *peers)

    shapes, large = GOALS["cpu"], K30[-1]
    yield from over("naive", dict(zip(shapes, (25, 25, 60, 5, 3), strict=True)), "naive")
    best = ("pdist", "cdist-mm", "cdist-direct")
    yield from over("the best of pdist and cdist", dict.fromkeys(K30, 10.0), *best)
    yield from over("torch.compile", dict.fromkeys(shapes, 4.0), "compile")
    yield from over("KeOps as shipped", dict.fromkeys(K30, 25.0), "keops")
    for shape in [*shapes[:1], *shapes[2:]]:
        yield f"{shape}, of the peak", "least", 65, " %", 100 * sweep.share(shape)
    yield f"{large}, memory", "most", 16, " MiB", sweep.value(large, "peak_mib")
    yield f"{large}, energy's error", "most", 1e-6, "", sweep.value(large, "value_error")
    yield f"{large}, gradient's error", "most", 2e-6, "", sweep.value(large, "gradient_error")
    two = Sweep(sweep.folder, "cpu", 2)
    for shape in shapes:
        times = sweep.value(shape, "wall_ms") / two.value(shape, "wall_ms")
        yield f"{shape}, two threads over one", "least", 1.9, " times", times


def goals(sweep: Sweep) -> str:
    lines = []
    for words, kind, bound, unit, reached in goals_of(sweep):
        shown = f"{reached:.1e}" if reached < 1e-3 else number(reached)
        met = reached >= bound if kind == "least" else reached <= bound
        cells = [f"{shown}{unit}", "yes" if met else "**no**"] if shown else ["not measured", ""]
        lines.append([words, f"at {kind} {bound:g}{unit}", *cells])
    return markdown(["goal", "wanted", "reached", "met"], lines) if len(sweep.ours) else NOTHING


# --- the other studies ----------------------------------------------------------------------------


def errors(sweep: Sweep) -> str:
    rows = newest(ACCURACY.table, sweep.folder, sweep.device)
    if rows.empty:
        return NOTHING
    lines = []
    for name, method in METHODS.items():
        mine = rows[(rows.method == name) & (rows.status != "unavailable")].set_index("case")
        if mine.empty:
            continue
        label = f"{method.label} (`{method.backend}`)" if method.backend else method.label
        cells = [error(x) for x in mine.gradient_error.reindex(CLOSE[:-1])]
        lines.append([label, *cells, number(mine.value.get(DUPLICATES, math.nan))])
    headings = ["error of the gradient", *CLOSE[:-1], "energy with duplicates"]
    return f"{caption(rows)}.\n\n{markdown(headings, lines)}"


def whole_models(sweep: Sweep) -> str:
    rows = newest(models.STUDY.table, sweep.folder, sweep.device)
    if rows.empty:
        return NOTHING
    lines, why = [], []
    for name, model in models.MODELS.items():
        mine = rows[rows.model == name].set_index("method").reindex(models.METHODS)
        for method, row in mine.dropna(subset="batch").iterrows():
            plain = method == models.NONE
            cells = [f"{model.label}, batch {row.batch:.0f}" if plain else "", str(method)]
            if row.status != "ok":
                lines.append([*cells, row.status, "", ""])
                why.append(f"- {model.label}, {method}: {row.note}")
                continue
            more = "" if plain else number(row.wall_ms - mine.wall_ms[models.NONE])
            lines.append(
                [*cells, number(row.wall_ms), f"+{more}" if more else "", number(row.peak_mib)]
            )
    headings = ["", "regularizer", "step, ms", "of it", "peak, MiB"]
    return "\n\n".join(
        [f"{caption(rows)}.", markdown(headings, lines), *["\n".join(why)][: len(why)]]
    )


LOSS_COLUMNS = {"dense": "dense", "row-blocks": "row blocks", "pdist": "pdist", "cdist": "cdist"}
LOSS_COLUMNS |= {"published": "published", "keops": "KeOps"}


def named_losses(sweep: Sweep) -> str:
    rows = newest(losses.STUDY.table, sweep.folder, sweep.device)
    if rows.empty:
        return NOTHING
    lines = []
    groups = losses.groups(sweep.device)
    for case in [case for name in losses.LOSSES for case in groups[name]]:
        found = rows[(rows.loss == case["loss"]) & (rows["shape"] == case["shape"])]
        found = found.set_index("method")
        if found.empty:
            continue
        mine = found.loc[losses.OURS]
        cells = [number(mine.ms) or mine.status, number(mine.peak_mib)]
        for method in LOSS_COLUMNS:
            cells.append(beside(mine, found.loc[method]) if method in found.index else "")
        lines.append([f"`{case['loss']}`", case["shape"].replace("x", " × "), *cells])
    headings = ["loss", "inputs", "comhe_ext, ms", "peak, MiB", *LOSS_COLUMNS.values()]
    return f"{caption(rows)}.\n\n{markdown(headings, lines)}"


def beside(mine: Any, other: Any) -> str:
    """Say how many times as long another method takes, bold if it is faster, and its memory."""
    if math.isnan(ratio := other.ms / mine.ms):
        return REASONS.get(other.status, str(other.status))
    words = f"{number(ratio)}×"
    return f"{f'**{words}**' if ratio < 1 else words}, {number(other.peak_mib)} MiB"


def projection_kinds(sweep: Sweep) -> str:
    rows = newest(projections.STUDY.table, sweep.folder, sweep.device)
    if rows.empty:
        return NOTHING
    rows = rows.assign(column=rows.of + ": " + rows.what, value=rows.ms.fillna(rows.gradient_error))
    table = rows.pivot(index="method", columns="column", values="value")
    table = table.reindex(index=dict.fromkeys(rows.method), columns=dict.fromkeys(rows.column))
    lines = [
        [method, *map(number, row)] for method, row in zip(table.index, table.values, strict=True)
    ]
    return f"{caption(rows)}.\n\n{markdown(['kind, C', *table.columns], lines)}"


def pictures(sweep: Sweep) -> str:
    names = [name for name in plots.figures(sweep.folder) if name.endswith(sweep.device)]
    folder = f"{TO_ROOT}bench/results/plots"
    return "\n\n".join(
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="{folder}/{name}-dark.png">\n'
        f'  <img alt="{plots.ALTERNATIVES[name.split("-")[0]]}" src="{folder}/{name}-light.png">\n'
        "</picture>"
        for name in names
    )


def training(folder: Path) -> str:
    rows = TRAINING.newest(folder)
    if rows.empty:
        return NOTHING
    last = [column for column in rows if column.endswith("_last")]
    lines = []
    for method, name in TRAININGS.items():
        runs = rows[rows.method == method]
        accuracy = f"{runs.accuracy.mean():.2f} ± {runs.accuracy.std():.2f}"
        energies = [f"{x:.4f}" for x in runs[last].mean()]
        lines.append([name, accuracy, *energies, f"{runs.step_ms.median():.1f}"])
    headings = ["", "test accuracy, %", *(f"energy of {x.removesuffix('_last')}" for x in last)]
    words = f"Mean ± deviation over {rows.seed.nunique()} seeds of {rows.steps.iloc[0]} steps"
    return f"{words}; {caption(rows)}.\n\n{markdown([*headings, 'step, ms'], lines)}"


def parts(folder: Path) -> dict[str, str]:
    """Make the text of each block, by its name."""
    cpu = Sweep(folder, "cpu")
    made = {
        "speed": speed, "plots": pictures, "goals": goals, "slower": slower, "methods": methods,
        "modes": modes, "accuracy": errors, "models": whole_models, "losses": named_losses,
    }  # fmt: skip
    texts = {f"{name} cpu": part(cpu) for name, part in made.items()}
    texts |= {"shapes": shapes(cpu), "training": training(folder)}
    return texts | {"speed cuda": speed(Sweep(folder, "cuda"))}
