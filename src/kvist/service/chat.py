"""From a conversation to a job for the engine, and from what the engine says to the parts of an answer.

Both wire formats stand on it, and it knows neither.
"""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from itertools import takewhile
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from kvist.base.errors import KvistError, PromptTooLong, RequestError, TextError
from kvist.runtime.request import FinishReason, Grammar, Request, Sampling
from kvist.service.aside import LIGHT
from kvist.service.called_tools import CalledTools
from kvist.service.constraints import AfterReasoning, Either
from kvist.service.contexts import Context
from kvist.service.explanation import NOWHERE, Origin
from kvist.service.guide import Guide
from kvist.service.places import Place, find_places
from kvist.service.session import Job, NewToken, PrefillProgress, Session
from kvist.service.shelf import check_begins, with_context
from kvist.text.chat import ChatTemplate
from kvist.text.generic_tools import with_tools
from kvist.text.response import Part, ResponseFormat, ResponseParser, ToolCallEnd
from kvist.text.stops import StopStrings
from kvist.text.template_messages import for_template
from kvist.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kvist.service.serving import Serving

T = TypeVar("T")

_NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})
_MOST_SHOWN = 10  # characters in a warning
_FEW = 64  # messages
_PLAIN = frozenset({"role", "content", "name"})  # what a message has that takes no work
_PLACED_LATER = 1 << 16  # characters of a prompt of which it is told when it is asked where each part stands
_MOST_PLACED = 1 << 20  # characters of a prompt whose parts are told at all
_MOST_PLACED_MESSAGES = 4096
_NEVER = -100.0  # the bias by which a token is as good as forbidden


@dataclass(frozen=True)
class Tool:
    """What a model may call. `parameters`: a JSON schema, which stands at `place` of the request. `strict`: its
    arguments must follow the schema."""

    name: str
    description: str | None
    parameters: Mapping[str, Any]
    strict: bool = False
    place: str | None = None


class ToolChoice(StrEnum):
    AUTO = "auto"  # the model decides
    NONE = "none"  # no call; the prompt stays the same, so that what is cached of it still serves
    REQUIRED = "required"  # the answer is a call


@dataclass(frozen=True)
class Options:
    """How any answer is drawn, chat or not. `max_tokens` None: as many as the context leaves room for. `session`: the
    client's name for requests that belong together; `stop_ids`: tokens that end it, beside the model's own;
    `min_tokens`, `kept`, `ttl`, `adapter`, `imported`: see `Request`; `progress`, `streamed`: see `Job`."""

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
    imported: str = ""
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    progress: bool = False
    streamed: bool = True


@dataclass(frozen=True)
class ChatRequest:
    """A conversation and what is asked of its answer.

    `messages` are as chat templates take them: role, content (a text), tool_calls, tool_call_id, name,
    reasoning_content. A call's arguments are an object or its JSON text; text is better, because a template that can
    write it as it is then renders what the model wrote, token by token. `tool_name`, with REQUIRED: the tool that is
    called. `schema`: the answer is JSON that follows it; `{}`: any JSON object; it stands at `schema_place` of the
    request. `guide`: or it is a text of that kind. `continue_final`: the last message is the assistant's and is
    continued. `context`: of the form "chat", stands before everything else.
    """

    messages: tuple[Mapping[str, Any], ...]
    options: Options
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice.AUTO
    tool_name: str | None = None
    parallel_tool_calls: bool = True
    schema: Mapping[str, Any] | None = None
    schema_place: str | None = None
    guide: Guide | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    continue_final: bool = False
    context: Context | None = None

    @property
    def is_light(self) -> bool:
        """Whether it takes so little to make a prompt of it that nobody is held up: a few short messages alone."""
        if self.tools or self.schema is not None or self.guide is not None or self.context is not None:
            return False
        if len(self.messages) > _FEW:
            return False
        texts = [message.get("content") for message in self.messages]
        plain = all(text is None or isinstance(text, str) for text in texts)
        rest = any(message.keys() - _PLAIN for message in self.messages)
        return plain and not rest and sum(len(text or "") for text in texts) <= LIGHT

    @property
    def conversation(self) -> tuple[Mapping[str, Any], ...]:
        """The messages, with the context's text before those of the system."""
        return self.messages if self.context is None else with_context(self.messages, self.context)


