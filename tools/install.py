"""Installs what a release uploads into clean environments: `make test-install`.

    python -m tools.install python3.10 python3.13

Each Python gets an environment with the newest PyTorch that pip finds (see environments.py), where
pip installs the wheel from dist/ and, when that is removed again, the sdist, which it builds in
isolation. With each the first example of README.md has to run, outside of the checkout, and the
compiled kernel to be there. What came of it goes to docs/versions.md, one line a Python.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.environments import ROOT, make_environment, run, write_row

ABOUT = """
import json, platform, sys
import torch
import comhe_ext
from comhe_ext import backends
assert comhe_ext.__file__.startswith(sys.prefix), comhe_ext.__file__
print(json.dumps([platform.python_version(), torch.__version__, backends.unavailable("cpu")]))
"""


def first_example() -> str:
    """Read the first example that imports the package from README.md."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(str(block) for block in blocks if "import comhe_ext" in block)


def attempt(programs: Path, artifact: Path, example: str) -> tuple[str, str, str]:
    """Install, run the example, remove; return the versions of Python and torch, and the result."""
    run(programs / "pip", "install", "-q", artifact)
    run(programs / "pip", "check")
    python = programs / "python"
    subprocess.run([python, "-c", example], cwd=programs, check=True)
    subprocess.run([programs / "comhe-ext", "info"], cwd=programs, check=True)
    about = subprocess.run(
        [python, "-c", ABOUT], cwd=programs, check=True, capture_output=True, text=True
    )
    version, torch, unavailable = json.loads(about.stdout)
    run(programs / "pip", "uninstall", "-q", "-y", "comhe-ext")
    return version, torch.partition("+")[0], unavailable or "works"


def main() -> None:
    """Try one Python after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    options = parser.parse_args()
    (wheel,) = ROOT.glob("dist/*.whl")
    (sdist,) = ROOT.glob("dist/*.tar.gz")
    example = first_example()
    failed = []
    for python in options.pythons:
        print(f"--- {python}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            programs = make_environment(Path(folder), python, "torch")
            *versions, of_wheel = attempt(programs, wheel, example)
            *_, of_sdist = attempt(programs, sdist, example)
        write_row("installs", (*versions, of_wheel, of_sdist), key=(0,))
        failed += [f"{python}: {came}" for came in (of_wheel, of_sdist) if came != "works"]
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
