"""The command comhe-ext, also `python -m comhe_ext`.

argparse, for the package needs nothing but PyTorch, and a command that tells what an installation
lacks must not lack a parser itself.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import comhe_ext
from comhe_ext.cli import bench, check, demo, energy, info

COMMANDS = {"info": info, "check": check, "energy": energy, "bench": bench, "demo": demo}
DESCRIPTION = "The hyperspherical energy of the weights of neural networks."
EPILOG = """\
start with:
  comhe-ext demo                         what the package does, in seconds
  comhe-ext energy model.safetensors     how well the rows of each layer are spread
  comhe-ext COMMAND --help               the options of a command, with examples
"""


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="comhe-ext",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=comhe_ext.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=getattr(module, "EPILOG", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    return parser


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, and return its exit code."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return COMMANDS[options.command].run(options)
    except BrokenPipeError:
        # whoever read has read enough; Python must not complain of it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def main() -> None:
    """Run the command line of this process."""
    raise SystemExit(run())


if __name__ == "__main__":
    main()
