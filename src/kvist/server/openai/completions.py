"""`POST /v1/completions`: texts or token ids, continued; with `echo` and `logprobs`, scored."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvist.runtime.request import FinishReason, Grammar
from kvist.server.contexts import context_of
from kvist.server.errors import ApiError, openai_error
from kvist.server.limits import tenant_of
from kvist.server.logs import Note, note, note_of
from kvist.server.openai.completions_schema import CompletionBody
from kvist.server.openai.guided import Form
from kvist.server.openai.logprobs import LegacyWriter, TokenTexts
from kvist.server.openai.models import served
from kvist.server.openai.replies import (
    FINGERPRINT,
    LegacyLogprobs,
    TextChoice,
    TextCompletion,
    answers,
    new_id,
    noted_cache,
    reply,
    shown_progress,
    usage_of,
)
from kvist.server.openai.stream import DONE, EventStream, event, raise_failure
from kvist.service.aside import LIGHT
from kvist.service.chat import Options, check_length, encode, text_job
from kvist.service.contexts import TEXT, Context
from kvist.service.explanation import Origin
from kvist.service.sampling import Proposed
from kvist.service.serving import Serving
from kvist.service.session import Delta, Session
from kvist.text.tokenizer import Tokenizer

Route = Callable[[CompletionBody, Request], Awaitable[Response]]

_MAX_TOKENS = 16  # what OpenAI has by default


def add_completions(routes: APIRouter, serving: Serving, texts: TokenTexts) -> Route:
    """Add the route, and return what answers it."""

    @routes.post("/v1/completions", response_model=None, responses=answers(TextCompletion, streams=True))
    async def completions(body: CompletionBody, request: Request) -> Response:
        asked_of = served(serving, body.model)
        options = replace(
            _options(body, serving.tokenizer, tenant_of(request), serving.proposed), adapter=asked_of.adapter
        )
        context = context_of(serving, request, body.context, TEXT)
        if context is not None:
            options = replace(options, imported=context.imported)
        prompts = await read_prompts(body.prompt, serving, options.tenant, context)
        sessions: list[Session] = []
        form = body.form()
        grammar = None
        if form != Form():
            grammar = await serving.aside.run(options.tenant, lambda: grammar_of(form, serving))
        try:
            for prompt in prompts:
                origin = Origin(prompt.text, session=options.session)
                job = text_job(serving, prompt.tokens, options, grammar, origin=origin, warnings=prompt.warnings)
                sessions.append(serving.submit(job))
                note(request, sessions[-1], asked_of.name)
        except BaseException:
            _cancel(sessions)
            raise
        answer = Answer(prompts, sessions, asked_of.name, options, bool(body.echo), bool(body.return_token_ids), texts)
        noted = note_of(request)
        for number, session in enumerate(sessions):
            session.name(*((answer.id, noted.request_id) if not number else (f"{answer.id}-{number}",)))
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            chunks = answer.chunks(noted, usage)
            return EventStream(chunks, lambda: _cancel(sessions), lambda problem: event(openai_error(problem)), noted)
        try:
            return reply(await answer.whole(noted))
        finally:
            _cancel(sessions)

    return completions


def grammar_of(form: Form, serving: Serving) -> Callable[[], Grammar] | None:
    """What the texts must follow, if anything. Raises `RequestError` for what cannot be followed."""
    if form.guide is not None:
        return form.guide.grammar(serving.grammars)
    if form.schema is None:
        return None
    return serving.grammars.json_schema(form.schema) if form.schema else serving.grammars.json_object()


@dataclass(frozen=True)
class TextPrompt:
    """A prompt as it was sent (its text, where it was one) and as the model reads it; `warnings` say what it cannot."""

    text: str | None
    tokens: list[int]
    warnings: tuple[str, ...] = ()


async def read_prompts(
    prompt: str | list[str] | list[int] | list[list[int]],
    serving: Serving,
    tenant: str,
    context: Context | None = None,
) -> list[TextPrompt]:
    """The prompts of a body, each behind the context where there is one. Raises `TextError` for what cannot be
    tokenized, and `ContextError` for what is so long that it cannot fit."""
    items: Sequence[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if sum(len(item) for item in items if isinstance(item, str)) <= LIGHT:
        return _read(items, serving, context)
    return await serving.aside.run(tenant, lambda: _read(items, serving, context))


def _read(items: Sequence[Any], serving: Serving, context: Context | None) -> list[TextPrompt]:
    head, begun = ("", []) if context is None else (context.text, context.tokens)

    def read(item: Any) -> TextPrompt:
        if not isinstance(item, str):
            return TextPrompt(None, [*begun, *item])
        check_length(serving, item)
        tokens, warnings = encode(serving.tokenizer, item, add_special=context is None)
        return TextPrompt(head + item, [*begun, *tokens], warnings)

    return [read(item) for item in items]


def _options(body: CompletionBody, tokenizer: Tokenizer, tenant: str, proposed: Proposed) -> Options:
    choices = body.n or 1
    if body.best_of is not None and body.best_of != choices:
        raise ApiError(400, f"best_of: it must be n, {choices}: answers are not ranked here", param="best_of")
    max_tokens = _MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise ApiError(
            400, "max_tokens: 0 goes with echo: true; without, there is nothing to answer", param="max_tokens"
        )
    echoed = body.logprobs if body.echo else None
    return body.options(
        tokenizer,
        tenant,
        max_tokens=max_tokens,
        choices=choices,
        logprobs=body.logprobs,
        prompt_logprobs=0 if max_tokens == 0 and echoed is None else echoed,
        proposed=proposed,
    )


class _Choice:
    """One choice of one prompt under way: what it adds to its text and to its log-probabilities."""

    def __init__(
        self, index: int, prompt: TextPrompt, session: Session, echo: bool, writer: LegacyWriter | None
    ) -> None:
        self.index = index
        self.finish: str | None = None
        self._prompt = prompt
        self._session = session
        self._echo = echo
        self._writer = writer

    @property
    def scores(self) -> bool:
        """Whether log-probabilities are wanted."""
        return self._writer is not None

    def push(self, delta: Delta, tokenizer: Tokenizer) -> str:
        """The text that a delta adds; that of the first begins with the prompt where it is echoed."""
        text = delta.text
        if self._echo:
            self._echo = False
            echoed = self._prompt.text
            if echoed is None:
                echoed = tokenizer.decode(self._prompt.tokens, skip_special=False)
            if self._writer is not None:
                self._writer.write_prompt(self._prompt.tokens, self._session.prompt_logprobs, echoed)
            text = echoed + text
        if self._writer is not None:
            self._writer.write(delta.tokens)
        if delta.finish_reason is not None:
            self.finish = "length" if delta.finish_reason is FinishReason.LENGTH else "stop"
        return text

    def logprobs(self) -> LegacyLogprobs | None:
        """What came since the last time."""
        return None if self._writer is None else self._writer.take()


class Answer:
    """All choices of all prompts of one request; those of the first prompt come first."""

    def __init__(
        self,
        prompts: Sequence[TextPrompt],
        sessions: Sequence[Session],
        model: str,
        options: Options,
        echo: bool,
        ids: bool,
        texts: TokenTexts,
    ) -> None:
        self._ids = ids
        self._sessions = sessions
        self._per_prompt = options.choices
        self._tokenizer = texts.tokenizer
        self._choices: list[_Choice] = []
        for prompt, session in zip(prompts, sessions, strict=True):
            for _ in range(options.choices):
                writer = None if options.logprobs is None else LegacyWriter(texts, options.logprobs)
                self._choices.append(_Choice(len(self._choices), prompt, session, echo, writer))
        self.id = new_id("cmpl-")
        self._head = {
            "id": self.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    async def whole(self, noted: Note) -> dict[str, Any]:
        """All choices, once they are complete."""
        pieces: list[list[str]] = [[] for _ in self._choices]
        ids: list[list[int]] = [[] for _ in self._choices]
        async for choice, delta in self._deltas():
            pieces[choice.index].append(choice.push(delta, self._tokenizer))
            ids[choice.index] += [token.id for token in delta.tokens]
        noted.finish = self._finish
        choices = [_shown(choice, "".join(pieces[choice.index]), choice.finish) for choice in self._choices]
        for shown in choices if self._ids else ():
            shown["token_ids"] = ids[shown["index"]]
        usage = usage_of(self._sessions)
        return {**self._head, "choices": choices, "usage": usage, **noted_cache(self._sessions)}

    async def chunks(self, noted: Note, usage: bool) -> AsyncIterator[bytes]:
        """The stream. `usage`: a last chunk says what the request took."""
        rest = {"usage": None} if usage else {}
        async for choice, delta in self._deltas():
            if delta.progress is not None:
                yield event({**self._head, "choices": [], **rest, **shown_progress(delta.progress)})
                continue
            text = choice.push(delta, self._tokenizer)
            if text or choice.finish or ((choice.scores or self._ids) and delta.tokens):
                shown = _shown(choice, text, choice.finish)
                if self._ids:
                    shown["token_ids"] = [token.id for token in delta.tokens]
                cache = noted_cache(self._sessions) if choice.finish else {}
                yield event({**self._head, "choices": [shown], **rest, **cache})
        noted.finish = self._finish
        if usage:
            yield event({**self._head, "choices": [], "usage": usage_of(self._sessions)})
        yield DONE

    async def _deltas(self) -> AsyncIterator[tuple[_Choice, Delta]]:
        async for position, delta in merged(self._sessions):
            raise_failure(delta.error, delta.finish_reason)
            yield self._choices[position * self._per_prompt + delta.choice], delta

    @property
    def _finish(self) -> str:
        return "+".join(sorted({choice.finish or "stop" for choice in self._choices}))


async def merged(sessions: Sequence[Session]) -> AsyncIterator[tuple[int, Delta]]:
    """The deltas of all sessions as they come, each with its session's position."""
    if len(sessions) == 1:
        async for delta in sessions[0]:
            yield 0, delta
        return
    iterators = [aiter(session) for session in sessions]
    pending = {asyncio.ensure_future(anext(iterator)): position for position, iterator in enumerate(iterators)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                position = pending.pop(task)
                try:
                    delta = task.result()
                except StopAsyncIteration:
                    continue
                pending[asyncio.ensure_future(anext(iterators[position]))] = position
                yield position, delta
    finally:
        for task in pending:
            task.cancel()


def _shown(choice: _Choice, text: str, finish: str | None) -> TextChoice:
    return {"index": choice.index, "text": text, "logprobs": choice.logprobs(), "finish_reason": finish}


def _cancel(sessions: Sequence[Session]) -> None:
    for session in sessions:
        session.cancel()
