"""Thinking comes back: signed, so that clients keep it, and read from the cache where the template keeps it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from chain_model import write_chain_model
from kvist.cache.layout import BLOCK_SIZE
from kvist.server.app import create_app
from kvist.server.sealed import signature_of
from kvist.server.settings import ServerSettings
from live import Live, live
from tiny_model import open_serving

THOUGHT = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuv"
ANSWER = "w+x-y*z"
TEMPLATE = r"""{%- for message in messages -%}
<|im_start|>{{ message.role }}:
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif -%}
{{ message.content }}<|im_end|>
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant:
{%- if enable_thinking is not defined or enable_thinking %}<think>{% else %}</think>{% endif %}{% endif %}"""
THINK: Any = {"type": "enabled", "budget_tokens": 1024}
ASK: list[Any] = [{"role": "user", "content": "Count."}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    directory: Path = tmp_path_factory.mktemp("models") / "chain"
    write_chain_model(directory, TEMPLATE, [f"<think>{THOUGHT}</think>{ANSWER}<|im_end|>"])
    serving = open_serving(directory)
    settings = ServerSettings()
    with live(create_app(serving, settings), serving, settings) as running:
        yield running


@pytest.fixture
def client(server: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(api_key="any", base_url=server.url, max_retries=0) as client:
        yield client


def ask(client: anthropic.Anthropic, streams: bool = False, **fields: Any) -> anthropic.types.Message:
    asked: dict[str, Any] = {"model": "any", "max_tokens": 2000, "messages": ASK, "extra_body": {"temperature": 0}}
    if not streams:
        return client.messages.create(**(asked | fields))
    with client.messages.stream(**(asked | fields)) as stream:
        return stream.get_final_message()


def read(message: anthropic.types.Message) -> tuple[int, int]:
    """Tokens that were read from the cache, and those of the prompt and the answer together."""
    usage = message.usage
    cached, created = usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens or 0
    return cached, usage.input_tokens + cached + created + usage.output_tokens


@pytest.mark.parametrize("streams", [False, True])
def test_a_second_turn_reads_the_thinking_of_the_first(client: anthropic.Anthropic, streams: bool) -> None:
    question = [{"role": "user", "content": f"Count, streams: {streams}."}]
    first = ask(client, streams, thinking=THINK, messages=question)
    thinking, text = first.content
    assert thinking.type == "thinking"
    assert text.type == "text"
    assert (thinking.thinking, text.text) == (THOUGHT, ANSWER)
    assert thinking.signature == signature_of(THOUGHT)
    assert first.usage.output_tokens_details is not None
    assert first.usage.output_tokens_details.thinking_tokens == len(THOUGHT) + 1
    go_on = {"role": "user", "content": "Go on."}
    second = ask(client, streams, thinking=THINK, messages=[*question, first.to_param(), go_on])
    whole = read(first)[1]
    assert read(second)[0] >= (whole - 1) // BLOCK_SIZE * BLOCK_SIZE > whole - len(ANSWER) - BLOCK_SIZE
    # Without the block, as from a client that drops what is not signed, the prompt is another from the thinking on.
    without = ask(client, thinking=THINK, messages=[*question, {"role": "assistant", "content": ANSWER}, go_on])
    assert read(without)[0] < whole - len(THOUGHT)


@pytest.mark.parametrize("thinking", [None, {"type": "disabled"}])
@pytest.mark.parametrize("streams", [False, True])
def test_who_did_not_ask_is_shown_no_thinking(client: anthropic.Anthropic, thinking: Any, streams: bool) -> None:
    fields = {} if thinking is None else {"thinking": thinking}
    message = ask(client, streams, **fields)
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text == ANSWER  # type: ignore[union-attr]


def test_thinking_that_is_not_shown_comes_back_in_its_signature(client: anthropic.Anthropic) -> None:
    shown = ask(client, thinking=THINK)
    hidden = ask(client, thinking={**THINK, "display": "omitted"})
    thinking, text = hidden.content
    assert thinking.type == "thinking"
    assert (thinking.thinking, text) == ("", shown.content[1])
    go_on = {"role": "user", "content": "Why?"}
    counts = [
        client.messages.count_tokens(model="any", messages=[*ASK, said.to_param(), go_on], thinking=THINK)
        for said in (shown, hidden)
    ]
    assert counts[0].input_tokens == counts[1].input_tokens > len(THOUGHT)


@pytest.mark.parametrize("streams", [False, True])
def test_reasoning_that_is_sealed_comes_back_to_responses(server: Live, streams: bool) -> None:
    sealed: Any = ["reasoning.encrypted_content"]
    with openai.OpenAI(api_key="any", base_url=f"{server.url}/v1", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "store": False, "include": sealed}
        if streams:
            with client.responses.stream(input="Tell.", **asked) as stream:
                first = stream.get_final_response()
        else:
            first = client.responses.create(input="Tell.", **asked)
        reasoning, message = first.output
        assert reasoning.type == "reasoning"
        assert message.type == "message"
        assert reasoning.encrypted_content
        # As agents do that keep no text of it.
        carried = {"type": "reasoning", "summary": [], "encrypted_content": reasoning.encrypted_content}
        turns: Any = [{"role": "user", "content": "Tell."}, carried, {"role": "assistant", "content": ANSWER}]
        second = client.responses.create(input=[*turns, {"role": "user", "content": "Go on."}], **asked)
        assert first.usage is not None
        assert second.usage is not None
        assert first.usage.output_tokens_details.reasoning_tokens == len(THOUGHT) + 1
        whole = first.usage.total_tokens
        assert second.usage.input_tokens_details.cached_tokens >= (whole - 1) // BLOCK_SIZE * BLOCK_SIZE
        plain = client.responses.create(input="Tell.", **(asked | {"include": []}))
        assert plain.output[0].type == "reasoning"
        assert plain.output[0].encrypted_content is None


def test_a_response_goes_on_by_its_id(server: Live) -> None:
    with openai.OpenAI(api_key="any", base_url=f"{server.url}/v1", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "tiny", "temperature": 0}
        first = client.responses.create(input="Once.", **asked)
        second = client.responses.create(input="Twice.", previous_response_id=first.id, **asked)
        assert first.usage is not None
        assert second.usage is not None
        assert second.usage.input_tokens > first.usage.total_tokens
        whole = first.usage.total_tokens
        assert second.usage.input_tokens_details.cached_tokens >= (whole - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert client.responses.retrieve(second.id).output_text == second.output_text == ANSWER
        client.responses.delete(first.id)
        with pytest.raises(openai.BadRequestError) as refusal:
            client.responses.create(input="Again.", previous_response_id=second.id, **asked)
        assert (refusal.value.code, refusal.value.param) == ("previous_response_not_found", "previous_response_id")
