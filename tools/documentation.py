"""Hooks of mkdocs, which make the site of the documentation: `make docs`.

Pages link to files as the repository has them, so that they can be read there, too. Here the links
are turned to where the site has these files: README.md is its first page, CONTRIBUTING.md and
CHANGELOG.md are pages, examples and pictures lie beside the pages.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# files of the repository that are pages of the site, though they do not lie in docs/
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
# what pages link to or show, and the site takes as it is
ASSETS = ("examples/**/*.py", "bench/results/**/*.png")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of docs/."""
    assets = [path for pattern in ASSETS for path in ROOT.glob(pattern)]
    paths = {ROOT / source: uri for source, uri in PAGES.items()}
    paths |= {path: path.relative_to(ROOT).as_posix() for path in assets}
    for path, uri in paths.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn relative links of the repository to those of the site."""
    uri = page.file.src_uri
    source = {uri: source for source, uri in PAGES.items()}.get(uri, f"docs/{uri}")

    def turned(match: re.Match[str]) -> str:
        target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        site = PAGES.get(path, path.removeprefix("docs/"))
        return f"]({posixpath.relpath(site, posixpath.dirname(uri) or '.')}{anchor})"

    return re.sub(r"\]\((?!https?:|mailto:)([^)#\s]+)((?:#[^)\s]*)?)\)", turned, markdown)


class LiteralBlocks(griffe.Extension):
    """Make the blocks after `::` in docstrings blocks of Python, as Markdown knows them."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = with_fences(obj.docstring.value)


def with_fences(text: str) -> str:
    """Fence each indented block that follows a line ending in `::`."""

    def fenced(match: re.Match[str]) -> str:
        code = re.sub("^    ", "", match[2], flags=re.M).rstrip()
        return f"{match[1]}:\n\n```python\n{code}\n```\n\n"

    return re.sub(r"^(\S.*?)::\n\n((?:    .*\n|\n)+)", fenced, text + "\n", flags=re.M).rstrip()
