"""Which part of a prompt a character belongs to: a message, a tool's schema, or what the template puts around them.

Templates are programs, so nothing is assumed of them: the conversation is rendered once more with marks around its
parts. Where taking the marks out gives the prompt again, they say exactly where each part stands. A template that
treats marked text otherwise is told from that, and its parts are then looked for in their order."""

import json
import secrets
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvist.base.errors import KvistError

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], Sequence[Message]], str]  # messages and tools to the prompt

_TEMPLATE = "the template"
_FAR = 4096  # characters before a tool's name in which its object may begin


@dataclass(frozen=True)
class Place:
    """A part of a prompt: characters `start` to `end` of its text."""

    label: str
    start: int
    end: int


@dataclass(frozen=True)
class Spot:
    """Where a character is. `line` and `column` count from 1, within the part; None between the parts."""

    label: str
    line: int | None
    column: int | None

    def __str__(self) -> str:
        return self.label if self.line is None else f"{self.label}, line {self.line}"


def find_places(text: str, messages: Sequence[Message], tools: Sequence[Message], render: Render) -> tuple[Place, ...]:
    """The parts of `text`, which `render` made of messages and tools, in their order."""
    try:
        marked = _marked(text, messages, tools, render)
    except (KvistError, LookupError, ValueError, TypeError):
        marked = None
    found = marked if marked is not None else _searched(text, messages, tools)
    return tuple(sorted(_apart(found), key=lambda place: place.start))


def spot(text: str, places: Sequence[Place], offset: int) -> Spot:
    """Where the character at `offset` is. The end of a part belongs to it: there, text was added or left out."""
    if not places:
        return Spot("the prompt", *_line(text, 0, offset))
    index = bisect_right([place.start for place in places], offset) - 1
    if index < 0:
        return Spot(f"{_TEMPLATE}, before {places[0].label}", None, None)
    place = places[index]
    if offset <= place.end:
        return Spot(place.label, *_line(text, place.start, offset))
    return Spot(f"{_TEMPLATE}, after {place.label}", None, None)


def _line(text: str, start: int, offset: int) -> tuple[int, int]:
    before = text[start:offset]
    return before.count("\n") + 1, offset - start - (before.rfind("\n") + 1) + 1


def _message_label(index: int, message: Message) -> str:
    return "the system message" if message.get("role") == "system" else f"message {index + 1} ({message.get('role')})"


def _name_of(tool: Message) -> str:
    return str(tool.get("function", tool).get("name", ""))


def _marked(text: str, messages: Sequence[Message], tools: Sequence[Message], render: Render) -> list[Place] | None:
    """Render once more with marks, each of which stands in the result at most once; None where that is another text."""
    nonce = secrets.token_hex(6)
    labels: list[str] = []

    def mark(part: str, label: str) -> str:
        labels.append(label)
        number = len(labels) - 1
        core = part.strip()
        before = part[: len(part) - len(part.lstrip())]
        return f"{before}<{nonce}b{number}>{core}<{nonce}e{number}>{part[len(before) + len(core) :]}"

    changed = [_marked_message(index, message, mark) for index, message in enumerate(messages)]
    named = []
    for tool in tools:
        function = tool["function"]
        named.append({**tool, "function": {**function, "name": mark(function["name"], f"tool {function['name']!r}")}})
    result = render(changed, named)
    spans, plain, place = dict[int, list[int]](), [], 0
    for piece in result.split(f"<{nonce}"):
        if not plain:
            plain.append(piece)
            place = len(piece)
            continue
        tag, _, rest = piece.partition(">")
        spans.setdefault(int(tag[1:]), []).append(place)
        plain.append(rest)
        place += len(rest)
    if "".join(plain) != text or any(len(span) != 2 for span in spans.values()):
        return None
    places = [Place(labels[number], *span) for number, span in spans.items()]
    first_tool = len(labels) - len(tools)
    positions = [spans[first_tool + index][0] for index in range(len(tools)) if first_tool + index in spans]
    whole = {}
    for index, tool in enumerate(tools):
        if first_tool + index in spans:
            position = spans[first_tool + index][0]
            later = min((other for other in positions if other > position), default=position + len(_name_of(tool)))
            whole[first_tool + index] = _object_around(text, position, _name_of(tool), later)
    return [
        Place(place.label, *whole.get(number, (place.start, place.end)))
        for number, place in zip(spans, places, strict=True)
    ]


def _marked_message(index: int, message: Message, mark: Callable[[str, str], str]) -> dict[str, Any]:
    label, changed = _message_label(index, message), dict(message)
    for field, what in (("reasoning_content", f"{label}, its reasoning"), ("content", label)):
        if isinstance(message.get(field), str) and message[field].strip():
            changed[field] = mark(message[field], what)
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [_marked_call(call, label, mark) for call in calls]
    return changed


def _marked_call(call: Message, label: str, mark: Callable[[str, str], str]) -> dict[str, Any]:
    function = dict(call["function"])
    name = f"{label}, its call of {function['name']!r}"
    function["name"] = mark(function["name"], name)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        function["arguments"] = mark(arguments, name)
    elif isinstance(arguments, Mapping):
        values = {k: mark(v, name) if isinstance(v, str) and v.strip() else v for k, v in arguments.items()}
        function["arguments"] = values
    return {**call, "function": function}


def _object_around(text: str, position: int, name: str, end: int) -> tuple[int, int]:
    """The JSON object with that name around `position`, the widest; from there to `end` where there is none."""
    decoder, found, near = json.JSONDecoder(), (position, end), position
    while (near := text.rfind("{", max(0, position - _FAR), near)) >= 0:
        try:
            value, stop = decoder.raw_decode(text, near)
        except (ValueError, RecursionError):
            continue
        if stop > position and isinstance(value, dict) and _name_of(value) == name:
            found = near, stop
    return found


def _searched(text: str, messages: Sequence[Message], tools: Sequence[Message]) -> list[Place]:
    """Parts in the order in which they are given. What is not found where it should be is left out."""
    places, cursor = [], 0
    for tool in tools:
        name = _name_of(tool)
        position = text.find(json.dumps(name), cursor)
        if position >= 0:
            start, end = _object_around(text, position + 1, name, position + len(name) + 2)
            places.append(Place(f"tool {name!r}", start, end))
            cursor = end
    cursor = 0
    for index, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str) or not (content := content.strip()):
            continue
        position = text.find(content, cursor)
        if position >= 0:
            places.append(Place(_message_label(index, message), position, position + len(content)))
            cursor = position + len(content)
    return places


def _apart(places: Sequence[Place]) -> list[Place]:
    """Those that do not begin within another: a system message into which the template puts the tools is cut there."""
    ordered, result = sorted(places, key=lambda place: (place.start, -place.end)), list[Place]()
    for place in ordered:
        if result and place.start < result[-1].end:
            if place.end > result[-1].end:
                result.append(Place(place.label, result[-1].end, place.end))
            continue
        result.append(place)
    return result
