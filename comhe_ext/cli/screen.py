"""Text for a terminal, or for whatever a pipe leads to: tables, colors, a progress bar."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

BOLD, YELLOW = "1", "33"
LEAST_NAME = 20  # columns that a shortened name keeps


def on_terminal() -> bool:
    """Tell whether somebody looks at the output, so that it may be shortened to fit."""
    return sys.stdout.isatty()


def paint(text: str, code: str) -> str:
    """Color a text on a terminal that has colors, unless NO_COLOR is set."""
    colors = on_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\033[{code}m{text}\033[0m" if colors else text


def printable(text: str) -> str:
    """Escape what would move the cursor or end the line: names in a file may hold anything."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


def shorten(text: str, width: int) -> str:
    """Leave out the middle of a text that is too long."""
    if len(text) <= width:
        return text
    front = (width - 1) // 2
    return f"{text[:front]}…{text[len(text) - (width - 1 - front) :]}"


def note(text: str) -> None:
    """Print a line that is not part of the result, after what was printed before."""
    sys.stdout.flush()
    print(f"comhe-ext: {printable(text)}", file=sys.stderr)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns, the first to the left.

    On a terminal the first column is shortened where the table is wider than the screen.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (headers, *cells)) for i in range(len(headers))]
    if on_terminal():
        rest = sum(widths[1:]) + 2 * len(widths[1:])
        space = shutil.get_terminal_size().columns - rest
        widths[0] = min(widths[0], max(space, LEAST_NAME, len(headers[0])))

    def line(row: Sequence[str]) -> str:
        first = shorten(row[0], widths[0]).ljust(widths[0])
        others = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join((first, *others)).rstrip()

    print(paint(line(headers), BOLD))
    for row in cells:
        print(line(row))


@contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[int, str], object]]:
    """Show a bar on the terminal that stderr is, if tqdm is installed; yield what moves it."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda amount, name: None
        return
    with tqdm(
        total=total, unit=unit, unit_scale=True, leave=False, disable=not sys.stderr.isatty()
    ) as bar:

        def advance(amount: int, name: str) -> None:
            bar.set_postfix_str(shorten(printable(name), 40), refresh=False)
            bar.update(amount)

        yield advance
