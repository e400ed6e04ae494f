"""The tables of README.md and docs out of the results, as Markdown."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pandas import DataFrame

from bench import demo
from bench.cases import losses, models
from bench.cases.shapes import GOALS, K30, LAYERS, ON_GPU, PAPER, SMALL, Shape
from bench.cases.sweep import ACCURACY, CLOSE, DUPLICATES
from bench.peers.energies import METHODS
from bench.report.results import CASE, Sweep, key, newest

NOTHING = "Nothing measured yet."
NO_GPU = "**Nothing has run on a GPU yet.** No number here is from one."


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    # words to the left, numbers to the right
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *lines))


def block(rows: DataFrame, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Make a table, and say what rows it is of."""
    return f"{caption(rows)}.\n\n{markdown(headings, lines)}" if lines else NOTHING


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
COLUMNS = {"naive": ["naive"], "naive, set by set": ["naive-by-set"], "row blocks": ["row-blocks"]}
COLUMNS |= {"checkpoint": ["checkpoint"], "pdist": ["pdist"], "cdist": ["cdist-mm", "cdist-direct"]}
COLUMNS |= {
    "torch.compile": ["compile"],
    "KeOps": ["keops"],
    "KeOps, one sweep": ["keops-analytic"],
}
COLUMNS |= {"the same, native flags": ["keops-native"]}
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
        cells = [number(sweep.ours[key(shape)]), "" if math.isnan(share) else f"{share:.0%}"]
        cells += [ratio(sweep, shape, *methods) for methods in columns.values()]
        lines.append([name_of(shape), *cells])
    headings = ["rows × k", "comhe_ext, ms", "of the peak", *columns]
    return block(sweep.of(wanted), headings, lines)


def ratio(sweep: Sweep, shape: Shape, *methods: str) -> str:
    """Say how many times as long the fastest of some methods takes, or why none ran."""
    why = str(sweep.table("status").loc[key(shape), methods[0]])
    return number(sweep.over(shape, *methods), "×") or REASONS.get(why, "")


def shapes(sweep: Sweep) -> str:
    """Make the short table: beside the naive formula, and beside the best of all others."""
    lines = []
    for shape in filter(sweep.has, SHAPES):
        naive, ratios = ratio(sweep, shape, "naive"), sweep.ratios.loc[key(shape)]
        best = number(ratios.min(), "×") if ratios.min() >= 1 else f"**{number(ratios.min())}×**"
        ours, theirs = (number(sweep.value(shape, "peak_mib", method=m)) for m in ("", "naive"))
        cells = [number(sweep.ours[key(shape)]), naive, best, METHODS[ratios.idxmin()].label]
        lines.append([name_of(shape), *cells, ours, theirs or naive])
    headings = ["rows × k", "comhe_ext, ms", "naive", "best peer", "which is", "our peak, MiB"]
    return block(sweep.of(SHAPES), [*headings, "naive's"], lines)


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
    rows, lines = sweep.of([shape]).set_index("method"), []
    for name, method in METHODS.items():
        if name not in rows.index:
            continue
        row, label = rows.loc[name], method.label
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
    table = block(rows, [*headings, "energy error", "gradient error"], lines)
    return f"{shape}; {table}" if lines else NOTHING


def modes(sweep: Sweep) -> str:
    rows, lines = sweep.rows[sweep.rows["mode"] != "gradient"], []
    for case, ours in sweep.ours.items():
        if case[3] != "gradient" and (ratios := sweep.ratios.loc[case].dropna()).size:
            peer = number(ratios.min(), "×"), METHODS[ratios.idxmin()].label
            cells = [number(ours), number(ratios.get("naive", math.nan), "×"), *peer]
            lines.append([f"{case[3]}, {Shape(*case[:3])}", *cells])
    return block(rows, ["", "comhe_ext, ms", "naive", "fastest peer", "which is"], lines)


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
    two = Sweep(sweep.folder, "cpu", 2, sweep.machine)
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
    rows, lines = newest(ACCURACY.table, sweep.folder, sweep.device), []
    for name, method in METHODS.items():
        mine = rows[(rows.method == name) & (rows.status != "unavailable")].set_index("case")
        if len(mine):
            label = f"{method.label} (`{method.backend}`)" if method.backend else method.label
            cells = [error(x) for x in mine.gradient_error.reindex(CLOSE[:-1])]
            lines.append([label, *cells, number(mine.value.get(DUPLICATES, math.nan))])
    return block(rows, ["error of the gradient", *CLOSE[:-1], "energy with duplicates"], lines)


