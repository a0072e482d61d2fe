"""Who may ask, how much, and for how long: pure ASGI middlewares in front of the routes, so that streams and
disconnections pass through them untouched.

`Gate` looks at the head of a request, `Intake` reads its body whole, within bounds of bytes, time and values (for JSON
is read on the event loop, which nothing may hold up), and from then on watches whether
the client is still there. What is refused before its body was read is answered, and its connection closed.
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import re
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvist.base.units import format_bytes
from kvist.server.errors import ApiError, error_response, problem_of
from kvist.server.logs import note_of
from kvist.server.settings import ServerSettings
from kvist.server.turns import Turns
from kvist.service.tenants import tenant_id

OPEN = frozenset({"/health"})  # for load balancers: they have no key, and ask by any name
OPERATORS = frozenset({"/metrics", "/slots"})  # where there are several tenants
_KEYS = ("x-api-key", "api-key")  # headers that hold one: Anthropic's and Azure's
_LONG = 1 << 16  # bytes of a body that is read when it has its turn
_LINGER = 1.0  # seconds in which a client that is still sending gets to read why it was refused
_MOST_DIGITS = 18  # of a length
_LATE = 1.1  # by how much a request may pass its time: whoever works on it ends it in time, and better
_NUMBERS = 8  # of JSON's whole ones, which are read in the time of one other value
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # the last one may be open


def tenant_of(request: Request) -> str:
    """Whose request it is: what its API key stands for, or a short digest of that; empty where there are no keys."""
    return note_of(request).tenant


def guard(app: FastAPI, settings: ServerSettings) -> None:
    """Put everything here in front of the routes."""
    # The last one added is the outermost.
    app.add_middleware(Intake, settings=settings)
    app.add_middleware(Gate, settings=settings)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=_origins(settings),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "request-id", "retry-after"],
        )


class Gate:
    """Refuses requests that may not ask: without a valid key where there are keys, from pages in a browser.

    A page could reach a server on its user's own machine in two ways. Its requests carry `Origin`, which must be the
    server's own or one that is allowed. Or its host's name is made to lead to this server (DNS rebinding): without
    keys, only addresses, localhost and names that are known are answered, for no address can be rebound.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._keys = [(_digest(key.encode()), tenant_id(key, settings.tenants.get(key))) for key in settings.api_keys]
        self._are_several = len({tenant for _, tenant in self._keys}) > 1
        self._operators = {tenant.id for tenant in settings.tenants.values() if tenant.operator}
        self._origins = frozenset(_origins(settings))
        self._names = frozenset(name.lower() for name in (settings.host, *settings.hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            self._check_origin(headers)
            note_of(Request(scope)).tenant = tenant = self._check_key(headers)
            if scope["path"] in OPERATORS and self._are_several and tenant not in self._operators:
                raise ApiError(
                    403, "what all tenants do together is shown to operators; mark a key so", code="not_an_operator"
                )
        except ApiError as error:
            await _refuse(error, scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        if self._keys:
            return
        name = _host_name(headers.get("host", ""))
        if not (_is_address(name) or name == "localhost" or name.endswith(".localhost") or name in self._names):
            raise ApiError(
                403, "this server is not asked under this name; kvist serve --allow-host adds one", code="unknown_host"
            )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin.lower() in self._origins:
            return
        if _netloc(origin) != headers.get("host", "").lower():
            raise ApiError(
                403, "pages of this origin may not ask; kvist serve --allow-origin adds one", code="unknown_origin"
            )

    def _check_key(self, headers: Headers) -> str:
        """The tenant of the key that was sent. All keys are compared, whole, whichever it is."""
        if not self._keys:
            return ""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        sent = [*(headers.get(name, "") for name in _KEYS), bearer.strip() if scheme.lower() == "bearer" else ""]
        found = ""
        for digest in [_digest(key.encode("latin-1")) for key in sent if key]:
            for known, tenant in self._keys:
                if hmac.compare_digest(digest, known):
                    found = tenant
        if not found:
            said = "this API key is not known here" if any(sent) else "an API key is needed"
            raise ApiError(
                401,
                f"{said}; send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY' or 'api-key: KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return found


class Intake:
    """Reads a request's body whole, at most so many bytes and for so long, and hands it on in one piece. When the
    client goes away before it has its answer, whatever works on it is cancelled."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._most = settings.max_body_bytes
        self._body_timeout = settings.body_timeout
        self._timeout = settings.timeout * _LATE
        self._most_values = settings.max_values
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            await _refuse(error, scope, receive, send)
            return
        if body is not None:
            try:
                await self._check_values(body)
            except ApiError as error:
                await _refuse(error, scope, receive, send)
                return
            turns = self._turns if len(body) > _LONG else None
            await _answer(self._app, body, turns, self._timeout, scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None when the client went away before its end."""
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdecimal() or len(declared) > _MOST_DIGITS or int(declared) > self._most:
            raise self._too_large()
        pieces, size, more = [], 0, True
        try:
            async with asyncio.timeout(self._body_timeout):
                while more:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        return None
                    pieces.append(event.get("body", b""))
                    size += len(pieces[-1])
                    if size > self._most:
                        raise self._too_large()
                    more = event.get("more_body", False)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self._body_timeout:g} seconds", code="slow_body"
            ) from None
        return b"".join(pieces)

    async def _check_values(self, body: bytes) -> None:
        """Raises for a body of JSON in which so many values stand that reading it would hold up everybody."""
        # Most bodies are settled by a count that takes what stands in texts for JSON's own.
        if body.count(b'"') // 2 + _weight(body, 0, len(body)) // _NUMBERS < self._most_values:
            return
        if await anyio.to_thread.run_sync(_has_more_values, body, self._most_values):
            raise ApiError(
                413, f"the body holds more than {self._most_values:,} values; send less at once", code="body_too_large"
            )

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {format_bytes(self._most)}", code="body_too_large")


async def _answer(
    app: ASGIApp, body: bytes, turns: Turns | None, timeout: float, scope: Scope, receive: Receive, send: Send
) -> None:
    """Run `app` on a body that has arrived, for as long as its client is there, and at most so many seconds. `turns`:
    where it waits for its own before it is read."""
    waiting: list[bytes] = [body]
    gone = anyio.Event()
    started = answered = False
    failure: Exception | None = None

    async def hand_on() -> Message:
        if waiting:
            if turns is not None:
                await turns.wait()
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def observed(message: Message) -> None:
        nonlocal started, answered
        started = True
        answered = answered or (message["type"] == "http.response.body" and not message.get("more_body", False))
        await send(message)

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()
        if not answered:  # else it is merely the end of the answer
            note = note_of(Request(scope))
            note.finish = note.finish or "disconnected"
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.cancel_scope.deadline = anyio.current_time() + timeout
        group.start_soon(watch)
        try:
            await app(scope, hand_on, observed)
        except Exception as error:  # raised outside, where the group does not wrap it
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if not started and not gone.is_set():
        late = ApiError(504, "the request took longer than it may", code="timeout", headers={"x-should-retry": "false"})
        await _refuse(late, scope, receive, send)


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer and close. A client that is still sending would see a broken connection and not the answer, were it closed
    at once: what it sends is dropped for a moment."""
    response = error_response(problem_of(error), scope["path"], scope.get("state", {}).get("request_id"))
    response.headers["connection"] = "close"
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER):
            while (await receive()).get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _has_more_values(body: bytes, most: int) -> bool:
    """Whether a JSON text has more than so many values: strings, arrays, objects and fractions, and eight whole numbers
    for one."""
    weight = end = 0
    for text in _STRING.finditer(body):
        weight += _NUMBERS + _weight(body, end, text.start())
        end = text.end()
        if weight > most * _NUMBERS:
            return True
    return weight + _weight(body, end, len(body)) > most * _NUMBERS


def _weight(body: bytes, start: int, end: int) -> int:
    """Of what stands outside of strings. A comma is counted for the number before it, and a point or an exponent for
    what takes longer to read in it (the e in true and false with them)."""
    slow = sum(body.count(mark, start, end) for mark in (b"[", b"{", b".", b"e", b"E"))
    return slow * _NUMBERS + body.count(b",", start, end)


def _origins(settings: ServerSettings) -> list[str]:
    """The allowed origins as browsers write them."""
    return [origin.lower().rstrip("/") for origin in settings.origins]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _host_name(host: str) -> str:
    """The name or address in a `Host` header, without its port; empty when there is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
