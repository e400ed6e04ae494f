"""The build of the compiled kernel by a compiler that lacks something."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from comhe_ext.kernels.cpu import binding
from comhe_ext.kernels.pair_functions import Riesz
from comhe_ext.kernels.sweep import SweepRequest
from comhe_ext.testing import random_rows

ROOT = Path(__file__).parents[2]
CXX = shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not CXX, reason="needs a C++ compiler")


def build(folder, before):
    """What the build says and makes, where shell lines come before the compiler."""
    script = folder / "c++"
    script.write_text(f'#!/bin/sh\n{before}\nexec {CXX} "$@"\n')
    script.chmod(0o755)
    options = ["--build-temp", str(folder), "--build-lib", str(folder)]
    environment = {**os.environ, "CC": str(script), "CXX": str(script)}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr, folder / "comhe_ext/kernels/cpu/_pairwise.so"


@pytest.mark.long
def test_a_compiler_without_openmp_builds_for_one_thread(tmp_path, monkeypatch):
    refuse = "case \" $* \" in *' -fopenmp '*) echo no OpenMP >&2; exit 1;; esac"
    said, path = build(tmp_path, refuse)
    assert "will use one thread" in said
    assert "left out" not in said
    rows = random_rows(1500, 30)  # work for two threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    request = SweepRequest(rows, [len(rows)], [1.0], Riesz())
    results = []
    for library in (binding._library(), ctypes.CDLL(str(path))):
        monkeypatch.setattr(binding, "_library", lambda library=library: library)
        results.append(binding.sweep(request))
    assert all(torch.equal(x, y) for x, y in zip(results[0][:2], results[1][:2], strict=True))
