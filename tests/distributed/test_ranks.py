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
    """The process that runs checks on any number of ranks, started at the first one."""

    def __init__(self):
        self.process = None
        atexit.register(self.stop)

    def failures(self, size, check):
        """Run a check on so many ranks, and return {rank: what failed}."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "rank_process.py")],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        print(size, check, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            process, self.process = self.process, None
            pytest.fail(f"the process of the ranks ended with {process.wait()}")
        return json.loads(line)

    def stop(self):
        if self.process is not None:
            self.process.stdin.close()  # it ends its ranks then, and itself
            self.process.stdout.close()
            self.process.wait()
            self.process = None


RANKS = Ranks()


def _checks():
    """List (number of ranks, check), read without running the files."""
    for size in (2, 3, 4):
        for path in sorted(HERE.glob("rank_checks*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef) and node.name.startswith("check_"):
                    marks = [x for x in node.decorator_list if isinstance(x, ast.Call)]
                    sizes = ast.literal_eval(marks[0].args[0]) if marks else [2, 3, 4]
                    long = marks and size not in sizes and marks[0].keywords
                    if size in sizes:
                        yield pytest.param(size, node.name)
                    elif long and size in ast.literal_eval(marks[0].keywords[0].value):
                        yield pytest.param(size, node.name, marks=pytest.mark.long)


@pytest.mark.parametrize(("size", "check"), list(_checks()))
def test_on_ranks(size, check):
    failures = RANKS.failures(size, check)
    if failures:
        texts = [f"rank {rank} of {size}: {text}" for rank, text in failures.items()]
        pytest.fail("\n".join(texts), pytrace=False)


@pytest.mark.parametrize(
    "failure", ["fail_by_a_rank_that_dies", "fail_by_a_rank_that_does_not_come"]
)
def test_a_rank_that_is_missed_ends_the_others(failure):
    failures = RANKS.failures(3, failure)
    assert "RuntimeError" in failures["0"]
    assert "RuntimeError" in failures["2"]
    assert failures.get("1", "") == ("the process ended" if "dies" in failure else "")


def test_the_example_gives_the_same_losses_on_any_number_of_ranks():
    example = HERE.parents[1] / "examples/distributed/fsdp2.py"
    processes = []
    # a launcher for one rank would take seconds for nothing
    alone = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for options, variables in (([], alone), (launcher, {})):
        processes.append(
            subprocess.Popen(
                [sys.executable, *options, str(example), "--steps=3", "--classes=200"],
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
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
