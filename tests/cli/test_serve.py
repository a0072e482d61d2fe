"""`kvist serve`: what it refuses before it begins, what it says when it does, and how it ends."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from command import Kvist, Outcome

from kvist.base.errors import KvistError
from kvist.base.units import parse_bytes
from kvist.cli.keys import api_keys
from kvist.service.tenants import Tenant
from tiny_model import write_tiny_model


def refused(outcome: Outcome, *said: str) -> None:
    """Exit code 1, one line that says it all."""
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err.startswith("kvist: ")
    assert outcome.err.count("\n") == 1
    for text in said:
        assert text in outcome.err


def test_sizes() -> None:
    known = {"1": 1, "1k": 1024, "2GiB": 2**31, "2g": 2**31, "2 GB": 2 * 10**9, "1.5MiB": 3 * 2**19, " 3kb ": 3000}
    assert {text: parse_bytes(text, "--x") for text in known} == known
    for text in ("", "0", "-1", "2XB", "GiB", "1e3", "0.1", "1" * 20, "½k", "1 2"):
        with pytest.raises(KvistError, match=r"--x takes a size, as in 512MiB or 2GiB; got "):
            parse_bytes(text, "--x")


def test_keys_come_from_three_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVIST_API_KEY", raising=False)
    assert api_keys([], None) == {}
    file = tmp_path / "keys"
    file.write_text("# of the team\nfrom-file  # ours\n\ngiven\n")
    monkeypatch.setenv("KVIST_API_KEY", "from-environment")
    assert list(api_keys(["given", "other"], file)) == ["given", "other", "from-environment", "from-file"]
    for bad in ("a b", "é", "a\nb"):
        with pytest.raises(KvistError, match="ASCII"):
            api_keys([bad], None)
    file.write_text("# nothing\n")
    with pytest.raises(KvistError, match="holds no key"):
        api_keys([], file)
    with pytest.raises(KvistError, match="--api-key is empty"):
        api_keys([""], None)


def test_a_file_of_keys_says_whom_they_stand_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVIST_API_KEY", raising=False)
    file = tmp_path / "keys"
    lines = (
        "k1 name=alice requests=4 disk=5GB",
        "k2 requests=4 disk=5GB name=alice # also",
        "k3",
        "k4 name=bob operator",
    )
    file.write_text("\n".join(lines))
    alice = Tenant("alice", 4, 5 * 10**9)
    assert api_keys([], file) == {"k1": alice, "k2": alice, "k3": None, "k4": Tenant("bob", operator=True)}
    for line, said in {
        "k name=alice name=bob": "behind a key stand",
        "k owner=alice": "name=, requests=, disk= and operator",
        "k name=alice operator=1": "got 'operator=1'",
        "k requests=4": "a name of letters",
        "k name=../x": "a name of letters",
        "k name=a requests=0": "requests= takes a number",
        "k name=a disk=much": "takes a size",
        "k name=a\nk name=b": "line 2: the same key stands for somebody else",
        "k name=a\nl name=a disk=1GB": "keys of a have different limits",
    }.items():
        file.write_text(line + "\n")
        with pytest.raises(KvistError, match=said):
            api_keys([], file)


def test_mistakes_are_refused_before_the_model_is_read(kvist: Kvist, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(
            kvist("serve", nowhere, "--port", port), f"cannot listen on port {port} of 127.0.0.1", "in use", "--port"
        )
    refused(kvist("serve", nowhere, "--host", "no.such.host.invalid"), "cannot listen on 'no.such.host.invalid'")
    refused(kvist("serve", nowhere, "--host", "192.0.2.1"), "cannot listen on port 8000 of 192.0.2.1")
    refused(kvist("serve", nowhere, "--host", "0.0.0.0", "--port", 0), "everybody on the network", "--api-key")
    refused(kvist("serve", nowhere, "--kv-memory", "much"), "--kv-memory takes a size")
    refused(kvist("serve", nowhere, "--max-body", "0"), "--max-body takes a size")
    refused(kvist("serve", nowhere, "--timeout", "0"), "--timeout")
    refused(kvist("serve", nowhere, "--api-key", ""), "--api-key is empty")
    refused(kvist("serve", nowhere, "--api-key-file", nowhere), "cannot read")
    assert kvist("serve", nowhere, "--port", 70000).code == 2
    refused(kvist("serve", nowhere, "--port", 0), "no such directory")
    refused(kvist("serve", nowhere, "--host", "0.0.0.0", "--port", 0, "--insecure"), "no such directory")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_a_budget_that_is_too_small_is_refused_with_numbers(kvist: Kvist, tiny: Path) -> None:
    outcome = kvist("serve", tiny, "--port", 0, "--kv-memory", "1KiB")
    assert outcome.code == 1
    assert "a KV budget of 1.0 KiB is too small" in outcome.err.splitlines()[-1]


@dataclass
class Served:
    """A `kvist serve` under way, and what it logged so far."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)

    def read_until(self, message: str) -> dict[str, Any]:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(json.loads(line))
            if self.lines[-1]["message"].startswith(message):
                return self.lines[-1]
        raise AssertionError(f"it ended without {message!r}: {self.lines}")

    def end(self) -> list[dict[str, Any]]:
        """The rest of its log, once it has ended by itself and well."""
        _, rest = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, rest
        return [json.loads(line) for line in rest.splitlines()]


