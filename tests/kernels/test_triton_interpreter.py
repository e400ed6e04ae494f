"""The Triton kernels without a GPU: the checks of `triton_interpreter_checks*.py`, one by one.

They run in a process of their own, where Triton's interpreter takes the place of the compiler:
TRITON_INTERPRET=1 is read when kernels are defined.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
INTERPRETED = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


class Interpreter:
    """The process that runs the checks. `checks`: their names, and whether they take minutes."""

    def __init__(self):
        script = Path(__file__).with_name("triton_interpreter_process.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            env=INTERPRETED,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.stop)
        self.checks = self._answer()

    def run(self, check):
        """Run a check, and fail or skip as it does."""
        print(check, file=self.process.stdin, flush=True)
        for outcome, text in self._answer():
            if outcome == "skipped":
                pytest.skip(text)
            if outcome == "failed":
                pytest.fail(text, pytrace=False)

    def stop(self):
        self.process.kill()
        self.process.communicate()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            pytest.fail(f"the interpreter's process ended with status {self.process.wait()}")
        return json.loads(line)


@functools.cache
def interpreter():
    """One for each process that runs tests: it imports once."""
    return Interpreter()


def pytest_generate_tests(metafunc):
    if "check" in metafunc.fixturenames:
        checks = interpreter().checks.items()
        marks = {False: [], True: [pytest.mark.long]}
        metafunc.parametrize(
            "check", [pytest.param(x, id=x, marks=marks[is_long]) for x, is_long in checks]
        )


def test_in_the_interpreter(check):
    interpreter().run(check)


def test_the_gpu_suite_runs_dry_and_goes_on_where_it_stopped(tmp_path):
    arguments = ["--results", str(tmp_path), "--minutes", "1e6"]
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-m", "tools.gpu_suite", *arguments],
            env=INTERPRETED,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
        assert "0 failed, 0 left" in result.stdout
    # the second run finds every result
    assert result.stdout.count("\n") == 1
    stages = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert all(stage["ok"] for stage in stages.values())
