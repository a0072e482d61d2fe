"""A conversation as one chat template takes it: calls in the form that it can write, and identifiers that it allows."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvist.text.chat import ChatTemplate


def for_template(messages: Sequence[Mapping[str, Any]], template: ChatTemplate) -> list[dict[str, Any]]:
    """`messages` as `ChatRequest` has them. What the template could not write is passed on in another form rather than
    left out: arguments that are no JSON object, calls beside text."""
    return [taken for message in messages for taken in _messages(message, template)]


def _messages(message: Mapping[str, Any], template: ChatTemplate) -> Iterator[dict[str, Any]]:
    result = dict(message)
    if template.wants_short_ids and isinstance(result.get("tool_call_id"), str):
        result["tool_call_id"] = _short(result["tool_call_id"])
    if not result.get("tool_calls"):
        yield result
        return
    result["tool_calls"] = [_call(call, template) for call in result["tool_calls"]]
    if result.get("content") and template.traits.splits:
        yield {key: value for key, value in result.items() if key != "tool_calls"}
        yield {"role": result["role"], "content": None, "tool_calls": result["tool_calls"]}
        return
    if not result.get("content"):
        result["content"] = None if template.traits.takes_null else ""
    yield result


def _call(call: Mapping[str, Any], template: ChatTemplate) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str) and not template.traits.takes_argument_text:
        function["arguments"] = _object(function["arguments"])
    result = {**call, "function": function}
    if template.wants_short_ids and isinstance(result.get("id"), str):
        result["id"] = _short(result["id"])
    return result


def _object(text: str) -> dict[str, Any]:
    """The object that arguments are. What a model wrote that is none is held in one, so that it can be shown."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {"arguments": text} if text.strip() else {}
    return value if isinstance(value, dict) else {} if value is None else {"arguments": value}


def _short(identifier: str) -> str:
    """The same identifier in nine letters and digits, which is all that Mistral's templates take."""
    if re.fullmatch("[A-Za-z0-9]{9}", identifier):
        return identifier
    return hashlib.sha256(identifier.encode()).hexdigest()[:9]
