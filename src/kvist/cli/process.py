"""What a verb does to its own process: its threads, Ctrl-C while it starts, and a reader that goes away."""

import io
import os
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", help="Compute with so many threads; by default one for each core."),
]


@contextmanager
def starting() -> Iterator[None]:
    """Modules are imported within it, and Ctrl-C ends the process at once: there is nothing yet to put in order.

    A `KeyboardInterrupt` would not do. Libraries try whether others are there, and what is raised while they do is lost
    in their `except:`, or cleared by their C code."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or somebody else's
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def prepare(threads: int | None) -> None:
    """Called by verbs that compute before they do anything else. Processes that they start have as many threads. Raises
    `KvistError` for a number of threads that does not fit the machine."""
    with starting():
        from kvist.library.opening import set_threads
    set_threads(threads, "--threads")


class _Pipe(io.FileIO):
    """Standard output. When its reader has gone away the program ends, and that is no error."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            # What is still buffered goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            raise SystemExit(0) from None


def quiet_pipe() -> None:
    """From now on a reader of standard output may go away. Beneath all who write: Rich, Typer and Python itself each
    make an error of it, in their own ways."""
    out = sys.stdout
    if out is not sys.__stdout__ or not isinstance(out, io.TextIOWrapper):
        return
    try:
        descriptor = out.fileno()
        is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:
        return
    if is_pipe:
        out.flush()
        raw = io.BufferedWriter(_Pipe(descriptor, "wb", closefd=False))
        sys.stdout = io.TextIOWrapper(raw, encoding=out.encoding, errors=out.errors, line_buffering=out.line_buffering)
