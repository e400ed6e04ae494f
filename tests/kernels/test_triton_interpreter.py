"""The Triton kernels without a GPU: `triton_interpreter_checks.py` in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("which", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_kernels_in_the_interpreter(which):
    checks = Path(__file__).with_name("triton_interpreter_checks.py")
    command = [sys.executable, "-m", "pytest", str(checks), "-q", "-x", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "-m", which],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=checks.parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_the_gpu_suite_runs_dry_and_goes_on_where_it_stopped(tmp_path):
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-m", "bench.gpu.suite", "--results", str(tmp_path)]
            + ["--minutes", "1e6"],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
        assert "0 failed, 0 left" in result.stdout
    # the second run finds every result
    assert result.stdout.count("\n") == 1
    stages = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert all(stage["ok"] for stage in stages.values())
