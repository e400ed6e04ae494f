"""The wheel: what it holds, and that it works outside of the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import venv
import warnings
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import comhe_ext
from comhe_ext import backends
from comhe_ext.kernels.cpu import binding
from comhe_ext.testing import random_rows

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip")
OFFLINE = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")


def copy_sources(folder):
    """What a build reads, so that nothing is left behind in the checkout."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("comhe_ext", "kernels"):
        # comhe_ext/kernels is a link that an editable installation makes
        ignored = ["__pycache__", "*.so", "*.egg-info"] + ["kernels"] * (name == "comhe_ext")
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*ignored))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    sources, output = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    copy_sources(sources)
    # a quarter of the time: whether optimized code is right is the question of the kernel's tests
    setup = (sources / "setup.py").read_text()
    assert '"-O3"' in setup
    (sources / "setup.py").write_text(setup.replace('"-O3"', '"-O0"'))
    result = subprocess.run(
        [*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", str(output), str(sources)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    (path,) = output.glob("*.whl")
    return path


def test_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"comhe_ext-{comhe_ext.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"comhe_ext", info}
    assert "comhe_ext/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    scripts = zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    assert "comhe-ext = comhe_ext.__main__:main" in scripts
    # every module of the checkout, kernels/ as comhe_ext/kernels/, and no other
    expected = {f"comhe_ext/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    own = [path.relative_to(ROOT) for path in (ROOT / "comhe_ext").rglob("*.py")]
    expected |= {str(path) for path in own if path.parts[1] != "kernels"}
    assert {name for name in names if name.endswith(".py")} == expected


def test_wheel_runs_under_any_python(wheel):
    tags = wheel.stem.split("-", 2)[2]
    assert tags.startswith("py3-none-")


def test_metadata_says_what_an_index_shows(wheel):
    info = f"comhe_ext-{comhe_ext.__version__}.dist-info/METADATA"
    text = zipfile.ZipFile(wheel).read(info).decode()
    header, _, description = text.partition("\n\n")
    for line in (
        "Requires-Python: >=3.10",
        "Requires-Dist: torch>=2.6",
        "Author: the comhe_ext authors",
        "License-Expression: MIT",
        "Classifier: Programming Language :: Python :: 3.14",
        "Description-Content-Type: text/markdown",
    ):
        assert line in header.splitlines()
    # an index has none of the repository's files to show or to link to
    assert description.startswith("# comhe_ext")
    links = re.findall(r"\]\(([^)]*)\)|(?:src|srcset|href)=\"([^\"]*)\"", description)
    targets = [one or other for one, other in links]
    assert all(target.startswith(("https:", "#")) for target in targets), targets


def test_the_citation_names_this_version():
    assert f"\nversion: {comhe_ext.__version__}\n" in (ROOT / "CITATION.cff").read_text()


PROGRAM = """
import torch
import comhe_ext
from comhe_ext import backends
from comhe_ext.testing import reference

print(comhe_ext.__file__)
weight = torch.randn(100, 20, requires_grad=True)
for backend in ("cpu", "torch"):
    if backends.unavailable(backend) is None:
        energy = comhe_ext.hyperspherical_energy(weight, half_space=True, backend=backend)
        energy.backward()
        expected = reference.hyperspherical_energy(weight.detach(), half_space=True)
        assert abs(energy.item() - expected.item()) <= 1e-6
        print(backend)
print(comhe_ext.CoMHE(torch.nn.Linear(50, 20))())
"""


def test_wheel_works_outside_of_the_checkout(wheel, tmp_path):
    target = tmp_path / "installed"
    subprocess.run([*PIP, "install", *OFFLINE, "--target", str(target), str(wheel)], check=True)
    # the editable installation's finder comes after sys.path: the wheel has to be found first
    program = f"import sys; sys.path.insert(0, {str(target)!r})\n{PROGRAM}"
    result = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert Path(lines[0]).is_relative_to(target)
    assert "torch" in lines
    if backends.unavailable("cpu") is None:  # what could be built here can be built again
        assert "cpu" in lines


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    """The Python of an environment with an editable installation, made without a compiler."""
    sources, output = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("editable")
    copy_sources(sources)
    # what pip calls
    build = "import setuptools.build_meta, sys; setuptools.build_meta.build_editable(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", build, str(output)],
        cwd=sources,
        env={**os.environ, "CC": "false", "CXX": "false"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "the compiled CPU kernel is left out" in result.stdout + result.stderr
    environment = output / "environment"
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(next(output.glob("*.whl"))) as archive:
        archive.extractall(packages)
    return environment / "bin" / "python", sources


USER = """
import comhe_ext
from comhe_ext import bounds
from comhe_ext.kernels.cpu import binding
from comhe_ext.kernels.pair_functions import Riesz

reveal_type(bounds.lowest_energy(3, 2, Riesz()))
reveal_type(binding.instruction_set())
comhe_ext.CoMHE(every="never")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="links ask for a privilege there")
def test_type_checkers_see_an_editable_installation(editable, tmp_path):
    pytest.importorskip("mypy")
    python, _ = editable
    (tmp_path / "user.py").write_text(USER)
    # torch is left out: to read it takes a minute
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python)]
    command += ["--config-file", os.devnull, "--cache-dir", str(tmp_path / "cache")]
    result = subprocess.run([*command, "user.py"], cwd=tmp_path, capture_output=True, text=True)
    assert [line.split(": ", 1)[1] for line in result.stdout.splitlines() if ":" in line] == [
        'note: Revealed type is "float"',
        'note: Revealed type is "str"',
        'error: Missing positional argument "model" in call to "CoMHE"  [call-arg]',
        'error: Argument "every" to "CoMHE" has incompatible type "str"; expected "int"  '
        "[arg-type]",
    ], result.stdout + result.stderr


def test_an_editable_installation_works_and_misses_its_compiler(editable, tmp_path):
    python, sources = editable
    (sources / "comhe_ext" / "added.py").write_text("from comhe_ext.kernels import portable\n")
    program = f"""
import importlib.util, sys, warnings
sys.path += {sys.path!r}
import torch
import comhe_ext, comhe_ext.added

assert importlib.util.find_spec("comhe_ext.kernels").origin.startswith({str(sources)!r})
spec = importlib.util.find_spec("kernels")  # another package, if there is one
assert spec is None or not (spec.origin or "").startswith({str(sources)!r})
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    for _ in range(2):
        comhe_ext.hyperspherical_energy(torch.ones(3, 2))
print([str(w.message).partition(";")[0] for w in warned])
"""
    result = subprocess.run(
        [str(python), "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    expected = ["the compiled CPU kernel is not installed"] if sys.platform != "win32" else []
    assert result.stdout.strip() == str(expected)


def tracked_files():
    """What git tracks, or, where there is no git, what this sdist says it was made of."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "ls-files"]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    else:
        listing = (ROOT / "comhe_ext.egg-info" / "SOURCES.txt").read_text()
    # one that was deleted and not committed yet is no file of the sdist
    return [name for name in listing.splitlines() if (ROOT / name).exists()]


def test_sdist_holds_everything(tmp_path):
    """So that it passes `make test` itself; and nothing that work in a checkout leaves behind."""
    sources, output = tmp_path / "sources", tmp_path / "sdist"
    for name in tracked_files():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, sources / name)
    for name in ("tests/__pycache__/a.pyc", "kernels/cpu/_pairwise.so", "build/a.py", ".venv/a.py"):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).touch()
    (sources / "comhe_ext" / "kernels").symlink_to("../kernels")
    build = "import setuptools.build_meta, sys; setuptools.build_meta.build_sdist(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", build, str(output)], cwd=sources, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (path,) = output.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = [member.name.partition("/")[2] for member in archive if member.isfile()]
    made = {"PKG-INFO", "setup.cfg"} | {name for name in names if ".egg-info/" in name}
    left_out = {".ci/run", ".gitignore"}
    assert set(names) - made == {*tracked_files()} - made - left_out


