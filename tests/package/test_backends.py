"""Which backend is taken, and what is refused by name."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from comhe_ext import Gaussian, Riesz, backends
from comhe_ext.kernels import gpu
from comhe_ext.operators.sweep import _refuse_capture

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
        _refuse_capture(torch.device("cuda"))
    _refuse_capture(torch.device("cpu"))
    # and torch.compile leaves the operators out of the graphs that it captures
    for operator in ("sweep", "hessian_vector_product", "angle_difference"):
        tags = getattr(torch.ops.comhe_ext, operator).default.tags
        assert torch.Tag.cudagraph_unsafe in tags


def test_info_names_every_backend():
    result = subprocess.run(
        [sys.executable, "-m", "comhe_ext", "info"], capture_output=True, text=True, check=True
    )
    for name in backends.BACKENDS:
        assert f"backend {name}:" in result.stdout
