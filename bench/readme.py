"""`python -m bench readme`: the results put into README.md, between markers that name a part."""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import accuracy, compare, digits, goals, losses, model, plots, roofline, sweep
from bench.methods import METHODS, OURS
from bench.model import MODELS, NONE
from bench.plots import main_setting
from bench.shapes import GOALS, LAYERS, SMALL, Case
from bench.store import ROOT, Row

README = ROOT / "README.md"
DEVICES = {"cpu": "processor", "cuda": "GPU"}
NOTHING = "Nothing measured yet."
NO_GPU = "**Nothing has run on a GPU yet.** No number here is from one."


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # words to the left, numbers to the right
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows))


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def error(text: str) -> str:
    if not text:
        return ""
    value = float(text)
    return f"{value:.0e}" if math.isfinite(value) else str(value)


def caption(rows: Sequence[Row]) -> str:
    """Say where and with what rows were measured."""
    first = rows[0]

    def all_of(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column] or "?" for row in rows))

    threads = "" if first["device"] == "cuda" else f", threads: {all_of('threads')}"
    return (
        f"{first['machine']}{threads}; PyTorch {all_of('torch')}, comhe_ext "
        f"{all_of('comhe_ext')} at {all_of('commit')}"
    )


class Results:
    """The newest rows of a folder, by device."""

    def __init__(self, folder: Path, device: str) -> None:
        measured = sweep.TABLE.newest(folder)
        self.folder, self.device = folder, device
        self.setting = main_setting(measured, device)
        self.rows = [] if self.setting is None else compare.by_setting(measured)[self.setting]
        self.cases = compare.by_case(self.rows)
        self.peaks = None if self.setting is None else roofline.peaks(self.setting, folder)
        self.all_rows = [row for row in measured if row["device"] == device]


# --- the sweep ------------------------------------------------------------------------------------

# heading -> the methods whose fastest is shown
COLUMNS = {
    "naive": ("naive",),
    "naive, set by set": ("naive-by-set",),
    "row blocks": ("row-blocks",),
    "checkpoint": ("checkpoint",),
    "pdist": ("pdist",),
    "cdist": ("cdist-mm", "cdist-direct"),
    "torch.compile": ("compile",),
    "KeOps": ("keops",),
    "KeOps, one sweep": ("keops-analytic",),
    "the same, native flags": ("keops-native",),
}


def speed(results: Results) -> str:
    wanted = [*GOALS[results.device], *SMALL[results.device], *LAYERS]
    lines, used = [], []
    columns = {h: ms for h, ms in COLUMNS.items() if any(r["method"] in ms for r in results.rows)}
    for shape in wanted:
        case = Case(shape, "gradient")
        mine = compare.ours(rows := results.cases.get(case, []))
        if mine is None:
            continue
        used += rows
        time = compare.milliseconds(mine)
        part = roofline.share(case, mine, results.peaks)
        cells = ["" if time is None else number(time), "" if part is None else f"{part:.0%}"]
        for methods in columns.values():
            cells.append(best_of([row for row in rows if row["method"] in methods], mine))
        layer = f", {LAYERS[shape].split(', ')[0]}" if shape in LAYERS else ""
        lines.append([shape.words + layer, *cells])
    if not lines:
        return NO_GPU if results.device == "cuda" else NOTHING
    headings = ["rows × k", "comhe_ext, ms", "of the peak", *columns]
    return f"{caption(used)}.\n\n{markdown(headings, lines)}"


def best_of(rows: Sequence[Row], mine: Row) -> str:
    """Say how many times as long the fastest of some methods takes, or why none ran."""
    ratios = [ratio for row in rows if (ratio := compare.times_faster(mine, row)) is not None]
    if ratios:
        return f"{number(min(ratios))}×"
    return REASONS.get(rows[0]["status"], rows[0]["status"]) if rows else ""


MODE_WORDS = {"gradient": "energy + gradient"}
REASONS = {"out of memory": "memory", "timeout": "time", "unavailable": "-"}


CLOSEST = 5


