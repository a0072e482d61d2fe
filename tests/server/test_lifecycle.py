"""How a server begins, bears crowds and departures, and ends: over a real engine, on a real port."""

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from kvist.server.app import create_app
from kvist.server.run import Server, is_loopback, listen, url_of
from kvist.server.settings import ServerSettings
from kvist.service.facts import Fact, StepDone
from kvist.service.serving import Serving
from live import Live, answer_of, live
from tiny_model import open_serving

LONG = 200  # tokens of an answer that is under way while other things happen
PAUSE = 0.01  # seconds that each step takes longer than it would


class Slow:
    """Facts for whoever counts, and a pause after each step: an answer of `LONG` tokens takes two seconds."""

    def __init__(self, inner: Callable[[Fact], None]) -> None:
        self._inner = inner
        self.steps = 0

    def __call__(self, fact: Fact) -> None:
        self._inner(fact)
        if isinstance(fact, StepDone):
            self.steps += 1
            time.sleep(PAUSE)


@contextlib.contextmanager
def slow(model: Path, *, running: int = 1, max_waiting: int = 8, **settings: Any) -> Iterator[Live]:
    """A server whose engine takes its time."""
    told = ServerSettings(**settings)
    serving = open_serving(model, blocks=64, running=running, max_waiting=max_waiting, timeout=told.timeout)
    app = create_app(serving, told)
    serving.listener = Slow(serving.listener)
    with live(app, serving, told) as server:
        yield server


def body(tokens: int, stream: bool = False) -> dict[str, Any]:
    message = {"role": "user", "content": "Tell me of twigs."}
    return {
        "model": "tiny",
        "messages": [message],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": stream,
        "seed": 1,
    }


def post(server: Live, tokens: int) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=body(tokens), timeout=30)


class Stream:
    """A stream under way: its first token has come, the rest is read by a thread."""

    def __init__(self, server: Live, tokens: int = LONG) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._begun = threading.Event()
        self._rest = self._pool.submit(self._read, server, tokens)
        assert self._begun.wait(20)

    def _read(self, server: Live, tokens: int) -> list[str]:
        sent = body(tokens, stream=True)
        events = []
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=sent, timeout=30) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data: "):
                    events.append(line.removeprefix("data: "))
                if len(events) > 1:  # the first names the role, before anything ran
                    self._begun.set()
        return events

    def events(self) -> list[str]:
        """All events, once it has ended."""
        events = self._rest.result(30)
        self._pool.shutdown()
        return events


def until(happened: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.01)


def is_whole(events: list[str]) -> bool:
    last = json.loads(events[-2])["choices"]
    return events[-1] == "[DONE]" and last[0]["finish_reason"] == "length"


def test_it_answers_and_says_so(tiny_model: Path) -> None:
    serving = open_serving(tiny_model)
    assert not serving.alive
    app, settings = create_app(serving, ServerSettings()), ServerSettings()
    with live(app, serving, settings) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/version").json().keys() == {"version"}
        assert "kvist:num_requests_running 0.0" in client.get("/metrics").text
        paths = client.get("/openapi.json").json()["paths"]
        assert paths.keys() >= {"/v1/chat/completions", "/v1/messages", "/health", "/metrics", "/tokenize"}
        assert client.get("/redoc").status_code == 404
        answer = client.post("/v1/chat/completions", json=body(7)).json()
        assert answer["usage"]["completion_tokens"] == 7
        metrics = client.get("/metrics").text
        assert "kvist:generation_tokens_total 7.0" in metrics
        assert 'kvist:http_requests_total{route="/v1/chat/completions",status="200"} 1.0' in metrics
    assert not serving.alive


