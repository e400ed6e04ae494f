"""The tables put into README.md and docs, between markers that name them."""

import re
from collections.abc import Mapping
from pathlib import Path

from bench import ROOT
from bench.report import tables

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^<!-- (.+) -->\n(?:.*\n)*?<!-- end \1 -->$", re.M)


def filled(texts: Mapping[Path, str], folder: Path) -> dict[Path, str]:
    """Put the results of a folder into the blocks of pages, each of which one page has."""
    parts = tables.parts(folder)
    names = [block[1] for text in texts.values() for block in BLOCK.finditer(text)]
    if sorted(names) != sorted(parts):
        raise ValueError(f"the pages have the blocks {sorted(names)}, not {sorted(parts)}")

    def block(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{parts[match[1]]}\n\n<!-- end {match[1]} -->"

    return {page: BLOCK.sub(block, text) for page, text in texts.items()}


def read() -> dict[Path, str]:
    return {page: page.read_text() for page in PAGES}


def update(folder: Path) -> None:
    for page, text in filled(read(), folder).items():
        page.write_text(text)
