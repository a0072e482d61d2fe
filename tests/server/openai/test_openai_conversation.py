"""What a body of Chat Completions asks of the chat, and what is refused."""

import json
import sys
from typing import Any

import pytest
from scripted_openai import END, HELLO, ScriptedChat, ScriptedServing, ScriptedTemplate, application, post, said

from kvist.runtime.request import FinishReason, Sampling
from kvist.service.chat import ChatRequest, Tool, ToolChoice
from kvist.text.response import Content

PATH = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        "strict": True,
    },
}
TIME = {"type": "function", "function": {"name": "time"}}


def asked(template: str = "", **fields: Any) -> ChatRequest:
    """What the chat was asked by a body."""
    chat = ScriptedChat([said(Content("a"), finish=FinishReason.STOP)])
    serving = ScriptedServing(template=ScriptedTemplate(template))
    response = post(application(chat, serving), PATH, {"messages": HELLO, **fields})
    assert response.status_code == 200, response.text
    return chat.request


def refused(**fields: Any) -> tuple[int, str | None, str]:
    """Status, param and message of the refusal of a body."""
    response = post(application(ScriptedChat()), PATH, {"messages": HELLO, **fields})
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return response.status_code, error["param"], error["message"]


def messages(*given: dict[str, Any], template: str = "") -> list[dict[str, Any]]:
    return [dict(message) for message in asked(template, messages=list(given)).messages]


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages({"role": "user", "content": parts, "name": "me"}) == [
        {"role": "user", "content": "a\nb", "name": "me"}
    ]


def test_instructions_at_the_start_are_one_system_message() -> None:
    given = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": "Hi"},
        {"role": "developer", "content": "Now in verse."},
    ]
    assert messages(*given) == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "Now in verse."},
    ]


def test_a_template_that_knows_developers_is_told_of_them() -> None:
    given = [
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert messages(*given, template="{% if role == 'developer' %}") == given


def test_calls_are_as_they_were_sent() -> None:
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place":  "Ulm"}'}},
        {"id": "c2", "type": "function", "function": {"name": "time", "arguments": ""}},
    ]
    given = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning": "Hm."},
        {"role": "tool", "tool_call_id": "c1", "content": "Rain."},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "Noon."}]},
    ]
    _, said_before, first, second = messages(*given)
    assert said_before == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Hm.",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place":  "Ulm"}'}},
            {"id": "c2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
        ],
    }
    assert first == {"role": "tool", "tool_call_id": "c1", "content": "Rain.", "name": "weather"}
    assert second == {"role": "tool", "tool_call_id": "c2", "content": "Noon.", "name": "time"}


def test_a_refusal_of_an_earlier_answer_is_its_text() -> None:
    given = [
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": None, "refusal": "Never.", "reasoning_content": "Why?"},
    ]
    assert messages(*given) == [
        {"role": "assistant", "content": "No."},
        {"role": "assistant", "content": "Never.", "reasoning_content": "Why?"},
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, (ToolChoice.AUTO, None, ["weather", "time"])),
        ("auto", (ToolChoice.AUTO, None, ["weather", "time"])),
        ("none", (ToolChoice.NONE, None, ["weather", "time"])),
        ("required", (ToolChoice.REQUIRED, None, ["weather", "time"])),
        ({"type": "function", "function": {"name": "time"}}, (ToolChoice.REQUIRED, "time", ["weather", "time"])),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TIME]}},
            (ToolChoice.REQUIRED, None, ["time"]),
        ),
    ],
)
def test_choices_of_tools(choice: Any, expected: tuple[ToolChoice, str | None, list[str]]) -> None:
    request = asked(tools=[WEATHER, TIME], tool_choice=choice, parallel_tool_calls=False)
    assert (request.tool_choice, request.tool_name, [tool.name for tool in request.tools]) == expected
    assert request.parallel_tool_calls is False


def test_tools() -> None:
    weather, time = asked(tools=[WEATHER, TIME]).tools
    function = WEATHER["function"]
    place = "tools[{}].function.parameters"
    assert weather == Tool("weather", "Of a place.", function["parameters"], True, place.format(0))
    assert time == Tool("time", None, {"type": "object", "properties": {}}, False, place.format(1))


