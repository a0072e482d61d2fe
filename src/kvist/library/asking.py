"""From what a program hands over to what the engine is asked, and back from a session to a result."""

import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvist.base.errors import RequestError
from kvist.library.results import Answer, Completion, Timings, ToolCall, Usage
from kvist.runtime.request import FinishReason, Grammar, Sampling, TokenLogprobs
from kvist.service.chat import Chat, ChatRequest, Options, Tool, ToolChoice, check_length, encode, text_job
from kvist.service.contexts import CHAT, TEXT, Context
from kvist.service.explanation import Origin
from kvist.service.sampling import Proposed
from kvist.service.serving import Serving
from kvist.service.session import Job, NewToken, Session
from kvist.service.shelf import check_begins
from kvist.text.response import Content, Part, Reasoning, ToolCallArguments, ToolCallBegin

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
MAX_TOKENS = 256
_GREEDY = Proposed(temperature=0.0)


def is_one(prompts: Any) -> bool:
    """Whether this is one prompt: a text, token ids, or a conversation."""
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, Sequence):
        raise RequestError(f"a prompt is a text, token ids or a list of messages, not a {type(prompts).__name__}")
    return bool(prompts) and isinstance(prompts[0], int | Mapping)


def is_chat(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)


def default_sampling(serving: Serving) -> Sampling:
    """What the model's makers propose, or else the likeliest token each time."""
    return serving.proposed.over(_GREEDY).sampling()


def prompt_job(
    serving: Serving,
    prompt: Prompt,
    options: Options,
    grammar: Callable[[], Grammar] | None,
    context: Context | None = None,
) -> Job:
    """A job that continues a text, token ids, or what the chat template makes of a conversation; behind a context where
    one is given. Raises `RequestError` and `TextError`."""
    begun = () if context is None else context.tokens
    if context is not None:
        options = replace(options, imported=context.imported)
        check_form(context, CHAT if is_chat(prompt) else TEXT)
    if is_chat(prompt):
        text = Chat(serving).render(ChatRequest(tuple(prompt), options, context=context))  # type: ignore[arg-type]
        check_length(serving, text)
        # The template has written the special tokens; the tokenizer would put those that begin a text there again.
        tokens, warnings = encode(serving.tokenizer, text, add_special=False)
        if context is not None:
            check_begins(tokens, context)
        return text_job(serving, tokens, options, grammar, origin=Origin(text), warnings=warnings)
    if isinstance(prompt, str):
        check_length(serving, prompt)
        tokens, warnings = encode(serving.tokenizer, prompt, add_special=context is None)
        origin = Origin(prompt if context is None else context.text + prompt)
        return text_job(serving, [*begun, *tokens], options, grammar, origin=origin, warnings=warnings)
    if not all(isinstance(token, int) for token in prompt):
        raise RequestError("a prompt that is no text is a list of token ids, or of messages")
    return text_job(serving, [*begun, *prompt], options, grammar)


def check_form(context: Context, form: str) -> None:
    """Raises `RequestError` for a context that was made for the other kind of prompt."""
    if context.form != form:
        wanted = "conversations" if context.form == CHAT else "texts"
        raise RequestError(f"the context {context.name!r} was made for {wanted}")


def tool_of(tool: Tool | Mapping[str, Any]) -> Tool:
    """A tool as OpenAI's API has them, with or without the envelope of `type` and `function`. Raises `RequestError`."""
    if isinstance(tool, Tool):
        return tool
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    parameters = function.get("parameters", {"type": "object", "properties": {}}) if name else None
    if not isinstance(name, str) or not isinstance(parameters, Mapping):
        raise RequestError(f"a tool has a name and parameters, a JSON schema; got {tool!r:.80}")
    return Tool(name, function.get("description"), parameters, bool(function.get("strict")))


def choice_of(choice: str, tools: Sequence[Tool]) -> tuple[ToolChoice, str | None]:
    """`auto`, `none`, `required`, or the name of a tool that must be called. Raises `RequestError`."""
    if any(tool.name == choice for tool in tools):
        return ToolChoice.REQUIRED, choice
    try:
        return ToolChoice(choice), None
    except ValueError:
        raise RequestError(f"tool_choice is auto, none, required or the name of a tool; got {choice!r}") from None


@dataclass
class Gathered:
    """What came of one answer so far."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[tuple[str, list[str]]] = field(default_factory=list)
    tokens: list[NewToken] = field(default_factory=list)

    def add(self, parts: Iterable[Part]) -> tuple[str, str]:
        """Take note of parts. Returns what they add to the text and to the reasoning."""
        text, reasoning = "", ""
        for part in parts:
            match part:
                case Content(more):
                    text += more
                case Reasoning(more):
                    reasoning += more
                case ToolCallBegin(_, name):
                    self.calls.append((name, []))
                case ToolCallArguments(index, more):
                    self.calls[index][1].append(more)
        self.texts.append(text)
        self.reasoning.append(reasoning)
        return text, reasoning

    def completion(self, session: Session, reason: FinishReason) -> Completion:
        """The whole, once it has ended."""
        logprobs, usage, timings = _told(session, self.tokens)
        tokens = tuple(token.id for token in self.tokens)
        return Completion("".join(self.texts), tokens, reason, logprobs, usage, timings, session.warnings)

    def answer(self, session: Session, reason: FinishReason) -> Answer:
        """The whole, once it has ended."""
        logprobs, usage, timings = _told(session, self.tokens)
        return Answer(
            "".join(self.texts),
            "".join(self.reasoning),
            tuple(_call(name, "".join(pieces)) for name, pieces in self.calls),
            tuple(token.id for token in self.tokens),
            reason,
            logprobs,
            usage,
            timings,
            session.warnings,
        )


def _call(name: str, text: str) -> ToolCall:
    try:
        arguments = json.loads(text)
    except ValueError:
        arguments = None
    return ToolCall(f"call_{secrets.token_hex(12)}", name, arguments if isinstance(arguments, dict) else None, text)


def _told(session: Session, tokens: Sequence[NewToken]) -> tuple[tuple[TokenLogprobs, ...] | None, Usage, Timings]:
    """What the engine says of an answer that has ended."""
    found = tuple(token.logprobs for token in tokens if token.logprobs is not None)
    wanted = session.job.request.logprobs is not None
    times = session.times
    admitted, first = times.admitted or times.added, times.first or times.last or times.admitted
    timings = Timings(
        max(admitted - times.added, 0.0), max(first - admitted, 0.0), max((times.last or first) - first, 0.0)
    )
    return (found if wanted else None), Usage(session.prompt_tokens, len(tokens), session.cached), timings
