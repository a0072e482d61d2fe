"""What a client of the engine's thread asks for, and the stream that answers it. No HTTP, no wire format."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvist.base.errors import KvistError, TimedOut
from kvist.runtime.request import FinishReason, Request, TokenLogprobs
from kvist.runtime.sequence import Sequence as Running
from kvist.service.explain import NOWHERE, Explanation, Origin
from kvist.service.text_stream import TextStream

if TYPE_CHECKING:
    from kvist.service.serving import Serving

_log = logging.getLogger("kvist.serving")


@dataclass(frozen=True)
class Job:
    """A request and what its text needs.

    `choices`: how many answers; choice `i` draws with the seed of the request + `i` (modulo 2^64), and all share the
    prompt's blocks. `stops`: stop strings. `keep_special`: special tokens (but for those that end a text) give their
    text, as whoever parses tool calls needs it. `origin`: what the prompt's tokens were made of, for explanations.
    """

    request: Request
    choices: int = 1
    stops: tuple[str, ...] = ()
    keep_special: bool = False
    origin: Origin = NOWHERE


@dataclass(frozen=True)
class NewToken:
    """One drawn token; `logprobs` where they were asked for."""

    id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Delta:
    """What one step added to one choice. `text` is settled: all pieces joined are the whole. The last delta of a choice
    has `finish_reason`, with `stop` where a stop string ended it, and `error` where it was ended by a failure."""

    choice: int
    text: str
    tokens: tuple[NewToken, ...]
    finish_reason: FinishReason | None = None
    stop: str | None = None
    error: KvistError | None = None


class Session(Protocol):
    """One job under way. Iterate once over its deltas, of all choices as they come; it ends when all have ended.

    `cached_tokens`: how many of the prompt's tokens were read from the cache; known from the first delta on.
    `prompt_logprobs`: one entry for each token of the prompt, None for the first; complete from the first delta on.
    `explanation`: of what was computed, known from the last delta on; None where there is nothing to explain.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int  # of all choices, so far
    prompt_logprobs: list[TokenLogprobs | None]
    explanation: Explanation | None

    def name(self, *ids: str) -> None:
        """What clients call the answer: they may ask for its explanation under each of these."""
        ...

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    def cancel(self) -> None:
        """End every choice that has not ended, at any moment, any number of times."""
        ...


class LiveSession:
    """A `Session` of a `Serving`. What begins with `_` is the event loop's, `choices` the engine's."""

    def __init__(self, serving: "Serving", job: Job) -> None:
        self.job = job
        self.prompt_tokens = len(job.request.prompt)
        self.cached_tokens = 0
        self.new_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.submitted = time.perf_counter()
        self.explanation: Explanation | None = None
        self.choices: list[tuple[Running, TextStream]] = []
        self.unfinished = job.choices
        self._serving = serving
        self._deltas: deque[Delta] = deque()
        self._arrived = asyncio.Event()
        self._left = self._unended = job.choices
        self._timer: asyncio.TimerHandle | None = None
        self._asked = None if job.request.pooled else serving.explainer.asked(job.request, job.origin)
        self._ids: tuple[str, ...] = ()

    def name(self, *ids: str) -> None:
        self._ids = ids
        if self._asked is not None and ids:
            self._asked.now.id = ids[0]

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            while self._left:
                while not self._deltas:
                    self._arrived.clear()
                    await self._arrived.wait()
                delta = self._deltas.popleft()
                self.new_tokens += len(delta.tokens)
                self._left -= delta.finish_reason is not None
                yield delta
        finally:
            self.cancel()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._left:
            self._serving.end(self)

    def arrive(self, delta: Delta) -> None:
        """On the event loop's thread: one more delta for the reader."""
        self._unended -= delta.finish_reason is not None
        if not self._unended and delta.finish_reason is not None:
            self._serving.note_ended(self)
            self._explain()
        self._deltas.append(delta)
        self._arrived.set()

    def _explain(self) -> None:
        if self._asked is None or not self.choices:
            return
        try:
            self.explanation = self._serving.explainer.answered(self._asked, self.choices[0][0], self._ids)
        except Exception:  # a defect, and no reason to spoil the answer
            _log.exception("a request cannot be explained")

    def expire_after(self, seconds: float) -> None:
        """On the event loop's thread: the session fails when it has not ended by then."""
        error = TimedOut(f"the request took longer than the {seconds:g} s that this server allows")
        self._timer = asyncio.get_running_loop().call_later(seconds, self._serving.end, self, error)
