"""Who may ask, how much, how long: the middlewares over routes of their own, on a real port."""

import asyncio
import json
import logging
import math
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from kvist.base.errors import Overloaded
from kvist.cache.record import Loss
from kvist.server.errors import RESPONSES, install
from kvist.server.limits import guard, tenant_of
from kvist.server.logs import JsonFormatter, LineFormatter, RequestLog, note
from kvist.server.settings import ServerSettings
from kvist.service.explanation import WHY, Explanation
from kvist.service.tenants import Tenant
from live import Live, answer_of, exchange, live

MOST = 10_000
JSON = {"content-type": "application/json"}


class Standing:
    """What a server asks of a `Serving` when it ends."""

    async def stop(self, grace: float) -> None:
        pass


class Counted:
    """A session as far as the log reads it."""

    prompt_tokens, cached_tokens, new_tokens = 1204, 1088, 0
    tiers = {"memory": 64, "disk": 1024}  # noqa: RUF012
    explanation = Explanation(
        "id", None, 1204, tiers, 116, Loss.EVICTED, WHY[Loss.EVICTED], None, None, None, None, None
    )

    def cancel(self) -> None:
        pass


class Routes:
    """An application with the real middlewares; it counts what its routes see."""

    def __init__(self) -> None:
        self.cancelled, self.waiting = threading.Event(), threading.Event()
        self.answered: list[tuple[str, int]] = []
        self.bodies = 0

    def app(self, settings: ServerSettings) -> FastAPI:
        app = FastAPI(redirect_slashes=False, responses=RESPONSES)
        install(app)

        @app.post("/v1/chat/completions")
        @app.post("/v1/messages")
        async def echo(body: dict[str, Any], request: Request) -> dict[str, Any]:
            self.bodies += 1
            if body.get("model") == "overloaded":
                raise Overloaded("9 requests wait already", 3)
            return {"size": len(await request.body()), "tenant": tenant_of(request)}

        @app.post("/wait")
        async def wait(request: Request) -> None:
            self.waiting.set()
            try:
                await asyncio.sleep(30)
            finally:
                self.cancelled.set()

        @app.get("/stream")
        async def stream(request: Request) -> StreamingResponse:
            session = Counted()
            noted = note(request, session, "tiny")  # type: ignore[arg-type]

            async def pieces() -> AsyncIterator[bytes]:
                try:
                    yield b"head"
                    for _ in range(3 if request.query_params.get("short") else 3000):
                        session.new_tokens += 1
                        yield b"x" * 1000
                        await asyncio.sleep(0.01)
                    noted.finish = "stop"
                finally:
                    self.cancelled.set()

            return StreamingResponse(pieces())

        @app.get("/flood")
        async def flood() -> StreamingResponse:
            async def pieces() -> AsyncIterator[bytes]:
                while True:
                    yield b"x" * (1 << 16)

            return StreamingResponse(pieces())

        @app.get("/broken")
        async def broken() -> StreamingResponse:
            async def pieces() -> AsyncIterator[bytes]:
                yield b"head"
                raise ZeroDivisionError

            return StreamingResponse(pieces())

        @app.get("/health")
        @app.get("/facts")
        async def open_or_not() -> str:
            return "ok"

        guard(app, settings)
        app.add_middleware(RequestLog, answered=lambda route, status: self.answered.append((route, status)))
        return app


@pytest.fixture(scope="module")
def routes() -> Routes:
    return Routes()


@pytest.fixture(scope="module")
def server(routes: Routes) -> Iterator[Live]:
    settings = ServerSettings(max_body_bytes=MOST, body_timeout=0.5, hosts=("kvist.test",))
    with live(routes.app(settings), Standing(), settings) as running:
        yield running


@pytest.fixture(scope="module")
def locked() -> Iterator[Live]:
    settings = ServerSettings(api_keys=("first-key", "second-key"), origins=("https://Page.test/",))
    with live(Routes().app(settings), Standing(), settings) as running:
        yield running


def body_of(size: int) -> bytes:
    """A JSON object of exactly that many bytes."""
    return json.dumps({"a": "x" * (size - len('{"a": ""}'))}).encode()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_are_taken_up_to_the_limit_and_no_further(
    server: Live, routes: Routes, path: str, chunked: bool
) -> None:
    def post(size: int) -> httpx.Response:
        body = body_of(size)
        content = iter([body[:100], body[100:]]) if chunked else body
        return httpx.post(f"{server.url}{path}", content=content, headers=JSON)

    largest = post(MOST)
    assert (largest.status_code, largest.json()["size"]) == (200, MOST)
    before = routes.bodies
    for size in (MOST + 1, 40 * MOST):
        refused = post(size)
        assert refused.status_code == 413
        assert refused.headers["connection"] == "close"
        error = refused.json()["error"]
        assert "9.8 KiB" in error["message"]
        assert error["type"] == ("request_too_large" if path == "/v1/messages" else "invalid_request_error")
    assert routes.bodies == before


