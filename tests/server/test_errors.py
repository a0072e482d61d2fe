"""What clients are told: statuses, both shapes of bodies, where in a request a mistake is."""

import asyncio
import json
import logging
from typing import Annotated, Any, Literal

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field

from kvist.base.errors import (
    ConfigError,
    ContextError,
    NumericsError,
    Overloaded,
    PromptTooLong,
    RequestError,
    Stopping,
    TextError,
    TimedOut,
)
from kvist.server.errors import (
    ANTHROPIC_RESPONSES,
    RESPONSES,
    ApiError,
    anthropic_error,
    install,
    openai_error,
    problem_of,
)
from kvist.server.logs import RequestLog

MESSAGES = "/v1/messages"


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    type: Literal["image"]
    url: str


class Message(BaseModel):
    role: Literal["user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class Body(BaseModel, extra="forbid"):
    messages: list[Message]
    temperature: float = Field(1.0, ge=0, le=2)
    extra: dict[str, Any] = {}


RAISED = {
    "request": (RequestError("a seed is odd"), 400, "invalid_request_error", None),
    "too long": (PromptTooLong(9, 7, 8), 400, "invalid_request_error", "context_length_exceeded"),
    "context": (ContextError("too long"), 400, "invalid_request_error", "context_length_exceeded"),
    "text": (TextError("no character"), 400, "invalid_request_error", None),
    "overloaded": (Overloaded("9 wait", 7), 429, "rate_limit_error", "overloaded"),
    "stopping": (Stopping("shutting down"), 503, "server_error", "stopping"),
    "late": (TimedOut("took too long"), 504, "server_error", "timeout"),
    "numerics": (NumericsError("no numbers"), 500, "server_error", "numerics"),
    "unknown": (ApiError(404, "no such model", code="model_not_found", param="model"), 404, "not_found_error", None),
    "defect": (ZeroDivisionError("secret detail"), 500, "server_error", "internal_error"),
    "config": (ConfigError("secret detail"), 500, "server_error", "internal_error"),
    "deep": (RecursionError("secret detail"), 400, "invalid_request_error", None),
}
ANTHROPIC = {400: "invalid_request_error", 404: "not_found_error", 429: "rate_limit_error", 500: "api_error"}
ANTHROPIC |= {503: "overloaded_error", 504: "timeout_error"}


@pytest.fixture(scope="module")
def app() -> FastAPI:
    app = FastAPI(redirect_slashes=False)
    install(app)

    @app.post("/v1/chat/completions")
    @app.post(MESSAGES)
    async def echo(body: Body) -> int:
        return len(body.messages)

    @app.get("/raise/{what}")
    @app.get(MESSAGES + "/{what}")
    async def fail(what: str) -> None:
        raise RAISED[what][0]

    @app.get("/number/{value}")
    async def number(value: int) -> int:
        return value

    app.add_middleware(RequestLog, answered=lambda route, status: None)
    return app


class Client:
    """Asks the application without a network."""

    def __init__(self, app: FastAPI) -> None:
        self._transport = httpx.ASGITransport(app)

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=self._transport, base_url="http://localhost") as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())


@pytest.fixture
def ask(app: FastAPI) -> Client:
    return Client(app)


@pytest.mark.parametrize("what", RAISED)
def test_each_error_has_its_status_in_both_shapes(ask: Client, what: str, caplog: pytest.LogCaptureFixture) -> None:
    error, status, kind, code = RAISED[what]
    caplog.set_level(logging.ERROR, "kvist.server")
    response = ask("GET", f"/raise/{what}")
    body = response.json()
    assert response.status_code == status
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["type"] == kind
    if code is not None:
        assert body["error"]["code"] == code
    other = ask("GET", f"{MESSAGES}/{what}")
    assert other.status_code == status
    assert other.json()["type"] == "error"
    assert other.json()["error"]["type"] == ANTHROPIC[status]
    assert other.json()["request_id"] == other.headers["x-request-id"] == other.headers["request-id"]
    hidden = isinstance(error, ZeroDivisionError | ConfigError | RecursionError)
    assert ("secret detail" in response.text + other.text) == 0
    assert (str(error) in body["error"]["message"]) != hidden
    # A defect's own words stand in the log, with the request's id; a client's mistake is not worth a line.
    logged = [record for record in caplog.records if record.exc_info]
    assert len(logged) == (2 if status == 500 else 0)
    if logged:
        assert vars(logged[1])["facts"]["request_id"] == other.headers["x-request-id"]


def test_headers_tell_when_to_come_again(ask: Client) -> None:
    assert ask("GET", "/raise/overloaded").headers["retry-after"] == "7"
    assert ask("GET", "/raise/late").headers["x-should-retry"] == "false"


def complaint(response: httpx.Response, status: int) -> tuple[str | None, str]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


