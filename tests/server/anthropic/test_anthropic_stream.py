"""Streams: the order of events, what the official client makes of them, silence, failures, and clients that leave."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import anthropic
import pytest
from anthropic.types import Message
from hypothesis import given
from hypothesis import strategies as st
from scripted_chat import (
    ASK,
    MODEL,
    THINK,
    Script,
    ScriptedChat,
    application,
    events_of,
    post,
    said,
    streamed,
    with_client,
)
from starlette.types import Message as AsgiMessage

from kvist.base.errors import NumericsError, Stopping, TimedOut
from kvist.runtime.request import FinishReason
from kvist.server.anthropic import messages
from kvist.server.anthropic.stream import Blocks, Event, content_of, encoded
from kvist.server.sealed import signature_of
from kvist.text.response import Content, Part, Reasoning, ToolCallArguments, ToolCallBegin, ToolCallEnd

STOP = FinishReason.STOP
DELTAS = {"text": {"text_delta"}, "thinking": {"thinking_delta", "signature_delta"}, "tool_use": {"input_json_delta"}}
INPUT = {"place": "Ulm", "days": [1, 2], "note": "\u00fc \u6f22 \U0001f331"}


def check_order(events: Sequence[Event]) -> None:
    """Their state machine: one message, in it blocks one after the other, in these deltas of their kind; pings anywhere
    after the start."""
    kinds = [event["type"] for event in events if event["type"] != "ping"]
    assert events[0]["type"] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert not {"message_start", "message_delta", "message_stop"} & set(kinds[1:-2])
    check_blocks([event for event in events if event["type"].startswith("content_block")])


def check_blocks(events: Sequence[Event]) -> None:
    open_kind, count = None, 0
    for event in events:
        if event["type"] == "content_block_start":
            assert open_kind is None
            assert event["index"] == count
            open_kind, count = event["content_block"]["type"], count + 1
            continue
        assert open_kind is not None
        assert event["index"] == count - 1
        if event["type"] == "content_block_delta":
            assert event["delta"]["type"] in DELTAS[open_kind]
        else:
            assert event["type"] == "content_block_stop"
            open_kind = None
    assert open_kind is None


@pytest.mark.parametrize(
    "wrong",
    [
        ["content_block_start"],
        ["content_block_stop"],
        ["content_block_start", "content_block_start", "content_block_stop"],
        ["content_block_start", "content_block_stop", "content_block_delta"],
    ],
)
def test_the_state_machine_notices_a_wrong_order(wrong: list[str]) -> None:
    text = {"content_block": {"type": "text"}, "delta": {"type": "text_delta"}, "index": 0}
    with pytest.raises(AssertionError):
        check_blocks([{"type": kind, **text} for kind in wrong])


def cut(draw: st.DrawFn, text: str) -> list[str]:
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=4)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[Part]]:
    """Content blocks as they should come back (less ids), and parts that make them, cut anywhere."""
    words = st.text(alphabet="ab \n\u00fc", min_size=1, max_size=12).filter(str.strip)
    blocks: list[dict[str, Any]] = []
    parts: list[Part] = []
    calls = 0
    for kind in draw(st.lists(st.sampled_from(["text", "thinking", "tool_use", "blank"]), max_size=6)):
        if kind == "blank":  # between two blocks
            if not blocks or blocks[-1]["type"] == "tool_use":
                parts += [Content(piece) for piece in cut(draw, "\n\n")]
                parts.append(Reasoning(" "))
        elif kind == "tool_use":
            value = draw(st.dictionaries(words, st.integers() | words, max_size=3))
            blocks.append({"type": kind, "name": f"f{calls}", "input": value})
            parts.append(ToolCallBegin(calls, f"f{calls}"))
            parts += [ToolCallArguments(calls, piece) for piece in cut(draw, json.dumps(value))]
            parts.append(ToolCallEnd(calls))
            calls += 1
        elif blocks and blocks[-1]["type"] == kind:
            continue
        else:
            text = draw(words).strip()
            blocks.append({"type": kind, kind: text})
            make = Content if kind == "text" else Reasoning
            parts += [make(piece) for piece in cut(draw, text)]
    return blocks, parts


@given(answers())
def test_parts_become_blocks_in_their_order_however_they_are_cut(
    answer: tuple[list[dict[str, Any]], list[Part]],
) -> None:
    expected, parts = answer
    made = Blocks()
    events = [event for part in parts for event in made.push(part)] + made.close()
    check_blocks(events)
    content = content_of(events)
    for block in content:
        assert block.pop("id", "toolu_").startswith("toolu_")
        assert block.pop("signature", None) == (signature_of(block["thinking"]) if "thinking" in block else None)
    blanks = "".join(part.text for part in parts if isinstance(part, Content | Reasoning) and not part.text.strip())
    if not blanks:
        assert content == expected
    for block in content:  # what is held back goes with what follows
        for kind in ("text", "thinking"):
            if kind in block:
                block[kind] = block[kind].strip()
    assert content == expected
    assert made.called == any(block["type"] == "tool_use" for block in expected)


def test_white_space_alone_makes_no_block() -> None:
    events = streamed(ScriptedChat(Script([said(Reasoning("\n")), said(Content(" \n")), said(finish=STOP)])))
    assert [event["type"] for event in events] == ["message_start", "ping", "message_delta", "message_stop"]


def test_the_events_of_an_answer() -> None:
    call = [ToolCallBegin(0, "f"), ToolCallArguments(0, "{}"), ToolCallEnd(0)]
    script = Script(
        [said(Reasoning("Hm.")), said(Content("Yes"), reasoning=1), said(*call), said(tokens=1, finish=STOP)], 7, 3
    )
    events = streamed(ScriptedChat(script), thinking=THINK)
    check_order(events)
    start = events[0]["message"]
    assert start.pop("id").startswith("msg_")
    assert start == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": 4,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
            "output_tokens": 1,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }
    tool = next(event for event in events if event.get("content_block", {}).get("type") == "tool_use")
    identity = tool["content_block"]["id"]
    assert events[1:] == [
        {"type": "ping"},
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "thinking", "thinking": "", "signature": ""},
        },
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "Hm."}},
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "signature_delta", "signature": signature_of("Hm.")},
        },
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "Yes"}},
        {"type": "content_block_stop", "index": 1},
        {
            "type": "content_block_start",
            "index": 2,
            "content_block": {"type": "tool_use", "id": identity, "name": "f", "input": {}},
        },
        {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": "{}"}},
        {"type": "content_block_stop", "index": 2},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use", "stop_sequence": None},
            "usage": {
                "input_tokens": 4,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 3,
                "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
                "output_tokens": 4,
                "output_tokens_details": {"thinking_tokens": 1},
            },
        },
        {"type": "message_stop"},
    ]


def test_the_client_puts_a_stream_together() -> None:
    text = json.dumps(INPUT, ensure_ascii=False)
    steps = [
        said(Reasoning("Wo?")),
        said(Content("Ich ")),
        said(Content("sehe \u6f22.")),
        said(ToolCallBegin(0, "weather")),
    ]
    steps += [said(ToolCallArguments(0, piece)) for piece in text] + [said(ToolCallEnd(0), finish=STOP)]
    chat = ScriptedChat(Script(steps))
    pieces: list[str] = []

    async def read(client: anthropic.AsyncAnthropic) -> Message:
        async with client.messages.stream(**ASK, thinking=THINK) as stream:
            async for event in stream:
                if event.type == "text":
                    pieces.append(event.text)
                elif event.type == "input_json":
                    pieces.append(event.partial_json)
            return await stream.get_final_message()

    message = with_client(application(chat), read)
    thinking, said_text, call = message.content
    assert thinking.type == "thinking"
    assert thinking.thinking == "Wo?"
    assert said_text.type == "text"
    assert said_text.text == "Ich sehe \u6f22."
    assert call.type == "tool_use"
    assert call.input == INPUT
    assert "".join(pieces) == "Ich sehe \u6f22." + text
    assert message.stop_reason == "tool_use"
    assert message.usage.output_tokens == len(steps)
    assert chat.session.cancelled


def test_a_stream_says_what_a_whole_answer_says() -> None:
    call = [ToolCallBegin(0, "f"), ToolCallArguments(0, '{"a": 1}'), ToolCallEnd(0)]
    script = Script([said(Reasoning("r")), said(Content("t"), *call), said(Content("u"), finish=STOP)], 90, 64)
    whole = post(application(ScriptedChat(script)), ASK | {"thinking": THINK}).json()
    events = streamed(ScriptedChat(script), thinking=THINK)
    start, end = events[0]["message"], events[-2]
    again = {**start, **end["delta"], "content": content_of(events), "usage": end["usage"]}
    for message in (whole, again):
        message.pop("id")
        for block in message["content"]:
            block.pop("id", None)
    assert again == whole


def test_a_long_silence_is_bridged_by_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PATIENCE", 0.02)
    monkeypatch.setattr(messages, "PING", 0.05)
    script = Script([0.2, said(Content("At last.")), 0.08, said(finish=STOP)], 100, 70)
    events = streamed(ScriptedChat(script))
    check_order(events)
    kinds = [event["type"] for event in events]
    first = kinds.index("content_block_start")
    assert set(kinds[1:first]) == {"ping"}
    assert first >= 3
    assert "ping" in kinds[first + 2 :]
    # What was read from the cache was not known at the start; the end has the last word.
    assert events[0]["message"]["usage"]["input_tokens"] == 100
    assert events[0]["message"]["usage"]["cache_read_input_tokens"] == 0
    assert events[-2]["usage"]["input_tokens"] == 30
    assert events[-2]["usage"]["cache_read_input_tokens"] == 70


def test_a_quick_answer_is_told_in_one_go() -> None:
    kinds = [event["type"] for event in streamed(ScriptedChat(Script([0.05, said(Content("x"), finish=STOP)])))]
    assert kinds.count("ping") == 1


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("error", "kind"), [(TimedOut("slow"), "timeout_error"), (Stopping("bye"), "overloaded_error")]
)
def test_a_failure_on_the_way_is_an_event(error: Any, kind: str, begun: bool) -> None:
    end = said(tokens=0, finish=FinishReason.FAILED, error=error)
    chat = ScriptedChat(Script([said(Content("x")), end] if begun else [end]))
    response = post(application(chat), ASK | {"stream": True})
    assert response.status_code == 200
    events = events_of(response.text)
    assert events[-1] == {
        "type": "error",
        "error": {"type": kind, "message": str(error)},
        "request_id": response.headers["request-id"],
    }
    assert (events[0]["type"] == "message_start") == begun
    assert chat.session.cancelled

    async def read(client: anthropic.AsyncAnthropic) -> None:
        async with client.messages.stream(**ASK) as stream:
            await stream.get_final_message()

    with pytest.raises(anthropic.APIStatusError, match=str(error)):
        with_client(application(ScriptedChat(chat.script)), read)


def test_a_stream_that_just_ends_is_a_failure() -> None:
    assert [event["type"] for event in streamed(ScriptedChat(Script([])))] == ["error"]
    kinds = [event["type"] for event in streamed(ScriptedChat(Script([said(Content("x"))])))]
    assert kinds[-1] == "error"
    assert "message_stop" not in kinds


@pytest.mark.parametrize("error", [ValueError("secret detail"), NumericsError("the logits are not numbers")])
def test_a_defect_ends_the_stream_and_is_logged(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    chat = ScriptedChat(Script([said(Content("x")), error]))
    response = post(application(chat), ASK | {"stream": True})
    last = events_of(response.text)[-1]
    assert last["error"]["type"] == "api_error"
    assert "secret" not in response.text
    assert type(error).__name__ in caplog.text
    assert chat.session.cancelled


def test_lone_surrogates_do_not_break_a_stream() -> None:
    assert b"\\ud83d" in encoded({"type": "x", "text": "\ud83d"})


async def leave(chat: ScriptedChat, body: dict[str, Any], until: int) -> list[bytes]:
    """Ask, take `until` pieces of the answer's body, then close the connection."""
    pieces: list[bytes] = []
    gone = asyncio.Event()
    sent: list[AsgiMessage] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> AsgiMessage:
        if sent:
            return sent.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: AsgiMessage) -> None:
        if message.get("body"):
            pieces.append(message["body"])
        if len(pieces) >= until:
            gone.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/messages",
        "raw_path": b"/v1/messages",
        "query_string": b"beta=true",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "scheme": "http",
        "root_path": "",
    }
    if not until:
        asyncio.get_running_loop().call_later(0.05, gone.set)
    async with asyncio.timeout(5):
        await application(chat)(scope, receive, send)
    return pieces


@pytest.mark.parametrize(("stream", "until"), [(True, 3), (True, 0), (False, 0)])
def test_a_client_that_leaves_ends_its_session(stream: bool, until: int) -> None:
    before: list[Any] = [said(Content("x"))] * until
    chat = ScriptedChat(Script([*before, 60.0, said(Content("never"), finish=STOP)]))

    async def run() -> list[bytes]:
        pieces = await leave(chat, ASK | {"stream": stream}, until)
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1  # nothing of it is left behind
        return pieces

    pieces = asyncio.run(run())
    assert len(pieces) == until
    assert chat.session.cancelled
    assert chat.session.read == until


def test_a_client_that_stays_gets_the_whole_answer() -> None:
    chat = ScriptedChat(Script([said(Content("x")), said(Content("y"), finish=STOP)]))
    pieces = asyncio.run(leave(chat, ASK | {"stream": True}, 1000))
    check_order(events_of(b"".join(pieces).decode()))
