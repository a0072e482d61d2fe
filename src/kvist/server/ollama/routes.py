"""`/api/...` as Ollama has it. A server has the model that it was started with: what would fetch, make or remove models
is refused by name. Streams are lines of JSON; in a silence none is sent, for clients read each as an answer."""

from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvist.base.version import __version__
from kvist.server.anytype import AnyType
from kvist.server.clock import Clock
from kvist.server.errors import OLLAMA_RESPONSES, ApiError, ollama_error
from kvist.server.limits import tenant_of
from kvist.server.llamacpp.sampling import translated
from kvist.server.logs import note
from kvist.server.ollama import facts
from kvist.server.ollama.replies import Answer, Shape, as_message, as_response, line, loaded
from kvist.server.ollama.schema import EmbedBody, GenerateBody, Generating, OldEmbedBody, OllamaChatBody, ShowBody
from kvist.server.ollama.translation import chat_of, chat_of_prompt, check_thinks, most_tokens, named, schema_of
from kvist.server.openai import chat_schema
from kvist.server.openai.body import Generation
from kvist.server.openai.conversation import chat_request
from kvist.server.openai.logprobs import TokenTexts
from kvist.server.openai.models import Served
from kvist.server.openai.replies import reply, reply_with
from kvist.server.openai.stream import LINES, EventStream
from kvist.service.chat import Chat, ChatSession, Options, check_length, encode, text_job
from kvist.service.explanation import Origin
from kvist.service.serving import Serving
from kvist.service.session import Job
from kvist.text.response import FORMATS

_FOLLOWED = "0.12.11"  # the version of Ollama whose API this is: clients ask, and want a late one
_REFUSED = ("pull", "push", "create", "copy", "delete", "blobs/{digest}")
_NANO = 1_000_000_000
_SHOWN = {LINES.media_type: {"schema": {"description": "Objects, one a line, unless stream is false."}}}
_LINES: dict[int | str, dict[str, Any]] = {200: {"content": _SHOWN}}


