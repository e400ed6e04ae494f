"""The site of the documentation builds without a warning, and every public name is in it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

import comhe_ext
from comhe_ext import distributed, losses, projections, sampled

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_every_public_name_has_its_place():
    pages = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    found = set(re.findall(r"^::: ([\w.]+)$", pages, re.M))
    public = [x for x in comhe_ext.__all__ if not isinstance(getattr(comhe_ext, x), ModuleType)]
    names = {
        "comhe_ext": public,
        "comhe_ext.distributed": distributed.__all__,
        "comhe_ext.losses": [name for name in losses.__all__ if name.islower()],
        "comhe_ext.projections": [name for name in projections.__all__ if name[0].isupper()],
        "comhe_ext.sampled": sampled.__all__,
    }
    assert {f"{module}.{name}" for module in names for name in names[module]} - found == set()


def test_it_builds(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    # strict: a broken link, a missing anchor and a page outside of the navigation are errors
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    texts = {path.parent: path.read_text() for path in tmp_path.rglob("index.html")}

    sources = {path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md")}
    sources |= {Path("."), Path("contributing"), Path("changelog")}
    assert {folder.relative_to(tmp_path) for folder in texts} == sources

    for folder, text in texts.items():
        # what mkdocs does not look at: pictures and links written in HTML
        for target in re.findall(r'(?:src|srcset|href)="([^"#?]+)', text):
            if not re.match(r"\w+:", target):
                assert (folder / unquote(target)).resolve().exists(), (folder, target)
        # nothing is fetched from elsewhere
        assert not re.search(r'<(?:script|img|link|source)\b[^>]*"https?://', text), folder
        # a docstring's literal blocks and sections were understood, outside of what is code
        words = re.sub(r"<(code|pre)\b.*?</\1>", "", text, flags=re.S)
        assert not re.search(r"\w::\s*</p>|\bArgs:", words), folder
