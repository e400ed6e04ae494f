"""Every instruction set of the compiled kernel against float64; those of ARM on an emulator.

`check_cpu.cpp` does the work. ARM needs `apt-get install g++-aarch64-linux-gnu qemu-user-static`.
"""

import math
import platform
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from comhe_ext.kernels.cpu import binding
from comhe_ext.kernels.pair_functions import Riesz
from comhe_ext.kernels.sweep import SweepRequest
from comhe_ext.testing import random_rows

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "tests/kernels/check_cpu.cpp"
CXX, ARM_CXX, EMULATOR = (
    shutil.which(name) for name in ("g++", "aarch64-linux-gnu-g++", "qemu-aarch64-static")
)

# Cosines are off by about 1e-7, and `collapsed` has many pairs just beyond the distance 1/8 from
# which on they are taken as they are: 2e-7 / r^2 times the exponent of f' is 4e-5.
BOUNDS = {"random": 3e-6, "paired": 5e-6, "clustered": 5e-6, "collapsed": 4e-5, "large": 3e-6}

needs_library = pytest.mark.skipif(
    binding.unavailable() is not None or not CXX,
    reason="needs the compiled kernel, and g++ for a program that calls it",
)
needs_emulator = pytest.mark.skipif(
    not (ARM_CXX and EMULATOR), reason="needs g++-aarch64-linux-gnu and qemu-user-static"
)
HERE = binding.instruction_sets()


def run(*command):
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout


def build_of(machine):
    """What setup.py compiles on a machine: flags for all units, and units with their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **_: None)
        patch.setattr(platform, "machine", lambda: machine)
        build = runpy.run_path(str(ROOT / "setup.py"))
    return build["COMPILE"], build["UNITS"]


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """The program with this machine's library."""
    program = tmp_path_factory.mktemp("native") / "check_cpu"
    run(CXX, "-O2", "-std=c++17", CHECK, binding.LIBRARY, "-fopenmp", "-o", program)
    return (program,)


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """The program for ARM, with the units that setup.py builds there, on the emulator."""
    folder = tmp_path_factory.mktemp("arm")
    common, units = build_of("aarch64")
    for i, (source, flags) in enumerate(units.items()):
        run(ARM_CXX, *common, "-fopenmp", *flags, "-c", ROOT / source, "-o", folder / f"{i}.o")
    program, objects = folder / "check_cpu", sorted(folder.glob("*.o"))
    run(ARM_CXX, "-O2", "-std=c++17", "-fopenmp", "-static", CHECK, *objects, "-o", program)
    return EMULATOR, program


_RESULTS = {}


def results(program, isa):
    """Name -> (sizes of what float64 gives, errors), three each."""
    if (program, isa) not in _RESULTS:
        cases = [line.split() for line in run(*program, isa).splitlines()]
        _RESULTS[program, isa] = {
            name: ([float(x) for x in rest[:3]], [float(x) for x in rest[3:]])
            for name, *rest in cases
        }
    return _RESULTS[program, isa]


def check(cases):
    assert len(cases) > 300
    bounds = {n: bound for n in cases for kind, bound in BOUNDS.items() if kind in n.split("-")}
    assert bounds.keys() == cases.keys()
    # of NaN, too, `<=` is false
    wrong = {n: errors for n, (_, errors) in cases.items() if not max(errors) <= bounds[n]}
    assert not wrong


@needs_library
@pytest.mark.parametrize("isa", range(len(HERE)), ids=HERE)
def test_an_instruction_set_of_this_machine(native, isa):
    check(results(native, isa))


@needs_library
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("s", [0.0, 0.7, 1.0, 2.0])
def test_rows_of_one_coordinate_have_roundings_for_a_gradient(s, half_space, angular):
    # exactly it is 0; what is left differs from one instruction set to the next by all of its size
    rows = random_rows(400, 1)
    pair = Riesz(s, half_space=half_space, angular=angular)
    request = SweepRequest(rows, [400], [pair.scale(400, "mean")], pair)
    energy, gradient = binding.sweep(request)[:2]
    assert (gradient * rows).abs().max() <= 1e-15 * energy[0]


@pytest.mark.long
@needs_emulator
@pytest.mark.parametrize("isa", [0, 1], ids=["baseline", "neon"])
def test_an_instruction_set_of_arm(arm, isa):
    check(results(arm, isa))


@pytest.mark.long
@needs_library
@needs_emulator
def test_arm_and_this_machine_have_the_same_truth(arm, native):
    ours, theirs = results(native, 0), results(arm, 1)
    assert ours.keys() == theirs.keys()
    for name in ours:
        # theta + (pi - theta) is constant: its derivatives in float64 are rounding where eps is 0
        constant = "riesz--1-" in name and "-half-angular-" in name
        least = 1e-13 if constant else 1e-20
        for x, y in zip(ours[name][0], theirs[name][0], strict=True):
            assert math.isclose(x, y, rel_tol=1e-7, abs_tol=least), name


@pytest.mark.long
@needs_emulator
def test_arm_reciprocals_are_good_to_a_unit_in_the_last_place(tmp_path):
    common, units = build_of("aarch64")
    flags = [*common, *units["kernels/cpu/neon.cpp"], "-DNEON", "-DRECIPROCALS"]
    run(ARM_CXX, *flags, "-static", CHECK, "-o", tmp_path / "reciprocals")
    errors = run(EMULATOR, tmp_path / "reciprocals").split()
    assert len(errors) == 2
    assert all(float(x) <= 1 for x in errors)
