"""Clients of every kind, well-behaved and not, for a while.

They run in a process of their own, so that what they do does not hold up the server that they ask. `test_soak.py` lets
them come for seconds and for minutes, and says what must be true of a server that has met them.
"""

import asyncio
import contextlib
import copy
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from attacks import attacks

CLIENTS = 12
TIMEOUT = 60.0  # seconds in which each client's affair must be over
_SILENT = 60  # connections of one who says nothing
_FINE = range(200, 500)
_WORDS = "a twig is the part of a branch that grows in one season; so is a cache".split()
_TOOL = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
_SCORED = {"prompt": [[1, 2, 3], [4, 5]], "max_tokens": 1, "echo": True, "logprobs": 2}
_JSON = {"content-type": "application/json"}
_FIELDS = """
stop n best_of logit_bias top_p top_k min_p presence_penalty repetition_penalty logprobs top_logprobs prompt_logprobs
stream stream_options user metadata tools tool_choice response_format thinking system instructions priority seed _
""".split()
_METHODS = ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW", "POST"]
_PATHS = ["/", "/v1", "/v1/models/", "/V1/MODELS", "/%00", "/v1/../etc", "/" + "x" * 5000, "//", "/%ff"]
ABSURD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**64,
    10**400,
    -(10**30),
    1e308,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "\ud800",
    "\x00",
    "x" * 3000,
    "🌿" * 100,
    [],
    [[]],
    {},
    {"a": {"b": [None]}},
    [0, -1, 10**20],
]


