"""Calls of tools, read from what stands between their markers, character by character where they are JSON."""

import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Any, Protocol

from kvist.text.json_reader import SPACE, JsonReader, Read
from kvist.text.response_parts import Part, ToolCallArguments, ToolCallBegin, ToolCallEnd
from kvist.text.response_template import PLACEHOLDER, Field
from kvist.text.response_values import Unreadable, calls_in, cast, is_name
from kvist.text.schema import property_schemas

_MOST_UNNAMED = 4096  # characters of JSON without it being known which call they are
_SAME = {"arguments", "parameters"}  # models take the one key for the other
_SURROGATE = re.compile("[\ud800-\udfff]")


class Tools:
    """The tools of a request: their names, and the schemas of their arguments."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        functions = [tool.get("function", tool) for tool in tools]
        self._parameters: dict[str, Any] = {function["name"]: function.get("parameters") for function in functions}

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def cast(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The same arguments, with texts made what the tool's schema says that they are."""
        schema = self._parameters.get(name)
        properties = property_schemas(schema)
        return {key: cast(value, properties.get(key), schema) for key, value in arguments.items()}


class Calls:
    """The calls of one answer: their numbers, and the parts that tell of them."""

    def __init__(self, parts: list[Part]) -> None:
        self._parts = parts
        self._next = 0

    def begin(self, name: str) -> None:
        self._parts.append(ToolCallBegin(self._next, name))

    def arguments(self, text: str) -> None:
        if text:
            self._parts.append(ToolCallArguments(self._next, text))

    def end(self) -> None:
        self._parts.append(ToolCallEnd(self._next))
        self._next += 1

    def abandon(self) -> None:
        """The call that began will not be completed."""
        self._next += 1


class Progress(Enum):
    MORE = auto()
    DONE = auto()
    FAILED = auto()  # this is no call, or not any more; `raw` of the reader is text of the answer


class CallReader(Protocol):
    """What reads one region of calls. `raw`: what it was given and has not told of as a part of a call.

    `delimited`: whether the region ends where its closing marker is first seen, rather than with its JSON.
    """

    delimited: bool
    raw: str

    def push(self, character: str) -> Progress: ...

    def close(self, closed: bool) -> Progress:
        """Nothing follows, because of the closing marker or (not `closed`) because the answer ends. Not `MORE`."""
        ...


class _At(Enum):
    """Where in its JSON a reader stands."""

    START = auto()
    ELEMENT = auto()  # of a list
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    AFTER_VALUE = auto()
    AFTER_ELEMENT = auto()


class JsonCalls:
    """Calls that are JSON: an object with name and arguments under a key each, a list of such objects, or the arguments
    alone after a marker that names the tool.

    A call begins once its name and the first bracket of its arguments are there, and from then on they are passed on as
    they come. Arguments that come before the name wait for it. Arguments in a string are taken out of it. A call
    without arguments, or with null for them, has the empty object.
    """

    delimited = False

    def __init__(self, raw: str, calls: Calls, name: str | None, keys: tuple[str, str], only: Tools | None) -> None:
        """`name`: from the marker, whose text is `raw`; where None, `keys` are those of name and arguments. `only`:
        other names are no calls."""
        self.raw = raw
        self._calls = calls
        self._name_key, self._arguments = keys[0], _SAME if keys[1] in _SAME else {keys[1]}
        self._only = only
        self._bare = name is not None  # the JSON is that of the arguments alone
        self._listed = False
        self._at = _At.VALUE if self._bare else _At.START
        self._reader = JsonReader()  # of the key or the value under way
        self._key = keys[1]
        # Of the call under way:
        self._name = name
        self._waiting = ""  # arguments that came before the name
        self._begun = False
        self._ended = False

    def push(self, character: str) -> Progress:
        self.raw += character
        if self._name is None and len(self.raw) > _MOST_UNNAMED:
            return self._fail()
        if self._at in (_At.KEY, _At.VALUE):
            return self._value(character)
        return Progress.MORE if character in SPACE else self._structure(character)

    def close(self, closed: bool) -> Progress:
        self._fail()
        return Progress.FAILED if self.raw else Progress.DONE

    def _structure(self, character: str) -> Progress:
        """A bracket, a colon or a comma outside of any key or value."""
        match self._at, character:
            case _At.START, "[":
                self._at, self._listed = _At.ELEMENT, True
            case ((_At.START | _At.ELEMENT), "{"):
                self._at, self._reader = _At.KEY, JsonReader()
                self._name, self._waiting, self._begun, self._ended = None, "", False, False
            case _At.COLON, ":":
                self._at, self._reader = _At.VALUE, JsonReader()
            case _At.AFTER_VALUE, ",":
                self._at, self._reader = _At.KEY, JsonReader()
            case _At.AFTER_VALUE, "}":
                return self._close_object()
            case _At.AFTER_ELEMENT, ",":
                self._at = _At.ELEMENT
            case _At.AFTER_ELEMENT, "]":
                return Progress.DONE
            case _:
                return self._fail()
        return Progress.MORE

    def _close_object(self) -> Progress:
        if not self._ended and not self._whole_call("{}"):
            return self._fail()
        self.raw = ""
        self._at = _At.AFTER_ELEMENT
        return Progress.MORE if self._listed else Progress.DONE

    def _value(self, character: str) -> Progress:
        """A character of a key or a value."""
        if self._at is _At.KEY and not self._reader.first and character not in SPACE + '"':
            return self._fail()
        read = self._reader.push(character)
        if read is Read.BAD:
            return self._fail()
        if self._at is _At.VALUE and self._key in self._arguments and not self._ended:
            return self._argument(read)
        if read is Read.TAKEN:
            return Progress.MORE
        if self._at is _At.KEY:
            self._key, self._at = json.loads(self._reader.text), _At.COLON
            return Progress.MORE
        self._at = _At.AFTER_VALUE
        if self._key == self._name_key and self._name is None:
            return self._named(self._reader.text)
        if read is Read.AFTER and character not in SPACE:
            return self._structure(character)
        return Progress.MORE

    def _named(self, name: str) -> Progress:
        """The value that is the name was read; arguments that waited for it go with it."""
        value = json.loads(name)
        if not is_name(value) or (self._only is not None and value not in self._only):
            return self._fail()
        self._name = value
        if self._waiting:
            self._whole_call(self._waiting)
            self.raw = ""
        return Progress.MORE

    def _argument(self, read: Read) -> Progress:
        """A character of the arguments was read."""
        if not self._begun:
            opening = self._reader.first
            if opening in ('"', "n") and read is Read.LAST:
                return self._complete("{}" if opening == "n" else _unquoted(self._reader.text))
            if opening not in ("", '"', "n", "{"):
                return self._fail()
            if self._name is None and read is Read.LAST:
                return self._complete(self._reader.text)
            if self._name is None or opening != "{":
                return Progress.MORE
            if not self._begin():
                return self._fail()
        self._calls.arguments(self._reader.take())
        self.raw = ""
        if read is Read.TAKEN:
            return Progress.MORE
        self._end()
        return Progress.DONE if self._bare else Progress.MORE

    def _complete(self, arguments: str | None) -> Progress:
        """Arguments that were not passed on as they came are whole."""
        if arguments is None:
            return self._fail()
        self._at = _At.AFTER_VALUE
        if self._name is None:
            self._waiting = arguments
            return Progress.MORE
        if not self._whole_call(arguments):
            return self._fail()
        self.raw = ""
        return Progress.DONE if self._bare else Progress.MORE

    def _whole_call(self, arguments: str) -> bool:
        if not self._begin():
            return False
        self._calls.arguments(arguments)
        self._end()
        return True

    def _begin(self) -> bool:
        if self._name is None or (self._only is not None and self._name not in self._only):
            return False
        self._calls.begin(self._name)
        self._begun = True
        return True

    def _end(self) -> None:
        self._calls.end()
        self._ended = True
        self._at = _At.AFTER_VALUE

    def _fail(self) -> Progress:
        if self._begun and not self._ended:
            self._calls.abandon()
            self._ended = True
        return Progress.FAILED


