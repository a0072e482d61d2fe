"""A process that measures another engine, asked one thing at a time."""

import contextlib
import json
import os
import selectors
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvist.base.errors import KvistError

_HERE = Path(__file__).parent
_MOST_LINE = 1 << 16  # bytes of an answer


class PeerError(KvistError):
    """Another engine is not there, or failed."""


class Worker:
    """`python`: of the engine's environment. `first`: what it is to load. `passive`: whether threads of OpenMP that
    wait are to fall asleep soon, as ours are, so that they do not disturb who is measured next. Raises `PeerError` when
    it does not come up."""

    def __init__(
        self,
        name: str,
        python: Path,
        script: str,
        first: Mapping[str, Any],
        timeout: float = 600.0,
        *,
        passive: bool = True,
    ) -> None:
        self.name = name
        environment = {**os.environ, "PYTHONPATH": ""}
        if passive:
            environment["OMP_WAIT_POLICY"] = "passive"
        else:
            environment.pop("GOMP_SPINCOUNT", None)  # ours
        self._process = subprocess.Popen(
            [str(python), str(_HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
        self._read = b""
        try:
            self._say(first)
            self._answer(timeout)
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, tokens: int, timeout: float = 3600.0) -> float:
        """Have it `fill`, `decode` or `prefill`; seconds, where that is measured. Raises `PeerError`."""
        self._say({"do": do, "tokens": tokens})
        seconds = self._answer(timeout).get("seconds", 0.0)
        if not isinstance(seconds, int | float) or not 0 <= seconds < 1e6:
            raise PeerError(f"{self.name} answers {seconds!r} seconds")
        return float(seconds)

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()

    def _say(self, command: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
        except OSError:
            raise self._ended() from None

    def _answer(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._read:
                if not selector.select(timeout):
                    raise PeerError(f"{self.name} did not answer within {timeout:g} s")
                part = self._process.stdout.read(4096)
                if not part:
                    raise self._ended()
                self._read += part
                if len(self._read) > _MOST_LINE:
                    raise PeerError(f"{self.name} answers without end")
        line, _, self._read = self._read.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            raise PeerError(f"{self.name} answers {line[:80]!r}") from None
        return answer if isinstance(answer, dict) else {}

    def _ended(self) -> PeerError:
        assert self._process.stderr is not None
        self._process.kill()
        said = self._process.stderr.read(1 << 16).decode(errors="replace").strip().splitlines()
        return PeerError(f"{self.name} has ended: {said[-1] if said else 'it said nothing'}")