@dataclass
class Report:
    """What happened. `seen`: how often each kind of client met each status (0: it did not wait for one)."""

    seen: Counter[tuple[str, int]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    spans: list[tuple[str, float, float]] = field(default_factory=list)  # what was under way, from when to when

    def to_json(self) -> str:
        seen = [[kind, status, number] for (kind, status), number in self.seen.items()]
        return json.dumps({"seen": seen, "failures": self.failures, "spans": self.spans})

    @classmethod
    def from_json(cls, text: str) -> "Report":
        told = json.loads(text)
        seen = Counter({(kind, status): number for kind, status, number in told["seen"]})
        return cls(seen, told["failures"], [tuple(span) for span in told["spans"]])

    def __add__(self, other: "Report") -> "Report":
        return Report(self.seen + other.seen, self.failures + other.failures, self.spans + other.spans)

    def count(self, kind: str) -> int:
        return sum(number for (name, _), number in self.seen.items() if name == kind)

    def statuses(self) -> Counter[int]:
        statuses: Counter[int] = Counter()
        for (_, status), number in self.seen.items():
            statuses[status] += number
        return statuses


class Soak:
    """Random clients of the server at a port; the same seed gives the same clients."""

    def __init__(self, port: int, seed: int, most_body: int) -> None:
        self._port = port
        self._attacks = attacks(most_body)
        self._random = random.Random(seed)
        self._most_body = most_body
        self.report = Report()

    async def run(self, seconds: float, attack: str | None = None) -> Report:
        """Let them come for that long; or one alone, who does nothing but that attack, again and again."""
        until = time.monotonic() + seconds
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self._port}", timeout=TIMEOUT) as self._http:
            if attack is None:
                await asyncio.gather(*(self._client(until) for _ in range(CLIENTS)))
            while attack is not None and time.monotonic() < until:
                self.report.seen[attack, await self._attacks_others(attack)] += 1
        return self.report

    async def _client(self, until: float) -> None:
        while time.monotonic() < until:
            kind = self._random.choice(list(KINDS))
            try:
                async with asyncio.timeout(TIMEOUT):
                    status = await KINDS[kind](self)
            except Exception as error:
                self.report.failures.append(f"{kind}: {error!r}")
            else:
                self.report.seen[kind, status] += 1

    # ---- what they ask

    def _text(self, most: int = 30) -> str:
        return " ".join(self._random.choices(_WORDS, k=self._random.randint(1, most)))

    def _request(self) -> tuple[str, dict[str, Any]]:
        """A valid request of any kind, and its path."""
        draw = self._random
        tokens = draw.randint(1, 24)
        head = {"model": "tiny", "seed": draw.randint(0, 5), "temperature": draw.choice([0, 1, 1.5])}
        messages = [{"role": "user", "content": self._text()}]
        if draw.random() < 0.5:
            messages = [{"role": "system", "content": "be brief " * 40}, *messages]
        chat = {**head, "messages": messages, "max_tokens": tokens}
        function = {"type": "function", "function": {"name": "weather", "parameters": _TOOL}}
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": _TOOL}}
        claude = {"model": "tiny", "max_tokens": tokens, "messages": [{"role": "user", "content": self._text()}]}
        return draw.choice(
            [
                ("/v1/chat/completions", chat),
                ("/v1/chat/completions", {**chat, "n": 2, "logprobs": True, "top_logprobs": 3}),
                ("/v1/chat/completions", {**chat, "tools": [function], "tool_choice": "required"}),
                ("/v1/chat/completions", {**chat, "response_format": schema}),
                ("/v1/completions", {**head, "prompt": self._text(), "max_tokens": tokens, "stop": ["e"]}),
                (
                    "/v1/completions",
                    {**head, "prompt": [[1, 2, 3], [4, 5]], "max_tokens": 1, "echo": True, "logprobs": 2},
                ),
                ("/v1/responses", {"model": "tiny", "input": self._text(), "max_output_tokens": max(tokens, 16)}),
                ("/v1/messages", claude),
                (
                    "/v1/messages",
                    {**claude, "tools": [{"name": "weather", "input_schema": _TOOL}], "system": "be brief"},
                ),
            ]
        )

    def _body(self, value: Any) -> bytes:
        return json.dumps(value).encode()

    async def _post(self, path: str, content: bytes) -> httpx.Response:
        response = await self._http.post(path, content=content, headers=_JSON)
        self._judge(path, content, response.status_code, response.content)
        return response

    def _judge(self, path: str, sent: bytes, status: int, received: bytes) -> None:
        """No answer may be a defect, and each refusal says what is wrong."""
        if status not in _FINE:
            self.report.failures.append(f"{status} for {path} {sent[:600]!r}: {received[:600]!r}")
        elif status >= 400 and not json.loads(received)["error"]["message"]:
            self.report.failures.append(f"{status} for {path} says nothing: {received[:600]!r}")

    # ---- what they are like

    async def _whole(self) -> int:
        path, request = self._request()
        response = await self._post(path, self._body(request))
        if response.status_code not in (200, 429):
            self.report.failures.append(f"{response.status_code} for {path} {request}: {response.text[:600]}")
        return response.status_code

    async def _streamed(self) -> int:
        path, request = self._request()
        content = self._body({**request, "stream": True})
        async with self._http.stream("POST", path, content=content, headers=_JSON) as response:
            received = await response.aread()
        self._judge(path, content, response.status_code, received)
        end = (b"[DONE]", b"message_stop", b"response.completed", b"response.incomplete")
        if response.status_code == 200 and not any(mark in received[-4000:] for mark in end):
            self.report.failures.append(f"the stream of {path} {request} ended with {received[-600:]!r}")
        return response.status_code

    async def _asks_about(self) -> int:
        draw = self._random
        path = draw.choice(["/health", "/metrics", "/v1/models", "/openapi.json", "/version", "", "", "", ""])
        if path:
            response = await self._http.get(path)
        else:
            claude = {"model": "tiny", "messages": [{"role": "user", "content": self._text()}]}
            path, request = draw.choice(
                [
                    ("/v1/embeddings", {"model": "tiny", "input": [self._text(), self._text()]}),
                    ("/v1/messages/count_tokens", claude),
                    ("/tokenize", {"prompt": self._text()}),
                    ("/detokenize", {"tokens": [1, 2, 3]}),
                ]
            )
            response = await self._post(path, self._body(request))
        if response.status_code not in (200, 429):
            self.report.failures.append(f"{response.status_code} for {path}: {response.text[:600]}")
        return response.status_code

    async def _leaves_in_the_middle(self) -> int:
        path, request = self._request()
        content = self._body({**request, "stream": True, "max_tokens": 400})
        async with self._http.stream("POST", path, content=content, headers=_JSON) as response:
            left = self._random.randint(1, 6)
            async for _ in response.aiter_bytes():
                left -= 1
                if not left:
                    break
        return response.status_code

    async def _leaves_before(self) -> int:
        path, request = self._request()
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(self._raw(path, self._body({**request, "max_tokens": 400})))
        await writer.drain()
        await asyncio.sleep(self._random.choice([0, 0.001, 0.05]))
        await self._close(writer)
        return 0

    async def _sends_garbage(self) -> int:
        draw, (path, request) = self._random, self._request()
        content = bytearray(self._body(request))
        match draw.randint(0, 3):
            case 0:
                content = bytearray(draw.randbytes(draw.randint(0, 2000)))
            case 1:
                del content[draw.randrange(len(content)) :]
            case 2:
                for _ in range(5):
                    content[draw.randrange(len(content))] = draw.randrange(32, 127)
            case 3:
                content = bytearray(draw.choice([b"[", b'{"a":', b'{"messages":[']) * draw.choice([100, 3000]))
        return (await self._post(path, bytes(content))).status_code

    async def _sends_too_much(self) -> int:
        path, request = self._request()
        content = self._body({**request, "user": "x" * (self._most_body + self._random.randint(0, self._most_body))})
        response = await self._post(path, content)
        if response.status_code != 413:
            self.report.failures.append(f"{response.status_code} for {len(content):,} bytes")
        return response.status_code

    async def _sends_no_utf8(self) -> int:
        path, request = self._request()
        content = self._body({**request, "user": "MARK"}).replace(b"MARK", b"\xff\xc0\x80")
        response = await self._post(path, content)
        if response.status_code != 400:
            self.report.failures.append(f"{response.status_code} for a body that is no UTF-8")
        return response.status_code

    async def _asks_for_the_absurd(self) -> int:
        path, request = self._request()
        request = copy.deepcopy(request)
        for _ in range(self._random.randint(1, 2)):
            self._spoil(request)
        request.setdefault("max_tokens", 4)
        return (await self._post(path, self._body(request))).status_code

    def _spoil(self, value: Any) -> None:
        """Put something absurd in the place of any part of a value, or beside them."""
        draw = self._random
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(value[key], dict | list) and draw.random() < 0.6:
            self._spoil(value[key])
        elif isinstance(value, dict) and draw.random() < 0.2:
            value[draw.choice(_FIELDS)] = copy.deepcopy(draw.choice(ABSURD))
        else:
            same = [other for other in ABSURD if type(other) is type(value[key])]
            # A copy, for what is put here may be spoiled in its turn.
            value[key] = copy.deepcopy(draw.choice(same if same and draw.random() < 0.5 else ABSURD))

    async def _takes_the_wrong_way(self) -> int:
        draw, (path, request) = self._random, self._request()
        method = draw.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW", "POST"])
        if method == "POST":
            path = draw.choice(
                ["/", "/v1", path + "/", path.upper(), "/%00", "/v1/../etc", "/" + "x" * 5000, "//", "/%ff"]
            )
        headers = draw.choice([{}, {"x-request-id": "y" * 500}, {"accept": "nothing"}, {"content-type": "text/plain"}])
        response = await self._http.request(method, path, content=self._body(request), headers=headers)
        if not 400 <= response.status_code < 500:
            self.report.failures.append(f"{response.status_code} for {method} {path}")
        return response.status_code

    async def _reads_slowly(self) -> int:
        path, request = self._request()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1024)
        writer.write(self._raw(path, self._body({**request, "stream": True, "max_tokens": 200})))
        first = await reader.readline()
        for _ in range(self._random.randint(1, 20)):
            await asyncio.sleep(0.02)
            if not await reader.read(64):
                break
        await self._close(writer)
        return int(first.split()[1])

    async def _attacks_others(self, name: str | None = None) -> int:
        wanted = [attack for attack in self._attacks if name in (None, attack.name)]
        attack, start = self._random.choice(wanted), time.monotonic()
        response = await self._post(attack.path, attack.body)
        self.report.spans.append((attack.name, start, time.monotonic()))
        # On a busy machine a body may come slowly; and where bodies are small, one of these is larger than they may be.
        if response.status_code not in (*attack.statuses, 408, 413):
            self.report.failures.append(f"{response.status_code} for {attack.name}: {response.text[:600]}")
        return response.status_code

    async def _lies_there(self) -> int:
        start, head = time.monotonic(), b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n"
        sent = self._random.choice([b"", b"GET /he", head])
        opened = await asyncio.gather(
            *(asyncio.open_connection("127.0.0.1", self._port) for _ in range(_SILENT)), return_exceptions=True
        )
        made = [writer for each in opened if not isinstance(each, BaseException) for writer in each[1:]]
        for writer in made:
            writer.write(sent)
        await asyncio.sleep(self._random.choice([0.1, 1.0]))
        await asyncio.gather(*map(self._close, made))
        self.report.spans.append(("connections that lie there", start, time.monotonic()))
        return 0

    async def _sends_half(self) -> int:
        path, request = self._request()
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        raw = self._raw(path, self._body(request))
        writer.write(raw[: self._random.randrange(len(raw))])
        await writer.drain()
        await asyncio.sleep(self._random.choice([0, 0.1, 2.5]))  # the last is longer than the server waits
        await self._close(writer)
        return 0

    def _raw(self, path: str, content: bytes) -> bytes:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
        return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content

    async def _close(self, writer: asyncio.StreamWriter) -> None:
        if self._random.random() < 0.5:
            writer.transport.abort()
        writer.close()
        with contextlib.suppress(OSError):  # the server was quicker
            await writer.wait_closed()


