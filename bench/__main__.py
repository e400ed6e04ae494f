"""The command line of the benchmark: `python -m bench --help`."""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench import (
    accuracy,
    demo,
    losses,
    model,
    plots,
    readme,
    roofline,
    sampled,
    shapes,
    sweep,
)
from bench.contest import Rules
from bench.methods import METHODS
from bench.options import Options
from bench.screen import make_console
from bench.store import RESULTS, ROOT

LEFT_OVER = 3  # exit status when the time is up before the end
EVERYTHING = ["goals", "small", "modes", "layers", "scaling", "wide"]


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

    def add_measuring(name: str, words: str, threads: str) -> argparse.ArgumentParser:
        command = add(name, words)
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--threads", type=count, metavar="N", help=f"default: {threads}")
        command.add_argument(
            "--quick", action="store_true", help="a check of two minutes; results in out/quick"
        )
        command.add_argument(
            "--out", type=Path, metavar="FOLDER", help="of the results; default: bench/results"
        )
        command.add_argument(
            "--limit", type=float, metavar="S", help="seconds that one call may take; default: 100"
        )
        command.add_argument(
            "--budget-minutes",
            type=float,
            default=math.inf,
            metavar="M",
            help=f"stop after so long; exit status {LEFT_OVER} if something is left over",
        )
        command.add_argument(
            "--resume", action="store_true", help="leave out what this commit has measured here"
        )
        return command

    def add_methods(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--methods", nargs="+", choices=METHODS, metavar="NAME", help=", ".join(METHODS)
        )

    every = "as many as PyTorch takes"
    add_measuring("all", "everything: sweep, accuracy, model, losses, then plot and readme", every)
    command = add_measuring("sweep", "time, memory and error of every method at every shape", "1")
    add_methods(command)
    command.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help=f"SETSxROWSxDIM as 1x4096x30, or {', '.join(shapes.groups('cpu'))}; default: all",
    )
    add_methods(add_measuring("accuracy", "errors on far, close and equal rows", every))
    command = add_measuring("model", "a training step of whole models, with and without", every)
    command.add_argument("--models", nargs="+", choices=model.MODELS["cpu"], metavar="NAME")
    command = add_measuring("losses", "named losses and nearest rows beside what people write", "1")
    command.add_argument(
        "--losses", nargs="+", choices=losses.LOSSES, metavar="NAME", help=", ".join(losses.LOSSES)
    )
    add_measuring("roofline", "the machine's peaks, and what the sweep reached of them", "1")

    command = add_measuring("sampled", "errors and cost of sampled energies, docs/sampled.md", "1")
    command.add_argument(
        "--parts", nargs="+", choices=sampled.PARTS, default=sampled.PARTS, metavar="NAME"
    )

    command = add("plot", "draw the results, light and dark")
    command.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    command = add("readme", "put the results of bench/results into README.md")
    command.add_argument("--check", action="store_true", help="change nothing, fail if it would")

    command = add("demo", "the regularizer on a real network, the operator against naive PyTorch")
    command.add_argument("--threads", type=count, metavar="N", help=f"default: {every}")
    demo.add_arguments(command)
    return parser


def options_of(args: argparse.Namespace) -> Options:
    methods = getattr(args, "methods", None)
    if methods is None:
        methods = [name for name in METHODS if args.device in METHODS[name].devices]
        if args.quick:  # compiling would take most of so short a run
            methods = [name for name in methods if not METHODS[name].compiles]
    rules = Rules(
        limit=args.limit or (10.0 if args.quick else Rules.limit),
        budget=1.0 if args.quick else Rules.budget,
        rounds=3 if args.quick else Rules.rounds,
        deadline=time.monotonic() + 60.0 * args.budget_minutes,
    )
    threads = args.threads
    if threads is None:
        one = ("sweep", "losses", "roofline", "sampled")
        threads = 1 if args.command in one else torch.get_num_threads()
    out = args.out or (ROOT / "out" / "quick" if args.quick else RESULTS)
    return Options(args.device, threads, out, make_console(), methods, rules, args.resume)


def measure(args: argparse.Namespace, options: Options, cases: Sequence[shapes.Case]) -> int:
    """Do what the command says; the number of things left over at the deadline."""
    everything, left = args.command == "all", 0
    if args.command == "roofline":
        roofline.show(options)
    if args.command == "sampled":
        sampled.measure(options, args.parts, args.quick)
    if args.command == "sweep":
        roofline.measure(options)
        left += sweep.sweep(options, cases)
    if everything:
        # everything on one thread of a processor, the goals also on all threads
        one = replace(options, threads=1)
        roofline.measure(one)
        left += sweep.sweep(one, cases)
        if options.threads > 1 and options.device == "cpu" and not args.quick:
            roofline.measure(options)
            left += sweep.sweep(options, shapes.cases(["goals"], "cpu"))
    if args.command == "accuracy" or everything:
        left += accuracy.measure(options)
    if args.command == "model" or everything:
        names = getattr(args, "models", None) or list(model.MODELS[options.device])
        left += model.measure(options, ["digits"] if args.quick else names)
    if args.command == "losses" or everything:
        chosen = getattr(args, "losses", None) or list(losses.LOSSES)
        left += losses.measure(replace(options, threads=args.threads or 1), chosen, args.quick)
    if everything:
        plots.draw(options.out)
        if options.out == RESULTS:
            readme.update(RESULTS)
    return left


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.command == "demo":
        demo.run(args, args.threads or torch.get_num_threads(), make_console())
        return 0
    if args.command == "plot":
        for path in plots.draw(args.results):
            print(path)
        return 0
    if args.command == "readme":
        if not args.check:
            readme.update(RESULTS)
        elif not readme.up_to_date(RESULTS):
            print("README.md differs from bench/results: run python -m bench readme")
            return 1
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    names = getattr(args, "shapes", None) or (["quick"] if args.quick else EVERYTHING)
    try:
        cases = shapes.cases(names, args.device)
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    options = options_of(args)
    if (left := measure(args, options, cases)) > 0:
        options.console.print(f"{left} left over: run again with --resume")
        return LEFT_OVER
    return 0


if __name__ == "__main__":
    sys.exit(main())
