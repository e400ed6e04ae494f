"""The host time of a call is measured without a GPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("psutil")


def test_every_layer_of_a_call_is_measured(tmp_path):
    command = [sys.executable, "-m", "bench.host_time", "--rounds", "2", "--out", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    with (tmp_path / "host_time.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    launches = {(row["case"], row["what"]): row["launches"] for row in rows}
    for case in ("128 x 40", "1,000 sets of 4 x 40"):
        for layer in ("sweep", "operator", "public with backward"):
            # normalize, pairwise, near_pairs, finish, total
            assert launches[case, f"triton, {layer}"] == "5"
    assert all(float(row["median_us"]) > 0 for row in rows)
