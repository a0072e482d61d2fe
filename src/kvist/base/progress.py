"""How far a piece of work is, on stderr: a bar on a terminal or in a notebook, elsewhere a line now and then."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kvist.base.units import format_duration

if TYPE_CHECKING:
    from rich.console import Console

Watch = Callable[[int, int], None]  # told how much is done, and of how much
Clock = Callable[[], float]
_APART = 15.0  # seconds between two lines


@contextlib.contextmanager
def progress(work: str, unit: str, at_once: int = 0, clock: Clock = time.monotonic) -> Iterator[Watch]:
    """Yields what is told how far the work is, as often as one likes, in its `unit` (`files`). The time that is left
    follows from what was done so far; `at_once` units are under way at any time, and each of them counts as half."""
    from rich.console import Console

    console, began = Console(stderr=True), clock()

    def left(done: int, total: int) -> str:
        worked = done + min(at_once, total - done) / 2
        seconds = (clock() - began) * (total - worked) / worked if done else 0.0
        return f", about {format_duration(seconds)} left" if seconds else ""

    if console.is_terminal or console.is_jupyter:
        with _bar(console, work, unit, left) as watch:
            yield watch
    else:
        yield _lines(work, unit, left, clock)


def is_watched() -> bool:
    """Whether a bar would be seen: on a terminal, or in a notebook."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.is_terminal or console.is_jupyter


@contextlib.contextmanager
def _bar(console: "Console", work: str, unit: str, left: Callable[[int, int], str]) -> Iterator[Watch]:
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(16), TextColumn("{task.fields[told]}")
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(work, visible=False, told="")

        def watch(done: int, total: int) -> None:
            told = f"{done:,} of {total:,} {unit}{left(done, total)}"
            shown.update(task, completed=done, total=total, visible=True, told=told)

        yield watch


def _lines(work: str, unit: str, left: Callable[[int, int], str], clock: Clock) -> Watch:
    began = told = clock()

    def watch(done: int, total: int) -> None:
        nonlocal told
        if (now := clock()) - told < _APART or done >= total:
            return
        told = now
        line = f"{done:,} of {total:,} {unit} in {format_duration(now - began)}{left(done, total)}"
        print(f"kvist: {work}: {line}", file=sys.stderr, flush=True)

    return watch
