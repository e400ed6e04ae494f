"""Puts the numbers of bench/results/ into README.md, between the markers that name a table.

python bench/readme.py            rewrites the tables
python bench/readme.py --check    fails where README.md and the results disagree
"""

import argparse
import csv
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
Rows = list[dict[str, str]]


def read(name: str) -> Rows:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # words to the left, numbers to the right
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows))


def significant(value: str, digits: int = 3) -> str:
    number = float(value)
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.{digits}g}"


def costs() -> str:
    rows = read("demo-cpu")
    first = rows[0]
    backend = next(row["backend"] for row in rows if row["method"] == "comhe_ext")
    cells = []
    for row in rows:
        name = "naive PyTorch" if row["method"] == "naive" else row["method"]
        if not row["milliseconds"]:
            cells.append([name, row["rows"], *["not run"] * 4])
            continue
        numbers = [significant(row["milliseconds"]), significant(row["peak_mib"])]
        errors = [f"{float(row[f'{part}_error']):.1e}" for part in ("energy", "gradient")]
        cells.append([name, row["rows"], *numbers, *errors])
    headings = ["", "N", "time, ms", "peak memory, MiB", "energy error", "gradient error"]
    return (
        f"Energy + gradient, s = 2, k = {first['k']}, float32; {first['machine']}, "
        f"threads: {first['threads']}, PyTorch {first['torch']}, backend `{backend}`.\n\n"
        + markdown(headings, cells)
    )


def training() -> str:
    rows = read("demo-training")
    names = {"none": "no regularizer", "MHE": "MHE", "RP-CoMHE": "RP-CoMHE"}
    layers = [key.removesuffix("_last") for key in rows[0] if key.endswith("_last")]
    cells = []
    for method, name in names.items():
        runs = [row for row in rows if row["method"] == method]
        accuracies = [float(row["accuracy"]) for row in runs]
        energies = [statistics.mean(float(row[f"{x}_last"]) for row in runs) for x in layers]
        cells.append(
            [
                name,
                f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}",
                *(f"{energy:.4f}" for energy in energies),
                f"{statistics.median(float(row['step_ms']) for row in runs):.1f}",
            ]
        )
    seeds = len({row["seed"] for row in rows})
    headings = ["", "test accuracy, %", *(f"energy of {layer}" for layer in layers), "step, ms"]
    return (
        f"Mean ± deviation over {seeds} seeds of {rows[0]['steps']} steps; {rows[0]['machine']}, "
        f"threads: {rows[0]['threads']}, PyTorch {rows[0]['torch']}, backend "
        f"`{rows[0]['backend']}`.\n\n" + markdown(headings, cells)
    )


TABLES = {"costs": costs, "training": training}


def with_tables(text: str) -> str:
    for name, table in TABLES.items():
        pattern = rf"(?<=<!-- {name} -->\n).*?(?=<!-- end {name} -->)"
        if len(re.findall(pattern, text, re.S)) != 1:
            raise ValueError(f"README.md must have one table {name!r}")
        lines = f"\n{table()}\n\n"
        text = re.sub(pattern, lines, text, flags=re.S)
    return text


def update() -> None:
    README.write_text(with_tables(README.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    if not args.check:
        update()
    elif with_tables(README.read_text()) != README.read_text():
        sys.exit("README.md differs from bench/results: run python bench/readme.py")


if __name__ == "__main__":
    main()
