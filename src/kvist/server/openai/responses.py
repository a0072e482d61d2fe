"""`POST /v1/responses`: one answer to a conversation, whole or as a stream of events. Nothing is stored."""

import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvist.runtime.request import FinishReason
from kvist.server.contexts import context_of
from kvist.server.errors import Problem
from kvist.server.limits import tenant_of
from kvist.server.logs import Note, note
from kvist.server.openai.logprobs import TokenTexts
from kvist.server.openai.models import served
from kvist.server.openai.replies import answers, new_id, noted_cache, reply
from kvist.server.openai.response_events import Event, Items
from kvist.server.openai.response_shapes import ResponseObject, ResponseUsage, Status
from kvist.server.openai.responses_input import chat_request, offered_tools
from kvist.server.openai.responses_schema import FunctionTool, NamespaceTool, ResponsesBody
from kvist.server.openai.stream import EventStream, event, raise_failure
from kvist.service.chat import Chat, ChatDelta, ChatSession
from kvist.service.contexts import CHAT
from kvist.service.serving import Serving

LOGPROBS = "message.output_text.logprobs"  # what `include` has for them


def add_responses(routes: APIRouter, serving: Serving, chat: Chat, texts: TokenTexts) -> None:
    """Add the route."""

    @routes.post("/v1/responses", response_model=None, responses=answers(ResponseObject, streams=True))
    async def responses(body: ResponsesBody, request: Request) -> Response:
        asked_of = served(serving, body.model)
        wanted = LOGPROBS in (body.include or ())
        options = body.options(
            serving.tokenizer,
            tenant_of(request),
            max_tokens=body.max_output_tokens,
            logprobs=body.top_logprobs or 0 if wanted or body.top_logprobs else None,
        )
        options = replace(options, adapter=asked_of.adapter)
        asked = chat_request(body, options, serving.template)
        session = await chat.ask(replace(asked, context=context_of(serving, request, body.context, CHAT)))
        noted = note(request, session.session, asked_of.name)
        answer = Answer(session, asked_of.name, body, options.logprobs, texts)
        session.session.name(answer.id, noted.request_id)
        if body.stream:
            return EventStream(answer.stream(noted), session.cancel, answer.failed, noted)
        try:
            return reply(await answer.whole(noted))
        finally:
            session.cancel()


class Answer:
    """One response under way. `logprobs`: how many of the likeliest stand beside each token, if any do."""

    def __init__(
        self, session: ChatSession, model: str, body: ResponsesBody, logprobs: int | None, texts: TokenTexts
    ) -> None:
        self._session = session
        self._logprobs = logprobs
        self._texts = texts
        self._items = Items({tool.name: tool for tool in offered_tools(body)})
        self._reasoning_tokens = 0
        self._numbers = itertools.count()
        self._response = _begun(model, body)
        self.id = self._response["id"]

    async def whole(self, noted: Note) -> ResponseObject:
        """The response once it is complete."""
        async for delta in self._session:
            self._push(delta)
        noted.finish = self._response["status"]
        return self._response

    async def stream(self, noted: Note) -> AsyncIterator[bytes]:
        """The events; those of one delta together."""
        yield self._whole("response.created") + self._whole("response.in_progress")
        async for delta in self._session:
            if events := self._push(delta):
                yield b"".join(map(self._encoded, events))
        noted.finish = self._response["status"]
        yield self._whole(f"response.{self._response['status']}")

    def failed(self, problem: Problem) -> bytes:
        """The last event of a stream, of which something went wrong."""
        code = "rate_limit_exceeded" if problem.status == 429 else "server_error"
        if problem.status < 500 and problem.status != 429:
            code = "invalid_prompt"
        self._response |= {"status": "failed", "error": {"code": code, "message": problem.message}}
        self._response["output"] = self._items.done
        return self._whole("response.failed")

    def _push(self, delta: ChatDelta) -> list[Event]:
        """The events that a delta gives; the last one completes the response."""
        raise_failure(delta.error, delta.finish)
        if self._items.reasons:
            self._reasoning_tokens += len(delta.tokens)
        if self._logprobs is not None:
            self._items.note(self._texts.entries(delta.tokens, self._logprobs))
        events = [event for part in delta.parts for event in self._items.push(part)]
        if delta.finish is not None:
            cut = delta.finish is FinishReason.LENGTH
            events += self._items.finish("incomplete" if cut else "completed")
            self._complete("incomplete" if cut else "completed")
        return events

    def _complete(self, status: Status) -> None:
        response = self._response
        response["status"] = status
        response["completed_at"] = int(time.time()) if status == "completed" else None
        response["incomplete_details"] = {"reason": "max_output_tokens"} if status == "incomplete" else None
        response["output"] = self._items.done
        response["usage"] = self._usage()
        if (cache := noted_cache([self._session.session]).get("kvist")) is not None:
            response["kvist"] = cache

    def _usage(self) -> ResponseUsage:
        session = self._session.session
        prompt, cached = session.prompt_tokens, session.cached_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": prompt - cached},
            "output_tokens": session.new_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": prompt + session.new_tokens,
        }

    def _whole(self, kind: str) -> bytes:
        return self._encoded({"type": kind, "response": self._response})

    def _encoded(self, data: Event) -> bytes:
        return event({**data, "sequence_number": next(self._numbers)}, data["type"])


def _begun(model: str, body: ResponsesBody) -> ResponseObject:
    """The response before anything of it has come. What the body left out has the value that is in force."""
    text = {} if body.text is None else body.text.model_dump(by_alias=True, exclude_none=True)
    choice = body.tool_choice
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "usage": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "background": False,
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": choice if isinstance(choice, str) else "auto" if choice is None else choice.model_dump(),
        "tools": [_shown_tool(tool) for tool in body.tools or () if isinstance(tool, FunctionTool | NamespaceTool)],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _shown_tool(tool: FunctionTool | NamespaceTool) -> dict[str, Any]:
    """A tool of which the model was told."""
    shown = tool.model_dump(exclude={"tools"})
    if isinstance(tool, NamespaceTool):
        shown["description"] = tool.description or ""
        shown["tools"] = [inner.model_dump() for inner in tool.tools if isinstance(inner, FunctionTool)]
    return shown