@dataclass(frozen=True)
class ChatDelta:
    """What one step added to one choice. The last one of a choice has `finish`, with the stop string that ended it, and
    `error` where it failed. `reasoning`: how many of `tokens` were drawn while it reasoned, the mark that ends that
    included. One with `progress` adds nothing."""

    choice: int
    parts: tuple[Part, ...]
    tokens: tuple[NewToken, ...]
    finish: FinishReason | None
    stop: str | None
    error: KvistError | None
    reasoning: int = 0
    progress: PrefillProgress | None = None


@dataclass
class ChatSession:
    """An answer under way. Iterate once. `called`: which choices have completed a call of a tool."""

    session: Session
    parsers: Sequence[ResponseParser]
    called: set[int] = field(default_factory=set)

    async def __aiter__(self) -> AsyncIterator[ChatDelta]:
        async for delta in self.session:
            parser = self.parsers[delta.choice]
            reasoning = len(delta.tokens) if parser.reasons else 0
            parts = parser.push(delta.text)
            if delta.finish_reason is not None:
                parts += parser.finish()
            if any(isinstance(part, ToolCallEnd) for part in parts):
                self.called.add(delta.choice)
            yield ChatDelta(
                delta.choice,
                tuple(parts),
                delta.tokens,
                delta.finish_reason,
                delta.stop,
                delta.error,
                reasoning,
                delta.progress,
            )

    def cancel(self) -> None:
        """End what has not ended, at any moment, any number of times."""
        self.session.cancel()


@dataclass(frozen=True)
class _Prepared:
    """A job that has not been submitted, and what reads its answers."""

    job: Job
    parsers: Sequence[ResponseParser]


