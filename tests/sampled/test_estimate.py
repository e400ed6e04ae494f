"""The error bar of an estimate covers the exact energy as often as it says."""

import math

import pytest
import torch

from comhe_ext import Gaussian, Laplace, Riesz, pair_energy
from comhe_ext.sampled import SamplingPlan, estimate_energy
from comhe_ext.sampled.estimate import _student_quantile
from comhe_ext.testing import random_rows
from comhe_ext.testing.kinds import KINDS, rows_of_kind


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"),
    [
        (0.975, 1, 12.7062),
        (0.975, 7, 2.364624),
        (0.975, 15, 2.131450),
        (0.995, 15, 2.946713),
        (0.975, 1000, 1.962339),
        (0.75, 2, 0.816497),
    ],
)
def test_quantiles_of_student_s_distribution(probability, degrees, quantile):
    # of printed tables
    assert abs(_student_quantile(probability, degrees) / quantile - 1.0) < 1e-5


@pytest.mark.parametrize(
    "pair",
    [
        Riesz(2.0),
        Riesz(0.0),
        Riesz(-1.0),
        Gaussian(2.0),
        Laplace(1.0, angular=True),
        Riesz(1.0, half_space=True),
    ],
    ids=str,
)
def test_energy_and_error_bar(pair):
    rows = rows_of_kind("clusters", 3000, 10).double()
    found = estimate_energy(rows, pair, samples=100, generator=generator())
    exact = float(pair_energy(rows, pair=pair))
    assert abs(found.energy - exact) < 5.0 * found.std_error
    assert found.low < found.energy < found.high
    assert found.energy - found.low == pytest.approx(found.high - found.energy, rel=1e-6)
    assert 0.0 < found.std_error < 1e-3 * abs(exact)
    wider = estimate_energy(rows, pair, samples=100, confidence=0.999, generator=generator())
    assert wider.energy == found.energy
    assert wider.low < found.low


def test_a_partition_of_one_block_is_exact():
    rows = random_rows(100, 5)
    found = estimate_energy(rows)
    exact = float(pair_energy(rows))
    assert found == (exact, 0.0, exact, exact, 0)
    assert estimate_energy(rows[:1]).energy == 0.0


def test_a_plan_is_taken_as_it_is():
    rows = rows_of_kind("near-duplicates", 1000, 10)
    plan = SamplingPlan.from_rows(rows, 3, 3, generator=generator())
    found = estimate_energy(rows, samples=100, plan=plan, generator=generator())
    again = estimate_energy(rows, samples=100, plan=plan, generator=generator())
    assert found == again
    assert found.listed_pairs == len(plan.listed.i) >= 10


def test_pairs_that_trees_may_have_missed_widen_the_interval():
    rows = rows_of_kind("words", 2000, 20)
    found = estimate_energy(rows, samples=200, generator=generator())
    half = (found.high - found.low) / 2.0
    assert half > _student_quantile(0.975, 15) * found.std_error
    without = SamplingPlan.from_rows(rows, trees=0, generator=generator())
    bare = estimate_energy(rows, samples=200, plan=without, generator=generator())
    half = (bare.high - bare.low) / 2.0
    assert half == pytest.approx(_student_quantile(0.975, 15) * bare.std_error)


def test_nan_and_half_precision():
    rows = random_rows(300, 5)
    rows[3, 3] = math.nan
    assert math.isnan(estimate_energy(rows, samples=50).energy)
    half = rows_of_kind("clusters", 1000, 10).half()
    exact = float(pair_energy(half))
    found = estimate_energy(half, samples=100, generator=generator())
    assert abs(found.energy - exact) < 5.0 * found.std_error


def test_progress_is_shown(capsys):
    pytest.importorskip("tqdm")
    estimate_energy(random_rows(300, 5), samples=50, partitions=3, progress=True)
    shown = capsys.readouterr().err
    assert "near pairs: 100%" in shown
    assert "partitions: 100%" in shown


def test_mistakes_are_told():
    rows = random_rows(300, 5)
    plan = SamplingPlan.from_rows(rows[:200])
    for options, error, words in (
        ({"samples": 1}, ValueError, "`samples`"),
        ({"partitions": 1}, ValueError, "`partitions`"),
        ({"partitions": 2.0}, TypeError, "`partitions`"),
        ({"confidence": 1.0}, ValueError, "`confidence`"),
        ({"confidence": "high"}, TypeError, "`confidence`"),
        ({"trees": 1}, ValueError, "`trees`"),
        ({"degree": 7}, ValueError, "`degree`"),
        ({"pair": 2.0}, TypeError, "`pair`"),
        ({"plan": plan}, ValueError, "`plan` was made from 200 rows"),
        ({"plan": 3}, TypeError, "`plan`"),
        ({"generator": 3}, TypeError, "`generator`"),
    ):
        with pytest.raises(error, match=words):
            estimate_energy(rows, **{"samples": 50, **options})
    with pytest.raises(ValueError, match="2-D"):
        estimate_energy(rows[None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.long
def test_coverage(kind):
    # intervals of independent plans and partitions, other ones for each kind
    rows = rows_of_kind(kind, 2048, 16)
    exact = float(pair_energy(rows.double()))
    first, covered = 1000 * list(KINDS).index(kind), 0
    for seed in range(first, first + 200):
        found = estimate_energy(rows, samples=64, generator=generator(seed))
        covered += found.low <= exact <= found.high
    assert covered >= 0.93 * 200
    if kind != "words":  # whose missed pairs widen the intervals
        assert covered <= 0.99 * 200
