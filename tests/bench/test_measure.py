"""The benchmark measures what it says it measures, survives what fails, and keeps what it wrote."""

import contextlib
import operator
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

# it belongs to the checkout and is not installed; last, so that the checkout hides no package
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.__main__ import STUDIES, main
from bench.cases import losses, sweep
from bench.measure import contest
from bench.measure.contest import Entry, Rules
from bench.measure.machine import PEAKS
from bench.measure.store import STAMP, Table
from bench.measure.study import Options
from bench.measure.worker import Worker

# this must hold however busy the machine is
ENDLESS = 1e7


# --- the contest ----------------------------------------------------------------------------------


# what a process makes of these is a call; they import nothing
MAKE = {
    "good": partial(partial, torch.ones, 3, 2),
    "slow": partial(partial, signal.pause),
    "greedy": partial(partial, torch.empty, 2**50),
    "killed": partial(partial, signal.raise_signal, signal.SIGKILL),
    "broken": partial(partial, operator.getitem, {}, "nothing here"),
}


def hold(*kinds, folder, rules, check=lambda result: {}):
    entries = {kind: Entry(MAKE[kind], check) for kind in kinds}
    return contest.hold(entries, "cpu", 1, rules, folder)


def test_what_fails_is_an_outcome_and_the_others_go_on(monkeypatch, tmp_path):
    class Patient(Worker):
        """Waits for all but the one that never answers."""

        def __init__(self, make, *options):
            super().__init__(make, *options)
            self.patient = make is not MAKE["slow"]

        def ask(self, turn, limit):
            return super().ask(turn, ENDLESS if self.patient else limit)

    monkeypatch.setattr(contest, "Worker", Patient)
    rules = Rules(limit=0.5, first=0.5, rounds=3, budget=1.0)
    kinds = ("slow", "greedy", "killed", "broken", "good")
    found = hold(*kinds, folder=tmp_path, rules=rules)
    assert {name: row["status"] for name, row in found.items()} == {
        "slow": "timeout",
        "greedy": "out of memory",
        "killed": "out of memory",
        "broken": "failed",
        "good": "ok",
    }
    assert found["slow"]["note"] == "more than 1 s"
    assert "allocate" in found["greedy"]["note"]
    assert found["broken"]["note"] == "KeyError: 'nothing here'"
    good = found["good"]
    assert good["rounds"] == 3
    assert 0 < good["wall_min_ms"] <= good["wall_ms"] <= good["wall_max_ms"]
    assert good["first_s"] > 0
    assert good["peak_mib"] > 0
    for name in kinds[:-1]:
        assert "wall_ms" not in found[name]


def test_what_is_wrong_is_not_timed(tmp_path):
    wrong = {"status": "wrong", "note": "off by 0.1"}
    rules = Rules(limit=ENDLESS, rounds=2)
    found = hold("good", folder=tmp_path, rules=rules, check=lambda result: wrong)["good"]
    assert (found["status"], found["note"]) == ("wrong", "off by 0.1")
    assert "wall_ms" not in found


def test_slow_calls_have_fewer_rounds():
    rules = Rules(budget=20.0)
    rounds = {0.02: 9, 0.9: 9, 2.0: 9, 3.0: 6, 5.1: 3, 45.0: 3}
    assert Rules(budget=1.0).number_of_rounds(0.9) == 5
    assert {seconds: rules.number_of_rounds(seconds) for seconds in rounds} == rounds


ALONE = """
import signal
from functools import partial
from bench.measure.worker import Turn, Worker

if __name__ == "__main__":
    worker = Worker(partial(partial, signal.pause), "cpu", 1, {})
    print(worker.process.pid, flush=True)
    worker.ask(Turn(), 1e6)
"""


def test_a_worker_ends_with_the_process_that_began_it(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(f"import sys\nsys.path.append({sys.path[-1]!r})\n{ALONE}")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as process:
        worker = psutil.Process(int(process.stdout.readline()))
        process.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        while worker.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)


# --- studies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
@pytest.mark.parametrize("quick", [False, True])
def test_every_study_has_cases_and_someone_takes_part(study, quick, tmp_path):
    options = Options("cpu", 1, tmp_path, quick=quick)
    cases = study.cases([], options)
    assert cases
    for case in cases:
        assert set(case) == set(study.key)
        assert study.taking_part(case, options)


