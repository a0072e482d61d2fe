"""`/completion`, `/apply-template`, `/props` and `/slots`. `/tokenize` and `/detokenize` are in `tokens.py`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvist.base.errors import RequestError
from kvist.base.version import __version__
from kvist.runtime.request import Grammar
from kvist.runtime.request import Sampling as Drawing
from kvist.server.anytype import AnyType
from kvist.server.errors import LLAMACPP_RESPONSES, ApiError, llamacpp_error
from kvist.server.limits import tenant_of
from kvist.server.llamacpp.replies import Completion, settings_of
from kvist.server.llamacpp.sampling import translated
from kvist.server.llamacpp.schema import ApplyTemplateBody, Bias, LlamaCompletionBody
from kvist.server.logs import note
from kvist.server.openai.body import Generation
from kvist.server.openai.conversation import chat_request
from kvist.server.openai.logprobs import TokenTexts
from kvist.server.openai.models import served
from kvist.server.openai.replies import reply
from kvist.server.openai.stream import EventStream, event
from kvist.service.chat import Chat, Options, check_length, text_job
from kvist.service.explanation import Origin
from kvist.service.serving import Serving
from kvist.service.session import Job
from kvist.text.grammar import GrammarCompiler
from kvist.text.tokenizer import Tokenizer

_SHOWN = {"text/event-stream": {"schema": {"description": "Server-sent events, where stream is true."}}}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": _SHOWN}}
_NEVER = -100.0  # the bias by which a token is as good as forbidden


def router(serving: Serving) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["llama.cpp"], responses=LLAMACPP_RESPONSES, route_class=AnyType)
    chat, texts = Chat(serving), TokenTexts(serving.tokenizer)

    @routes.post("/completion", response_model=None, responses=_STREAM)
    async def completion(body: LlamaCompletionBody, request: Request) -> Response:
        """Continue a text, or token ids."""
        asked_of = served(serving, body.model)
        tenant = tenant_of(request)

        def read() -> tuple[Options, str, Job]:
            options = replace(_options(body, serving, tenant), adapter=asked_of.adapter)
            tokens, grammar = prompt_tokens(body.prompt, serving), grammar_of(body, serving.grammars)
            text = body.prompt
            if not isinstance(text, str):
                text = serving.tokenizer.decode(tokens, skip_special=False)
            return options, text, text_job(serving, tokens, options, grammar, origin=Origin(text))

        options, text, job = await serving.aside.run(tenant, read)
        session = serving.submit(job)
        noted = note(request, session, asked_of.name)
        session.name(noted.request_id)
        answer = Completion(session, asked_of.name, text, options, body.n_predict, texts)
        if body.stream:
            return EventStream(answer.events(noted), session.cancel, lambda found: event(llamacpp_error(found)), noted)
        try:
            return reply(await answer.whole(noted, bool(body.return_tokens)))
        finally:
            session.cancel()

    @routes.post("/apply-template", response_model=None)
    async def apply_template(body: ApplyTemplateBody, request: Request) -> dict[str, str]:
        """The prompt that a conversation comes to."""
        served(serving, body.model)
        options = Options(max_tokens=None, sampling=Drawing(), tenant=tenant_of(request))
        asked = chat_request(body, options, serving.template)
        return {"prompt": await serving.aside.run(options.tenant, lambda: chat.render(asked))}

    @routes.get("/props", response_model=None)
    async def props() -> Response:
        """The server and its model."""
        return reply(_props(serving))

    @routes.get("/slots", response_model=None)
    async def slots() -> list[dict[str, Any]]:
        """One for each sequence that can be under way. They are not told apart: a sequence may have any of them."""
        running = serving.load().running
        return [
            {"id": index, "n_ctx": serving.context, "speculative": False, "is_processing": index < running}
            for index in range(serving.most_running)
        ]

    return routes


def prompt_tokens(prompt: str | list[int | str], serving: Serving) -> list[int]:
    """The token ids of a prompt; texts and ids in turn are one prompt. Raises `PromptTooLong` where a text alone is."""
    tokens = list[int]()
    for index, piece in enumerate([prompt] if isinstance(prompt, str) else prompt):
        if isinstance(piece, int):
            tokens.append(piece)
        else:
            check_length(serving, piece)
            tokens += serving.tokenizer.encode(piece, add_special=index == 0)
    return tokens


def grammar_of(body: LlamaCompletionBody, grammars: GrammarCompiler) -> Callable[[], Grammar] | None:
    """What the answer must follow. Raises `RequestError` for what no answer can."""
    if body.grammar and body.json_schema is not None:
        raise RequestError("grammar and json_schema are both given; one of them will do")
    if body.json_schema is not None:
        return grammars.json_schema(body.json_schema)
    return grammars.lark(body.grammar) if body.grammar else None


def _options(body: LlamaCompletionBody, serving: Serving, tenant: str) -> Options:
    tokenizer = serving.tokenizer
    limited = body.n_predict is not None and body.n_predict >= 0
    bias = {str(token): value for entry in body.logit_bias or () for token, value in _biases(entry, tokenizer).items()}
    asked = translated(Generation, {**body.fields(), "ignore_eos": body.ignore_eos, "logit_bias": bias or None})
    return asked.options(
        tokenizer,
        tenant,
        max_tokens=max(body.n_predict or 0, 1) if limited else None,
        logprobs=body.n_probs or None,
        proposed=serving.proposed,
    )


def _biases(entry: Bias, tokenizer: Tokenizer) -> dict[int, float]:
    token, value = entry
    ids = [token] if isinstance(token, int) else tokenizer.encode(token, add_special=False)
    if not ids:
        raise ApiError(400, "logit_bias: a text without tokens", param="logit_bias")
    return dict.fromkeys(ids, _NEVER if value is False else value)


def _props(serving: Serving) -> dict[str, Any]:
    tokenizer = serving.tokenizer
    end = min(tokenizer.eos_ids, default=None)
    usual = Generation().options(tokenizer, "", max_tokens=None, proposed=serving.proposed)
    return {
        "default_generation_settings": {
            "n_ctx": serving.context,
            "params": settings_of(usual) | {"seed": -1},
        },
        "total_slots": serving.most_running,
        "model_alias": serving.name,
        "model_path": serving.name,  # where it lies is nobody's business
        "modalities": {"vision": False, "audio": False},
        "chat_template": "" if serving.template is None else serving.template.source,
        "bos_token": "" if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id) or "",
        "eos_token": "" if end is None else tokenizer.token(end) or "",
        "build_info": f"kvist {__version__}",
    }
