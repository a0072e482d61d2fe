"""From a conversation to a job for the engine, and from what the engine says to the parts of an answer.

Both wire formats stand on it, and it knows neither.
"""

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvist.base.errors import ContextError, KvistError, RequestError, TextError
from kvist.base.units import plural
from kvist.runtime.request import FinishReason, Grammar, Request, Sampling
from kvist.service.constraints import AfterReasoning, Either
from kvist.service.contexts import Context
from kvist.service.explanation import NOWHERE, Origin
from kvist.service.places import Place, find_places
from kvist.service.session import Job, NewToken, Session
from kvist.service.shelf import check_begins, with_context
from kvist.text.chat import ChatTemplate
from kvist.text.response import Part, ResponseFormat, ResponseParser, ToolCallEnd
from kvist.text.stops import StopMatcher

if TYPE_CHECKING:
    from kvist.service.serving import Serving

_NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})
_ANY: Mapping[str, Any] = MappingProxyType({"type": "object"})
_NEVER = -100.0  # the bias by which a token is as good as forbidden


@dataclass(frozen=True)
class Tool:
    """What a model may call. `parameters`: a JSON schema. `strict`: its arguments must follow the schema."""

    name: str
    description: str | None
    parameters: Mapping[str, Any]
    strict: bool = False


class ToolChoice(StrEnum):
    AUTO = "auto"  # the model decides
    NONE = "none"  # no call; the prompt stays the same, so that what is cached of it still serves
    REQUIRED = "required"  # the answer is a call


@dataclass(frozen=True)
class Options:
    """How any answer is drawn, chat or not. `max_tokens` None: as many as the context leaves room for. `session`: the
    client's name for requests that belong together; `kept`, `ttl`, `adapter`: see `Request`."""

    max_tokens: int | None
    sampling: Sampling
    stops: tuple[str, ...] = ()
    choices: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    tenant: str = ""
    ignore_eos: bool = False
    session: str | None = None
    kept: bool = True
    ttl: float = 0.0
    adapter: str = ""


@dataclass(frozen=True)
class ChatRequest:
    """A conversation and what is asked of its answer.

    `messages` are as chat templates take them: role, content (a text), tool_calls, tool_call_id, name,
    reasoning_content. A call's arguments are an object or its JSON text; text is better, because a template that can
    write it as it is then renders what the model wrote, token by token. `tool_name`, with REQUIRED: the tool that is
    called. `schema`: the answer is JSON that follows it; `{}`: any JSON object. `continue_final`: the last message is
    the assistant's and is continued. `context`: of the form "chat", stands before everything else.
    """

    messages: tuple[Mapping[str, Any], ...]
    options: Options
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice.AUTO
    tool_name: str | None = None
    parallel_tool_calls: bool = True
    schema: Mapping[str, Any] | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    continue_final: bool = False
    context: Context | None = None

    @property
    def conversation(self) -> tuple[Mapping[str, Any], ...]:
        """The messages, with the context's text before those of the system."""
        return self.messages if self.context is None else with_context(self.messages, self.context)


@dataclass(frozen=True)
class ChatDelta:
    """What one step added to one choice. The last one of a choice has `finish`, with the stop string that ended it, and
    `error` where it failed."""

    choice: int
    parts: tuple[Part, ...]
    tokens: tuple[NewToken, ...]
    finish: FinishReason | None
    stop: str | None
    error: KvistError | None


@dataclass
class ChatSession:
    """An answer under way. Iterate once. `called`: which choices have completed a call of a tool."""

    session: Session
    parsers: Sequence[ResponseParser]
    called: set[int] = field(default_factory=set)

    async def __aiter__(self) -> AsyncIterator[ChatDelta]:
        async for delta in self.session:
            parser = self.parsers[delta.choice]
            parts = parser.push(delta.text)
            if delta.finish_reason is not None:
                parts += parser.finish()
            if any(isinstance(part, ToolCallEnd) for part in parts):
                self.called.add(delta.choice)
            yield ChatDelta(delta.choice, tuple(parts), delta.tokens, delta.finish_reason, delta.stop, delta.error)

    def cancel(self) -> None:
        """End what has not ended, at any moment, any number of times."""
        self.session.cancel()


