"""The calls in the table of docs/losses.md work, and every loss is in it."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import comhe_ext
from comhe_ext import losses
from comhe_ext.testing import random_rows

PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()


def rows_of_the_table():
    table = PAGE.partition("## Table of systems")[2].partition("\n## ")[0]
    lines = [x for x in table.splitlines() if x.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def calls():
    for cells in rows_of_the_table():
        yield pytest.param(cells[2].strip("`"), id=cells[0])
        # what the notes call, too
        for call in re.findall(r"`([^`]+)`", f"{cells[1]} {cells[4]}"):
            if "(" in call and not call.startswith(("help(", "Riesz(", "Gaussian(")):
                yield pytest.param(call, id=f"{cells[0]}: {call}")


@pytest.mark.filterwarnings("ignore:CoMHE takes layer:UserWarning")
@pytest.mark.parametrize("call", list(calls()))
def test_it_works(call):
    names = {
        **{name: getattr(comhe_ext, name) for name in comhe_ext.__all__},
        "comhe_ext": comhe_ext,
        "kcl": losses.kcl,
        "mean_cosine": losses.mean_cosine,
        "math": math,
        "normalize": normalize,
        "model": torch.nn.Sequential(torch.nn.Linear(9, 60), torch.nn.Linear(60, 5)),
        "t": 2.0,
        "w": random_rows(12, 6),
        "pole": random_rows(1, 6, seed=1)[0],
        "x": random_rows(8, 6, seed=2),
        "y": random_rows(8, 6, seed=3),
        "z": random_rows(2 * 7, 6, seed=4).view(2, 7, 6),
        "z_teacher": random_rows(2 * 7, 9, seed=5).view(2, 7, 9),
        "weight": random_rows(5, 6, seed=6),
        "labels": torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]),
    }
    result = eval(call, names)
    assert result.isfinite().all()


def test_every_loss_is_in_it():
    for name in losses.__all__:
        if name.islower():
            assert f"losses.{name}(" in PAGE, name
