"""Answers in every known format are taken apart: text, reasoning, calls; and nothing is lost of what is no call."""

import json
from dataclasses import dataclass
from itertools import pairwise
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

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "deep": {"type": "object"}},
            },
        },
    }
    for name in ("look_up", "stop")
]


@dataclass(frozen=True)
class Read:
    """What an answer came to."""

    content: str
    reasoning: str
    calls: list[tuple[str, Any]]
    complete: int


def parts_of(format: ResponseFormat, pieces: list[str], prompt: str = "") -> list[Part]:
    parser = format.parser(prompt, TOOLS)
    found = [part for piece in pieces for part in parser.push(piece)]
    return joined([*found, *parser.finish()])


def read(name: str, text: str, prompt: str = "") -> Read:
    parts = parts_of(FORMATS[name], [text], prompt)
    calls: dict[int, tuple[str, list[str]]] = {}
    for part in parts:
        if isinstance(part, ToolCallBegin):
            calls[part.index] = (part.name, [])
        elif isinstance(part, ToolCallArguments):
            calls[part.index][1].append(part.text)
    ended = [part.index for part in parts if isinstance(part, ToolCallEnd)]
    return Read(
        "".join(part.text for part in parts if isinstance(part, Content)),
        "".join(part.text for part in parts if isinstance(part, Reasoning)),
        [(calls[index][0], json.loads("".join(calls[index][1]))) for index in ended],
        len(ended),
    )


ONE = ("look_up", {"city": "Oslo", "days": 3})
TWO = ("stop", {})

ANSWERS = {
    "hermes": (
        '<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n{"name": "look_up", "arguments": {"city": "Oslo", "days": 3}}'
        '\n</tool_call>\n<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    ),
    "qwen3-coder": (
        "<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n<function=look_up>\n<parameter=city>\nOslo\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=stop>\n</function>\n</tool_call>"
    ),
    "deepseek": (
        "<think>\nHm.\n</think>\n\nI look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look_up"
        '\n```json\n{"city": "Oslo", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>'
        "stop\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "mistral": (
        '[THINK]Hm.[/THINK]I look.[TOOL_CALLS][{"name": "look_up", "arguments": {"city": "Oslo", "days": 3}}, '
        '{"name": "stop", "arguments": {}}]'
    ),
    "mistral-args": (
        '[THINK]Hm.[/THINK]I look.[TOOL_CALLS]look_up[ARGS]{"city": "Oslo", "days": 3}[TOOL_CALLS]stop[ARGS]{}'
    ),
    "gpt-oss": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.look_up <|constrain|>json<|message|>"
        '{"city": "Oslo", "days": 3}<|call|><|start|>assistant<|channel|>commentary to=functions.stop '
        "<|constrain|>json<|message|>{}<|call|>"
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_reasoning_text_and_two_calls_are_told_apart(name: str) -> None:
    found = read(name, ANSWERS[name])
    assert (found.reasoning, found.content.strip()) == ("Hm.", "I look.")
    assert found.calls == [ONE, TWO]


def test_a_call_without_a_mark_is_one_if_it_names_a_tool() -> None:
    call = '{"name": "look_up", "parameters": {"city": "Oslo", "days": 3}}'
    assert read("llama3-json", call).calls == [ONE]
    assert read("llama3-json", f'<|python_tag|>{call}; {{"name": "stop", "parameters": {{}}}}').calls == [ONE, TWO]
    other = '{"name": "Alice", "parameters": {"age": 3}}'
    found = read("llama3-json", other)
    assert (found.calls, found.content) == ([], other)
    found = read("llama3-json", f"As JSON: {call}")
    assert (found.calls, found.content) == ([], f"As JSON: {call}")


def test_plain_text_is_text() -> None:
    for text in ("", "  <think> [TOOL_CALLS] {", "\n a \n"):
        assert read("plain", text) == Read(text, "", [], 0)


def test_reasoning_that_the_prompt_has_opened_goes_on() -> None:
    assert read("hermes", "Hm.\n</think>\n\nYes.", "<|im_start|>assistant\n<think>\n") == Read("Yes.", "Hm.", [], 0)
    assert FORMATS["hermes"].parser("<think>\n").reasons
    assert not FORMATS["hermes"].parser("").reasons


def test_arguments_come_as_the_model_wrote_them_while_it_writes() -> None:
    written = '{"city":"O\\u0073lo" ,\n "deep": {"a": ["}", "\\"</tool_call>"]}}'
    parser = FORMATS["hermes"].parser("", TOOLS)
    parts = parser.push('<tool_call>\n{"name": "look_up", "arguments": ')
    told, ended = "", False
    for character in written:
        parts = parser.push(character)
        ended = any(isinstance(part, ToolCallEnd) for part in parts)
        told += "".join(part.text for part in parts if isinstance(part, ToolCallArguments))
        assert written.startswith(told)
    assert len(told) >= len(written) - 1
    rest = [*parser.push("}\n</tool_call>"), *parser.finish()]
    assert told + "".join(part.text for part in rest if isinstance(part, ToolCallArguments)) == written
    assert ended, "with its last bracket"
    assert rest == []


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nnothing\n</tool_call>",
        '<tool_call>{"name": 7}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>",
        "a < b <tool",
        "[1, 2",
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    found = read("hermes", text)
    assert (found.calls, found.content) == ([], text)


def test_a_call_that_the_text_ends_within_has_no_end() -> None:
    parts = parts_of(FORMATS["hermes"], ['Well. <tool_call>\n{"name": "look_up", "arguments": {"city": "Os'])
    assert ToolCallBegin(0, "look_up") in parts
    assert not any(isinstance(part, ToolCallEnd) for part in parts)


def test_text_is_held_back_only_while_it_may_be_a_mark() -> None:
    parser = FORMATS["hermes"].parser("", TOOLS)
    assert parser.push("Hello") == [Content("Hello")]
    assert parser.push(" <") == []
    assert joined(parser.push("b>")) == [Content(" <b>")]
    assert parser.push("<tool_cal") == []
    assert parser.push("m") == [Content("<tool_calm")]


FRAGMENTS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool", "_call>", "[TOOL_CALLS]", "[ARGS]", "[", "]", "{",
    "}", '{"name": "look_up", ', '"arguments": ', '"parameters": ', '{"city": "Os\\"lo"}', "{}", '"', "\\", "\n", " ",
    "x",
    "<function=look_up>", "<parameter=city>", "</parameter>", "</function>", "<|python_tag|>", "; ", "é日", "\\u00e9",
    "<|channel|>", "final", "analysis", "<|message|>", "<|end|>", "<|call|>", "commentary to=functions.look_up",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "function<｜tool▁sep｜>look_up\n```json\n",
    "```<｜tool▁call▁end｜>",
]  # fmt: skip
TEXTS = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join),
    st.sampled_from(list(ANSWERS.values())),
    st.builds(lambda text, at, put: text[:at] + put + text[at:], st.sampled_from(list(ANSWERS.values())),
              st.integers(0, 120), st.sampled_from(FRAGMENTS)),
)  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 200), max_size=6))
def test_however_a_text_is_cut_its_parts_are_the_same(name: str, text: str, cuts: list[int]) -> None:
    whole = parts_of(FORMATS[name], [text])
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert parts_of(FORMATS[name], [text[a:b] for a, b in pairwise(places)]) == whole
    assert parts_of(FORMATS[name], list(text)) == whole
    for part in whole:
        if isinstance(part, ToolCallEnd):
            arguments = [p.text for p in whole if isinstance(p, ToolCallArguments) and p.index == part.index]
            assert isinstance(json.loads("".join(arguments)), dict)
            assert sum(isinstance(p, ToolCallBegin) and p.index == part.index for p in whole) == 1


