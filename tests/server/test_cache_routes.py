"""Answers say what the cache did for them, and the server says why; each tenant hears of its own."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from kvist.cli import main
from kvist.server.app import create_app
from kvist.server.settings import ServerSettings
from live import Live, live
from tiny_model import open_serving

KEYS = ("key-a", "key-b")
SYSTEM = "You are terse.\n" + "\n".join(f"Rule {number}: weigh {number * 7} twice." for number in range(40))


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Live]:
    settings, serving = ServerSettings(api_keys=KEYS), open_serving(tiny_model)
    with live(create_app(serving, settings), serving, settings) as running:
        yield running


def client(server: Live, key: str = KEYS[0]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def ask(server: Live, system: str, key: str = KEYS[0], **more: Any) -> Any:
    messages: list[Any] = [{"role": "system", "content": system}, {"role": "user", "content": "Go."}]
    return client(server, key).chat.completions.create(
        model="tiny", messages=messages, max_tokens=3, temperature=0, **more
    )


def get(server: Live, path: str, key: str = KEYS[0]) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", headers={"authorization": f"Bearer {key}"})


def test_an_answer_says_what_was_cached_and_where_it_changed(server: Live) -> None:
    first = ask(server, SYSTEM).model_extra["kvist"]
    assert first["reason"] == "new"
    assert first["cached"] == {}
    again = ask(server, SYSTEM)
    assert again.model_extra["kvist"]["reason"] == "continued"
    assert again.model_extra["kvist"]["cached"] == {"memory": again.usage.prompt_tokens_details.cached_tokens}
    changed = ask(server, SYSTEM.replace("Rule 20: weigh 140", "Rule 20: weigh 141"))
    short = changed.model_extra["kvist"]
    assert short["reason"] == "changed"
    assert short["where"] == "the system message, line 22"
    assert short["again"] > 100
    assert short["again_seconds"] > 0
    full = get(server, f"/v1/cache/explain/{changed.id}").json()
    assert full["nearest"] == again.id
    difference = full["difference"]
    assert difference["now"]["after"].startswith("1 twice.")
    assert difference["earlier"]["after"].startswith("0 twice.")
    assert difference["now"]["line"] == 22
    assert get(server, f"/v1/cache/explain/{changed._request_id}").json() == full
    assert full["computed"] == short["computed"] == full["prompt_tokens"] - full["cached"]["memory"]


def test_streams_carry_it_at_their_end(server: Live) -> None:
    chunks = list(ask(server, SYSTEM, stream=True))
    notes = [chunk.model_extra["kvist"] for chunk in chunks if "kvist" in (chunk.model_extra or {})]
    assert len(notes) == 1
    assert notes[0]["reason"] == "continued"
    completion = client(server).completions.create(model="tiny", prompt=SYSTEM, max_tokens=2)
    assert completion.model_extra is not None
    assert completion.model_extra["kvist"]["computed"] > 0
    response = client(server).responses.create(model="tiny", input=SYSTEM, max_output_tokens=2)
    assert response.model_extra is not None
    assert response.model_extra["kvist"]["computed"] > 0
    assert get(server, f"/v1/cache/explain/{response.id}").status_code == 200


def test_the_messages_api_carries_it_too(server: Live) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key=KEYS[0], max_retries=0) as asking:
        block: Any = {"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral", "ttl": "1h"}}
        messages: list[Any] = [{"role": "user", "content": "Messages."}]
        message = asking.messages.create(model="tiny", max_tokens=2, system=[block], messages=messages)
        assert message.model_extra is not None
        assert message.model_extra["kvist"]["cached"]["memory"] == message.usage.cache_read_input_tokens
        created = message.usage.cache_creation
        assert created is not None
        assert created.ephemeral_1h_input_tokens == message.usage.cache_creation_input_tokens
        assert created.ephemeral_5m_input_tokens == 0
        assert get(server, f"/v1/cache/explain/{message.id}").json()["computed"] > 0


def test_nothing_is_told_of_another_tenant(server: Live) -> None:
    mine = ask(server, SYSTEM)
    assert ask(server, SYSTEM, KEYS[1]).model_extra["kvist"]["reason"] == "new"
    theirs = get(server, f"/v1/cache/explain/{mine.id}", KEYS[1])
    nothing = get(server, "/v1/cache/explain/chatcmpl-none", KEYS[1])
    assert theirs.status_code == nothing.status_code == 404
    assert theirs.json() == nothing.json()
    assert get(server, f"/v1/cache/explain/{mine.id}").status_code == 200
    assert get(server, "/v1/cache/tax?session=mine", KEYS[1]).status_code == 404


def test_what_a_session_pays(server: Live) -> None:
    for number in range(4):
        ask(server, f"It is {number} o'clock.\n{SYSTEM}", extra_body={"prompt_cache_key": "clock"})
    found = get(server, "/v1/cache/tax?session=clock").json()
    assert found["requests"] == 4
    assert found["cached"] + found["computed"] == found["prompt_tokens"]
    assert 0 < found["stable"] < 20
    assert found["breaks"][0]["what"] == "changed: the system message, line 1"
    # The first one is compared with what was asked before the session.
    assert found["breaks"][0]["times"] in (3, 4)
    assert found["again"] == sum(one["again"] for one in found["breaks"])
    assert found["necessary"] <= found["computed"]
    assert found["again"] > 0.6 * found["prompt_tokens"] * 3 / 4
    parts = {one["label"]: one["tokens"] for one in found["parts"]}
    assert parts["the system message"] > 20 * parts["message 2 (user)"]
    # Without a name: the requests that the last one grew from.
    assert get(server, "/v1/cache/tax").json()["requests"] >= 4


def test_the_verbs_ask_a_server(
    server: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kvist(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvist", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    monkeypatch.setenv("KVIST_API_KEY", KEYS[0])
    ask(server, SYSTEM + "\x1b[31mred", extra_body={"prompt_cache_key": "verbs"})
    changed = ask(server, SYSTEM + "\x1b[32mgreen", extra_body={"prompt_cache_key": "verbs"})
    code, told, _ = kvist("explain", changed.id, "--url", server.url)
    assert code == 0
    assert "changed: the text is another from here on" in told
    assert "the system message, line 41" in told
    assert "\x1b" not in told
    assert json.loads(kvist("explain", changed.id, "--url", server.url, "--json")[1])["reason"] == "changed"
    code, paid, _ = kvist("tax", "--session", "verbs", "--url", server.url)
    assert code == 0
    assert "stable prefix" in paid
    for (code, _, err), said in (
        (kvist("explain", "nothing", "--url", server.url), "no answer of that id is remembered"),
        (kvist("tax", "--session", "none", "--url", server.url), "no request of that session"),
        (kvist("explain", "x", "--url", "http://127.0.0.1:9"), "is kvist serve running?"),
    ):
        assert code == 1
        assert said in err
        assert err.count("\n") == 1


def test_an_explanation_that_fails_spoils_no_answer(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*rest: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(server.serving.explainer, "answered", fail)
    assert ask(server, SYSTEM).model_extra.get("kvist") is None
