"""From the body of a request to a conversation as chat templates take it.

Two things are not rendered where they stand. The line of `x-anthropic-billing-header` that some clients put before the
system prompt is left out: it changes with each request, is meant for accounts, and would make every prompt new from its
first token on. A `system` message in the middle of a conversation becomes part of the user's turn, marked as such,
because most templates take one system prompt and no more.
"""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kvist.base.errors import RequestError
from kvist.server.anthropic.client_tools import client_tool
from kvist.server.anthropic.schema import (
    Block,
    BlocksSource,
    DocumentBlock,
    Message,
    MessagesRequest,
    OtherBlock,
    PlainSource,
    Prompt,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolDefinition,
    ToolResultBlock,
    ToolUseBlock,
)
from kvist.server.sealed import unseal
from kvist.service.chat import ChatRequest, Options, Tool, ToolChoice
from kvist.service.sampling import Proposed

_SAID = "an assistant message"
_BILLING = "x-anthropic-billing-header:"
_ANYTHING = Message(role="user", content="-")  # where a conversation must go on somehow
_TTLS = {"5m": 300.0, "1h": 3600.0}
_CHOICES = {
    "auto": ToolChoice.AUTO,
    "any": ToolChoice.REQUIRED,
    "tool": ToolChoice.REQUIRED,
    "none": ToolChoice.NONE,
}
# Templates that know levels of effort know three.
_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}


def chat_request(body: Prompt, options: Options) -> ChatRequest:
    """The conversation of a body. Raises `RequestError`, which names the place, for what cannot be done here."""
    messages = [*_system(body), *_conversation(body.messages)]
    if not messages:
        raise RequestError("messages: there is no text in them")
    choice = body.tool_choice
    if choice is not None and (choice.type == "tool") != (choice.name is not None):
        raise RequestError('tool_choice: a name belongs to the type "tool", and to no other')
    form = (body.output_config.format if body.output_config else None) or body.output_format
    return ChatRequest(
        messages=tuple(messages),
        options=options,
        tools=tuple(_tools(body.tools or ())),
        tool_choice=ToolChoice.AUTO if choice is None else _CHOICES[choice.type],
        tool_name=None if choice is None else choice.name,
        parallel_tool_calls=choice is None or not choice.disable_parallel_tool_use,
        schema=None if form is None else form.schema_,
        schema_place="output_config.format.schema",
        template_variables=_variables(body),
        continue_final=messages[-1]["role"] == "assistant",
    )


def options_of(body: MessagesRequest, tenant: str, proposed: Proposed) -> Options:
    """How the answer is drawn; `proposed`: where the body says nothing. Their interface has no seed, so each request
    has one of its own."""
    stated = Proposed(temperature=body.temperature, top_k=body.top_k, top_p=body.top_p)
    return Options(
        max_tokens=max(body.max_tokens, 1),
        sampling=stated.over(proposed).sampling(secrets.randbits(64)),
        stops=tuple(body.stop_sequences or ()),
        tenant=tenant,
        ttl=cache_ttl(body) or 0.0,
    )


def cache_ttl(body: Prompt) -> float | None:
    """Seconds for which others are given up first, by the longest `cache_control` in the body; None without any."""
    marked: list[TextBlock | ToolDefinition | Block] = list(body.tools or ())
    if isinstance(body.system, list):
        marked += body.system
    for message in body.messages:
        if isinstance(message.content, list):
            marked += message.content
    for block in tuple(marked):
        if isinstance(block, ToolResultBlock) and isinstance(block.content, list):
            marked += block.content
    plain = (ThinkingBlock, RedactedThinkingBlock)
    marks = [body.cache_control, *(block.cache_control for block in marked if not isinstance(block, plain))]
    return max((_TTLS[mark.ttl] for mark in marks if mark is not None), default=None)


def up_to_last_mark(body: Prompt) -> Prompt | None:
    """What of a body is asked to be cached: all up to its last `cache_control`. None where that is the whole, or
    nothing is marked. Most templates write tools behind the system prompt or into it, so a mark at a tool is one behind
    all of them and the system prompt."""
    if body.cache_control is not None:
        return None
    for index, message in reversed(list(enumerate(body.messages))):
        blocks = message.content if isinstance(message.content, list) else []
        for place, block in reversed(list(enumerate(blocks))):
            if _is_marked(block):
                if index == len(body.messages) - 1 and place == len(blocks) - 1:
                    return None
                cut = message.model_copy(update={"content": blocks[: place + 1]})
                rest = [_ANYTHING] if message.role == "assistant" else []  # it may end with a call
                return body.model_copy(update={"messages": [*body.messages[:index], cut, *rest]})
    system: list[TextBlock] = body.system if isinstance(body.system, list) else []
    marked = [index for index, block in enumerate(system) if _is_marked(block)]
    if not marked and not any(map(_is_marked, body.tools or ())):
        return None
    first = {"system": system[: marked[-1] + 1]} if marked else {}
    return body.model_copy(update={"messages": [_ANYTHING], **first})


def _is_marked(block: Block | ToolDefinition) -> bool:
    if isinstance(block, ThinkingBlock | RedactedThinkingBlock):
        return False
    inner = block.content if isinstance(block, ToolResultBlock) and isinstance(block.content, list) else ()
    return block.cache_control is not None or any(map(_is_marked, inner))


@dataclass
class _Turn:
    """What one side said before the other spoke again: adjoining messages of a role are one. Each block has its place
    in the body."""

    role: Literal["user", "assistant"]
    place: str
    blocks: list[tuple[str, Block]] = field(default_factory=list)


