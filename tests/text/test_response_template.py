"""Response templates that checkpoints bring along: read as transformers reads them, and refused with the place."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_parsing.response_parser import parse_response

from kvist.base.errors import ConfigError, TextError
from kvist.text.response import (
    Content,
    Reasoning,
    ResponseFormat,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
    joined,
)
from kvist.text.response_template import ResponseTemplate

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "warm": {"type": "boolean"},
        "least": {"type": ["number", "null"]},
        "deep": {"anyOf": [{"type": "object"}, {"type": "array"}]},
    },
}
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "Finds it.", "parameters": PARAMETERS}}]
FROM_MARKER = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
THINK = {"open": "<think>", "close": "</think>"}


def spec(calls: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"start_anchor": "<answer>", "fields": {"tool_calls": calls, "reasoning": THINK, "content": {}, **fields}}


LINES = spec(
    {
        "open_pattern": r"CALL (?P<name>\w+)\n",
        "close": "END",
        "repeats": True,
        "content": "kv-lines",
        "content_args": {"kv_sep": "="},
        "transform": FROM_MARKER,
    }
)
TAGS = spec(
    {
        "open_pattern": r"<call (?P<name>\w+)>",
        "close": "</call>",
        "repeats": True,
        "content": "xml-inline",
        "content_args": {
            "tag_pattern": r"<(?P<key>\w+)>(?P<value>.*?)</(?P=key)>",
            "merge_duplicates": True,
            "value_parser": {"name": "json", "args": {"allow_non_json": True}},
        },
        "transform": FROM_MARKER,
    }
)
LOOSE_JSON = spec(
    {
        "open_pattern": r"<call>(?P<name>\w+)",
        "close": "</call>",
        "repeats": True,
        "content": "json",
        "content_args": {"unquoted_keys": True, "string_delims": [["<'>", "<'>"]]},
        "transform": FROM_MARKER,
    }
)
EACH = spec(
    {
        "open": "<calls>",
        "close": "</calls>",
        "content": "json",
        "transform_each": True,
        "transform": {"function": {"name": "{tool}", "arguments": "{input}"}},
    }
)
CASES = [
    (LINES, "CALL look_up\ncity=Oslo\ndays= 3 \nwarm=true\nEND"),
    (LINES, "<think>Hm.</think>CALL look_up\nleast=null\nEND\nCALL look_up\ndays=3.0\ndeep=[1]\n\nEND"),
    (LINES, "Nothing to call."),
    (TAGS, "<call look_up><city>Oslo</city><days>3</days></call>"),
    (TAGS, '<call look_up><city>a</city>, <city>b</city><deep>{"a": [1]}</deep></call>'),
    (TAGS, "<call look_up></call>"),
    (LOOSE_JSON, "<call>look_up{city:<'>Os\"lo, a: b<'>,days:3}</call>"),
    (LOOSE_JSON, '<call>look_up{city:"a, b: c",deep:{days:[1]}}</call>'),
    (LOOSE_JSON, "<think>a</think><call>look_up{}</call>"),
    (EACH, '<calls>[{"tool": "look_up", "input": {"city": "Oslo"}}, {"tool": "x", "input": {}}]</calls>'),
]


def answer(own: dict[str, Any], text: str, prompt: str = "") -> dict[str, Any]:
    """What an answer comes to, as a message."""
    parser = ResponseFormat("own", ResponseTemplate.read(own, "here"), None).parser(prompt, TOOLS)
    message: dict[str, Any] = {}
    for part in joined([*parser.push(text), *parser.finish()]):
        match part:
            case Content(text) | Reasoning(text):
                key = "content" if isinstance(part, Content) else "reasoning"
                message[key] = message.get(key, "") + text
            case ToolCallBegin(_, name):
                message.setdefault("tool_calls", []).append([name, ""])
            case ToolCallArguments(_, text):
                message["tool_calls"][-1][1] += text
            case ToolCallEnd():
                message["tool_calls"][-1][1] = json.loads(message["tool_calls"][-1][1])
    return message


@pytest.mark.parametrize(("own", "text"), CASES)
def test_answers_are_read_as_transformers_reads_them(own: dict[str, Any], text: str) -> None:
    theirs = parse_response(text, own, prefix="<answer>", tools=TOOLS)
    if "tool_calls" in theirs:
        called = [call["function"] for call in theirs["tool_calls"]]
        theirs["tool_calls"] = [[function["name"], function["arguments"]] for function in called]
    assert answer(own, text) == theirs


def test_what_the_prompt_holds_of_the_answer_is_read_and_not_told() -> None:
    prompt = "<answer>an earlier one</think><answer><think>I "
    assert answer(LINES, "see</think>\nYes.", prompt) == {"reasoning": "see", "content": "Yes."}
    assert parse_response("see</think>\nYes.", LINES, prefix=prompt)["reasoning"] == "I see"
    assert answer(LINES, "Yes.", "no anchor <think>") == {"content": "Yes."}


def test_values_that_json_cannot_carry_are_text() -> None:
    own = spec(
        {
            "open_pattern": r"CALL (?P<name>\w+)\n",
            "close": "END",
            "content": "kv-lines",
            "content_args": {"value_parser": {"name": "float"}},
            "transform": FROM_MARKER,
        }
    )
    assert answer(own, "CALL look_up\nleast: 1.5\nEND") == {"tool_calls": [["look_up", {"least": 1.5}]]}
    for word in ("nan", "-inf", "much"):
        text = f"CALL look_up\nleast: {word}\nEND"
        assert answer(own, text) == {"content": text}
    parser = ResponseFormat("own", ResponseTemplate.read(LOOSE_JSON, "here"), None).parser()
    for part in parser.push('<call>look_up{city:"\\ud800"}</call>'):
        assert not isinstance(part, ToolCallArguments) or part.text.encode() == b'{"city": "\\ud800"}'


def test_text_where_tags_should_be_is_no_call() -> None:
    for text in ('<call look_up>{"city": "Oslo"}</call>', "<call look_up><city>Oslo</call>"):
        assert answer(TAGS, text) == {"content": text}


def test_a_checkpoints_own_template_comes_before_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"response_template": LINES}))
    assert ResponseFormat.detect(tmp_path, None).name == "response_template"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"response_template": {"fields": {}}}))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: response_template has no fields"):
        ResponseFormat.detect(tmp_path, None)


def field(**change: Any) -> dict[str, Any]:
    return {"fields": {"tool_calls": {"open": "<call>", **change}}}


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ([], "here should be a JSON object, got list"),
        ({"fields": {"content": {}}, "version": 2}, "is of version 2"),
        ({"fields": {"content": {}}, "regions": []}, "keys that Kvist does not know: regions"),
        ({"fields": {"content": {}, "other": {}}}, "more than one field that nothing opens"),
        ({"fields": {"tool_calls": {}}}, "field 'tool_calls': nothing opens it"),
        ({"fields": {"content": []}}, "field 'content' should be a JSON object, got list"),
        (field(open_pattern="x"), "open and open_pattern cannot both be given"),
        (field(open=""), "open should be a text or a list of texts"),
        (field(open=["a", 1]), "open should be a text or a list of texts"),
        (field(close_pattern="("), "close_pattern is no regular expression"),
        (field(close_pattern=7), "close_pattern is no regular expression"),
        (field(content="yaml"), "there is no content 'yaml'; there is text"),
        (field(content={}), "there is no content {}"),
        (field(content_args=[]), "content_args should be an object"),
        (field(join=1), "join should be a string"),
        (field(content="json", content_args={"string_delims": ["''"]}), "string_delims should be a list of pairs"),
        (field(content="json", content_args={"string_delims": [["'", ""]]}), "string_delims should be a list of pairs"),
        (field(content="kv-lines", content_args={"kv_sep": ""}), "kv_sep and line_sep should be texts"),
        (field(content="kv-lines", content_args={"line_sep": 1}), "kv_sep and line_sep should be texts"),
        (field(content="xml-inline"), "tag_pattern is no regular expression"),
        (field(content="xml-inline", content_args={"tag_pattern": "<(.*)>"}), "tag_pattern has no group called key"),
        (field(content_args={"value_parser": {"name": "x"}}), "value_parser: there is no content 'x'"),
        (field(content_args={"value_parser": "json"}), "value_parser should be a JSON object"),
        (field(transform={"function": {"name": "my_{name}"}}), "a placeholder is all of a text in transform"),
    ],
)
def test_a_template_that_cannot_be_understood_is_refused_with_the_place(own: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=r"^here") as refusal:
        ResponseTemplate.read(own, "here")
    assert said in str(refusal.value)


def test_a_pattern_that_runs_away_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.text.response_template._SECONDS", 0.01)
    slow = r"(?:a|aa)+[xy]"
    own = ResponseTemplate.read({"fields": {"content": {}}, "start_anchor_pattern": slow}, "here")
    with pytest.raises(TextError, match="takes too long"):
        ResponseFormat("own", own, None).parser("a" * 60)
    own = ResponseTemplate.read({"fields": {"content": {}, "reasoning": {"open_pattern": slow}}}, "here")
    with pytest.raises(TextError, match="takes too long"):
        ResponseFormat("own", own, None).parser().push("a" * 60)
