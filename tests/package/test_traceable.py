"""What torch.compile of PyTorch 2.6 cannot trace stays out of the sources.

`make test` runs one version of PyTorch, and the newest traces all of this.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# called by no operator and no model: nobody compiles these. In kernels/ all but the pair functions
# runs inside of operators, where nothing is traced
EAGER = {"__main__.py", "check.py", "init.py", "progress.py", "verdicts.py"}
EAGER_FOLDERS = {"cli", "gpu", "cpu", "portable", "testing"}


def traced_files():
    for path in sorted([*ROOT.glob("comhe_ext/**/*.py"), *ROOT.glob("kernels/**/*.py")]):
        inside = path.relative_to(ROOT)
        if path.name not in EAGER and not EAGER_FOLDERS.intersection(inside.parts):
            yield pytest.param(path, id=str(inside))


def untraceable(source):
    """Lines that old versions cannot trace, and why not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("isinstance", "issubclass") and isinstance(node.args[1], ast.BinOp):
                yield node.lineno, "isinstance of a union: before 2.10 write a tuple of types"
            if name.endswith("._replace"):
                yield node.lineno, "_replace of a named tuple: name every field"
            if name in ("Riesz", "Gaussian") and node.args:
                yield node.lineno, "a pair function by position: name its numbers"
            if name == "parametrize.cached":
                yield node.lineno, "parametrize.cached(): not while compiling"
        elif isinstance(node, ast.FunctionDef):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            if any(name.endswith("contextmanager") for name in decorators):
                yield node.lineno, "a generator as a context manager: return one of torch's own"


@pytest.mark.parametrize("path", list(traced_files()))
def test_old_versions_can_trace(path):
    assert list(untraceable(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(x, int | float)",
        "x._replace(v=1)",
        "Riesz(2.0)",
        "@contextmanager\ndef f():\n    yield",
        "@contextlib.contextmanager\ndef f():\n    yield",
        "with parametrize.cached():\n    pass",
    ],
)
def test_the_check_finds(source):
    assert [line for line, _ in untraceable(source)]


def test_the_check_looks_at_what_is_traced():
    names = {parameter.id for parameter in traced_files()}
    assert {"comhe_ext/functional.py", "comhe_ext/operators/energy.py"} <= names
    assert "kernels/pair_functions.py" in names