def _system(body: Prompt) -> list[dict[str, Any]]:
    texts = [body.system] if isinstance(body.system, str) else [block.text for block in body.system or ()]
    texts = [text for text in texts if text and not text.startswith(_BILLING)]
    return [{"role": "system", "content": "\n".join(texts)}] if texts else []


def _conversation(messages: Sequence[Message]) -> Iterable[dict[str, Any]]:
    turns = _turns(messages)
    names: dict[str, str] = {}  # of the tools called so far, by the call's id
    for turn in turns:
        if turn.role == "assistant":
            yield _said(turn, names, last=turn is turns[-1])
        else:
            yield from _asked(turn, names)


def _turns(messages: Sequence[Message]) -> list[_Turn]:
    turns: list[_Turn] = []
    for index, message in enumerate(messages):
        place = f"messages.{index}"
        blocks = _blocks(message, place)
        if message.role == "system":
            blocks = [(where, _reminder(where, block)) for where, block in blocks]
            if not blocks:  # it may carry settings alone
                continue
        role: Literal["user", "assistant"] = "assistant" if message.role == "assistant" else "user"
        if not turns or turns[-1].role != role:
            turns.append(_Turn(role, place))
        turns[-1].blocks += blocks
    return turns


def _blocks(message: Message, place: str) -> list[tuple[str, Block]]:
    if isinstance(message.content, str):
        return [(f"{place}.content", TextBlock(type="text", text=message.content))]
    return [(f"{place}.content.{index}", block) for index, block in enumerate(message.content)]


def _reminder(where: str, block: Block) -> TextBlock:
    text = f"<system-reminder>\n{_text(where, block, 'a system message')}\n</system-reminder>"
    return TextBlock(type="text", text=text)


def _asked(turn: _Turn, names: dict[str, str]) -> Iterable[dict[str, Any]]:
    """A user's turn: results of tools first, as messages of their own, then what the user says."""
    texts = []
    answered = False
    for where, block in turn.blocks:
        if not isinstance(block, ToolResultBlock):
            texts.append(_text(where, block, "a user message"))
            continue
        name = names.get(block.tool_use_id)
        if name is None:
            raise RequestError(f"{where}.tool_use_id: no tool_use before it has the id {block.tool_use_id!r}")
        answered = True
        yield {"role": "tool", "tool_call_id": block.tool_use_id, "name": name, "content": _result(where, block)}
    text = "\n".join(filter(None, texts))
    if text:
        yield {"role": "user", "content": text}
    elif not answered:
        raise RequestError(f"{turn.place}: a user message must not be empty")


def _said(turn: _Turn, names: dict[str, str], last: bool) -> dict[str, Any]:
    """An assistant's turn, as one message."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for where, block in turn.blocks:
        if isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking or unseal(block.signature) or "")
        elif isinstance(block, ToolUseBlock):
            names[block.id] = block.name
            function = {"name": block.name, "arguments": block.input}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif not isinstance(block, RedactedThinkingBlock):
            texts.append(_text(where, block, _SAID))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if last and (calls or not message["content"]):
        raise RequestError(f"{turn.place}: the last message can be continued only when it ends with text")
    if any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _result(where: str, block: ToolResultBlock) -> str:
    if isinstance(block.content, list):
        parts = [_text(f"{where}.content.{i}", part, "a tool_result") for i, part in enumerate(block.content)]
        text = "\n".join(parts)
    else:
        text = block.content or ""
    return f"Error: {text}" if block.is_error else text


def _text(where: str, block: Block, holder: str) -> str:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, DocumentBlock) and holder != _SAID:
        return _document(where, block)
    if isinstance(block, OtherBlock):
        raise RequestError(f"{where}: blocks of type {block.type!r} are not supported: models here read text alone")
    raise RequestError(f"{where}: {block.type} does not belong in {holder}")


def _document(where: str, block: DocumentBlock) -> str:
    """A document as models are commonly shown one."""
    if block.citations is not None and block.citations.enabled:
        raise RequestError(f"{where}.citations: models here do not cite; ask for quotations instead")
    match block.source:
        case PlainSource(data=text):
            pass
        case BlocksSource(content=str(text)):
            pass
        case BlocksSource(content=parts):
            place = f"{where}.source.content"
            text = "\n".join(_text(f"{place}.{i}", part, "a document") for i, part in enumerate(parts))
        case other:
            raise RequestError(f"{where}.source: documents of type {other.type!r} are not supported: send their text")
    head = "".join(
        f"<{name}>{value}</{name}>\n" for name, value in (("source", block.title), ("context", block.context)) if value
    )
    return f"<document>\n{head}<document_content>\n{text}\n</document_content>\n</document>"


def _tools(definitions: Sequence[ToolDefinition]) -> Iterable[Tool]:
    for index, tool in enumerate(definitions):
        if tool.type not in (None, "custom"):
            known = client_tool(tool.type)
            if known is None:
                raise RequestError(
                    f"tools.{index}: tools of type {tool.type!r} are not supported: this server runs none itself; it "
                    "takes custom tools, with an input_schema, and bash, text_editor and memory, which the client runs"
                )
            yield Tool(tool.name, *known, bool(tool.strict))
            continue
        if tool.input_schema is None:
            raise RequestError(f"tools.{index}.input_schema: a custom tool needs one")
        yield Tool(tool.name, tool.description, tool.input_schema, bool(tool.strict), f"tools.{index}.input_schema")


def _variables(body: Prompt) -> dict[str, Any]:
    """What templates are told beside the messages. Those that do not know a variable ignore it. As in Anthropic's API,
    nobody thinks who is not told to."""
    variables: dict[str, Any] = {"enable_thinking": body.thinks}
    if body.output_config is not None and body.output_config.effort is not None:
        variables["reasoning_effort"] = _EFFORTS[body.output_config.effort]
    return variables
