"""An answer as events, in the order in which their clients expect them, and the content of a message from these."""

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from enum import Enum, auto
from typing import Any, TypeVar

from kvist.server.openai.replies import encode, new_id
from kvist.server.sealed import seal, signature_of
from kvist.text.response import Content, Part, Reasoning, ToolCallArguments, ToolCallBegin, ToolCallEnd

Event = dict[str, Any]
T = TypeVar("T")

_FIELDS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


class Thinking(Enum):
    """What an answer tells of thinking: its text, signed; a signature alone, which carries it; or nothing."""

    SHOWN = auto()
    SEALED = auto()
    LEFT_OUT = auto()


def encoded(event: Event) -> bytes:
    """An event as a stream carries it."""
    return f"event: {event['type']}\ndata: {encode(event)}\n\n".encode()


class Blocks:
    """Cuts the parts of an answer into content blocks, which come one after the other, each started and stopped.

    White space alone makes no block: it goes with what follows, or is dropped. `called`: whether a call is complete.
    `thinking`: what is told of thinking.
    """

    def __init__(self, thinking: Thinking = Thinking.SHOWN) -> None:
        self.called = False
        self._thinking = thinking
        self._thought: list[str] = []  # the text of the thinking that is open
        self._count = 0
        self._open: str | None = None
        self._blank = ""

    def push(self, part: Part) -> list[Event]:
        """The events that a part gives."""
        match part:
            case Content(text):
                return self._write("text", text)
            case Reasoning(text):
                return [] if self._thinking is Thinking.LEFT_OUT else self._write("thinking", text)
            case ToolCallBegin(_, name):
                return self._start("tool_use", {"id": new_id("toolu_"), "name": name, "input": {}})
            case ToolCallArguments(_, text):
                return [self._delta("input_json_delta", "partial_json", text)]
            case ToolCallEnd():
                self.called = True
                return self.close()

    def close(self) -> list[Event]:
        """Stop the block that is open, if one is. Thinking is signed first: clients drop what is not."""
        self._blank = ""
        if self._open is None:
            return []
        events = []
        if self._open == "thinking":
            thought, self._thought = "".join(self._thought), []
            signature = signature_of(thought) if self._thinking is Thinking.SHOWN else seal(thought)
            events.append(self._delta("signature_delta", "signature", signature))
        self._open = None
        return [*events, {"type": "content_block_stop", "index": self._count - 1}]

    def _write(self, kind: str, text: str) -> list[Event]:
        events: list[Event] = []
        if self._open != kind:
            events = self.close() if self._open is not None else []
            text = self._blank + text
            if not text.strip():
                self._blank = text
                return events
            empty = {"text": ""} if kind == "text" else {"thinking": "", "signature": ""}
            events += self._start(kind, empty)
        if kind == "thinking":
            self._thought.append(text)
            if self._thinking is Thinking.SEALED:
                return events
        return [*events, self._delta(f"{kind}_delta", kind, text)]

    def _start(self, kind: str, content: dict[str, Any]) -> list[Event]:
        events = self.close()
        self._open = kind
        self._count += 1
        block = {"type": kind, **content}
        return [*events, {"type": "content_block_start", "index": self._count - 1, "content_block": block}]

    def _delta(self, kind: str, field: str, text: str) -> Event:
        return {"type": "content_block_delta", "index": self._count - 1, "delta": {"type": kind, field: text}}


def content_of(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The content of a message whose blocks these events make. A call whose input is no object, because it was cut off,
    is left out: nobody could run it."""
    content: list[dict[str, Any]] = []
    pieces: list[str] = []
    for event in events:
        if event["type"] == "content_block_start":
            content.append(dict(event["content_block"]))
            pieces = []
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            if delta["type"] in _FIELDS:
                pieces.append(delta[_FIELDS[delta["type"]]])
            else:
                content[-1]["signature"] = delta["signature"]
        elif event["type"] == "content_block_stop":
            _fill(content, "".join(pieces))
    return content


def _fill(content: list[dict[str, Any]], text: str) -> None:
    block = content[-1]
    if block["type"] != "tool_use":
        block[block["type"]] = text
    elif (value := _object(text)) is not None:
        block["input"] = value
    else:
        content.pop()


def _object(text: str) -> dict[str, Any] | None:
    """The object that a text is. None for any other text, and for numbers that no JSON has."""
    try:
        value = json.loads(text)
        encode(value)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


async def paced(items: AsyncIterable[T], first: float, later: float) -> AsyncIterator[T | None]:
    """The items as they come, and None for each time that none came: within `first` seconds of the start for the first,
    within `later` seconds from then on."""
    iterator = aiter(items)
    pending: asyncio.Future[T] | None = None
    patience = first
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(iterator))
            done, _ = await asyncio.wait({pending}, timeout=patience)
            patience = later
            if not done:
                yield None
                continue
            try:
                item = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield item
    finally:
        if pending is not None:
            pending.cancel()
