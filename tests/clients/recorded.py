"""What was asked of a server and what it answered, kept as it went by."""

import json
from dataclasses import dataclass
from typing import Any

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_TEXTS = {
    "/v1/messages": lambda told: [block["text"] for block in told["content"] if block["type"] == "text"],
    "/v1/responses": lambda told: [
        part["text"] for item in told["output"] if item["type"] == "message" for part in item["content"]
    ],
    "/v1/chat/completions": lambda told: [told["choices"][0]["message"]["content"]],
}


@dataclass(frozen=True)
class Exchange:
    """A request for text, and its answer. `body`: as the client sent it."""

    path: str
    body: dict[str, Any]
    status: int
    answer: str

    @property
    def sent(self) -> str:
        """All that the client sent, to look for words in."""
        return json.dumps(self.body, ensure_ascii=False)

    @property
    def turn(self) -> str:
        """The last that the user said, to look for words in. Some clients add to it what the system says."""
        said = [item for item in self.body.get("messages") or self.body["input"] if item.get("role") == "user"]
        return json.dumps(said[-1], ensure_ascii=False)


@dataclass(frozen=True)
class Recorded:
    """A server at `url` and what it was asked for so far, in the order of the answers."""

    url: str
    exchanges: list[Exchange]

    def plain(self, asked: Exchange) -> str:
        """The text that the same request gets, asked once more, whole, by no client of anybody's."""
        body = {name: value for name, value in asked.body.items() if name != "stream_options"} | {"stream": False}
        response = httpx.post(self.url + asked.path, json=body, timeout=60).raise_for_status()
        self.exchanges.pop()  # this one
        return "".join(_TEXTS[asked.path](response.json()))


class Recorder:
    """A middleware that appends to `exchanges`."""

    def __init__(self, app: ASGIApp, exchanges: list[Exchange]) -> None:
        self._app = app
        self._exchanges = exchanges

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in _TEXTS:
            await self._app(scope, receive, send)
            return
        sent, answered, status = bytearray(), bytearray(), 0

        async def receiving() -> Message:
            message = await receive()
            sent.extend(message.get("body", b""))
            return message

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            answered.extend(message.get("body", b""))
            if message["type"] == "http.response.body" and not message.get("more_body"):
                body = json.loads(bytes(sent))
                self._exchanges.append(Exchange(scope["path"], body, status, answered.decode()))
            await send(message)

        await self._app(scope, receiving, sending)


def answered(server: Recorded, printed: str, prompt: str) -> None:
    """Fails unless a request whose turn has the prompt was answered, and a plain one gets what was printed for it."""
    asked = [exchange for exchange in server.exchanges if exchange.status == 200 and prompt in exchange.turn]
    texts = [server.plain(exchange) for exchange in asked]
    assert "" not in texts
    assert set(texts) & set(printed.split()), f"a plain request gets one of {texts}, and this was printed:\n{printed}"
