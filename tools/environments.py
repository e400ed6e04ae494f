"""Makes environments with other versions of PyTorch and Python than this one's.

PyTorch comes as PyPI has it, but for CUDA's libraries, in whose place stand-ins load
(see stand_ins.py). That downloads 0.5 to 0.9 GB and takes 2 to 3 GB of disk. Needs Linux on x86-64,
gcc and readelf.
"""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tools.stand_ins import stand_in

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/versions.md"


def run(*command: object) -> None:
    """Run a command that has to succeed."""
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)


def drop_cuda(site: Path) -> None:
    """Take CUDA's libraries out of what PyTorch asks for, and put stand-ins where they would be."""
    (metadata,) = site.glob("torch-*.dist-info/METADATA")
    text = metadata.read_text()
    metadata.write_text(re.sub(r"^Requires-Dist: (nvidia|cuda)-.*\n", "", text, flags=re.M))
    stand_in(site / "torch")


def make_environment(folder: Path, python: str, torch: str) -> Path:
    """Make a virtual environment with a PyTorch alone, and return the folder of its programs.

    What PyTorch needs but CUDA comes with the first package that is installed there and needs it.
    """
    run(python, "-m", "venv", folder)
    programs = folder / "bin"
    run(programs / "pip", "install", "-q", "--no-deps", "--no-cache-dir", torch)
    (site,) = folder.glob("lib/python*/site-packages")
    drop_cuda(site)
    return programs


def write_row(table: str, cells: Sequence[str], key: Sequence[int]) -> None:
    """Put a row into a table of the page, in place of the one with the same cells at `key`."""
    marks = f"<!-- {table} -->\n", f"<!-- end of {table} -->\n"
    before, body, after = re.split("|".join(marks), PAGE.read_text())
    lines = body.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    rows = [row for row in rows if any(row[k] != cells[k] for k in key)]

    def order(row: Sequence[str]) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", " ".join(row))]

    written = [f"| {' | '.join(row)} |" for row in sorted([*rows, list(cells)], key=order)]
    body = "\n".join([*lines[:2], *written])
    PAGE.write_text(f"{before}{marks[0]}{body}\n{marks[1]}{after}")