def test_formats() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert asked().schema is None
    assert asked(response_format={"type": "text"}).schema is None
    assert asked(response_format={"type": "json_object"}).schema == {}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    assert asked(response_format=form).schema == schema


def test_variables_of_the_template() -> None:
    assert asked().template_variables == {}
    assert asked(reasoning_effort="none").template_variables == {"enable_thinking": False}
    assert asked(reasoning_effort="xhigh").template_variables == {"reasoning_effort": "high"}
    given = asked(reasoning_effort="low", chat_template_kwargs={"enable_thinking": True, "reasoning_effort": "medium"})
    assert given.template_variables == {"enable_thinking": True, "reasoning_effort": "medium"}


def test_the_last_message_can_be_continued() -> None:
    conversation = [*HELLO, {"role": "assistant", "content": "It is"}]
    assert not asked(messages=conversation).continue_final
    assert asked(messages=conversation, continue_final_message=True, add_generation_prompt=False).continue_final
    assert refused(continue_final_message=True)[:2] == (400, "continue_final_message")
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert refused(messages=conversation, **both)[:2] == (400, "continue_final_message")
    assert refused(add_generation_prompt=False)[:2] == (400, "add_generation_prompt")


def test_options_by_default_are_openais() -> None:
    options = asked().options
    assert options.max_tokens is None
    assert options.sampling == Sampling(temperature=1.0, seed=options.sampling.seed)
    assert (options.stops, options.choices, options.logprobs, options.prompt_logprobs) == ((), 1, None, None)
    assert (options.priority, options.tenant, options.ignore_eos) == (0, "", False)
    assert options.sampling.seed != asked().options.sampling.seed


def test_every_option() -> None:
    options = asked(
        temperature=0,
        top_p=0.5,
        top_k=40,
        min_p=0.1,
        presence_penalty=-1,
        frequency_penalty=2.0,
        repetition_penalty=1.5,
        seed=-1,
        logit_bias={"70": -100, "65": 1},
        stop=["a", "b"],
        max_tokens=5,
        max_completion_tokens=7.0,
        n=3,
        logprobs=True,
        top_logprobs=4,
        priority=-2,
        ignore_eos=True,
    ).options
    assert options.sampling == Sampling(0.0, 40, 0.5, 0.1, 2**64 - 1, -1.0, 2.0, 1.5, ((65, 1.0), (70, -100.0)))
    assert (options.max_tokens, options.stops, options.choices, options.logprobs) == (7, ("a", "b"), 3, 4)
    assert (options.priority, options.ignore_eos) == (-2, True)