def test_a_body_without_end_is_not_read_on(server: Live) -> None:
    """What is declared too large is refused on its head alone; what turns out so, in the middle. Both close."""
    head = b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    declared = exchange(server.port, head + b"content-length: 99999999999\r\n\r\n")
    assert answer_of(declared)[0] == 413
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        sent, start = 0, time.monotonic()
        try:
            while time.monotonic() - start < 10:
                connection.sendall(b"2000\r\n" + b"x" * 0x2000 + b"\r\n")
                sent += 0x2000
                time.sleep(0.01)
        except OSError:
            pass
    assert time.monotonic() - start < 5, "the server went on reading"
    assert sent > MOST


def test_a_body_that_does_not_come_is_given_up(server: Live) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n123"
    start = time.monotonic()
    status, headers, body = answer_of(exchange(server.port, head))
    assert (status, headers["connection"]) == (408, "close")
    assert body["error"]["message"] == "the body did not arrive within 0.5 seconds"
    assert 0.4 < time.monotonic() - start < 5


def test_expecting_clients_hear_the_verdict_before_they_send(server: Live) -> None:
    head = b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: "
    assert exchange(server.port, head + b"99999\r\n\r\n").startswith(b"HTTP/1.1 413")
    go = exchange(server.port, head + b"9\r\n\r\n", until=lambda received: b"\r\n\r\n" in received)
    assert go.startswith(b"HTTP/1.1 100")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("body", [b"", b"{", b'{"a": "\xff"}', b"[" * 9000, b'{"a":' * 1900, b"\x00", b"NaN", b"[1]"])
def test_garbage_is_the_clients_mistake(server: Live, path: str, body: bytes) -> None:
    response = httpx.post(f"{server.url}{path}", content=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_bytes_that_are_no_http(server: Live) -> None:
    post = b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: "
    for sent in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET /\r\n", post + b"x", post + b"9" * 5000, post + b"-1"):
        received = exchange(server.port, sent + b"\r\n\r\n")
        assert received.startswith(b"HTTP/1.1 400") or received == b""
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_official_clients_know_these_errors(server: Live, locked: Live) -> None:
    def clients(url: str, key: str) -> tuple[openai.OpenAI, anthropic.Anthropic]:
        return (
            openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0),
            anthropic.Anthropic(base_url=url, api_key=key, max_retries=0),
        )

    def ask(model: str, text: str, url: str = server.url, key: str = "none") -> list[Exception]:
        ours, theirs = clients(url, key)
        with ours, theirs:
            with pytest.raises(openai.APIStatusError) as first:
                ours.chat.completions.create(model=model, messages=[{"role": "user", "content": text}])
            with pytest.raises(anthropic.APIStatusError) as second:
                theirs.messages.create(model=model, messages=[{"role": "user", "content": text}], max_tokens=1)
        return [first.value, second.value]

    too_large = ask("any", "x" * 5 * MOST)
    assert [error.status_code for error in too_large] == [413, 413]
    assert isinstance(too_large[1], anthropic.RequestTooLargeError)
    busy = ask("overloaded", "a")
    assert [type(error).__name__ for error in busy] == ["RateLimitError", "RateLimitError"]
    assert [error.response.headers["retry-after"] for error in busy] == ["3", "3"]
    unknown = ask("any", "a", locked.url, "wrong")
    assert [type(error).__name__ for error in unknown] == ["AuthenticationError", "AuthenticationError"]
    assert unknown[0].code == "invalid_api_key"
    assert unknown[1].request_id == unknown[1].response.headers["x-request-id"]