def slower(results: Results) -> str:
    """List every case in which a peer was faster, and those where one came closest."""
    found = []
    for case, rows in results.cases.items():
        mine = compare.ours(rows)
        for row in compare.peers(rows):
            if (ratio := compare.times_faster(mine, row)) is not None:
                found.append((ratio, case, METHODS[row["method"]].label))
    if not found:
        return NOTHING
    found.sort(key=lambda one: one[0])

    def lines(entries: Sequence[tuple[float, Case, str]]) -> str:
        return "\n".join(
            f"- {case.shape.words}, {MODE_WORDS.get(case.mode, case.mode)}: "
            f"{label} takes {ratio:.2f} times as long."
            for ratio, case, label in entries
        )

    lost = [one for one in found if one[0] < 1]
    cases = len({case for _, case, _ in found})
    words = f"Of {cases} cases, a peer was faster in {len({case for _, case, _ in lost})}"
    closest = found[len(lost) : len(lost) + CLOSEST]
    parts = [f"{words}:" if lost else f"{words}.", lines(lost), "The next closest:", lines(closest)]
    return "\n\n".join(part for part in parts if part)


def methods(results: Results) -> str:
    """Make the table of all methods at one shape, the first."""
    case = Case(GOALS[results.device][0], "gradient")
    rows = results.cases.get(case, [])
    if not rows:
        return NOTHING
    lines = []
    for row in rows:
        method = METHODS[row["method"]]
        name = (
            method.label if method.family != OURS else f"`{row['method'].removeprefix('comhe-')}`"
        )
        if method.family == OURS:
            name = f"comhe_ext, backend {name}"
        if not method.same_energy:
            name += " (another energy)"
        if row["status"] != "ok":
            lines.append([name, f"{row['status']}: {row['note']}", *[""] * 5])
            continue
        time = compare.milliseconds(row)
        lines.append(
            [
                f"{name} {row['version']}" if method.packages else name,
                "" if time is None else number(time),
                f"{number(float(row['wall_min_ms']))} to {number(float(row['wall_max_ms']))}",
                number(float(row["first_s"])) + (" (compiles)" if row["compiled"] == "yes" else ""),
                number(float(row["peak_mib"])),
                error(row["energy_error"]),
                error(row["derivative_error"]),
            ]
        )
    headings = ["", "time, ms", "wall clock, ms", "first call, s", "peak, MiB"]
    headings += ["energy error", "gradient error"]
    return f"{case.shape.words}; {caption(rows)}.\n\n{markdown(headings, lines)}"


def modes(results: Results) -> str:
    lines, used = [], []
    for case, rows in results.cases.items():
        mine = compare.ours(rows)
        if case.mode == "gradient" or mine is None:
            continue
        used += rows
        time = compare.milliseconds(mine)
        nearest = compare.nearest(rows)
        naive = next((row for row in rows if row["method"] == "naive"), None)
        ratio = None if naive is None else compare.times_faster(mine, naive)
        lines.append(
            [
                f"{case.mode}, {case.shape.words}",
                "" if time is None else number(time),
                "" if ratio is None else f"{number(ratio)}×",
                "" if nearest is None else f"{number(nearest[1])}×",
                "" if nearest is None else METHODS[nearest[0]["method"]].label,
            ]
        )
    if not lines:
        return NOTHING
    headings = ["", "comhe_ext, ms", "naive", "fastest peer", "which is"]
    return f"{caption(used)}.\n\n{markdown(headings, lines)}"


def reached(results: Results) -> str:
    lines = []
    for goal in goals.GOALS[results.device]:
        value = goal.reached(results.cases, results.peaks)
        if value is None:
            lines.append([goal.words, goal.wanted(), "not measured", ""])
            continue
        shown = f"{value:.1e}" if value < 1e-3 else number(value)
        lines.append(
            [
                goal.words,
                goal.wanted(),
                f"{shown}{goal.unit}",
                "yes" if goal.met(value) else "**no**",
            ]
        )
    lines += threads(results)
    return markdown(["goal", "wanted", "reached", "met"], lines) if results.rows else NOTHING


