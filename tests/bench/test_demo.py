"""The demo prints what its files hold, and its verdict is that of the interval."""

import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from pandas import DataFrame
from torch.nn.functional import normalize, pdist

# it belongs to the checkout and is not installed; last, so that the checkout hides no package
sys.path.append(str(Path(__file__).resolve().parents[2]))

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from bench import demo
from bench.cases.models import digits_network


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_checkpoint_is_read_back(suffix, tmp_path, monkeypatch):
    if suffix == "safetensors":
        read = pytest.importorskip("safetensors.torch").load_file
    else:
        read = torch.load
        monkeypatch.setattr(demo, "find_spec", lambda name: None)
    model = digits_network()
    path = Path(demo.save_checkpoint(model, tmp_path, "model")).resolve()
    assert path == tmp_path.resolve() / f"model.{suffix}"
    torch.testing.assert_close(read(path), dict(model.state_dict()), rtol=0, atol=0)


def test_widening_keeps_the_outputs(monkeypatch):
    monkeypatch.setattr(demo, "NOISE", 0.0)
    torch.manual_seed(0)
    model, images = digits_network().eval(), torch.rand(5, 1, 8, 8)
    wide = demo.widen(model).eval()
    assert len(wide.hidden.weight) == 2 * len(model.hidden.weight)
    torch.testing.assert_close(wide(images), model(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        # t of three degrees of freedom at 97.5 % is 3.18245, the standard errors are 0.5 and 0.1
        ([-1.5, 0.5, 0.5, 0.5], "no difference: RP-CoMHE gains -1.59 to +1.59 points"),
        ([0.7, 1.1, 1.1, 1.1], "a difference: RP-CoMHE gains +0.68 to +1.32 points"),
        ([-0.7, -1.1, -1.1, -1.1], "a difference: RP-CoMHE gains -1.32 to -0.68 points"),
    ],
)
def test_the_verdict_is_that_of_the_interval(gains, words):
    plain = torch.tensor([90.0, 91.0, 92.0, 93.0], dtype=torch.float64)
    comhe = plain + torch.tensor(gains, dtype=torch.float64)
    accuracies = DataFrame({demo.PLAIN: plain.numpy(), demo.COMHE: comhe.numpy()})
    assert f"4 seeds show {words}" in demo.verdict(accuracies)


def test_a_short_demo_prints_the_energies_of_its_checkpoints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    threads = torch.get_num_threads()
    demo.run(Namespace(quick=True, out=tmp_path))
    torch.set_num_threads(threads)
    text = capsys.readouterr().out
    names = ("before.pt", "plain.pt", "comhe.pt")
    pictures = {"features.png", "energy.png"}
    assert {file.name for file in tmp_path.iterdir()} == {*names, *pictures}
    for name in names:
        weight = torch.load(tmp_path / name)["hidden.weight"]
        (numbers,) = re.findall(rf"{name}: 4 layers(?:\n.+)+?\nhidden.weight +(.+)", text)
        v = normalize(weight.double())
        expected = [float(pdist(x).pow(-2).mean()) for x in (v, torch.cat([v, -v]))]
        found = [float(x) for x in numbers.split()[2:6:3]]
        assert found == pytest.approx(expected, abs=1e-5)
    # the noise turns a copy by less than 10 degrees
    assert "of another or its opposite: 256 before," in text
