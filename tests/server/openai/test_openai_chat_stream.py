"""Streams of chat completions: what each chunk holds, and how a stream ends."""

import asyncio
import json
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel
from scripted_openai import HELLO, MODEL, ScriptedChat, application, data_of, end_token, post, said, with_client

from kvist.base.errors import NumericsError, Overloaded, RequestError
from kvist.runtime.request import FinishReason
from kvist.server.openai import stream
from kvist.service.chat import ChatDelta
from kvist.text.response import Content, Reasoning, ToolCallArguments, ToolCallBegin, ToolCallEnd

STOP = FinishReason.STOP
TWO_CALLS = [
    said(Reasoning("Both.")),
    said(ToolCallBegin(0, "weather"), ToolCallArguments(0, '{"pla')),
    said(ToolCallArguments(0, 'ce": "Ulm"}'), ToolCallEnd(0)),
    said(ToolCallBegin(1, "time"), ToolCallArguments(1, "{}"), ToolCallEnd(1)),
    said(finish=STOP),
]


def chunks_of(chat: ScriptedChat, **fields: Any) -> list[ChatCompletionChunk]:
    async def read(client: openai.AsyncOpenAI) -> list[ChatCompletionChunk]:
        chunks = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, **fields)
        return [chunk async for chunk in chunks]

    return with_client(application(chat), read)


def raw(chat: ScriptedChat, **fields: Any) -> httpx2.Response:
    return post(application(chat), "/v1/chat/completions", {"messages": HELLO, "stream": True, **fields})


def test_a_stream_chunk_by_chunk() -> None:
    chat = ScriptedChat([said(Content("Good ")), said(), said(Content("day."), finish=STOP)])
    response = raw(chat)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    chunks = data_of(response.text)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    (choices,) = zip(*(chunk["choices"] for chunk in chunks), strict=True)
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "Good "},
        {"content": "day."},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert all(choice["logprobs"] is None and choice["index"] == 0 for choice in choices)
    assert all("usage" not in chunk for chunk in chunks)
    assert chat.session.cancelled


def test_usage_comes_last_when_it_is_asked_for() -> None:
    chat = ScriptedChat([said(Content("a")), said(finish=STOP)], prompt_tokens=9, cached_tokens=4)
    *chunks, last = chunks_of(chat, stream_options={"include_usage": True})
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (9, 2, 11)
    assert last.usage.prompt_tokens_details.cached_tokens == 4


def test_calls_come_with_their_name_first_and_their_arguments_after() -> None:
    chunks = chunks_of(ScriptedChat(TWO_CALLS))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[1].model_extra == {"reasoning_content": "Both."}
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [(call.index, call.function.name, call.function.arguments) for call in calls] == [
        (0, "weather", ""),
        (0, None, '{"pla'),
        (0, None, 'ce": "Ulm"}'),
        (1, "time", ""),
        (1, None, "{}"),
    ]
    assert all((call.id is not None) == (call.type == "function") == (call.function.name is not None) for call in calls)
    assert all(len(delta.tool_calls or ()) <= 1 for delta in deltas)
    assert [delta.role for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_client_puts_calls_together_again() -> None:
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("weather", "time")]

    async def read(client: openai.AsyncOpenAI) -> Any:
        async with client.chat.completions.stream(model=MODEL, messages=HELLO, tools=tools) as events:
            return await events.get_final_completion()

    answer = with_client(application(ScriptedChat(TWO_CALLS)), read)
    message = answer.choices[0].message
    assert [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls] == [
        ("weather", {"place": "Ulm"}),
        ("time", {}),
    ]


def test_a_streamed_answer_can_be_parsed_into_a_model() -> None:
    class Place(BaseModel):
        name: str

    async def read(client: openai.AsyncOpenAI) -> Any:
        asked = client.chat.completions.stream(model=MODEL, messages=HELLO, response_format=Place)
        async with asked as events:
            return (await events.get_final_completion()).choices[0].message.parsed

    steps = [said(Content('{"name"')), said(Content(': "Ulm"}')), said(finish=STOP)]
    assert with_client(application(ScriptedChat(steps)), read) == Place(name="Ulm")


