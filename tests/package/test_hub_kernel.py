"""The package as a kernel of the Hugging Face Hub, loaded beside the package itself."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import comhe_ext
from comhe_ext.testing import random_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    command = [sys.executable, "-m", "tools.hub_kernel", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def load(variant):
    """What the package `kernels` does, which need not be installed."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_beside_the_package(exported):
    weight = random_rows(70, 12)
    expected = comhe_ext.hyperspherical_energy(weight, half_space=True, backend="torch")
    for variant in sorted((exported / "build").glob("torch*-cpu*")):
        kernel = load(variant)

        def twice(x, kernel=kernel):
            return 2.0 * kernel.hyperspherical_energy(x, half_space=True, backend="torch")

        torch._dynamo.reset()
        compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
        assert torch.equal(twice(weight), 2.0 * expected)
        assert torch.equal(compiled(weight), 2.0 * expected)
        # older loaders look for a folder of the kernel's name
        alias = importlib.util.spec_from_file_location("alias", variant / "comhe_ext/__init__.py")
        module = importlib.util.module_from_spec(alias)
        alias.loader.exec_module(module)
        assert module.hyperspherical_energy is kernel.hyperspherical_energy
        if "stable" in variant.name:
            kernel.hyperspherical_energy(weight, backend="cpu")


def test_it_imports_itself_by_no_name(exported):
    for path in (exported / "torch-ext").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.lstrip().startswith(("from comhe_ext", "import comhe_ext")), path
            assert "torch.ops.comhe_ext." not in line


def test_every_backend_has_a_variant(exported):
    names = {path.name for path in (exported / "build").iterdir()}
    assert {"torch-cpu", "torch-cuda", "torch-rocm"} <= names
    kinds = [
        json.loads((exported / "build" / name / "metadata.json").read_text())["backend"]["type"]
        for name in ("torch-cpu", "torch-cuda", "torch-rocm")
    ]
    assert kinds == ["cpu", "cuda", "rocm"]
