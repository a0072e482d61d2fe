"""Answers in every known format are taken apart: text, reasoning, calls. (Cuts: test_response_splits.py.)"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvist.text.chat import ChatTemplate
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


# Calls that are none, by format. Each is content as it stands.
NO_CALLS = [
    ("hermes", "<tool_call>\nnothing\n</tool_call>"),
    ("hermes", '<tool_call>{"name": 7}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "stop", "arguments": [1]}</tool_call> b'),
    ("hermes", '<tool_call>{"name": "stop", "arguments": "[1]"}</tool_call> b'),
    ("hermes", "<tool_call>"),
    ("hermes", "a < b <tool"),
    ("hermes", "[1, 2"),
    ("hermes", f'<tool_call>{{"arguments": {{"city": "{"x" * 5000}"}}, "name": "look_up"}}</tool_call>'),
    ("qwen3-coder", "<tool_call>\n<function=look_up>\n<parameter=city>\na</parameter>"),
    ("qwen3-coder", "<tool_call>\n<function=look_up>\n<parameter=city>\na\n</function>\n</tool_call> b"),
    ("qwen3-coder", '<tool_call>\n<function=look_up>\n{"city": "Oslo"}\n</function>\n</tool_call>'),
    ("deepseek", "<｜tool▁calls▁begin｜>oops"),
    ("deepseek", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>stop\n```json\nno\n```<｜tool▁call▁end｜>"),
    ("mistral", "[TOOL_CALLS][] x"),
    ("mistral", "[TOOL_CALLS]stop{}"),
    ("mistral-args", "[TOOL_CALLS]stop x"),
    ("gpt-oss", "<|channel|>commentary to=functions.stop<|message|>no<|call|>"),
    ("gpt-oss", "<|channel|>unheard<|message|>of"),
    ("gpt-oss", '{"a": 1}'),
    ("llama3-json", "<|python_tag|>print(1)"),
    ("llama3-json", '{"name": "stop", "parameters": "x"}'),
    ("llama3-json", '{"type": "function", "function": "stop"}'),
]


@pytest.mark.parametrize(("name", "text"), NO_CALLS)
def test_what_is_no_call_is_text(name: str, text: str) -> None:
    assert parts_of(FORMATS[name], [text]) == [Content(text)]


# Calls that models write otherwise than they were told to, and that are clear all the same.
LOOSE = [
    ("hermes", '<tool_call>{"name": "look_up", "parameters": {"city": "Oslo", "days": 3}}</tool_call>', ONE),
    ("hermes", '<tool_call>{"arguments": {"city": "Oslo", "days": 3}, "name": "look_up"}</tool_call>', ONE),
    ("hermes", '<tool_call>{"name":"look_up","arguments":"{\\"city\\":\\"Oslo\\",\\"days\\":3}"}</tool_call>', ONE),
    ("hermes", '<tool_call>{"name": "look_up", "arguments": {"city": "Oslo", "days": 3}}', ONE),
    ("hermes", '<tool_call>[{"name": "look_up", "arguments": {"city": "Oslo", "days": 3}}]</tool_call>', ONE),
    ("hermes", '<tool_call>{"id": [{}], "name": "stop", "arguments": null, "x": 1.5 }</tool_call>', TWO),
    ("hermes", '<tool_call>{"name": "stop", "arguments": ""}</tool_call>', TWO),
    ("hermes", '<tool_call>{"name": "stop"}  \n </tool_call>', TWO),
    ("llama3-json", '{"type": "function", "name": "look_up", "arguments": {"city": "Oslo", "days": 3}}', ONE),
    ("qwen3-coder", "<function=look_up><parameter=city>Oslo</parameter><parameter=days>3</parameter></function>", ONE),
    ("qwen3-coder", "<function=stop></function>", TWO),
    ("deepseek", '<｜tool▁call▁begin｜>look_up<｜tool▁sep｜>{"city":"Oslo","days":3}<｜tool▁call▁end｜>', ONE),
    ("mistral", '[TOOL_CALLS] {"name": "look_up", "arguments": {"city": "Oslo", "days": 3}}', ONE),
    ("mistral-args", '[TOOL_CALLS]look_up[CALL_ID]a1[ARGS]{"city": "Oslo", "days": 3}', ONE),
    ("mistral-args", '[TOOL_CALLS]look_up{"city": "Oslo", "days": 3}', ONE),
    ("gpt-oss", ' to=functions.look_up<|channel|>commentary json<|message|>{"city":"Oslo","days":3}<|call|>', ONE),
]


@pytest.mark.parametrize(("name", "text", "call"), LOOSE)
def test_a_call_that_is_clear_is_one(name: str, text: str, call: tuple[str, Any]) -> None:
    assert read(name, f"{text}\n") == Read("", "", [call], 1)


def test_arguments_in_a_string_may_be_long() -> None:
    inner = json.dumps({"city": "x" * 20_000})
    text = f'<tool_call>{{"name": "look_up", "arguments": {json.dumps(inner)}}}</tool_call>'
    assert read("hermes", text).calls == [("look_up", {"city": "x" * 20_000})]


@pytest.mark.parametrize("name", ["hermes", "mistral"])
def test_arguments_can_be_sent_whatever_the_model_escaped(name: str) -> None:
    inner = json.dumps({"city": "\ud800 \U0001f600"})
    call = f'{{"name": "look_up", "arguments": {json.dumps(inner)}}}'
    text = {"hermes": f"<tool_call>{call}</tool_call>", "mistral": f"[TOOL_CALLS][{call}]"}[name]
    for part in parts_of(FORMATS[name], [text]):
        assert not isinstance(part, ToolCallArguments) or part.text.encode()
    assert read(name, text).calls == [("look_up", {"city": "\ud800 \U0001f600"})]


def test_a_call_that_breaks_off_is_passed_over_by_the_numbers() -> None:
    broken = '<tool_call>{"name": "look_up", "arguments": {"city": 1,}}</tool_call>'
    text = f'{broken} so <tool_call>{{"name": "stop"}}</tool_call>'
    assert parts_of(FORMATS["hermes"], [text]) == [
        ToolCallBegin(0, "look_up"),
        ToolCallArguments(0, '{"city": 1,'),
        Content("}}</tool_call> so"),
        ToolCallBegin(1, "stop"),
        ToolCallArguments(1, "{}"),
        ToolCallEnd(1),
    ]


def test_whitespace_after_a_call_takes_no_time_worth_speaking_of() -> None:
    text = '<tool_call>{"name": "stop"}' + "\n" * 20_000
    begun = time.perf_counter()
    assert read("hermes", text).calls == [TWO]
    assert time.perf_counter() - begun < 5  # about 0.1 s; a look at all of it for each character takes minutes


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


TELLS = [
    ("{{ '<tool_call>' }} <function= <parameter=", "qwen3-coder"),
    ("{{ '<tool_call>' }} </think>", "hermes"),
    ("<｜tool▁call▁begin｜> </think>", "deepseek"),
    ("[TOOL_CALLS] [ARGS]", "mistral-args"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|channel|> <|message|>", "gpt-oss"),
    ("<|python_tag|>", "llama3-json"),
    ("""<|start_header_id|> '"parameters": '""", "llama3-json"),
    ("{{ content.split('</think>')[-1] }}", "think"),
    ("{{ messages }}", "plain"),
]


@pytest.mark.parametrize(("source", "name"), TELLS)
def test_a_checkpoints_format_is_told_by_its_chat_template(tmp_path: Path, source: str, name: str) -> None:
    template = ChatTemplate({"default": "{# " + source + " #}"}, {}, "here")
    assert ResponseFormat.detect(tmp_path, template) is FORMATS[name]
    assert ResponseFormat.detect(tmp_path, None) is FORMATS["plain"]


def test_what_would_be_a_call_is_text_where_none_may_be() -> None:
    for name, answer in ANSWERS.items():
        format = FORMATS[name].without_calls()
        assert format.calls is None
        parts = parts_of(format, [answer])
        assert parts[0] == Reasoning("Hm.")
        assert all(isinstance(part, Content) for part in parts[1:])


@pytest.mark.parametrize("cut", range(len("\n</tool_call>")))
def test_an_answer_that_ends_within_the_mark_that_ends_a_call_has_nothing_after_it(cut: int) -> None:
    call = '<tool_call>\n{"name": "look", "arguments": {"a": 1}}'
    parser = FORMATS["hermes"].parser()
    parts = joined([*parser.push(call + "\n</tool_call>"[:cut]), *parser.finish()])
    assert parts == [ToolCallBegin(0, "look"), ToolCallArguments(0, '{"a": 1}'), ToolCallEnd(0)]
