"""What a chat template does with tools and calls, found by trying."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvist.base.errors import RequestError

Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], str]

_SAID, _CITY = "kvistprobe", "kvistcity"
_USER = {"role": "user", "content": "Hello."}
_SYSTEM = {"role": "system", "content": _SAID}
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}
_OBJECT, _TEXT = {"city": _CITY}, f'{{"city":  "{_CITY}"}}'  # spaced as no program would write it


@dataclass(frozen=True)
class Traits:
    """`takes_tools`: tools change what it writes. `takes_system`: it writes a system message's text.
    `takes_argument_text`: it writes a call's arguments as they are when they are text, so that an earlier answer is
    rendered as the model wrote it; else they must be an object. `takes_null`: calls without text beside them have null
    for content, and the calls are written. `writes_calls`: it writes them at all. `splits`: calls beside text would be
    left out, and are written where they are a message of their own."""

    takes_tools: bool
    takes_system: bool
    takes_argument_text: bool
    takes_null: bool
    writes_calls: bool
    splits: bool


def traits_of(render: Render) -> Traits:
    """`render`: messages and tools to a text; raises `RequestError` for what the template refuses."""

    def tried(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str | None:
        try:
            return render(messages, tools)
        except RequestError:
            return None

    takes_tools = tried([_USER], [_TOOL]) != tried([_USER]) or tried([_SYSTEM, _USER], [_TOOL]) != tried(
        [_SYSTEM, _USER]
    )
    tools = [_TOOL] if takes_tools else []

    def turn(content: str | None, arguments: Any, apart: bool = False) -> str | None:
        call = {"id": "kvistcall", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        said = [{"role": "assistant", "content": content}] if apart else []
        calls = {"role": "assistant", "content": None if apart else content, "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": "kvistcall", "name": "weather", "content": "Rain."}
        return tried([_USER, *said, calls, result], tools)

    def takes(arguments: Any, shown: str) -> bool:
        return any(shown in (turn(content, arguments) or "") for content in ("", None, _SAID))

    takes_text = takes(_TEXT, _TEXT) or not takes(_OBJECT, _CITY)
    arguments = _TEXT if takes_text else _OBJECT
    null, empty, both = turn(None, arguments) or "", turn("", arguments) or "", turn(_SAID, arguments) or ""
    apart = turn(_SAID, arguments, apart=True) or ""
    return Traits(
        takes_tools=takes_tools,
        takes_system=_SAID in (tried([_SYSTEM, _USER]) or ""),
        takes_argument_text=takes_text,
        takes_null=_CITY in null and (_CITY not in empty or null.count("None") <= empty.count("None")),
        writes_calls=any(_CITY in text for text in (null, empty, both)),
        splits=bool(both) and _CITY not in both and _CITY in apart and _SAID in apart,
    )
