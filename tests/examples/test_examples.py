"""The examples run, with few steps, and print what they promise."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"
# few steps, and what is printed of each variant
EXAMPLES = {
    "codebook": (["--steps", "3"], "perplexity", 3),
    "dino_features": (["--steps", "4"], "find their other view", 3),
    "face_head": (["--steps", "3"], "verification", 2),
    "sparse_autoencoder": (["--steps", "3"], "largest cosine", 2),
    "thomson": (["--starts", "2"], "a random start ends at", 2),
}


def load(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_each_is_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs(name, monkeypatch, capsys):
    arguments, text, times = EXAMPLES[name]
    load(name, monkeypatch).main(arguments)
    printed = capsys.readouterr().out
    assert printed.count(text) == times
    assert re.search(r"\d", printed)
    assert "nan" not in printed


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_text_names_its_command(name, monkeypatch):
    text = load(name, monkeypatch).__doc__
    assert f"python examples/{name}.py" in text


def test_the_same_seed_gives_the_same_numbers(monkeypatch):
    module = load("codebook", monkeypatch)
    assert module.train(None, 3, seed=1) == module.train(None, 3, seed=1)


@pytest.mark.parametrize("points", [2, 4, 6, 12])
def test_thomson_finds_the_optimum(points, monkeypatch):
    module = load("thomson", monkeypatch)
    found, rows = module.solve(points, 500, torch.Generator().manual_seed(0))
    assert found == pytest.approx(module.BEST_KNOWN[points], abs=1e-8)
    assert rows.norm(dim=1).tolist() == pytest.approx([1.0] * points)


def test_thomson_draws(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    load("thomson", monkeypatch).main(["--starts", "1", "--picture", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_area_under_the_curve(monkeypatch):
    area = load("face_head", monkeypatch).area_under_curve
    labels = torch.tensor([0, 0, 1, 1])
    # pairs 01 and 23 are of one identity
    scores = torch.zeros(4, 4)
    scores[0, 1], scores[2, 3] = 0.9, 0.8
    scores[0, 2], scores[0, 3], scores[1, 2], scores[1, 3] = 0.1, 0.2, 0.85, 0.3
    assert area(scores, labels) == pytest.approx(7 / 8)  # only 0.85 over 0.8 is wrong