def threads(results: Results) -> list[list[str]]:
    """Say how much faster two threads are than one, by the wall clock, at every goal."""
    settings = compare.by_setting(results.all_rows)
    if results.setting is None or results.device != "cpu":
        return []
    machine, device, _ = results.setting
    counts = [compare.by_case(settings.get((machine, device, n), [])) for n in ("1", "2")]
    lines = []
    for shape in GOALS["cpu"]:
        case = Case(shape, "gradient")
        rows = [compare.ours(cases.get(case, [])) for cases in counts]
        one, two = (None if row is None else float(row["wall_ms"]) for row in rows)
        words = [f"{shape.words}, two threads over one", "at least 1.9 times"]
        if one is None or two is None:
            lines.append([*words, "not measured", ""])
        else:
            met = "yes" if one / two >= 1.9 else "**no**"
            lines.append([*words, f"{one / two:.3g} times", met])
    return lines


# --- the others -----------------------------------------------------------------------------------


def errors(results: Results) -> str:
    rows = [r for r in accuracy.TABLE.newest(results.folder) if r["device"] == results.device]
    if not rows:
        return NOTHING
    lines = []
    for name, method in METHODS.items():
        mine = {row["case"]: row for row in rows if row["method"] == name}
        if not mine or all(row["status"] == "unavailable" for row in mine.values()):
            continue
        cells = []
        for case in (*accuracy.ANGLES, accuracy.COLLAPSED):
            row = mine.get(case)
            cells.append("" if row is None else error(row["gradient_error"]) or row["status"])
        equal = mine.get(accuracy.DUPLICATES)
        cells.append("" if equal is None or not equal["energy"] else number(float(equal["energy"])))
        label = (
            f"{method.label} (`{name.removeprefix('comhe-')}`)"
            if method.family == OURS
            else method.label
        )
        lines.append([label, *cells])
    headings = ["error of the gradient", *accuracy.ANGLES, "collapsed", "energy with duplicates"]
    return f"{caption(rows)}.\n\n{markdown(headings, lines)}"


def models(results: Results) -> str:
    rows = [r for r in model.TABLE.newest(results.folder) if r["device"] == results.device]
    if not rows:
        return NOTHING
    newest = max(rows, key=lambda row: row["date"])
    rows = compare.by_setting(rows)[compare.setting_of(newest)]
    lines: list[list[str]] = []
    why: dict[str, str] = {}
    for name, spec in MODELS[results.device].items():
        mine = [row for row in rows if row["model"] == name]
        plain = next((r for r in mine if r["variant"] == NONE and r["wall_ms"]), None)
        for row in mine:
            title = f"{spec.label}, batch {row['batch']}" if row["variant"] == NONE else ""
            if not row["wall_ms"]:
                lines.append([title, row["variant"], row["written"], row["status"], "", ""])
                why.setdefault(f"{row['variant']}, {row['written']}: {row['note']}", spec.label)
                continue
            time = float(row["wall_ms"])
            more = (
                ""
                if plain is None or row is plain
                else f"+{number(time - float(plain['wall_ms']))}"
            )
            lines.append(
                [
                    title,
                    row["variant"],
                    row["written"],
                    number(time),
                    more,
                    number(float(row["peak_mib"])),
                ]
            )
    headings = ["", "regularizer", "written", "step, ms", "of it", "peak, MiB"]
    notes = "".join(f"\n- {label}, {note}" for note, label in why.items())
    return f"{caption(rows)}.\n\n{markdown(headings, lines)}" + ("\n" + notes if notes else "")


# heading -> the method of the losses
LOSS_COLUMNS = {"dense": "dense", "row blocks": "row-blocks", "pdist": "pdist", "cdist": "cdist"}
LOSS_COLUMNS |= {"published": "published", "KeOps": "keops"}


