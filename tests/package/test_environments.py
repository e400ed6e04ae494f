"""What the tools that try versions and installations do without downloading PyTorch."""

import sys
from pathlib import Path

import pytest

# the folder tools/ belongs to the checkout and is not installed
sys.path.append(str(Path(__file__).resolve().parents[2]))

from tools import environments, install, versions

PAGE = """# Which versions work

<!-- versions -->
| PyTorch | Python | passed |
|---|---|---:|
| 2.8.0 | 3.11.7 | 1 |
| 2.11.0 | 3.10.13 | 2 |
<!-- end of versions -->

The rest.
"""


@pytest.mark.parametrize(
    ("cells", "rows"),
    [
        (
            ("2.9.1", "3.11.7", "3"),
            ["2.8.0 | 3.11.7 | 1", "2.9.1 | 3.11.7 | 3", "2.11.0 | 3.10.13 | 2"],
        ),
        (("2.8.0", "3.11.7", "3"), ["2.8.0 | 3.11.7 | 3", "2.11.0 | 3.10.13 | 2"]),
        (
            ("2.8.0", "3.10.13", "3"),
            ["2.8.0 | 3.10.13 | 3", "2.8.0 | 3.11.7 | 1", "2.11.0 | 3.10.13 | 2"],
        ),
    ],
)
def test_a_row_takes_the_place_of_an_earlier_one(cells, rows, tmp_path, monkeypatch):
    page = tmp_path / "versions.md"
    page.write_text(PAGE)
    monkeypatch.setattr(environments, "PAGE", page)
    environments.write_row("versions", cells, key=(0, 1))
    head, _, tail = PAGE.partition("| 2.8.0")
    tail = tail[tail.index("<!-- end") :]
    assert page.read_text() == head + "".join(f"| {row} |\n" for row in rows) + tail


def test_the_page_has_both_tables(tmp_path, monkeypatch):
    page = tmp_path / "versions.md"
    page.write_text(environments.PAGE.read_text())
    monkeypatch.setattr(environments, "PAGE", page)
    for table in ("versions", "installs"):
        environments.write_row(table, ("0.0", "written"), key=(0,))
    assert page.read_text().count("| 0.0 | written |") == 2


def test_a_version_that_cannot_be_made_leaves_the_others(monkeypatch):
    def run(*command):
        if "wheel" in command:
            folder = Path(command[command.index("--wheel-dir") + 1])
            (folder / "comhe_ext-0.whl").touch()

    def make_environment(folder, python, torch):
        if python == "no-such-python":
            raise FileNotFoundError(python)
        return folder

    def outcome(programs, version, tests, folder):
        return versions.Outcome(version.torch, "3.7.1", "3.11.7", "yes", 1, [], 0)

    rows = []
    monkeypatch.setattr(versions, "run", run)
    monkeypatch.setattr(versions, "make_environment", make_environment)
    monkeypatch.setattr(versions, "test", outcome)
    monkeypatch.setattr(versions, "write_row", lambda table, cells, key: rows.append(cells[0]))
    monkeypatch.setattr(sys, "argv", ["versions", "2.8.0:no-such-python", "2.13.0"])
    with pytest.raises(SystemExit, match=r"2\.8\.0: no-such-python"):
        versions.main()
    assert rows == ["2.13.0"]


def test_the_example_imports_all_it_uses():
    exec(install.first_example(), {})
