"""What the commands show: a progress bar on a terminal, lines elsewhere, plain tables."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def make_console() -> Console:
    console = Console(highlight=False)
    console.width = min(console.width, 110) if console.is_terminal else 110
    return console


class Steps:
    """A progress bar over a number of steps: `with Steps(console, 9) as steps:`."""

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        columns = (
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("", total=total)

    def __enter__(self) -> "Steps":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, words: str) -> None:
        """Say what is being done; shown on a terminal only."""
        self.progress.update(self.task, description=words)

    def advance(self, words: str = "") -> None:
        """Advance by a step; the words, if any, stay on the screen."""
        if words:
            self.console.print(words)
        self.progress.advance(self.task)


def make_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]] = ()) -> Table:
    """Make a table whose first column holds words, and the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
