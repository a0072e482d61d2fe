"""`POST /v1/chat/completions`: from a conversation to answers, whole or as a stream of chunks."""

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvist.runtime.request import FinishReason
from kvist.server.contexts import context_of
from kvist.server.errors import ApiError, openai_error
from kvist.server.limits import tenant_of
from kvist.server.logs import Note, note
from kvist.server.openai.chat_schema import ChatBody
from kvist.server.openai.conversation import chat_request
from kvist.server.openai.logprobs import TokenTexts
from kvist.server.openai.models import served
from kvist.server.openai.replies import (
    FINGERPRINT,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    FunctionCall,
    TokenLogprob,
    ToolCall,
    Usage,
    answers,
    new_id,
    noted_cache,
    reply,
    shown_progress,
    usage_of,
)
from kvist.server.openai.stream import DONE, EventStream, event, raise_failure
from kvist.service.chat import Chat, ChatDelta, ChatSession
from kvist.service.contexts import CHAT
from kvist.service.serving import Serving
from kvist.text.response import Content, Part, Reasoning, ToolCallArguments, ToolCallBegin, ToolCallEnd, joined

Route = Callable[[ChatBody, Request], Awaitable[Response]]
Fields = dict[str, Any]  # of a message, or what is added to them


def add_chat(routes: APIRouter, serving: Serving, chat: Chat, texts: TokenTexts) -> Route:
    """Add the route, and return what answers it."""

    @routes.post("/v1/chat/completions", response_model=None, responses=answers(ChatCompletion, streams=True))
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        asked_of = served(serving, body.model)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs: it is given with logprobs: true", param="top_logprobs")
        options = body.options(
            serving.tokenizer,
            tenant_of(request),
            max_tokens=body.max_completion_tokens or body.max_tokens,
            choices=body.n or 1,
            logprobs=body.top_logprobs or 0 if body.logprobs else None,
            proposed=serving.proposed,
        )
        options = replace(options, adapter=asked_of.adapter)
        asked = chat_request(body, options, serving.template)
        session = await chat.ask(replace(asked, context=context_of(serving, request, body.context, CHAT)))
        noted = note(request, session.session, asked_of.name)
        choices = [Progress(index, bool(body.functions)) for index in range(options.choices)]
        answer = Answer(session, asked_of.name, choices, options.logprobs, texts)
        session.session.name(answer.id, noted.request_id)
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            chunks = answer.chunks(noted, usage)
            return EventStream(chunks, session.cancel, lambda problem: event(openai_error(problem)), noted)
        try:
            return reply(await answer.whole(noted))
        finally:
            session.cancel()

    return chat_completions


@dataclass
class Progress:
    """What one choice has come to so far. `older`: calls are told as those know them who declare functions. `called`: a
    call of a tool is complete. `reasoning_tokens`: those drawn while it reasoned, the mark that ends it included."""

    index: int
    older: bool = False
    called: bool = False
    reasoning_tokens: int = 0
    finish: str | None = None

    def push(self, delta: ChatDelta) -> list[Fields]:
        """The fields that a delta adds to the message, one kind at a time."""
        self.reasoning_tokens += delta.reasoning
        fields = [added for part in joined(list(delta.parts)) if (added := self._added(part))]
        if delta.finish is FinishReason.LENGTH:
            self.finish = "length"
        elif delta.finish is not None:
            self.finish = ("function_call" if self.older else "tool_calls") if self.called else "stop"
        return fields

    def _added(self, part: Part) -> Fields:
        match part:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text}
            case ToolCallBegin(index, name):
                function = {"name": name, "arguments": ""}
                if self.older:
                    return {"function_call": function}
                return {
                    "tool_calls": [{"index": index, "id": new_id("call_"), "type": "function", "function": function}]
                }
            case ToolCallArguments(index, text):
                if self.older:
                    return {"function_call": {"arguments": text}}
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case ToolCallEnd():
                self.called = True
                return {}


