"""Talks and completions over HTTP whose pool has just the blocks that one request needs."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from kvist.server.app import create_app
from kvist.server.settings import ServerSettings
from live import Live, live
from tiny_model import open_serving

BLOCKS = 4  # 256 tokens


@pytest.fixture
def tight(tiny_model: Path) -> Any:
    serving = open_serving(tiny_model, blocks=BLOCKS)
    with live(create_app(serving, ServerSettings()), serving, ServerSettings()) as server:
        yield server


def post(server: Live, route: str, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}{route}", json={"model": "tiny", "temperature": 0, **body}, timeout=60)


def test_a_talk_goes_on_until_the_pool_is_full_and_says_so(tight: Live) -> None:
    """Each turn takes the last block over from the one before."""
    messages: list[dict[str, str]] = []
    answers = 0
    for _ in range(45):
        messages.append({"role": "user", "content": "Go."})
        answer = post(tight, "/v1/chat/completions", messages=messages, max_tokens=2, ignore_eos=True)
        if answer.status_code == 400:
            break
        assert answer.status_code == 200
        answers += 1
        messages.append({"role": "assistant", "content": "On"})
    assert answers > 5
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert httpx.get(f"{tight.url}/health").status_code == 200


def test_the_same_completion_again_and_in_choices(tight: Live) -> None:
    prompt = [place * 7 % 300 for place in range(200)]
    texts = set()
    for choices in (1, 1, 2, 4):
        answer = post(tight, "/v1/completions", prompt=prompt, max_tokens=57, ignore_eos=True, n=choices)
        assert answer.status_code == 200
        texts |= {choice["text"] for choice in answer.json()["choices"]}
    assert len(texts) == 1
    assert httpx.get(f"{tight.url}/health").status_code == 200
