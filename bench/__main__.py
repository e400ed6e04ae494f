"""The command line of the benchmark: `python -m bench --help`."""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import RESULTS, ROOT, demo
from bench.cases import losses, models, projections, sampled, sweep
from bench.measure import machine
from bench.measure.contest import Rules
from bench.measure.study import LEFT_OVER, Options, Study
from bench.peers import OURS
from bench.report import pages, plots

ALL = (sweep.STUDY, sweep.ACCURACY, models.STUDY, losses.STUDY, projections.STUDY, sampled.STUDY)
STUDIES = {study.name: study for study in ALL}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Energy + gradient beside everything that one would take instead.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, words: str, **options: Any) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=words, description=words, **options)

    common = argparse.ArgumentParser(add_help=False)
    over = f"begin no case after so long; exit status {LEFT_OVER} if something is left over"
    common.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    common.add_argument("--threads", type=int, default=0, metavar="N")
    common.add_argument("--quick", action="store_true", help="a check; results in out/quick")
    common.add_argument("--out", type=Path, metavar="FOLDER", help="default: bench/results")
    common.add_argument("--limit", type=float, metavar="S", help="seconds of a call, at most")
    common.add_argument("--budget-minutes", type=float, default=math.inf, metavar="M", help=over)
    common.add_argument("--resume", action="store_true", help="leave out what this commit has")
    minutes = "about {} minutes on two quiet cores".format
    words = f"all studies, then readme; {minutes(sum(study.minutes for study in ALL))}"
    add("all", words, parents=[common])
    for study in ALL:
        command = add(study.name, f"{study.words}; {minutes(study.minutes)}", parents=[common])
        listed: dict[str, Any] = {"nargs": "+", "default": (), "metavar": "NAME"}
        command.add_argument("--cases", **listed, help=", ".join(study.groups("cpu", False)))
        command.add_argument("--methods", **listed)
    add("readme", "draw bench/results, and put it into README.md and docs")
    demo.add_arguments(add("demo", "the regularizer on a real network"))
    return parser


def options_of(args: argparse.Namespace) -> Options:
    rules = Rules(budget=1.0, rounds=3, limit=10.0) if args.quick else Rules()
    return Options(
        args.device,
        args.threads,
        args.out or (ROOT / "out" / "quick" if args.quick else RESULTS),
        rules._replace(limit=args.limit or rules.limit),
        deadline=time.monotonic() + 60.0 * args.budget_minutes,
        methods=getattr(args, "methods", ()),
        resume=args.resume,
        quick=args.quick,
    )


def measure(study: Study, options: Options, cases: Sequence[str] = ()) -> int:
    """Measure a study with its own number of threads where none is given."""
    threads = options.threads or study.threads or torch.get_num_threads()
    if study is sweep.STUDY and options.device == "cpu":
        machine.measure_peak(options.out)
    return study.measure(options._replace(threads=threads), cases)


def measure_all(options: Options) -> int:
    left = sum(measure(study, options) for study in ALL if options.device in study.devices)
    if options.device == "cpu" and not options.quick:
        # how much faster ours is on all threads
        ours = options._replace(methods=OURS[:1], threads=torch.get_num_threads())
        left += measure(sweep.STUDY, ours, ["main"])
    plots.draw(options.out)
    if options.out == RESULTS:
        pages.update(RESULTS)
    return left


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.command == "demo":
        demo.run(args)
        return 0
    if args.command == "readme":
        plots.draw(RESULTS)
        pages.update(RESULTS)
        return 0
    options, study = options_of(args), STUDIES.get(args.command)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    try:
        if study is not None:
            study.check(args.cases, options)
    except ValueError as error:
        parser.error(str(error))
    left = measure(study, options, args.cases) if study else measure_all(options)
    if left > 0:
        print(f"{left} left over: run again with --resume")
        return LEFT_OVER
    return 0


if __name__ == "__main__":
    sys.exit(main())
