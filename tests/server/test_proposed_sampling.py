"""What a model's generation_config.json proposes of sampling is the default of requests that say nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import anthropic
import httpx
import openai
import pytest

from kvist.server.app import create_app
from kvist.server.settings import ServerSettings
from live import live
from tiny_model import open_serving, write_tiny_model

PROPOSED = {"temperature": 0.0, "top_p": 0.75, "repetition_penalty": 1.25}
USER = [{"role": "user", "content": "the quick brown fox"}]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = write_tiny_model(tmp_path_factory.mktemp("proposed") / "tiny")
    (model / "generation_config.json").write_text(json.dumps(PROPOSED))
    settings, serving = ServerSettings(), open_serving(model)
    with live(create_app(serving, settings), serving, settings) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_model_says_how_it_is_sampled(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    expected = {"temperature": 0.0, "top_k": 0, "top_p": 0.75, "min_p": 0.0, "repetition_penalty": 1.25}
    assert model.model_extra["sampling"] == expected


def test_requests_that_say_nothing_are_answered_as_proposed(client: openai.OpenAI, url: str) -> None:
    """The proposal is greedy with a penalty: the same answer as of who asks for that by name, on all routes."""

    def chat(**more: object) -> str:
        return (
            client.chat.completions.create(model="tiny", messages=USER, max_tokens=24, **more)
            .choices[0]
            .message.content
        )

    asked = chat(temperature=0.0, extra_body={"repetition_penalty": 1.25, "top_p": 1})
    assert chat() == chat(seed=1) == asked
    assert chat(temperature=0.0, extra_body={"repetition_penalty": 1.0}) != asked, "what is said holds"
    assert len({chat(temperature=5.0, seed=seed) for seed in range(4)}) > 1
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as theirs:
        message = theirs.messages.create(model="tiny", messages=USER, max_tokens=24)
    assert message.content[0].text == asked
    response = client.responses.create(model="tiny", input=USER, max_output_tokens=24)
    assert (response.output_text, response.temperature, response.top_p) == (asked, 0.0, 0.75)


def test_completions_of_text(client: openai.OpenAI) -> None:
    texts = {client.completions.create(model="tiny", prompt="the", max_tokens=16).choices[0].text for _ in range(3)}
    assert len(texts) == 1


def test_a_proposal_that_is_none_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    (model / "generation_config.json").write_text('{"temperature": -1}')
    with pytest.raises(Exception, match=r"generation_config\.json: temperature must be between 0"):
        open_serving(model)


def test_a_server_without_a_proposal(server_url: str) -> None:
    sampling = httpx.get(f"{server_url}/v1/models").json()["data"][0]["sampling"]
    assert sampling == {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
