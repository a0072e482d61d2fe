"""From a body to a conversation as chat templates take it. What the Chat Completions and the Responses API share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvist.server.errors import ApiError
from kvist.server.openai.chat_schema import (
    AllowedChoice,
    AssistantMessage,
    CalledTool,
    ChatBody,
    FunctionMessage,
    JsonSchemaFormat,
    Message,
    NamedChoice,
    RefusalPart,
    TextFormat,
    TextPart,
    ToolMessage,
)
from kvist.server.openai.guided import Form
from kvist.service.chat import ChatRequest, Options, Tool, ToolChoice
from kvist.text.chat import ChatTemplate

# Templates that know levels of effort know three.
_EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_MODES = {"none": ToolChoice.NONE, "auto": ToolChoice.AUTO, "required": ToolChoice.REQUIRED}


def chat_request(body: ChatBody, options: Options, template: ChatTemplate | None) -> ChatRequest:
    """The conversation of a body. Raises `ApiError` (400) for what is well formed and makes no sense."""
    calls, form = _calling(body), _form(body)
    return ChatRequest(
        messages=tuple(ordered(_messages(body.messages), template)),
        options=options,
        tools=calls.tools,
        tool_choice=calls.choice,
        tool_name=calls.name,
        parallel_tool_calls=body.parallel_tool_calls is not False and not body.functions,
        schema=form.schema,
        schema_place="response_format.json_schema.schema",
        guide=form.guide,
        template_variables=variables_of(body.reasoning_effort, body.chat_template_kwargs),
        continue_final=_continues(body),
    )


def ordered(messages: Iterable[dict[str, Any]], template: ChatTemplate | None) -> list[dict[str, Any]]:
    """The messages as templates expect them: instructions at the start are one system message, for many templates take
    no more, and a tool's answer has the tool's name, which some templates write.

    A template that knows developers is told of them; to others they are the system.
    """
    knows_developers = template is not None and "developer" in template.source
    names: dict[str, str] = {}
    result: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "developer" and not knows_developers:
            message["role"] = "system"
        for call in message.get("tool_calls", ()):
            names[call["id"]] = call["function"]["name"]
        if message["role"] == "tool" and message["tool_call_id"] in names:
            message.setdefault("name", names[message["tool_call_id"]])
        if message["role"] == "system" and len(result) == 1 and result[0]["role"] == "system":
            result[0]["content"] = f"{result[0]['content']}\n\n{message['content']}"
            continue
        result.append(message)
    return result


def called(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call as templates take it. Some clients send no text at all where there are no arguments."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments or "{}"}}


def tool_of(
    name: str, description: str | None, parameters: Mapping[str, Any] | None, strict: bool | None, place: str
) -> Tool:
    """A tool; without `parameters`, which stand at `place`, it takes none."""
    return Tool(name, description, parameters or {"type": "object", "properties": {}}, bool(strict), place)


@dataclass(frozen=True)
class Calling:
    """Which tools the model is told of, whether it must call any, and which one if it is one alone."""

    tools: tuple[Tool, ...]
    choice: ToolChoice = ToolChoice.AUTO
    name: str | None = None


def calling(tools: tuple[Tool, ...], mode: str, *, only: Sequence[str] = (), named: str | None = None) -> Calling:
    """`only`: names of the tools that may be called, where not all may: the model is not told of the others. Raises
    `ApiError` (400) for one that no tool has."""
    known = {tool.name for tool in tools}
    for name in only:
        if name not in known:
            raise ApiError(400, f"tool_choice: there is no tool of the name {name!r}", param="tool_choice")
    return Calling(tuple(tool for tool in tools if not only or tool.name in only), _MODES[mode], named)


def variables_of(effort: str | None, own: Mapping[str, Any] | None) -> dict[str, Any]:
    """What templates are told beside the messages; those that do not know a variable ignore it."""
    variables: dict[str, Any] = {}
    if effort == "none":
        variables["enable_thinking"] = False
    elif effort is not None:
        variables["reasoning_effort"] = _EFFORTS[effort]
    return variables | dict(own or {})


def _form(body: ChatBody) -> Form:
    form = body.form()
    if body.response_format is None or isinstance(body.response_format, TextFormat):
        return form
    if form != Form():
        text = "response_format: another field says already what the answer must be"
        raise ApiError(400, text, param="response_format")
    if isinstance(body.response_format, JsonSchemaFormat):
        return Form(schema=body.response_format.json_schema.schema_ or {})
    return Form(schema={})


def _calling(body: ChatBody) -> Calling:
    older = body.function_call
    if body.functions and body.tools:
        raise ApiError(400, "functions: they are the older form of tools, which are given, too", param="functions")
    functions = body.functions or [tool.function for tool in body.tools or ()]
    where = "functions[{}].parameters" if body.functions else "tools[{}].function.parameters"
    tools = tuple(
        tool_of(of.name, of.description, of.parameters, of.strict, where.format(index))
        for index, of in enumerate(functions)
    )
    choice = body.tool_choice
    if older is not None and not body.functions:
        raise ApiError(400, "function_call: it goes with functions; with tools, use tool_choice", param="function_call")
    if older is not None:
        return calling(tools, older) if isinstance(older, str) else calling(tools, "required", named=older.name)
    if isinstance(choice, NamedChoice):
        return calling(tools, "required", named=choice.function.name)
    if isinstance(choice, AllowedChoice):
        names = [tool.function.name for tool in choice.allowed_tools.tools]
        return calling(tools, choice.allowed_tools.mode, only=names)
    return calling(tools, choice or "auto")


def _continues(body: ChatBody) -> bool:
    if not body.continue_final_message:
        if body.add_generation_prompt is False:
            text = "add_generation_prompt: false is supported with continue_final_message alone"
            raise ApiError(400, text, param="add_generation_prompt")
        return False
    if body.add_generation_prompt or body.messages[-1].role != "assistant":
        text = "continue_final_message: the last message must be the assistant's, and add_generation_prompt not true"
        raise ApiError(400, text, param="continue_final_message")
    return True


def _messages(messages: Sequence[Message]) -> Iterable[dict[str, Any]]:
    """Calls that have no ids, of those who know functions alone, get the ids that templates want."""
    last = ""
    for index, message in enumerate(messages):
        told = _message(message)
        if isinstance(message, AssistantMessage) and message.function_call is not None and not message.tool_calls:
            call, last = message.function_call, f"call_{index}"
            told["tool_calls"] = [called(last, call.name, call.arguments)]
        if isinstance(message, FunctionMessage):
            told |= {"role": "tool", "tool_call_id": last}
        yield told


def _message(message: Message) -> dict[str, Any]:
    result: dict[str, Any] = {"role": message.role, "content": _text(message.content)}
    if message.name is not None:
        result["name"] = message.name
    if isinstance(message, ToolMessage):
        result["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        if message.refusal and not result["content"]:
            result["content"] = message.refusal
        reasoning = message.reasoning_content or message.reasoning
        if reasoning:
            result["reasoning_content"] = reasoning
        if message.tool_calls:
            result["tool_calls"] = [_called(call) for call in message.tool_calls]
    return result


def _called(call: CalledTool) -> dict[str, Any]:
    return called(call.id, call.function.name, call.function.arguments)


def _text(content: str | Sequence[TextPart | RefusalPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)
