"""The unmodified `openai` package against a real server over a tiny random model."""

import base64
import json
import struct
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import torch
from pydantic import BaseModel, Field

from kvist.models.plain import PlainView
from kvist.service.loaded import Loaded, open_model
from live import Live

MODEL = "tiny"
HELLO: list[Any] = [{"role": "user", "content": "Hello, tree."}]
WARM: dict[str, Any] = {"temperature": 0.8, "seed": 5}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Finds it.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Oslo", "Bergen"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "stop", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
    },
]
ONE_TOOL: Any = {"type": "function", "function": {"name": "look_up"}}


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Loaded:
    return open_model(str(tiny_model))


def test_a_stream_is_the_whole_answer_and_its_usage(openai_client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 30, **WARM}
    whole = openai_client.chat.completions.create(**asked)
    chunks = list(openai_client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert whole.usage is not None
    last = chunks[-1]
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {last.id}


def test_the_same_prompt_is_read_from_the_cache_and_answered_alike(openai_client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "A prompt that nobody has sent before. " * 8}]
    answers = [
        openai_client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, **WARM) for _ in range(2)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    first, second = (answer.usage for answer in answers)
    assert first is not None
    assert second is not None
    assert first.prompt_tokens_details is not None
    assert second.prompt_tokens_details is not None
    assert second.prompt_tokens_details.cached_tokens == second.prompt_tokens - 1
    assert (first.prompt_tokens_details.cached_tokens or 0) < 64


def test_choices_seeds_and_stops(openai_client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 25, **WARM}
    three = openai_client.chat.completions.create(**asked, n=3)
    texts = [choice.message.content or "" for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[1] == openai_client.chat.completions.create(**(asked | {"seed": 6})).choices[0].message.content
    stop = texts[0][6:9]
    stopped = openai_client.chat.completions.create(**asked, stop=[stop, "never"])
    assert stopped.choices[0].message.content == texts[0][: texts[0].find(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_biases_and_log_probabilities(openai_client: openai.OpenAI, loaded: Loaded) -> None:
    token = loaded.tokenizer().encode("tree", add_special=False)[0]
    forced = openai_client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=4,
        temperature=0,
        logit_bias={str(token): 100},
        logprobs=True,
        top_logprobs=3,
    )
    assert forced.choices[0].message.content == loaded.tokenizer().decode([token] * 4)
    assert forced.choices[0].logprobs is not None
    entries = forced.choices[0].logprobs.content or []
    assert len(entries) == 4
    for entry in entries:
        assert bytes(entry.bytes or []) == loaded.tokenizer().token_bytes(token)
        assert entry.logprob <= entry.top_logprobs[0].logprob <= 0
        assert len(entry.top_logprobs) == 3
    plain = openai_client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=30, temperature=0)
    apart = openai_client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=30, temperature=0, presence_penalty=2.0, frequency_penalty=2.0
    )
    words = [set(answer.choices[0].message.content or "") for answer in (plain, apart)]
    assert len(words[1]) > len(words[0])


class Verdict(BaseModel):
    word: Literal["yes", "no"]
    score: int = Field(ge=0, le=9)
    why: list[Literal["a", "b"]] = Field(max_length=2)


@pytest.mark.parametrize("seed", range(5))
def test_json_of_a_schema_is_parsed_by_the_client(openai_client: openai.OpenAI, seed: int) -> None:
    answer = openai_client.chat.completions.parse(
        model=MODEL, messages=HELLO, response_format=Verdict, max_tokens=400, temperature=1.0, seed=seed
    )
    assert answer.choices[0].message.parsed is not None
    assert 0 <= answer.choices[0].message.parsed.score <= 9


def test_any_json_object(openai_client: openai.OpenAI) -> None:
    answer = openai_client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        response_format={"type": "json_object"},
        max_tokens=600,
        temperature=0.8,
        seed=3,
        logit_bias={"2": 0},
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


@pytest.mark.parametrize("choice", ["required", ONE_TOOL])
@pytest.mark.parametrize("seed", range(4))
def test_calls_are_valid_and_a_stream_of_them_is_the_whole(
    openai_client: openai.OpenAI, choice: Any, seed: int
) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 400,
        "temperature": 0.8,
        "seed": seed,
    }
    whole = openai_client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls or []
    arguments = json.loads(call.function.arguments)  # type: ignore[union-attr]
    if call.function.name == "look_up":  # type: ignore[union-attr]
        assert arguments["city"] in ("Oslo", "Bergen")
        assert 1 <= arguments["days"] <= 9
    name, written, finish = "", "", None
    for chunk in openai_client.chat.completions.create(**asked, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or []:
            assert piece.index == 0
            assert piece.function is not None
            name += piece.function.name or ""
            written += piece.function.arguments or ""
        finish = chunk.choices[0].finish_reason or finish
    assert (name, written, finish) == (call.function.name, call.function.arguments, "tool_calls")  # type: ignore[union-attr]


def test_results_of_calls_go_back_to_the_model(openai_client: openai.OpenAI) -> None:
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "stop", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    answer = openai_client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, max_tokens=5)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 60


def logprobs_of(loaded: Loaded, tokens: list[int]) -> torch.Tensor:
    """[T, V] float64, in one pass without a cache."""
    with torch.inference_mode():
        views = [PlainView() for _ in range(loaded.config.layers)]
        hidden = loaded.model(torch.tensor(tokens), torch.arange(len(tokens)), views)
        return loaded.model.logits(hidden).double().log_softmax(-1)


