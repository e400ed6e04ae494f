"""Rows on several ranks: the checks of `rank_checks*.py`, on 2, 3 and 4 processes."""

import ast
import atexit
import json
import os
import re
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
        failures = self.failures(check)
        if failures:
            self.stop()
            texts = [f"rank {rank} of {self.size}: {text}" for rank, text in failures.items()]
            pytest.fail("\n".join(texts), pytrace=False)

    def failures(self, check):
        """Run a check on all ranks, and return {rank: what failed}."""
        if self.process is None:
            self._start()
        print(check, file=self.process.stdin, flush=True)
        return self._answer()

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


@pytest.mark.parametrize(
    "failure", ["fail_by_a_rank_that_dies", "fail_by_a_rank_that_does_not_come"]
)
def test_a_rank_that_is_missed_ends_the_others(failure):
    ranks = Ranks(3)
    failures = ranks.failures(failure)
    ranks.stop()
    assert "RuntimeError" in failures["0"]
    assert "RuntimeError" in failures["2"]
    assert failures.get("1", "") == ("the process ended" if "dies" in failure else "")


def test_the_example_gives_the_same_losses_on_any_number_of_ranks():
    example = HERE.parents[1] / "examples/distributed/fsdp2.py"
    processes = []
    for ranks in (1, 2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        arguments = [f"--nproc-per-node={ranks}", str(example), "--steps=3", "--classes=200"]
        processes.append(
            subprocess.Popen(
                launcher + arguments,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    numbers = [[float(x) for x in re.findall(r"\d+\.\d+", output)] for output in outputs]
    assert len(numbers[0]) == 6
    assert numbers[1] == pytest.approx(numbers[0], abs=2e-4)  # four digits are printed


def test_the_package_works_where_torch_knows_nothing_of_several_ranks():
    script = """
import torch
import torch.distributed as dist

for name in list(vars(dist)):
    if not name.startswith("__") and name not in ("sys", "torch"):
        delattr(dist, name)
dist.is_available = lambda: False

import comhe_ext

comhe_ext.hyperspherical_energy(torch.ones(4, 3))
comhe_ext.CoMHE(torch.nn.Linear(3, 4), output_layer=None)().backward()
try:
    comhe_ext.distributed.hyperspherical_energy(torch.ones(4, 3))
except RuntimeError as error:
    print(error)
"""
    output = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    assert "need a process group" in output
