"""Whole answers, as the official client reads them."""

from collections.abc import Callable
from typing import Any

import anthropic
import pytest
from anthropic.types import Message
from scripted_chat import ASK, MODEL, THINK, Script, ScriptedChat, application, post, said, with_client

from kvist.base.errors import ContextError, KvistError, NumericsError, Overloaded, RequestError, Stopping, TimedOut
from kvist.cache.layout import BLOCK_SIZE
from kvist.runtime.request import FinishReason
from kvist.server.sealed import signature_of
from kvist.server.settings import ServerSettings
from kvist.service.chat import ToolChoice
from kvist.text.response import Content, Reasoning, ToolCallArguments, ToolCallBegin, ToolCallEnd

WEATHER = {
    "name": "weather",
    "description": "The weather of a place.",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
CALL = (ToolCallBegin(0, "weather"), ToolCallArguments(0, '{"place":'), ToolCallArguments(0, ' "Ulm"}'), ToolCallEnd(0))
STOP = FinishReason.STOP
EPHEMERAL = {"type": "ephemeral"}


def create(chat: ScriptedChat, **fields: Any) -> Message:
    return with_client(application(chat), lambda client: client.messages.create(**{**ASK, **fields}))


def test_text_comes_back_as_one_block() -> None:
    chat = ScriptedChat(Script([said(Content("Good ")), said(Content("day.")), said(tokens=1, finish=STOP)]))
    message = create(chat)
    (block,) = message.content
    assert block.type == "text"
    assert block.text == "Good day."
    assert (message.role, message.type, message.model) == ("assistant", "message", MODEL)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.output_tokens == 3
    assert message.id.startswith("msg_")
    assert message._request_id is not None
    assert message._request_id.startswith("req_")
    assert chat.request.messages == ({"role": "user", "content": "Hello"},)
    assert chat.session.cancelled


def test_thinking_and_calls_are_blocks_of_their_own() -> None:
    parts = (Reasoning("Hm, "), Reasoning("Ulm."), Content("\n\n"), Content("I look."), Content("\n"), *CALL)
    second = (ToolCallBegin(1, "weather"), ToolCallArguments(1, "{}"), ToolCallEnd(1))
    chat = ScriptedChat(Script([said(*parts), said(*second, finish=STOP)]))
    message = create(chat, tools=[WEATHER], thinking=THINK)
    thinking, text, first, other = message.content
    assert thinking.type == "thinking"
    assert (thinking.thinking, thinking.signature) == ("Hm, Ulm.", signature_of("Hm, Ulm."))
    assert text.type == "text"
    assert text.text == "\n\nI look.\n"
    assert first.type == "tool_use"
    assert (first.name, first.input) == ("weather", {"place": "Ulm"})
    assert other.type == "tool_use"
    assert other.input == {}
    assert first.id.startswith("toolu_")
    assert first.id != other.id
    assert message.stop_reason == "tool_use"


@pytest.mark.parametrize(
    ("end", "fields", "reason", "sequence"),
    [
        (said(finish=STOP), {}, "end_turn", None),
        (said(finish=STOP, stop="END"), {"stop_sequences": ["END"]}, "stop_sequence", "END"),
        (said(finish=STOP, stop="<end>"), {"stop_sequences": ["END"]}, "end_turn", None),  # the template's own
        (said(finish=FinishReason.LENGTH), {"max_tokens": 1}, "max_tokens", None),
        (said(finish=FinishReason.LENGTH), {"max_tokens": 2}, "model_context_window_exceeded", None),
        (said(*CALL, finish=FinishReason.LENGTH), {"max_tokens": 1}, "max_tokens", None),
        (said(*CALL, finish=STOP), {}, "tool_use", None),
        (said(*CALL[:2], finish=STOP), {}, "end_turn", None),
    ],
)
def test_why_an_answer_ended(end: Any, fields: dict[str, Any], reason: str, sequence: str | None) -> None:
    message = create(ScriptedChat(Script([end])), **fields)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


def test_a_call_that_was_cut_off_is_left_out() -> None:
    chat = ScriptedChat(Script([said(Content("I look."), *CALL[:2], finish=FinishReason.LENGTH)]))
    message = create(chat, tools=[WEATHER], max_tokens=1)
    assert [block.type for block in message.content] == ["text"]


@pytest.mark.parametrize("arguments", ['{"a": NaN}', '{"a": 1e999}', '{"a": ' + "[" * 100_000, '["a"', "[1]"])
def test_a_call_that_no_client_could_read_is_left_out(arguments: str) -> None:
    call = (ToolCallBegin(0, "weather"), ToolCallArguments(0, arguments), ToolCallEnd(0))
    assert create(ScriptedChat(Script([said(*call, finish=STOP)]))).content == []


def test_no_tokens_asked_for_means_that_only_the_prompt_is_computed() -> None:
    chat = ScriptedChat(Script([said(Content("Good"), finish=FinishReason.LENGTH)], prompt_tokens=2 * BLOCK_SIZE))
    message = create(chat, max_tokens=0, cache_control=EPHEMERAL)
    assert message.content == []
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 0
    assert message.usage.cache_creation_input_tokens == 2 * BLOCK_SIZE - 1
    assert chat.request.options.max_tokens == 1


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("prompt", "cached", "marked", "expected"),  # expected: input, created, read
    [
        (1000, 0, False, (1000, 0, 0)),
        (1000, 640, False, (360, 0, 640)),
        (1000, 640, True, (1000 - 960, 320, 640)),
        (1000, 990, True, (10, 0, 990)),
        (15 * BLOCK_SIZE, 0, True, (1, 15 * BLOCK_SIZE - 1, 0)),
        (15 * BLOCK_SIZE, 15 * BLOCK_SIZE - 1, True, (1, 0, 15 * BLOCK_SIZE - 1)),
        (BLOCK_SIZE - 1, 0, True, (BLOCK_SIZE - 1, 0, 0)),
    ],
)
def test_usage_adds_up_to_the_prompt(
    prompt: int, cached: int, marked: bool, expected: tuple[int, int, int], streams: bool
) -> None:
    chat = ScriptedChat(Script([said(Content("x"), tokens=3), said(tokens=2, finish=STOP)], prompt, cached))
    system = [{"type": "text", "text": "Be kind.", "cache_control": EPHEMERAL if marked else None}]

    async def ask(client: anthropic.AsyncAnthropic) -> Message:
        if not streams:
            return await client.messages.create(**ASK, system=system)  # type: ignore[arg-type]
        async with client.messages.stream(**ASK, system=system) as stream:  # type: ignore[arg-type]
            return await stream.get_final_message()

    usage = with_client(application(chat), ask).usage
    assert (usage.input_tokens, usage.cache_creation_input_tokens, usage.cache_read_input_tokens) == expected
    assert sum(expected) == prompt
    assert usage.input_tokens >= 1
    assert usage.output_tokens == 5


