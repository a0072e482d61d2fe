"""The Responses API: what it asks of the chat, its answers, and the order of its events."""

from typing import Any

import httpx2
import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel
from scripted_openai import (
    MODEL,
    ScriptedChat,
    ScriptedServing,
    ScriptedTemplate,
    application,
    data_of,
    end_token,
    post,
    said,
    with_client,
)

from kvist.base.errors import NumericsError, Overloaded, RequestError
from kvist.runtime.request import FinishReason
from kvist.service.chat import ChatDelta, ChatRequest, ToolChoice
from kvist.text.response import Content, Reasoning, ToolCallArguments, ToolCallBegin, ToolCallEnd

PATH = "/v1/responses"
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Of a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    "strict": True,
}
FILES = {
    "type": "namespace",
    "name": "mcp__files",
    "description": "An MCP server.",
    "tools": [{"type": "function", "name": "read"}],
}
CALL = (ToolCallBegin(0, "weather"), ToolCallArguments(0, '{"place":'), ToolCallArguments(0, ' "Ulm"}'), ToolCallEnd(0))
AGENT = [
    said(tokens=1),
    said(Reasoning("Hm, "), tokens=2),
    said(Reasoning("Ulm."), Content("\n\n"), tokens=3, reasoning=3),
    said(Content("I look."), tokens=2),
    said(*CALL, tokens=4),
    said(Content("\n"), ToolCallBegin(1, "mcp__files__read"), ToolCallArguments(1, "{}"), ToolCallEnd(1), tokens=5),
    said(finish=STOP),
]


def create(chat: ScriptedChat, **fields: Any) -> Response:
    asked = {"model": MODEL, "input": "Hi", **fields}
    return with_client(application(chat), lambda client: client.responses.create(**asked))


def asked(template: str = "", **fields: Any) -> ChatRequest:
    """What the chat was asked by a body."""
    chat = ScriptedChat([said(Content("a"), finish=STOP)])
    app = application(chat, ScriptedServing(template=ScriptedTemplate(template)))
    response = post(app, PATH, {"input": "Hi", **fields})
    assert response.status_code == 200, response.text
    return chat.request


