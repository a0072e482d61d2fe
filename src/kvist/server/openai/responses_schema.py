"""The body of `/v1/responses`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from kvist.server.openai.body import (
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
    MOST_MESSAGES,
    MOST_TOOLS,
    JsonObjectFormat,
    TextFormat,
    choice_kind,
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
    """What the model thought. Where its text is there, it is given back to the chat template; where only another server
    could read it, it is left out."""

    type: Literal["reasoning"]
    content: Annotated[list[InputText], Field(max_length=_MOST_PARTS)] | None = None


def _item_kind(item: Any) -> str | None:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if kind is None else kind


def _known_item(item: Any) -> Any:
    """Refuses what this server cannot know with the reason."""
    kind = _item_kind(item)
    if kind == "item_reference":
        raise PydanticCustomError("item_reference", "nothing is stored here: send the items themselves")
    known = ("message", "function_call", "function_call_output", "reasoning")
    if isinstance(kind, str) and kind not in known:
        text = "items of type {kind} are not supported; those that are: {known}"
        raise PydanticCustomError("item_type", text, {"kind": repr(kind[:50]), "known": ", ".join(known)})
    return item


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_item_kind),
    BeforeValidator(_known_item),
]


class FunctionTool(Fields):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OtherTool(Fields):
    """A tool that OpenAI's own servers run, or one whose calls are no JSON. Clients offer such tools without being
    asked; the model is not told of them, and the answer's `tools` leave them out."""

    type: str


def _tool_kind(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return kind if kind in ("function", "namespace") else "other"


class NamespaceTool(Fields):
    """Functions of one origin, an MCP server for instance."""

    type: Literal["namespace"]
    name: Name
    description: str | None = None
    tools: Annotated[
        list[
            Annotated[
                Annotated[FunctionTool, Tag("function")] | Annotated[OtherTool, Tag("other")],
                Discriminator(lambda tool: "function" if _tool_kind(tool) == "function" else "other"),
            ]
        ],
        Field(max_length=MOST_TOOLS),
    ]


ToolItem = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[NamespaceTool, Tag("namespace")]
    | Annotated[OtherTool, Tag("other")],
    Discriminator(_tool_kind),
]


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
    Discriminator(choice_kind),
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
        "previous_response_id": "nothing is stored here: send the whole conversation as input",
        "conversation": "nothing is stored here: send the whole conversation as input",
        "prompt": "nothing is stored here: send the prompt itself as instructions and input",
        "background": "answers are not kept for later: wait for them, or stream",
        "n": "a response is one answer",
    }

    input: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[Item], Field(min_length=1, max_length=MOST_MESSAGES), Tag("list")],
        Discriminator(text_or_list),
    ]
    instructions: str | None = None
    tools: Annotated[list[ToolItem], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: ToolChoiceBody | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    max_output_tokens: Count | None = Field(None, description="As many as the context leaves by default.")
    include: list[str] | None = Field(None, max_length=16)
    top_logprobs: Annotated[Integer, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    store: bool | None = Field(None, description="Taken, and without effect: nothing is stored.")
    metadata: dict[str, str] | None = Field(None, max_length=_MOST_METADATA)
    user: str | None = None
    truncation: Literal["auto", "disabled"] | None = Field(None, description="Too long an input is always refused.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template.")
