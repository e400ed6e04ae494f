"""What the measuring commands have in common."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from bench.contest import Rules


@dataclass(frozen=True)
class Options:
    """Where to measure and how long, and where the results go."""

    device: str
    threads: int
    out: Path
    console: Console
    methods: Sequence[str] = ()
    rules: Rules = field(default_factory=Rules)
    resume: bool = False  # skip what has been measured
