"""Works out what energies of very many rows should cost on many GPUs, for docs/distributed.md.

    python -m tools.scaling            # prints the table
    python -m tools.scaling --save     # puts it into the page

A model on paper, from the numbers below: the page says what they stand for.
"""

import math
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/distributed.md"
HEAD = "| classes | GPUs | method | kernels | on the links | received | above the rows themselves |"

WIDTH = 40  # k, of one projection
NUMBER = 4  # bytes of a float32
PAIRS = 1e12  # a second, of a GPU, with the gradient in one side
BANDWIDTH = 2e12  # bytes a second, of a GPU's memory
PASSES = 40  # of a sample's moments and unit rows over the rows, there and back
NEAR, FAR = 450e9, 50e9  # bytes a second, within a machine and between machines
MACHINE = 8  # GPUs of one
LATENCY = 30e-6  # seconds, of an exchange of a few bytes, for each doubling of the ranks
RING_ROWS = 8192  # of a rank, from which on it takes the ring
SAMPLES = 1024


def main() -> None:
    """Print the table, or put it into the page."""
    text = table()
    if "--save" not in sys.argv[1:]:
        print(text)
        return
    before, _, after = PAGE.read_text().partition(HEAD)
    PAGE.write_text(before + text + after[after.index("\n\n") :])


def table() -> str:
    """Make the table, in Markdown."""
    lines = [HEAD, "|---:|---:|---|---:|---:|---:|---:|"]
    for exponent in (6, 7):
        for ranks in (8, 64, 512):
            for method in (exact, sampled):
                name, kernels, links, received, memory = method(10**exponent, ranks)
                cells = (
                    f"10^{exponent}",
                    str(ranks),
                    name,
                    *map(_time, (kernels, links)),
                    *map(_size, (received, memory)),
                )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def exact(rows: int, ranks: int) -> tuple[str, float, float, float, float]:
    """Model an exact energy: its strategy, seconds of kernels and of links, bytes of both kinds."""
    points = NUMBER * WIDTH * rows
    received = points * (1.0 - 1.0 / ranks)
    pairs = rows**2 / ranks
    if rows / ranks >= RING_ROWS:
        # half of the pairs, with the gradients in both sides; half of what comes are gradients
        return "ring", pairs / PAIRS, received / _speed(ranks), received, 4.0 * points / ranks
    return "gather", pairs / PAIRS, received / _speed(ranks), received, 3.0 * points


def sampled(rows: int, ranks: int) -> tuple[str, float, float, float, float]:
    """Model a sampled energy in the same way."""
    local = NUMBER * WIDTH * rows / ranks
    kernels = rows / ranks * SAMPLES / PAIRS + PASSES * local / BANDWIDTH
    moments = WIDTH * (WIDTH + 1) // 2 + WIDTH + 1
    # a sum comes as parts, and then as a whole; its numbers are float64
    received = NUMBER * WIDTH * SAMPLES + 2 * 8 * moments
    links = received / _speed(ranks) + 2 * LATENCY * math.log2(ranks)
    # unit rows, their gradients, those of the rows, and a copy on the way
    return "sampled", kernels, links, received, 4.0 * local


def _speed(ranks: int) -> float:
    return NEAR if ranks <= MACHINE else FAR


def _time(seconds: float) -> str:
    return f"{_rounded(seconds)} s" if seconds >= 1.0 else f"{_rounded(1e3 * seconds)} ms"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{_rounded(count)} {unit}"
        count /= 1000.0
    return f"{_rounded(count)} GB"


def _rounded(number: float) -> str:
    """Write two digits, and no exponent."""
    return f"{float(f'{number:.2g}'):g}"


if __name__ == "__main__":
    main()
