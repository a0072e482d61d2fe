"""One line in the log for every request: what was asked, what it took, how it ended. Never a prompt, never a key."""

import json
import logging
import re
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvist.base.units import format_duration, plural
from kvist.server.errors import ANTHROPIC_PATH, error_response, problem_of
from kvist.service.session import Session

log = logging.getLogger("kvist.server")

CLIENT_GONE = 499  # in the log only: there was nobody to answer
_FOREIGN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MOST_PATH = 100
_QUIET = ("/health", "/metrics")  # asked every few seconds, by machines


@dataclass
class Note:
    """What is known of one request by the time it ends. Its middleware makes it; routes add what they know."""

    request_id: str
    started: float
    tenant: str = ""
    model: str | None = None
    sessions: list[Session] = field(default_factory=list)
    finish: str | None = None
    status: int | None = None
    first_token: float | None = None  # seconds from the start until a stream sent its first new token

    def has_begun(self) -> bool:
        """Whether there is a new token."""
        return any(session.new_tokens for session in self.sessions)

    def facts(self, scope: Scope) -> dict[str, Any]:
        """The fields of a log line; what is not known is left out."""
        sessions = self.sessions
        facts: dict[str, Any] = {
            "request_id": self.request_id,
            "method": scope["method"],
            "path": printable(scope["path"]),
            "status": CLIENT_GONE if self.status is None else self.status,
            "seconds": round(time.perf_counter() - self.started, 4),
            "tenant": self.tenant or None,
            "model": self.model,
            "finish": self.finish,
            "prompt_tokens": sum(session.prompt_tokens for session in sessions) if sessions else None,
            "cached_tokens": sum(session.cached_tokens for session in sessions) if sessions else None,
            "cached_by_tier": self._tiers() or None,
            "computed_why": self._reasons() or None,
            "new_tokens": sum(session.new_tokens for session in sessions) if sessions else None,
            "first_token_seconds": None if self.first_token is None else round(self.first_token, 4),
        }
        return {name: value for name, value in facts.items() if value is not None}

    def _tiers(self) -> dict[str, int]:
        """Tokens of prompts that were not computed, by where they were."""
        found: Counter[str] = Counter()
        for session in self.sessions:
            if session.explanation is not None:
                found.update(session.explanation.cached)
        return dict(found)

    def _reasons(self) -> str:
        """Why the other tokens were computed, as `kvist explain` has it; of several prompts each reason once."""
        return ", ".join(dict.fromkeys(s.explanation.reason for s in self.sessions if s.explanation is not None))


def note_of(request: Request) -> Note:
    """The note of a request under way. Without the middleware (a router tested alone) it is read by nobody."""
    state = request.scope.setdefault("state", {})
    note: Note = state.setdefault("note", Note("", time.perf_counter()))
    return note


def note(request: Request, session: Session, model: str) -> Note:
    """Count a session to its request; to be called once for each session as soon as it is there. Set `finish` of what
    is returned when it is known."""
    found = note_of(request)
    found.sessions.append(session)
    found.model = model
    return found


class RequestLog:
    """The outermost middleware: gives each request an id, logs it when it has ended, and answers for defects.

    A client's own `x-request-id` is taken over when it is short and plain. `answered` is told the pattern of the path
    that matched and the status.
    """

    def __init__(self, app: ASGIApp, answered: Callable[[str, int], None]) -> None:
        self._app = app
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        foreign = Headers(scope=scope).get("x-request-id", "")
        request_id = foreign if _FOREIGN_ID.fullmatch(foreign) else f"req_{secrets.token_hex(12)}"
        note = Note(request_id, time.perf_counter())
        scope.setdefault("state", {}).update(note=note, request_id=request_id)

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                note.status = message["status"]
                _name(message, scope["path"], request_id)
            elif note.first_token is None and message.get("more_body") and note.has_begun():
                note.first_token = time.perf_counter() - note.started
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except Exception as error:
            log.error("request failed", exc_info=error, extra={"facts": {"request_id": request_id}})
            if note.status is None:
                await error_response(problem_of(error), scope["path"], request_id)(scope, receive, observed)
        finally:
            self._answered(_route(scope), CLIENT_GONE if note.status is None else note.status)
            quiet = scope["path"] in _QUIET and note.status == 200
            log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"facts": note.facts(scope)})


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class LineFormatter(logging.Formatter):
    """A short line for people: `12:01:02 POST /v1/chat/completions 200 · 1,204 prompt (1,088 cached) + 56 new · ...`"""

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = getattr(record, "facts", {})
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = f"{clock} {_request_line(facts) if 'method' in facts else record.getMessage()}"
        if "method" not in facts and "request_id" in facts:
            text += f" · {facts['request_id']}"
        if record.exc_info:
            text += f"\n{self.formatException(record.exc_info)}"
        return text


@contextmanager
def shown(as_json: bool) -> Iterator[None]:
    """Within it, Kvist's and uvicorn's records go to stderr, and nowhere else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else LineFormatter())
    loggers = {logging.getLogger("kvist"): logging.INFO, logging.getLogger("uvicorn.error"): logging.ERROR}
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger, level in loggers.items():
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def printable(path: str) -> str:
    """A path that cannot forge a line of a log."""
    shown = "".join(character if character.isprintable() else "?" for character in path[:_MOST_PATH])
    return shown if len(path) <= _MOST_PATH else f"{shown}..."


def _route(scope: Scope) -> str:
    """The pattern of the path that matched: never a client's own string, of which there may be any number."""
    route = scope.get("route")
    return route.path if isinstance(route, APIRoute) else "none"


def _name(message: Message, path: str, request_id: str) -> None:
    headers = MutableHeaders(scope=message)
    headers["x-request-id"] = request_id
    if path.startswith(ANTHROPIC_PATH):
        headers["request-id"] = request_id


def _cached(facts: dict[str, Any]) -> str:
    """What of the prompts came from where, and why the rest was computed."""
    tiers = ", ".join(f"{count:,} {tier}" for tier, count in facts.get("cached_by_tier", {}).items())
    parts = [f"{facts['cached_tokens']:,} cached{f': {tiers}' if tiers else ''}"] if facts["cached_tokens"] else []
    parts += [facts["computed_why"]] if "computed_why" in facts else []
    return f" ({'; '.join(parts)})" if parts else ""


def _request_line(facts: dict[str, Any]) -> str:
    parts = [f"{facts['method']} {facts['path']} {facts['status']}"]
    if facts["status"] == CLIENT_GONE:
        parts[0] += " (the client left)"
    if "prompt_tokens" in facts:
        cached = _cached(facts)
        parts.append(f"{plural(facts['prompt_tokens'], 'prompt token')}{cached} + {facts['new_tokens']:,} new")
    if "finish" in facts:
        parts.append(facts["finish"])
    if "first_token_seconds" in facts:
        parts.append(f"first after {format_duration(facts['first_token_seconds'])}")
    parts.append(f"{facts['seconds']:.3f}s" if facts["seconds"] < 1 else format_duration(facts["seconds"]))
    return " · ".join([*parts, facts["request_id"]])
