"""Completions: prompts of every form, echo and log-probabilities, streams."""

from typing import Any

import openai
import pytest
from openai.types import Completion
from scripted_openai import END, MODEL, ScriptedServing, application, data_of, end_token, post, with_client, wrote

from kvist.base.errors import NumericsError, Overloaded
from kvist.runtime.request import FinishReason
from kvist.service.session import Delta

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
PATH = "/v1/completions"
AB = [[wrote("a"), wrote("b", finish=LENGTH)]]


def create(serving: ScriptedServing, **fields: Any) -> Completion:
    asked = {"model": MODEL, "prompt": "Hi", **fields}
    return with_client(application(serving=serving), lambda client: client.completions.create(**asked))


def test_a_completion() -> None:
    serving = ScriptedServing([[wrote("a"), wrote(""), wrote("b", finish=STOP)]], cached_tokens=1)
    answer = create(serving, temperature=0, seed=7, stop=["x"], max_tokens=9)
    (choice,) = answer.choices
    assert (choice.text, choice.index, choice.finish_reason, choice.logprobs) == ("ab", 0, "stop", None)
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 2)
    request = serving.job.request
    assert request.prompt == (72, 105)
    assert (request.max_tokens, request.sampling.temperature, request.sampling.seed) == (9, 0.0, 7)
    assert (serving.job.stops, serving.job.keep_special) == (("x",), False)
    assert serving.sessions[0].cancelled