@settings(max_examples=100)
@given(text=TEXTS)
def test_what_has_no_markers_of_its_own_loses_nothing(text: str) -> None:
    assert "".join(part.text for part in parts_of(FORMATS["plain"], [text])) == text  # type: ignore[union-attr]


def test_the_parts_are_those_of_transformers() -> None:
    """The same response template, read by both, on a text with everything in it."""
    from transformers.utils.chat_parsing.response_parser import parse_response

    from kvist.text.response_formats import KNOWN

    for name in ("hermes", "deepseek", "mistral"):
        found = read(name, ANSWERS[name])
        template = {"start_anchor": "<answer>", **KNOWN[name].template}
        message = parse_response(ANSWERS[name], template, prefix="<answer>")
        theirs = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
        assert (theirs, message["reasoning_content"].strip()) == (found.calls, found.reasoning)
        # It keeps the last stretch between regions only, which is the whitespace between two calls.
        assert message.get("content") in (None, found.content.strip())


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.calls is not None])
def test_calls_written_by_their_syntax_are_read_back(name: str) -> None:
    syntax = FORMATS[name].calls
    assert syntax is not None
    if syntax.parameter is None:
        written = ['{"city": "Oslo", "days": 3}', "{}"]
    else:
        before, between, after = syntax.parameter
        written = [f"{before}city{between}Oslo{after}{before}days{between}3{after}", ""]
    calls = [
        syntax.before + tool + syntax.middle + arguments + syntax.after
        for tool, arguments in zip(("look_up", "stop"), written, strict=True)
    ]
    text = syntax.first + syntax.between.join(calls) + syntax.last
    assert read(name, text).calls == [ONE, TWO]