def test_texts_to_tokens_and_back(live_server: Live) -> None:
    def ask(path: str, **sent: Any) -> Any:
        content, headers = json.dumps(sent).encode(), {"content-type": "application/json"}
        response = httpx.post(f"{live_server.url}{path}", content=content, headers=headers)
        return response.json() if response.status_code == 200 else response.status_code

    text = "A twig 🌿 of <|im_end|>"
    tokens = ask("/tokenize", prompt=text)
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == 2048
    assert tokens["tokens"] == live_server.serving.tokenizer.encode(text)
    assert ask("/detokenize", tokens=tokens["tokens"]) == {"prompt": text, "content": text}
    spelled = ask("/tokenize", prompt="abc", model="tiny", return_token_strs=True)
    assert "".join(spelled["token_strs"]) == "abc"
    assert ask("/tokenize", prompt="\ud800") == 400
    assert ask("/detokenize", tokens=[10**6]) == {"prompt": "", "content": ""}
    for wrong in ([-1], [2**32], ["a"], None):
        assert ask("/detokenize", tokens=wrong) == 400


def test_a_crowd_is_told_when_to_come_again(tiny_model: Path) -> None:
    with slow(tiny_model, max_waiting=1) as server, ThreadPoolExecutor(1) as pool:
        stream = Stream(server)
        waiting = pool.submit(post, server, 3)
        until(lambda: server.serving.load().waiting == 1, "waiting")
        refused = post(server, 3)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "overloaded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        ours = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with ours, pytest.raises(openai.RateLimitError):
            ours.completions.create(model="tiny", prompt="a", max_tokens=1)
        with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as theirs:
            message = {"role": "user", "content": "a"}
            with pytest.raises(anthropic.RateLimitError, match="rate_limit_error"):
                theirs.messages.create(model="tiny", messages=[message], max_tokens=1)  # type: ignore[list-item]
        assert is_whole(stream.events())
        assert waiting.result(20).status_code == 200


def test_the_first_signal_lets_answers_end_and_refuses_the_rest(tiny_model: Path) -> None:
    with slow(tiny_model) as server, ThreadPoolExecutor(2) as pool:
        with httpx.Client(base_url=server.url) as idle, socket.create_connection(("127.0.0.1", server.port)) as half:
            idle.get("/health")
            half.sendall(b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n")
            stream = Stream(server)
            waiting = [pool.submit(post, server, 3) for _ in range(2)]
            until(lambda: server.serving.load().waiting == 2, "waiting")
            start = time.monotonic()
            server.stop()
            for each in waiting:
                refused = each.result(20)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
            assert time.monotonic() - start < 1.5, "they waited for the answer under way"
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{server.url}/health")
            events = stream.events()
            assert is_whole(events)
            assert sum('"content":' in event for event in events) > LONG / 4
            assert server.ended(), "an idle connection or half a request held it up"
        server.serving._engine.check()
        assert not server.serving.alive


def test_when_the_grace_is_over_streams_get_their_end(tiny_model: Path) -> None:
    with slow(tiny_model, grace=0.3) as server:
        stream = Stream(server)
        server.stop()
        events = stream.events()
        assert server.ended()
        assert not any("finish_reason" in event and "length" in event for event in events)
        assert json.loads(events[-1])["error"]["code"] == "stopping"


def test_the_second_signal_does_not_wait(tiny_model: Path) -> None:
    with slow(tiny_model, grace=600) as server:
        stream = Stream(server)
        server.stop()
        time.sleep(0.3)
        assert not server.ended(0), "it should wait for the stream"
        server.stop()
        start = time.monotonic()
        events = stream.events()
        assert json.loads(events[-1])["error"]["code"] == "stopping"
        assert server.ended()
        assert time.monotonic() - start < 3


def test_the_third_signal_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, int]] = []
    monkeypatch.setattr("signal.signal", lambda number, handler: done.append((handler.name, number)))
    monkeypatch.setattr("signal.raise_signal", lambda number: done.append(("raised", number)))

    async def stop(grace: float) -> None:
        pass

    server = Server(None, stop, ServerSettings(), lambda: None)  # type: ignore[arg-type]
    for expected in ((True, False), (True, True)):
        server.handle_exit(signal.SIGTERM, None)
        assert (server.should_exit, server.force_exit) == expected
        assert not done
    server.handle_exit(signal.SIGINT, None)
    assert done == [("SIG_DFL", signal.SIGINT), ("raised", signal.SIGINT)]


