"""Chat completions, whole, as the official client reads them."""

from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel
from scripted_openai import HELLO, MODEL, ScriptedChat, ScriptedServing, application, end_token, post, said, with_client

from kvist.base.errors import ContextError, KvistError, NumericsError, Overloaded, RequestError, Stopping, TimedOut
from kvist.runtime.request import FinishReason
from kvist.server.openai.chat import message_of
from kvist.server.settings import ServerSettings
from kvist.service.chat import ChatDelta
from kvist.text.response import Content, Reasoning, ToolCallArguments, ToolCallBegin, ToolCallEnd

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
CALL = (ToolCallBegin(0, "weather"), ToolCallArguments(0, '{"place":'), ToolCallArguments(0, ' "Ulm"}'), ToolCallEnd(0))
OTHER_CALL = (ToolCallBegin(1, "time"), ToolCallArguments(1, "{}"), ToolCallEnd(1))


def create(chat: ScriptedChat, **fields: Any) -> ChatCompletion:
    asked = {"model": MODEL, "messages": HELLO, **fields}
    return with_client(application(chat), lambda client: client.chat.completions.create(**asked))


def test_an_answer_is_one_message() -> None:
    chat = ScriptedChat([said(Content("Good ")), said(Content("day.")), said(finish=STOP)], 12, 8)
    answer = create(chat)
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content, choice.message.tool_calls) == ("assistant", "Good day.", None)
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint.startswith("kvist-")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (12, 3, 15)
    assert usage.prompt_tokens_details.cached_tokens == 8
    assert chat.request.messages == ({"role": "user", "content": "Hello"},)
    assert chat.session.cancelled


def test_reasoning_is_kept_apart_and_counted() -> None:
    steps = [
        said(tokens=2),
        said(Reasoning("Hm, "), tokens=1),
        said(Reasoning("hm."), tokens=3, reasoning=3),
        said(Content("Yes."), tokens=2, reasoning=2),
        said(finish=STOP),
    ]
    answer = create(ScriptedChat(steps))
    message = answer.choices[0].message
    assert message.content == "Yes."
    assert message.model_extra == {"reasoning_content": "Hm, hm."}
    assert answer.usage.completion_tokens == 9
    assert answer.usage.completion_tokens_details.reasoning_tokens == 5


def test_calls_are_in_the_order_in_which_they_began() -> None:
    chat = ScriptedChat([said(*CALL, *OTHER_CALL), said(finish=STOP)])
    (choice,) = create(chat).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    first, second = choice.message.tool_calls
    assert (first.type, first.function.name, first.function.arguments) == ("function", "weather", '{"place": "Ulm"}')
    assert (second.function.name, second.function.arguments) == ("time", "{}")
    assert first.id.startswith("call_")
    assert first.id != second.id


def test_a_call_that_was_cut_off_shows_as_far_as_it_came() -> None:
    chat = ScriptedChat([said(Content("I look.")), said(*CALL[:2], finish=LENGTH)])
    (choice,) = create(chat).choices
    assert choice.finish_reason == "length"
    assert choice.message.content == "I look."
    assert choice.message.tool_calls[0].function.arguments == '{"place":'


def test_each_choice_has_its_own_deltas() -> None:
    steps = [
        said(Content("a"), choice=0),
        said(Content("b"), choice=1),
        said(Content("B"), choice=1, finish=LENGTH),
        said(Content("A"), choice=0, finish=STOP),
    ]
    chat = ScriptedChat(steps)
    first, second = create(chat, n=2).choices
    assert (first.index, first.message.content, first.finish_reason) == (0, "aA", "stop")
    assert (second.index, second.message.content, second.finish_reason) == (1, "bB", "length")
    assert chat.request.options.choices == 2


def test_logprobs_have_bytes_and_leave_the_end_token_out() -> None:
    parts = Content("né")
    chat = ScriptedChat([said(parts, tokens="né", logprobs=2), ChatDelta(0, (), end_token(2), STOP, None, None)])
    answer = create(chat, logprobs=True, top_logprobs=2)
    n, e1, e2 = answer.choices[0].logprobs.content
    assert (n.token, n.bytes, n.logprob) == ("n", [110], -1.5)
    assert [(top.token, top.logprob, top.bytes) for top in n.top_logprobs] == [("Z", -0.25, [90]), ("A", -2.0, [65])]
    assert (e1.token, e1.bytes, e1.logprob) == ("bytes:\\xc3", [0xC3], -0.25)
    assert bytes([*n.bytes, *e1.bytes, *e2.bytes]).decode() == "né"
    assert chat.request.options.logprobs == 2
    assert answer.usage.completion_tokens == 4


