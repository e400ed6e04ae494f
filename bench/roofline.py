"""`python -m bench roofline`: the machine's peaks, and what share of them the sweep reached."""

from pathlib import Path

from bench import compare, machine, sweep
from bench.compare import milliseconds
from bench.options import Options
from bench.screen import make_table
from bench.shapes import Case
from bench.store import Row, Table

TABLE = Table(
    "roofline",
    key=machine.STAMP,
    values=("date", "flops", "matrix_flops", "bytes_per_second", "note"),
)


def measure(options: Options) -> dict[str, object]:
    """Measure the peak rates: multiply-adds in float32, the GPU's matrix units, a copy."""
    device, threads = options.device, options.threads
    row = machine.stamp(device, threads)
    row["bytes_per_second"] = machine.copy_bandwidth(device, threads)
    if device == "cuda":
        row["matrix_flops"] = machine.matrix_peak()
    else:
        try:
            row["flops"] = machine.fma_peak(threads)
        except RuntimeError as error:
            row["note"] = str(error)
    TABLE.upsert(options.out, [row])
    return row


def peaks(setting: compare.Setting, folder: Path) -> Row | None:
    """Find the newest row of a machine."""
    return next((row for row in TABLE.newest(folder) if compare.setting_of(row) == setting), None)


def peak(row: Row | None) -> float | None:
    """Read operations a second of the unit that computes the products of our sweep."""
    if row is None:
        return None
    text = row["matrix_flops"] or row["flops"]
    return float(text) if text else None


def rate(case: Case, row: Row) -> float | None:
    """Compute the useful operations a second of energy and gradient."""
    time = milliseconds(row)
    return None if time is None or case.mode != "gradient" else case.shape.flop / (1e-3 * time)


def share(case: Case, row: Row, top: Row | None) -> float | None:
    """Compute the share of the peak that is useful work."""
    most, reached = peak(top), rate(case, row)
    return None if most is None or reached is None else reached / most


def show(options: Options) -> None:
    """Measure the peaks, and print what the sweep reached of them."""
    row = measure(options)
    for name, unit in (
        ("flops", "flop/s"),
        ("matrix_flops", "flop/s"),
        ("bytes_per_second", "B/s"),
    ):
        value = row.get(name)
        if isinstance(value, float):
            options.console.print(f"{name.replace('_', ' ')}: {value / 1e9:,.1f} G{unit}")
    if row.get("note"):
        options.console.print(f"no peak of multiply-adds: {row['note']}")
    setting = machine.name(options.device), options.device, str(options.threads)
    top = peaks(setting, options.out)
    lines = []
    rows = compare.by_setting(sweep.TABLE.newest(options.out)).get(setting, [])
    for case, found in compare.by_case(rows).items():
        mine = compare.ours(found)
        if mine is None or (reached := rate(case, mine)) is None:
            continue
        part = share(case, mine, top)
        lines.append(
            [str(case.shape), f"{reached / 1e9:,.1f}", "-" if part is None else f"{part:.0%}"]
        )
    headings = ("shape", "useful Gflop/s", "of the peak")
    options.console.print(make_table("comhe_ext, energy + gradient", headings, lines))
