"""The command comhe-ext: its help, its output in both forms, its exit codes."""

import pytest
import torch

import comhe_ext
from comhe_ext.__main__ import COMMANDS, run
from comhe_ext.cli import screen
from comhe_ext.testing import reference

# --- the parser -----------------------------------------------------------------------------------


def test_without_arguments_it_helps(capsys):
    assert run([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        run([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        run(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{comhe_ext.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["enrgy"], "invalid choice: 'enrgy'"),
        (["bench", "--device", "abacus"], "abacus"),
        (["bench", "--threads", "0"], "at least 1"),
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_info_names_all_backends(capsys):
    assert run(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"comhe_ext:        {comhe_ext.__version__}" in lines
    assert sum(line.startswith("backend ") for line in lines) == 3


def test_check_without_a_gpu_ends_with_1(monkeypatch, capsys):
    from comhe_ext import backends

    monkeypatch.setattr(backends, "unavailable", lambda backend: "there is no GPU")
    assert run(["check"]) == 1
    assert capsys.readouterr().out == "nothing to check: there is no GPU\n"


def test_bench_compares_equal_energies(monkeypatch, capsys):
    from comhe_ext.cli import bench

    rows = torch.randn(30, 8)
    expected = reference.hyperspherical_energy(rows)
    for method in bench.METHODS.values():
        torch.testing.assert_close(method(rows).double(), expected, rtol=1e-5, atol=0)
    monkeypatch.setattr(bench, "SHAPES", ((20, 4), (30, 5)))
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    assert run(["bench"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("30 x 5")


def test_demo_tells_the_truth(monkeypatch, capsys):
    from comhe_ext.cli import demo

    monkeypatch.setattr(demo, "STEPS", 2)
    before = torch.get_rng_state()
    assert run(["demo"]) == 0
    assert torch.equal(torch.get_rng_state(), before)
    # nine unit vectors in eight dimensions: 1 / (2 + 2/8)
    assert capsys.readouterr().out.count(f"{1 / 2.25:.5f}") == 2


def test_names_cannot_move_the_cursor():
    assert screen.printable("a\x1b[31m\nb\u202e…é") == "a\\x1b[31m\\nb\\u202e…é"
    assert screen.shorten("abcdefgh", 5) == "ab…gh"
