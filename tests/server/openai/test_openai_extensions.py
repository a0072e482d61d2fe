"""What vLLM's and llama.cpp's clients ask for beside OpenAI's fields, and OpenAI's older form of tools."""

import json
import re
from typing import Any

import httpx
import openai
import pytest
from scripted_openai import HELLO, ScriptedChat, application, data_of, post, said

from kvist.runtime.request import FinishReason
from kvist.service.loaded import Loaded, open_model
from kvist.text.response import Content, ToolCallArguments, ToolCallBegin, ToolCallEnd

STOP = FinishReason.STOP
PATH = "/v1/chat/completions"
CALL = (ToolCallBegin(0, "weather"), ToolCallArguments(0, '{"place":'), ToolCallArguments(0, ' "Ulm"}'), ToolCallEnd(0))
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
LARK = 'start: "x" ("y" | "z")~3'
GBNF = 'root ::= "x" ("y" | "z"){3}'

FORMS: list[tuple[dict[str, Any], str]] = [
    ({"guided_json": SCHEMA}, r'\{\s*"a"\s*:\s*[12]\s*\}'),
    ({"guided_json": json.dumps(SCHEMA)}, r'\{\s*"a"\s*:\s*[12]\s*\}'),
    ({"json_schema": SCHEMA}, r'\{\s*"a"\s*:\s*[12]\s*\}'),
    ({"guided_regex": "[ab]{3}-[0-9]{2}"}, "[ab]{3}-[0-9]{2}"),
    ({"guided_choice": ["one\n", 'tw"o']}, 'one\n|tw"o'),
    ({"guided_grammar": LARK}, "x[yz]{3}"),
    ({"grammar": GBNF}, "x[yz]{3}"),
    ({"structured_outputs": {"json": SCHEMA}}, r'\{\s*"a"\s*:\s*[12]\s*\}'),
    ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    ({"structured_outputs": {"grammar": GBNF}}, "x[yz]{3}"),
]


@pytest.fixture(scope="module")
def loaded(tiny_model: Any) -> Loaded:
    return open_model(str(tiny_model))


@pytest.mark.parametrize(("fields", "pattern"), FORMS)
def test_a_text_has_the_form_that_was_asked_for(
    openai_client: openai.OpenAI, fields: dict[str, Any], pattern: str
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "temperature": 1.0, "seed": 4, "extra_body": fields}
    chat = openai_client.chat.completions.create(messages=HELLO, max_completion_tokens=200, **asked)  # type: ignore[arg-type]
    text = openai_client.completions.create(prompt="Hello", max_tokens=200, **asked)
    for found, reason in (
        (chat.choices[0].message.content, chat.choices[0].finish_reason),
        (text.choices[0].text, text.choices[0].finish_reason),
    ):
        assert re.fullmatch(pattern, found or ""), found
        assert reason == "stop"


NO_GRAMMARS: list[dict[str, Any]] = [
    {"guided_regex": "(a"},
    {"grammar": "root ::= b"},
    {"grammar": "root ::= " + '"a" ' * 3000},
    {"grammar": "root ::= " + "(" * 4000},
    {"guided_grammar": "start: b"},
]


@pytest.mark.parametrize("fields", NO_GRAMMARS)
@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
def test_what_is_no_grammar_is_refused_in_a_line(server_url: str, path: str, fields: dict[str, Any]) -> None:
    body = {"messages": HELLO} if path == PATH else {"prompt": "a"}
    refusal = httpx.post(server_url + path, json=body | fields, timeout=30)
    assert refusal.status_code == 400
    assert len(refusal.json()["error"]["message"]) < 400


def test_tokens_that_end_an_answer(openai_client: openai.OpenAI, loaded: Loaded) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "A tree", "max_tokens": 30, "temperature": 0.8, "seed": 3}
    ids: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
    whole = openai_client.completions.create(**asked, extra_body=ids).choices[0]
    drawn: list[int] = whole.model_extra["token_ids"]  # type: ignore[index]
    assert len(drawn) == 30
    end = next(token for place, token in enumerate(drawn) if place >= 5 and token not in drawn[:5])
    first = drawn.index(end)
    ended = openai_client.completions.create(**asked, extra_body=ids | {"stop_token_ids": [end]}).choices[0]
    assert ended.model_extra["token_ids"] == drawn[: first + 1]  # type: ignore[index]
    assert ended.finish_reason == "stop"
    assert ended.text == loaded.tokenizer().decode(drawn[:first])  # it is no part of the text
    later = openai_client.completions.create(
        **asked, extra_body=ids | {"stop_token_ids": [end], "min_tokens": first + 4}
    ).choices[0]
    after: list[int] = later.model_extra["token_ids"]  # type: ignore[index]
    assert len(after) >= first + 4
    assert end not in after[: first + 4]


def test_a_stream_tells_how_far_the_prompt_is(server_url: str) -> None:
    prompt = "How far is the prompt? " * 60
    for path, body in (
        (PATH, {"messages": [{"role": "user", "content": prompt}]}),
        ("/v1/completions", {"prompt": prompt}),
    ):
        asked = body | {"stream": True, "return_progress": True, "max_tokens": 3}
        events = data_of(httpx.post(server_url + path, json=asked, timeout=60).text)
        told = [event["prompt_progress"] for event in events if "prompt_progress" in event]
        assert told
        assert all(progress.keys() == {"total", "cache", "processed", "time_ms"} for progress in told)
        processed = [progress["processed"] for progress in told]
        assert processed == sorted(processed)
        assert 0 < processed[0] < told[0]["total"]
        plain = data_of(httpx.post(server_url + path, json=asked | {"return_progress": False}, timeout=60).text)
        assert not any("prompt_progress" in event for event in plain)


def test_functions_are_called_in_their_older_form() -> None:
    chat = ScriptedChat([said(Content("I look.")), said(*CALL), said(finish=STOP)])
    body = {"messages": HELLO, "functions": [WEATHER], "function_call": {"name": "weather"}}
    answer = post(application(chat), PATH, body).json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "weather", "arguments": '{"place": "Ulm"}'}
    assert "tool_calls" not in choice["message"]
    assert [tool.name for tool in chat.request.tools] == ["weather"]
    assert (chat.request.tool_choice.value, chat.request.tool_name) == ("required", "weather")
    assert not chat.request.parallel_tool_calls
    chunks = data_of(post(application(chat), PATH, body | {"stream": True}).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [delta["function_call"] for delta in deltas if "function_call" in delta]
    assert calls[0]["name"] == "weather"
    assert "".join(call["arguments"] for call in calls) == '{"place": "Ulm"}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"


def test_what_a_function_gave_is_a_tools_result() -> None:
    chat = ScriptedChat([said(Content("Rain."), finish=STOP)])
    called = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}}
    messages = [*HELLO, called, {"role": "function", "name": "weather", "content": "Rain."}]
    response = post(application(chat), PATH, {"messages": messages, "functions": [WEATHER]})
    assert response.status_code == 200, response.text
    _, call, result = chat.request.messages
    assert call["tool_calls"][0]["function"] == {"name": "weather", "arguments": "{}"}
    assert (result["role"], result["name"], result["content"]) == ("tool", "weather", "Rain.")
    assert result["tool_call_id"] == call["tool_calls"][0]["id"]
