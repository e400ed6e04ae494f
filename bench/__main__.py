"""The command line of the benchmark: `python -m bench --help`."""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
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


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, got {text!r}")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Energy + gradient beside everything that one would take instead.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, words: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=words, description=words)

    minutes = sum(study.minutes for study in ALL)
    add_measuring(add("all", f"all studies, then plot and readme; about {minutes} minutes"))
    for study in ALL:
        command = add(study.name, f"{study.words}; about {study.minutes} minutes")
        add_measuring(command, study.devices)
        form = ["SETSxROWSxDIM"] if study.parse else []
        listed: dict[str, Any] = {"nargs": "+", "default": (), "metavar": "NAME"}
        names = ", ".join([*study.groups("cpu", False), *form])
        command.add_argument("--cases", **listed, help=names)
        command.add_argument("--methods", **listed)
    command = add("plot", "draw the results")
    command.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    command = add("readme", "put bench/results into README.md and docs")
    command.add_argument("--check", action="store_true", help="change nothing, fail if it would")
    demo.add_arguments(add("demo", "the regularizer on a real network"))
    return parser


def add_measuring(
    command: argparse.ArgumentParser, devices: Sequence[str] = ("cpu", "cuda")
) -> None:
    over = f"begin no case after so long; exit status {LEFT_OVER} if something is left over"
    command.add_argument("--device", choices=devices, default="cpu")
    command.add_argument("--threads", type=count, metavar="N")
    command.add_argument("--quick", action="store_true", help="a check; results in out/quick")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="default: bench/results")
    command.add_argument("--limit", type=float, metavar="S", help="seconds of a call, at most")
    command.add_argument("--budget-minutes", type=float, default=math.inf, metavar="M", help=over)
    command.add_argument("--resume", action="store_true", help="leave out what this commit has")


def options_of(args: argparse.Namespace) -> Options:
    rules = Rules(budget=1.0, rounds=3, limit=10.0) if args.quick else Rules()
    return Options(
        device=args.device,
        threads=args.threads or torch.get_num_threads(),
        out=args.out or (ROOT / "out" / "quick" if args.quick else RESULTS),
        rules=replace(rules, limit=args.limit or rules.limit),
        deadline=time.monotonic() + 60.0 * args.budget_minutes,
        methods=getattr(args, "methods", ()),
        resume=args.resume,
        quick=args.quick,
    )


def measure(study: Study, options: Options, threads: int | None, cases: Sequence[str] = ()) -> int:
    """Measure a study with its own number of threads where none is given."""
    options = replace(options, threads=threads or study.threads or options.threads)
    if study is sweep.STUDY:
        machine.measure_peak(options.device, options.threads, options.out)
    return study.measure(options, cases)


def measure_all(options: Options, threads: int | None) -> int:
    studies = [study for study in ALL if options.device in study.devices]
    left = sum(measure(study, options, threads) for study in studies)
    if options.device == "cpu" and not options.quick:
        # how much faster ours is on all threads
        left += measure(sweep.STUDY, replace(options, methods=OURS[:1]), options.threads, ["main"])
    plots.draw(options.out)
    if options.out == RESULTS:
        pages.update(RESULTS)
    return left


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.command == "demo":
        demo.run(args)
        if args.save:
            pages.update(RESULTS)
        return 0
    if args.command == "plot":
        print(*plots.draw(args.results), sep="\n")
        return 0
    if args.command == "readme":
        if not args.check:
            pages.update(RESULTS)
        elif stale := pages.stale(RESULTS):
            print(f"{', '.join(stale)} differ from bench/results: run python -m bench readme")
            return 1
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    options = options_of(args)
    if args.command == "all":
        left = measure_all(options, args.threads)
    else:
        study = STUDIES[args.command]
        try:
            study.check(args.cases, options)
        except ValueError as error:
            parser.error(str(error))
        left = measure(study, options, args.threads, args.cases)
    if left > 0:
        print(f"{left} left over: run again with --resume")
        return LEFT_OVER
    return 0


if __name__ == "__main__":
    sys.exit(main())
