"""Runs the core tests under other versions of PyTorch and Python: `make test-versions`.

    python -m tools.versions 2.6.0 2.8.0 2.14.1:python3.13

Each version, with a Python if it is not to be the one that runs this, gets an environment of its
own (see environments.py) with the wheel of this checkout, built once for all, which is deleted when
its tests have ended. What came of it goes to docs/versions.md, one line a version, in place of the
line of an earlier run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from tools.environments import ROOT, make_environment, run, write_row

# where PyTorch's own machinery is at work: operators, their derivatives, transforms, compilation,
# and whole models. The other tests are about arithmetic, which no version changes
CORE = (
    "tests/models",
    # of other people's loops
    "--ignore=tests/models/test_integrations.py",
    "tests/operators/test_angle_loss.py",
    "tests/operators/test_compressive.py",
    "tests/operators/test_cross.py",
    "tests/operators/test_distance.py",
    "tests/operators/test_energy.py",
    "tests/operators/test_forward_mode.py",
    "tests/operators/test_many_weights.py",
    "tests/operators/test_nearest.py",
    "tests/operators/test_second_order.py",
    "tests/operators/test_transforms.py",
    "tests/losses/test_modules.py",
    "tests/package/test_backends.py",
    "tests/sampled",
)
# what they import beside torch
PACKAGES = (
    *("hypothesis>=6.100", "numpy", "psutil", "pytest>=8", "pytest-xdist"),
    *("pytorch-metric-learning", "scikit-learn", "scipy", "tabulate", "tqdm"),
)
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


def test(programs: Path, version: Version, tests: Sequence[str], folder: Path) -> Outcome:
    """Run a copy of the tests in an environment, and read pytest's report."""
    about = subprocess.run(
        [programs / "python", "-c", ABOUT], cwd=programs, check=True, capture_output=True, text=True
    )
    python, triton, too_old = json.loads(about.stdout)
    # in the checkout, tests that start a Python would find its comhe_ext before the wheel
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "tests", folder / "tests")
    report = folder / "report.xml"
    command = [str(programs / "pytest"), "-q", "-n", "2", "-m", "not long", f"--junit-xml={report}"]
    subprocess.run(
        [*command, "-p", "no:cacheprovider", *tests],
        cwd=folder,
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
                # unlike ==, this is not satisfied by builds of other names: 2.13.0+cpu asks for no
                # Triton
                torch = f"torch==={version.torch}"
                try:
                    programs = make_environment(folder / "environment", version.python, torch)
                    run(programs / "pip", "install", "-q", wheel, *PACKAGES)
                except (OSError, subprocess.CalledProcessError) as error:
                    # no such Python, no such PyTorch: the other versions can still be tried
                    failed.append(f"{version.torch}: {error}")
                    continue
                outcome = test(programs, version, options.tests or CORE, folder)
            print(" | ".join(outcome.cells), flush=True)
            failed += [f"{version.torch}: {name}" for name in outcome.failed]
            if not options.tests:
                write_row("versions", outcome.cells, key=(0, 2))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