def test_version_is_that_of_the_metadata():
    assert metadata.version("comhe-ext") == comhe_ext.__version__


def test_public_names_are_there():
    for name in comhe_ext.__all__:
        assert getattr(comhe_ext, name).__doc__


def test_compiled_kernel_is_there_where_a_compiler_is():
    # the build goes on without it, so a kernel that does not compile would go unnoticed
    compiler = shutil.which("g++") or shutil.which("clang++")
    if sys.platform == "linux" and compiler:
        assert backends.unavailable("cpu") is None


@pytest.fixture
def missing(monkeypatch, tmp_path):
    """As if the build had left the kernel out, and nothing had been called."""
    monkeypatch.setattr(binding, "LIBRARY", tmp_path / "_pairwise.so")
    monkeypatch.setattr(backends, "_untold", threading.Lock())
    binding.unavailable.cache_clear()
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield warned
    monkeypatch.undo()
    binding.unavailable.cache_clear()
    torch._dynamo.reset()


def test_a_kernel_that_was_left_out_is_missed_once(missing):
    weight = random_rows(9, 5)
    expected = comhe_ext.hyperspherical_energy(weight, backend="torch")
    comhe_ext.hyperspherical_energy(weight.double())
    comhe_ext.hyperspherical_energy(weight.to("meta"))
    with pytest.raises(RuntimeError, match="the compiled CPU kernel is not installed"):
        comhe_ext.hyperspherical_energy(weight, backend="cpu")
    assert not missing

    def call():
        assert torch.equal(comhe_ext.hyperspherical_energy(weight), expected)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    call()
    comhe_ext.CoMHE(torch.nn.Linear(9, 5), output_layer=None)().backward()
    assert [w.category for w in missing] == [UserWarning]
    message = str(missing[0].message)
    for words in ("is not installed; reinstall", "backend='torch'", "g++", "`pip install -v`"):
        assert words in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_torch_compile_misses_it_too(missing, dtype):
    weight = random_rows(9, 5, dtype=dtype)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x):
        return comhe_ext.hyperspherical_energy(x) * 2

    expected = comhe_ext.hyperspherical_energy(weight, backend="torch") * 2
    for _ in range(2):
        assert torch.equal(compiled(weight), expected)
    told = [w for w in missing if "compiled CPU kernel" in str(w.message)]
    assert len(told) == 1


def test_where_no_kernel_is_built_none_is_missed(missing, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    comhe_ext.hyperspherical_energy(random_rows(9, 5))
    assert not missing