class Chat:
    """Conversations with a model that is served."""

    def __init__(self, serving: "Serving") -> None:
        self._serving = serving

    def start(self, request: ChatRequest) -> ChatSession:
        """Ask for an answer. Raises `RequestError` for what cannot be asked, `TextError` for what cannot be tokenized,
        and what `Serving.submit` raises."""
        _check_tools(request)
        prompt = self._prompt(request)
        calling = bool(request.tools) and request.tool_choice is not ToolChoice.NONE
        form = self._serving.format if calling else self._serving.format.without_calls()
        tools = [_rendered(tool) for tool in request.tools]
        parsers = [form.parser(prompt, tools) for _ in range(request.options.choices)]
        options = replace(
            request.options,
            stops=(*request.options.stops, *self._template.stops),
            sampling=self._sampling(request),
        )
        tokens = self._encode(prompt)
        if request.context is not None:
            check_begins(tokens, request.context)
        job = text_job(
            self._serving,
            tokens,
            options,
            grammar=self._grammar(request, prompt, form),
            keep_special=form.marked,
            origin=Origin(prompt, lambda: self._places(request, prompt), options.session),
        )
        return ChatSession(self._serving.submit(job), parsers)

    def count(self, request: ChatRequest) -> int:
        """Tokens of the prompt that the request makes. Raises as `start` does."""
        _check_tools(request)
        return len(self._encode(self._prompt(request)))

    def render(self, request: ChatRequest) -> str:
        """The prompt that the request makes. Raises as `start` does."""
        _check_tools(request)
        return self._prompt(request)

    @property
    def _template(self) -> ChatTemplate:
        template = self._serving.template
        if template is None:
            raise RequestError(
                "this model has no chat template: ask for a completion of text, or serve it with a template"
            )
        return template

    def _prompt(self, request: ChatRequest) -> str:
        template = self._template
        if request.tools and not re.search(r"\btools\b", template.source):
            raise RequestError("this model's chat template has no place for tools: ask without them")
        return template.render(
            [_for_template(message, template) for message in request.conversation],
            [_rendered(tool) for tool in request.tools],
            continue_final=request.continue_final,
            variables=request.template_variables,
        )

    def _places(self, request: ChatRequest, prompt: str) -> tuple[Place, ...]:
        """The parts of a prompt."""
        template = self._template

        def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
            variables = request.template_variables
            return template.render(messages, tools, continue_final=request.continue_final, variables=variables)

        messages = [_for_template(message, template) for message in request.conversation]
        return find_places(prompt, messages, [_rendered(tool) for tool in request.tools], render)

    def _encode(self, prompt: str) -> list[int]:
        # The template has written the special tokens; the tokenizer would put those that begin a text there again.
        return self._serving.tokenizer.encode(prompt, add_special=False)

    def _sampling(self, request: ChatRequest) -> Sampling:
        """As asked; where calls are not wanted, the token that begins one is as good as forbidden."""
        sampling, calls = request.options.sampling, self._serving.format.calls
        if not request.tools or request.tool_choice is not ToolChoice.NONE or calls is None or calls.trigger is None:
            return sampling
        opening = self._token(calls.trigger)
        if opening is None:
            return sampling
        return replace(sampling, logit_bias=(*sampling.logit_bias, (opening, _NEVER)))

    def _token(self, text: str) -> int | None:
        """The token that is all of `text`, if one is."""
        try:
            ids = self._serving.tokenizer.encode(text, add_special=False)
        except TextError:  # a vocabulary without these characters
            return None
        return ids[0] if len(ids) == 1 else None

    # ---- grammars

    def _grammar(self, request: ChatRequest, prompt: str, form: ResponseFormat) -> Callable[[], Grammar] | None:
        """What the answer must follow. Reasoning is free: where the prompt opens it, or the model may."""
        grammar = self._constraint(request)
        if grammar is None or form.reasoning is None:
            return grammar
        opening, closing = form.reasoning
        tokenizer, token = self._serving.tokenizer, None
        if not form.parser(prompt).reasons:
            token = self._token(opening)
            if token is None or request.continue_final or prompt.rstrip().endswith(closing):
                return grammar
        return lambda: AfterReasoning(grammar(), tokenizer, closing, token)

    def _constraint(self, request: ChatRequest) -> Callable[[], Grammar] | None:
        """What the answer, after any reasoning, must follow."""
        grammars, schema = self._serving.grammars, request.schema
        answer: Callable[[], Grammar] | None = None
        if schema is not None and request.continue_final:
            raise RequestError("an answer that continues a message cannot be held to a schema: ask for a new one")
        if schema is not None:
            answer = grammars.json_schema(schema) if schema else grammars.json_object()
        if not request.tools or request.tool_choice is ToolChoice.NONE:
            return answer
        required = request.tool_choice is ToolChoice.REQUIRED
        if not required and answer is None and not any(tool.strict for tool in request.tools):
            return None
        named = [tool for tool in request.tools if request.tool_name in (None, tool.name)]
        # The model decides whether to call, and of what was not to be strict only the form is held to.
        held = named if required else [tool if tool.strict else replace(tool, parameters=_ANY) for tool in named]
        calls: Callable[[], Grammar] = grammars.tool_calls(
            self._serving.format,
            [_rendered(tool) for tool in held],
            required=required or answer is not None,
            parallel=request.parallel_tool_calls,
        )
        if required or answer is None:
            return calls
        return lambda: Either(answer(), calls())


