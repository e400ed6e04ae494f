"""`comhe-ext energy`: the energy of each layer of checkpoints."""

import argparse
import csv
import json
import math
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from comhe_ext.cli import arguments, screen
from comhe_ext.cli.checkpoint import Checkpoint, Entry, Unreadable, find_checkpoints, reason_of
from comhe_ext.cli.layer import Energy, LayerReport, measure
from comhe_ext.kernels.pair_functions import Riesz
from comhe_ext.layers import ADAPTERS, NOWHERE_TO_TURN

HELP = "print the energy of each layer of checkpoints"
DESCRIPTION = """Print a table of the layers of a checkpoint: the mean hyperspherical energy of its
rows in full and in half space, what random directions have, the least that is possible, the two
nearest rows, and how many rows are zero or double. Several checkpoints are set side by side."""
EPILOG = """\
examples:
  comhe-ext energy model.safetensors
  comhe-ext energy before.pt after.pt --include '*.mlp.*' --plot energies.png
  comhe-ext energy checkpoints/ --json | jq '.[] | select(.duplicates > 0) | .name'

CHECKPOINT is a file of safetensors, one that torch.save wrote (.pt .pth .bin .ckpt), the
.index.json of shards, or a folder of these. No code of a file is run: a pickle that is more than
weights is refused. A tensor at a time is held in memory.

A tensor of two or more dimensions is a layer: its first dimension counts the rows, all others are
the columns. Vectors are counted, and whatever else is no layer is listed on stderr with the reason.

exit codes:
  0  all layers were measured
  1  there were none, something could not be read, or rows hold NaN or infinity
  2  the command line was wrong
"""
DTYPES = ("float16", "bfloat16", "float32", "float64")
MOST_ROWS = 32768  # of an exact energy: its time grows with their square
COLUMNS = (
    *("layer", "N", "d", "energy", "random", "lowest", "half", "random", "lowest"),
    *("nearest", "degrees", "dead", "double"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    patterns = parser.add_argument_group("layers")
    for option, text in (
        ("include", "names of layers to take, as 'encoder.*'; may be repeated"),
        ("exclude", "names of layers to leave out; may be repeated"),
        ("transpose", "names of layers whose neurons are the columns, as GPT-2's 'h.*.weight'"),
    ):
        patterns.add_argument(
            f"--{option}", action="append", default=[], metavar="PATTERN", help=text
        )
    numbers = parser.add_argument_group("numbers")
    numbers.add_argument(
        "--s", type=_exponent, default=2.0, help="exponent of the energy r^-s; default 2"
    )
    numbers.add_argument(
        "--sampled-above",
        type=arguments.count,
        default=MOST_ROWS,
        metavar="N",
        help="estimate the energies of layers of more rows, with an error; the nearest rows are "
        f"not looked for there; default {MOST_ROWS}",
    )
    numbers.add_argument("--device", type=arguments.device, default="cpu", help="default cpu")
    outputs = parser.add_argument_group("output")
    form = outputs.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a JSON list of layers")
    form.add_argument("--csv", action="store_true", help="a line a layer, of the fields of --json")
    outputs.add_argument(
        "--plot", type=Path, metavar="FILE", help="a picture, too, as PNG, PDF or SVG"
    )


def run(options: argparse.Namespace) -> int:
    """Measure all layers, print them, and return 1 if something was not as it should be."""
    if options.plot is not None:
        try:
            from comhe_ext.cli import plot
        except ImportError:
            screen.note("--plot needs matplotlib: pip install 'comhe-ext[cli]'")
            return 2
    checkpoints = [x for path in options.checkpoints for x in find_checkpoints(path)]
    labels = _labels([checkpoint.path for checkpoint in checkpoints])
    chosen, sound = _choose(checkpoints, options)
    as_text = not (options.json or options.csv)
    reports: list[list[LayerReport]] = []
    for label, checkpoint, entries in zip(labels, checkpoints, chosen, strict=True):
        if as_text and reports:
            print()
        with screen.progress(sum(entry.size for entry in entries), "B") as advance:
            layers = _measure_all(label, checkpoint, entries, options, advance)
        reports.append(layers)
        if as_text:
            _print_layers(label, layers)
        sound &= _tell(label, checkpoint, layers)
    every = [layer for layers in reports for layer in layers]
    if options.json:
        print(json.dumps([layer.record() for layer in every], indent=2, allow_nan=False))
    elif options.csv:
        _print_csv(every)
    else:
        full = [(label, layers) for label, layers in zip(labels, reports, strict=True) if layers]
        if len(full) > 1:
            _print_side_by_side(full)
    if options.plot is not None and every:
        try:
            plot.save(options.plot, labels, reports)
        except (OSError, ValueError) as error:  # an unknown kind of picture
            screen.note(f"{options.plot}: {reason_of(error)}")
            return 1
    return 0 if sound and every else 1


def _exponent(text: str) -> float:
    try:
        return Riesz(float(text)).s
    except ValueError as error:
        raise argparse.ArgumentTypeError(reason_of(error)) from None


# --- what is measured -----------------------------------------------------------------------------


def _choose(
    checkpoints: Sequence[Checkpoint], options: argparse.Namespace
) -> tuple[list[list[Entry]], bool]:
    """Choose entries by their names, and tell whether every pattern fits one."""
    names = {entry.name for checkpoint in checkpoints for entry in checkpoint.entries}
    all_fit = True
    for pattern in (*options.include, *options.exclude, *options.transpose):
        if names and not any(fnmatchcase(name, pattern) for name in names):
            screen.note(f"pattern {pattern!r} matches no tensor")
            all_fit = False

    def wanted(name: str) -> bool:
        if any(fnmatchcase(name, pattern) for pattern in options.exclude):
            return False
        return not options.include or any(fnmatchcase(name, x) for x in options.include)

    return [
        [x for x in checkpoint.entries if wanted(x.name)] for checkpoint in checkpoints
    ], all_fit


def _measure_all(
    label: str,
    checkpoint: Checkpoint,
    entries: Sequence[Entry],
    options: argparse.Namespace,
    advance: Callable[[int, str], object],
) -> list[LayerReport]:
    """Measure the layers of a checkpoint; what has none goes to `checkpoint.left_out`."""
    layers = []
    for entry in entries:
        advance(0, entry.name)
        turned = any(fnmatchcase(entry.name, pattern) for pattern in options.transpose)
        reason = _why_not(entry, turned, bool(options.include))
        if len(entry.shape) == 1:
            checkpoint.vectors += 1
        elif reason is not None:
            checkpoint.left_out.append((entry.name, reason))
        else:
            try:
                rows = _rows(entry.read(), turned)
                layers.append(
                    measure(
                        label,
                        entry.name,
                        rows,
                        s=options.s,
                        sampled_above=options.sampled_above,
                        device=options.device,
                    )
                )
                del rows  # before the next is read
            except (Unreadable, RuntimeError, ValueError, TypeError, OSError, MemoryError) as error:
                checkpoint.unreadable.append((entry.name, reason_of(error)))
        advance(entry.size, entry.name)
    return layers


def _why_not(entry: Entry, turned: bool, included: bool) -> str | None:
    """Say why a tensor is no layer."""
    if entry.dtype not in DTYPES:
        return f"{_kind(entry.dtype)} ({entry.dtype})"
    if not entry.shape:
        return "a single number"
    if 0 in entry.shape:
        return f"empty, of shape {entry.shape}"
    if not included and any(part in ADAPTERS for part in entry.name.split(".")):
        return "a factor of a low-rank update has no neurons"
    if len(entry.shape) > 1:
        neurons = entry.shape[1 if turned else 0]
        if neurons < 2:
            return "fewer than two neurons make no pair"
        if math.prod(entry.shape) == neurons:
            return NOWHERE_TO_TURN
    return None


def _kind(dtype: str) -> str:
    """Say what numbers these are that no energy is computed of."""
    if dtype.startswith("sparse"):
        return "sparse"
    if dtype.startswith(("int", "uint", "bool")):
        return "integers"
    if dtype.startswith("complex"):
        return "complex numbers"
    return "quantized"


def _rows(tensor: Tensor, turned: bool) -> Tensor:
    """View a weight as rows [N, d], one for each neuron."""
    return (tensor.transpose(0, 1) if turned else tensor).flatten(1)


# --- what is printed ------------------------------------------------------------------------------


def _labels(paths: Sequence[Path]) -> list[str]:
    """Name checkpoints by the ends of their paths in which they differ."""
    parts = [path.absolute().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = [str(Path(*x[-depth:])) for x in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _tell(label: str, checkpoint: Checkpoint, layers: Sequence[LayerReport]) -> bool:
    """Tell on stderr what is not in the table, and whether nothing is broken."""
    for name, reason in checkpoint.left_out:
        screen.note(f"{label}: {name}: left out: {reason}")
    if checkpoint.vectors:
        screen.note(f"{label}: {checkpoint.vectors} vectors, which have no rows, are left out")
    bad = [layer for layer in layers if layer.nonfinite_rows]
    for layer in bad:
        screen.note(
            f"{label}: {layer.name}: {layer.nonfinite_rows} of {layer.rows} rows hold NaN or "
            "infinity; the numbers are those of the others"
        )
    for name, reason in checkpoint.unreadable:
        where = label if Path(label).name == name else f"{label}: {name}"
        screen.note(f"{where}: NOT READ: {reason}")
    return not (bad or checkpoint.unreadable)


def _number(value: float) -> str:
    return f"{value:.5f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.4g}"


def _energy(energy: Energy | None) -> list[str]:
    if energy is None:
        return ["-"] * 3
    error = f"±{energy.error:.1g}" if energy.error else ""
    return [_number(energy.value) + error, _number(energy.random), _number(energy.lowest)]


def _print_layers(label: str, layers: Sequence[LayerReport]) -> None:
    """Print a table, a line a layer."""
    print(screen.paint(f"{screen.printable(label)}: {len(layers)} layers", screen.BOLD))
    rows = []
    for layer in layers:
        near = layer.nearest
        rows.append(
            [
                layer.name,
                str(layer.rows),
                str(layer.columns),
                *_energy(layer.energy),
                *_energy(layer.half_space),
                "-" if near is None else f"{near.row}, {near.other}",
                "-" if near is None else f"{near.degrees:.4g}",
                str(layer.dead_rows),
                str(layer.duplicates),
            ]
        )
    if rows:
        screen.print_table(COLUMNS, rows)


def _print_csv(layers: Sequence[LayerReport]) -> None:
    """Print the fields of --json, those of the nearest rows flat."""
    writer = None
    for layer in layers:
        record = layer.record()
        near = layer.nearest
        del record["nearest"]
        names = ("nearest_row", "nearest_other", "nearest_degrees")
        record |= dict(zip(names, near or (None,) * 3, strict=True))
        if writer is None:
            writer = csv.DictWriter(sys.stdout, list(record), lineterminator="\n")
            writer.writeheader()
        writer.writerow(record)


def _print_side_by_side(reports: Sequence[tuple[str, Sequence[LayerReport]]]) -> None:
    """Print the energies of each layer in all checkpoints, and how far from those of the first."""
    print()
    print(screen.paint("side by side, and the change since the first", screen.BOLD))
    for number, (label, _) in enumerate(reports, 1):
        print(f"  {number}: {screen.printable(label)}")
    found = [{layer.name: layer for layer in layers} for _, layers in reports]
    names = dict.fromkeys(name for layers in found for name in layers)
    # a table for each space: the two beside each other would be wider than a screen
    for field, title in (("energy", "energy"), ("half_space", "half-space energy")):
        headers = [title, "1"]
        for number in range(2, len(reports) + 1):
            headers += [str(number), "change"]
        rows = []
        for name in names:
            energies = [getattr(layers.get(name), field, None) for layers in found]
            first, *others = (None if x is None else x.value for x in energies)
            cells = [name, "-" if first is None else _number(first)]
            for value in others:
                cells += ["-" if value is None else _number(value), _change(first, value)]
            rows.append(cells)
        print()
        screen.print_table(headers, rows)


def _change(first: float | None, value: float | None) -> str:
    if first is None or value is None or not first:
        return "-"
    return f"{100 * (value - first) / abs(first):+.3g}%"
