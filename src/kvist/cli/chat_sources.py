"""Where the answers of `kvist chat` come from. A server is here; a model in this process needs more than this and
stands in `chat_local.py`."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from kvist.base.errors import KvistError

Message = dict[str, str]
Show = Callable[[str, bool], None]  # a piece of text, and whether it is reasoning

_SILENCE = 60.0  # seconds: a server says every few that it is still at work
_CONNECT = 10.0
_MOST_LINE = 1 << 24  # characters of one event


@dataclass
class Wish:
    """How to answer. `temperature` None: as the server has it."""

    max_tokens: int | None
    temperature: float | None
    seed: int | None


@dataclass
class Answer:
    """One answer, while it comes and once it is there. Times in seconds; a count is None where a server is silent."""

    text: str = ""
    reasoning: str = ""
    finish: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    new_tokens: int | None = None
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None

    def push(self, piece: str, is_reasoning: bool) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        if is_reasoning:
            self.reasoning += piece
        else:
            self.text += piece

    @property
    def rate(self) -> float | None:
        """New tokens a second after the first."""
        if self.new_tokens is None or self.first is None or self.last is None or self.last <= self.first:
            return None
        return (self.new_tokens - 1) / (self.last - self.first)


class Source(Protocol):
    """Something that answers. `ask` fills `answer` as it comes, so that what is there stays when Ctrl-C ends it."""

    name: str

    def ask(self, messages: list[Message], wish: Wish, answer: Answer, show: Show) -> None: ...


class Remote:
    """A server that speaks OpenAI's chat completions. `name`: of the model; None takes the first that it has."""

    def __init__(self, client: httpx.Client, name: str | None) -> None:
        self._client = client
        self.name = name or self._first_model()

    def ask(self, messages: list[Message], wish: Wish, answer: Answer, show: Show) -> None:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        optional = {"max_completion_tokens": wish.max_tokens, "temperature": wish.temperature, "seed": wish.seed}
        body |= {name: value for name, value in optional.items() if value is not None}
        with self._errors(), self._client.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise KvistError(f"the server refused: {_reason(response)}")
            for event in _events(response):
                _take(event, answer, show)
        if answer.finish is None:
            raise KvistError("the server's answer ended in the middle")

    def _first_model(self) -> str:
        with self._errors():
            response = self._client.get("models")
            if response.status_code != 200:
                raise KvistError(f"the server refused: {_reason(response)}")
            try:
                return str(response.json()["data"][0]["id"])
            except (ValueError, LookupError, TypeError):
                raise KvistError("the server does not say which models it has; name one with --model") from None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise KvistError(f"cannot reach {self._client.base_url}: {reason}") from None


@contextmanager
def remote(url: str, name: str | None, api_key: str | None) -> Iterator[Remote]:
    """A server by its base URL, with or without the `/v1` that belongs to it. Raises `KvistError`."""
    base = url.rstrip("/").removesuffix("/v1") + "/v1/"
    if not base.startswith(("http://", "https://")):
        raise KvistError(f"--url takes an address as in http://127.0.0.1:8000, got {url!r}")
    headers = {} if not api_key else {"authorization": f"Bearer {api_key}"}
    timeout = httpx.Timeout(_SILENCE, connect=_CONNECT)
    try:
        client = httpx.Client(base_url=base, headers=headers, timeout=timeout)
    except (httpx.InvalidURL, UnicodeEncodeError) as error:
        raise KvistError(f"--url or the API key cannot be used: {error}") from None
    with client:
        yield Remote(client, name)


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The data of a stream's events, up to the one that says it is done."""
    for line in response.iter_lines():
        if len(line) > _MOST_LINE:
            raise KvistError("the server's answer is no stream of events")
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            raise KvistError("the server's answer is no stream of JSON events") from None
        if isinstance(event, dict):
            yield event


def _take(event: dict[str, Any], answer: Answer, show: Show) -> None:
    if "error" in event:
        error = event["error"]
        raise KvistError(f"the server failed: {error.get('message') if isinstance(error, dict) else error}")
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        for name, is_reasoning in (("reasoning_content", True), ("reasoning", True), ("content", False)):
            if piece := delta.get(name):
                answer.push(piece, is_reasoning)
                show(piece, is_reasoning)
                if is_reasoning:
                    break  # some servers send both names
        answer.finish = choice.get("finish_reason") or answer.finish
    if usage := event.get("usage"):
        answer.prompt_tokens = usage.get("prompt_tokens")
        answer.new_tokens = usage.get("completion_tokens")
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


def _reason(response: httpx.Response) -> str:
    """What the body of an error says, in either API's shape; else the status."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"{response.status_code} {response.reason_phrase}"