def message_of(added: Iterable[Fields]) -> ChatMessage:
    """The message to which these fields add up. Its content is None where there are calls and nothing beside them."""
    content, reasoning = [], []
    older: FunctionCall | None = None
    calls: list[ToolCall] = []
    arguments: list[list[str]] = []
    for fields in added:
        content.append(fields.get("content", ""))
        reasoning.append(fields.get("reasoning_content", ""))
        if "function_call" in fields:
            older = {"name": "", "arguments": ""} if older is None else older
            older["name"] = fields["function_call"].get("name", older["name"])
            older["arguments"] += fields["function_call"]["arguments"]
        for call in fields.get("tool_calls", ()):
            if "id" in call:
                calls.append({"id": call["id"], "type": "function", "function": call["function"]})
                arguments.append([])
            arguments[call["index"]].append(call["function"]["arguments"])
    for whole, pieces in zip(calls, arguments, strict=True):
        whole["function"] = {"name": whole["function"]["name"], "arguments": "".join(pieces)}
    # A call that broke off is shown where it is all there is; beside one that can be made it is left out.
    calls = [call for call in calls if _is_complete(call)] or calls
    text = "".join(content)
    message: ChatMessage = {"role": "assistant", "content": text or (None if calls or older else ""), "refusal": None}
    if any(reasoning):
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    if older is not None:
        message["function_call"] = older
    return message


def _is_complete(call: ToolCall) -> bool:
    try:
        return isinstance(json.loads(call["function"]["arguments"]), dict)
    except (ValueError, RecursionError):
        return False


class Answer:
    """The choices of one request under way. `logprobs`: how many of the likeliest stand beside each token, if any."""

    def __init__(
        self, session: ChatSession, model: str, choices: list[Progress], logprobs: int | None, texts: TokenTexts
    ) -> None:
        self._session = session
        self._logprobs = logprobs
        self._texts = texts
        self._choices = choices
        self.id = new_id("chatcmpl-")
        self._head = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    async def whole(self, noted: Note) -> dict[str, Any]:
        """All choices, once they are complete."""
        added: list[list[Fields]] = [[] for _ in self._choices]
        entries: list[list[TokenLogprob]] = [[] for _ in self._choices]
        async for delta in self._session:
            raise_failure(delta.error, delta.finish)
            added[delta.choice] += self._choices[delta.choice].push(delta)
            entries[delta.choice] += self._entries(delta)
        noted.finish = self._finish
        choices: list[ChatChoice] = [
            {
                "index": progress.index,
                "message": message_of(added[progress.index]),
                "logprobs": self._shown(entries[progress.index]),
                "finish_reason": progress.finish or "stop",
            }
            for progress in self._choices
        ]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": self._usage(),
            **noted_cache([self._session.session]),
        }

    async def chunks(self, noted: Note, usage: bool) -> AsyncIterator[bytes]:
        """The stream; what one delta gives comes together. `usage`: a last chunk says what the request took."""
        rest: dict[str, Any] = {"usage": None} if usage else {}
        for progress in self._choices:
            yield self._chunk(progress.index, {"role": "assistant", "content": ""}, [], None, rest)
        async for delta in self._session:
            raise_failure(delta.error, delta.finish)
            if delta.progress is not None:
                told = shown_progress(delta.progress)
                yield self._chunk(delta.choice, {"role": "assistant", "content": None}, [], None, {**rest, **told})
                continue
            progress, entries, chunks = self._choices[delta.choice], self._entries(delta), []
            for fields in progress.push(delta) or ([{"content": ""}] if entries else []):
                chunks.append(self._chunk(progress.index, fields, entries, None, rest))
                entries = []
            if delta.finish is not None:
                cache = noted_cache([self._session.session])
                chunks.append(self._chunk(progress.index, {}, [], progress.finish, {**rest, **cache}))
            if chunks:
                yield b"".join(chunks)
        noted.finish = self._finish
        if usage:
            yield event({**self._head, "choices": [], "usage": self._usage()})
        yield DONE

    def _chunk(
        self, index: int, fields: Fields, entries: list[TokenLogprob], finish: str | None, rest: dict[str, Any]
    ) -> bytes:
        choice = {"index": index, "delta": fields, "logprobs": self._shown(entries, True), "finish_reason": finish}
        return event({**self._head, "choices": [choice], **rest})

    def _entries(self, delta: ChatDelta) -> list[TokenLogprob]:
        return [] if self._logprobs is None else self._texts.entries(delta.tokens, self._logprobs)

    def _shown(self, entries: list[TokenLogprob], streamed: bool = False) -> ChatLogprobs | None:
        if self._logprobs is None or (streamed and not entries):
            return None
        return {"content": entries, "refusal": None}

    @property
    def _finish(self) -> str:
        """Why it ended; of several choices, each reason once."""
        return "+".join(sorted({progress.finish or "stop" for progress in self._choices}))

    def _usage(self) -> Usage:
        return usage_of([self._session.session], sum(progress.reasoning_tokens for progress in self._choices))