@pytest.mark.parametrize(
    ("cached", "marked", "expected"),  # of a prompt of 1000 tokens; expected: input, created, read
    [
        (0, 700, (360, 640, 0)),
        (128, 700, (360, 512, 128)),
        (640, 700, (360, 0, 640)),
        (900, 700, (100, 0, 900)),  # more is read than was asked for
        (0, 63, (1000, 0, 0)),
        (0, 2000, (40, 960, 0)),
    ],
)
def test_created_is_what_stands_before_the_last_mark(cached: int, marked: int, expected: tuple[int, int, int]) -> None:
    script = Script([said(Content("x")), said(finish=STOP)], 1000, cached, marked_tokens=marked)
    usage = create(ScriptedChat(script), system=[MARKED_TEXT]).usage
    assert (usage.input_tokens, usage.cache_creation_input_tokens, usage.cache_read_input_tokens) == expected
    assert sum(expected) == 1000


MARKED_TEXT = {"type": "text", "text": "t", "cache_control": EPHEMERAL}
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": "r"}


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_control": EPHEMERAL},
        {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {"system": [MARKED_TEXT]},
        {"tools": [WEATHER | {"cache_control": EPHEMERAL}]},
        {"messages": [{"role": "user", "content": [MARKED_TEXT]}]},
        *(
            {
                "messages": [
                    ASK["messages"][0],
                    {"role": "assistant", "content": [call]},
                    {"role": "user", "content": [back]},
                ]
            }
            for call, back in [
                ({"type": "tool_use", "id": "c", "name": "f", "input": {}, "cache_control": EPHEMERAL}, RESULT),
                ({"type": "tool_use", "id": "c", "name": "f", "input": {}}, RESULT | {"cache_control": EPHEMERAL}),
                ({"type": "tool_use", "id": "c", "name": "f", "input": {}}, RESULT | {"content": [MARKED_TEXT]}),
            ]
        ),
    ],
)
def test_caching_may_be_asked_for_wherever_the_interface_has_a_place(fields: dict[str, Any]) -> None:
    chat = ScriptedChat(Script([said(finish=STOP)], prompt_tokens=100))
    assert create(chat, **fields).usage.cache_creation_input_tokens == BLOCK_SIZE


