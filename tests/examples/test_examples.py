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
    "overcomplete_ica": (["--steps", "3", "--patches", "300"], "features with a twin", 3),
    "sliced_wasserstein": (["--pixels", "100", "--draws", "2"], "%", 16),
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


def test_features_of_photos_have_no_twins(monkeypatch, tmp_path):
    module = load("overcomplete_ica", monkeypatch)
    patches = module.load_patches(4000)
    covariance = patches.train.T.cov()
    assert torch.allclose(covariance, torch.eye(module.DIMENSIONS), atol=1e-3)
    features = {
        method: module.train(method, patches, 600, seed=0)
        for method in ("none", "half-space energy")
    }
    found = {method: module.judge(rows, patches) for method, rows in features.items()}
    assert found["half-space energy"].twins == 0.0
    assert found["none"].twins > 0.0  # more the longer it trains
    assert found["half-space energy"].largest_cosine < 0.6
    # and ten features explain more
    assert found["half-space energy"].unexplained < 0.9 * found["none"].unexplained
    module.draw(features, patches, tmp_path / "features.png")
    assert (tmp_path / "features.png").stat().st_size > 10_000


def test_directions_of_least_energy_err_least(monkeypatch, tmp_path):
    module = load("sliced_wasserstein", monkeypatch)
    monkeypatch.setattr(module, "COUNTS", (12, 24))
    found = module.errors(pixels=500, draws=6)
    for others in ("independent", "orthogonal blocks", "Fibonacci lattice"):
        for ours, theirs in zip(found["least energy"], found[others], strict=True):
            assert ours < theirs, others
    module.draw_errors(found, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 10_000
