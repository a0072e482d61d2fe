"""How far a batch is, on a terminal or in a notebook."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress(total: int, wanted: bool | None) -> Iterator[Callable[[int, int], None]]:
    """What is told how many have ended, while the block runs. `wanted` None: for several, where somebody can see it."""
    console = Console(stderr=True)
    if wanted is None:
        wanted = total > 1 and (console.is_terminal or console.is_jupyter)
    if not wanted:
        yield lambda done, total: None
        return
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("answers", total=total)
        yield lambda done, total: bar.update(task, completed=done)