def test_logprobs_without_others_beside_them() -> None:
    chat = ScriptedChat([said(Content("a"), tokens="a", logprobs=0), said(finish=STOP)])
    (entry,) = create(chat, logprobs=True).choices[0].logprobs.content
    assert (entry.token, entry.top_logprobs) == ("a", [])
    assert chat.request.options.logprobs == 0


def test_an_answer_can_be_parsed_into_a_model() -> None:
    class Place(BaseModel):
        name: str
        people: int

    chat = ScriptedChat([said(Content('{"name": "Ulm", "people": 126000}')), said(finish=STOP)])
    app = application(chat)
    answer = with_client(
        app, lambda client: client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Place)
    )
    assert answer.choices[0].message.parsed == Place(name="Ulm", people=126000)
    assert chat.request.schema["properties"].keys() == {"name", "people"}


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (RequestError("no such thing"), openai.BadRequestError, None),
        (ContextError("too long"), openai.BadRequestError, "context_length_exceeded"),
        (Overloaded("full", 3), openai.RateLimitError, "overloaded"),
        (Stopping("stopping"), openai.InternalServerError, "stopping"),
        (TimedOut("late"), openai.InternalServerError, "timeout"),
        (NumericsError("no numbers"), openai.InternalServerError, "numerics"),
    ],
)
@pytest.mark.parametrize("when", ["start", "middle"])
def test_errors_are_the_clients_typed_ones(error: KvistError, kind: type[Exception], code: str, when: str) -> None:
    if when == "start":
        chat = ScriptedChat(refusal=error)
    else:
        chat = ScriptedChat([said(Content("a")), said(finish=FinishReason.FAILED, error=error)])
    with pytest.raises(kind) as caught:
        create(chat)
    assert caught.value.code == code
    assert str(error) in str(caught.value)
    if isinstance(error, Overloaded):
        assert caught.value.response.headers["retry-after"] == "3"


def test_an_answer_that_was_ended_from_outside_is_an_error() -> None:
    with pytest.raises(openai.InternalServerError, match="ended before"):
        create(ScriptedChat([said(Content("a")), said(finish=FinishReason.CANCELLED)]))


def test_the_tenant_is_that_of_the_key() -> None:
    settings = ServerSettings(api_keys=("one", "two"))
    tenants = []
    for key in ("one", "two", "one"):
        chat = ScriptedChat([said(finish=STOP)])
        with_client(
            application(chat, settings=settings),
            lambda client: client.chat.completions.create(model=MODEL, messages=HELLO, user="me"),
            key,
        )
        tenants.append(chat.request.options.tenant)
    assert tenants[0] == tenants[2]
    assert len({*tenants, ""}) == 3
    with pytest.raises(openai.AuthenticationError):
        with_client(application(settings=settings), lambda client: client.models.list(), "three")


def test_models() -> None:
    app = application(serving=ScriptedServing())
    (model,) = with_client(app, lambda client: client.models.list()).data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "kvist")
    assert model.model_extra["max_model_len"] == 1000
    assert with_client(app, lambda client: client.models.retrieve(MODEL)) == model
    with pytest.raises(openai.NotFoundError) as caught:
        with_client(app, lambda client: client.models.retrieve("acme/twig-2"))
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": HELLO}),
        ("completions", {"prompt": "a"}),
        ("responses", {"input": "a"}),
        ("embeddings", {"input": "a"}),
    ],
)
def test_a_strict_server_does_not_find_another_model(path: str, body: dict[str, Any]) -> None:
    app = application(serving=ScriptedServing(strict_model=True))
    response = post(app, f"/v1/{path}", {"model": "gpt-5", **body})
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("not_found_error", "model", "model_not_found")
    assert MODEL in error["message"]


def test_the_model_needs_not_be_named() -> None:
    chat = ScriptedChat([said(Content("a"), finish=STOP)])
    assert post(application(chat), "/v1/chat/completions", {"messages": HELLO}).status_code == 200


def test_a_call_that_broke_off_is_left_out_beside_one_that_can_be_made() -> None:
    def call(index: int, arguments: str) -> Any:
        function = {"name": "look", "arguments": arguments}
        return {"tool_calls": [{"index": index, "id": f"call_{index}", "type": "function", "function": function}]}

    both = message_of([call(0, '{"a": 1'), call(1, '{"a": 2}')])
    assert [found["id"] for found in both["tool_calls"]] == ["call_1"]
    alone = message_of([call(0, '{"a": 1')])
    assert [found["function"]["arguments"] for found in alone["tool_calls"]] == ['{"a": 1']
