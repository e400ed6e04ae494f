"""The Triton kernels compile for real GPUs, none of which is needed: a small part of the matrix.

More of it is `make compile-gpu`. In a process of its own, because TRITON_INTERPRET=1 would
replace the compiler.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from comhe_ext.kernels import gpu
from comhe_ext.kernels.sweep import NearestRequest, SweepRequest
from comhe_ext.testing import (
    random_rows,
    riesz,
    sweep_of,
    sweep_projected,
)

pytest.importorskip("triton")


def test_kernels_compile_without_spills_and_with_tensor_cores():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tools.compile_gpu", "--small", "--jobs", "2"],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert target in result.stdout


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="needs the compiler's launcher")
def test_a_new_size_compiles_nothing(monkeypatch):
    """What N decides is no constant of a kernel and no number that Triton specializes on."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import jit

    from comhe_ext.kernels.gpu import backend

    target = CUDABackend(GPUTarget("cuda", 90, 32))
    variants = set()

    def specialize(kernel, *args, grid, warmup, **constants):
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, target)
        _, specialization, options = bind(*args, **constants)
        variants.add((kernel.__name__, str(specialization), str(options)))

    monkeypatch.setattr(jit.JITFunction, "run", specialize)
    monkeypatch.setattr(backend, "check", lambda *_: None)
    monkeypatch.setattr(backend, "target_of", lambda _: "sm_90")
    for k in (3, 12, 40, 200):
        matrices = torch.zeros(2, k, 50)
        seen = []
        for n in (64, 1, 2, 15, 16, 17, 63, 65, 128, 1000, 1024):
            sweep_of(backend, random_rows(n, k), [n], [1.0], riesz(), 0.0, True)
            if k <= 128:
                sweep_projected(
                    backend, [random_rows(n, 50)], [matrices], [1.0, 1.0], riesz(), 0.0, True
                )
            rows, ids = random_rows(n, k), torch.zeros(n, dtype=torch.int32)
            for columns in (random_rows(70, k), random_rows(n, k)):
                gpu.sweep(SweepRequest(rows, [n], [1.0], riesz(), columns=columns))
                gpu.nearest(NearestRequest(rows, [n], columns=columns))
            gpu.nearest(NearestRequest(rows, [n], columns=rows, row_ids=ids, column_ids=ids))
            gpu.nearest(NearestRequest(rows, [n]))
            sets = rows.expand(2, -1, -1)
            for angle in (False, True):
                gpu.angle_difference(sets, random_rows(2 * n, 5).view(2, n, 5), angle, True)
                gpu.angle_difference(rows.unsqueeze(0), rows.unsqueeze(0), angle, True)
            seen.append(len(variants))
        assert seen[0] > 0, k
        assert seen == seen[:1] * len(seen), k


@pytest.fixture
def missing():
    """Ask anew what the backend is missing, which otherwise is found out once a process."""
    from comhe_ext.kernels.gpu.backend import target_of

    def forget():
        gpu.unavailable.cache_clear()
        target_of.cache_clear()

    def ask():
        forget()
        return gpu.unavailable()

    yield ask
    forget()


def test_what_is_missing_is_named(missing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA or ROCm device is available" in missing()
    if torch.version.hip is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        assert "older than compute capability 8.0" in missing()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "Triton is not installed" in missing()


def test_targets_take_the_row_of_their_kind():
    from comhe_ext.kernels.gpu import plan

    def tiles(target):
        return [plan.tiles_for(target, k, 100, False) for k in (12, 30, 40, 100)]

    assert tiles("gfx90a") == tiles("gfx950") == tiles("gfx942")
    assert tiles("sm_86") == tiles("sm_120") == tiles("sm_80")
    for target in ("gfx1100", "gfx1201"):
        with pytest.raises(RuntimeError, match=f"not on {target}: use backend='torch'"):
            tiles(target)


def test_amd_gpus_without_matrix_instructions_are_named(missing, monkeypatch):
    from types import SimpleNamespace

    properties = SimpleNamespace(gcnArchName="gfx1100:sramecc-")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    assert "not on gfx1100" in missing()
    properties.gcnArchName = "gfx90a:sramecc+"
    assert missing() is None


def test_tensors_elsewhere_are_refused():
    rows, matrix = random_rows(4, 3), random_rows(2, 3).unsqueeze(0)
    with pytest.raises(ValueError, match=r"`points` must be on a GPU .* got a cpu tensor"):
        sweep_of(gpu, rows, [4], [1.0], riesz(), 0.0, True)
    with pytest.raises(ValueError, match="`weights` must be on a GPU"):
        sweep_projected(gpu, [rows], [matrix], [1.0], riesz(), 0.0, True)
