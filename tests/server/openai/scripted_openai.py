"""OpenAI's routes over a model whose answers are written down beforehand."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2
import openai
import tokenizers
from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from kvist.base.errors import KvistError
from kvist.runtime.request import FinishReason, TokenLogprobs
from kvist.server import errors
from kvist.server.limits import Gate, Intake
from kvist.server.logs import RequestLog
from kvist.server.openai.chat import add_chat
from kvist.server.openai.completions import add_completions
from kvist.server.openai.embeddings import add_embeddings
from kvist.server.openai.logprobs import TokenTexts
from kvist.server.openai.models import add_models
from kvist.server.openai.responses import add_responses
from kvist.server.settings import ServerSettings
from kvist.service.aside import Aside
from kvist.service.chat import ChatDelta, ChatRequest
from kvist.service.sampling import Proposed
from kvist.service.session import Delta, Job, NewToken
from kvist.text.response import Part
from kvist.text.tokenizer import Tokenizer

T = TypeVar("T")
MODEL = "acme/twig-1"
HELLO = [{"role": "user", "content": "Hello"}]
END = 256  # the id of the end-of-text token; every other id is a byte


def byte_tokenizer() -> Tokenizer:
    """One token a byte, whose id is its value, and one token that ends a text."""
    spelled = {character: index for index, character in enumerate(_alphabet())}
    backend = tokenizers.Tokenizer(models.BPE(spelled, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(backend, eos_ids=[END])


def _alphabet() -> list[str]:
    """GPT-2's spelling of each byte, in order."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def logprobs_of(token: int, most: int) -> TokenLogprobs:
    """Some log-probabilities that can be told from each other: odd tokens are the likeliest, even ones are not."""
    top = [(token if token % 2 else 90, -0.25), *((65 + rank, -2.0 - rank) for rank in range(20))]
    return TokenLogprobs(-0.25 if token % 2 else -1.5, tuple(top[:most]))


class ScriptedSession:
    """`Session` and `ChatSession` in one: plays steps, each a delta, seconds to wait, or an exception to raise."""

    def __init__(self, prompt_tokens: int, steps: Sequence[Any], cached_tokens: int = 0) -> None:
        self.session = self
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.new_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.cancelled = 0
        self.read = 0  # deltas that somebody took
        self._steps = steps
        self._cached = cached_tokens

    explanation = None

    def name(self, *ids: str) -> None:
        self.names = ids

    async def __aiter__(self) -> AsyncIterator[Any]:
        for step in self._steps:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            self.cached_tokens = self._cached
            self.new_tokens += len(step.tokens)
            self.read += 1
            yield step

    def cancel(self) -> None:
        self.cancelled += 1


@dataclass
class ScriptedChat:
    """Stands where `Chat` does and plays its steps to every request. `refusal` is raised instead of a start."""

    steps: Sequence[Any] = ()
    prompt_tokens: int = 10
    cached_tokens: int = 0
    refusal: KvistError | None = None
    requests: list[ChatRequest] = field(default_factory=list)
    sessions: list[ScriptedSession] = field(default_factory=list)

    def start(self, request: ChatRequest) -> ScriptedSession:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        self.sessions.append(ScriptedSession(self.prompt_tokens, self.steps, self.cached_tokens))
        return self.sessions[-1]

    async def ask(self, request: ChatRequest) -> ScriptedSession:
        return self.start(request)

    @property
    def request(self) -> ChatRequest:
        (request,) = self.requests
        return request

    @property
    def session(self) -> ScriptedSession:
        (session,) = self.sessions
        return session


@dataclass
class ScriptedTemplate:
    source: str = ""


