"""What a plan knows of its rows: the near pairs, and how often each cosine is met."""

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import normalize

from comhe_ext import Gaussian, Riesz
from comhe_ext import hyperspherical_energy as energy_of
from comhe_ext.sampled import SamplingPlan
from comhe_ext.sampled.near_list import PAIRS_OF_ROW, find_near
from comhe_ext.testing import collapsed_rows, random_rows
from comhe_ext.testing.kinds import rows_of_kind


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pairs_of(listed):
    return set(zip(listed.i.tolist(), listed.j.tolist(), strict=True))


def near_pairs(rows, cosine):
    """All of them, by brute force."""
    unit = normalize(rows.double())
    i, j = ((unit @ unit.T).abs().triu(1) > cosine).nonzero().unbind(1)
    return set(zip(i.tolist(), j.tolist(), strict=True))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_four_trees_find_near_duplicates(sign):
    rows = rows_of_kind("near-duplicates", 5000, 20)
    rows[-50:] *= sign
    every = near_pairs(rows, 0.99)
    assert len(every) == 50
    found = pairs_of(find_near(rows, 4, generator()))
    assert len(every & found) >= 0.99 * len(every)


@pytest.mark.parametrize("kind", ["tight", "words", "cone"])
def test_listed_pairs_are_near_and_listed_once(kind):
    rows = rows_of_kind(kind, 3000, 20)
    listed = find_near(rows, 4, generator())
    assert (listed.i < listed.j).all()
    pairs = pairs_of(listed)
    assert 0 < len(pairs) == len(listed.i) <= PAIRS_OF_ROW * 3000
    assert pairs <= near_pairs(rows, 0.9 - 1e-6)
    assert listed.trees.min() >= 1
    assert listed.trees.max() <= 4


def test_of_few_rows_one_tree_finds_all():
    # a single leaf holds them
    rows = rows_of_kind("cone", 200, 20)
    assert pairs_of(find_near(rows, 1, generator())) == near_pairs(rows, 0.9)


def test_the_nearest_of_too_many_pairs_are_kept():
    rows = collapsed_rows(200, 5, 0.1)
    listed = find_near(rows, 2, generator())
    assert len(listed.i) == PAIRS_OF_ROW * 200
    unit = normalize(rows)
    cosines = unit @ unit.T
    threshold = cosines[listed.i, listed.j].min()
    assert len(near_pairs(rows, float(threshold) + 1e-6)) <= PAIRS_OF_ROW * 200
    assert find_near(rows[:1], 2).i.numel() == find_near(rows, 0).i.numel() == 0
    # equal rows have no nearest ones, but no more pairs either
    assert find_near(collapsed_rows(1000, 5, 0.0), 4, generator()).i.numel() <= PAIRS_OF_ROW * 1000


def test_rows_that_are_dead_or_nan_are_no_near_ones():
    rows = random_rows(600, 10)
    rows[3:9] = 0.0
    rows[9:300] = torch.nan
    listed = find_near(rows, 3, generator())
    assert not any(3 <= x < 300 for pair in pairs_of(listed) for x in pair)


def test_state_survives_a_file(tmp_path):
    rows = rows_of_kind("words", 1000, 10)
    plan = SamplingPlan.from_rows(rows, 3, 2, generator=generator())
    torch.save(plan.state_dict(), tmp_path / "plan.pt")
    other = SamplingPlan.from_rows(random_rows(20, 3))
    other.load_state_dict(torch.load(tmp_path / "plan.pt", weights_only=True))
    assert repr(other) == repr(plan)
    assert "1000 rows, degree 3" in repr(plan)
    for pair in (Riesz(2.0), Gaussian(1.0, half_space=True)):
        assert other.polynomial(pair) == plan.polynomial(pair)
    options = {"method": "sampled", "samples": 50}
    assert torch.equal(
        energy_of(rows, plan=other, generator=generator(1), **options),
        energy_of(rows, plan=plan, generator=generator(1), **options),
    )


def test_refresh_is_a_new_plan_of_the_same_kind():
    plan = SamplingPlan.from_rows(random_rows(100, 5), 3, 2, generator=generator())
    rows = rows_of_kind("words", 300, 8)
    plan.refresh(rows, generator=generator(1))
    anew = SamplingPlan.from_rows(rows, 3, 2, generator=generator(1))
    assert repr(plan) == repr(anew)
    assert torch.equal(plan.cosines, anew.cosines)
    assert torch.equal(plan.listed.i, anew.listed.i)
    assert energy_of(rows, method="sampled", samples=50, plan=plan).isfinite()


@pytest.mark.parametrize("n", [0, 1, 2])
def test_plans_of_few_rows(n):
    plan = SamplingPlan.from_rows(random_rows(n, 4))
    assert plan.num_rows == n
    assert float(energy_of(random_rows(n, 4), method="sampled", plan=plan)) >= 0.0


def test_plans_take_every_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        rows = rows_of_kind("near-duplicates", 500, 8).to(dtype)
        with torch.inference_mode():
            plan = SamplingPlan.from_rows(rows, generator=generator())
        assert len(plan.listed.i) >= 5
        x = rows.clone().requires_grad_()
        energy_of(x, method="sampled", samples=50, plan=plan).backward()
        assert x.grad.isfinite().all()


def test_progress_is_shown(capsys):
    pytest.importorskip("tqdm")
    SamplingPlan.from_rows(random_rows(50, 4), progress=True)
    SamplingPlan.from_rows(random_rows(50, 4), progress="looking")
    shown = capsys.readouterr().err
    assert "near pairs: 100%" in shown
    assert "looking: 100%" in shown
    assert "4/4" in shown


def test_mistakes_are_told():
    rows = random_rows(20, 4)
    plan = SamplingPlan.from_rows(rows)
    for call, error, words in (
        (lambda: SamplingPlan.from_rows(rows[None]), ValueError, "`rows` must be 2-D"),
        (lambda: SamplingPlan.from_rows([1.0]), TypeError, "`rows`"),
        (lambda: SamplingPlan.from_rows(rows.int()), TypeError, "`rows`"),
        (lambda: SamplingPlan.from_rows(rows, degree=5), ValueError, "`degree` must be at most 4"),
        (lambda: SamplingPlan.from_rows(rows, degree=-1), ValueError, "`degree`"),
        (lambda: SamplingPlan.from_rows(rows, trees=1.5), TypeError, "`trees`"),
        (lambda: plan.refresh(rows[None]), ValueError, "`rows` must be 2-D"),
        (lambda: plan.load_state_dict({"degree": 2}), ValueError, "lacks 'cosines'"),
    ):
        with pytest.raises(error, match=words):
            call()


PROGRAM = """
import re, resource
from pathlib import Path
import torch
from comhe_ext import hyperspherical_energy
from comhe_ext.sampled import SamplingPlan, estimate_energy

def written():
    return int(re.search(r"VmData:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def work(rows):
    plan = SamplingPlan.from_rows(rows)
    weight = rows.clone().requires_grad_()
    hyperspherical_energy(weight, method="sampled", plan=plan).backward()
    estimate_energy(rows, plan=plan, partitions=2)

torch.set_num_threads(1)
work(torch.randn(3000, 40))  # what is made once
rows = torch.randn(200_000, 40)
rows[100_000:102_000] = rows[:2000] + 0.01
limit = written() + BUDGET
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
work(rows)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of writable memory")
def test_memory_grows_with_the_rows_alone():
    # 16 times the rows; a matrix of their cosines would take 5,000 times as much
    program = PROGRAM.replace("BUDGET", str(16 * 200_000 * 40 * 4))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