@pytest.mark.parametrize("control", [{"type": "forever"}, {"type": "ephemeral", "ttl": "2h"}, {}, "ephemeral"])
def test_cache_control_is_checked(control: Any) -> None:
    text = {"type": "text", "text": "t", "cache_control": control}
    for fields in ({"cache_control": control}, {"messages": [{"role": "user", "content": [text]}]}):
        response = post(application(ScriptedChat(Script())), ASK | fields)
        assert response.status_code == 400
        assert "cache_control" in response.json()["error"]["message"]


def test_options_reach_the_engine() -> None:
    chat = ScriptedChat(Script([said(finish=STOP)]))
    drawing = {"temperature": 0.3, "top_p": 0.9, "top_k": 7}  # no longer parameters of the client, as they once were
    create(chat, extra_body=drawing, stop_sequences=["a", "b"], metadata={"user_id": "u"}, service_tier="auto")
    options = chat.request.options
    sampling = options.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.3, 0.9, 7)
    assert options.stops == ("a", "b")
    assert (options.max_tokens, options.tenant) == (100, "")


def test_defaults_are_theirs_and_each_request_has_a_seed_of_its_own() -> None:
    chat = ScriptedChat(Script([said(finish=STOP)]))
    for _ in range(2):
        create(chat)
    first, second = (request.options.sampling for request in chat.requests)
    assert (first.temperature, first.top_p, first.top_k) == (1.0, 1.0, 0)
    assert first.seed != second.seed


def test_tools_and_the_choice_among_them() -> None:
    chat = ScriptedChat(Script([said(*CALL, finish=STOP)]))
    create(chat, tools=[WEATHER], tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True})
    (tool,) = chat.request.tools
    assert (tool.name, tool.description, tool.parameters) == (
        "weather",
        "The weather of a place.",
        WEATHER["input_schema"],
    )
    assert (chat.request.tool_choice, chat.request.tool_name) == (ToolChoice.REQUIRED, "weather")
    assert not chat.request.parallel_tool_calls


@pytest.mark.parametrize(
    ("choice", "expected"),
    [(None, ToolChoice.AUTO), ("auto", ToolChoice.AUTO), ("any", ToolChoice.REQUIRED), ("none", ToolChoice.NONE)],
)
def test_choices_without_a_name(choice: str | None, expected: ToolChoice) -> None:
    chat = ScriptedChat(Script([said(finish=STOP)]))
    create(chat, tools=[WEATHER], **({} if choice is None else {"tool_choice": {"type": choice}}))
    assert (chat.request.tool_choice, chat.request.tool_name) == (expected, None)
    assert chat.request.parallel_tool_calls


