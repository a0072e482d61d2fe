"""What goes wrong, as a client is told it: one mapping from errors to statuses, and the shapes of their bodies.

| status | what it means | raised as |
|---|---|---|
| 400 | no JSON, or JSON that asks for what cannot be, such as too long a prompt | `RequestError`, `TextError` |
| 400 | JSON that does not fit the schema; `param` says where | pydantic's `RequestValidationError` |
| 401, 403 | no valid API key; a host or an origin that may not ask | `ApiError` |
| 404, 405 | no such model or route; a route without that method | `ApiError`, starlette's `HTTPException` |
| 408 | the request itself did not arrive in time | `ApiError` |
| 413 | the body is larger, or holds more values, than the server takes | `ApiError` |
| 429 | the queue is full; `Retry-After` says when to come again | `Overloaded` |
| 429 | the room on disk is full; no `Retry-After`, as it stays so until something is removed | `NoRoom` |
| 500 | a defect, or a model whose numbers are none: details are in the log, under the request's id | anything else |
| 503 | the server is shutting down | `Stopping` |
| 504 | the request took longer than it may | `TimedOut` |

Nothing is a 422: every API answers 400 to a body that does not fit, and clients look for that.
"""

import http
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from kvist.base.errors import (
    ContextError,
    KvistError,
    NoRoom,
    NumericsError,
    Overloaded,
    PromptTooLong,
    RequestError,
    Stopping,
    TextError,
    TimedOut,
)

log = logging.getLogger("kvist.server")

ANTHROPIC_PATH = "/v1/messages"
OLLAMA_PATH = "/api"
LLAMACPP_PATHS = ("/completion", "/apply-template", "/props", "/slots")
_MOST_MESSAGE = 1000  # characters of a message, which may quote the client's own words
_MOST_PARAM = 200
_NO_RETRY = {"x-should-retry": "false"}  # the official clients would ask the same again, at once
_NOT_JSON = "the body cannot be read as JSON"


class ApiError(KvistError):
    """An error that only HTTP knows. `status`: of the response; `code`, `param`: as OpenAI's bodies have them;
    `headers`: of the response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Problem:
    """What a client is told. `param`: the part of the request at fault, as in `messages.0.content`; `addition`: what
    OpenAI's clients are told beside the message."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    addition: str = ""


def problem_of(error: BaseException) -> Problem:
    """What a client is told about `error`. A defect of ours is told without its message, which the log has."""
    if isinstance(error, ApiError):
        return Problem(error.status, str(error), error.code, error.param, error.headers)
    if isinstance(error, PromptTooLong):
        # The words by which agents know that they must shorten a conversation, and by which they learn how much.
        limit = f" This model's maximum context length is {error.context} tokens."
        return Problem(400, str(error), "context_length_exceeded", error.param, addition=limit)
    if isinstance(error, ContextError):
        return Problem(400, str(error), "context_length_exceeded", error.param)
    if isinstance(error, RequestError):
        return Problem(400, str(error), None, error.param)
    if isinstance(error, TextError):
        return Problem(400, str(error))
    if isinstance(error, Overloaded):
        return Problem(429, str(error), "overloaded", headers={"retry-after": str(error.retry_after)})
    if isinstance(error, NoRoom):
        return Problem(429, str(error), "no_room", headers=_NO_RETRY)
    if isinstance(error, Stopping):
        return Problem(503, str(error), "stopping")
    if isinstance(error, TimedOut):
        return Problem(504, str(error), "timeout", headers=_NO_RETRY)
    if isinstance(error, NumericsError):
        return Problem(500, str(error), "numerics", headers=_NO_RETRY)
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return _of_http(error)
    if isinstance(error, RecursionError):
        return Problem(400, "the request is nested too deeply")
    return Problem(500, "the server failed; its log says why, under the request's id", "internal_error")


def openai_error(problem: Problem) -> dict[str, Any]:
    """The body in OpenAI's shape; in a stream, the data of an event of its own."""
    kind = {429: "rate_limit_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}.get(
        problem.status, "server_error" if problem.status >= 500 else "invalid_request_error"
    )
    message = _shown(problem)
    if problem.addition:
        message = f"{message.removesuffix('.')}.{problem.addition}"
    return {"error": {"message": message, "type": kind, "param": problem.param, "code": problem.code}}


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(problem: Problem, request_id: str | None = None) -> dict[str, Any]:
    """The body in Anthropic's shape; in a stream, the data of its `error` event."""
    kind = _ANTHROPIC_TYPES.get(problem.status, "api_error" if problem.status >= 500 else "invalid_request_error")
    message = _shown(problem)
    if problem.param is not None and not message.startswith(f"{problem.param}: "):
        message = f"{problem.param}: {message}"
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def ollama_error(problem: Problem) -> dict[str, Any]:
    """The body in Ollama's shape; in a stream, a line of its own."""
    return {"error": _shown(problem)}


_LLAMACPP_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "unavailable_error",
    503: "unavailable_error",
}


def llamacpp_error(problem: Problem) -> dict[str, Any]:
    """The body in the shape of llama.cpp's server; in a stream, the data of an event."""
    kind = _LLAMACPP_TYPES.get(problem.status, "server_error" if problem.status >= 500 else "invalid_request_error")
    return {"error": {"code": problem.status, "message": _shown(problem), "type": kind}}


def error_response(problem: Problem, path: str, request_id: str | None = None) -> Response:
    """The response in the shape that clients of `path` read."""
    if _is_under(path, ANTHROPIC_PATH):
        body = anthropic_error(problem, request_id)
    elif _is_under(path, OLLAMA_PATH):
        body = ollama_error(problem)
    elif any(_is_under(path, own) for own in LLAMACPP_PATHS):
        body = llamacpp_error(problem)
    else:
        body = openai_error(problem)
    # ASCII only: a client's own words may hold lone surrogates, which no UTF-8 can carry.
    content = json.dumps(body, ensure_ascii=True).encode()
    return Response(content, problem.status, dict(problem.headers), "application/json")