@contextmanager
def served(model: Path, *options: str) -> Iterator[Served]:
    command = [sys.executable, "-m", "kvist", "serve", str(model), "--port", "0", "--name", "tiny", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            serving = Served(process)
            serving.url = serving.read_until("listening on ")["url"]
            yield serving
        finally:
            process.kill()


def ask(url: str, tokens: int, stream: bool = False) -> dict[str, Any]:
    """Arguments of a request that draws that many tokens."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": tokens, "stream": stream}
    body |= {"seed": 1, "ignore_eos": True}
    return {"method": "POST", "url": f"{url}/v1/chat/completions", "json": body, "timeout": 60}


def test_it_says_what_it_serves_and_ends_well(tiny: Path) -> None:
    with served(tiny, "--kv-memory", "4MiB", "--api-key", "secret") as serving:
        said = "\n".join(line["message"] for line in serving.lines)
        assert said.startswith(
            "tiny · context of 2,048 tokens\nsampled with temperature 1 where a request says nothing"
        )
        assert "\nKV fp32: " in said
        assert "sessions of tokens: " in said
        assert (
            serving.lines[-1]["message"]
            == f"listening on {serving.url} · OpenAI: {serving.url}/v1 · Anthropic: {serving.url}"
        )
        assert httpx.get(f"{serving.url}/v1/models").status_code == 401
        headers = {"authorization": "Bearer secret", "x-request-id": "mine"}
        answer = httpx.request(**ask(serving.url, 5), headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 5
        models = httpx.get(f"{serving.url}/v1/models", headers=headers).json()
        assert [model["id"] for model in models["data"]] == ["tiny"]
        serving.process.send_signal(signal.SIGTERM)
        log = serving.end()
    facts = next(line for line in log if line.get("request_id") == "mine")
    assert (
        facts.items()
        >= {
            "level": "info",
            "method": "POST",
            "path": "/v1/chat/completions",
            "status": 200,
            "model": "tiny",
            "finish": "length",
            "prompt_tokens": answer.json()["usage"]["prompt_tokens"],
            "cached_tokens": 0,
            "new_tokens": 5,
        }.items()
    )
    assert len(facts["tenant"]) == 16
    assert log[-1]["message"] == "stopped"
    assert not any("secret" in json.dumps(line) or "Hi" in json.dumps(line) for line in log)


def test_chatting_with_it(kvist: Kvist, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time, most of the prompt is in the server's cache, and the answer is the same."""
    monkeypatch.setenv("KVIST_API_KEY", "secret")  # for both: the server inherits it
    options = ("-p", "Hi", "--system", "word " * 200, "--max-tokens", 9, "--seed", 3, "--json")
    with served(tiny) as serving:
        first, second = (json.loads(kvist("chat", "--url", serving.url, *options).out) for _ in range(2))
        monkeypatch.setenv("KVIST_API_KEY", "other")
        refused(kvist("chat", "--url", serving.url, "-p", "Hi"), "this API key is not known here")
    assert (first["model"], first["cached_tokens"]) == ("tiny", 0)
    assert second["cached_tokens"] > 100
    assert second["text"] == first["text"]


def test_the_first_signal_lets_answers_end_and_the_port_close(tiny: Path) -> None:
    with served(tiny) as serving, httpx.stream(**ask(serving.url, 900, stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        serving.process.send_signal(signal.SIGINT)
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                httpx.get(f"{serving.url}/health", timeout=60)
                time.sleep(0.02)
            except httpx.TransportError:
                break
        rest = [line for line in lines if line]
        assert time.monotonic() < until, "it still takes connections"
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "stop")
        serving.end()


def test_the_second_signal_ends_them_at_once(tiny: Path) -> None:
    with served(tiny, "--grace", "600") as serving, httpx.stream(**ask(serving.url, 100_000, stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        for _ in range(2):
            serving.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        start = time.monotonic()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
        serving.end()
        assert time.monotonic() - start < 120  # of a grace of 600
    if events[-1].get("choices", [{}])[0].get("finish_reason") is None:  # else it was quicker than the signal
        assert events[-1]["error"]["code"] == "stopping"
