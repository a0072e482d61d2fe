"""The routes of the Messages API over a chat whose answers are written down beforehand."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anthropic
import httpx2
from fastapi import FastAPI
from starlette.types import ASGIApp

from kvist.base.errors import KvistError
from kvist.runtime.request import FinishReason, TokenLogprobs
from kvist.server import errors
from kvist.server.anthropic import messages
from kvist.server.limits import Gate, Intake
from kvist.server.logs import RequestLog
from kvist.server.settings import ServerSettings
from kvist.service.chat import ChatDelta, ChatRequest
from kvist.service.sampling import Proposed
from kvist.service.session import NewToken
from kvist.text.response import Part

T = TypeVar("T")
MODEL = "twig-1"
ASK: dict[str, Any] = {"model": "any", "max_tokens": 100, "messages": [{"role": "user", "content": "Hello"}]}
THINK: dict[str, Any] = {"type": "enabled", "budget_tokens": 1024}


@dataclass
class Serving:
    """What the routes themselves read."""

    name: str = MODEL
    strict_model: bool = False
    adapters: dict[str, str] = field(default_factory=dict)
    proposed: Proposed = field(default_factory=Proposed)


@dataclass
class Session:
    """Counts as `service.session.Session` does."""

    prompt_tokens: int
    cached_tokens: int = 0
    new_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    explanation = None

    def name(self, *ids: str) -> None:
        self.names = ids


@dataclass
class Script:
    """`steps`: deltas, seconds to wait, or an exception to raise. `refusal` is raised at the start."""

    steps: Sequence[ChatDelta | float | Exception] = ()
    prompt_tokens: int = 10
    cached_tokens: int = 0
    refusal: KvistError | None = None
    marked_tokens: int = 10**9


class ScriptedSession:
    def __init__(self, script: Script) -> None:
        self.session = Session(script.prompt_tokens)
        self.cancelled = 0
        self.read = 0  # steps that somebody took
        self._script = script

    async def __aiter__(self) -> AsyncIterator[ChatDelta]:
        for step in self._script.steps:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            self.session.cached_tokens = self._script.cached_tokens
            self.session.new_tokens += len(step.tokens)
            self.read += 1
            yield step

    def cancel(self) -> None:
        self.cancelled += 1


class ScriptedChat:
    """Stands where `Chat` does and plays one script to every request."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[ChatRequest] = []
        self.sessions: list[ScriptedSession] = []

    def start(self, request: ChatRequest) -> ScriptedSession:
        self.requests.append(request)
        if self.script.refusal is not None:
            raise self.script.refusal
        self.sessions.append(ScriptedSession(self.script))
        return self.sessions[-1]

    def count(self, request: ChatRequest) -> int:
        self.requests.append(request)
        return self.script.prompt_tokens

    async def ask(self, request: ChatRequest) -> ScriptedSession:
        return self.start(request)

    async def counted(self, request: ChatRequest) -> int:
        return self.count(request)

    async def begins_with(self, request: ChatRequest, beginning: ChatRequest) -> int:
        self.beginning = beginning
        return self.script.marked_tokens

    @property
    def request(self) -> ChatRequest:
        (request,) = self.requests
        return request

    @property
    def session(self) -> ScriptedSession:
        (session,) = self.sessions
        return session


def said(
    *parts: Part,
    tokens: int = 1,
    finish: FinishReason | None = None,
    stop: str | None = None,
    error: KvistError | None = None,
    reasoning: int = 0,
) -> ChatDelta:
    """A delta of the only choice."""
    return ChatDelta(0, parts, tuple(NewToken(token, None) for token in range(tokens)), finish, stop, error, reasoning)


def application(chat: ScriptedChat, settings: ServerSettings | None = None) -> ASGIApp:
    """The routes behind the middlewares that stand before them in a server."""
    settings = settings or ServerSettings()
    app = FastAPI()
    made, messages.Chat = messages.Chat, lambda serving: chat  # type: ignore[assignment, misc]
    try:
        app.include_router(messages.router(Serving(), settings))  # type: ignore[arg-type]
    finally:
        messages.Chat = made  # type: ignore[misc]
    errors.install(app)
    return RequestLog(Gate(Intake(app, settings), settings), lambda route, status: None)


def with_client(app: ASGIApp, use: Callable[[anthropic.AsyncAnthropic], Awaitable[T]], key: str = "k") -> T:
    """What `use` returns, given the official client on `app`."""

    async def run() -> T:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
        async with anthropic.AsyncAnthropic(
            api_key=key, base_url="http://127.0.0.1", http_client=http, max_retries=0
        ) as client:
            return await use(client)

    return asyncio.run(run())


def post(app: ASGIApp, body: Any, path: str = "/v1/messages") -> httpx2.Response:
    """A bare response."""

    async def run() -> httpx2.Response:
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app, raise_app_exceptions=False), base_url="http://127.0.0.1"
        ) as http:
            return await http.post(path, json=body)

    return asyncio.run(run())


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream's body. Each has its name twice, and the same."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def streamed(chat: ScriptedChat, **fields: Any) -> list[dict[str, Any]]:
    """The events of the answer to `ASK`."""
    response = post(application(chat), ASK | {"stream": True} | fields)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)
