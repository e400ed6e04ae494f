"""The Triton kernels without a GPU: `triton_interpreter_checks.py` in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_in_the_interpreter():
    checks = Path(__file__).with_name("triton_interpreter_checks.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(checks), "-q", "-x", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=checks.parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
