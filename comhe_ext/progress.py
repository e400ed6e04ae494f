"""Progress bars, where they are asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(total: int, progress: bool | str, title: str) -> Iterator[Callable[..., object]]:
    """Show a progress bar of so many steps, and yield what advances it, by one or by a number.

    Args:
        total: the steps.
        progress: whether to show it; a string is its title.
        title: without a title of the user's.
    """
    if not progress:
        yield lambda steps=1: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "`progress` needs the package tqdm: pip install 'comhe-ext[progress]'"
        ) from error
    with tqdm(total=total, desc=progress if isinstance(progress, str) else title) as shown:
        yield shown.update
