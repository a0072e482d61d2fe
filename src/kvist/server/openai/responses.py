"""`/v1/responses`: one answer to a conversation, whole or as a stream of events, remembered for a while."""

import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvist.runtime.request import FinishReason, Sampling
from kvist.server.contexts import context_of
from kvist.server.errors import ApiError, Problem
from kvist.server.limits import tenant_of
from kvist.server.logs import Note, note
from kvist.server.openai.logprobs import TokenTexts
from kvist.server.openai.models import served
from kvist.server.openai.remembered import Memory
from kvist.server.openai.replies import answers, left_in_cache, new_id, noted_cache, reply, shown_progress
from kvist.server.openai.response_events import Event, Items
from kvist.server.openai.response_shapes import DeletedResponse, ResponseObject, ResponseUsage, Status
from kvist.server.openai.responses_input import chat_request, given_items, offered_tools
from kvist.server.openai.responses_schema import FunctionTool, NamespaceTool, ResponsesBody
from kvist.server.openai.stream import EventStream, event, raise_failure
from kvist.service.chat import Chat, ChatDelta, ChatSession, Options
from kvist.service.contexts import CHAT
from kvist.service.serving import Serving

LOGPROBS = "message.output_text.logprobs"  # what `include` has for them
_NOTHING: Mapping[str, Any] = MappingProxyType({})
SEALED = "reasoning.encrypted_content"


def add_responses(routes: APIRouter, serving: Serving, chat: Chat, texts: TokenTexts) -> None:
    """Add the routes."""
    memory = Memory()

    @routes.post("/v1/responses", response_model=None, responses=answers(ResponseObject, streams=True))
    async def responses(body: ResponsesBody, request: Request) -> Response:
        asked_of = served(serving, body.model)
        tenant, wanted = tenant_of(request), LOGPROBS in (body.include or ())
        options = body.options(
            serving.tokenizer,
            tenant,
            max_tokens=body.max_output_tokens,
            logprobs=body.top_logprobs or 0 if wanted or body.top_logprobs else None,
            proposed=serving.proposed,
        )
        options = replace(options, adapter=asked_of.adapter)
        given = given_items(body, lambda item_id, place: memory.item(tenant, item_id, place))
        before = [] if body.previous_response_id is None else memory.before(tenant, body.previous_response_id)
        asked = chat_request(body, [*before, *given], options, serving.template)
        session = await chat.ask(replace(asked, context=context_of(serving, request, body.context, CHAT)))
        noted = note(request, session.session, asked_of.name)

        def remember(response: ResponseObject) -> None:
            if response["store"]:
                memory.add(tenant, response, given, body.previous_response_id)

        answer = Answer(session, asked_of.name, body, options, texts, remember)
        session.session.name(answer.id, noted.request_id)
        if body.stream:
            return EventStream(answer.stream(noted), session.cancel, answer.failed, noted)
        try:
            return reply(await answer.whole(noted))
        finally:
            session.cancel()

    @routes.get("/v1/responses/{response_id}", response_model=None, responses=answers(ResponseObject))
    async def get(response_id: str, request: Request) -> Response:
        if request.query_params.get("stream") == "true":
            raise ApiError(400, "stream: a response that is complete is not streamed again", param="stream")
        return reply(memory.get(tenant_of(request), response_id))

    @routes.delete("/v1/responses/{response_id}", response_model=None, responses=answers(DeletedResponse))
    async def delete(response_id: str, request: Request) -> Response:
        memory.delete(tenant_of(request), response_id)
        return reply({"id": response_id, "object": "response", "deleted": True})


class Answer:
    """One response under way, drawn as `options` say. `remember` is told of the response once it is complete."""

    def __init__(
        self,
        session: ChatSession,
        model: str,
        body: ResponsesBody,
        options: Options,
        texts: TokenTexts,
        remember: Callable[[ResponseObject], None],
    ) -> None:
        self._session = session
        self._logprobs = options.logprobs
        self._texts = texts
        self._remember = remember
        self._keeps = body.asks_to_keep
        self._items = Items({tool.name: tool for tool in offered_tools(body)}, SEALED in (body.include or ()))
        self._reasoning_tokens = 0
        self._numbers = itertools.count()
        self._response = _begun(model, body, options.sampling)
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
            if delta.progress is not None:
                yield self._whole("response.in_progress", shown_progress(delta.progress))
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
        self._reasoning_tokens += delta.reasoning
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
        self._remember(response)

    def _usage(self) -> ResponseUsage:
        session = self._session.session
        prompt, cached = session.prompt_tokens, session.cached_tokens
        written = left_in_cache(session) if self._keeps else 0
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
            "output_tokens": session.new_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": prompt + session.new_tokens,
        }

    def _whole(self, kind: str, beside: Mapping[str, Any] = _NOTHING) -> bytes:
        return self._encoded({"type": kind, "response": self._response, **beside})

    def _encoded(self, data: Event) -> bytes:
        return event({**data, "sequence_number": next(self._numbers)}, data["type"])


def _begun(model: str, body: ResponsesBody, sampling: Sampling) -> ResponseObject:
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
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "background": False,
        "store": body.store is not False,
        "temperature": sampling.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": choice if isinstance(choice, str) else "auto" if choice is None else choice.model_dump(),
        "tools": [_shown_tool(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _shown_tool(tool: FunctionTool | NamespaceTool) -> dict[str, Any]:
    """A tool of which the model was told."""
    shown = tool.model_dump(exclude={"tools"})
    if isinstance(tool, NamespaceTool):
        shown["description"] = tool.description or ""
        shown["tools"] = [inner.model_dump() for inner in tool.tools]
    return shown
