"""The body of `/v1/chat/completions`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from kvist.server.openai.body import (
    INERT_EXTENSIONS,
    MOST_CHOICES,
    MOST_LOGPROBS,
    Count,
    Fields,
    Integer,
    Name,
    StreamOptions,
    text_or_list,
)
from kvist.server.openai.guided import Guided

MOST_MESSAGES = 16_384
_MOST_PARTS = 1024
MOST_TOOLS = 1024
_MOST_CALLS = 256


def text_alone(part: Any) -> Any:
    """Refuses what is no text with the reason, rather than as a type that does not exist."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and any(word in kind for word in ("image", "audio", "video", "file")):
        raise PydanticCustomError("modality", "the model reads text alone, no {kind}", {"kind": kind})
    return part


def functions_alone(tool: Any) -> Any:
    """Refuses other kinds of tools with the reason."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "function":
        text = "tools of type {kind} are not supported: use functions, which the client runs"
        raise PydanticCustomError("tool_type", text, {"kind": repr(kind[:50])})
    return tool


class TextPart(Fields):
    type: Literal["text"]
    text: str


class RefusalPart(Fields):
    type: Literal["refusal"]
    refusal: str


Parts = Annotated[list[Annotated[TextPart, BeforeValidator(text_alone)]], Field(max_length=_MOST_PARTS)]
SaidPart = Annotated[TextPart | RefusalPart, Field(discriminator="type"), BeforeValidator(text_alone)]
Content = Annotated[Annotated[str, Tag("text")] | Annotated[Parts, Tag("list")], Discriminator(text_or_list)]
SaidContent = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[SaidPart], Field(max_length=_MOST_PARTS), Tag("list")],
    Discriminator(text_or_list),
]


class CalledFunction(Fields):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class CalledTool(Fields):
    id: Annotated[str, Field(max_length=256)] = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class InstructionMessage(Fields):
    """`developer` is what newer clients call `system`."""

    role: Literal["developer", "system"]
    content: Content
    name: str | None = None


class UserMessage(Fields):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Fields):
    """`reasoning_content` (or `reasoning`): what it thought before it said `content`, for templates that show it.
    `function_call`: the one call of those that know `functions` alone."""

    role: Literal["assistant"]
    content: SaidContent | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[CalledTool], Field(max_length=_MOST_CALLS)] | None = None
    function_call: CalledFunction | None = None


class ToolMessage(Fields):
    role: Literal["tool"]
    content: Content
    tool_call_id: Annotated[str, Field(max_length=256)]
    name: str | None = None


class FunctionMessage(Fields):
    """What a function gave that was called by its name alone."""

    role: Literal["function"]
    content: Content | None = None
    name: Annotated[str, Field(min_length=1, max_length=256)]


Message = Annotated[
    InstructionMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage, Field(discriminator="role")
]


class Function(Fields):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Fields):
    type: Literal["function"]
    function: Function


class FunctionName(Fields):
    name: Name


class NamedChoice(Fields):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Fields):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1, max_length=MOST_TOOLS)]


class AllowedChoice(Fields):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def choice_kind(choice: Any) -> str | None:
    """Which kind of `tool_choice` is meant."""
    if isinstance(choice, str):
        return "mode"
    return choice.get("type") if isinstance(choice, dict) else getattr(choice, "type", None)


CHOICE_KINDS = Discriminator(
    choice_kind,
    custom_error_type="tool_choice",
    custom_error_message="it must be 'none', 'auto', 'required', or an object of type 'function' or 'allowed_tools'",
)
ToolChoiceBody = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")]
    | Annotated[NamedChoice, Tag("function")]
    | Annotated[AllowedChoice, Tag("allowed_tools")],
    CHOICE_KINDS,
]
FunctionChoice = Annotated[
    Annotated[Literal["none", "auto"], Tag("text")] | Annotated[FunctionName, Tag("list")],
    Discriminator(text_or_list),
]


class TextFormat(Fields):
    type: Literal["text"]


class JsonObjectFormat(Fields):
    type: Literal["json_object"]


class JsonSchema(Fields):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Fields):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatBody(Guided):
    refused: ClassVar = {
        **Guided.refused,
        "audio": "models here write text alone",
        "web_search_options": "this server looks nothing up",
        "best_of": "use n",
        "echo": "use /v1/completions",
        "documents": "put their text into messages",
    }
    inert: ClassVar = {**INERT_EXTENSIONS, "best_of": (1,)}

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    n: Annotated[Integer, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Count | None = Field(None, description="The older name of max_completion_tokens.")
    max_completion_tokens: Count | None = Field(None, description="As many as the context leaves by default.")
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    tools: (
        Annotated[list[Annotated[FunctionTool, BeforeValidator(functions_alone)]], Field(max_length=MOST_TOOLS)] | None
    ) = None
    tool_choice: ToolChoiceBody | None = None
    functions: Annotated[list[Function], Field(max_length=MOST_TOOLS)] | None = Field(
        None, description="The older form of tools; calls come back in that form."
    )
    function_call: FunctionChoice | None = Field(None, description="The older form of tool_choice.")
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(
        None, description="The last message is the assistant's, and the answer goes on where it ends."
    )