def test_values_that_mean_the_same() -> None:
    assert asked(stop="a").options.stops == ("a",)
    assert asked(top_k=-1).options.sampling.top_k == 0
    assert 0 < asked(top_p=0).options.sampling.top_p < 1e-3
    assert asked(logprobs=False, top_logprobs=0).options.logprobs is None
    empty = dict.fromkeys(("stop", "seed", "n", "tools", "tool_choice", "response_format", "temperature"))
    assert asked(**empty, max_tokens=None, stream=None, unheard_of={"a": 1}, functions=[]).options.choices == 1


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0", "'role' is 'robot', and must be one of"),
        ({"messages": [{"content": "a"}]}, 400, "messages.0", "'role'"),
        ({"messages": [3]}, 400, "messages.0", "object"),
        ({"tool_choice": {"type": "web_search"}}, 400, "tool_choice", "'allowed_tools'"),
        ({"tool_choice": {}}, 400, "tool_choice", "'allowed_tools'"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "required"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content", "list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            400,
            "messages.0.content.0",
            "text alone, no image_url",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            400,
            "messages.0.content.0",
            "input_audio",
        ),
        ({"functions": [{"name": "a"}], "tools": [TIME]}, 400, "functions", "older form of tools"),
        ({"function_call": "auto"}, 400, "function_call", "use tool_choice"),
        ({"web_search_options": {"a": 1}}, 400, "web_search_options", "looks nothing up"),
        ({"min_tokens": -1}, 400, "min_tokens", "greater"),
        ({"min_tokens": 4, "max_tokens": 3}, 400, "min_tokens", "4 are more than the 3"),
        ({"stop_token_ids": [END + 1]}, 400, "stop_token_ids", "token 257 is not among the 257 tokens"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, 400, "guided_choice", "guided_regex says already"),
        ({"guided_json": "no schema"}, 400, "guided_json", "JSON schema"),
        ({"guided_json": {}, "response_format": {"type": "json_object"}}, 400, "response_format", "says already"),
        ({"best_of": 2}, 400, "best_of", "use n"),
        ({"modalities": ["audio"]}, 400, "modalities.0", "'text'"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, 400, "tools.0", "'custom' are not supported"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools.0.function.name", "pattern"),
        ({"tool_choice": "any"}, 400, "tool_choice", "'required'"),
        (
            {
                "tools": [TIME],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [WEATHER]}},
            },
            400,
            "tool_choice",
            "no tool of the name 'weather'",
        ),
        ({"response_format": {"type": "xml"}}, 400, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", "required"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"n": 1000}, 400, "n", "less than or equal"),
        ({"n": 1.5}, 400, "n", "integer"),
        ({"n": True}, 400, "n", "integer"),
        ({"n": "1"}, 400, "n", "integer"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater"),
        ({"max_tokens": 10**30}, 400, "max_tokens", "max_tokens: the number does not fit 64 bits"),
        ({"temperature": -1}, 400, "temperature", "greater"),
        ({"temperature": "1"}, 400, "temperature", "number"),
        ({"temperature": 10**400}, 400, "temperature", "does not fit"),
        ({"top_p": 1.1}, 400, "top_p", "less"),
        ({"seed": 2**64}, 400, "seed", "does not fit"),
        ({"stop": ["a"] * 17}, 400, "stop", "16"),
        ({"stop": [""]}, 400, "stop.0", "at least 1"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias.x", "pattern"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias.1", "less"),
        ({"logit_bias": {str(END + 1): 1}}, 400, "logit_bias", "token 257 is not among the 257 tokens"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "20"),
        ({"stream": "yes"}, 400, "stream", "boolean"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], status: int, param: str | None, message: str) -> None:
    got = refused(**fields)
    assert got[:2] == (status, param), got
    assert message in got[2]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
@pytest.mark.parametrize("place", ["temperature", "chat_template_kwargs", "max_tokens"])
def test_numbers_that_are_none_are_refused_anywhere(number: str, place: str) -> None:
    value = f'{{"a": [{number}]}}' if place == "chat_template_kwargs" else number
    body = f'{{"messages": {json.dumps(HELLO)}, "{place}": {value}}}'
    response = post(application(ScriptedChat()), PATH, body.encode())
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": "a\ud800"}]},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"\udfff": 1}}}]},
        {"stop": "\ud800"},
        {"unheard_of": ["\ud800"]},
    ],
)
def test_lone_surrogates_are_refused(fields: dict[str, Any]) -> None:
    assert refused(**fields)[0] == 400
    assert "lone surrogate" in refused(**fields)[2]


@pytest.mark.parametrize("depth", [102, sys.getrecursionlimit() - 50, 60_000])
def test_what_is_nested_too_deeply_is_refused(depth: int) -> None:
    body = f'{{"messages": {json.dumps(HELLO)}, "chat_template_kwargs": {{"a": {"[" * depth}{"]" * depth}}}}}'
    response = post(application(ScriptedChat()), PATH, body.encode())
    assert response.status_code == 400
    assert "nested" in response.json()["error"]["message"]


def test_what_is_nested_less_deeply_is_taken() -> None:
    value: Any = 1
    for _ in range(90):
        value = [value]
    assert asked(chat_template_kwargs={"a": value}).template_variables == {"a": value}


def test_a_body_that_is_no_object_is_refused() -> None:
    for body in (b"", b"[]", b"null", b'"a"', b"{", b"\xff"):
        assert post(application(ScriptedChat()), PATH, body).status_code == 400
