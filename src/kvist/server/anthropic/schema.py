"""What a client may send to the Messages API, as the `anthropic` package's types have it.

Bodies are read as strictly as OpenAI's (`openai/body.py`), and like there fields that are not named are ignored. What
is well formed but cannot be done here (images, tools that the server would have to run) is refused by `prompt.py`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from kvist.server.openai.body import MOST_STOPS, Body, Fields, Integer, Name, Stop


class CacheControl(Fields):
    """A place up to which the prompt should be kept. Kvist keeps all of it anyway, until the room is needed: the mark
    decides how tokens are counted in `usage`, and for how long others are given up first."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] = "5m"


class _Marked(Fields):
    cache_control: CacheControl | None = None


class TextBlock(_Marked):
    type: Literal["text"]
    text: str


class ThinkingBlock(Fields):
    """Thinking of an earlier answer. Its signature is read where its text was left out."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Fields):
    """Thinking that only another server could read."""

    type: Literal["redacted_thinking"]
    data: str


class PlainSource(Fields):
    type: Literal["text"]
    media_type: Literal["text/plain"] = "text/plain"
    data: str


class BlocksSource(Fields):
    """Text in blocks; other blocks are refused by `prompt.py`."""

    type: Literal["content"]
    content: "str | list[ResultPart]"


class OtherSource(Fields):
    """A PDF, an address, an uploaded file, or a type that does not exist."""

    type: str


def _kind_of_source(source: Any) -> str:
    kind = source.get("type") if isinstance(source, dict) else getattr(source, "type", None)
    return {"text": "PlainSource", "content": "BlocksSource"}.get(kind, "OtherSource") if kind else "OtherSource"


class Citations(Fields):
    enabled: bool | None = None


class DocumentBlock(_Marked):
    """A text with a title. `context`: what is to be known about it and is no part of it."""

    type: Literal["document"]
    source: Annotated[
        Annotated[PlainSource, Tag("PlainSource")]
        | Annotated[BlocksSource, Tag("BlocksSource")]
        | Annotated[OtherSource, Tag("OtherSource")],
        Discriminator(_kind_of_source),
    ]
    title: str | None = None
    context: str | None = None
    citations: Citations | None = None


class ToolUseBlock(_Marked):
    type: Literal["tool_use"]
    id: str = Field(min_length=1)
    name: Name
    input: dict[str, Any]


class OtherBlock(_Marked):
    """An image, a search result, or a type that does not exist."""

    type: str


def _kind_of(block: Any) -> str:
    """The name of the class that a block is read as: unlike its type, never the name of a field too, so that it is not
    taken for one in the place that an error names."""
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return _KINDS.get(kind, "OtherBlock") if isinstance(kind, str) else "OtherBlock"


def _kind_of_part(block: Any) -> str:
    kind = _kind_of(block)
    return kind if kind in ("TextBlock", "DocumentBlock") else "OtherBlock"


_KINDS = {
    "text": "TextBlock",
    "document": "DocumentBlock",
    "thinking": "ThinkingBlock",
    "redacted_thinking": "RedactedThinkingBlock",
    "tool_use": "ToolUseBlock",
    "tool_result": "ToolResultBlock",
}
ResultPart = Annotated[
    Annotated[TextBlock, Tag("TextBlock")]
    | Annotated[DocumentBlock, Tag("DocumentBlock")]
    | Annotated[OtherBlock, Tag("OtherBlock")],
    Discriminator(_kind_of_part),
]


DocumentBlock.model_rebuild()


class ToolResultBlock(_Marked):
    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1)
    content: str | list[ResultPart] | None = None
    is_error: bool | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("TextBlock")]
    | Annotated[DocumentBlock, Tag("DocumentBlock")]
    | Annotated[ThinkingBlock, Tag("ThinkingBlock")]
    | Annotated[RedactedThinkingBlock, Tag("RedactedThinkingBlock")]
    | Annotated[ToolUseBlock, Tag("ToolUseBlock")]
    | Annotated[ToolResultBlock, Tag("ToolResultBlock")]
    | Annotated[OtherBlock, Tag("OtherBlock")],
    Discriminator(_kind_of),
]


class Message(Fields):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolDefinition(_Marked):
    """A tool that the client runs: its own (`type` "custom" or none), or one of `client_tools.py`. Other types are
    refused by `prompt.py`."""

    type: str | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoiceBody(Fields):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Fields):
    """Whether the model may think before it answers. `budget_tokens` is checked and not enforced: `max_tokens` bounds
    thinking and answer together. `display`: "omitted" shows no text of it, and its signature carries it."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Integer | None = Field(None, ge=1024)
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(Fields):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Fields):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class Metadata(Fields):
    """Accepted, and not used: whose a request is, its key says."""

    user_id: str | None = None


class Prompt(Body):
    """All that decides the tokens of a prompt: the body of `/v1/messages/count_tokens`."""

    refused: ClassVar[Mapping[str, str]] = {
        "mcp_servers": "this server asks no other; run their tools in the client",
        "container": "this server runs no code",
        "compaction": "messages are taken whole: shorten them yourself",
        "thread": "none is kept here: send the whole conversation as messages",
    }

    messages: list[Message] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=1024)] | None = None
    tool_choice: ToolChoiceBody | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = Field(None, description="The older place of `output_config.format`.")
    cache_control: CacheControl | None = None
    context_management: dict[str, Any] | None = Field(
        None, description="Which parts may be left out. None are, and the answer says so."
    )
    context: str | None = Field(None, max_length=64, description="The name of a context that stands before all else.")

    @property
    def thinks(self) -> bool:
        """Whether thinking was asked for."""
        return self.thinking is not None and self.thinking.type != "disabled"


class MessagesRequest(Prompt):
    """The body of `/v1/messages`. `max_tokens` 0 computes and keeps the prompt, and answers nothing."""

    max_tokens: Integer = Field(ge=0, lt=2**31)
    stream: bool | None = None
    temperature: float | None = Field(
        None, ge=0, le=100, description="0 is greedy; by default what the model proposes, or 1."
    )
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Integer | None = Field(None, ge=0, lt=2**31, description="0: all tokens.")
    stop_sequences: list[Stop] | None = Field(None, max_length=MOST_STOPS)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
