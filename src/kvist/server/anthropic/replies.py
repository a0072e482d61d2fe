"""The shapes of answers, as their types name the fields; the served schema shows them."""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from kvist.server.openai.replies import Noted


class TextReply(TypedDict):
    type: Literal["text"]
    text: str


class ThinkingReply(TypedDict):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseReply(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class OutputTokens(TypedDict):
    thinking_tokens: int


class CacheCreation(TypedDict):
    """The tokens left in the cache, by how long others go first."""

    ephemeral_5m_input_tokens: int
    ephemeral_1h_input_tokens: int


class Usage(TypedDict):
    """The three kinds of input add up to the prompt. `output_tokens` includes those of thinking."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    cache_creation: CacheCreation
    output_tokens: int
    output_tokens_details: OutputTokens


class Stop(TypedDict):
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"] | None
    stop_sequence: str | None


class ManagedContext(TypedDict):
    applied_edits: list[Any]


class MessageReply(Stop, Noted):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextReply | ThinkingReply | ToolUseReply]
    usage: Usage
    context_management: NotRequired[ManagedContext]


class TokenCount(TypedDict):
    input_tokens: int