def _unquoted(text: str) -> str | None:
    """The JSON object in a JSON string, which may be blank where it has nothing in it; or None."""
    inner = json.loads(text).strip() or "{}"
    reader = JsonReader()
    reads = [reader.push(character) for character in inner]
    whole = inner.startswith("{") and Read.LAST not in reads[:-1] and reads[-1] is Read.LAST
    return reader.text if whole and Read.BAD not in reads else None


class WholeCalls:
    """Calls in any other notation: read when their region closes.

    At the end of the answer only JSON is taken without its closing marker: it cannot be complete by chance.
    """

    delimited = True

    def __init__(self, raw: str, calls: Calls, field: Field, captures: Mapping[str, str], tools: Tools) -> None:
        self.raw = raw
        self._calls = calls
        self._field = field
        self._captures = captures
        self._tools = tools
        self._body: list[str] = []

    def push(self, character: str) -> Progress:
        self._body.append(character)
        return Progress.MORE

    def close(self, closed: bool) -> Progress:
        body = "".join(self._body)
        try:
            if not closed and self._field.content != "json" and self._field.close is not None:
                raise Unreadable
            found = calls_in(body, self._field, self._captures)
        except Unreadable:
            self.raw += body
            return Progress.FAILED
        for name, arguments in found:
            self._calls.begin(name)
            text = json.dumps(self._tools.cast(name, arguments), ensure_ascii=False)
            self._calls.arguments(_SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))
            self._calls.end()
        return Progress.DONE


def call_reader(field: Field, raw: str, captures: Mapping[str, str], calls: Calls, tools: Tools) -> CallReader:
    """The reader for what follows the marker `raw` of `field`."""
    keys = _json_keys(field)
    if keys is None:
        return WholeCalls(raw, calls, field, captures, tools)
    named, name_key, arguments_key = keys
    # A marker without a letter announces nothing: only what names one of the tools is a call then.
    only = None if any(character.isalpha() for character in raw) else tools
    name = captures.get(name_key) if named else None
    return JsonCalls(raw, calls, name, (name_key, arguments_key), only)


def _json_keys(field: Field) -> tuple[bool, str, str] | None:
    """Whether the marker names the tool, and the keys (for the name: or capture) of name and arguments, where the calls
    are plain JSON."""
    if field.content != "json" or field.content_args.get("unquoted_keys") or field.content_args.get("string_delims"):
        return None
    transform = field.transform
    function = transform.get("function", transform) if isinstance(transform, Mapping) else None
    if function == "{content}" and not field.transform_each:
        return False, "name", "arguments"
    if not isinstance(function, Mapping):
        return None
    name, arguments = (_placeholder(function.get(key)) for key in ("name", "arguments"))
    if name is None or arguments is None:
        return None
    if field.transform_each:
        return (False, name, arguments) if "." not in name + arguments else None
    if arguments == "content":
        return (True, name, "") if name != "content" and "." not in name else None
    inner = [path.removeprefix("content.") for path in (name, arguments) if path.startswith("content.")]
    return (False, inner[0], inner[1]) if len(inner) == 2 and "." not in "".join(inner) else None


def _placeholder(value: Any) -> str | None:
    path = PLACEHOLDER.fullmatch(value) if isinstance(value, str) else None
    return None if path is None else str(path[1])
