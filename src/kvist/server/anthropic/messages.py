"""The routes of the Messages API: from a request to an answer, whole or as a stream.

Usage. `input_tokens`, `cache_creation_input_tokens` and `cache_read_input_tokens` add up to the prompt's tokens. Read
are those that the cache had. Created are those that this request computed and left in the cache, in whole blocks, up to
the last `cache_control` of the body (all of it, where that stands at its top); the others count as input, though they
are kept all the same. At least the last token of a prompt is computed anew, so `input_tokens` is never 0.

In a stream, `message_start` comes with the first token, when it is known how much was read from the cache; if that
takes longer than `PATIENCE`, it comes before, and counts the whole prompt as input. `message_delta` has the final
counts in either case: the official clients, and whoever follows their types, let these replace the first ones.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from kvist.base.errors import RequestError, Stopping
from kvist.runtime.request import FinishReason, Sampling
from kvist.server.anthropic.prompt import cache_ttl, chat_request, options_of, up_to_last_mark
from kvist.server.anthropic.replies import MessageReply, TokenCount, Usage
from kvist.server.anthropic.schema import MessagesRequest, Prompt
from kvist.server.anthropic.stream import Blocks, Event, Thinking, content_of, encoded, paced
from kvist.server.contexts import context_of
from kvist.server.errors import ANTHROPIC_RESPONSES, anthropic_error, problem_of
from kvist.server.limits import tenant_of
from kvist.server.logs import Note, note
from kvist.server.openai.models import served
from kvist.server.openai.replies import answers, left_in_cache, new_id, noted_cache, reply
from kvist.server.openai.stream import raise_failure
from kvist.server.settings import ServerSettings
from kvist.service.chat import Chat, ChatDelta, ChatRequest, ChatSession, Options
from kvist.service.contexts import CHAT
from kvist.service.serving import Serving

log = logging.getLogger("kvist.server")

PATIENCE = 1.0  # seconds in which the first token usually comes when most of a prompt was cached
PING = 10.0  # seconds of silence before a client hears that the server is still at work
_HOUR = 3600.0
_PING = encoded({"type": "ping"})


def router(serving: Serving, settings: ServerSettings) -> APIRouter:
    """`POST /v1/messages` and `POST /v1/messages/count_tokens`.

    Any name of a model is taken, and stands for the one that there is unless it is an adapter's, or the server strict;
    answers say which. Nothing of `settings` matters here: who may ask is settled before, and for how long below.
    """
    routes = APIRouter(tags=["Anthropic"], responses=ANTHROPIC_RESPONSES)
    chat = Chat(serving)

    @routes.post("/v1/messages", response_model=None, responses=answers(MessageReply, streams=True))
    async def messages(body: MessagesRequest, request: Request) -> Response:
        known = serving.strict_model or body.model in serving.adapters
        asked_of = served(serving, body.model if known else None)
        options = options_of(body, tenant_of(request), serving.proposed)
        asked = chat_request(body, replace(options, adapter=asked_of.adapter))
        asked = replace(asked, context=context_of(serving, request, body.context, CHAT))
        marked = await marked_tokens(chat, body, asked)
        session = await chat.ask(asked)
        noted = note(request, session.session, asked_of.name)
        answer = Answer(session, asked_of.name, body, marked)
        session.session.name(answer.id, noted.request_id)
        if body.stream:
            return _Stream(answer, noted)
        try:
            return reply(await answer.whole(noted))
        finally:
            session.cancel()

    @routes.post("/v1/messages/count_tokens", response_model=None, responses=answers(TokenCount))
    async def count_tokens(body: Prompt, request: Request) -> Response:
        options = Options(max_tokens=None, sampling=Sampling(), tenant=tenant_of(request))
        asked = replace(chat_request(body, options), context=context_of(serving, request, body.context, CHAT))
        return reply({"input_tokens": await chat.counted(asked)})

    return routes


async def marked_tokens(chat: Chat, body: MessagesRequest, asked: ChatRequest) -> int | None:
    """How many first tokens of the prompt are asked to be cached; None: all of them, or none. Where the template cannot
    write a part alone, all of them are."""
    part = up_to_last_mark(body)
    if part is None:
        return None
    try:
        return await chat.begins_with(asked, replace(chat_request(part, asked.options), context=asked.context))
    except RequestError:
        return None


class Answer:
    """One message under way. `marked`: how many first tokens of the prompt are asked to be cached, if not all."""

    def __init__(self, session: ChatSession, model: str, body: MessagesRequest, marked: int | None = None) -> None:
        self.session = session
        self.ended = False
        self.id = new_id("msg_")
        self._model = model
        self._max_tokens = body.max_tokens
        self._stops = body.stop_sequences or ()  # templates have stops of their own beside them
        self._ttl = cache_ttl(body)
        self._marked = marked
        self._begun = False  # from then on it is known what was read from the cache
        self._thinking_tokens = 0  # drawn while it thinks, the mark that ends it included
        self._blocks = Blocks(_told_of_thinking(body))
        # What is managed of the context is said where that was asked for: nothing.
        self._managed = {"context_management": {"applied_edits": []}} if body.context_management else {}

    def message(self) -> MessageReply:
        """The message with what is known by now, and no content."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def push(self, delta: ChatDelta) -> list[Event]:
        """The events that a delta gives, the last of all being `message_delta`. Raises what ended the answer early."""
        self._begun = True
        raise_failure(delta.error, delta.finish)
        events: list[Event] = []
        if self._max_tokens:
            events = [event for part in delta.parts for event in self._blocks.push(part)]
            self._thinking_tokens += delta.reasoning
        if delta.finish is not None:
            reason = self._reason(delta)
            stop = {"stop_reason": reason, "stop_sequence": delta.stop if reason == "stop_sequence" else None}
            events += self._blocks.close()
            cache = noted_cache([self.session.session])
            events.append({"type": "message_delta", "delta": stop, "usage": self._usage(), **self._managed, **cache})
            self.ended = True
        return events

    async def whole(self, noted: Note) -> Event:
        """The message once it is complete."""
        events = [event async for delta in self.session for event in self.push(delta)]
        self._check_ended()
        end = events.pop()
        noted.finish = end["delta"]["stop_reason"]
        cache = noted_cache([self.session.session])
        return {**self.message(), **end["delta"], "content": content_of(events), **self._managed, **cache}

    async def events(self, noted: Note) -> AsyncIterator[bytes]:
        """The stream, event by event; those of one delta together."""
        started, clock = False, asyncio.get_running_loop().time
        spoken = clock()
        try:
            async for delta in paced(self.session, PATIENCE, PING):
                events = [] if delta is None else self.push(delta)
                head = b""
                if not started:
                    head = encoded({"type": "message_start", "message": self.message()}) + _PING
                    started = True
                elif delta is None or (not events and clock() - spoken > PING):
                    head = _PING
                if data := head + b"".join(map(encoded, events)):
                    yield data
                    spoken = clock()
                if self.ended:
                    noted.finish = events[-1]["delta"]["stop_reason"]
            self._check_ended()
            yield encoded({"type": "message_stop"})
        except Exception as error:
            problem = problem_of(error)
            noted.finish = "error"
            if problem.status == 500:  # it is too late for whoever logs what routes raise
                log.error("request failed", exc_info=error, extra={"facts": {"request_id": noted.request_id}})
            yield encoded(anthropic_error(problem, noted.request_id or None))

    def _check_ended(self) -> None:
        if not self.ended:
            raise Stopping("the answer was ended before it was complete")

    def _reason(self, delta: ChatDelta) -> str:
        if not self._max_tokens:
            return "max_tokens"
        if delta.stop in self._stops:
            return "stop_sequence"
        if delta.finish is FinishReason.LENGTH:
            full = self.session.session.new_tokens < self._max_tokens
            return "model_context_window_exceeded" if full else "max_tokens"
        return "tool_use" if self._blocks.called else "end_turn"

    def _usage(self) -> Usage:
        session = self.session.session
        prompt, read = session.prompt_tokens, session.cached_tokens
        created = left_in_cache(session, self._marked) if self._ttl is not None and self._begun else 0
        return {
            "input_tokens": prompt - read - created,
            "cache_creation_input_tokens": created,
            "cache_read_input_tokens": read,
            "cache_creation": {
                "ephemeral_5m_input_tokens": created if self._ttl != _HOUR else 0,
                "ephemeral_1h_input_tokens": created if self._ttl == _HOUR else 0,
            },
            "output_tokens": session.new_tokens if self._max_tokens else 0,
            "output_tokens_details": {"thinking_tokens": self._thinking_tokens},
        }


def _told_of_thinking(body: MessagesRequest) -> Thinking:
    if body.thinking is None or not body.thinks:
        return Thinking.LEFT_OUT
    return Thinking.SEALED if body.thinking.display == "omitted" else Thinking.SHOWN


class _Stream(StreamingResponse):
    """Events of an answer. Its session ends with it, be it at the last event or because the client left."""

    def __init__(self, answer: Answer, noted: Note) -> None:
        super().__init__(
            answer.events(noted),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        self._session = answer.session

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._session.cancel()
