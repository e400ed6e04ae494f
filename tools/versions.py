"""Runs the core tests under other versions of PyTorch and Python: `make test-versions`.

    python -m tools.versions 2.6.0 2.8.0 2.14.1:python3.13

Each version, with a Python if it is not to be the one that runs this, gets an environment of its
own: PyTorch as PyPI has it, its Triton, stand-ins for CUDA (see stand_ins.py), and the wheel of
this checkout, built once for all. That downloads 0.5 to 0.9 GB and takes 2 to 3 GB of disk, which
are free again when its tests have ended. What came of it goes to docs/versions.md, one line a
version, in place of the line of an earlier run. Needs Linux on x86-64, gcc and readelf.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from tools.stand_ins import stand_in

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/versions.md"
MARKS = "<!-- versions -->\n", "<!-- end of versions -->\n"
# where PyTorch's own machinery is at work: operators, their derivatives, transforms, compilation,
# and whole models. The other tests are about arithmetic, which no version changes
CORE = (
    "tests/models",
    # of other people's loops
    "--ignore=tests/models/test_integrations.py",
    "tests/operators/test_angle_loss.py",
    "tests/operators/test_compressive.py",
    "tests/operators/test_energy.py",
    "tests/operators/test_forward_mode.py",
    "tests/operators/test_many_weights.py",
    "tests/operators/test_second_order.py",
    "tests/operators/test_transforms.py",
    "tests/package/test_backends.py",
)
# what they import beside torch
PACKAGES = (
    *("hypothesis>=6.100", "numpy", "psutil", "pytest>=8", "pytest-xdist", "scikit-learn"),
    *("scipy", "tabulate", "tqdm"),
)
# asks for torch itself, with all of CUDA: without what it asks for
ALONE = ("pytorch-metric-learning",)
ABOUT = """
import json, platform
import torch, triton
from comhe_ext import backends
reason = backends.unavailable("triton") or ""
print(json.dumps([platform.python_version(), triton.__version__, "too old" in reason]))
"""


class Version(NamedTuple):
    """A PyTorch and the Python to run it."""

    torch: str
    python: str = sys.executable

    @classmethod
    def parse(cls, text: str) -> "Version":
        """Read "2.6.0" or "2.6.0:python3.12"."""
        return cls(*text.split(":", 1))


class Outcome(NamedTuple):
    """A line of the table, and the tests that failed."""

    torch: str
    triton: str
    python: str
    serves: str
    passed: int
    failed: list[str]
    skipped: int

    @property
    def cells(self) -> tuple[str, ...]:
        """Write the line, cell by cell."""
        numbers = (f"{n:,}" for n in (self.passed, len(self.failed), self.skipped))
        return (self.torch, self.triton, self.python, self.serves, *numbers)


def run(*command: object) -> None:
    """Run a command that has to succeed."""
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)


def requirements(site: Path) -> tuple[list[str], list[str]]:
    """Return what torch asks for: Python's packages, and Triton; CUDA's libraries are left out."""
    (info,) = site.glob("torch-*.dist-info")
    packages, triton = [], []
    for line in metadata.Distribution.at(info).requires or ():
        if line.startswith("triton"):
            triton.append(line)
        elif "extra ==" not in line and not line.startswith(("nvidia-", "cuda-")):
            packages.append(line)
    return packages, triton


def make_environment(folder: Path, version: Version, wheel: Path) -> Path:
    """Make a virtual environment, and return the folder of its programs."""
    run(version.python, "-m", "venv", folder)
    programs = folder / "bin"
    install = (programs / "python", "-m", "pip", "install", "-q", "--no-warn-conflicts")
    alone = (*install, "--no-deps", "--no-cache-dir")
    # unlike ==, this is not satisfied by builds of other names: 2.13.0+cpu asks for no Triton
    run(*alone, f"torch==={version.torch}")
    (site,) = folder.glob("lib/python*/site-packages")
    packages, triton = requirements(site)
    run(*alone, *triton, *ALONE, wheel)
    run(*install, *packages, *PACKAGES)
    stand_in(site / "torch")
    return programs


def test(programs: Path, version: Version, tests: Sequence[str], report: Path) -> Outcome:
    """Run the tests in an environment, and read pytest's report."""
    about = subprocess.run(
        [programs / "python", "-c", ABOUT], cwd=programs, check=True, capture_output=True, text=True
    )
    python, triton, too_old = json.loads(about.stdout)
    # the program pytest, unlike python -m pytest, does not put this folder before the wheel
    command = [str(programs / "pytest"), "-q", "-n", "2", "-m", "not long", f"--junit-xml={report}"]
    subprocess.run(
        [*command, "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if {part.tag for part in case} & {"failure", "error"}]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return Outcome(
        version.torch,
        triton,
        python,
        "no: Triton is too old" if too_old else "yes",
        len(cases) - len(failed) - len(skipped),
        [f"{case.get('classname')}::{case.get('name')}" for case in failed],
        len(skipped),
    )


def write(outcome: Outcome) -> None:
    """Put a line into the table, in place of one of the same PyTorch and Python."""
    text = PAGE.read_text()
    before, table, after = re.split("|".join(MARKS), text)
    lines = table.splitlines()
    heading, rows = lines[:2], {tuple(row.split("|")[1:4:2]): row for row in lines[2:]}
    row = f"| {' | '.join(outcome.cells)} |"
    rows[tuple(row.split("|")[1:4:2])] = row

    def order(row: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", row)]

    table = "\n".join([*heading, *sorted(rows.values(), key=order)])
    PAGE.write_text(f"{before}{MARKS[0]}{table}\n{MARKS[1]}{after}")


def main() -> None:
    """Try each version after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("versions", nargs="+", type=Version.parse, metavar="VERSION[:PYTHON]")
    parser.add_argument(
        "--tests", nargs="+", help="other tests than the core ones; nothing is written then"
    )
    options = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as built:
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", built, ROOT)
        (wheel,) = Path(built).glob("*.whl")
        for version in options.versions:
            print(f"--- PyTorch {version.torch}", flush=True)
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                programs = make_environment(folder / "environment", version, wheel)
                outcome = test(programs, version, options.tests or CORE, folder / "report.xml")
            print(" | ".join(outcome.cells), flush=True)
            failed += [f"{version.torch}: {name}" for name in outcome.failed]
            if not options.tests:
                write(outcome)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
