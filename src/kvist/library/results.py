"""What comes back: frozen values."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvist.runtime.request import FinishReason, TokenLogprobs


@dataclass(frozen=True)
class Usage:
    """Tokens. `cached`: of the prompt, how many were read from where ("memory", "disk", ...); the others were
    computed."""

    prompt_tokens: int
    new_tokens: int
    cached: Mapping[str, int]

    @property
    def computed(self) -> int:
        """Tokens of the prompt that were computed."""
        return self.prompt_tokens - sum(self.cached.values())


@dataclass(frozen=True)
class Timings:
    """Seconds: until its turn came, from then to the first new token, and from that to the last. Others that run
    meanwhile are in them."""

    queued: float
    prefill: float
    decode: float


@dataclass(frozen=True)
class Completion:
    """How a prompt goes on. `logprobs`: of each new token, where they were asked for. `warnings`: what of the prompt
    was understood in another way."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None
    usage: Usage
    timings: Timings
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class TextDelta:
    """What a step added; all texts joined are the whole. The last one has the `completion`."""

    text: str
    tokens: tuple[int, ...]
    completion: Completion | None = None


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wants made. `arguments`: an object as JSON reads it; where the model did not complete one,
    `text` is all there is and `arguments` is None."""

    id: str
    name: str
    arguments: Mapping[str, Any] | None
    text: str


@dataclass(frozen=True)
class Answer:
    """An answer in a conversation, as what it consists of. `reasoning`: what the model thought before."""

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None
    usage: Usage
    timings: Timings
    warnings: tuple[str, ...] = ()

    @property
    def message(self) -> dict[str, Any]:
        """The message to go on with. A tool's result follows it as `{"role": "tool", "tool_call_id": call.id,
        "content": ...}`."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.text}}
                for call in self.tool_calls
            ]
        return message

    @property
    def json(self) -> Any:
        """The text, read as JSON: for answers that follow a schema. Raises `ValueError` for one that was cut short."""
        return json.loads(self.text)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class ChatDelta:
    """What a step added to the text, or to the reasoning. The last one has the `answer`, calls included."""

    text: str
    reasoning: str
    answer: Answer | None = None


@dataclass(frozen=True)
class Score:
    """How likely the model finds a text. `logprobs`: the natural logarithm of each token's probability behind those
    before it; the first has none."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        """Of the whole text, given its first token."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.total / len(self.logprobs)) if self.logprobs else math.nan