def test_completions_of_token_ids_are_scored_as_the_model_says(openai_client: openai.OpenAI, loaded: Loaded) -> None:
    tokens = loaded.tokenizer().encode("The tree and the branch are one, and the branch is a tree.")
    answer = openai_client.completions.create(
        model=MODEL, prompt=tokens, max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    found = answer.choices[0].logprobs
    assert found is not None
    expected = logprobs_of(loaded, tokens)
    assert found.token_logprobs is not None
    assert len(found.token_logprobs) == len(tokens) + 1
    assert found.token_logprobs[0] is None
    wanted = [float(expected[place, token]) for place, token in enumerate(tokens[1:])]
    assert found.token_logprobs[1:-1] == pytest.approx(wanted, abs=1e-4)
    assert found.token_logprobs[-1] == pytest.approx(float(expected[-1].max()), abs=1e-4)
    assert answer.choices[0].text.startswith("The tree and the branch")
    only = openai_client.completions.create(model=MODEL, prompt=tokens, max_tokens=0, logprobs=1, echo=True)
    assert only.choices[0].logprobs is not None
    assert only.choices[0].logprobs.token_logprobs == found.token_logprobs[:-1]


def test_completions_of_several_prompts_and_their_streams(openai_client: openai.OpenAI) -> None:
    prompts = ["A tree", "A branch", "The root"]
    whole = openai_client.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=8, **WARM)
    assert [choice.index for choice in whole.choices] == list(range(6))
    texts = [""] * 6
    for chunk in openai_client.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=8, stream=True, **WARM):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    ids = openai_client.completions.create(
        model=MODEL, prompt="A tree", max_tokens=8, extra_body={"return_token_ids": True, "ignore_eos": True}, **WARM
    )
    assert len(ids.choices[0].token_ids) == 8  # type: ignore[attr-defined]


def test_embeddings_in_both_encodings(openai_client: openai.OpenAI, loaded: Loaded) -> None:
    texts = ["a tree", "another tree, with a longer text"]
    floats = openai_client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    packed = openai_client.with_raw_response.embeddings.create(model=MODEL, input=texts, encoding_format="base64")
    for text, one, raw in zip(texts, floats.data, json.loads(packed.content)["data"], strict=True):
        unpacked = struct.unpack(f"<{len(one.embedding)}f", base64.b64decode(raw["embedding"]))
        assert list(unpacked) == pytest.approx(one.embedding, abs=1e-7)
        tokens = loaded.tokenizer().encode(text)
        with torch.inference_mode():
            views = [PlainView() for _ in range(loaded.config.layers)]
            hidden = loaded.model(torch.tensor(tokens), torch.arange(len(tokens)), views).double().mean(0)
        assert one.embedding == pytest.approx((hidden / hidden.norm()).tolist(), abs=1e-5)
    assert floats.usage.prompt_tokens == sum(len(loaded.tokenizer().encode(text)) for text in texts)


def test_models_are_listed(openai_client: openai.OpenAI) -> None:
    (model,) = openai_client.models.list().data
    assert model.id == MODEL
    assert openai_client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("another")


def test_errors_are_the_clients_own(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        openai_client.completions.create(model=MODEL, prompt=[1] * 5000, max_tokens=1)
    assert refusal.value.code == "context_length_exceeded"
    assert "5000 tokens > 2047 maximum" in refusal.value.message
    with pytest.raises(openai.BadRequestError):
        openai_client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-3)
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match="JSON schema"):
        openai_client.chat.completions.create(model=MODEL, messages=HELLO, response_format=schema)


def test_responses_of_text_and_tools(openai_client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": "Hello, tree.", "max_output_tokens": 30, "temperature": 0.8}
    answer = openai_client.responses.create(**asked)
    assert answer.output_text
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.cached_tokens >= 0
    tools = [{"type": "function", **tool["function"], "strict": True} for tool in TOOLS]
    called = openai_client.responses.create(
        **(asked | {"max_output_tokens": 400}), tools=tools, tool_choice="required", parallel_tool_calls=False
    )
    (item,) = [item for item in called.output if item.type == "function_call"]
    assert isinstance(json.loads(item.arguments), dict)
    again = openai_client.responses.create(
        model=MODEL,
        input=[
            {"role": "user", "content": "Hello, tree."},
            {"type": "function_call", "call_id": item.call_id, "name": item.name, "arguments": item.arguments},
            {"type": "function_call_output", "call_id": item.call_id, "output": "done"},
        ],
        tools=tools,
        max_output_tokens=5,
    )
    assert again.status in ("completed", "incomplete")
    with pytest.raises(openai.APIStatusError, match=r"previous_response_id|whole conversation"):
        openai_client.responses.create(**asked, previous_response_id="resp_1")


def test_events_of_a_response_come_in_their_order(openai_client: openai.OpenAI) -> None:
    with openai_client.responses.stream(
        model=MODEL, input="Hello, tree.", max_output_tokens=20, temperature=0.8
    ) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final = events[-1].response  # type: ignore[union-attr]
    assert text == final.output_text != ""


def test_a_client_that_leaves_ends_its_answer(openai_client: openai.OpenAI, live_server: Live) -> None:
    stream = openai_client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    # The first chunk may come before the engine has begun.
    next(chunk for chunk in stream if chunk.choices and chunk.choices[0].delta.content)
    assert live_server.serving.load().running == 1
    stream.close()
    for _ in range(200):
        if not live_server.serving.load().running:
            break
        torch.randn(100_000)  # some milliseconds
    assert live_server.serving.load().running == 0
