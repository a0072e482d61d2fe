"""Server-sent events: how they are written, what is said in a long silence, and how a stream ends early."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from kvist.base.errors import KvistError, Stopping, TimedOut
from kvist.runtime.request import FinishReason
from kvist.server.errors import Problem, problem_of
from kvist.server.logs import Note
from kvist.server.openai.replies import encode

log = logging.getLogger("kvist.server")

SILENCE = 10.0  # seconds without an event after which a comment is sent: clients and proxies give up on a mute server
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class StreamForm:
    """How events are told from each other. `comment`: what may be sent in a silence; empty where clients would take it
    for an event."""

    media_type: str
    comment: bytes


EVENTS = StreamForm("text/event-stream", b": still at work\n\n")
LINES = StreamForm("application/x-ndjson", b"")


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
        form: StreamForm = EVENTS,
    ) -> None:
        super().__init__(
            _guarded(events, failed, noted),
            media_type=form.media_type,
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        self._close = close
        self._comment = form.comment

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        voice = _Voice(send, self._comment)
        speaking = asyncio.create_task(voice.speak())
        try:
            await super().__call__(scope, receive, voice.send)
        finally:
            speaking.cancel()
            self._close()


class _Voice:
    """Sends on what is sent; `speak` fills the silences between the first message and the last."""

    def __init__(self, send: Send, comment: bytes) -> None:
        self._send = send
        self._comment = comment
        self._quiet_since: float | None = None  # None: something is being sent, or may not be

    async def send(self, message: Message) -> None:
        self._quiet_since = None
        await self._send(message)
        if message["type"] == "http.response.start" or message["more_body"]:
            self._quiet_since = asyncio.get_running_loop().time()

    async def speak(self) -> None:
        """Send a comment for each silence, until cancelled."""
        while self._comment:
            since, now = self._quiet_since, asyncio.get_running_loop().time()
            await asyncio.sleep(SILENCE if since is None else since + SILENCE - now)
            if since is not None and since == self._quiet_since:
                await self.send({"type": "http.response.body", "body": self._comment, "more_body": True})


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
