"""Processes that render chat templates, so that a template takes no more than it may and harms nobody but itself."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvist.base.errors import KvistError
from kvist.text import sandbox

SECONDS = 10.0  # of processor time for one rendering, or for compiling
MEMORY = 1 << 30  # bytes of address space of one process
_MOST = 4  # processes of one template


class BadTemplate(Exception):
    """A template that does not compile; the message says where and why."""


@dataclass(frozen=True)
class Rendered:
    """`text`; or, where it is None, `kind` ("too much", "refused", "nested", "failed") and `message` of why."""

    text: str | None
    kind: str = ""
    message: str = ""


@dataclass
class TemplateProcess:
    """Renders some templates, each by its name, in processes that are started when they are needed and stay.

    May be used from any thread; several renderings run side by side. A process that took too much is gone, and the next
    rendering starts another. `seconds` of processor time for each, `memory` in bytes.
    """

    sources: Mapping[str, str]
    seconds: float = SECONDS
    memory: int = MEMORY
    _idle: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _free: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(_MOST))

    def __post_init__(self) -> None:
        weakref.finalize(self, _end_all, self._idle)

    @property
    def ready(self) -> bool:
        """Whether a process waits for something to render."""
        return bool(self._idle)

    def compile(self) -> None:
        """Raises `BadTemplate` for a template that is none. `render` may be called without."""
        with self._free:
            self._idle.append(self._started())

    def render(self, name: str, variables: Mapping[str, Any]) -> Rendered:
        """What the template of that name writes. `variables` are JSON's types."""
        with self._free:
            try:
                process = self._idle.pop()
            except IndexError:
                try:
                    process = self._started()
                except BadTemplate as error:
                    return Rendered(None, "failed", str(error))
            answer = _asked(process, {"name": name, "variables": variables})
            if answer is None:
                return Rendered(None, "too much", self._ending(process))
            self._idle.append(process)
            return Rendered(answer.get("text"), answer.get("kind", ""), answer.get("message", ""))

    def _started(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, sys.path))
        try:
            process = subprocess.Popen(
                [sys.executable, "-S", "-P", str(Path(sandbox.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        except OSError as error:
            raise KvistError(f"chat templates are rendered in a process, which cannot be started: {error}") from None
        bounds = {"sources": dict(self.sources), "seconds": self.seconds, "memory": self.memory}
        problem = _asked(process, bounds)
        if problem is None:
            raise BadTemplate(f"it {self._ending(process)}")
        if problem:
            _end(process)
            line = f"line {problem['line']}: " if "line" in problem else ""
            raise BadTemplate(f"{line}{problem['message']}")
        return process

    def _ending(self, process: subprocess.Popen[bytes]) -> str:
        """Why a process ended by itself."""
        _end(process)
        if process.returncode == -signal.SIGPROF:
            return f"takes longer than {self.seconds:g} s"
        return f"takes more than it may: {self.seconds:g} s of processor time, {self.memory >> 20:,} MiB of memory"


def _asked(process: subprocess.Popen[bytes], message: Mapping[str, Any]) -> dict[str, Any] | None:
    """The answer of a process; None where it ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        sandbox.send(process.stdin, message)  # type: ignore[arg-type]
        return sandbox.receive(process.stdout)  # type: ignore[arg-type]
    except (OSError, ValueError):  # it ended while it was being told
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """What ends a process at once, unless it has ended, and takes note of it."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.stdout.close()
    try:
        process.wait(0.5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_all(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
        _end(process)
