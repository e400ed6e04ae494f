"""The table of docs/distributed.md is the one that its numbers give."""

import sys
from pathlib import Path

import pytest

# the folder tools/ belongs to the checkout and is not installed
sys.path.append(str(Path(__file__).resolve().parents[2]))

from tools import scaling


def test_the_page_has_the_table():
    assert f"\n\n{scaling.table()}\n\n" in scaling.PAGE.read_text()


def test_closed_forms():
    """10^6 rows on 8 GPUs: each takes 10^12 / 8 pairs, and gets 7 / 8 of 160 MB at 450 GB/s."""
    name, *numbers = scaling.exact(10**6, 8)
    assert name == "ring"
    assert numbers == pytest.approx([0.125, 140e6 / 450e9, 140e6, 80e6])
    name, kernels, *_ = scaling.exact(10**6, 512)
    assert name == "gather"
    assert kernels == pytest.approx(1e12 / 512 / 1e12)
    # 1024 * 10^6 / 8 pairs, and 40 passes over 20 MB
    _, kernels, _, received, _ = scaling.sampled(10**6, 8)
    assert kernels == pytest.approx(1.28e8 / 1e12 + 8e8 / 2e12)
    assert received == 160 * 1024 + 16 * (820 + 40 + 1)
