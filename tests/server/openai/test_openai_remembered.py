"""Responses that are remembered: bounded, for a while, each tenant's for itself."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_openai import MODEL, ScriptedChat, application, post, said, with_client

from kvist.runtime.request import FinishReason
from kvist.server.errors import ApiError
from kvist.server.openai import remembered
from kvist.server.openai.remembered import SECONDS, Memory
from kvist.server.openai.responses_schema import MessageItem
from kvist.text.response import Content, Reasoning, ToolCallArguments, ToolCallBegin, ToolCallEnd

STOP = FinishReason.STOP
PATH = "/v1/responses"
CALL = (ToolCallBegin(0, "weather"), ToolCallArguments(0, "{}"), ToolCallEnd(0))
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def response(name: str, text: str = "a") -> Any:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {"id": name, "output": [{"id": f"msg_{name}", "type": "message", "role": "assistant", "content": content}]}


def asked(text: str) -> list[Any]:
    return [MessageItem(role="user", content=text)]


def texts(items: Any) -> list[str]:
    return [item.content if isinstance(item.content, str) else item.content[0].text for item in items]


def test_a_conversation_is_what_led_to_a_response() -> None:
    memory = Memory()
    memory.add("t", response("r1", "one"), asked("1"), None)
    memory.add("t", response("r2", "two"), asked("2"), "r1")
    memory.add("t", response("r3", "other"), asked("3"), "r1")
    assert texts(memory.before("t", "r2")) == ["1", "one", "2", "two"]
    assert texts(memory.before("t", "r3")) == ["1", "one", "3", "other"]
    assert texts([memory.item("t", "msg_r2", "input.0")]) == ["two"]
    memory.delete("t", "r1")
    with pytest.raises(ApiError, match="'r1' not found"):
        memory.before("t", "r2")
    with pytest.raises(ApiError):
        memory.item("t", "msg_r1", "input.0")


def test_a_tenant_knows_its_own_alone() -> None:
    memory = Memory()
    memory.add("one", response("r1"), asked("1"), None)
    for use in (
        lambda: memory.get("two", "r1"),
        lambda: memory.delete("two", "r1"),
        lambda: memory.before("two", "r1"),
        lambda: memory.item("two", "msg_r1", "input.0"),
    ):
        with pytest.raises(ApiError):
            use()
    assert memory.get("one", "r1")["id"] == "r1"


def test_what_nobody_asked_for_in_a_day_is_forgotten() -> None:
    clock = Clock()
    memory = Memory(clock)
    memory.add("t", response("old"), asked("1"), None)
    memory.add("t", response("used"), asked("1"), None)
    clock.now = 0.9 * SECONDS
    memory.get("t", "used")
    clock.now = 1.5 * SECONDS
    memory.add("t", response("new"), asked("1"), None)
    held = memory.nbytes
    with pytest.raises(ApiError):
        memory.get("t", "old")
    assert memory.nbytes == held  # it was gone before
    assert memory.get("t", "used")
    clock.now = 9 * SECONDS
    with pytest.raises(ApiError):
        memory.get("t", "new")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 900)), max_size=60))
def test_it_is_bounded_and_the_newest_stay(added: list[tuple[str, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered, "MOST", 4)
        patch.setattr(remembered, "MOST_BYTES", 2000)
        patch.setattr(remembered, "MOST_BYTES_IN_ALL", 3000)
        memory = Memory()
        for number, (tenant, size) in enumerate(added):
            memory.add(tenant, response(f"r{number}", "x" * size), asked("a"), None)
            assert memory.nbytes <= 3000
            assert memory.get(tenant, f"r{number}")
        for tenant in "abc":
            own = [f"r{number}" for number, (whose, _) in enumerate(added) if whose == tenant]
            held = [name for name in own if _holds(memory, tenant, name)]
            assert len(held) <= 4
            assert held == own[len(own) - len(held) :]
        for number, (tenant, _) in enumerate(added):
            if _holds(memory, tenant, f"r{number}"):
                memory.delete(tenant, f"r{number}")
        assert memory.nbytes == 0


def _holds(memory: Memory, tenant: str, name: str) -> bool:
    try:
        return bool(memory.get(tenant, name))
    except ApiError:
        return False


def test_one_larger_than_a_share_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MOST_BYTES", 100)
    memory = Memory()
    memory.add("t", response("r1", "x" * 200), asked("a"), None)
    assert memory.nbytes == 0


def test_references_and_earlier_responses_become_the_conversation() -> None:
    chat = ScriptedChat([said(Reasoning("Hm.")), said(Content("I look."), *CALL, finish=STOP)])
    app = application(chat)

    async def use(client: Any) -> None:
        first = await client.responses.create(model=MODEL, input="Weather?", tools=[WEATHER], instructions="Be brief.")
        _, said_text, call = first.output
        given = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
        await client.responses.create(model=MODEL, input=[given], previous_response_id=first.id)
        named = [{"role": "user", "content": "Weather?"}, {"type": "item_reference", "id": said_text.id}]
        await client.responses.create(model=MODEL, input=[*named, {"id": call.id}, given])
        unkept = await client.responses.create(model=MODEL, input="a", store=False)
        assert unkept.model_extra["store"] is False

    with_client(app, use)
    _, by_response, by_item, _ = chat.requests
    told = list(by_response.messages)
    assert [message["role"] for message in told] == ["user", "assistant", "tool"]  # instructions are each request's own
    assert (told[1]["content"], told[1]["reasoning_content"]) == ("I look.", "Hm.")
    assert told[1]["tool_calls"][0]["function"]["name"] == "weather"
    assert [message["role"] for message in by_item.messages] == ["user", "assistant", "tool"]
    assert "reasoning_content" not in by_item.messages[1]


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_not_to_be_stored_is_not(stream: bool) -> None:
    app = application(ScriptedChat([said(Content("a"), finish=STOP)]))
    for store, status in ((False, 400), (None, 200)):
        answer = post(app, PATH, {"input": "Hi", "store": store, "stream": stream}).text
        name = answer[answer.index("resp_") :].split('"')[0]
        again = post(app, PATH, {"input": "Go on.", "previous_response_id": name})
        assert again.status_code == status, again.text
    error = post(app, PATH, {"input": [{"type": "item_reference", "id": "msg_1"}]})
    assert (error.status_code, error.json()["error"]["param"]) == (404, "input.0")
