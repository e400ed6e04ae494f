"""The tables put into README.md and docs, between markers that name a part."""

import re
from collections.abc import Mapping
from pathlib import Path

from bench import ROOT
from bench.report import tables

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def filled(texts: Mapping[Path, str], folder: Path) -> dict[Path, str]:
    """Put the results of a folder into the blocks of pages; ValueError where one is missing."""
    parts = tables.parts(folder)
    made = dict(texts)
    for name, part in parts.items():
        pages = [page for page in texts if f"<!-- {name} -->\n" in texts[page]]
        if len(pages) != 1:
            raise ValueError(f"one page must have the block {name!r}, {len(pages)} have it")
        (page,) = pages
        pattern = rf"(?<=^<!-- {name} -->\n).*?(?=^<!-- end {name} -->$)"
        text = f"\n{part}\n\n".replace("\\", r"\\")  # which re.subn reads
        made[page], count = re.subn(pattern, text, made[page], flags=re.S | re.M)
        if count != 1:
            raise ValueError(f"{page.name} must have the block {name!r} once, with an end")
    for page, text in texts.items():
        if unknown := set(re.findall(r"^<!-- end (?!of )(.+) -->$", text, re.M)) - set(parts):
            raise ValueError(f"{page.name} has the unknown blocks {', '.join(sorted(unknown))}")
    return made


def read() -> dict[Path, str]:
    return {page: page.read_text() for page in PAGES}


def update(folder: Path) -> None:
    for page, text in filled(read(), folder).items():
        page.write_text(text)


def stale(folder: Path) -> list[str]:
    """Name the pages that differ from the results."""
    texts = read()
    return [page.name for page, text in filled(texts, folder).items() if text != texts[page]]