def named_losses(results: Results) -> str:
    rows = [r for r in losses.TABLE.newest(results.folder) if r["device"] == results.device]
    if not rows:
        return NOTHING
    newest = max(rows, key=lambda row: row["date"])
    rows = compare.by_setting(rows)[compare.setting_of(newest)]
    lines = []
    for name, loss in losses.LOSSES.items():
        for shape in map(losses.shape_text, loss.shapes):
            found = {r["method"]: r for r in rows if (r["loss"], r["shape"]) == (name, shape)}
            if not found:
                continue
            mine = found[losses.OURS]
            time = compare.milliseconds(mine)
            cells = [mine["status"], ""]
            if time is not None:
                cells = [number(time), number(float(mine["peak_mib"]))]
            for method in LOSS_COLUMNS.values():
                cells.append(beside(mine, found[method]) if method in found else "")
            lines.append([f"`{name}`", shape.replace("x", " × "), *cells])
    headings = ["loss", "inputs", "comhe_ext, ms", "peak, MiB", *LOSS_COLUMNS]
    return f"{caption(rows)}.\n\n{markdown(headings, lines)}"


def beside(mine: Row, other: Row) -> str:
    """Say how many times as long another method takes, bold if it is faster, and its memory."""
    ratio = compare.times_faster(mine, other)
    if ratio is None:
        return REASONS.get(other["status"], other["status"])
    words = f"{number(ratio)}×"
    return f"{f'**{words}**' if ratio < 1 else words}, {number(float(other['peak_mib']))} MiB"


def pictures(results: Results) -> str:
    names = [name for name in plots.figures(results.folder) if name.endswith(results.device)]
    if not names:
        return NOTHING
    return "\n\n".join(picture(name) for name in names)


def picture(name: str) -> str:
    folder = "bench/results/plots"
    return (
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="{folder}/{name}-dark.png">\n'
        f'  <img alt="{plots.ALTERNATIVES[name.split("-")[0]]}" src="{folder}/{name}-light.png">\n'
        "</picture>"
    )


def training(folder: Path) -> str:
    rows = digits.TABLE.newest(folder)
    if not rows:
        return NOTHING
    layers = [name.removesuffix("_last") for name in digits.TABLE.columns if name.endswith("_last")]
    lines = []
    for method, name in digits.METHODS.items():
        runs = [row for row in rows if row["method"] == method]
        accuracies = [float(row["accuracy"]) for row in runs]
        energies = [statistics.mean(float(row[f"{x}_last"]) for row in runs) for x in layers]
        lines.append(
            [
                name,
                f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}",
                *(f"{energy:.4f}" for energy in energies),
                f"{statistics.median(float(row['step_ms']) for row in runs):.1f}",
            ]
        )
    seeds = len({row["seed"] for row in rows})
    headings = ["", "test accuracy, %", *(f"energy of {layer}" for layer in layers), "step, ms"]
    words = f"Mean ± deviation over {seeds} seeds of {rows[0]['steps']} steps; {caption(rows)}."
    return f"{words}\n\n{markdown(headings, lines)}"


# --- README.md ------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Results], str]] = {
    "goals": reached,
    "speed": speed,
    "slower": slower,
    "plots": pictures,
    "methods": methods,
    "modes": modes,
    "accuracy": errors,
    "models": models,
    "losses": named_losses,
}


def parts(folder: Path) -> dict[str, str]:
    """Make the text between the markers of each name."""
    texts = {"training": training(folder)}
    for device in ("cpu", "cuda"):
        results = Results(folder, device)
        for name, part in PARTS.items():
            texts[f"{name} {device}"] = part(results)
    return texts


def with_parts(text: str, folder: Path) -> str:
    """Put the results of a folder into README's text; ValueError if the markers are wrong."""
    made = parts(folder)
    marked = re.findall(r"^<!-- (?!end )(.+) -->$", text, re.M)
    for name in marked:
        pattern = rf"(?<=^<!-- {name} -->\n).*?(?=^<!-- end {name} -->$)"
        if name not in made:
            raise ValueError(f"README.md has a part {name!r}, known are {', '.join(made)}")
        if marked.count(name) != 1 or len(re.findall(pattern, text, re.S | re.M)) != 1:
            raise ValueError(f"README.md must have one part {name!r} with an end")
        new = f"\n{made[name]}\n\n".replace("\\", r"\\")  # re.sub reads backslashes
        text = re.sub(pattern, new, text, flags=re.S | re.M)
    return text


def update(folder: Path) -> None:
    README.write_text(with_parts(README.read_text(), folder))


def up_to_date(folder: Path) -> bool:
    text = README.read_text()
    return with_parts(text, folder) == text