def test_keys_let_in_and_name_the_tenant(server: Live, locked: Live) -> None:
    def tenant(headers: dict[str, str], url: str = locked.url) -> str | int:
        response = httpx.post(f"{url}/v1/messages", json={}, headers=headers)
        return response.json()["tenant"] if response.status_code == 200 else response.status_code

    first = tenant({"authorization": "Bearer first-key"})
    assert isinstance(first, str)
    assert len(first) == 16
    assert "first" not in first
    assert tenant({"x-api-key": "first-key"}) == tenant({"authorization": "bearer   first-key"}) == first
    # Whoever has both set, one of them for another server, is let in by the one that is right.
    assert tenant({"x-api-key": "first-key", "authorization": "Bearer other"}) == first
    assert tenant({"x-api-key": "other", "authorization": "Bearer first-key"}) == first
    assert tenant({"x-api-key": "second-key"}) not in (first, 401)
    for wrong in ({}, {"x-api-key": ""}, {"x-api-key": "first-key2"}, {"x-api-key": "first-ke"}):
        assert tenant(wrong) == 401
    for wrong in ("first-key", "Basic first-key", "Bearer", "Bearer first-key second-key"):
        assert tenant({"authorization": wrong}) == 401
    assert tenant({"x-api-key": "anything"}, server.url) == ""


