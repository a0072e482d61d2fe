"""From the body of `/v1/responses` to a conversation as chat templates take it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvist.server.openai.chat_schema import JsonObjectFormat
from kvist.server.openai.conversation import Calling, called, calling, ordered, tool_of, variables_of
from kvist.server.openai.responses_schema import (
    AllowedChoice,
    CallItem,
    CallOutputItem,
    FunctionTool,
    InputRefusal,
    InputText,
    Item,
    JsonSchemaFormat,
    MessageItem,
    NamedChoice,
    ReasoningItem,
    ReferenceItem,
    ResponsesBody,
)
from kvist.server.sealed import unseal
from kvist.service.chat import ChatRequest, Options
from kvist.text.chat import ChatTemplate


@dataclass(frozen=True)
class Offered:
    """A function as the client knows it, and its `place` in the body; the model knows it by one name alone."""

    namespace: str | None
    function: FunctionTool
    place: str

    @property
    def name(self) -> str:
        return flat_name(self.namespace, self.function.name)


def flat_name(namespace: str | None, name: str) -> str:
    """`("mcp__files", "read")` → `mcp__files__read`."""
    return name if not namespace else f"{namespace.rstrip('_')}__{name}"


def offered_tools(body: ResponsesBody) -> list[Offered]:
    """The functions of a body, also those in namespaces."""
    offered: list[Offered] = []
    for index, tool in enumerate(body.tools or ()):
        place = f"tools[{index}]"
        if isinstance(tool, FunctionTool):
            offered.append(Offered(None, tool, place))
        else:
            offered += [
                Offered(tool.name, inner, f"{place}.tools[{number}]") for number, inner in enumerate(tool.tools)
            ]
    return offered


def given_items(body: ResponsesBody, find: Callable[[str, str], Item]) -> list[Item]:
    """The items of a body's input. `find` has those that it refers to, by the id and the place of the reference."""
    if isinstance(body.input, str):
        return [MessageItem(role="user", content=body.input)]
    return [
        find(item.id, f"input.{index}") if isinstance(item, ReferenceItem) else item
        for index, item in enumerate(body.input)
    ]


def chat_request(
    body: ResponsesBody, items: Sequence[Item], options: Options, template: ChatTemplate | None
) -> ChatRequest:
    """A conversation, `items`, and what a body asks of its answer. Raises `ApiError` (400) for what is well formed and
    makes no sense."""
    calls = _calling(body)
    form = None if body.text is None else body.text.format
    schema = form.schema_ if isinstance(form, JsonSchemaFormat) else {} if isinstance(form, JsonObjectFormat) else None
    effort = None if body.reasoning is None else body.reasoning.effort
    return ChatRequest(
        messages=tuple(ordered(_messages(body.instructions, items), template)),
        options=options,
        tools=calls.tools,
        tool_choice=calls.choice,
        tool_name=calls.name,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        schema=schema,
        schema_place="text.format.schema",
        template_variables=variables_of(effort, body.chat_template_kwargs),
    )


def _calling(body: ResponsesBody) -> Calling:
    offered = [(tool.name, tool.function, f"{tool.place}.parameters") for tool in offered_tools(body)]
    tools = tuple(tool_of(name, of.description, of.parameters, of.strict, place) for name, of, place in offered)
    choice = body.tool_choice
    if isinstance(choice, NamedChoice):
        return calling(tools, "required", named=choice.name)
    if isinstance(choice, AllowedChoice):
        return calling(tools, choice.mode, only=[tool.name for tool in choice.tools])
    return calling(tools, choice or "auto")


def _messages(instructions: str | None, items: Sequence[Item]) -> Iterable[dict[str, Any]]:
    if instructions:
        yield {"role": "system", "content": instructions}
    turn = _Turn()
    for item in items:
        if turn.takes(item):
            continue
        yield from turn.end()
        turn.takes(item)
        if isinstance(item, CallOutputItem):
            yield {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
        elif isinstance(item, MessageItem) and item.role != "assistant":
            yield {"role": item.role, "content": _text(item.content)}
    yield from turn.end()


class _Turn:
    """What the model said before anybody else spoke: reasoning, then text, then calls are one message of a template."""

    def __init__(self) -> None:
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def takes(self, item: Item) -> bool:
        """Whether the item belongs to the message, and was added to it."""
        match item:
            case ReasoningItem() if not self._content and not self._calls:
                self._reasoning += _thoughts(item)
            case MessageItem(role="assistant") if not self._calls:
                self._content.append(_text(item.content))
            case CallItem():
                self._calls.append(called(item.call_id, flat_name(item.namespace, item.name), item.arguments))
            case _:
                return False
        return True

    def end(self) -> list[dict[str, Any]]:
        """The message, if there is one; the next starts empty."""
        message: dict[str, Any] = {"role": "assistant", "content": "\n".join(self._content)}
        if self._reasoning:
            message["reasoning_content"] = "\n".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = self._calls
        said = bool(self._content or self._calls or self._reasoning)
        self._reasoning, self._content, self._calls = [], [], []
        return [message] if said else []


def _thoughts(item: ReasoningItem) -> list[str]:
    if item.content:
        return [part.text for part in item.content]
    text = unseal(item.encrypted_content or "")
    return [] if text is None else [text]


def _text(content: str | Sequence[InputText | InputRefusal]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text if isinstance(part, InputText) else part.refusal for part in content)
