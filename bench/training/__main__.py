"""Train on CIFAR-100 with and without the regularizers.

    python -m bench.training tune small --images FOLDER     choose each method's settings
    python -m bench.training run small --images FOLDER      the comparison, with the chosen ones
    python -m bench.training cost small                     a step's time, beside naive code
    python -m bench.training report small                   its table, differences and pictures
    python -m bench.training one --images FOLDER --method RP-CoMHE --weight 10 ...

Each call goes on where an interrupted one stopped; several processes share the runs.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.measure.study import Options
from bench.training import report, tuning
from bench.training.cost import STUDY
from bench.training.methods import METHODS
from bench.training.plans import PLANS
from bench.training.pool import images, run_all
from bench.training.runs import Setting, train

RESULTS = Path(__file__).parents[1] / "results" / "training"


def tune(options: argparse.Namespace) -> None:
    folder = options.results / options.plan
    chosen = tuning.tune(
        PLANS[options.plan],
        lambda settings: run_all(
            settings, options.images, folder / "tuning", options.jobs, options.device
        ),
    )
    tuning.write(chosen, folder / "chosen.json")
    print(report.as_text(tuning.table(chosen)))


def run(options: argparse.Namespace) -> None:
    plan, folder = PLANS[options.plan], options.results / options.plan
    source = options.results / (options.plan if plan.tuning_seeds else "small") / "chosen.json"
    if not source.exists():
        sys.exit(f"{source} is missing: run `python -m bench.training tune {source.parent.name}`")
    settings = tuning.settings(plan, tuning.read(source))
    run_all(settings, options.images, folder / "runs", options.jobs, options.device)
    report.report(folder)


def cost(options: argparse.Namespace) -> None:
    STUDY.measure(Options("cpu", 1, options.results), [options.plan])


def one(options: argparse.Namespace) -> None:
    given = {field.name: getattr(options, field.name) for field in fields(Setting)}
    setting = Setting(**given)
    with tqdm(total=setting.epochs, unit="epoch", disable=None, desc=setting.name) as bar:

        def show(line: dict[str, Any]) -> None:
            bar.update()
            bar.set_postfix(loss=line["loss"], train_error=line["train_error"])

        lines = train(
            setting,
            lambda: images(options.images, setting.size),
            options.results / "one",
            show,
            options.device,
        )
    print({key: value for key, value in lines[-1].items() if key not in given})


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, call: Callable[[argparse.Namespace], None], help: str) -> Any:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(call=call)
        command.add_argument(
            "--results", type=Path, default=RESULTS, help="folder of results, %(default)s"
        )
        return command

    def needs_images(command: argparse.ArgumentParser) -> None:
        command.add_argument("--images", type=Path, required=True, help="folder of CIFAR-100")
        command.add_argument("--device", default="cpu", help="or cuda, %(default)s")

    for name, call, help in (
        ("tune", tune, "Choose each method's settings on validation images."),
        ("run", run, "Train with the chosen settings and the seeds of the plan."),
    ):
        command = add(name, call, help)
        command.add_argument("plan", choices=PLANS)
        needs_images(command)
        command.add_argument("--jobs", type=int, default=2, help="runs at a time")
    for name, call, help in (
        ("cost", cost, "Time a step of each method, beside the same written by hand."),
        (
            "report",
            lambda options: report.report(options.results / options.plan),
            "Make the table, the differences and the pictures of a plan's runs.",
        ),
    ):
        add(name, call, help).add_argument("plan", choices=PLANS)
    command = add("one", one, "Train once.")
    needs_images(command)
    for field in fields(Setting):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        if isinstance(default, bool):
            command.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        elif field.name == "method":
            command.add_argument(flag, choices=METHODS, default=default)
        else:
            command.add_argument(flag, type=type(default), default=default, help="%(default)s")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    try:
        options.call(options)
    except (FileNotFoundError, ValueError) as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main()