def test_only_health_is_open_to_all(locked: Live) -> None:
    assert httpx.get(f"{locked.url}/health", headers={"host": "elsewhere.test"}).status_code == 200
    for path in ("/facts", "/openapi.json", "/nothing"):
        refused = httpx.get(f"{locked.url}{path}")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{locked.url}{path}", headers={"x-api-key": "second-key"}).status_code in (200, 404)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("app.localhost", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("192.168.3.4", 200),
        ("KVIST.test:80", 200),
        ("kvist.test.", 200),
        ("evil.test", 403),
        ("evil.test:8000", 403),
        ("localhost.evil.test", 403),
        ("127.0.0.1.evil.test", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_without_keys_only_known_names_are_answered(server: Live, locked: Live, host: str, status: int) -> None:
    """A name that a page's owner controls may be made to lead here; an address may not."""
    assert httpx.get(f"{server.url}/facts", headers={"host": host}).status_code == status
    keyed = httpx.get(f"{locked.url}/facts", headers={"host": host, "x-api-key": "first-key"})
    assert keyed.status_code == 200


def test_pages_of_other_origins_may_not_ask(server: Live, locked: Live) -> None:
    def ask(running: Live, origin: str, method: str = "POST", **headers: str) -> httpx.Response:
        headers = {"origin": origin, "x-api-key": "first-key"} | headers
        return httpx.request(method, f"{running.url}/v1/messages", json={}, headers=headers)

    own = f"http://127.0.0.1:{server.port}"
    assert ask(server, own).status_code == 200
    foreign = ("https://page.test", "null", f"http://127.0.0.1:{server.port + 1}", "http://[", "file://")
    for origin in foreign:
        assert ask(server, origin).status_code == 403
        # Neither may it ask beforehand.
        assert ask(server, origin, "OPTIONS", **{"access-control-request-method": "POST"}).status_code == 403
    allowed = ask(locked, "https://page.test")
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://page.test")
    before = ask(locked, "https://page.test", "OPTIONS", **{"access-control-request-method": "POST", "x-api-key": ""})
    assert (before.status_code, before.headers["access-control-allow-origin"]) == (200, "https://page.test")
    assert ask(locked, "https://other.test").status_code == 403
    # An allowed page reads why it was refused.
    refused = ask(locked, "https://page.test", **{"x-api-key": "wrong"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://page.test")


def test_work_ends_when_its_client_leaves(server: Live, routes: Routes) -> None:
    """Before the answer, and in the middle of one."""
    for request in (b"POST /wait HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}", None):
        routes.cancelled.clear()
        if request is None:
            request = b"GET /stream HTTP/1.1\r\nhost: localhost\r\n\r\n"
            exchange(server.port, request, until=lambda received: received.count(b"x") > 5000)
        else:
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(request)
                assert not routes.cancelled.wait(0.2), "nobody has left yet"
        assert routes.cancelled.wait(60)


def test_work_ends_when_it_takes_far_too_long() -> None:
    routes, settings = Routes(), ServerSettings(timeout=0.2)
    with live(routes.app(settings), Standing(), settings) as running:
        response = httpx.post(f"{running.url}/wait", json={})
        assert response.status_code == 504
        assert response.headers["x-should-retry"] == "false"
        assert routes.cancelled.is_set()


def _until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_reader_that_does_not_read_holds_nothing_for_long() -> None:
    settings = ServerSettings(timeout=0.5, grace=0)
    with (
        live(Routes().app(settings), Standing(), settings) as running,
        socket.create_connection(("127.0.0.1", running.port)) as connection,
    ):
        connection.sendall(b"GET /flood HTTP/1.1\r\nhost: localhost\r\n\r\n")
        tasks = running.server.server_state.tasks
        _until(lambda: len(tasks) == 1)
        _until(lambda: not tasks)
        # Nor does it hold up the end: see `_DRAIN`.
        running.stop()
        assert running.ended(10)


def test_a_stream_that_breaks_ends_without_its_end(server: Live, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "kvist.server")
    with pytest.raises(httpx.RemoteProtocolError), httpx.stream("GET", f"{server.url}/broken") as response:
        response.read()
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


def test_connections_serve_many_requests(server: Live) -> None:
    with httpx.Client(base_url=server.url) as client:
        for _ in range(3):
            assert client.post("/v1/messages", json={}).status_code == 200
            assert client.post("/v1/messages", content=b"{", headers=JSON).status_code == 400
            assert client.get("/stream?short=1").text.count("x") == 3000
    both = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * 2
    assert exchange(server.port, both, until=lambda received: received.count(b'"ok"') == 2).count(b" 200 OK") == 2


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The facts of requests that have ended, once there is one."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if facts := [vars(record)["facts"] for record in caplog.records if record.message == "request"]:
            return facts
        time.sleep(0.01)
    raise AssertionError("nothing was logged")


def test_a_line_for_each_request(server: Live, routes: Routes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvist.server")
    httpx.get(f"{server.url}/stream?short=1&prompt=secret", headers={"x-request-id": "mine", "x-api-key": "secret"})
    (facts,) = map(dict, logged(caplog))
    first, whole = facts.pop("first_token_seconds"), facts.pop("seconds")
    assert 0 < first < whole < 5
    assert facts == {
        "request_id": "mine",
        "method": "GET",
        "path": "/stream",
        "status": 200,
        "model": "tiny",
        "finish": "stop",
        "prompt_tokens": 1204,
        "cached_tokens": 1088,
        "cached_by_tier": {"memory": 64, "disk": 1024},
        "computed_why": "evicted",
        "new_tokens": 3,
    }
    assert ("/stream", 200) in routes.answered
    record = next(record for record in caplog.records if record.message == "request")
    line = LineFormatter().format(record)
    tokens = "1,204 prompt tokens (1,088 cached: 64 memory, 1,024 disk; evicted) + 3 new"
    assert f"GET /stream 200 · {tokens} · stop · first after" in line
    assert line.endswith("· mine")
    parsed = json.loads(JsonFormatter().format(record))
    assert parsed.items() >= facts.items()
    assert parsed.keys() - facts.keys() == {"time", "level", "message", "seconds", "first_token_seconds"}
    assert "secret" not in line + json.dumps(parsed)


def test_the_log_tells_who_left_and_cannot_be_forged(
    server: Live, routes: Routes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvist.server")
    routes.answered.clear()
    routes.waiting.clear()
    path = b"/wait%0aforged%1b[31m" + b"x" * 200
    exchange(server.port, b"GET " + path + b" HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    (facts,) = map(dict, logged(caplog))
    assert facts["path"] == "/wait?forged?[31m" + "x" * 83 + "..."
    caplog.clear()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /wait HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}")
        assert routes.waiting.wait(60)
    (facts,) = map(dict, logged(caplog))
    assert (facts["status"], facts["finish"]) == (499, "disconnected")
    assert routes.answered == [("none", 404), ("/wait", 499)]
    httpx.get(f"{server.url}/health")
    assert len(logged(caplog)) == 1, "health checks would drown the rest"


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key that is sent is compared with each that is known, by digests, whichever fits."""
    compared: list[tuple[int, int]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr("kvist.server.limits.hmac.compare_digest", compare)
    settings = ServerSettings(api_keys=("first-key", "second-key", "third-key"), timeout=math.inf)
    with live(Routes().app(settings), Standing(), settings) as running:
        for key in ("first-key", "third-key", "x"):
            compared.clear()
            httpx.get(f"{running.url}/facts", headers={"x-api-key": key})
            assert compared == [(32, 32)] * 3


def test_what_tenants_do_together_is_shown_to_operators_alone() -> None:
    app = Routes().app

    def ask(settings: ServerSettings, key: str) -> int:
        with live(app(settings), Standing(), settings) as running:
            return httpx.get(f"{running.url}/metrics", headers={"x-api-key": key}).status_code

    several = ServerSettings(
        api_keys=("one", "two", "three"), tenants={"one": Tenant("a"), "two": Tenant("b", operator=True)}
    )
    assert [ask(several, key) for key in ("one", "two", "three")] == [403, 404, 403]
    alone = ServerSettings(api_keys=("one", "two"), tenants={"one": Tenant("a"), "two": Tenant("a")})
    assert ask(alone, "one") == 404