def text_job(
    serving: "Serving",
    prompt: Sequence[int],
    options: Options,
    grammar: Callable[[], Grammar] | None = None,
    keep_special: bool = False,
    origin: Origin = NOWHERE,
) -> Job:
    """A job that continues a prompt of token ids. More tokens than the context leaves room for are not asked for.

    Raises `RequestError`, and `ContextError` for a prompt that leaves no room.
    """
    StopMatcher(options.stops)  # refuses one that is empty
    room = serving.context - len(prompt)
    wanted = room if options.max_tokens is None else min(options.max_tokens, room)
    if room < 0 or (room == 0 and options.max_tokens != 0):
        raise ContextError(
            f"the prompt has {plural(len(prompt), 'token')} and the context holds {serving.context:,}: "
            "no room is left for an answer"
        )
    request = Request(
        prompt=tuple(prompt),
        max_tokens=wanted,
        sampling=options.sampling,
        stop_ids=frozenset() if options.ignore_eos else serving.tokenizer.eos_ids,
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
        grammar=grammar,
        priority=options.priority,
        tenant=options.tenant,
        kept=options.kept,
        ttl=options.ttl,
        adapter=options.adapter,
    )
    return Job(request, options.choices, options.stops, keep_special, origin)


def _check_tools(request: ChatRequest) -> None:
    names = Counter(tool.name for tool in request.tools)
    twice = next((name for name, times in names.items() if times > 1), None)
    if twice is not None:
        raise RequestError(f"two tools have the name {twice!r}")
    if request.tool_choice is ToolChoice.REQUIRED and not names:
        raise RequestError("a call is required, and no tools are given")
    if request.tool_name is not None and request.tool_name not in names:
        raise RequestError(f"there is no tool {request.tool_name!r} to call among those given: {', '.join(names)}")


def _rendered(tool: Tool) -> dict[str, Any]:
    """A tool as chat templates take it."""
    described = {} if tool.description is None else {"description": tool.description}
    return {"type": "function", "function": {"name": tool.name, **described, "parameters": tool.parameters}}


def _for_template(message: Mapping[str, Any], template: ChatTemplate) -> dict[str, Any]:
    """A message with its calls as this template takes them."""
    result = dict(message)
    if template.wants_short_ids and isinstance(result.get("tool_call_id"), str):
        result["tool_call_id"] = _short(result["tool_call_id"])
    if result.get("tool_calls"):
        result["tool_calls"] = [_call_for_template(call, template) for call in result["tool_calls"]]
    return result


def _call_for_template(call: Mapping[str, Any], template: ChatTemplate) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str) and not template.takes_argument_text:
        with contextlib.suppress(ValueError, RecursionError):  # what is no JSON stays as the model wrote it
            function["arguments"] = json.loads(function["arguments"])
    result = {**call, "function": function}
    if template.wants_short_ids and isinstance(result.get("id"), str):
        result["id"] = _short(result["id"])
    return result


def _short(identifier: str) -> str:
    """The same identifier in nine letters and digits, which is all that Mistral's templates take."""
    if re.fullmatch("[A-Za-z0-9]{9}", identifier):
        return identifier
    return hashlib.sha256(identifier.encode()).hexdigest()[:9]
