"""Rows on several ranks: the checks of `rank_checks*.py`, on 2, 3 and 4 processes."""

import ast
import atexit
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)

HERE = Path(__file__).parent


class Ranks:
    """The processes of one number of ranks, started at the first check."""

    def __init__(self, size):
        self.size, self.process = size, None
        atexit.register(self.stop)

    def run(self, check):
        """Run a check on all ranks, and fail if it fails on one."""
        if self.process is None:
            self._start()
        print(check, file=self.process.stdin, flush=True)
        failures = self._answer()
        if failures:
            self.stop()
            texts = [f"rank {rank} of {self.size}: {text}" for rank, text in failures.items()]
            pytest.fail("\n".join(texts), pytrace=False)

    def stop(self):
        if self.process is not None:
            self.process.stdin.close()  # it ends its ranks then, and itself
            self.process.stdout.close()
            self.process.wait()
            self.process = None

    def _start(self):
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "rank_process.py"), str(self.size)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            process, self.process = self.process, None
            pytest.fail(f"the processes of {self.size} ranks ended with {process.wait()}")
        return json.loads(line)


RANKS = {size: Ranks(size) for size in (2, 3, 4)}


def _checks():
    """List (number of ranks, check), read without running the files."""
    for size in RANKS:
        for path in sorted(HERE.glob("rank_checks*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef) and node.name.startswith("check_"):
                    marks = [x for x in node.decorator_list if isinstance(x, ast.Call)]
                    sizes = [ast.literal_eval(mark.args[0]) for mark in marks]
                    if not sizes or size in sizes[0]:
                        yield size, node.name


@pytest.mark.parametrize(("size", "check"), list(_checks()))
def test_on_ranks(size, check):
    RANKS[size].run(check)