@dataclass
class ScriptedServing:
    """Stands where `Serving` does. `answers`: the steps for each job in turn; the last ones are for all that follow."""

    answers: Sequence[Sequence[Any]] = ((),)
    refuse_after: int | None = None
    refusal: KvistError | None = None
    cached_tokens: int = 0
    name: str = MODEL
    strict_model: bool = False
    context: int = 1000
    created: int = 1_700_000_000
    adapters: dict[str, str] = field(default_factory=dict)
    proposed: Proposed = field(default_factory=Proposed)
    template: ScriptedTemplate | None = None
    tokenizer: Tokenizer = field(default_factory=byte_tokenizer)
    jobs: list[Job] = field(default_factory=list)
    sessions: list[ScriptedSession] = field(default_factory=list)
    aside: Aside = field(default_factory=Aside)
    embedded: list[tuple[list[list[int]], str]] = field(default_factory=list)

    def submit(self, job: Job) -> ScriptedSession:
        if self.refusal is not None and len(self.jobs) == (self.refuse_after or 0):
            raise self.refusal
        steps = self.answers[min(len(self.jobs), len(self.answers) - 1)]
        self.jobs.append(job)
        session = ScriptedSession(len(job.request.prompt), steps, self.cached_tokens)
        most = job.request.prompt_logprobs
        if most is not None:
            session.prompt_logprobs = [None, *(logprobs_of(token, most) for token in job.request.prompt[1:])]
        self.sessions.append(session)
        return session

    async def embed(self, prompts: Sequence[Sequence[int]], tenant: str = "", adapter: str = "") -> list[list[float]]:
        self.embedded.append(([list(prompt) for prompt in prompts], tenant))
        return [[0.6, -0.8, float(len(prompt))] for prompt in prompts]

    @property
    def job(self) -> Job:
        (job,) = self.jobs
        return job


def said(
    *parts: Part,
    choice: int = 0,
    tokens: str | int = 1,
    logprobs: int | None = None,
    finish: FinishReason | None = None,
    stop: str | None = None,
    error: KvistError | None = None,
    reasoning: int = 0,
) -> ChatDelta:
    """A delta of a chat; `tokens` are the bytes of a text, or so many of which nobody asks."""
    return ChatDelta(choice, parts, _tokens(tokens, logprobs), finish, stop, error, reasoning)


def wrote(
    text: str,
    *,
    choice: int = 0,
    tokens: str | int | None = None,
    logprobs: int | None = None,
    finish: FinishReason | None = None,
    error: KvistError | None = None,
) -> Delta:
    """A delta of a completion, of as many tokens as its text has bytes unless `tokens` says otherwise."""
    return Delta(choice, text, _tokens(text if tokens is None else tokens, logprobs), finish, None, error)


def end_token(logprobs: int | None = None) -> tuple[NewToken, ...]:
    return (NewToken(END, None if logprobs is None else logprobs_of(END, logprobs)),)


def _tokens(tokens: str | int, logprobs: int | None) -> tuple[NewToken, ...]:
    ids = list(tokens.encode()) if isinstance(tokens, str) else list(range(tokens))
    return tuple(NewToken(token, None if logprobs is None else logprobs_of(token, logprobs)) for token in ids)


def application(
    chat: ScriptedChat | None = None, serving: ScriptedServing | None = None, settings: ServerSettings | None = None
) -> ASGIApp:
    """The routes behind the middlewares that stand before them in a server."""
    settings, given = settings or ServerSettings(), serving or ScriptedServing()
    routes = APIRouter(responses=errors.RESPONSES)
    texts = TokenTexts(given.tokenizer)
    add_models(routes, given)  # type: ignore[arg-type]
    add_chat(routes, given, chat or ScriptedChat(), texts)  # type: ignore[arg-type]
    add_completions(routes, given, texts)  # type: ignore[arg-type]
    add_responses(routes, given, chat or ScriptedChat(), texts)  # type: ignore[arg-type]
    add_embeddings(routes, given)  # type: ignore[arg-type]
    app = FastAPI()
    app.include_router(routes)
    errors.install(app)
    return RequestLog(Gate(Intake(app, settings), settings), lambda route, status: None)


def with_client(app: ASGIApp, use: Callable[[openai.AsyncOpenAI], Awaitable[T]], key: str = "k") -> T:
    """What `use` returns, given the official client on `app`."""

    async def run() -> T:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
        async with openai.AsyncOpenAI(
            api_key=key, base_url="http://127.0.0.1/v1", http_client=http, max_retries=0
        ) as client:
            return await use(client)

    return asyncio.run(run())


def post(app: ASGIApp, path: str, body: Any) -> httpx2.Response:
    """A bare response; `body` is JSON, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def run() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://127.0.0.1") as http:
            return await http.post(path, content=content, headers={"content-type": "application/json"})

    return asyncio.run(run())


def data_of(text: str) -> list[Any]:
    """The data of a stream's events, `[DONE]` left out; comments are skipped."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]
