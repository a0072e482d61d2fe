"""The official client, over a socket, against a whole server with a tiny random model."""

import json
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import Message

from kvist.cache.layout import BLOCK_SIZE
from kvist.server.app import create_app
from kvist.server.settings import ServerSettings
from live import Live, live
from tiny_model import CONTEXT, open_serving, write_tiny_model

GREEDY = {"temperature": 0}
LONG = "Once there was a small house at the edge of a wood, and nobody had lived in it for a long time. " * 8
FLAG = {
    "name": "set_flag",
    "description": "Set the flag.",
    "input_schema": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
    "strict": True,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    serving = open_serving(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))
    settings = ServerSettings()
    with live(create_app(serving, settings), serving, settings) as running:
        yield running


@pytest.fixture
def client(server: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(api_key="any", base_url=server.url, max_retries=0) as client:
        yield client


def ask(text: str, **fields: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": "any", "max_tokens": 16, "messages": [{"role": "user", "content": text}]}
    return asked | {"extra_body": GREEDY} | fields


def text_of(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def whole(usage: Any) -> int:
    return int(usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens)


def test_the_second_time_the_prompt_is_read_from_the_cache(client: anthropic.Anthropic) -> None:
    marked = [{"type": "text", "text": "Who lived there?", "cache_control": {"type": "ephemeral"}}]
    asked = ask("", messages=[{"role": "user", "content": marked}], system=LONG)
    counted = client.messages.count_tokens(model="any", messages=asked["messages"], system=LONG)
    first, second = client.messages.create(**asked), client.messages.create(**asked)
    assert counted.input_tokens == whole(first.usage) == whole(second.usage)
    assert first.usage.cache_read_input_tokens == 0
    created = first.usage.cache_creation_input_tokens
    assert created is not None
    assert created >= counted.input_tokens - BLOCK_SIZE
    assert second.usage.cache_read_input_tokens == created  # what was said to be kept was kept
    assert second.usage.cache_creation_input_tokens == 0
    assert text_of(first) == text_of(second)
    assert first.usage.output_tokens == 16
    assert first.stop_reason == "max_tokens"
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    assert text_of(streamed) == text_of(first)
    assert streamed.usage == second.usage


def test_what_stands_behind_the_last_mark_is_not_said_to_be_cached(client: anthropic.Anthropic) -> None:
    marked = [{"type": "text", "text": f"Marks. {LONG}", "cache_control": {"type": "ephemeral"}}]
    long = [{"type": "text", "text": f"{index} {LONG}"} for index in range(3)]

    def usage(content: Any, system: Any = marked) -> tuple[int, int, int]:
        body = ask("", messages=[{"role": "user", "content": content}], system=system, max_tokens=1)
        found = client.messages.create(**body).usage
        counted = client.messages.count_tokens(model="any", messages=body["messages"], system=system).input_tokens
        assert whole(found) == counted
        return found.input_tokens, found.cache_creation_input_tokens or 0, found.cache_read_input_tokens or 0

    head = client.messages.count_tokens(model="any", messages=[{"role": "user", "content": "-"}], system=marked)  # type: ignore[arg-type]
    first, created, read = usage(long)
    assert read < BLOCK_SIZE
    assert head.input_tokens - 2 * BLOCK_SIZE < created + read <= head.input_tokens
    assert first > created, "the question is longer, and nobody asked for it to be cached"
    again = usage(long)
    assert again[1] == 0
    assert again[2] > created, "it was, all the same, and is read"
    # A mark between the blocks of a message, then at the end of all.
    long[0]["text"] = f"Another {LONG}"
    middle = usage([long[0] | {"cache_control": {"type": "ephemeral"}}, *long[1:]])
    long[0]["text"] = f"Yet another {LONG}"
    end = usage([*long[:2], long[2] | {"cache_control": {"type": "ephemeral"}}])
    assert 0 < middle[1] < end[1]
    assert middle[0] > BLOCK_SIZE > end[0] - BLOCK_SIZE


def test_a_prompt_can_be_computed_beforehand(client: anthropic.Anthropic) -> None:
    system = "Warm. " + LONG
    before = client.messages.create(**ask("x", system=system, max_tokens=0))
    assert before.content == []
    after = client.messages.create(**ask("Who lived there?", system=system))
    assert after.usage.cache_read_input_tokens is not None
    assert after.usage.cache_read_input_tokens > 200


def test_a_second_turn_reads_the_first_one(client: anthropic.Anthropic) -> None:
    first = client.messages.create(**ask("Turns. " + LONG, max_tokens=100))
    turns = [*ask("Turns. " + LONG)["messages"], {"role": "assistant", "content": first.content}]
    second = client.messages.create(**ask("", messages=[*turns, {"role": "user", "content": "Go on."}]))
    assert second.usage.cache_read_input_tokens is not None
    assert second.usage.cache_read_input_tokens >= whole(first.usage) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "set_flag"}])