def events_of(response: httpx2.Response) -> list[dict[str, Any]]:
    """The events of a stream, each of which has its name twice, and its number."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = data_of(response.text)
    named = [line.removeprefix("event: ") for line in response.text.split("\n") if line.startswith("event: ")]
    assert named == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_a_text() -> None:
    chat = ScriptedChat([said(Content("Good ")), said(Content("day.")), said(finish=STOP)], 12, 8)
    answer = create(chat, instructions="Be kind.", metadata={"a": "b"}, store=True, temperature=0.5)
    assert answer.output_text == "Good day."
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert (answer.model, answer.object, answer.temperature, answer.top_p) == (MODEL, "response", 0.5, 1.0)
    assert (answer.instructions, answer.metadata, answer.previous_response_id) == ("Be kind.", {"a": "b"}, None)
    assert answer.model_extra["store"] is True
    assert (answer.tools, answer.tool_choice, answer.parallel_tool_calls) == ([], "auto", True)
    assert answer.text.format.type == "text"
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (12, 3, 15)
    assert (usage.input_tokens_details.cached_tokens, usage.input_tokens_details.cache_write_tokens) == (8, 0)
    assert chat.request.messages == ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})
    assert chat.session.cancelled


def test_reasoning_text_and_calls_are_items() -> None:
    answer = create(ScriptedChat(AGENT), tools=[WEATHER, FILES])
    reasoning, message, weather, read = answer.output
    assert reasoning.type == "reasoning"
    assert (reasoning.content[0].text, reasoning.summary, reasoning.status) == ("Hm, Ulm.", [], "completed")
    assert message.type == "message"
    assert message.content[0].text == "\n\nI look."
    assert weather.type == "function_call"
    assert (weather.name, weather.arguments, weather.namespace) == ("weather", '{"place": "Ulm"}', None)
    assert read.type == "function_call"
    assert (read.name, read.arguments, read.namespace) == ("read", "{}", "mcp__files")
    assert weather.call_id != read.call_id
    assert answer.usage.output_tokens_details.reasoning_tokens == 3
    assert [tool.type for tool in answer.tools] == ["function", "namespace"]


def test_an_answer_that_was_cut_off_is_incomplete() -> None:
    answer = create(ScriptedChat([said(Content("a")), said(*CALL[:2], finish=LENGTH)]), tools=[WEATHER])
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [item.status for item in answer.output] == ["completed", "incomplete"]
    answer = create(ScriptedChat([said(*CALL[:2], finish=STOP)]), tools=[WEATHER])
    assert (answer.status, answer.output[0].status) == ("completed", "incomplete")


def test_an_answer_of_nothing_has_an_empty_message() -> None:
    answer = create(ScriptedChat([said(Content("\n")), said(finish=STOP)]))
    assert (answer.output_text, len(answer.output)) == ("", 1)


def test_logprobs() -> None:
    steps = [said(Content("né"), tokens="né", logprobs=1), ChatDelta(0, (), end_token(1), STOP, None, None)]
    chat = ScriptedChat(steps)
    answer = create(chat, include=["message.output_text.logprobs"], top_logprobs=1)
    entries = answer.output[0].content[0].logprobs
    assert [(entry.token, entry.bytes, entry.logprob) for entry in entries] == [
        ("n", [110], -1.5),
        ("bytes:\\xc3", [0xC3], -0.25),
        ("bytes:\\xa9", [0xA9], -0.25),
    ]
    assert entries[0].top_logprobs[0].token == "Z"
    assert chat.request.options.logprobs == 1
    assert asked(include=["message.output_text.logprobs"]).options.logprobs == 0
    assert asked(include=["reasoning.encrypted_content"]).options.logprobs is None


def test_an_answer_can_be_parsed_into_a_model() -> None:
    class Place(BaseModel):
        name: str

    chat = ScriptedChat([said(Content('{"name": "Ulm"}')), said(finish=STOP)])
    answer = with_client(
        application(chat), lambda client: client.responses.parse(model=MODEL, input="Hi", text_format=Place)
    )
    assert answer.output_parsed == Place(name="Ulm")
    assert chat.request.schema["properties"].keys() == {"name"}


def test_the_order_of_events() -> None:
    chat = ScriptedChat([said(Content("Good ")), said(Content("day.")), said(finish=STOP)])
    events = events_of(post(application(chat), PATH, {"input": "Hi", "stream": True}))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    created, completed = events[0]["response"], events[-1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert (completed["status"], completed["id"]) == ("completed", created["id"])
    assert events[2]["item"]["content"] == []
    assert events[6]["text"] == "Good day."
    assert completed["output"] == [events[8]["item"]]
    assert completed["output"][0]["content"] == [events[7]["part"]]
    assert {event["item_id"] for event in events[3:8]} == {events[2]["item"]["id"]}
    assert chat.session.cancelled


def test_the_order_of_events_of_an_agent() -> None:
    asked = {"input": "Hi", "stream": True, "tools": [WEATHER, FILES]}
    events = events_of(post(application(ScriptedChat(AGENT)), PATH, asked))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    indices = [event["output_index"] for event in events if "output_index" in event]
    assert indices == sorted(indices)
    assert events[-1]["response"]["output"] == [
        event["item"] for event in events if event["type"].endswith("item.done")
    ]


def test_the_client_puts_a_stream_together_again() -> None:
    async def read(client: openai.AsyncOpenAI) -> tuple[Response, list[str]]:
        async with client.responses.stream(model=MODEL, input="Hi", tools=[WEATHER]) as events:
            snapshots = [event.snapshot async for event in events if event.type == "response.output_text.delta"]
            return await events.get_final_response(), snapshots

    answer, snapshots = with_client(application(ScriptedChat(AGENT)), read)
    assert snapshots == ["\n\nI look."]
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
    assert answer.output[2].parsed_arguments == {"place": "Ulm"}


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (said(finish=FinishReason.FAILED, error=NumericsError("no numbers")), "server_error"),
        (said(finish=FinishReason.CANCELLED), "server_error"),
        (RequestError("no numbers"), "invalid_prompt"),
        (Overloaded("full", 1), "rate_limit_exceeded"),
        (ValueError("secret"), "server_error"),
    ],
)
def test_a_stream_that_fails_says_so_last(step: Any, code: str) -> None:
    chat = ScriptedChat([said(*CALL), said(Content("a")), step])
    response = post(application(chat), PATH, {"input": "Hi", "stream": True})
    *_, last = events_of(response)
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == code
    assert [item["type"] for item in last["response"]["output"]] == ["function_call"]
    assert "secret" not in response.text
    assert chat.session.cancelled


def test_a_stream_that_is_cut_off_ends_incomplete() -> None:
    *_, last = events_of(post(application(ScriptedChat([said(finish=LENGTH)])), PATH, {"input": "a", "stream": True}))
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")


def test_what_the_model_said_before_is_one_message_a_turn() -> None:
    call = {"type": "function_call", "name": "weather", "arguments": '{"place": "Ulm"}'}
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {**call, "call_id": "c1", "id": None},
        {**call, "call_id": "c2", "name": "read", "namespace": "mcp__files"},
        {"type": "function_call_output", "call_id": "c1", "output": "Rain."},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "x"},
        {**call, "call_id": "c3"},
        {"type": "reasoning", "id": "rs_3", "summary": [], "content": [{"type": "reasoning_text", "text": "So."}]},
        {"role": "assistant", "content": "It rains."},
        {"role": "user", "content": "Thanks."},
    ]
    arguments = '{"place": "Ulm"}'

    def called(call_id: str, name: str = "weather") -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    assert list(asked(input=items, instructions="You are X.").messages) == [
        {"role": "system", "content": "You are X.\n\nBe brief."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [called("c1"), called("c2", "mcp__files__read")],
        },
        {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "Rain."},
        {"role": "tool", "tool_call_id": "c2", "name": "mcp__files__read", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [called("c3")]},
        {"role": "assistant", "content": "It rains.", "reasoning_content": "So."},
        {"role": "user", "content": "Thanks."},
    ]


def test_tools_and_their_choice() -> None:
    tools = [WEATHER, FILES]
    request = asked(tools=tools, parallel_tool_calls=False)
    assert [(tool.name, tool.strict) for tool in request.tools] == [("weather", True), ("mcp__files__read", False)]
    assert (request.tool_choice, request.parallel_tool_calls) == (ToolChoice.AUTO, False)
    assert asked(tools=tools, tool_choice="required").tool_choice is ToolChoice.REQUIRED
    request = asked(tools=tools, tool_choice={"type": "function", "name": "weather"})
    assert (request.tool_choice, request.tool_name) == (ToolChoice.REQUIRED, "weather")
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}
    assert [tool.name for tool in asked(tools=tools, tool_choice=allowed).tools] == ["weather"]
    shown = create(ScriptedChat([said(finish=STOP)]), tools=tools, tool_choice=allowed)
    assert [tool.type for tool in shown.tools] == ["function", "namespace"]
    assert [tool.name for tool in shown.tools[1].tools] == ["read"]
    assert shown.tool_choice.type == "allowed_tools"


def test_options() -> None:
    schema = {"type": "object"}
    request = asked(
        max_output_tokens=7,
        temperature=0,
        seed=3,
        text={"format": {"type": "json_schema", "name": "a", "schema": schema}, "verbosity": "low"},
        reasoning={"effort": "minimal", "summary": "auto"},
        truncation="auto",
        include=["reasoning.encrypted_content"],
        prompt_cache_key="a",
        service_tier="auto",
    )
    assert (request.options.max_tokens, request.options.sampling.seed) == (7, 3)
    assert request.schema == schema
    assert request.template_variables == {"reasoning_effort": "low"}
    assert asked(text={"format": {"type": "json_object"}}).schema == {}
    assert asked(text={"format": {"type": "text"}}).schema is None
    assert asked().options.max_tokens is None


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": []}, "input", "at least 1"),
        ({"input": None}, "input", "list"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "send the whole conversation"),
        ({"prompt": {"id": "p"}}, "prompt", "send the prompt itself"),
        ({"background": True}, "background", "background"),
        ({"guided_json": {}, "structured_outputs": {"regex": "a"}}, "structured_outputs", "text.format"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "'web_search' are not supported"),
        ({"tools": [{"type": "custom", "name": "patch"}]}, "tools.0", "'custom' are not supported"),
        ({"tools": [FILES | {"tools": [{"type": "mcp"}]}]}, "tools.0.tools.0", "'mcp' are not supported"),
        ({"input": [{"type": "custom_tool_call", "call_id": "c"}]}, "input.0", "'custom_tool_call' are not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0", "no input_image"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input.0.role", "'user'"),
        ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice", "function"),
        ({"tools": [{"name": "a"}]}, "tools.0", "'type'"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "required"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], param: str | None, message: str) -> None:
    response = post(application(ScriptedChat()), PATH, {"input": "a", **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


def test_an_error_before_the_answer_has_its_status() -> None:
    with pytest.raises(openai.RateLimitError):
        create(ScriptedChat(refusal=Overloaded("full", 1)))
    with pytest.raises(openai.InternalServerError):
        create(ScriptedChat([said(finish=FinishReason.FAILED, error=NumericsError("none"))]))