class Chat:
    """Conversations with a model that is served."""

    def __init__(self, serving: "Serving") -> None:
        self._serving = serving

    def start(self, request: ChatRequest) -> ChatSession:
        """Ask for an answer. Raises `RequestError` for what cannot be asked, `TextError` for what cannot be tokenized,
        and what `Serving.submit` raises."""
        return self._begin(self._prepare(request))

    async def ask(self, request: ChatRequest) -> ChatSession:
        """As `start`, on the event loop, which does not wait for what takes long."""
        if self._at_once(request):
            return self.start(request)
        return self._begin(await self._aside(request, lambda: self._prepare(request)))

    def count(self, request: ChatRequest) -> int:
        """Tokens of the prompt that the request makes. Raises as `start` does."""
        _check_tools(request)
        # The template has written the special tokens; the tokenizer would put those that begin a text there again.
        return len(encode(self._serving.tokenizer, self._prompt(request), add_special=False)[0])

    async def counted(self, request: ChatRequest) -> int:
        """As `count`, on the event loop, which does not wait for what takes long."""
        if self._at_once(request):
            return self.count(request)
        return await self._aside(request, lambda: self.count(request))

    def _at_once(self, request: ChatRequest) -> bool:
        """Whether the event loop may make a prompt of it: starting a process to render it takes a third of a second."""
        return request.is_light and self._template.ready

    async def begins_with(self, request: ChatRequest, beginning: ChatRequest) -> int:
        """How many first tokens the prompt of a request has in common with that of another. Raises as `start` does."""

        def shared() -> int:
            texts = self._prompt(request), self._prompt(beginning)
            for text in texts:
                check_length(self._serving, text)
            both = zip(*(encode(self._serving.tokenizer, text, add_special=False)[0] for text in texts), strict=False)
            return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))

        return await self._aside(request, shared)

    def _aside(self, request: ChatRequest, work: Callable[[], T]) -> Awaitable[T]:
        return self._serving.aside.run(request.options.tenant, work)

    def _begin(self, prepared: _Prepared) -> ChatSession:
        return ChatSession(self._serving.submit(prepared.job), prepared.parsers)

    def _prepare(self, request: ChatRequest) -> _Prepared:
        """All that is made of a request before the engine has it. On any thread."""
        _check_tools(request)
        prompt = self._prompt(request)
        form = self._format(request)
        tools = [_rendered(tool) for tool in request.tools]
        parsers = [form.parser(prompt, tools) for _ in range(request.options.choices)]
        options = replace(
            request.options,
            stops=(*request.options.stops, *self._template.stops),
            sampling=self._sampling(request),
        )
        check_length(self._serving, prompt)
        tokens, unspelled = encode(self._serving.tokenizer, prompt, add_special=False)
        if request.context is not None:
            check_begins(tokens, request.context)
            options = replace(options, imported=request.context.imported)
        grammar, unheld = self._grammar(request, prompt, form)
        parts = partial(self._places, request, prompt)
        if len(prompt) > _PLACED_LATER or len(request.messages) > _FEW:  # whoever asks for them cannot wait so long
            parts = partial(tuple, self._places(request, prompt))
        job = text_job(
            self._serving,
            tokens,
            options,
            grammar=grammar,
            keep_special=form.marked,
            origin=Origin(prompt, parts, options.session),
            warnings=(*unspelled, *unheld),
        )
        return _Prepared(job, parsers)

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
        messages, tools = self._conversation(request)
        return self._template.render(
            messages, tools, continue_final=request.continue_final, variables=request.template_variables
        )

    def _conversation(self, request: ChatRequest) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The messages and the tools as the template takes them."""
        template, tools = self._template, [_rendered(tool) for tool in request.tools]
        messages: Sequence[Mapping[str, Any]] = request.conversation
        if self._generic(request):
            messages, tools = with_tools(messages, tools, template.traits.takes_system), []
        return for_template(messages, template), tools

    def _generic(self, request: ChatRequest) -> bool:
        """Whether tools are told of in words. Raises `RequestError` where there is no other way, and it is not
        wanted."""
        if not request.tools and not any(message.get("tool_calls") for message in request.messages):
            return False
        traits = self._template.traits
        if traits.takes_tools or (traits.writes_calls and not request.tools):
            return False
        if request.tools and not self._serving.generic_tools:
            raise RequestError(
                "this model's chat template has no place for tools: ask without them, or serve it with --tools auto"
            )
        return self._serving.generic_tools

    def _format(self, request: ChatRequest) -> ResponseFormat:
        """How the answer is read."""
        form = self._serving.format
        if not request.tools or request.tool_choice is ToolChoice.NONE:
            return form.without_calls()
        return form.with_generic_calls() if self._generic(request) else form

    def _places(self, request: ChatRequest, prompt: str) -> tuple[Place, ...]:
        """The parts of a prompt; of one that is out of all proportion, none."""
        if len(prompt) > _MOST_PLACED or len(request.messages) > _MOST_PLACED_MESSAGES:
            return ()
        variables = request.template_variables

        def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
            return self._template.render(messages, tools, continue_final=request.continue_final, variables=variables)

        return find_places(prompt, *self._conversation(request), render)

    def _sampling(self, request: ChatRequest) -> Sampling:
        """As asked; where calls are not wanted, the token that begins one is as good as forbidden."""
        sampling = request.options.sampling
        form = self._serving.format
        calls = None if request.tools and self._generic(request) else form.calls
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

    def _grammar(
        self, request: ChatRequest, prompt: str, form: ResponseFormat
    ) -> tuple[Callable[[], Grammar] | None, tuple[str, ...]]:
        """What the answer must follow, and what of the schemas it leaves to the client. Reasoning is free: where the
        prompt opens it, or the model may."""
        grammar, unheld = self._constraint(request, form)
        if grammar is None or form.reasoning is None:
            return grammar, unheld
        opening, closing = form.reasoning
        tokenizer, token = self._serving.tokenizer, None
        if not form.parser(prompt).reasons:
            token = self._token(opening)
            if token is None or request.continue_final or prompt.rstrip().endswith(closing):
                return grammar, unheld
        must_come = request.schema is not None or request.tool_choice is ToolChoice.REQUIRED
        return lambda: AfterReasoning(grammar(), tokenizer, closing, token, must_come), unheld

    def _constraint(
        self, request: ChatRequest, form: ResponseFormat
    ) -> tuple[Callable[[], Grammar] | None, tuple[str, ...]]:
        """What the answer, after any reasoning, must follow, and what it leaves to the client."""
        grammars, schema = self._serving.grammars, request.schema
        answer: Callable[[], Grammar] | None = None
        if schema is not None and request.continue_final:
            raise RequestError("an answer that continues a message cannot be held to a schema: ask for a new one")
        if schema is not None:
            try:
                answer = grammars.json_schema(schema) if schema else grammars.json_object()
            except RequestError as error:
                raise RequestError(f"the JSON schema of the answer: {error}", request.schema_place) from None
        elif request.guide is not None:
            answer = request.guide.grammar(grammars)
        if not request.tools or request.tool_choice is ToolChoice.NONE:
            return answer, ()
        required = request.tool_choice is ToolChoice.REQUIRED
        if not required and answer is None and not any(tool.strict for tool in request.tools):
            return None, ()
        called = CalledTools(grammars, required)
        for tool in request.tools:
            if request.tool_name in (None, tool.name):
                called.add(tool.name, tool.parameters, tool.strict, tool.place)
        calls = called.grammar(form, required or answer is not None, request.parallel_tool_calls)
        if required or answer is None:
            return calls, called.unheld
        return lambda: Either(answer(), calls()), called.unheld


def encode(tokenizer: Tokenizer, text: str, *, add_special: bool) -> tuple[list[int], tuple[str, ...]]:
    """The tokens of a prompt. What a vocabulary of characters lacks is replaced, which the warnings say. Raises
    `TextError` for what cannot be tokenized even so."""
    spelled, missing = tokenizer.replaced(text)
    tokens = tokenizer.encode(spelled, add_special)
    if not missing:
        return tokens, ()
    shown = " ".join(map(repr, missing[:_MOST_SHOWN])) + (" ..." if len(missing) > _MOST_SHOWN else "")
    return tokens, (f"this model's vocabulary is {tokenizer.vocab_size} characters; others were replaced: {shown}",)


def check_length(serving: "Serving", text: str) -> None:
    """Raises `PromptTooLong`, without counting them, for a text of more tokens than there is room for."""
    fewest = serving.tokenizer.fewest_tokens(text)
    if fewest > serving.context:
        raise PromptTooLong(fewest, serving.context, serving.context)


def text_job(
    serving: "Serving",
    prompt: Sequence[int],
    options: Options,
    grammar: Callable[[], Grammar] | None = None,
    keep_special: bool = False,
    origin: Origin = NOWHERE,
    warnings: tuple[str, ...] = (),
) -> Job:
    """A job that continues a prompt of token ids. More tokens than the context leaves room for are not asked for.

    Raises `RequestError`, and `PromptTooLong` for a prompt that leaves no room.
    """
    StopStrings(options.stops)  # refuses one that is empty
    room = serving.context - len(prompt)
    wanted = room if options.max_tokens is None else min(options.max_tokens, room)
    if room < 0 or (room == 0 and options.max_tokens != 0):
        raise PromptTooLong(len(prompt), serving.context - (options.max_tokens != 0), serving.context)
    request = Request(
        prompt=tuple(prompt),
        max_tokens=wanted,
        sampling=options.sampling,
        stop_ids=options.stop_ids | (frozenset() if options.ignore_eos else serving.tokenizer.eos_ids),
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
        grammar=grammar,
        priority=options.priority,
        tenant=options.tenant,
        kept=options.kept,
        ttl=options.ttl,
        adapter=options.adapter,
        imported=options.imported,
        min_tokens=options.min_tokens,
    )
    return Job(
        request, options.choices, options.stops, keep_special, origin, options.progress, warnings, options.streamed
    )


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
