"""Server-sent events: how they are written, what is said in a long silence, and how a stream ends early."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from kvist.base.errors import KvistError, Stopping, TimedOut
from kvist.runtime.request import FinishReason
from kvist.server.errors import Problem, problem_of
from kvist.server.logs import Note
from kvist.server.openai.replies import encode

log = logging.getLogger("kvist.server")

SILENCE = 10.0  # seconds without an event after which a comment is sent: clients and proxies give up on a mute server
DONE = b"data: [DONE]\n\n"
_COMMENT = b": still at work\n\n"


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event; OpenAI names those of the Responses API alone."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {encode(data)}\n\n".encode()


def raise_failure(error: KvistError | None, finish: FinishReason | None) -> None:
    """Raises what ended a choice before it was complete."""
    if error is not None:
        raise error
    if finish in (FinishReason.CANCELLED, FinishReason.FAILED):
        raise Stopping("the answer was ended before it was complete")


class EventStream(StreamingResponse):
    """Sends events as they come. What they come from is closed when the stream ends, however it ends: at its last
    event, by an error, or because the client left. A slow reader is waited for, and holds up its own session alone.

    `failed` makes the last event out of what went wrong, when something does after the stream began.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], None],
        failed: Callable[[Problem], bytes],
        noted: Note,
    ) -> None:
        super().__init__(
            _spoken(_guarded(events, failed, noted)),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _guarded(
    events: AsyncIterator[bytes], failed: Callable[[Problem], bytes], noted: Note
) -> AsyncIterator[bytes]:
    try:
        async for data in events:
            yield data
    except Exception as error:
        problem = problem_of(error)
        if problem.status >= 500 and not isinstance(error, Stopping | TimedOut):
            log.error("request failed", exc_info=error, extra={"facts": {"request_id": noted.request_id}})
        noted.finish = "error"
        yield failed(problem)


async def _spoken(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The events, and a comment for each silence."""
    pending: asyncio.Future[bytes] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({pending}, timeout=SILENCE)
            if not done:
                yield _COMMENT
                continue
            try:
                data = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield data
    finally:
        if pending is not None:
            pending.cancel()
