"""The benchmark measures what it says it measures, survives what fails, and draws what it wrote."""

import functools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import comhe_ext
from comhe_ext import testing

ROOT = Path(__file__).resolve().parents[2]
# it belongs to the checkout and is not installed; last, so that the checkout hides no package
sys.path.append(str(ROOT))

from bench import accuracy, compare, machine, model, plots, readme, roofline, shapes, sweep, truth
from bench.__main__ import main
from bench.contest import Entry, Rules, hold
from bench.methods import METHODS, run
from bench.naive import naive_energy
from bench.options import Options
from bench.screen import make_console
from bench.shapes import Case, Shape
from bench.store import RESULTS, Table
from bench.worker import Job, Worker

SHAPE = Shape(2, 70, 9)
HERE = [
    name
    for name, method in METHODS.items()
    if method.unavailable("cpu") is None and not method.compiles
]


# --- the methods ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name in HERE for mode in METHODS[name].modes]
)
def test_every_method_computes_what_it_claims(name, mode):
    right = truth.truth(SHAPE, mode, "cpu")
    energies, derivatives = run(METHODS[name].load(), truth.points(SHAPE, "cpu"), mode)
    assert energies.shape == (2,)
    found = truth.errors(right, energies, derivatives)
    if METHODS[name].same_energy:
        assert found.energy < 1e-6
        assert found.derivative is None or found.derivative < 2e-5
        assert (found.derivative is None) == (mode == "energy")
    else:
        assert found.verdict() is not None


