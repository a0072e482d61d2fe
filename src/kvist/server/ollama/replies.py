"""Answers in Ollama's shapes: whole, or as lines of JSON."""

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvist.base.units import utc_time
from kvist.runtime.request import FinishReason
from kvist.server.clock import Clock
from kvist.server.logs import Note
from kvist.server.openai.logprobs import TokenTexts
from kvist.server.openai.replies import encode, noted_cache
from kvist.server.openai.stream import raise_failure
from kvist.service.chat import ChatDelta, ChatSession
from kvist.text.response import Content, Part, Reasoning, ToolCallArguments, ToolCallBegin, ToolCallEnd

_NANO = 1_000_000_000


def line(data: Mapping[str, Any]) -> bytes:
    """One object of a stream."""
    return f"{encode(data)}\n".encode()


@dataclass
class Said:
    """What the model has said: of an answer, or of what one step added to it."""

    content: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.thinking or self.calls)

    def add(self, other: "Said") -> None:
        self.content += other.content
        self.thinking += other.thinking
        self.calls += other.calls


Shape = Callable[[Said], dict[str, Any]]


def as_message(said: Said) -> dict[str, Any]:
    """How `/api/chat` has it."""
    message: dict[str, Any] = {"role": "assistant", "content": said.content}
    if said.thinking:
        message["thinking"] = said.thinking
    if said.calls:
        message["tool_calls"] = said.calls
    return {"message": message}


def as_response(said: Said) -> dict[str, Any]:
    """How `/api/generate` has it."""
    return {"response": said.content, **({"thinking": said.thinking} if said.thinking else {})}


def loaded(model: str, shape: Shape) -> dict[str, Any]:
    """The answer to a request that asks for nothing: clients load a model so, or have it unloaded. It stays."""
    return {"model": model, "created_at": utc_time(time.time()), **shape(Said()), "done": True, "done_reason": "load"}


class Answer:
    """One answer under way. `logprobs`: how many of the likeliest stand beside each token, if any."""

    def __init__(self, session: ChatSession, model: str, shape: Shape, logprobs: int | None, texts: TokenTexts) -> None:
        self._session = session
        self._model = model
        self._shape = shape
        self._logprobs = logprobs
        self._texts = texts
        self._clock = Clock()
        self._calls: dict[int, tuple[str, list[str]]] = {}  # that have begun and not ended
        self._reason = "stop"

    async def whole(self, noted: Note) -> dict[str, Any]:
        """All of it, once it is complete."""
        said, entries = Said(), list[Any]()
        async for delta in self._deltas():
            said.add(self._said(delta.parts))
            entries += self._entries(delta)
        noted.finish = self._reason
        return self._last(said, entries)

    async def lines(self, noted: Note) -> AsyncIterator[bytes]:
        """The stream: what each step adds, then a line that says what it took."""
        async for delta in self._deltas():
            said, entries = self._said(delta.parts), self._entries(delta)
            if said or entries:
                yield line({**self._head(), **self._shape(said), "done": False, **_shown(entries)})
        noted.finish = self._reason
        yield line(self._last(Said(), []))

    async def _deltas(self) -> AsyncIterator[ChatDelta]:
        async for delta in self._session:
            raise_failure(delta.error, delta.finish)
            self._clock.note(len(delta.tokens))
            if delta.finish is FinishReason.LENGTH:
                self._reason = "length"
            yield delta

    def _said(self, parts: Sequence[Part]) -> Said:
        """What parts add. A call comes whole, and one that breaks off does not come."""
        said = Said()
        for part in parts:
            match part:
                case Content(text):
                    said.content += text
                case Reasoning(text):
                    said.thinking += text
                case ToolCallBegin(index, name):
                    self._calls[index] = name, []
                case ToolCallArguments(index, text):
                    self._calls[index][1].append(text)
                case ToolCallEnd(index):
                    name, pieces = self._calls.pop(index)
                    # JSON has no NaN, though Python reads it: it is passed on as its name.
                    arguments = json.loads("".join(pieces), parse_constant=str)
                    function = {"index": index, "name": name, "arguments": arguments}
                    said.calls.append({"function": function})
        return said

    def _entries(self, delta: ChatDelta) -> list[Any]:
        return [] if self._logprobs is None else self._texts.entries(delta.tokens, self._logprobs)

    def _head(self) -> dict[str, Any]:
        return {"model": self._model, "created_at": utc_time(time.time())}

    def _last(self, said: Said, entries: Sequence[Any]) -> dict[str, Any]:
        session, clock = self._session.session, self._clock
        return {
            **self._head(),
            **self._shape(said),
            "done": True,
            "done_reason": self._reason,
            "total_duration": round(clock.total * _NANO),
            "load_duration": 0,
            "prompt_eval_count": session.prompt_tokens,
            "prompt_eval_duration": round(clock.prefill * _NANO),
            "eval_count": session.new_tokens,
            "eval_duration": round(clock.decode * _NANO),
            **_shown(entries),
            **noted_cache([session]),
        }


def _shown(entries: Sequence[Any]) -> dict[str, Any]:
    return {"logprobs": list(entries)} if entries else {}
