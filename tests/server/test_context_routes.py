"""Contexts over HTTP: each tenant's own, read from disk by another server, and never somebody else's."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvist.cache.disk import DiskTier
from kvist.server.app import create_app
from kvist.server.settings import ServerSettings
from kvist.service.calibration import TEXT as WORDS
from kvist.service.keeping import KeepSettings, open_kept
from kvist.service.loaded import open_model
from kvist.service.serving import Serving
from kvist.service.tenants import Tenant
from live import live
from tiny_model import open_serving

TEXT = WORDS.read_text("utf-8")[:2000]
TENANTS = {"key-a": Tenant("a"), "key-b": Tenant("b"), "key-c": Tenant("a"), "key-op": Tenant("op", operator=True)}


@contextmanager
def keeping_server(model: Path, folder: Path, public: str | None = None) -> Iterator[str]:
    """A server over a kept cache, with a public prompt or without; its URL."""
    with ExitStack() as stack:
        loaded = open_model(str(model))
        kept = stack.enter_context(open_kept(loaded, KeepSettings(folder, 1 << 28)))
        budget = loaded.budget(loaded.layout.store_bytes(256, 0, 0), 4)
        engine = loaded.engine(budget, kept)
        settings = ServerSettings(api_keys=tuple(TENANTS), tenants=TENANTS)
        serving = Serving(loaded, engine, name="tiny", tenants=tuple(TENANTS.values()), kept=kept)
        if public is not None:
            assert serving.make_public(public) > 200
        yield stack.enter_context(live(create_app(serving, settings), serving, settings)).url


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contexts")


@pytest.fixture(scope="module")
def url(tiny_model: Path, folder: Path) -> Iterator[str]:
    with keeping_server(tiny_model, folder) as running:
        yield running


def ask(url: str, method: str, path: str, body: Any = None, key: str = "key-a") -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.request(method, url + path, json=body, headers=headers, timeout=60)


def chat(url: str, key: str = "key-a", **more: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "Well?"}], "max_tokens": 4, "temperature": 0, **more}
    return ask(url, "POST", "/v1/chat/completions", body, key)


def test_a_context_is_made_used_and_removed(url: str) -> None:
    made = ask(url, "POST", "/v1/contexts", {"name": "book", "text": TEXT}).json()
    assert (made["form"], made["model"]) == ("chat", "tiny")  # its plain name: where it lies is not said
    assert made["tokens"] > 300
    found = chat(url, context="book").json()
    whole = made["tokens"] // 64 * 64
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] >= whole
    plain = chat(url, messages=[{"role": "system", "content": TEXT}, {"role": "user", "content": "Well?"}]).json()
    assert plain["choices"][0]["message"] == found["choices"][0]["message"]
    assert [one["name"] for one in ask(url, "GET", "/v1/contexts").json()["data"]] == ["book"]
    assert ask(url, "GET", "/v1/contexts/book").json() == made
    assert ask(url, "DELETE", "/v1/contexts/book").json() == {"name": "book", "object": "context", "deleted": True}
    assert chat(url, context="book").status_code == 404


def test_messages_and_completions_take_contexts(url: str) -> None:
    ask(url, "POST", "/v1/contexts", {"name": "talk", "text": TEXT}).raise_for_status()
    ask(url, "POST", "/v1/contexts", {"name": "plain", "text": TEXT, "form": "text"}).raise_for_status()
    body = {"max_tokens": 4, "messages": [{"role": "user", "content": "Hm."}], "context": "talk", "system": "Short."}
    assert ask(url, "POST", "/v1/messages", body).json()["usage"]["cache_read_input_tokens"] > 300
    completion = {"prompt": " And", "max_tokens": 4, "context": "plain", "temperature": 0}
    found = ask(url, "POST", "/v1/completions", completion).json()
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] > 300
    wrong = ask(url, "POST", "/v1/completions", completion | {"context": "talk"})
    assert wrong.status_code == 400
    assert "'chat', and 'text' is needed" in wrong.text


def test_contexts_are_a_tenants_own(url: str) -> None:
    ask(url, "POST", "/v1/contexts", {"name": "secret", "text": TEXT}).raise_for_status()
    assert chat(url, "key-c", context="secret").status_code == 200  # another key of the same tenant
    refused, unknown = (chat(url, "key-b", context=name) for name in ("secret", "nothing"))
    assert refused.status_code == unknown.status_code == 404
    assert refused.json()["error"]["message"].replace("secret", "") == unknown.json()["error"]["message"].replace(
        "nothing", ""
    )
    for method in ("GET", "DELETE"):
        assert ask(url, method, "/v1/contexts/secret", key="key-b").status_code == 404
    assert ask(url, "GET", "/v1/contexts", key="key-b").json()["data"] == []
    # The same text of another tenant is computed.
    other = chat(url, "key-b", messages=[{"role": "system", "content": TEXT}, {"role": "user", "content": "Well?"}])
    assert other.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "%2e%2e", "x" * 65, "a b", ".x", ""])
def test_names_that_lead_elsewhere_are_refused(url: str, folder: Path, name: str) -> None:
    before = sorted(folder.rglob("*.json"))
    assert ask(url, "POST", "/v1/contexts", {"name": name, "text": TEXT}).status_code == 400
    assert ask(url, "DELETE", f"/v1/contexts/{name}").status_code in (400, 404, 405)
    assert chat(url, context=name).status_code in (400, 404)
    assert sorted(folder.rglob("*.json")) == before


def test_bad_texts_are_refused(url: str) -> None:
    short = ask(url, "POST", "/v1/contexts", {"name": "short", "text": "Too short."})
    assert short.status_code == 400
    assert "at least 64" in short.text
    long = ask(url, "POST", "/v1/contexts", {"name": "long", "text": TEXT * 9})
    assert long.status_code == 400
    assert "2,048" in long.text


def test_another_server_reads_what_the_first_has_left(tiny_model: Path, tmp_path: Path) -> None:
    with keeping_server(tiny_model, tmp_path) as first:
        ask(first, "POST", "/v1/contexts", {"name": "book", "text": TEXT}).raise_for_status()
        expected = chat(first, context="book").json()
    with keeping_server(tiny_model, tmp_path) as second:
        found = chat(second, context="book").json()
        assert found["choices"][0]["message"] == expected["choices"][0]["message"]
        assert found["kvist"]["cached"]["disk"] > 300
        again = chat(second, context="book").json()
        assert again["kvist"]["cached"]["memory"] > 300
        assert again["kvist"]["cached"].get("disk") is None
        metrics = ask(second, "GET", "/v1/contexts").json()["data"]
        assert metrics[0]["usable"]


def test_a_context_without_room_is_a_429_without_a_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiskTier, "put", lambda tier, block, record, until: False)  # all of it is held for others
    found = ask(url, "POST", "/v1/contexts", {"name": "late", "text": f"Late. {TEXT}"})
    assert found.status_code == 429
    assert found.json()["error"]["code"] == "no_room"
    assert "retry-after" not in found.headers
    assert ask(url, "GET", "/v1/contexts/late").status_code == 404


def test_a_server_without_a_disk_says_so(tiny_model: Path) -> None:
    settings, serving = ServerSettings(), open_serving(tiny_model)
    with live(create_app(serving, settings), serving, settings) as running:
        found = ask(running.url, "POST", "/v1/contexts", {"name": "book", "text": TEXT})
        assert found.status_code == 400
        assert "--cache-disk" in found.text
        assert chat(running.url, context="book").status_code == 400


def test_what_is_public_is_shared_and_nothing_behind_it(tiny_model: Path, tmp_path: Path) -> None:
    public, secret = TEXT[:1200], TEXT[1200:1900]

    def read(url: str, key: str, user: str) -> tuple[int, int]:
        messages = [{"role": "system", "content": public}, {"role": "user", "content": user}]
        usage = chat(url, key, messages=messages).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]

    with keeping_server(tiny_model, tmp_path, public) as url:
        assert read(url, "key-a", secret)[0] == 0
        found, whole = read(url, "key-b", secret)  # what another tenant has asked, to the letter
        assert 200 < found < whole - 100
        assert found % 64 == 0
        assert read(url, "key-c", secret)[0] > found + 100  # the first tenant again
        assert read(url, "key-b", secret)[0] > found + 100
        found, _ = read(url, "key-b", secret[::-1])
        assert 200 < found < whole - 100


def test_a_server_over_damaged_files_answers_as_before_and_says_so(tiny_model: Path, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": "Well?"}]
    with keeping_server(tiny_model, tmp_path) as first:
        expected = chat(first, messages=messages).json()["choices"]
    files = sorted(tmp_path.rglob("*.kv"))
    assert len(files) > 5
    for number, path in enumerate(files):
        data = bytearray(path.read_bytes())
        data[number * 977 % len(data)] ^= 1
        path.write_bytes(data[: len(data) - number % 2])
    with keeping_server(tiny_model, tmp_path) as second:
        found = chat(second, messages=messages).json()
        assert found["choices"] == expected
        assert found["kvist"]["reason"] in ("corrupt", "truncated", "version")
        assert found["kvist"]["computed"] == found["usage"]["prompt_tokens"]
        assert ask(second, "GET", "/metrics", key="key-op").text.count('kvist:kept_losses_total{reason="') > 5
        assert chat(second, messages=messages).json()["choices"] == expected
    with keeping_server(tiny_model, tmp_path) as third:  # what was computed again was written again
        assert chat(third, messages=messages).json()["kvist"]["cached"]["disk"] > 0