def whole_models(sweep: Sweep) -> str:
    rows = newest(models.STUDY.table, sweep.folder, sweep.device)
    lines, why = [], [""]
    for name, model in models.MODELS.items():
        mine = rows[rows.model == name].set_index("method")
        for method in mine.index.intersection(models.METHODS, sort=False):
            row, plain = mine.loc[method], method == models.NONE
            cells = [f"{model.label}, batch {row.batch}" if plain else "", method]
            if row.status != "ok":
                lines.append([*cells, row.status, "", ""])
                why.append(f"- {model.label}, {method}: {row.note}")
                continue
            more = "" if plain else number(row.wall_ms - mine.wall_ms[models.NONE])
            more = f"+{more}" if more else ""
            lines.append([*cells, number(row.wall_ms), more, number(row.peak_mib)])
    table = block(rows, ["", "regularizer", "step, ms", "of it", "peak, MiB"], lines)
    return table + "\n".join(["\n", *why[1:]]) if why[1:] else table


LOSS_COLUMNS = {"dense": "dense", "row-blocks": "row blocks", "pdist": "pdist", "cdist": "cdist"}
LOSS_COLUMNS |= {"published": "published", "keops": "KeOps"}


def named_losses(sweep: Sweep) -> str:
    rows, lines = newest(losses.STUDY.table, sweep.folder, sweep.device), []
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
    return block(rows, headings, lines)


def beside(mine: Any, other: Any) -> str:
    """Say how many times as long another method takes, bold if it is faster, and its memory."""
    if math.isnan(ratio := other.ms / mine.ms):
        return REASONS.get(other.status, str(other.status))
    words = f"{number(ratio)}×"
    return f"{f'**{words}**' if ratio < 1 else words}, {number(other.peak_mib)} MiB"


def training(sweep: Sweep) -> str:
    rows, lines = demo.TABLE.newest(sweep.folder), []
    last = [f"{layer}_last" for layer in demo.LAYERS]
    for method, runs in rows.groupby("method", sort=False):
        accuracy = f"{runs.accuracy.mean():.2f} ± {runs.accuracy.std():.2f}"
        energies = [f"{x:.4f}" for x in runs[last].mean()]
        lines.append([demo.METHODS[method], accuracy, *energies, f"{runs.step_ms.median():.1f}"])
    headings = ["", "test accuracy, %", *(f"energy of {layer}" for layer in demo.LAYERS)]
    table = block(rows, [*headings, "step, ms"], lines)
    seeds, steps = rows.seed.nunique(), rows.steps.max()
    return f"Mean ± deviation over {seeds} seeds of {steps} steps; {table}" if lines else NOTHING


BLOCKS = {"speed": speed, "goals": goals, "slower": slower, "methods": methods}
BLOCKS |= {"modes": modes, "accuracy": errors, "models": whole_models, "losses": named_losses}


def parts(folder: Path) -> dict[str, str]:
    """Make the text of each block, by its name."""
    cpu, cuda = Sweep(folder, "cpu"), Sweep(folder, "cuda")
    texts = {f"{name} cpu": part(cpu) for name, part in BLOCKS.items()}
    return texts | {"shapes": shapes(cpu), "training": training(cpu), "speed cuda": speed(cuda)}
