"""The body of `/v1/responses`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from kvist.server.openai.body import (
    INERT_EXTENSIONS,
    MOST_LOGPROBS,
    REFUSED_EXTENSIONS,
    Count,
    Fields,
    Generation,
    Integer,
    Name,
    text_or_list,
)
from kvist.server.openai.chat_schema import (
    CHOICE_KINDS,
    MOST_MESSAGES,
    MOST_TOOLS,
    JsonObjectFormat,
    TextFormat,
    functions_alone,
    text_alone,
)

_MOST_PARTS = 1024
_MOST_METADATA = 16
_Id = Annotated[str, Field(max_length=256)]


class InputText(Fields):
    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


class InputRefusal(Fields):
    type: Literal["refusal"]
    refusal: str


InputPart = Annotated[InputText | InputRefusal, Field(discriminator="type"), BeforeValidator(text_alone)]
InputContent = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[InputPart], Field(max_length=_MOST_PARTS), Tag("list")],
    Discriminator(text_or_list),
]


class MessageItem(Fields):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: InputContent


class CallItem(Fields):
    """A call that the model made. `namespace`: that of the tools among which it stands."""

    type: Literal["function_call"]
    call_id: _Id
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str
    namespace: Annotated[str, Field(max_length=256)] | None = None


class CallOutputItem(Fields):
    type: Literal["function_call_output"]
    call_id: _Id
    output: InputContent


class ReasoningItem(Fields):
    """What the model thought, as text or as this server sealed it, is given back to the chat template; where only
    another server could read it, it is left out."""

    type: Literal["reasoning"]
    content: Annotated[list[InputText], Field(max_length=_MOST_PARTS)] | None = None
    encrypted_content: str | None = None


class ReferenceItem(Fields):
    """An item of an earlier response."""

    type: Literal["item_reference"] = "item_reference"
    id: _Id


def _item_kind(item: Any) -> str | None:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    if kind is None and isinstance(item, dict) and "id" in item and "role" not in item:
        return "item_reference"
    return "message" if kind is None else kind


def _known_item(item: Any) -> Any:
    """Refuses what this server cannot know with the reason."""
    kind = _item_kind(item)
    known = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
    if isinstance(kind, str) and kind not in known:
        text = "items of type {kind} are not supported; those that are: {known}"
        raise PydanticCustomError("item_type", text, {"kind": repr(kind[:50]), "known": ", ".join(known)})
    return item


Item = MessageItem | CallItem | CallOutputItem | ReasoningItem
InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ReferenceItem, Tag("item_reference")],
    Discriminator(_item_kind),
    BeforeValidator(_known_item),
]


class FunctionTool(Fields):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamespaceTool(Fields):
    """Functions of one origin, an MCP server for instance."""

    type: Literal["namespace"]
    name: Name
    description: str | None = None
    tools: Annotated[list[Annotated[FunctionTool, BeforeValidator(functions_alone)]], Field(max_length=MOST_TOOLS)]


def _known_tool(tool: Any) -> Any:
    return tool if isinstance(tool, dict) and tool.get("type") == "namespace" else functions_alone(tool)


ToolItem = Annotated[FunctionTool | NamespaceTool, Field(discriminator="type"), BeforeValidator(_known_tool)]


class NamedChoice(Fields):
    type: Literal["function"]
    name: Name


class AllowedChoice(Fields):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1, max_length=MOST_TOOLS)]


ToolChoiceBody = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")]
    | Annotated[NamedChoice, Tag("function")]
    | Annotated[AllowedChoice, Tag("allowed_tools")],
    CHOICE_KINDS,
]


class JsonSchemaFormat(Fields):
    type: Literal["json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextConfig(Fields):
    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(Fields):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ResponsesBody(Generation):
    refused: ClassVar = {
        **REFUSED_EXTENSIONS,
        **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), "use text.format"),
        **dict.fromkeys(("structured_outputs", "response_format", "json_schema", "grammar"), "use text.format"),
        "conversation": "none is kept here: use previous_response_id, or send the whole conversation as input",
        "prompt": "none is kept here: send the prompt itself as instructions and input",
        "context_management": "an input is taken whole: shorten it yourself",
        "image": "models here write text alone",
        "background": "answers are not kept for later: wait for them, or stream",
        "n": "a response is one answer",
    }
    inert: ClassVar = {**INERT_EXTENSIONS, "n": (1,), "response_format": ({"type": "text"},)}

    input: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[InputItem], Field(min_length=1, max_length=MOST_MESSAGES), Tag("list")],
        Discriminator(text_or_list),
    ]
    previous_response_id: _Id | None = Field(None, description="The response whose conversation goes on.")
    instructions: str | None = None
    tools: Annotated[list[ToolItem], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: ToolChoiceBody | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    max_output_tokens: Count | None = Field(None, description="As many as the context leaves by default.")
    include: list[str] | None = Field(None, max_length=16)
    top_logprobs: Annotated[Integer, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    store: bool | None = Field(None, description="false: the response is not remembered. Others are, for a while.")
    metadata: dict[str, str] | None = Field(None, max_length=_MOST_METADATA)
    user: str | None = None
    truncation: Literal["auto", "disabled"] | None = Field(None, description="Too long an input is always refused.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template.")
