"""Which part of a prompt a character belongs to: a message, a tool's schema, or what the template puts around them.

Templates are programs, so nothing is assumed of them: the conversation is rendered once more with marks around its
parts. Where taking the marks out gives the prompt again, they say exactly where each part stands. A template that
treats marked text otherwise is told from that, and its parts are then looked for in their order."""

import contextlib
import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvist.base.errors import KvistError

Message = Mapping[str, Any]
Mark = Callable[[str, str, int | None], str]  # a text, the label of its part, and the tool that it belongs to
Render = Callable[[Sequence[Message], Sequence[Message]], str]  # messages and tools to the prompt

_TEMPLATE = "the template"
_SHORT = 16  # characters of a text that may stand in a prompt by chance
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
    found: list[Place] | None = None
    for described in (True, False):
        with contextlib.suppress(KvistError, LookupError, ValueError, TypeError):
            found = _marked(text, messages, tools, render, described) if found is None else found
    return tuple(_apart(_searched(text, messages, tools) if found is None else found))


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


def first_difference(a: str, b: str) -> int:
    """Index of the first character that is not the same: the length of the shorter text where there is none."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _line(text: str, start: int, offset: int) -> tuple[int, int]:
    before = text[start:offset]
    return before.count("\n") + 1, offset - start - (before.rfind("\n") + 1) + 1


def _message_label(index: int, message: Message) -> str:
    system = message.get("role") == "system" and not index
    return "the system message" if system else f"message {index + 1} ({message.get('role')})"


def _name_of(tool: Message) -> str:
    return str(tool.get("function", tool).get("name", ""))


@dataclass(frozen=True)
class _Part:
    """What stands between two marks. `tool`: which one it belongs to, if any; the first part of a tool is its name."""

    label: str
    text: str
    tool: int | None


class _Marks:
    """Marks around parts, which are numbered in the order in which they are put."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self._nonce = secrets.token_hex(6)

    def put(self, text: str, label: str, tool: int | None = None) -> str:
        core = text.strip()
        if not core:
            return text
        number = len(self.parts)
        self.parts.append(_Part(label, core, tool))
        before, _, after = text.partition(core)
        return f"{before}<{self._nonce}b{number}>{core}<{self._nonce}e{number}>{after}"

    def take(self, marked: str) -> tuple[str, list[tuple[_Part, int, int]]]:
        """The text without the marks, and where its parts stand. Of one that was cut, so that a mark is missing, there
        is as much as goes on to the other."""
        first, *pieces = re.split(f"<{self._nonce}([be])([0-9]+)>", marked)
        whole = first + "".join(pieces[2::3])
        spans, opened, place = list[tuple[_Part, int, int]](), dict[int, int](), len(first)
        for kind, number, piece in zip(pieces[::3], map(int, pieces[1::3]), pieces[2::3], strict=True):
            part = self.parts[number]
            if kind == "b":
                opened[number] = place
            elif number in opened:
                spans.append((part, opened.pop(number), place))
            else:
                backwards = whole[max(place - len(part.text), 0) : place][::-1]
                spans.append((part, place - first_difference(backwards, part.text[::-1]), place))
            place += len(piece)
        for number, start in opened.items():
            part = self.parts[number]
            same = first_difference(whole[start : start + len(part.text)], part.text)
            spans.append((part, start, start + same))
        return whole, [span for span in spans if span[1] < span[2]]


def _marked(
    text: str, messages: Sequence[Message], tools: Sequence[Message], render: Render, described: bool
) -> list[Place] | None:
    """Render once more with marks, around the descriptions of tools, too, if `described`. None where that gives another
    text."""
    marks = _Marks()
    changed = [_marked_message(index, message, marks.put) for index, message in enumerate(messages)]
    result = render(changed, [_marked_tool(index, tool, marks.put, described) for index, tool in enumerate(tools)])
    whole, spans = marks.take(result)
    if whole != text:
        return None
    places = [Place(part.label, start, end) for part, start, end in spans if part.tool is None]
    for index, tool in enumerate(tools):
        own = [(part.text == _name_of(tool), start, end) for part, start, end in spans if part.tool == index]
        names = [(start, end) for is_name, start, end in own if is_name]
        # Where it is no JSON object, it reaches from the first to the last of what is its own.
        widest = min((start for _, start, _ in own), default=0), max((end for *_, end in own), default=0)
        for name in names:
            found = _object_around(text, name[0], _name_of(tool))
            places.append(Place(f"tool {_name_of(tool)!r}", *(found or (widest if len(names) == 1 else name))))
    return places


def _marked_tool(index: int, tool: Message, mark: Mark, described: bool) -> dict[str, Any]:
    function, label = dict(tool["function"]), f"tool {_name_of(tool)!r}"
    function["name"] = mark(function["name"], label, index)
    return {**tool, "function": _described(function, lambda text: mark(text, label, index)) if described else function}


def _described(schema: Any, mark: Callable[[str], str]) -> Any:
    """A copy with its descriptions marked, those within it, too."""
    if isinstance(schema, Mapping):
        items = schema.items()
        return {k: mark(v) if k == "description" and isinstance(v, str) else _described(v, mark) for k, v in items}
    return [_described(item, mark) for item in schema] if isinstance(schema, list | tuple) else schema


def _marked_message(index: int, message: Message, mark: Mark) -> dict[str, Any]:
    label, changed = _message_label(index, message), dict(message)
    for field, what in (("reasoning_content", f"{label}, its reasoning"), ("content", label)):
        if isinstance(message.get(field), str):
            changed[field] = mark(message[field], what, None)
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [_marked_call(call, label, mark) for call in calls]
    return changed


def _marked_call(call: Message, label: str, mark: Mark) -> dict[str, Any]:
    function = dict(call["function"])
    name = f"{label}, its call of {function['name']!r}"
    function["name"] = mark(function["name"], name, None)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        function["arguments"] = mark(arguments, name, None)
    elif isinstance(arguments, Mapping):
        function["arguments"] = {k: mark(v, name, None) if isinstance(v, str) else v for k, v in arguments.items()}
    return {**call, "function": function}


def _object_around(text: str, position: int, name: str) -> tuple[int, int] | None:
    """The JSON object with that name around `position`, the widest, if there is one."""
    decoder, near = json.JSONDecoder(), position
    found: tuple[int, int] | None = None
    while (near := text.rfind("{", max(0, position - _FAR), near)) >= 0:
        try:
            value, stop = decoder.raw_decode(text, near)
        except (ValueError, RecursionError):
            continue
        if stop > position and isinstance(value, dict) and _name_of(value) == name:
            found = near, stop
    return found


def _searched(text: str, messages: Sequence[Message], tools: Sequence[Message]) -> list[Place]:
    """Parts in the order in which they are given. What is not found where it should be is left out, and so is what is
    so short that it may stand in the template, too."""
    places, cursor = [], 0
    for tool in tools:
        name = _name_of(tool)
        position = text.find(json.dumps(name), cursor)
        if position >= 0:
            found = _object_around(text, position + 1, name) or (position + 1, position + 1 + len(name))
            places.append(Place(f"tool {name!r}", *found))
            cursor = found[1]
    cursor = 0
    for index, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str) or not (content := content.strip()):
            continue
        if len(content) < _SHORT and text.count(content) > 1:
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
