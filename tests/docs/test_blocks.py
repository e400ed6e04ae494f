"""The code in README.md and docs/ runs as it is printed.

Blocks marked `python` and `bash` are run: those under one heading of the second level in order, in
one folder and one namespace, so that a reader can start at any heading. All others cannot be run:
`py` and `sh` are fragments, or need a network, hours, several ranks or a GPU. What they name has to
exist.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import comhe_ext
from comhe_ext.kernels import pair_functions

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN, NOT_RUN = {"python", "bash"}, {"py", "sh", "text", "bibtex", ""}


class Block(NamedTuple):
    kind: str
    line: int  # of its first line, from 1
    code: str


def sections(page):
    """The blocks under each heading of the second level; what a block holds is no heading."""
    heading, found = "", {}
    kind, first, lines = None, 0, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = re.match(r" *```(.*)", line)
        if kind is None and line.startswith("## "):
            heading = line.removeprefix("## ")
        elif kind is None and fence:
            kind, first, lines = fence[1], number + 1, []
        elif fence:
            found.setdefault(heading, []).append(Block(kind, first, "\n".join(lines) + "\n"))
            kind = None
        elif kind is not None:
            lines.append(line)
    assert kind is None, f"{page.name}: a block has no end"
    return found


def name_of(page):
    return str(page.relative_to(ROOT))


def all_blocks():
    return [(page, block) for page in PAGES for s in sections(page).values() for block in s]


def runnable():
    for page in PAGES:
        for heading, blocks in sections(page).items():
            blocks = [block for block in blocks if block.kind in RUN]
            if blocks:
                yield pytest.param(page, blocks, id=f"{name_of(page)}: {heading}")


@pytest.mark.filterwarnings("ignore")  # of other people's packages
@pytest.mark.parametrize(("page", "blocks"), list(runnable()))
def test_the_blocks_of_a_section_run(page, blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    # a pair function that a page defines is one of its own
    monkeypatch.setattr(pair_functions, "PAIR_FUNCTIONS", {**pair_functions.PAIR_FUNCTIONS})
    names = {"__name__": "example"}
    for kind, line, code in blocks:
        if kind == "python":
            # empty lines before it, so that a traceback gives the line of the page
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
        else:
            result = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", code],
                env=environment,
                capture_output=True,
                text=True,
            )
            assert result.returncode == 0, f"{name_of(page)}, line {line}: {result.stderr}"


def test_no_block_is_marked_so_that_nobody_runs_it():
    found = {(name_of(page), block.line): block.kind for page, block in all_blocks()}
    assert {place: kind for place, kind in found.items() if kind not in RUN | NOT_RUN} == {}


FRAGMENTS = [(page, block) for page, block in all_blocks() if block.kind in NOT_RUN]


def fragment_name(value):
    return f"{name_of(value)}" if isinstance(value, Path) else f"line {value.line}"


@pytest.mark.parametrize(("page", "block"), FRAGMENTS, ids=fragment_name)
def test_a_block_that_is_not_run_names_what_exists(page, block):
    code = block.code
    if block.kind == "py":
        compile(code, str(page), "exec")
        for dotted in re.findall(r"\bcomhe_ext((?:\.\w+)+)", code):
            thing = comhe_ext
            for name in dotted.strip(".").split("."):
                thing = getattr(thing, name)
        return
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"\bmake ([a-z][\w-]*)", code):
        assert target in targets
    for module in re.findall(r"\bpython -m ((?:bench|tools|comhe_ext)[\w.]*)", code):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for path in re.findall(r"(?<![\w/-])(?:bench|docs|examples|tests|tools)/[\w./-]+", code):
        assert (ROOT / path).exists(), path


def test_a_comment_in_a_block_is_no_heading(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("## One\n\n```python\n## a comment\nx = 1\n```\n\n## Two\n\n```sh\ny\n```\n")
    assert sections(page) == {
        "One": [Block("python", 4, "## a comment\nx = 1\n")],
        "Two": [Block("sh", 11, "y\n")],
    }