def test_a_call_that_is_required_fits_its_schema(client: anthropic.Anthropic, choice: dict[str, Any]) -> None:
    choice = choice | {"disable_parallel_tool_use": True}
    asked = ask("Set it.", tools=[FLAG], tool_choice=choice, max_tokens=400, extra_body={})
    message = client.messages.create(**asked)
    (call,) = message.content
    assert call.type == "tool_use"
    assert call.name == "set_flag"
    assert call.input in ({"on": True}, {"on": False})
    assert message.stop_reason == "tool_use"
    with client.messages.stream(**asked) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use"
    assert streamed.input in ({"on": True}, {"on": False})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "done"}
    turns = [*asked["messages"], message.to_param(), {"role": "user", "content": [result]}]
    assert client.messages.create(**ask("", messages=turns, tools=[FLAG])).usage.output_tokens > 0


def test_an_answer_follows_its_schema(client: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["sure", "kind"],
        "additionalProperties": False,
    }
    message = client.messages.create(
        **ask("Answer.", max_tokens=400, output_config={"format": {"type": "json_schema", "schema": schema}})
    )
    answer = json.loads(text_of(message))
    assert message.stop_reason == "end_turn"
    assert set(answer) == {"sure", "kind"}
    assert answer["kind"] in ("a", "b")
    assert isinstance(answer["sure"], bool)


def test_a_prefill_is_continued(client: anthropic.Anthropic) -> None:
    asked = ask("Count.")
    turns = [*asked["messages"], {"role": "assistant", "content": "One, two, thr"}]
    counted = client.messages.count_tokens(model="any", messages=turns)
    alone = client.messages.count_tokens(model="any", messages=asked["messages"])
    assert counted.input_tokens > alone.input_tokens
    continued = client.messages.create(**{**asked, "messages": turns})
    assert whole(continued.usage) == counted.input_tokens


def test_a_stop_sequence_ends_an_answer(client: anthropic.Anthropic) -> None:
    asked = ask("Say something long.", max_tokens=60)
    full = text_of(client.messages.create(**asked))
    stop = next(full[i : i + 2] for i in range(5, len(full) - 2) if full[i : i + 2].strip() == full[i : i + 2])
    message = client.messages.create(**asked, stop_sequences=["never to be found", stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert full.startswith(text_of(message))
    assert len(text_of(message)) < len(full)


def test_a_prompt_that_is_too_long_is_refused_with_numbers(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match=rf"prompt is too long: \d+ tokens > {CONTEXT - 1} maximum"):
        client.messages.create(**ask(LONG * 20))


def test_the_context_ends_an_answer(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**ask(LONG * 4, max_tokens=CONTEXT, extra_body={}))
    assert message.stop_reason in ("model_context_window_exceeded", "end_turn")
    assert whole(message.usage) + message.usage.output_tokens <= CONTEXT + 1


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"tools": [FLAG, FLAG]}, "set_flag"),
        ({"tools": [FLAG], "tool_choice": {"type": "tool", "name": "other"}}, "other"),
        ({"tool_choice": {"type": "any"}}, "tools"),
    ],
)
def test_tools_that_make_no_sense_are_refused(client: anthropic.Anthropic, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=why):
        client.messages.create(**ask("x", **fields))


def test_a_client_that_leaves_frees_its_place(server: Live, client: anthropic.Anthropic) -> None:
    with client.messages.stream(**ask("Talk.", max_tokens=1500, extra_body={})) as stream:
        next(iter(stream))
        assert server.serving.load().running == 1
    for _ in range(500):
        if not server.serving.load().running:
            return
        time.sleep(0.01)
    pytest.fail("the answer goes on with nobody to read it")


def test_the_beta_query_is_taken(server: Live) -> None:
    body = ask("Hi") | {"extra_body": None}
    headers = {"x-api-key": "any", "anthropic-version": "2023-06-01", "anthropic-beta": "a,b"}
    response = httpx2.post(f"{server.url}/v1/messages?beta=true", json=body, headers=headers, timeout=30)
    assert response.status_code == 200
    assert response.headers["request-id"]


def test_metrics_count_what_was_asked(server: Live, client: anthropic.Anthropic) -> None:
    def read(name: str) -> float:
        lines = httpx2.get(f"{server.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"kvist:{name}"))

    asked = ask("Metrics. " + LONG)
    client.messages.create(**asked)
    names = ('prefix_cache_hits_total{cause="prompt"}', "generation_tokens_total", "e2e_request_latency_seconds_count")
    before = [read(name) for name in names]
    usage = client.messages.create(**asked).usage
    after = [read(name) for name in names]
    grown = [new - old for new, old in zip(after, before, strict=True)]
    assert usage.cache_read_input_tokens
    assert grown == [usage.cache_read_input_tokens, usage.output_tokens, 1]
