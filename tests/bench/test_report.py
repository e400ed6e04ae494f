"""The tables and pictures show what the results say, also where others are faster."""

import math
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

# it belongs to the checkout and is not installed; last, so that the checkout hides no package
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench import RESULTS, ROOT
from bench.cases import losses, projections, sweep
from bench.measure import machine
from bench.report import pages, plots, tables


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Made-up results of a few methods: at 4 ns a pair we are 3 times slower than row blocks."""
    folder = tmp_path_factory.mktemp("results")
    stamp = machine.stamp("cpu", 1)
    groups, rows = sweep.groups("cpu", False), {}
    for case in [*groups["main"], *groups["scaling"], *groups["modes"]]:
        shape = sweep.shape_of(case)
        for name, nanoseconds in (("comhe-cpu", 4.0), ("row-blocks", 1.25), ("naive", 100.0)):
            time = shape.pairs * nanoseconds * 1e-6
            row = {**case, "method": name}
            if name == "naive" and shape.rows > 20_000:
                row |= {"status": "out of memory", "note": "needs about 99 GiB"}
            else:
                row |= {"status": "ok", "wall_ms": time, "cpu_ms": time, "peak_mib": 1.0}
                row |= {"wall_min_ms": time, "wall_max_ms": time, "first_s": time}
                row |= {"value_error": 1e-8, "gradient_error": 3e-7}
            rows[shape, case["mode"], name] = stamp | row
    sweep.STUDY.table.upsert(folder, rows.values())
    later = {"machine": "another", "date": "9999", "flops": 1.0}
    machine.PEAKS.upsert(folder, [stamp | {"flops": 1e11}, stamp | later])
    errors = [
        stamp
        | {"case": case, "method": name, "status": "ok", "value": 0.5, "value_error": 1e-8}
        | {"gradient_error": float("inf") if case == "1e-4 rad" and name == "naive" else 1e-6}
        for case in sweep.CLOSE
        for name in ("comhe-cpu", "naive")
    ]
    sweep.ACCURACY.table.upsert(folder, errors)
    return folder


def squeezed(table):
    """A table without the spaces that align its cells."""
    return re.sub(" +", " ", table)


def test_plots_need_nothing_but_the_results(results):
    written = plots.draw(results)
    assert [path.name for path in written] == ["sweep-cpu.png"]
    first = {path: path.read_bytes() for path in written}
    for path, picture in first.items():
        assert len(picture) < 120_000, path
        with Image.open(path) as image:
            assert image.width > 1200
            assert len(image.convert("L").getcolors()) > 8
    again = plots.draw(results)
    assert {path: path.read_bytes() for path in again} == first


def test_a_few_results_make_fewer_pictures(results, tmp_path):
    rows = sweep.STUDY.table.read(results)
    few = rows[rows["rows"] == 512].to_dict("records")
    sweep.STUDY.table.upsert(tmp_path, few)
    assert [path.name for path in plots.draw(tmp_path)] == ["sweep-cpu.png"]
    assert plots.draw(tmp_path / "empty") == []


def test_tables_show_where_others_are_faster(results):
    parts = {name: squeezed(text) for name, text in tables.parts(results).items()}
    # 6 k flop a pair in 4 ns, of 100 Gflop/s
    assert "| 4,096 × 30 | 33.5 | 45 | 25× | **0.312×** |" in parts["speed cpu"]
    assert "| 4,096 × 30, second order | 33.5 | | 25× | **0.312×** |" in parts["speed cpu"]
    assert "| 4,096 × 30 | 33.5 | 45 | 25× | **0.312×** |" in parts["shapes"]
    assert parts["speed cuda"] == tables.NOTHING
    assert "| naive PyTorch | 839 | 839 | 839 | 839 | 1 | 1e-08 | 3e-07 |" in parts["methods"]
    assert "| naive PyTorch | 1e-06 | 1e-06 | 1e-06 | 1e-06 | not finite |" in parts["accuracy"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_energy_that_is_no_number_is_not_finite(results, tmp_path, value):
    rows = sweep.ACCURACY.table.read(results)
    sweep.ACCURACY.table.upsert(tmp_path, rows.assign(value=value).to_dict("records"))
    text = squeezed(tables.parts(tmp_path)["accuracy"])
    assert "| naive PyTorch | 1e-06 | 1e-06 | 1e-06 | 1e-06 | not finite |" in text


def test_the_table_shows_how_much_faster_two_threads_are(results, tmp_path):
    rows = sweep.STUDY.table.read(results)
    two = rows[rows.method == "comhe-cpu"].assign(threads=2, wall_ms=lambda x: x.wall_ms / 1.9)
    sweep.STUDY.table.upsert(tmp_path, rows.to_dict("records"))
    sweep.STUDY.table.upsert(tmp_path, two.to_dict("records"))
    assert "| 4,096 × 30 | 33.5 | 1.9× | 25× |" in squeezed(tables.parts(tmp_path)["shapes"])


def test_the_table_of_losses_shows_which_method_is_faster(tmp_path):
    stamp = machine.stamp("cpu", 1) | {"loss": "koleo", "shape": "256x128"}
    rows = [
        stamp | {"method": method, "status": "ok", "cpu_ms": time, "peak_mib": 2.0}
        for method, time in (("comhe_ext", 4.0), ("dense", 12.0), ("published", 2.0))
    ]
    rows.append(stamp | {"method": "row-blocks", "status": "out of memory"})
    losses.STUDY.table.upsert(tmp_path, rows)
    text = squeezed(tables.parts(tmp_path)["losses"])
    assert "| loss | shape | comhe_ext | dense | row-blocks | published |" in text
    line = next(line for line in text.splitlines() if "koleo" in line)
    cells = "| koleo | 256x128 | 4 ms, 2 MiB | 3×, 2 MiB | memory | **0.5×**, 2 MiB |"
    assert line == cells


def test_sampled_energies_are_shown_as_parts_of_the_exact_one(tmp_path):
    stamp, study = machine.stamp("cpu", 1) | {"status": "ok"}, projections.STUDY
    rows = [
        stamp | {"what": what, "of": "vit-b", "method": method, "cpu_ms": time}
        for what, method, time in (
            ("projections", "gaussian 20", 20.0),
            ("projections", "fourier 20", 5.0),
            ("step", "gaussian 20", 100.0),
        )
    ]
    study.table.upsert(tmp_path, rows)
    parts = tables.parts(tmp_path)
    assert parts["sampled steps"] == parts["sampled gradients"] == tables.NOTHING
    assert "| gaussian 20 | 20 | 100 |" in squeezed(parts["projections"])
    rows.append(rows[-1] | {"method": "fourier 20, blocks of 64", "cpu_ms": 25.0})
    rows += [
        stamp | {"what": "error", "of": "512 x 512", "method": method, "gradient_error": off}
        for method, off in (("gaussian 20", 2.0), ("gaussian 20, blocks of 64", 2.5))
    ]
    study.table.upsert(tmp_path, rows)
    parts = {name: squeezed(text) for name, text in tables.parts(tmp_path).items()}
    # the pairs take 100 - 20 of the exact step, and 25 - 5 of the sampled one
    assert "| fourier 20, blocks of 64 | 0.25 | 0.25 |" in parts["sampled steps"]
    assert "| gaussian 20, blocks of 64 | 1.25 |" in parts["sampled gradients"]


def test_pages_are_rewritten_between_their_markers_only(results):
    readme, page = ROOT / "README.md", ROOT / "docs" / "limits.md"
    blocks = [f"<!-- {name} -->\nold\n<!-- end {name} -->\n" for name in tables.parts(results)]
    texts = {readme: f"a\n{''.join(blocks[:3])}b\n", page: f"{''.join(blocks[3:])}c\n"}
    once = pages.filled(texts, results)
    assert once[readme].startswith("a\n<!-- shapes -->\n\n")
    assert "old" not in once[readme] + once[page]
    assert once[readme].endswith("-->\nb\n")
    assert once[page].endswith("-->\nc\n")
    assert pages.filled(once, results) == once
    cut = texts[readme].replace("<!-- methods -->\nold\n<!-- end methods -->\n", "")
    endless = texts[readme].replace("<!-- end methods -->\n", "")
    twice = texts[readme] + blocks[0]
    unknown = texts[readme] + "<!-- magic -->\n<!-- end magic -->\n"
    for wrong in (cut, endless, twice, unknown):
        with pytest.raises(ValueError, match=r"the pages have the blocks .* not"):
            pages.filled({**texts, readme: wrong}, results)


def test_pages_hold_the_committed_results():
    texts = pages.read()
    stale = [p.name for p, text in pages.filled(texts, RESULTS).items() if text != texts[p]]
    assert stale == [], "run python -m bench readme"
    for page, text in texts.items():
        for picture in re.findall(r"\]\(([^)]*bench/results/plots/[^)]+)\)", text):
            assert (page.parent / picture).exists(), "run python -m bench readme"
