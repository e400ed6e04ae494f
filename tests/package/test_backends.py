"""Which backend is taken, and what is refused by name."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from comhe_ext import Gaussian, Riesz, backends
from comhe_ext.kernels import gpu
from comhe_ext.operators.sweep import refuse_capture

MPS, XPU = torch.device("mps"), torch.device("xpu", 0)


@pytest.mark.parametrize("name", [None, "torch"])
def test_devices_without_float64_are_refused_by_name(name, monkeypatch):
    for pair in (Riesz(), Gaussian()):
        with pytest.raises(ValueError, match=r"device mps has no float64.*move the tensors"):
            backends.choose(name, pair, MPS, torch.float32)
    has_not, has = SimpleNamespace(has_fp64=False), SimpleNamespace(has_fp64=True)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: has_not)
    with pytest.raises(ValueError, match="device xpu:0 has no float64"):
        backends.choose(name, Riesz(), XPU, torch.float32)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: has)
    assert backends.choose(name, Riesz(), XPU, torch.float32) == "torch"


@pytest.mark.parametrize("name", ["triton", "cpu"])
def test_backends_are_refused_elsewhere(name):
    with pytest.raises((ValueError, RuntimeError), match=r"needs tensors on|backend='torch'"):
        backends.choose(name, Riesz(), XPU, torch.float32)


def test_the_portable_backend_takes_what_others_cannot():
    assert backends.choose(None, Riesz(), torch.device("cpu"), torch.float64) == "torch"
    assert backends.choose(None, Riesz(), torch.device("cuda"), torch.float64) == "torch"


def test_triton_is_asked_for_nothing_where_it_is_missing(monkeypatch):
    def missing(pair):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(gpu, "unavailable", lambda: "Triton is not installed")
    monkeypatch.setattr(gpu, "supports", missing)
    assert backends.choose(None, Riesz(), torch.device("cuda"), torch.float32) == "torch"
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        backends.choose("triton", Riesz(), torch.device("cuda"), torch.float32)


def test_a_capture_of_the_portable_tiles_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"'torch' waits for the GPU.*leave this call out"):
        refuse_capture(torch.device("cuda"))
    refuse_capture(torch.device("cpu"))
    # and torch.compile leaves the operators out of the graphs that it captures
    if tag := getattr(torch.Tag, "cudagraph_unsafe", None):  # PyTorch before 2.8 has no such word
        for operator in ("sweep", "hessian_vector_product", "angle_difference"):
            assert tag in getattr(torch.ops.comhe_ext, operator).default.tags


@pytest.fixture
def asked_anew():
    """The Triton backend, which has not been asked yet whether it is available."""
    gpu.unavailable.cache_clear()
    yield gpu
    gpu.unavailable.cache_clear()


def test_a_triton_without_what_the_kernels_need_is_refused_by_name(asked_anew, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.delattr(triton, "knobs", raising=False)
    expected = f"Triton {triton.__version__} is too old, backend 'triton' needs 3.4 or later: "
    assert asked_anew.unavailable().startswith(expected)
    with pytest.raises(RuntimeError, match=r"is too old.*backend='torch'"):
        backends.choose("triton", Riesz(), torch.device("cuda"), torch.float32)
    assert backends.choose(None, Riesz(), torch.device("cuda"), torch.float32) == "torch"


def test_a_triton_that_rocm_needs_newer_is_refused_by_name(asked_anew, monkeypatch):
    triton = pytest.importorskip("triton")
    amd = pytest.importorskip("triton.backends.amd.compiler")
    monkeypatch.setattr(triton, "knobs", SimpleNamespace(), raising=False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(amd.HIPOptions, "allowed_dot_input_precisions", ("ieee",))
    assert "needs 3.6 or later on ROCm: update PyTorch" in asked_anew.unavailable()


def test_the_triton_that_is_installed_is_used_from_3_4_on(asked_anew):
    triton = pytest.importorskip("triton")
    release = tuple(int(x) for x in triton.__version__.split(".")[:2])
    assert ("is too old" in (asked_anew.unavailable() or "")) == (release < (3, 4))


def test_info_names_every_backend():
    result = subprocess.run(
        [sys.executable, "-m", "comhe_ext", "info"], capture_output=True, text=True, check=True
    )
    for name in backends.BACKENDS:
        assert f"backend {name}:" in result.stdout
