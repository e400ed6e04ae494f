"""The choice of each method's settings on validation images, by the rules of `plans`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd

from bench.training.plans import NONE, Plan
from bench.training.runs import Setting

Lines = list[dict[str, Any]]
Run = Callable[[Sequence[Setting]], list[Lines]]
Tried = list[tuple[float, Setting]]  # validation error in %, best first
Chosen = dict[str, Tried]
TUNED = ("lr", "weight_decay", "weight", "output_weight")


def tune(plan: Plan, run: Run) -> Chosen:
    """Try every method in its settings; `run` trains in a list of settings."""
    if not plan.tuning_seeds:
        raise ValueError("this plan takes the settings of another: it has no seeds for tuning")
    first = _try(plan, plan.first_settings(), run)
    best = [setting for _, setting in first]
    others = [method for method in plan.methods if method != NONE]
    further = {method: plan.further_settings(method, best) for method in others}
    # all at once, so that no process waits at the end of each method
    tried = _try(plan, [setting for method in others for setting in further[method]], run)
    chosen = {NONE: first}
    for method in others:
        chosen[method] = [(error, x) for error, x in tried if x.method == method]
    return chosen


def _try(plan: Plan, settings: Sequence[Setting], run: Run) -> Tried:
    runs = [
        replace(setting, seed=seed, test=False, epochs=plan.tuning_epochs or setting.epochs)
        for setting in settings
        for seed in plan.tuning_seeds
    ]
    lines = run(runs)
    seeds = len(plan.tuning_seeds)
    errors = [
        sum(x[-1]["validation_error"] for x in lines[i * seeds : (i + 1) * seeds]) / seeds
        for i in range(len(settings))
    ]
    return sorted(zip(errors, settings, strict=True), key=lambda entry: entry[0])


def settings(plan: Plan, chosen: dict[str, Setting]) -> list[Setting]:
    """List the runs of the comparison: seed by seed, so that an interrupted plan is balanced."""
    missing = [method for method in plan.methods if method not in chosen]
    if missing:
        raise ValueError(f"no settings were chosen for {', '.join(missing)}")
    return [
        replace(
            plan.base,
            method=method,
            seed=seed,
            **{name: getattr(chosen[method], name) for name in TUNED},
        )
        for seed in plan.seeds
        for method in plan.methods
    ]


def write(chosen: Chosen, file: Path) -> None:
    """Write all that was tried; the first of a method is what was chosen."""
    content = {
        method: [{"validation_error": error, **asdict(setting)} for error, setting in tried]
        for method, tried in chosen.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")


def read(file: Path) -> dict[str, Setting]:
    """Read the chosen setting of each method."""
    content = json.loads(file.read_text())
    chosen = {}
    for method, tried in content.items():
        values = {key: value for key, value in tried[0].items() if key != "validation_error"}
        chosen[method] = Setting(**values)
    return chosen


def table(chosen: Chosen) -> pd.DataFrame:
    """Make a table of all that was tried."""
    return pd.DataFrame(
        [
            {
                "method": method,
                **{name: getattr(setting, name) for name in TUNED},
                "validation error, %": round(error, 2),
                "chosen": "yes" if place == 0 else "",
            }
            for method, tried in chosen.items()
            for place, (error, setting) in enumerate(tried)
        ]
    )
