"""Runs side by side, each in a process of a pool.

Apart from the command: the processes import this module, and they cannot import a package's
`__main__`.
"""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.measure.worker import end_with_parent
from bench.training import data
from bench.training.runs import Setting, train


@lru_cache(maxsize=1)
def images(folder: Path, size: int) -> tuple[data.Images, data.Images]:
    return data.load(folder, size)


def _run(setting: Setting, source: Path, folder: Path, device: str) -> list[dict[str, Any]]:
    """Train in a process of a pool: one thread, so that the runs beside it keep theirs."""
    torch.set_num_threads(1)
    return train(setting, lambda: images(source, setting.size), folder, device=device)


def run_all(
    settings: Sequence[Setting], source: Path, folder: Path, jobs: int, device: str
) -> list[list[dict[str, Any]]]:
    """Train in all `settings`, `jobs` at a time, with a progress bar; return the lines of each."""
    context = multiprocessing.get_context("spawn")
    bar = tqdm(total=len(settings), unit="run", disable=None, desc=folder.name)
    with (
        bar,
        ProcessPoolExecutor(jobs, mp_context=context, initializer=end_with_parent) as pool,
    ):
        runs = [pool.submit(_run, setting, source, folder, device) for setting in settings]
        for run in runs:
            run.add_done_callback(lambda _: bar.update())
        return [run.result() for run in runs]
