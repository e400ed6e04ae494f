"""The benchmark of the losses compares methods of the same loss, and shows who is faster."""

import sys
from pathlib import Path

import pytest
import torch

from comhe_ext import testing

# it belongs to the checkout and is not installed; last, so that the checkout hides no package
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench import losses, machine, readme
from bench.__main__ import main

METHODS = [(name, method) for name, loss in losses.LOSSES.items() for method in loss.methods]


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_every_method_computes_the_loss(name, method):
    if method == "keops":
        pytest.skip("compiles for a minute")
    if (name, method) == ("regular_face", "published"):
        pytest.importorskip("pytorch_metric_learning")
    loss = losses.LOSSES[name]
    shape = tuple(min(n, 70) for n in loss.shapes[0])
    right = losses.truth(name, shape, "cpu")
    found = losses.run(loss.methods[method], loss.inputs(*shape, "cpu"))
    errors = losses.errors(right, found)
    assert errors.energy < 1e-6
    assert errors.derivative < 2e-5


@pytest.mark.parametrize("rows", [5, 64, 200])
def test_row_blocks_are_the_whole(rows, monkeypatch):
    monkeypatch.setattr(losses, "block_rows", lambda columns: 64)
    formula = losses.Formula(losses.mean_of_others(torch.exp))
    x = testing.random_rows(rows, 6, dtype=torch.float64)
    whole = losses.run(lambda x: losses.dense(formula, x), [x])
    blocks = losses.run(lambda x: losses.in_row_blocks(formula, x), [x])
    for a, b in zip(blocks, whole, strict=True):
        assert testing.relative_error(a, b) < 1e-12


def test_losses_from_end_to_end(tmp_path, capsys):
    command = ["losses", "--quick", "--losses", "gram", "--limit", "1e7", "--out", str(tmp_path)]
    assert main(command) == 0
    rows = losses.TABLE.read(tmp_path)
    assert [row["method"] for row in rows] == ["comhe_ext", "dense"]
    for row in rows:
        assert (row["shape"], row["status"], row["threads"]) == ("4x64x64", "ok", "1")
        assert float(row["gradient_error"]) < 1e-5
    capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    assert capsys.readouterr().out == ""


def test_readme_shows_which_method_is_faster(tmp_path):
    stamp = machine.stamp("cpu", 1) | {"loss": "koleo", "shape": "256x128"}
    rows = [
        stamp | {"method": method, "status": "ok", "cpu_ms": time, "peak_mib": 2.0}
        for method, time in (("comhe_ext", 4.0), ("dense", 12.0), ("published", 2.0))
    ]
    rows.append(stamp | {"method": "row-blocks", "status": "out of memory"})
    losses.TABLE.upsert(tmp_path, rows)
    text = readme.parts(tmp_path)["losses cpu"]
    line = next(line for line in text.splitlines() if "koleo" in line)
    assert line.startswith("| `koleo` | 256 × 128 | 4 | 2 | 3×, 2 MiB | memory |")
    assert "| **0.5×**, 2 MiB |" in line