def test_whoever_leaves_while_waiting_frees_the_place(tiny_model: Path) -> None:
    with slow(tiny_model) as server:
        stream = Stream(server)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            content = json.dumps(body(3)).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n"
            connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + content)
            until(lambda: server.serving.load().waiting == 1, "waiting")
        until(lambda: server.serving.load().waiting == 0, "leaving", seconds=2)
        assert is_whole(stream.events())


def test_whoever_leaves_in_the_middle_frees_the_engine(tiny_model: Path) -> None:
    with slow(tiny_model) as server:
        sent = body(2000, stream=True)
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=sent) as response:
            lines = response.iter_lines()
            until(lambda: server.serving.load().running == 1 and bool(next(lines)), "an answer")
        until(lambda: server.serving.load().running == 0, "leaving", seconds=2)
        assert server.serving.load().kv_blocks_used == 0
        assert post(server, 3).status_code == 200
        assert server.serving.listener.steps < 500, "it went on for nobody"


def test_what_takes_too_long_is_ended(tiny_model: Path) -> None:
    """An answer gets 504, a stream an error as its last event, and the engine is free again."""
    with slow(tiny_model, timeout=0.5) as server:
        late = post(server, LONG)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        assert late.headers["x-should-retry"] == "false"
        events = Stream(server).events()
        assert len(events) > 3
        assert json.loads(events[-1])["error"]["code"] == "timeout"
        until(lambda: server.serving.load().running == 0, "ending")
        assert post(server, 3).status_code == 200


def test_a_dead_engine_is_told(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with slow(tiny_model) as server:
        serving: Serving = server.serving

        def broken(*_: object) -> None:
            raise ZeroDivisionError("secret detail")

        monkeypatch.setattr(serving._engine, "step", broken)
        monkeypatch.setattr(serving._engine, "check", broken)
        answer = post(server, 3)
        assert answer.status_code in (500, 503)
        until(lambda: not serving.alive, "dying")
        health = httpx.get(f"{server.url}/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "not_running")
        again = post(server, 3)
        assert again.status_code == 503
        assert "secret" not in answer.text + health.text + again.text


def test_addresses() -> None:
    with listen("127.0.0.1", 0) as one, listen("localhost", 0) as other, listen("0.0.0.0", 0) as everywhere:
        assert [is_loopback(each) for each in (one, other, everywhere)] == [True, True, False]
        assert url_of(one) == f"http://127.0.0.1:{one.getsockname()[1]}"
        assert url_of(everywhere) == f"http://127.0.0.1:{everywhere.getsockname()[1]}"
    try:
        six = listen("::1", 0)
    except Exception as error:
        pytest.skip(f"no IPv6 here: {error}")
    with six:
        assert is_loopback(six)
        assert url_of(six) == f"http://[::1]:{six.getsockname()[1]}"


def test_connections_are_kept_and_bodies_told_apart(live_server: Live) -> None:
    """Two requests on one connection, the second sent before the first is answered."""
    content = json.dumps({"prompt": "abc"}).encode()
    head = f"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n"
    request = f"{head}content-type: application/json\r\n".encode()
    with socket.create_connection(("127.0.0.1", live_server.port), timeout=10) as connection:
        connection.sendall(request + b"\r\n" + content + request + b"connection: close\r\n\r\n" + content)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    first, second = received.split(b"HTTP/1.1 ")[1:]
    answers = [answer_of(b"HTTP/1.1 " + each) for each in (first, second)]
    assert [status for status, _, _ in answers] == [200, 200]
    assert answers[0][2] == answers[1][2]
