"""However an answer is cut into pieces, its parts are the same; and nothing of it is lost."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.text.response import (
    FORMATS,
    Content,
    Part,
    Reasoning,
    ResponseFormat,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
    joined,
)
from kvist.text.response_template import Kind, ResponseTemplate

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    for name, properties in (("look_up", {"city": {"type": "string"}, "days": {"type": "integer"}}), ("stop", {}))
]


def own(fields: dict[str, Any]) -> ResponseFormat:
    return ResponseFormat("own", ResponseTemplate.read({"fields": fields}, "here"), None)


# What checkpoints may bring along and no known format has: other notations, patterns that may match nothing or grow,
# markers that begin alike, no text between regions.
OWN = {
    "lines": own(
        {
            "tool_calls": {
                "open_pattern": r"CALL (?P<name>\w+)\n",
                "close": ["END", "ENDED"],
                "content": "kv-lines",
                "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {"content_args": {"strip": False}},
        }
    ),
    "escaped": own(
        {
            "tool_calls": {
                "open_pattern": r"<call>(?P<name>\w+)(?=\{)",
                "close": "</call>",
                "content": "json",
                "content_args": {"unquoted_keys": True, "string_delims": [["<'>", "<'>"]]},
                "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
            },
            "reasoning": {"open_pattern": r"<think>\n*", "close_pattern": r"\n*</think>|$"},
            "content": {"close_pattern": r"(?=<call>)|<eot>"},
        }
    ),
    "regions only": own(
        {
            "content": {"open": ["<say>", "<say>>"], "close": "</say>", "repeats": True, "join": "|"},
            "reasoning": {"open_pattern": r"<(?:think|thought)+>", "close": ["</think>", "</thi"]},
        }
    ),
}
ALL = {**FORMATS, **OWN}

MARKERS = [
    "<think>", "</think>", "[THINK]", "[/THINK]", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]",
    "<function=look_up>", "<parameter=city>", "<parameter=days>", "</parameter>", "</function>", "<|python_tag|>",
    "<|start|>assistant", "<|channel|>", "final", "analysis", "commentary to=functions.look_up", "<|constrain|>json",
    "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>",
    "function<｜tool▁sep｜>look_up\n```json\n", "stop<｜tool▁sep｜>", "```<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
    "CALL stop\n", "END", "ED", "<call>stop", "</call>", "<'>", "<say>", "</say>", "<thought>", "<eot>",
]  # fmt: skip
SCRAPS = [
    "{", "}", "[", "]", '"', "\\", "\\u00e9", "\\ud800", ",", ":", "; ", "\n", " ", "\t", "\x01", "x", "1", "-", "null",
    "é日", '"name"', '"look_up"', '{"name": "look_up", ', '"arguments": ', '"parameters": ', '{"city": "Os\\"lo"}',
    '"{\\"days\\": 1}"', "{}", "city: x\n", '{"name": "Alice", "parameters": {}}', '{city: "a, b: c"}',
]  # fmt: skip
CALLS = [
    '<tool_call>\n{"name": "look_up", "arguments": {"city": "{"}}\n</tool_call>',
    "<tool_call>\n<function=look_up>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
    '[TOOL_CALLS][{"name": "look_up", "arguments": {"city": "]"}}, {"name": "stop", "arguments": {}}]',
    '[TOOL_CALLS]look_up[ARGS]{"city": "[ARGS]"}',
    '{"name": "look_up", "parameters": {"city": "\\\\"}}',
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>stop\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "<|channel|>commentary to=functions.stop <|constrain|>json<|message|>{}<|call|>",
    "CALL look_up\ncity: Oslo\nEND",
    "<call>look_up{city: <'>Os\"lo<'>, days: 3}</call>",
]


@st.composite
def broken(draw: st.DrawFn) -> str:
    """A call with something put in, or taken out."""
    call = draw(st.sampled_from(CALLS))
    at, gone = draw(st.integers(0, len(call))), draw(st.integers(0, 6))
    return call[:at] + draw(st.sampled_from(["", *MARKERS, *SCRAPS])) + call[at + gone :]


TEXTS = st.lists(st.sampled_from(MARKERS + SCRAPS) | st.sampled_from(CALLS) | broken(), max_size=9).map("".join)
# As short as can be, of what markers consist of: the longest way for them to be almost there.
LETTERS = st.text(st.sampled_from('<>/|[]{}":,;\\ \nthinkcaloTOL_'), max_size=40)
PROMPTS = st.sampled_from(["", "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n", "say [THINK]"])


def parts_of(format: ResponseFormat, pieces: list[str], prompt: str = "") -> list[Part]:
    parser = format.parser(prompt, TOOLS)
    found = [part for piece in pieces for part in parser.push(piece)]
    return joined([*found, *parser.finish()])


def check(parts: list[Part]) -> None:
    """What holds of the parts of any answer."""
    open_call, begun = None, []
    for part in parts:
        if isinstance(part, Content | Reasoning):
            open_call = None  # one that broke off
            assert part.text
        elif isinstance(part, ToolCallBegin):
            open_call = part.index
            begun.append(part.index)
        else:
            assert part.index == open_call, "a call is told of in one go"
        if isinstance(part, ToolCallEnd):
            text = "".join(p.text for p in parts if isinstance(p, ToolCallArguments) and p.index == part.index)
            assert isinstance(json.loads(text.encode()), dict)
            open_call = None
    assert begun == list(range(len(begun)))


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=30)
@given(text=TEXTS | LETTERS, prompt=PROMPTS, data=st.data())
def test_however_a_text_is_cut_its_parts_are_the_same(name: str, text: str, prompt: str, data: st.DataObject) -> None:
    whole = parts_of(ALL[name], [text], prompt)
    check(whole)
    assert parts_of(ALL[name], list(text), prompt) == whole
    pieces, rest = [], text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:size])
        rest = rest[size:]
    assert parts_of(ALL[name], ["", *pieces, ""], prompt) == whole


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("plain", "think", "regions only")])
def test_a_call_may_be_cut_anywhere(name: str) -> None:
    own_calls = 0
    for call in CALLS:
        text = f"{call} b"
        whole = parts_of(ALL[name], [text])
        if not any(isinstance(part, ToolCallEnd) for part in whole):
            continue  # in the manner of another format
        own_calls += 1
        check(whole)
        for cut in range(len(text)):
            assert parts_of(ALL[name], [text[:cut], text[cut:]]) == whole
    assert own_calls


def dropped(format: ResponseFormat) -> list[str]:
    """The markers that say where text and reasoning begin and end: what an answer without calls may lose."""
    fields = [field for field in format.template.fields if field.kind is not Kind.CALLS]
    markers = [marker for field in fields for marker in (field.open, field.close) if marker is not None]
    return [literal for marker in markers for literal in marker.literals]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40)
@given(text=TEXTS | LETTERS)
def test_of_what_is_no_call_nothing_is_lost(name: str, text: str) -> None:
    """But whitespace beside markers, and those of reasoning."""
    parts = parts_of(FORMATS[name], [text])
    if any(isinstance(part, ToolCallBegin) for part in parts):
        return
    told = "".join(part.text for part in parts if isinstance(part, Content | Reasoning))
    said = text
    for marker in dropped(FORMATS[name]):
        told, said = told.replace(marker, ""), said.replace(marker, "")
    assert "".join(told.split()) == "".join(said.split())


@settings(max_examples=80)
@given(text=TEXTS | LETTERS)
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert parts_of(FORMATS["plain"], list(text)) == ([Content(text)] if text else [])


def test_a_parser_that_forgets_between_pieces_is_seen() -> None:
    """The comparison that the tests above rest on can fail."""
    text = f"Well. {CALLS[0]}"
    whole = parts_of(FORMATS["hermes"], [text])
    forgetful = joined([part for piece in (text[:10], text[10:]) for part in parts_of(FORMATS["hermes"], [piece])])
    assert any(isinstance(part, ToolCallEnd) for part in whole)
    assert forgetful != whole
    with pytest.raises(AssertionError):
        check([ToolCallBegin(0, "stop"), ToolCallArguments(0, "[]"), ToolCallEnd(0)])
    with pytest.raises(AssertionError, match="in one go"):
        check([ToolCallBegin(0, "stop"), Content("x"), ToolCallEnd(0)])