def test_sixteen_tokens_by_default() -> None:
    serving = ScriptedServing(AB)
    create(serving)
    assert serving.job.request.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", [(72, 105)]),
        (["Hi", "é"], [(72, 105), (0xC3, 0xA9)]),
        ([1, 2.0, 3], [(1, 2, 3)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_prompts_of_every_form(prompt: Any, expected: list[tuple[int, ...]]) -> None:
    serving = ScriptedServing([[wrote(name, finish=STOP)] for name in "ab"])
    answer = create(serving, prompt=prompt)
    assert [job.request.prompt for job in serving.jobs] == expected
    assert [choice.text for choice in answer.choices] == list("ab")[: len(expected)]
    assert answer.usage.prompt_tokens == sum(map(len, expected))


def test_choices_of_many_prompts_are_in_order() -> None:
    first = [wrote("1", choice=1), 0.02, wrote("0", choice=0, finish=STOP), wrote("!", choice=1, finish=LENGTH)]
    second = [wrote("2", choice=0, finish=STOP), wrote("3", choice=1, finish=STOP)]
    answer = create(ScriptedServing([first, second]), prompt=["a", "b"], n=2, best_of=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "0"), (1, "1!"), (2, "2"), (3, "3")]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length", "stop", "stop"]


def test_logprobs_are_parallel_lists() -> None:
    serving = ScriptedServing([[wrote("", tokens="\xe9"[:0], logprobs=2), wrote("né", logprobs=2, finish=LENGTH)]])
    (choice,) = create(serving, logprobs=2).choices
    assert choice.logprobs.tokens == ["n", "bytes:\\xc3", "bytes:\\xa9"]
    assert choice.logprobs.token_logprobs == [-1.5, -0.25, -0.25]
    assert choice.logprobs.text_offset == [0, 1, 1]
    assert choice.logprobs.top_logprobs[0] == {"Z": -0.25, "A": -2.0, "n": -1.5}
    assert choice.logprobs.top_logprobs[1] == {"bytes:\\xc3": -0.25, "A": -2.0}
    assert serving.job.request.logprobs == 2
    assert serving.job.request.prompt_logprobs is None


def scored(serving: ScriptedServing, tokens: list[int], continuation: int) -> tuple[float, bool]:
    """Sum of the last log-probabilities and whether all are the likeliest, as lm-evaluation-harness reads them from the
    answer to the request that it sends."""
    body = {
        "model": MODEL,
        "prompt": [tokens],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    (choice,) = post(application(serving=serving), PATH, body).json()["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert len(logprobs["tokens"]) == len(tokens) + 1
    start = len(tokens) - continuation
    values, tops = logprobs["token_logprobs"][start:-1], logprobs["top_logprobs"][start:-1]
    greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
    return sum(values), greedy


@pytest.mark.parametrize("last", ["\x01", None])
def test_texts_can_be_scored(last: str | None) -> None:
    """Whatever the one new token is: also one that ends the text, and has none."""
    steps = [Delta(0, "", end_token(1), STOP)] if last is None else [wrote(last, logprobs=1, finish=LENGTH)]
    assert scored(ScriptedServing([steps]), [2, 4, 5, 7], 2) == (-0.5, True)
    assert scored(ScriptedServing([steps]), [2, 4, 5, 6], 2) == (-1.75, False)
    serving = ScriptedServing([steps])
    scored(serving, [2, 4], 1)
    request = serving.job.request
    assert (request.prompt_logprobs, request.logprobs, request.max_tokens) == (1, 1, 1)


def test_a_prompt_alone_can_be_scored() -> None:
    serving = ScriptedServing([[Delta(0, "", (), LENGTH)]])
    (choice,) = create(serving, prompt="né", echo=True, max_tokens=0, logprobs=1).choices
    assert (choice.text, choice.finish_reason) == ("né", "length")
    assert choice.logprobs.tokens == ["n", "bytes:\\xc3", "bytes:\\xa9"]
    assert choice.logprobs.token_logprobs == [None, -0.25, -0.25]
    assert choice.logprobs.text_offset == [0, 1, 1]
    request = serving.job.request
    assert (request.max_tokens, request.prompt_logprobs) == (0, 1)


def test_an_echo_of_text_and_of_tokens() -> None:
    for prompt in ("Hi", [72, 105]):
        serving = ScriptedServing(AB)
        (choice,) = create(serving, prompt=prompt, echo=True, n=1).choices
        assert choice.text == "Hiab"
        assert serving.job.request.prompt_logprobs is None
    assert create(ScriptedServing(AB), prompt=[72, END], echo=True).choices[0].text == "H<end>ab"
    serving = ScriptedServing([[Delta(0, "", (), LENGTH)]])
    assert create(serving, echo=True, max_tokens=0).choices[0].text == "Hi"
    assert serving.job.request.prompt_logprobs == 0


def test_every_choice_echoes() -> None:
    serving = ScriptedServing([[wrote("a", choice=1, logprobs=0), *(wrote("", choice=i, finish=STOP) for i in (0, 1))]])
    first, second = create(serving, echo=True, n=2, logprobs=0).choices
    assert (first.text, second.text) == ("Hi", "Hia")
    assert (first.logprobs.tokens, second.logprobs.tokens) == (["H", "i"], ["H", "i", "a"])
    assert second.logprobs.text_offset == [0, 1, 2]
    assert second.logprobs.top_logprobs == [None, {"i": -0.25}, {"a": -0.25}]


def test_a_stream() -> None:
    serving = ScriptedServing([[wrote("a", logprobs=1), wrote("", tokens=1), wrote("b", logprobs=1, finish=STOP)]])
    asked = {"prompt": "Hi", "stream": True, "stream_options": {"include_usage": True}, "logprobs": 1, "echo": True}
    response = post(application(serving=serving), PATH, asked)
    assert response.text.endswith("data: [DONE]\n\n")
    *chunks, last = data_of(response.text)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices] == ["Hia", "", "b"]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]
    assert [choice["logprobs"]["text_offset"] for choice in choices] == [[0, 1, 2], [3], [4]]
    assert all(chunk["usage"] is None and chunk["object"] == "text_completion" for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


def test_a_stream_of_many_prompts_through_the_client() -> None:
    serving = ScriptedServing([[0.02, wrote("a"), wrote("A", finish=STOP)], [wrote("b", finish=LENGTH)]])

    async def read(client: openai.AsyncOpenAI) -> dict[int, str]:
        texts: dict[int, str] = {}
        async for chunk in await client.completions.create(model=MODEL, prompt=["x", "y"], stream=True):
            (choice,) = chunk.choices
            texts[choice.index] = texts.get(choice.index, "") + choice.text
        return texts

    assert with_client(application(serving=serving), read) == {0: "aA", 1: "b"}
    assert all(session.cancelled for session in serving.sessions)


def test_what_cannot_be_queued_whole_is_not_queued_at_all() -> None:
    serving = ScriptedServing(AB, refuse_after=2, refusal=Overloaded("full", 2))
    with pytest.raises(openai.RateLimitError):
        create(serving, prompt=["a", "b", "c", "d"])
    assert [session.cancelled for session in serving.sessions] == [1, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_one_failure_ends_all(stream: bool) -> None:
    answers = [[60.0], [wrote("a"), wrote("", finish=FinishReason.FAILED, error=NumericsError("none"))]]
    serving = ScriptedServing(answers)
    response = post(application(serving=serving), PATH, {"prompt": ["a", "b"], "stream": stream})
    assert response.status_code == (200 if stream else 500)
    error = data_of(response.text)[-1] if stream else response.json()
    assert error["error"]["code"] == "numerics"
    assert all(session.cancelled for session in serving.sessions)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [[]]}, 400, "prompt.0"),
        ({"prompt": ["a", 1]}, 400, "prompt.1"),
        ({"prompt": [1, "a"]}, 400, "prompt.1"),
        ({"prompt": [-1]}, 400, "prompt.0"),
        ({"prompt": [1.5]}, 400, "prompt.0"),
        ({"prompt": [True]}, 400, "prompt.0"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": ["a"] * 257}, 400, "prompt"),
        ({"prompt": ""}, 400, None),
        ({"prompt": "a" * 1001}, 400, None),
        ({"suffix": "a"}, 400, "suffix"),
        ({"best_of": 2}, 400, "best_of"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"logprobs": 21}, 400, "logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], status: int, param: str | None) -> None:
    response = post(application(serving=ScriptedServing(AB)), PATH, {"prompt": "a", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