def test_what_does_not_fit_the_schema_is_400_and_says_where(ask: Client) -> None:
    def sent(body: Any) -> tuple[str | None, str]:
        return complaint(ask("POST", "/v1/chat/completions", json=body), 400)

    good = {"role": "user", "content": "a"}
    assert sent({})[0] == "messages"
    assert sent({"messages": [good], "temperature": 3}) == (
        "temperature",
        "temperature: Input should be less than or equal to 2",
    )
    assert sent({"messages": [good, {"role": "user"}]})[0] == "messages.1.content"
    assert sent({"messages": [good, {"role": "owner", "content": ""}]})[0] == "messages.1.role"
    # Of the alternatives, the one that came furthest is told, and by the request's own names.
    nested = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]}
    assert sent({"messages": [nested]})[0] == "messages.0.content.1.text"
    assert sent({"messages": [{"role": "user", "content": 3}]})[0] == "messages.0.content"
    assert sent([1])[0] is None
    assert sent({"messages": [good], "surprise": 1})[0] == "surprise"
    assert complaint(ask("POST", "/v1/chat/completions"), 400)[1] == "the body must be JSON, sent as application/json"
    assert complaint(ask("GET", "/number/x"), 400)[0] is None
    both = ask("POST", MESSAGES, json={"messages": 1}).json()["error"]
    assert both["message"].startswith("messages: ")


def test_a_plain_text_body_is_not_read_as_json(ask: Client) -> None:
    """A page in a browser may send text/plain anywhere without asking first; JSON it may not."""
    body = json.dumps({"messages": []})
    response = ask("POST", "/v1/chat/completions", content=body, headers={"content-type": "text/plain"})
    assert complaint(response, 400)[1] == "the body must be JSON, sent as application/json"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "cannot be read as JSON"),
        (b"", "must be JSON"),
        (b'{"a": \xff}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"1" * 5000, "cannot be read as JSON"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", MESSAGES])
def test_what_is_no_json_is_400(ask: Client, path: str, body: bytes, said: str) -> None:
    response = ask("POST", path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]


def test_words_of_the_client_come_back_short_and_as_ascii(ask: Client) -> None:
    """A lone surrogate can be written in JSON and in no UTF-8; a key may be as long as a body."""
    good = {"role": "user", "content": "a"}
    for key in ("\ud800", "x" * 100_000, "line\nline"):
        body = json.dumps({"messages": [good], key: 1}).encode()
        response = ask("POST", "/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert response.content.isascii()
        assert len(response.content) < 2000
        assert "\n" not in response.json()["error"]["message"]
    message = openai_error(problem_of(RequestError("a" * 5000)))["error"]["message"]
    assert len(message) == 1003


def test_routes_and_methods_that_are_not_there(ask: Client) -> None:
    assert complaint(ask("GET", "/nothing"), 404) == (None, "there is no such route")
    wrong = ask("GET", "/v1/chat/completions")
    assert complaint(wrong, 405)[1] == "this route takes POST"
    assert wrong.headers["allow"] == "POST"
    for method in ("OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"):
        assert ask(method, "/v1/chat/completions").status_code == 405
    assert ask("HEAD", "/v1/chat/completions").status_code == 405
    assert ask("POST", "/v1/chat/completions/").status_code == 404
    assert ask("GET", f"{MESSAGES}x").json().keys() == {"error"}


def test_request_ids_of_clients_are_taken_when_they_are_plain(ask: Client) -> None:
    assert ask("GET", "/nothing", headers={"x-request-id": "a-1"}).headers["x-request-id"] == "a-1"
    for foreign in ("", "x" * 65, "a b", "a\u00e9", '"'):
        given = ask("GET", "/nothing", headers={b"x-request-id": foreign.encode()}).headers["x-request-id"]
        assert given.startswith("req_")
        assert len(given) == 28


def test_both_shapes_fit_what_is_declared(ask: Client) -> None:
    def fits(value: Any, schema: Any) -> bool:
        if schema.get("type") == "object":
            return set(schema["required"]) <= value.keys() and all(
                fits(value[name], inner) for name, inner in schema["properties"].items() if name in value
            )
        return value == schema["const"] if "const" in schema else value is None or isinstance(value, str)

    assert RESPONSES.keys() == ANTHROPIC_RESPONSES.keys() >= {error[1] for error in RAISED.values()}
    schemas = [
        responses[400]["content"]["application/json"]["schema"] for responses in (RESPONSES, ANTHROPIC_RESPONSES)
    ]
    for error, *_ in RAISED.values():
        problem = problem_of(error)
        bodies = openai_error(problem), anthropic_error(problem, "req_1")
        assert [[fits(body, schema) for schema in schemas] for body in bodies] == [[True, False], [False, True]]