@pytest.mark.parametrize("s", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("half_space", [False, True])
def test_the_naive_formula_is_the_definition(s, half_space):
    rows = testing.random_rows(40, 7, dtype=torch.float64)
    energy, gradient = testing.exact_energy_and_gradient(
        rows, s, half_space=half_space, min_distance=0.0
    )
    leaf = rows.requires_grad_()
    naive = naive_energy(leaf, s, half_space=half_space)
    assert testing.relative_error(naive, energy) < 1e-12
    (naive_gradient,) = torch.autograd.grad(naive, leaf)
    assert testing.relative_error(naive_gradient, gradient) < 1e-12


def test_the_truth_of_many_rows_is_that_of_few(monkeypatch):
    shape = Shape(2, 700, 5)
    whole = truth.truth(shape, "gradient", "cpu")
    monkeypatch.setattr(truth, "MOST_ROWS", 600)
    sampled = truth.truth(shape, "gradient", "cpu")
    assert sampled.derivatives.shape == (2, truth.SAMPLE, 5)
    found = truth.errors(sampled, whole.energies, whole.derivatives)
    assert found.energy < 1e-12
    assert found.derivative < 1e-10


@pytest.mark.parametrize("wrong", ["factor", "scaled gradient", "one row", "nan"])
def test_the_gate_catches_a_wrong_result(wrong):
    right = truth.truth(SHAPE, "gradient", "cpu")
    energies, gradients = run(METHODS["naive"].load(), truth.points(SHAPE, "cpu"), "gradient")
    assert gradients is not None
    assert truth.errors(right, energies, gradients).verdict() is None
    if wrong == "factor":
        energies = energies * 1.001
    elif wrong == "scaled gradient":
        gradients = gradients * 1.01
    elif wrong == "one row":
        gradients[0, 3] = 0
    else:
        gradients[1, 5, 2] = math.nan
    assert truth.errors(right, energies, gradients).verdict() is not None


def test_useful_work_is_counted_once_a_pair():
    assert Shape(3, 5, 7).pairs == 30
    assert Shape(3, 5, 7).flop == 30 * 6 * 7
    assert Shape(3, 5, 7).bytes == 2 * 4 * 3 * 5 * 7


# --- the contest ----------------------------------------------------------------------------------


def call_of(kind):
    """In a process of its own."""

    def good():
        return (torch.ones(3),)

    def slow():
        signal.pause()

    def greedy():
        return (torch.empty(2**50),)

    def killed():
        os.kill(os.getpid(), signal.SIGKILL)

    def broken():
        raise KeyError("nothing here")

    return locals()[kind]


# this must hold however busy the machine is
ENDLESS = 1e7


def contest(*kinds, rules, check=lambda result: None):
    jobs = {kind: Job(functools.partial(call_of, kind), "cpu", 1) for kind in kinds}
    # the second call is timed, because the first one imports this module
    entries = {kind: Entry(job, check, compiles=True) for kind, job in jobs.items()}
    return hold(entries, rules, lambda words: None)


def test_what_fails_is_an_outcome_and_the_others_go_on(monkeypatch):
    class Patient(Worker):
        """Waits for all but the one that never answers."""

        def __init__(self, job):
            super().__init__(job)
            self.patient = job.make.args != ("slow",)

        def ask(self, turn, limit):
            return super().ask(turn, ENDLESS if self.patient else limit)

    monkeypatch.setattr("bench.contest.Worker", Patient)
    rules = Rules(limit=0.5, start=0.25, compilation=0.25, rounds=3, budget=1.0)
    found = contest("slow", "greedy", "killed", "broken", "good", rules=rules)
    assert {name: outcome.status for name, outcome in found.items()} == {
        "slow": "timeout",
        "greedy": "out of memory",
        "killed": "out of memory",
        "broken": "failed",
        "good": "ok",
    }
    assert found["slow"].note == "more than 1 s"
    assert "allocate" in found["greedy"].note
    assert found["broken"].note == "KeyError: 'nothing here'"
    assert len(found["good"].wall) == len(found["good"].cpu) == 3
    assert found["good"].first > 0
    assert found["good"].peak > 0
    for name in ("slow", "greedy", "killed", "broken"):
        assert found[name].figures()["wall_ms"] is None


def test_what_is_wrong_is_not_timed():
    rules = Rules(limit=ENDLESS, rounds=2)
    found = contest("good", rules=rules, check=lambda result: "off by 0.1")
    assert found["good"].status == "wrong"
    assert found["good"].note == "off by 0.1"
    assert found["good"].figures()["wall_ms"] is None


def test_slow_calls_have_fewer_rounds():
    rules = Rules(budget=20.0)
    rounds = {0.02: 9, 2.0: 9, 3.0: 6, 9.9: 5, 15.0: 5, 45.0: 1}
    assert {seconds: rules.number_of_rounds(seconds) for seconds in rounds} == rounds


# --- the sweep ------------------------------------------------------------------------------------


def test_a_sweep_from_end_to_end(tmp_path, capsys):
    names = ["comhe-torch", "naive", "naive-by-set", "pdist", "comhe-triton"]
    command = ["sweep", "--quick", "--shapes", "1x64x8", "3x50x8", "--out", str(tmp_path)]
    command += ["--limit", str(ENDLESS)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *command, "--methods", *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = sweep.TABLE.read(tmp_path)
    cases = compare.by_case(rows)
    assert [str(case.shape) for case in cases] == ["1x64x8", "3x50x8"]
    status = {row["method"]: row["status"] for row in cases[Case(Shape(3, 50, 8), "gradient")]}
    assert len(rows) == 9  # with several sets, one at a time is another method
    assert status.pop("comhe-triton") == "unavailable"
    assert set(status.values()) == {"ok"}
    for row in rows:
        if row["status"] == "ok":
            assert float(row["wall_min_ms"]) <= float(row["wall_ms"]) <= float(row["wall_max_ms"])
            assert float(row["derivative_error"]) < 1e-5
            assert 1 <= int(row["rounds"]) <= 3
            assert float(row["peak_mib"]) > 0
    assert roofline.TABLE.read(tmp_path)[0]["bytes_per_second"]

    assert main([*command, "--methods", *names, "--resume"]) == 0
    assert capsys.readouterr().out.startswith("0 cases")
    assert sweep.TABLE.read(tmp_path) == rows
    assert main([*command, "--methods", "naive"]) == 0
    refreshed = sweep.TABLE.read(tmp_path)
    assert len(refreshed) == len(rows)
    changed = {b["method"] for a, b in zip(rows, refreshed, strict=True) if a != b}
    assert changed == {"naive"}
    assert main([*command, "--budget-minutes", "0"]) == 3
    assert "2 left over" in capsys.readouterr().out


def test_what_cannot_fit_or_end_is_not_tried(tmp_path):
    options = Options("cpu", 1, tmp_path, make_console(), ("naive",), Rules(limit=10.0))
    runner = sweep._Runner(options, tmp_path, None)
    huge = Case(Shape(1, 1_000_000, 8), "gradient")
    status, note = runner._refusal("naive", huge)
    assert status == "out of memory"
    assert "needs about 2.24e+04 GiB" in note
    runner.seconds["row-blocks", "gradient", 8] = {Shape(1, 1000, 8).pairs: 1.0}
    status, note = runner._refusal("row-blocks", Case(Shape(1, 10_000, 8), "gradient"))
    assert (status, note) == ("timeout", "about 100 s expected, the limit is 10 s")
    assert runner._refusal("row-blocks", Case(Shape(1, 2000, 8), "gradient")) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep", "--shapes", "4096x30"], "a shape must be written SETSxROWSxDIM"),
        (["sweep", "--methods", "magic"], "invalid choice: 'magic'"),
        (["sweep", "--threads", "0"], "must be a number from 1 on, got '0'"),
        (["model", "--models", "gpt-9"], "invalid choice: 'gpt-9'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_errors_of_the_command_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


# --- files ----------------------------------------------------------------------------------------


def test_the_newest_of_several_commits_counts(tmp_path):
    stamp = {"torch": "2", "comhe_ext": "0"}
    table = Table("t", key=("torch", "comhe_ext", "commit", "a"), values=("date", "x"))
    for commit, a, date, x in (("c", 1, "3", 5), ("d", 1, "2", 6), ("d", 2, "2", 7)):
        row = stamp | {"commit": commit, "a": a, "date": date, "x": x}
        table.upsert(tmp_path, [row])
    assert len(table.read(tmp_path)) == 3
    assert {(row["a"], row["x"]) for row in table.newest(tmp_path)} == {("1", "5"), ("2", "7")}


def test_upsert_replaces_by_key_and_leaves_no_half_file(tmp_path):
    table = Table("t", key=("a", "b"), values=("date", "x"))
    table.upsert(tmp_path, [{"a": 1, "b": "u", "date": "1", "x": 0.123456789}])
    table.upsert(tmp_path, [{"a": 2, "b": "u", "date": "1"}, {"a": 1, "b": "v", "date": "1"}])
    table.upsert(tmp_path, [{"a": "1", "b": "u", "date": "2", "x": None}])
    rows = [tuple(row.values()) for row in table.read(tmp_path)]
    assert rows == [("1", "u", "2", ""), ("2", "u", "1", ""), ("1", "v", "1", "")]

    before = table.path(tmp_path).read_bytes()
    with pytest.raises(ValueError, match="t has no column y"):
        table.upsert(tmp_path, [{"a": 3, "b": "w"}, {"a": 4, "b": "w", "y": 1}])
    assert table.path(tmp_path).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
    with pytest.raises(ValueError, match="must have the columns a, date"):
        Table("t", key=("a",), values=("date",)).read(tmp_path)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Made-up results of a few methods: at 4 ns a pair we are 3 times slower than row blocks."""
    folder = tmp_path_factory.mktemp("results")
    stamp = machine.stamp("cpu", 1)
    rows = []
    for case in shapes.cases(["goals", "scaling", "modes"], "cpu"):
        for name, nanoseconds in (("comhe-cpu", 4.0), ("row-blocks", 1.25), ("naive", 100.0)):
            time = case.shape.pairs * nanoseconds * 1e-6
            row = {**case.shape._asdict(), "mode": case.mode, "method": name, "compiled": False}
            if name == "naive" and case.shape.rows > 20_000:
                row |= {"status": "out of memory", "note": "needs about 99 GiB"}
            else:
                row |= {"status": "ok", "wall_ms": time, "cpu_ms": time, "peak_mib": 1.0}
                row |= {"wall_min_ms": time, "wall_max_ms": time, "first_s": time}
                row |= {"energy_error": 1e-8, "derivative_error": 3e-7}
            rows.append(stamp | row)
    sweep.TABLE.upsert(folder, rows)
    roofline.TABLE.upsert(folder, [stamp | {"flops": 1e11, "bytes_per_second": 2e10}])
    errors = [
        stamp
        | {"case": case, "method": name, "energy": 0.5, "energy_error": 1e-8}
        | {"gradient_error": math.nan if case == "1e-4 rad" and name == "naive" else 1e-6}
        for case in accuracy.CASES
        for name in ("comhe-cpu", "naive")
    ]
    accuracy.TABLE.upsert(folder, errors)
    return folder


def test_plots_need_nothing_but_the_results(results):
    written = plots.draw(results)
    names = {path.name for path in written}
    assert names == {
        f"{name}-cpu-{theme}.png"
        for name in ("time", "memory", "speed", "roofline", "accuracy")
        for theme in ("light", "dark")
    }
    first = {path: path.read_bytes() for path in written}
    for path, picture in first.items():
        assert len(picture) < 120_000, path
        with Image.open(path) as image:
            assert image.width > 1200
            assert len(image.convert("L").getcolors()) > 8
    plots.draw(results)
    assert {path: path.read_bytes() for path in written} == first


def test_readme_shows_where_others_are_faster(results):
    parts = readme.parts(results)
    slower = parts["slower cpu"]
    assert "- 4,096 × 30, energy + gradient: row blocks, own gradient takes 0.31 times" in slower
    assert slower.startswith("Of 15 cases, a peer was faster in 15:")
    lost, closest = slower.split("The next closest:")
    assert "naive" not in lost
    assert closest.count("naive PyTorch takes 25.00 times") == 5
    goals = {line.split(" | ")[0]: line for line in parts["goals cpu"].splitlines()}
    assert goals["| 4,096 × 30, over naive"].endswith("| at least 25 times | 25 times | yes |")
    assert goals["| 16,384 × 30, over naive"].endswith("| at least 60 times | 25 times | **no** |")
    # 6 k flop a pair in 4 ns, of 100 Gflop/s
    assert goals["| 4,096 × 30, of the peak"].endswith("| at least 65 % | 45 % | **no** |")
    assert "| 0.312× |" in parts["speed cpu"]
    assert parts["slower cuda"] == readme.NOTHING


def test_readme_is_rewritten_between_its_markers_only(results):
    text = "a\n<!-- goals cpu -->\nold\n<!-- end goals cpu -->\nb\n"
    text += "<!-- slower cpu -->\n<!-- end slower cpu -->\n"
    once = readme.with_parts(text, results)
    assert once.startswith("a\n<!-- goals cpu -->\n\n| goal |")
    assert "old" not in once
    assert "\nb\n" in once
    assert readme.with_parts(once, results) == once
    with pytest.raises(ValueError, match="'magic'"):
        readme.with_parts("<!-- magic -->\n<!-- end magic -->\n", results)
    with pytest.raises(ValueError, match="must have one part 'goals cpu'"):
        readme.with_parts("<!-- goals cpu -->\n", results)


def test_readme_holds_the_committed_results():
    assert readme.up_to_date(RESULTS), "run python -m bench readme"
    text = readme.README.read_text()
    for picture in [part for part in text.split('"') if part.endswith(".png")]:
        assert (ROOT / picture).exists(), "run python -m bench plot"


# --- whole models ---------------------------------------------------------------------------------


def test_the_naive_regularizer_is_the_same():
    torch.manual_seed(0)
    net = model.MODELS["cpu"]["digits"].make()
    weights = [p for p in net.parameters() if p.dim() > 1]
    found = []
    for regularizer in (
        comhe_ext.CoMHE(net, projection=None, min_distance=0.0),
        model.NaiveCoMHE(net, None, "auto"),
    ):
        value = regularizer()
        found.append([value, *torch.autograd.grad(value, weights)])
    for ours, naive in zip(*found, strict=True):
        assert testing.relative_error(ours, naive) < 1e-5


def test_a_step_of_a_model_with_and_without(tmp_path):
    command = ["model", "--quick", "--threads", "1", "--limit", str(ENDLESS)]
    assert main([*command, "--out", str(tmp_path)]) == 0
    rows = {(row["variant"], row["written"]): row for row in model.TABLE.read(tmp_path)}
    assert set(rows) == set(model.ENTRANTS)
    ours = [("MHE", "comhe_ext"), ("RP-CoMHE", "comhe_ext")]
    for entrant in (("none", "none"), *ours, ("MHE", "naive"), ("RP-CoMHE", "naive")):
        assert rows[entrant]["status"] == "ok"
        assert float(rows[entrant]["wall_ms"]) > 0
    for row in rows.values():  # a variant that does not exist is refused
        assert row["status"] == "ok" or row["note"]
