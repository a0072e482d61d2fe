"""What a region of a response template means once it is whole: its content read, and calls made from it."""

import json
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import regex  # type: ignore[import-untyped]

from kvist.text.response_template import PLACEHOLDER, Field
from kvist.text.schema import kinds, literals, same, type_of

_SECONDS = 1.0  # that a pattern may take on one region
_STRING_OR_KEY = r'"(?:[^"\\]|\\.)*+"|(?<=[{,]\s*)(?P<key>[\w.-]+)(?=\s*:)'


class Unreadable(Exception):
    """A region that does not hold what its field says. Its text is text of the answer."""


def calls_in(body: str, field: Field, captures: Mapping[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of the calls in a region. Raises `Unreadable`."""
    value = _content(body, field.content, field.content_args)
    if not field.transform_each:
        return [_call(field.transform, {**captures, "content": value})]
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise Unreadable
    return [_call(field.transform, {**captures, **item}) for item in value]


def is_name(value: Any) -> TypeGuard[str]:
    """Whether a value can be the name of a tool: a text, not empty, of characters."""
    return isinstance(value, str) and value != "" and not any("\ud800" <= character <= "\udfff" for character in value)


def cast(value: Any, schema: Any, root: Any) -> Any:
    """A text as what its schema within `root` says that it is; itself where it is none of that, or no text. (Whatever a
    model writes without quotes is text at first.) It is a text only where it can be nothing else that the schema has,
    or is one of the texts that are listed there."""
    if not isinstance(value, str):
        return value
    given = literals(schema, root)
    if given is not None:
        if value in [one for one in given if isinstance(one, str)]:
            return value
        for one in given:
            if not isinstance(one, str) and any(same(one, read) for read in _casts(value, type_of(one))):
                return one
    possible = kinds(schema, root) or []
    for kind in sorted(possible, key=lambda kind: kind == "string"):
        for result in _casts(value, kind):
            return result
    return value


def _casts(text: str, kind: str) -> list[Any]:
    """`text` as a value of a type of JSON Schema, in a list that is empty where it is none."""
    if kind == "string":
        return [text]
    word = text.strip()
    if kind == "boolean" and word.lower() in ("true", "false", "1", "0"):
        return [word.lower() in ("true", "1")]
    if kind == "null" and word in ("null", "None"):
        return [None]
    try:
        value = json.loads(word, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return []
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    match kind:
        case "integer" if number and value == int(value):
            return [int(value)]
        case "number" if number:
            return [value]
        case "object" if isinstance(value, dict):
            return [value]
        case "array" if isinstance(value, list):
            return [value]
    return []


def _call(transform: Any, scope: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    value = _filled(transform, scope) if transform is not None else scope.get("content")
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict):
        raise Unreadable
    name, arguments = function.get("name"), function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments, {})
    if not is_name(name) or not isinstance(arguments, dict):
        raise Unreadable
    return name, arguments


def _filled(transform: Any, scope: Mapping[str, Any]) -> Any:
    """A transform with its placeholders, each a whole string like "{content.name}", replaced."""
    if isinstance(transform, Mapping):
        return {key: _filled(value, scope) for key, value in transform.items()}
    if isinstance(transform, list):
        return [_filled(value, scope) for value in transform]
    if not isinstance(transform, str) or not (path := PLACEHOLDER.fullmatch(transform)):
        return transform
    value: Any = scope
    for key in path[1].split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise Unreadable
        value = value[key]
    return value


def _content(text: str, parser: str, arguments: Mapping[str, Any]) -> Any:
    """The content of a region by one of the parsers that response templates know."""
    stripped = text.strip() if arguments.get("strip", True) else text
    try:
        match parser:
            case "int":
                return int(stripped)
            case "float" if math.isfinite(number := float(stripped)):
                return number
            case "float":
                raise Unreadable
            case "bool":
                return stripped.lower() in ("true", "1")
            case "json":
                return _json(text, arguments)
            case "xml-inline":
                return _tags(text, arguments)
            case "kv-lines":
                return _lines(text, arguments)
    except ValueError:
        raise Unreadable from None
    return stripped


def _quoted(match: Any) -> str:
    return match[0] if match["key"] is None else f'"{match["key"]}"'


def _json(text: str, arguments: Mapping[str, Any]) -> Any:
    """JSON, or what a model writes in its place: strings in other quotes (`string_delims`), keys in none."""
    strings: list[str] = []

    def kept(match: Any) -> str:
        strings.append(json.dumps(match[1]))
        return f"\x01{len(strings) - 1}\x02"

    plain = text
    delimiters = arguments.get("string_delims", [])
    if delimiters and ("\x01" in text or "\x02" in text):
        raise Unreadable
    try:
        for opening, closing in delimiters:
            pattern = f"{regex.escape(opening)}(.*?){regex.escape(closing)}"
            plain = regex.sub(pattern, kept, plain, flags=regex.DOTALL, timeout=_SECONDS)
        if arguments.get("unquoted_keys"):
            plain = regex.sub(_STRING_OR_KEY, _quoted, plain, flags=regex.DOTALL, timeout=_SECONDS)
        plain = regex.sub("\x01(\\d+)\x02", lambda match: strings[int(match[1])], plain)
        return json.loads(plain, strict=False, parse_constant=_no_number)
    except (ValueError, RecursionError, TimeoutError, IndexError):
        if arguments.get("allow_non_json"):
            return text.strip()
        raise Unreadable from None


def _tags(text: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Tags that have a key and a value. Text between them is passed over, but for a tag that is not complete; text
    without any tag is something else."""
    pattern = arguments["tag_pattern"]
    values: dict[str, list[Any]] = {}
    end = 0
    try:
        for match in regex.finditer(pattern, text, regex.DOTALL, timeout=_SECONDS):
            groups = match.groupdict()
            if groups["key"] is None:
                raise Unreadable
            values.setdefault(groups["key"], []).append(_inner(groups.get("value") or "", arguments))
            end = match.end()
        rest = regex.search(pattern, text, regex.DOTALL, pos=end, partial=True, timeout=_SECONDS)
    except TimeoutError:
        raise Unreadable from None
    if (rest is not None and rest.start() < len(text)) or (not values and text.strip()):
        raise Unreadable
    merged = arguments.get("merge_duplicates", False)
    return {key: found if merged and len(found) > 1 else found[-1] for key, found in values.items()}


def _lines(text: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Lines of key and value."""
    separator, strip = arguments.get("kv_sep", ":"), arguments.get("strip", True)
    values: dict[str, Any] = {}
    for line in text.split(arguments.get("line_sep", "\n")):
        key, found, value = line.partition(separator)
        if found and line.strip():
            key, value = (key.strip(), value.strip()) if strip else (key, value)
            values[key] = _inner(value, arguments)
    return values


def _inner(text: str, arguments: Mapping[str, Any]) -> Any:
    parser = arguments.get("value_parser")
    return text if parser is None else _content(text, parser.get("name", "text"), parser.get("args", {}))


def _no_number(word: str) -> Any:
    raise ValueError(word)
