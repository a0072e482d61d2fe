"""What the tests of programs stand on: answers that end, are letters and hang on the prompt, and a record of them."""

import httpx
import pytest
from answering_model import VOWELS
from fixture_types import ServerOf
from recorded import answered


def test_answers_end_and_hang_on_the_prompt(server_of: ServerOf) -> None:
    server = server_of(4096)
    texts = []
    for prompt in ("Hello", "A house. " * 200, "What is this?"):
        body = {"messages": [{"role": "user", "content": prompt}], "stream": True, "temperature": 1}
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).raise_for_status()
        texts.append(server.plain(server.exchanges[-1]))
    assert all(text.isascii() and text.isalpha() and not set(text) & set(VOWELS) for text in texts)
    assert len(set(texts)) == 3
    assert [exchange.status for exchange in server.exchanges] == [200] * 3
    answered(server, f"{texts[0]}\n", "Hello")
    with pytest.raises(AssertionError):
        answered(server, f"{texts[1]}\n", "Hello")
    with pytest.raises(AssertionError):
        answered(server, texts[0], "something else")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/responses", {"input": [{"role": "user", "content": "Hello"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    ],
)
def test_what_was_refused_is_recorded_with_what_was_answered(
    server_of: ServerOf, path: str, body: dict[str, object]
) -> None:
    server = server_of(4096)
    httpx.post(server.url + path, json=body | {"stream": True}, timeout=60).raise_for_status()
    httpx.post(server.url + path, json=body | {"max_tokens": "many", "max_output_tokens": "many"}, timeout=60)
    assert [exchange.status for exchange in server.exchanges] == [200, 400]
    assert "Hello" in server.exchanges[0].turn
    assert server.plain(server.exchanges[0])
