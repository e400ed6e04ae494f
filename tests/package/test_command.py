"""The command comhe-ext: its help, its output in both forms, its exit codes."""

import csv
import io
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import comhe_ext
from comhe_ext import bounds
from comhe_ext.__main__ import COMMANDS, run
from comhe_ext.cli import energy as energy_command
from comhe_ext.cli import screen
from comhe_ext.kernels.pair_functions import Riesz
from comhe_ext.testing import reference

COMMAND = (sys.executable, "-m", "comhe_ext")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3), nn.Linear(16, 12)
    )


def layers_of(capsys, *arguments, code=0):
    assert run(["energy", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


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
        (["energy"], "CHECKPOINT"),
        (["energy", "x.pt", "--json", "--csv"], "not allowed with"),
        (["energy", "x.pt", "--s", "-3"], "must be"),
        (["energy", "x.pt", "--s", "many"], "many"),
        (["energy", "x.pt", "--device", "abacus"], "abacus"),
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


# --- the numbers of a layer -----------------------------------------------------------------------


@pytest.mark.parametrize("s", [2.0, 0.0, 1.0])
def test_energies_are_those_of_the_definition(tmp_path, capsys, s):
    model = network()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    layers = layers_of(capsys, tmp_path / "model.pt", "--s", s)
    assert [x["name"] for x in layers] == ["0.weight", "2.weight", "3.weight"]
    for layer in layers:
        rows = model.state_dict()[layer["name"]].flatten(1)
        n, d = rows.shape
        assert (layer["rows"], layer["columns"], layer["dtype"]) == (n, d, "float32")
        for prefix, half_space in (("", False), ("half_space_", True)):
            pair = Riesz(s, half_space=half_space)
            expected = float(reference.hyperspherical_energy(rows, s, half_space=half_space))
            assert layer[f"{prefix}energy"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert layer[f"{prefix}random_energy"] == bounds.random_energy(n, d, pair)
            lowest = bounds.lowest_energy(n, d, pair, dead=0)
            assert layer[f"{prefix}lowest_energy"] == lowest
            assert lowest <= layer[f"{prefix}energy"]


def test_the_nearest_pair_is_named_by_its_rows(tmp_path, capsys):
    rows = torch.eye(6, 9)
    angle = math.radians(3.0)
    rows[4] = 5 * (math.cos(angle) * rows[1] + math.sin(angle) * torch.eye(9)[8])
    torch.save({"w": rows}, tmp_path / "model.pt")
    (layer,) = layers_of(capsys, tmp_path / "model.pt")
    assert layer["nearest"]["rows"] == [1, 4]
    assert layer["nearest"]["degrees"] == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dead_double_and_broken_rows_are_counted(tmp_path, capsys, dtype):
    rows = torch.randn(40, 7).to(dtype)
    rows[3] = 0
    rows[30] = -0.0
    rows[5] = rows[11] * 2
    rows[6] = rows[11] * 0.5
    rows[7] = rows[12]
    rows[8] = -rows[12]  # points elsewhere
    rows[20, 2] = math.nan
    rows[21, 0] = math.inf
    torch.save({"w": rows}, tmp_path / "model.pt")
    (layer,) = layers_of(capsys, tmp_path / "model.pt", code=1)
    assert layer["rows"] == 40
    assert layer["dead_rows"] == 2
    assert layer["duplicates"] == 3
    assert layer["nonfinite_rows"] == 2
    finite = rows[rows.isfinite().all(1)]
    expected = float(reference.hyperspherical_energy(finite))
    assert layer["energy"] == pytest.approx(expected, rel=1e-5)
    assert layer["nearest"]["rows"] in ([5, 6], [5, 11], [6, 11], [7, 12])
    assert layer["nearest"]["degrees"] == pytest.approx(0, abs=1e-5)


def test_multiples_are_duplicates_in_spite_of_rounding(tmp_path, capsys):
    rows = torch.randn(300, 64)
    rows[100:200] = rows[:100] * 3.3
    rows[200:250] = rows[:50] * 1e30  # whose squares overflow
    torch.save({"w": rows, "same": torch.ones(3000, 5)}, tmp_path / "model.pt")
    several, same = layers_of(capsys, tmp_path / "model.pt")
    assert several["duplicates"] == 150
    assert same["duplicates"] == 2999


def test_near_rows_are_no_duplicates(tmp_path, capsys):
    rows = torch.randn(50, 16, dtype=torch.float64)
    rows[1] = rows[0] + 1e-5 * torch.randn(16, dtype=torch.float64)
    torch.save({"w": rows}, tmp_path / "model.pt")
    (layer,) = layers_of(capsys, tmp_path / "model.pt")
    assert layer["duplicates"] == 0
    assert layer["nearest"]["rows"] == [0, 1]


def test_without_live_rows_there_is_nobody_near(tmp_path, capsys):
    broken = torch.full((4, 3), math.nan)
    torch.save({"dead": torch.zeros(4, 3), "broken": broken}, tmp_path / "model.pt")
    dead, broken = layers_of(capsys, tmp_path / "model.pt", code=1)
    # rows that are orthogonal to all others: 1 / 2
    assert (dead["energy"], dead["nearest"], dead["dead_rows"]) == (0.5, None, 4)
    assert (broken["energy"], broken["nearest"], broken["nonfinite_rows"]) == (None, None, 4)


def test_columns_are_neurons_on_request(tmp_path, capsys):
    weight = torch.randn(5, 7, 3)
    torch.save({"w": weight}, tmp_path / "model.pt")
    (layer,) = layers_of(capsys, tmp_path / "model.pt", "--transpose", "w")
    rows = weight.transpose(0, 1).flatten(1)
    assert (layer["rows"], layer["columns"]) == (7, 15)
    expected = float(reference.hyperspherical_energy(rows))
    assert layer["energy"] == pytest.approx(expected, rel=1e-5)


def test_energies_of_very_many_rows_are_estimated(tmp_path, capsys):
    pytest.importorskip("comhe_ext.sampled")
    torch.save({"w": torch.randn(5000, 8), "few": torch.randn(50, 8)}, tmp_path / "model.pt")
    exact, few = layers_of(capsys, tmp_path / "model.pt")
    assert exact["energy_error"] == exact["half_space_energy_error"] == 0
    estimated, again = layers_of(capsys, tmp_path / "model.pt", "--sampled-above", 3000)
    assert again == few
    for prefix in ("", "half_space_"):
        error = estimated[f"{prefix}energy_error"]
        assert 0 < error < 1e-2
        # the numbers are drawn from a fixed seed
        assert abs(estimated[f"{prefix}energy"] - exact[f"{prefix}energy"]) <= 5 * error
    assert estimated["nearest"] is None
    assert estimated["duplicates"] == exact["duplicates"] == 0


# --- which layers ---------------------------------------------------------------------------------


def test_layers_are_chosen_by_patterns(tmp_path, capsys):
    names = ("a.up.weight", "a.down.weight", "b.up.weight")
    torch.save({name: torch.randn(4, 5) for name in names}, tmp_path / "model.pt")
    path = tmp_path / "model.pt"
    found = layers_of(capsys, path, "--include", "a.*", "--include", "b.*", "--exclude", "*.down.*")
    assert [x["name"] for x in found] == ["a.up.weight", "b.up.weight"]
    assert run(["energy", str(path), "--include", "c.*"]) == 1
    assert "pattern 'c.*' matches no tensor" in capsys.readouterr().err


def test_what_is_no_layer_is_told_one_by_one(tmp_path, capsys):
    state = {
        "fine": torch.randn(3, 4),
        "bias": torch.randn(3),
        "norm": torch.randn(3),
        "steps": torch.tensor(3),
        "scale": torch.tensor(3.0),
        "mask": torch.ones(3, 3, dtype=torch.bool),
        "packed": torch.ones(3, 3, dtype=torch.uint8),
        "f8": torch.ones(3, 3).to(torch.float8_e4m3fn),
        "waves": torch.ones(3, 3, dtype=torch.complex64),
        "empty": torch.ones(0, 3),
        "thin": torch.randn(3, 1),
        "single": torch.randn(1, 3),
        "holes": torch.eye(3).to_sparse(),
        "q.lora_A.weight": torch.randn(2, 8),
    }
    torch.save(state, tmp_path / "model.pt")
    assert run(["energy", str(tmp_path / "model.pt")]) == 0
    told = capsys.readouterr().err
    assert "2 vectors" in told
    for name, reason in {
        "steps": "integers (int64)",
        "scale": "a single number",
        "mask": "integers (bool)",
        "packed": "integers (uint8)",
        "f8": "quantized (float8_e4m3fn)",
        "waves": "complex numbers (complex64)",
        "empty": "empty, of shape (0, 3)",
        "thin": "nowhere to turn",
        "single": "fewer than two neurons",
        "holes": "sparse (sparse float32)",
        "q.lora_A.weight": "low-rank update",
    }.items():
        (line,) = (line for line in told.splitlines() if f": {name}: " in line)
        assert "left out" in line
        assert reason in line
    (layer,) = layers_of(capsys, tmp_path / "model.pt", "--include", "*lora*")
    assert layer["name"] == "q.lora_A.weight"


# --- output ---------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """Two checkpoints: the second has its hidden layer turned as a whole, and lacks the last."""
    before = network().state_dict()
    after = {name: x for name, x in before.items() if not name.startswith("3.")}
    turn, _ = torch.linalg.qr(torch.randn(72, 72, dtype=torch.float64))
    turned = before["2.weight"].flatten(1).double() @ turn
    after["2.weight"] = turned.float().view_as(before["2.weight"])
    after["0.weight"] = torch.randn(8, 3, 3, 3)
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    torch.save(before, tmp_path / "before/model.pt")
    torch.save(after, tmp_path / "after/model.pt")
    return tmp_path / "before/model.pt", tmp_path / "after/model.pt"


def test_checkpoints_are_set_side_by_side(two, capsys):
    assert run(["energy", *map(str, two)]) == 0
    text = capsys.readouterr().out
    head, *tables = text[text.index("side by side") :].split("\n\n")
    assert head.splitlines()[1:] == ["  1: before/model.pt", "  2: after/model.pt"]
    assert [table.split("  ")[0] for table in tables] == ["energy", "half-space energy"]
    for table in tables:
        cells = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
        # an orthogonal map keeps the energy
        assert abs(float(cells["2.weight"][2].rstrip("%"))) <= 1e-4
        assert abs(float(cells["0.weight"][2].rstrip("%"))) > 1e-2
        assert cells["3.weight"][1:3] == ["-", "-"]


def test_csv_holds_the_fields_of_json(two, capsys):
    layers = layers_of(capsys, *two)
    assert run(["energy", *map(str, two), "--csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(lines) == len(layers) == 5
    for line, layer in zip(lines, layers, strict=True):
        near = layer.pop("nearest")
        layer["nearest_row"], layer["nearest_other"] = near["rows"]
        layer["nearest_degrees"] = near["degrees"]
        assert line == {key: str(value) for key, value in layer.items()}


def test_json_has_no_infinity(tmp_path, capsys):
    torch.save({"w": torch.zeros(3, 2) + 1e-3}, tmp_path / "model.pt")
    (layer,) = layers_of(capsys, tmp_path / "model.pt", "--s", "200")
    assert layer["duplicates"] == 2
    assert layer["energy"] is None  # beyond float32


def test_a_picture_is_saved(two, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "energies.png"
    assert run(["energy", *map(str, two), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run(["energy", *map(str, two), "--plot", str(tmp_path / "no" / "where.png")]) == 1
    assert run(["energy", *map(str, two), "--plot", str(tmp_path / "a.doc")]) == 1


def test_a_missing_package_is_named_before_any_work(two, monkeypatch, capsys):
    # as where matplotlib is missing, whether or not a test has imported it
    monkeypatch.setitem(sys.modules, "comhe_ext.cli.plot", None)
    monkeypatch.delattr(comhe_ext.cli, "plot", raising=False)
    assert run(["energy", str(two[0]), "--plot", "x.png"]) == 2
    output = capsys.readouterr()
    assert "pip install 'comhe-ext[cli]'" in output.err
    assert not output.out
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert run(["energy", str(two[0])]) == 0


def test_piped_output_is_plain(two):
    result = subprocess.run([*COMMAND, "energy", *map(str, two)], capture_output=True, text=True)
    assert result.returncode == 0
    assert "\x1b" not in result.stdout + result.stderr
    assert "\r" not in result.stdout + result.stderr
    assert result.stdout.startswith("before/model.pt: 3 layers\nlayer")


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_a_terminal_gets_a_bar_and_a_table_that_fits(tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    torch.save({"x" * 150: torch.randn(4, 5)}, tmp_path / "model.pt")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    for variable in ("NO_COLOR", "COLUMNS", "LINES"):
        environment.pop(variable, None)
    with subprocess.Popen(
        [*COMMAND, "energy", str(tmp_path / "model.pt")],
        stdout=slave, stderr=slave, env=environment,
    ) as process:  # fmt: skip
        os.close(slave)
        text = b""
        # Linux answers the end of the other side with an error
        try:
            while part := os.read(master, 4096):
                text += part
        except OSError:
            pass
    os.close(master)
    assert process.returncode == 0
    shown = text.decode()
    assert "\x1b[1m" in shown
    pytest.importorskip("tqdm")
    assert "%|" in shown
    (line,) = (x for x in shown.splitlines() if x.startswith("xxx") and "…" in x)
    assert len(line) <= 120


def test_who_reads_one_line_gets_no_complaint(tmp_path):
    state = {f"layer{i}": torch.randn(3, 4) for i in range(3000)}
    torch.save(state, tmp_path / "model.pt")
    command = f"{sys.executable} -m comhe_ext energy {tmp_path / 'model.pt'} --include 'layer1*'"
    result = subprocess.run(["sh", "-c", f"{command} | head -1"], capture_output=True, text=True)
    assert result.stdout == "model.pt: 1111 layers\n"
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


def test_names_cannot_move_the_cursor():
    assert screen.printable("a\x1b[31m\nb\u202e…é") == "a\\x1b[31m\\nb\\u202e…é"
    assert screen.shorten("abcdefgh", 5) == "ab…gh"


def test_labels_are_as_short_as_they_can_be(tmp_path):
    from pathlib import Path

    paths = [Path("/a/run1/x.pt"), Path("/a/run2/x.pt")]
    assert energy_command._labels(paths) == ["run1/x.pt", "run2/x.pt"]
    assert energy_command._labels([Path("x.pt"), Path("y.pt")]) == ["x.pt", "y.pt"]
    assert energy_command._labels([Path("x.pt"), Path("x.pt")]) == ["x.pt", "x.pt"]
