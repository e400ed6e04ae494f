"""Stands in for the CUDA libraries that a torch wheel links to, so that it runs on a processor.

PyPI has PyTorch for Linux only as built for CUDA: its wheel does not load without libraries of
several gigabytes, of which nothing runs where there is no GPU. Here each of them becomes a file of
some kilobytes that has all the symbols the wheel asks for. Every function in it returns 100, in
CUDA "no device", which is what torch hears from the real libraries on a machine without a GPU.
"""

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# the driver's library is not to be found on a machine without a GPU, and is loaded only at need
DRIVER = "libcuda.so.1"


class Library(NamedTuple):
    """What a shared library asks of others."""

    defined: set[str]
    undefined: set[tuple[str, str]]  # name and version, which may be empty
    needed: set[str]  # names of libraries
    versions: dict[str, set[str]]  # of each library that has some


def readelf(*arguments: object) -> str:
    """Run readelf and return what it prints."""
    command = ["readelf", "-W", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True).stdout


def symbols(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield name, version and whether it is defined, of each dynamic symbol."""
    for line in readelf("--dyn-syms", path).splitlines():
        fields = line.split()
        if len(fields) >= 8 and fields[0][:-1].isdecimal():
            name, _, version = fields[7].partition("@")
            yield name, version.lstrip("@"), fields[6] != "UND"


def read(path: Path) -> Library:
    """Read the tables of one library."""
    defined, undefined = set(), set()
    for name, version, here in symbols(path):
        if here:
            defined.add(name)
        else:
            undefined.add((name, version))
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("-d", path)))
    versions: defaultdict[str, set[str]] = defaultdict(set)
    library = ""
    for line in readelf("-V", path).splitlines():
        if file := re.search(r"File: (\S+)\s+Cnt", line):
            library = file[1]
        elif name_of_version := re.search(r"Name: (\S+)\s+Flags", line):
            versions[library].add(name_of_version[1])
    return Library(defined, undefined, needed, versions)


def system_libraries() -> dict[str, Path]:
    """List the libraries that the loader finds by itself."""
    listing = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
    found = re.findall(r"^\s*(\S+) \(libc6,x86-64.*=> (\S+)$", listing, re.MULTILINE)
    return {name: Path(path) for name, path in found}


def make(target: Path, plain: set[str], versioned: dict[str, set[str]]) -> None:
    """Link a library of functions that return 100."""
    names = plain.union(*versioned.values())
    source = [".text", "nothing: mov $100, %eax", "ret"]
    for name in sorted(names):
        source += [f".globl {name}", f".type {name}, @function", f".set {name}, nothing"]
    source.append('.section .note.GNU-stack, "", @progbits')
    script = [
        f"{v} {{ global: {' '.join(f'{n};' for n in sorted(ns))} }};" for v, ns in versioned.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        assembly, versions = Path(folder, "stand_in.s"), Path(folder, "versions")
        assembly.write_text("\n".join(source) + "\n")
        versions.write_text("\n".join(script) + "\n")
        command = ["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{target.name}"]
        command += [f"-Wl,--version-script={versions}"] if script else []
        subprocess.run([*command, "-o", str(target), str(assembly)], check=True)


def stand_in(torch: Path) -> list[str]:
    """Add to torch's libraries those that they need and that are nowhere; return their names."""
    own = {path.name: read(path) for path in (torch / "lib").glob("*.so*") if path.is_file()}
    own |= {path.name: read(path) for path in torch.glob("_C*.so")}
    others = system_libraries()
    needed = {name for library in own.values() for name in library.needed}
    missing = sorted(needed - own.keys() - others.keys() - {DRIVER})

    defined = set().union(*(library.defined for library in own.values()))
    for name in needed & others.keys():
        defined |= {symbol for symbol, _, here in symbols(others[name]) if here}
    wanted = {symbol for library in own.values() for symbol in library.undefined}
    # Python's own are in the program that loads all this
    plain = {
        n
        for n, v in wanted
        if n and not v and n not in defined and not n.lstrip("_").startswith("Py")
    }
    for name in missing:
        versioned: defaultdict[str, set[str]] = defaultdict(set)
        versions = set().union(*(library.versions.get(name, set()) for library in own.values()))
        for symbol, version in wanted:
            if version in versions:
                versioned[version].add(symbol)
        make(torch / "lib" / name, plain, versioned)
    return missing