def test_a_sweep_from_end_to_end(tmp_path, capsys):
    names = ["comhe-torch", "naive", "pdist"]
    command = ["sweep", "--quick", "--out", str(tmp_path), "--limit", str(ENDLESS)]
    assert main([*command, "--methods", *names]) == 0
    assert "comhe-torch" in capsys.readouterr().out
    rows = sweep.STUDY.table.read(tmp_path)
    assert rows.groupby("rows", sort=False).method.count().to_dict() == {512: 3, 300: 3}
    assert set(rows.status) == {"ok"}
    assert (rows.wall_min_ms <= rows.wall_ms).all()
    assert (rows.wall_ms <= rows.wall_max_ms).all()
    assert (rows.gradient_error < 1e-5).all()
    assert rows["rounds"].between(1, 3).all()
    assert (rows.peak_mib > 0).all()
    assert (PEAKS.read(tmp_path).flops > 0).all()

    assert main([*command, "--methods", *names, "--resume"]) == 0
    assert capsys.readouterr().out.startswith("sweep: 0 cases")
    assert sweep.STUDY.table.read(tmp_path).equals(rows)
    assert main([*command, "--methods", "naive"]) == 0
    refreshed = sweep.STUDY.table.read(tmp_path)
    assert len(refreshed) == len(rows)
    assert set(refreshed[refreshed.first_s != rows.first_s].method) == {"naive"}
    assert main([*command, "--budget-minutes", "0"]) == 3
    assert "2 left over" in capsys.readouterr().out


def test_losses_from_end_to_end(tmp_path, capsys):
    command = ["losses", "--quick", "--cases", "gram", "--limit", str(ENDLESS)]
    command += ["--out", str(tmp_path)]
    assert main(command) == 0
    rows = losses.STUDY.table.read(tmp_path)
    assert list(rows.method) == ["comhe_ext", "dense"]
    assert set(rows["shape"]) == {"4x64x64"}
    assert set(rows.threads) == {1}
    assert (rows.gradient_error < 1e-5).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep", "--cases", "4096x30"], "'4096x30' is none of main"),
        (["losses", "--cases", "magic"], "'magic' is none of uniformity"),
        (["sweep", "--methods", "magic"], "'magic' is no method"),
        (["sampled", "--device", "cuda"], "no GPU" if not torch.cuda.is_available() else "cpu"),
        (["model", "--cases", "gpt-9"], "'gpt-9' is none of digits"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_errors_of_the_command_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


# --- files ----------------------------------------------------------------------------------------


def row_of(**values):
    return dict.fromkeys(STAMP, "") | {"threads": 1, "date": "1"} | values


def test_the_newest_of_several_commits_counts(tmp_path):
    table = Table("t", ("rows",), ("value",))
    for commit, rows, date, value in (("c", 1, "3", 5), ("d", 1, "2", 6), ("d", 2, "2", 7)):
        table.upsert(tmp_path, [row_of(commit=commit, rows=rows, date=date, value=value)])
    assert len(table.read(tmp_path)) == 3
    newest = table.newest(tmp_path)
    assert set(zip(newest.rows, newest.value, strict=True)) == {(1, 5), (2, 7)}


def test_upsert_replaces_by_key_and_leaves_no_half_file(tmp_path):
    table = Table("t", ("rows", "method"), ("value", "note"))
    table.upsert(tmp_path, [row_of(rows=1, method="u", value=0.123456789)])
    assert table.read(tmp_path).value.item() == 0.12346
    rows = [row_of(rows=2, method="u", value=3), row_of(rows=1, method="v")]
    table.upsert(tmp_path, rows)
    table.upsert(tmp_path, [row_of(rows=1, method="u", value=None, note="n")])
    read = table.read(tmp_path)
    assert list(zip(read.rows, read.method, read.note, strict=True)) == [
        (1, "u", "n"),
        (2, "u", ""),
        (1, "v", ""),
    ]
    assert read.value.isna().tolist() == [True, False, True]
    assert not table.lacks(tmp_path, rows)
    assert table.lacks(tmp_path, [row_of(rows=2, method="v")])

    before = table.path(tmp_path).read_bytes()
    with pytest.raises(ValueError, match="t has no column y"):
        table.upsert(tmp_path, [row_of(rows=4, method="w", y=1)])
    assert table.path(tmp_path).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
    assert Table("t", ("rows", "method"), ("value", "new")).read(tmp_path).new.isna().all()
    with pytest.raises(ValueError, match="must have the columns shape"):
        Table("t", ("rows", "shape"), ("value",)).read(tmp_path)
