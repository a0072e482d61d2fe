"""From Ollama's words to those of OpenAI's routes, in which everything else is decided."""

import json
from collections.abc import Sequence
from typing import Any

from kvist.server.errors import ApiError
from kvist.server.llamacpp.sampling import translated
from kvist.server.ollama.schema import Format, GenerateBody, Generating, Message, OllamaChatBody, Options, Think
from kvist.server.openai import chat_schema
from kvist.server.openai.models import Served, served
from kvist.service.serving import Serving

_LATEST = ":latest"  # Ollama's clients put it behind names that have no tag


def named(serving: Serving, name: str | None) -> Served:
    """What a name stands for, with Ollama's tag or without. Raises `ApiError` (404)."""
    if name is not None and name not in serving.adapters:
        name = name.removesuffix(_LATEST)
    return served(serving, name)


def chat_of(body: OllamaChatBody) -> chat_schema.ChatBody:
    """The body of a chat."""
    return _conversation(body, _messages(body.messages), body.tools)


def chat_of_prompt(body: GenerateBody) -> chat_schema.ChatBody:
    """A prompt is what a user says, behind what the system does."""
    messages = [{"role": "system", "content": body.system}] if body.system else []
    return _conversation(body, [*messages, {"role": "user", "content": body.prompt}], None)


def most_tokens(options: Options | None) -> int | None:
    """How many may be drawn; None: as many as the context leaves."""
    wanted = None if options is None else options.num_predict
    return wanted if wanted is not None and wanted > 0 else None


def schema_of(format: Format | None) -> dict[str, Any] | None:
    """The schema that the answer follows, if any; `{}`: it is any JSON object."""
    return format if isinstance(format, dict) else {} if format == "json" else None


def check_thinks(serving: Serving, name: str, think: Think | None) -> None:
    """Raises `ApiError` (400) where a model shall think that does not."""
    if think and serving.format.reasoning is None:
        raise ApiError(400, f"{name!r} does not support thinking", param="think")


def _conversation(
    body: Generating, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> chat_schema.ChatBody:
    fields: dict[str, Any] = {} if body.options is None else body.options.fields()
    schema = schema_of(body.format)
    if schema is not None:
        named_schema = {"type": "json_schema", "json_schema": {"schema": schema}}
        fields["response_format"] = named_schema if schema else {"type": "json_object"}
    if isinstance(body.think, str):
        fields["reasoning_effort"] = body.think
    elif body.think is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": body.think}
    return translated(chat_schema.ChatBody, {**fields, "messages": messages, "tools": tools})


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Calls get identifiers, which Ollama's mostly lack, by their order; an answer is that of the first call of its
    tool that has none yet."""
    result, waiting, count = [], list[tuple[str, str]](), 0
    for message in messages:
        one: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.role == "assistant":
            one["reasoning_content"] = message.thinking
            calls = []
            for call in message.tool_calls or ():
                id, count = call.id or f"call_{count}", count + 1
                waiting.append((id, call.function.name))
                arguments = json.dumps(call.function.arguments, ensure_ascii=False)
                calls.append(
                    {"id": id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
                )
            one["tool_calls"] = calls or None
        elif message.role == "tool":
            one["tool_call_id"] = id = message.tool_call_id or _answered(waiting, message.tool_name)
            one["name"] = message.tool_name
            waiting = [pair for pair in waiting if pair[0] != id]
        result.append(one)
    return result


def _answered(waiting: Sequence[tuple[str, str]], tool: str | None) -> str:
    """The identifier of the first call that waits for an answer of that tool, or of any where none is named."""
    return next((id for id, name in waiting if tool in (None, name)), "")