def _is_under(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}/")


_OPENAI_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_SCHEMA = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": ["string", "null"]},
    },
}
_OLLAMA_SCHEMA = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_LLAMACPP_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "type"],
            "properties": {"code": {"type": "integer"}, "message": {"type": "string"}, "type": {"type": "string"}},
        }
    },
}
_STATUSES = (400, 401, 403, 404, 405, 408, 413, 429, 500, 503, 504)


def _responses(schema: Mapping[str, Any]) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": schema}}
    described: dict[int | str, dict[str, Any]] = {
        status: {"description": http.HTTPStatus(status).phrase, "content": content} for status in _STATUSES
    }
    # Without it, FastAPI would describe a 422 of its own, which is never answered.
    return described | {"4XX": {"description": "Another mistake of the request", "content": content}}


# What a route may answer beside what it declares itself: `responses=` of a FastAPI router.
RESPONSES = _responses(_OPENAI_SCHEMA)
ANTHROPIC_RESPONSES = _responses(_ANTHROPIC_SCHEMA)
BOTH_RESPONSES = _responses({"anyOf": [_OPENAI_SCHEMA, _ANTHROPIC_SCHEMA]})  # the shape that a header asks for
OLLAMA_RESPONSES = _responses(_OLLAMA_SCHEMA)
LLAMACPP_RESPONSES = _responses(_LLAMACPP_SCHEMA)


def install(app: FastAPI) -> None:
    """Every error that a route raises becomes a response. Defects are left to whoever logs requests."""

    async def respond(request: Request, error: Exception) -> Response:
        problem = problem_of(error)
        if problem.status >= 500 and not isinstance(error, Stopping | TimedOut):
            log.error("request failed", exc_info=error, extra={"facts": {"request_id": _request_id(request)}})
        return error_response(problem, request.url.path, _request_id(request))

    for kind in (KvistError, RequestValidationError, HTTPException, RecursionError):
        app.add_exception_handler(kind, respond)


def _request_id(request: Request) -> str | None:
    found: str | None = request.scope.get("state", {}).get("request_id")
    return found


def _shown(problem: Problem) -> str:
    message = " ".join(problem.message.split())
    return message if len(message) <= _MOST_MESSAGE else f"{message[:_MOST_MESSAGE]}..."


def _of_http(error: HTTPException) -> Problem:
    """An error of the framework itself: an unknown route, a method that a route lacks, a body that is no JSON."""
    message, headers = str(error.detail), dict(error.headers or {})
    if error.status_code == 404 and message == http.HTTPStatus.NOT_FOUND.phrase:
        return Problem(404, "there is no such route", "unknown_url", headers=headers)
    if error.status_code == 405:
        return Problem(405, f"this route takes {headers.get('Allow', 'another method')}", headers=headers)
    cause = error.__cause__
    if isinstance(cause, UnicodeDecodeError):
        return Problem(400, f"the body is not UTF-8: {cause.reason} at byte {cause.start:,}", "invalid_json")
    if isinstance(cause, RecursionError):
        return Problem(400, "the body is nested too deeply", "invalid_json")
    if isinstance(cause, ValueError):
        return Problem(400, f"{_NOT_JSON}: {cause}", "invalid_json")
    return Problem(error.status_code, message, headers=headers)


def _invalid(error: RequestValidationError) -> Problem:
    """The most specific of a schema's complaints: where several alternatives were tried, the one that came furthest."""
    complaints = error.errors()
    first = complaints[0]
    if first["type"] == "json_invalid":
        return Problem(400, f"{_NOT_JSON}: {first['ctx']['error']} at character {first['loc'][-1]:,}", "invalid_json")
    paths = [_path(complaint["loc"], complaint["type"], error.body) for complaint in complaints]
    best = max(range(len(paths)), key=lambda index: len(paths[index]))
    if first["loc"] == ("body",) and isinstance(error.body, bytes | None):
        return Problem(400, "the body must be JSON, sent as application/json", "invalid_body")
    message, said = _said(complaints[best]), complaints[best].get("ctx", {}).get("param")
    param = (said or ".".join(map(str, paths[best])))[:_MOST_PARAM]
    if param and not said:
        message = f"{param}: {message}"
    return Problem(400, message, "invalid_value", param or None)


def _said(complaint: Mapping[str, Any]) -> str:
    """What a complaint says, without names that stand in our sources alone."""
    if complaint["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "it must be an object"
    if complaint["type"] in ("union_tag_invalid", "union_tag_not_found"):
        context = complaint["ctx"]
        # A discriminator is the quoted name of a field, whose values are tags, or a function, whose tags are ours.
        if not str(context["discriminator"]).startswith("'"):
            return "it has none of the forms that are known here"
        if complaint["type"] == "union_tag_not_found":
            return f"it must have a field {context['discriminator']}"
        return f"{context['discriminator']} is {context['tag'][:50]!r}, and must be one of {context['expected_tags']}"
    return str(complaint["msg"]).removeprefix("Value error, ")


def _path(location: Sequence[int | str], kind: str, body: Any) -> list[int | str]:
    """The steps of a location that lead through the body; pydantic also names the alternative that it tried."""
    path: list[int | str] = []
    here = body
    for step in location[1:]:
        inside = (isinstance(here, dict) and step in here) or (
            isinstance(here, list) and isinstance(step, int) and step < len(here)
        )
        if inside:
            here = here[step]
            path.append(step)
    if kind == "missing" and len(location) > 1:
        path.append(location[-1])
    return path
