"""The kinds of random projections are measured."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("psutil")


def test_cost_and_quality_are_measured(tmp_path):
    command = [
        *(sys.executable, "-m", "bench.projections", "--models", "digits", "--rounds", "1"),
        *("--layers", "2048 x 512", "--draws", "1", "--reference", "20", "--out", str(tmp_path)),
    ]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = {}
    for name in ("projection_costs", "projection_errors"):
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            found[name] = list(csv.DictReader(file))
    kinds = {row["kind"] for row in found["projection_costs"]}
    assert kinds == {"gaussian", "sparse", "hadamard", "fourier"}
    assert kinds == {row["kind"] for row in found["projection_errors"]}
    assert all(float(row["projection_ms"]) > 0 for row in found["projection_costs"])
    # one draw of 20 against another of 20 Gaussian ones
    assert all(0 < float(row["error"]) < 3 for row in found["projection_errors"])