def router(serving: Serving) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["Ollama"], responses=OLLAMA_RESPONSES, route_class=AnyType)
    door = _Door(serving)

    @routes.post("/api/chat", response_model=None, responses=_LINES)
    async def chat(body: OllamaChatBody, request: Request) -> Response:
        """Answer a conversation."""
        asked_of = named(serving, body.model)
        if not body.messages:
            return reply(loaded(asked_of.name, as_message))
        return await door.chat(chat_of(body), body, as_message, asked_of, request)

    @routes.post("/api/generate", response_model=None, responses=_LINES)
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Answer a prompt; or continue it as it is, where it is raw or the model does not chat."""
        asked_of = named(serving, body.model)
        if not body.prompt:
            return reply(loaded(asked_of.name, as_response))
        if body.raw or serving.template is None:
            return await door.continue_text(body, asked_of, request)
        return await door.chat(chat_of_prompt(body), body, as_response, asked_of, request)

    @routes.post("/api/embed", response_model=None)
    async def embed(body: EmbedBody, request: Request) -> Response:
        """Texts as vectors."""
        asked_of, clock = named(serving, body.model), Clock()
        texts = [body.input] if isinstance(body.input, str) else body.input
        tenant = tenant_of(request)
        prompts = await serving.aside.run(tenant, lambda: [serving.tokenizer.encode(text) for text in texts])
        if body.truncate is not False:
            prompts = [prompt[: serving.context] for prompt in prompts]
        vectors = await serving.embed(prompts, tenant, asked_of.adapter) if prompts else []
        if vectors and body.dimensions not in (None, len(vectors[0])):
            text = f"dimensions: this model's vectors have {len(vectors[0]):,}, and cannot be cut"
            raise ApiError(400, text, param="dimensions")
        clock.note(0)
        counts = {"total_duration": round(clock.total * _NANO), "load_duration": 0}
        said = {"model": asked_of.name, **counts, "prompt_eval_count": sum(map(len, prompts))}
        return await reply_with(said, "embeddings", vectors)

    @routes.post("/api/embeddings", response_model=None)
    async def embeddings(body: OldEmbedBody, request: Request) -> Response:
        """One text as a vector, as it was asked before."""
        asked_of = named(serving, body.model)
        tenant = tenant_of(request)
        prompt = await serving.aside.run(tenant, lambda: serving.tokenizer.encode(body.prompt))
        (vector,) = await serving.embed([prompt[: serving.context]], tenant, asked_of.adapter)
        return reply({"embedding": vector})

    _add_facts(routes, serving)
    return routes


def _add_facts(routes: APIRouter, serving: Serving) -> None:
    """What answers without the engine."""

    async def tags() -> Response:
        return reply({"models": facts.listed(serving)})

    async def running() -> Response:
        return reply({"models": facts.loaded(serving)})

    async def version() -> Response:
        return reply({"version": _FOLLOWED, "kvist": __version__})

    for path, answer in {"tags": tags, "ps": running, "version": version}.items():
        routes.get(f"/api/{path}", response_model=None)(answer)
        routes.head(f"/api/{path}", response_model=None, include_in_schema=False)(answer)

    @routes.post("/api/show", response_model=None)
    async def show(body: ShowBody) -> Response:
        named(serving, body.model or body.name)
        return reply(facts.described(serving))

    async def refuse(request: Request) -> Response:
        verb = request.url.path.split("/")[2]
        text = f"{verb} is not supported: this server has the model that kvist serve was started with"
        raise ApiError(400, text, code="not_supported")

    for path in _REFUSED:
        routes.add_api_route(f"/api/{path}", refuse, methods=["POST", "DELETE", "HEAD"], include_in_schema=False)


class _Door:
    """What the two routes that write share."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._chat = Chat(serving)
        self._texts = TokenTexts(serving.tokenizer)

    async def chat(
        self, asked: chat_schema.ChatBody, body: Generating, shape: Shape, asked_of: Served, request: Request
    ) -> Response:
        """Answer a conversation."""
        check_thinks(self._serving, asked_of.name, body.think)
        options = self._options(asked, body, asked_of, request)
        session = await self._chat.ask(chat_request(asked, options, self._serving.template))
        return await self._answer(session, body, shape, options, asked_of, request)

    async def continue_text(self, body: GenerateBody, asked_of: Served, request: Request) -> Response:
        """Continue a text. A template's place for instructions is not there."""
        if body.system:
            text = (
                "it has its place in a chat template, and none is used"
                if body.raw
                else "this model has no chat template"
            )
            raise ApiError(400, f"system: {text}", param="system")
        check_thinks(self._serving, asked_of.name, body.think)
        serving, schema = self._serving, schema_of(body.format)
        asked = translated(Generation, {} if body.options is None else body.options.fields())
        options = self._options(asked, body, asked_of, request)

        def read() -> Job:
            check_length(serving, body.prompt)
            grammar = None if schema is None else serving.grammars.json_schema(schema or {"type": "object"})
            tokens, warnings = encode(serving.tokenizer, body.prompt, add_special=True)
            return text_job(serving, tokens, options, grammar, origin=Origin(body.prompt), warnings=warnings)

        job = await serving.aside.run(options.tenant, read)
        session = ChatSession(serving.submit(job), [FORMATS["plain"].parser()])
        return await self._answer(session, body, as_response, options, asked_of, request)

    def _options(self, asked: Generation, body: Generating, asked_of: Served, request: Request) -> Options:
        most = body.top_logprobs or 0 if body.logprobs or body.top_logprobs else None
        tokenizer, tenant = self._serving.tokenizer, tenant_of(request)
        proposed = self._serving.proposed
        options = asked.options(
            tokenizer, tenant, max_tokens=most_tokens(body.options), logprobs=most, proposed=proposed
        )
        return replace(options, adapter=asked_of.adapter)

    async def _answer(
        self,
        session: ChatSession,
        body: Generating,
        shape: Shape,
        options: Options,
        asked_of: Served,
        request: Request,
    ) -> Response:
        noted = note(request, session.session, asked_of.name)
        session.session.name(noted.request_id)
        answer = Answer(session, asked_of.name, shape, options.logprobs, self._texts)
        if body.stream is not False:
            lines = answer.lines(noted)
            return EventStream(lines, session.cancel, lambda problem: line(ollama_error(problem)), noted, LINES)
        try:
            return reply(await answer.whole(noted))
        finally:
            session.cancel()
