"""A session of a `Serving`: what the engine's thread has drawn and its reader has not taken yet."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Protocol

from kvist.base.errors import KvistError, TimedOut
from kvist.runtime.request import FinishReason, TokenLogprobs
from kvist.runtime.sequence import Sequence, Times
from kvist.service.explain import Explainer
from kvist.service.explanation import Explanation
from kvist.service.facts import Explained, FactListener
from kvist.service.session import Delta, Job
from kvist.service.text_stream import TextStream

_WHOLE = (FinishReason.STOP, FinishReason.LENGTH)
_log = logging.getLogger("kvist.serving")


class Host(Protocol):
    """What a session needs of whoever holds it."""

    explainer: Explainer
    listener: FactListener

    def end(self, session: "LiveSession", error: KvistError | None = None) -> None: ...

    def note_ended(self, session: "LiveSession") -> None: ...


class LiveSession:
    """A `Session` of a `Serving`. What begins with `_` is the event loop's; `choices`, `unfinished`, `held` and `begun`
    are the engine's."""

    def __init__(self, host: Host, job: Job) -> None:
        self.job = job
        self.prompt_tokens = len(job.request.prompt)
        self.cached_tokens = 0
        self.new_tokens = 0
        self.warnings = job.warnings
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.submitted = time.perf_counter()
        self.explanation: Explanation | None = None
        self.choices: list[tuple[Sequence, TextStream]] = []
        self.unfinished = job.choices
        self.held: list[list[Delta]] = [[] for _ in range(job.choices)]  # of each choice, what is not told yet
        self.begun = [False] * job.choices  # whether anything is told of it
        self._host = host
        self._deltas: deque[Delta] = deque()
        self._arrived = asyncio.Event()
        self._left = self._unended = job.choices
        self._timer: asyncio.TimerHandle | None = None
        self._asked = None if job.request.pooled else host.explainer.asked(job.request, job.origin)
        self._ids: tuple[str, ...] = ()

    def name(self, *ids: str) -> None:
        self._ids = ids
        if self._asked is not None and ids:
            self._asked.now.id = ids[0]

    @property
    def cached(self) -> Mapping[str, int]:
        return {tier: count for tier, count in self.choices[0][0].cached.tiers.items() if count} if self.choices else {}

    @property
    def times(self) -> Times:
        return self.choices[0][0].times if self.choices else Times()

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
            self._host.end(self)

    def gather(self, delta: Delta) -> Delta | None:
        """On the engine's thread: what is told now that a choice has this to say; None where all of it waits."""
        if self.job.streamed or delta.progress is not None:
            return delta
        held = self.held[delta.choice]
        held.append(delta)
        if delta.finish_reason is None and (self.begun[delta.choice] or not delta.tokens):
            return None
        self.begun[delta.choice] = True
        text, tokens = "".join(one.text for one in held), tuple(token for one in held for token in one.tokens)
        held.clear()
        return replace(delta, text=text, tokens=tokens)

    def arrive(self, delta: Delta) -> None:
        """On the event loop's thread: one more delta for the reader."""
        self._unended -= delta.finish_reason is not None
        self._note_computed(delta)
        if not self._unended and delta.finish_reason is not None:
            self._host.note_ended(self)
            self._explain()
        self._deltas.append(delta)
        self._arrived.set()

    def _note_computed(self, delta: Delta) -> None:
        """The first new token, or the end of an answer that was to have none, tells that the prompt was computed."""
        if self._asked is not None and not self._asked.now.computed and (delta.tokens or delta.finish_reason in _WHOLE):
            self._host.explainer.computed(self._asked, self.choices[0][0])

    def _explain(self) -> None:
        if self._asked is None:
            return
        if not self._asked.now.computed:
            self._host.explainer.forget(self._asked)
            return
        try:
            self.explanation = self._host.explainer.answered(self._asked, self.choices[0][0], self._ids)
        except Exception:  # a defect, and no reason to spoil the answer
            _log.exception("a request cannot be explained")
        else:
            found = self.explanation
            self._host.listener(Explained(found.reason, found.computed, found.again or 0))

    def expire_after(self, seconds: float) -> None:
        """On the event loop's thread: the session fails when it has not ended by then."""
        error = TimedOut(f"the request took longer than the {seconds:g} s that this server allows")
        self._timer = asyncio.get_running_loop().call_later(seconds, self._host.end, self, error)
