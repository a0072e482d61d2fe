"""Clients of every kind, well-behaved and not, for a while; and what must be true of a server that has met them.

A library: `test_soak.py` runs it for seconds and for minutes.
"""

import asyncio
import contextlib
import copy
import gc
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from attacks import attacks
from prober import probing

from live import Live

CLIENTS = 12
TIMEOUT = 60.0  # seconds in which each client's affair must be over
_SILENT = 60  # connections of one who says nothing
_WARM = 0.4  # of the time: caches fill, memory is taken for the first time
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
    growth: int = 0  # bytes that the process holds more at the end than it did when it was warm
    probes: list[tuple[float, float, int]] = field(default_factory=list)  # of `/health`: start, seconds, status
    spans: list[tuple[str, float, float]] = field(default_factory=list)  # what was under way, from when to when

    def count(self, kind: str) -> int:
        return sum(number for (name, _), number in self.seen.items() if name == kind)

    def health(self) -> dict[str, tuple[int, float]]:
        """By what was under way meanwhile: how many probes there were, and the seconds of the worst."""
        found = {"anything at all": (len(self.probes), max((seconds for _, seconds, _ in self.probes), default=0.0))}
        for name in sorted({name for name, _, _ in self.spans}):
            spans = [(start, end) for other, start, end in self.spans if other == name]
            met = [
                seconds
                for begun, seconds, _ in self.probes
                if any(begun < end and begun + seconds > start for start, end in spans)
            ]
            found[name] = len(met), max(met, default=0.0)
        return found

    def table(self) -> str:
        """What to read at the end."""
        rows = [f"{'while there was under way':<36}{'probes':>8}{'worst /health, s':>18}"]
        rows += [f"{name:<36}{count:>8}{worst:>18.3f}" for name, (count, worst) in self.health().items()]
        statuses = ", ".join(f"{status}: {count}" for status, count in sorted(self.statuses().items()))
        return "\n".join(["", *rows, f"statuses · {statuses}", f"memory · {self.growth / 2**20:+.1f} MiB since warm"])

    def statuses(self) -> Counter[int]:
        statuses: Counter[int] = Counter()
        for (_, status), number in self.seen.items():
            statuses[status] += number
        return statuses


class Soak:
    """Random clients of one server; the same seed gives the same clients."""

    def __init__(self, server: Live, seed: int, most_body: int) -> None:
        self._server = server
        self._attacks = attacks(most_body)
        self._random = random.Random(seed)
        self._most_body = most_body
        self.report = Report()
        self.kinds: dict[str, Callable[[], Awaitable[int]]] = {
            "whole": self._whole,
            "streamed": self._streamed,
            "asks about": self._asks_about,
            "leaves in the middle": self._leaves_in_the_middle,
            "leaves before": self._leaves_before,
            "sends garbage": self._sends_garbage,
            "sends too much": self._sends_too_much,
            "sends no UTF-8": self._sends_no_utf8,
            "asks for the absurd": self._asks_for_the_absurd,
            "takes the wrong way": self._takes_the_wrong_way,
            "reads slowly": self._reads_slowly,
            "sends half": self._sends_half,
            "attacks": self._attacks_others,
            "lies there": self._lies_there,
        }

    async def run(self, seconds: float) -> Report:
        """Let them come for that long, and look at the server when they have gone."""
        process = psutil.Process()
        start = time.monotonic()
        async with httpx.AsyncClient(base_url=self._server.url, timeout=TIMEOUT) as self._http:
            with probing(self._server.port) as self.report.probes:
                warm = await self._for(start + seconds * _WARM, process)
                end = await self._for(start + seconds, process)
        wrong = [status for _, _, status in self.report.probes if status != 200]
        self.report.failures += [f"/health: {status}" for status in wrong]
        self.report.growth = end - warm
        return self.report

    async def _for(self, until: float, process: psutil.Process) -> int:
        """Clients until then; bytes that the process holds when they have gone."""
        await asyncio.gather(*(self._client(until) for _ in range(CLIENTS)))
        gc.collect()
        await asyncio.sleep(0.2)
        return int(process.memory_info().rss)

    async def _client(self, until: float) -> None:
        while time.monotonic() < until:
            kind = self._random.choice(list(self.kinds))
            try:
                async with asyncio.timeout(TIMEOUT):
                    status = await self.kinds[kind]()
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
        _, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
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
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port, limit=1024)
        writer.write(self._raw(path, self._body({**request, "stream": True, "max_tokens": 200})))
        first = await reader.readline()
        for _ in range(self._random.randint(1, 20)):
            await asyncio.sleep(0.02)
            if not await reader.read(64):
                break
        await self._close(writer)
        return int(first.split()[1])

    async def _attacks_others(self) -> int:
        attack, start = self._random.choice(self._attacks), time.monotonic()
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
            *(asyncio.open_connection("127.0.0.1", self._server.port) for _ in range(_SILENT)), return_exceptions=True
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
        _, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
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


def settle(server: Live, seconds: float = 20) -> list[str]:
    """What is still not as in a server that nobody ever asked, once it has had time to clear up."""
    until = time.monotonic() + seconds
    while (left := _left(server)) and time.monotonic() < until:
        time.sleep(0.05)
    asyncio.run_coroutine_threadsafe(server.serving.check(), server.loop).result(20)
    return left


def _left(server: Live) -> list[str]:
    load, state = server.serving.load(), server.server.server_state
    counts = {
        "running sequences": load.running,
        "waiting requests": load.waiting,
        "used blocks": load.kv_blocks_used,
        "connections": len(state.connections),
        "tasks": len(state.tasks),
        "a dead engine": not server.serving.alive,
    }
    return [f"{count} {name}" for name, count in counts.items() if count]
