"""Bodies of clients that do not say what they send: Ollama and llama.cpp read any body as JSON, and `curl -d` calls it
a form. Who may ask from a browser is not decided by a body's type here, but by `Origin` (`limits.py`)."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute


class AnyType(APIRoute):
    """A route whose body is JSON, whatever its `Content-Type` says: `route_class=` of a router."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            others = [header for header in request.scope["headers"] if header[0] != b"content-type"]
            headers = [*others, (b"content-type", b"application/json")]
            return await handle(Request({**request.scope, "headers": headers}, request.receive))

        return handle_json