def test_a_schema_for_the_answer() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    chat = ScriptedChat(Script([said(Content('{"a": 1}'), finish=STOP)]))
    create(chat, output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "max"})
    assert chat.request.schema == schema
    assert chat.request.template_variables == {"enable_thinking": False, "reasoning_effort": "high"}


def test_tokens_are_counted() -> None:
    chat = ScriptedChat(Script(prompt_tokens=123))
    counted = with_client(
        application(chat),
        lambda client: client.messages.count_tokens(
            model="any", messages=ASK["messages"], system="Be kind.", tools=[WEATHER], thinking={"type": "disabled"}
        ),
    )
    assert counted.input_tokens == 123
    assert chat.request.messages[0] == {"role": "system", "content": "Be kind."}
    assert [tool.name for tool in chat.request.tools] == ["weather"]


def test_the_beta_interface_asks_the_same() -> None:
    chat = ScriptedChat(Script([said(Content("Yes."), finish=STOP)]))
    message = with_client(
        application(chat), lambda client: client.beta.messages.create(**ASK, betas=["interleaved-thinking-2025-05-14"])
    )
    assert message.content[0].text == "Yes."  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("refusal", "kind", "status"),
    [
        (RequestError("no"), anthropic.BadRequestError, 400),
        (ContextError("too long"), anthropic.BadRequestError, 400),
        (Overloaded("later", 3), anthropic.RateLimitError, 429),
        (Stopping("bye"), anthropic.InternalServerError, 503),
        (TimedOut("slow"), anthropic.InternalServerError, 504),
        (NumericsError("nan"), anthropic.InternalServerError, 500),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_errors_are_theirs(refusal: KvistError, kind: type[anthropic.APIStatusError], status: int, late: bool) -> None:
    end = said(tokens=0, finish=FinishReason.FAILED, error=refusal)
    script = Script([said(Content("x")), end]) if late else Script(refusal=refusal)
    with pytest.raises(kind) as raised:
        create(ScriptedChat(script))
    assert raised.value.status_code == status
    body = raised.value.body
    assert isinstance(body, dict)
    assert body["type"] == "error"
    assert body["error"]["message"] == str(refusal)
    assert body["request_id"] == raised.value.request_id


def test_an_answer_that_ends_without_an_end_is_an_error() -> None:
    for steps in ([], [said(Content("x"), finish=FinishReason.CANCELLED)]):
        with pytest.raises(anthropic.InternalServerError):
            create(ScriptedChat(Script(steps)))


def test_keys_are_taken_from_their_header_and_name_the_tenant() -> None:
    chat = ScriptedChat(Script([said(finish=STOP)]))
    app = application(chat, ServerSettings(api_keys=("k1", "k2")))
    ask: Callable[[anthropic.AsyncAnthropic], Any] = lambda client: client.messages.create(**ASK)  # noqa: E731
    with pytest.raises(anthropic.AuthenticationError):
        with_client(app, ask, key="k3")
    for key in ("k1", "k2"):
        with_client(app, ask, key=key)
    first, second = (request.options.tenant for request in chat.requests)
    assert first
    assert second
    assert first != second


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": None},
        {"max_tokens": "100"},
        {"max_tokens": -1},
        {"messages": []},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": ["text"]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
        {"mcp_servers": [{"type": "url", "url": "http://localhost", "name": "x"}]},
        {"tools": [WEATHER | {"input_schema": {"maximum": 10**400}}]},
        {"temperature": "hot"},
        {"temperature": 1000.0},
        {"top_p": 0},
        {"top_k": -1},
        {"stop_sequences": [""]},
        {"tool_choice": {"type": "tool"}},
        {"tool_choice": {"type": "auto", "name": "weather"}},
        {"tools": [{"name": "x"}]},
        {"thinking": {"type": "enabled", "budget_tokens": 10}},
    ],
)
def test_what_is_no_request_is_refused(fields: dict[str, Any]) -> None:
    chat = ScriptedChat(Script([said(finish=STOP)]))
    response = post(application(chat), {name: value for name, value in (ASK | fields).items() if value is not None})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert not chat.sessions