def test_logprobs_stand_in_the_chunk_of_their_text() -> None:
    steps = [
        said(Content("ab"), tokens="ab", logprobs=1),
        said(tokens="c", logprobs=1),
        ChatDelta(0, (Content("c"),), end_token(1), STOP, None, None),
    ]
    chunks = chunks_of(ScriptedChat(steps), logprobs=True, top_logprobs=1)
    shown = [
        (chunk.choices[0].delta.content, [entry.token for entry in chunk.choices[0].logprobs.content])
        for chunk in chunks
        if chunk.choices[0].logprobs is not None
    ]
    assert shown == [("ab", ["a", "b"]), ("", ["c"])]


def test_choices_are_told_apart() -> None:
    steps = [
        said(Content("b"), choice=1),
        said(Content("a"), choice=0, finish=STOP),
        said(Content("B"), choice=1, finish=FinishReason.LENGTH),
    ]
    chunks = chunks_of(ScriptedChat(steps), n=2)
    assert [(c.choices[0].index, c.choices[0].delta.content, c.choices[0].finish_reason) for c in chunks] == [
        (0, "", None),
        (1, "", None),
        (1, "b", None),
        (0, "a", None),
        (0, None, "stop"),
        (1, "B", None),
        (1, None, "length"),
    ]


def test_an_error_before_the_stream_has_its_status() -> None:
    with pytest.raises(openai.RateLimitError):
        chunks_of(ScriptedChat(refusal=Overloaded("full", 1)))


@pytest.mark.parametrize(
    ("step", "kind", "message"),
    [
        (
            said(finish=FinishReason.FAILED, error=NumericsError("the logits are none")),
            "server_error",
            "logits are none",
        ),
        (said(finish=FinishReason.CANCELLED), "server_error", "ended before"),
        (RequestError("no"), "invalid_request_error", "no"),
        (ValueError("secret"), "server_error", "its log says why"),
    ],
)
def test_an_error_in_the_stream_is_its_last_event(step: Any, kind: str, message: str) -> None:
    chat = ScriptedChat([said(Content("a")), step])
    response = raw(chat)
    assert response.status_code == 200
    *_, last = data_of(response.text)
    assert last["error"]["type"] == kind
    assert message in last["error"]["message"]
    assert "secret" not in response.text
    assert "[DONE]" not in response.text
    assert chat.session.cancelled
    with pytest.raises(openai.APIError, match=message):
        chunks_of(ScriptedChat([said(Content("a")), step]))


def test_a_long_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SILENCE", 0.02)
    steps = [0.1, said(Content("a")), said(finish=STOP)]
    text = raw(ScriptedChat(steps)).text
    assert text.count(": still at work\n\n") >= 2
    assert [chunk.choices[0].delta.content for chunk in chunks_of(ScriptedChat(steps))] == ["", "a", None]


def test_white_space_and_any_character_survive() -> None:
    content = ' \n\n"\\ \u2028 日本🙂\x00'
    deltas = [
        chunk.choices[0].delta.content for chunk in chunks_of(ScriptedChat([said(Content(content), finish=STOP)]))
    ]
    assert "".join(delta or "" for delta in deltas) == content


async def _leave_after(chat: ScriptedChat, body: dict[str, Any], pieces: int) -> list[bytes]:
    """What a client got that leaves once it has so many pieces of the body."""
    content, received, gone, asked = json.dumps(body).encode(), [], asyncio.Event(), False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": content, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            received.append(message["body"])
        if len(received) == pieces and message["type"] == ("http.response.body" if pieces else "http.response.start"):
            gone.set()
            await asyncio.sleep(60)  # it does not read on either

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
    }
    if not pieces:
        asyncio.get_running_loop().call_later(0.05, gone.set)
    async with asyncio.timeout(5):
        await application(chat)(scope, receive, send)
    return received


def test_a_client_that_leaves_a_stream_ends_its_session() -> None:
    chat = ScriptedChat([said(Content("a")), said(Content("b")), 60.0, said(finish=STOP)])
    received = asyncio.run(_leave_after(chat, {"messages": HELLO, "stream": True}, 2))
    assert len(received) == 2
    assert chat.session.cancelled
    assert chat.session.read < 3


def test_a_client_that_leaves_while_it_waits_ends_its_session() -> None:
    chat = ScriptedChat([said(Content("a")), 60.0, said(finish=STOP)])
    assert asyncio.run(_leave_after(chat, {"messages": HELLO}, 0)) == []
    assert chat.session.cancelled
    assert chat.session.read == 1
