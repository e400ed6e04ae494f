"""The Triton kernels compile for real GPUs, none of which is needed: a small part of the matrix.

The whole of it is `make compile-gpu`. In a process of its own, because TRITON_INTERPRET=1 would
replace the compiler.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_compile_without_spills_and_with_tensor_cores():
    command = Path(__file__).parents[1] / "bench" / "compile_gpu.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(command), "--small", "--jobs", "2"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert target in result.stdout