KINDS: dict[str, Callable[[Soak], Awaitable[int]]] = {
    "whole": Soak._whole,
    "streamed": Soak._streamed,
    "asks about": Soak._asks_about,
    "leaves in the middle": Soak._leaves_in_the_middle,
    "leaves before": Soak._leaves_before,
    "sends garbage": Soak._sends_garbage,
    "sends too much": Soak._sends_too_much,
    "sends no UTF-8": Soak._sends_no_utf8,
    "asks for the absurd": Soak._asks_for_the_absurd,
    "takes the wrong way": Soak._takes_the_wrong_way,
    "reads slowly": Soak._reads_slowly,
    "sends half": Soak._sends_half,
    "attacks": Soak._attacks_others,
    "lies there": Soak._lies_there,
}


def visit(port: int, seconds: float, seed: int, most_body: int, attack: str | None = None) -> Report:
    """Clients for so many seconds, in a process of their own; what they met. `attack`: see `Soak.run`."""
    command = [sys.executable, __file__, str(port), str(seconds), str(seed), str(most_body), *filter(None, [attack])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Report.from_json(done.stdout)


def main(port: int, seconds: float, seed: int, most_body: int, attack: str | None = None) -> None:
    print(asyncio.run(Soak(port, seed, most_body).run(seconds, attack)).to_json())


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
