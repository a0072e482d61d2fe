"""Tools for a model whose chat template has no place for them: told of in words, called in one form of JSON, results as
the user's words.

The form is that of the format "hermes", which models of many kinds have seen: an answer is read, and held to schemas,
as those of its own models are.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvist.text.response_formats import KNOWN, CallSyntax

NAME = "hermes"  # of the known format whose calls are meant


def with_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], takes_system: bool
) -> list[dict[str, Any]]:
    """The conversation with `tools` (as chat templates take them) in its system message, or where the template has none
    (not `takes_system`) in the first message of the user's; calls and their results as text."""
    result: list[dict[str, Any]] = []
    answered = False  # whether the message before holds results, to which the user's next words are added
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
        elif message["role"] == "user" and answered:
            text = message["content"]
        else:
            result.append(_said(message))
            answered = False
            continue
        if answered:
            result[-1]["content"] += f"\n{text}"
        else:
            result.append({"role": "user", "content": text})
        answered = message["role"] == "tool"
    return _told(result, _instruction(tools), takes_system) if tools else result


def _told(messages: list[dict[str, Any]], instruction: str, takes_system: bool) -> list[dict[str, Any]]:
    if takes_system:
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": instruction}, *messages]
        # Behind what stands there, so that prompts which differ in their tools alone have its beginning in common.
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{instruction}"}, *messages[1:]]
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": instruction}, *messages]
    told = {**messages[first], "content": f"{instruction}\n\n{messages[first]['content']}"}
    return [*messages[:first], told, *messages[first + 1 :]]


def _said(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its calls in its text, as the model would have written them."""
    said = {key: value for key, value in message.items() if key != "tool_calls"}
    syntax = _syntax()
    texts = [message["content"]] if message.get("content") else []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = function["arguments"]
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        texts.append(f"{syntax.before}{function['name']}{syntax.middle}{written}{syntax.after}")
    said["content"] = "\n".join(texts)
    return said


def _instruction(tools: Sequence[Mapping[str, Any]]) -> str:
    syntax = _syntax()
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        "You can use these functions. Each line describes one as JSON, with a JSON schema of its parameters:\n\n"
        f"{listed}\n\n"
        "To call a function, write its name and its arguments as JSON between these tags, and nothing after:\n\n"
        f"{syntax.before}NAME{syntax.middle}{{...}}{syntax.after}\n\n"
        "You are then given the result between <tool_response> and </tool_response>."
    )


def _syntax() -> CallSyntax:
    syntax = KNOWN[NAME].calls
    assert syntax is not None
    return syntax
