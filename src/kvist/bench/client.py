"""A client that measures: token ids in, token ids out, and when each came. Over HTTP, as any other client."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import quantiles

import httpx

from kvist.base.errors import KvistError


@dataclass
class Answer:
    """One request as its client saw it. `sent` and `times`: `time.perf_counter` of the request and of each piece."""

    prompt: Sequence[int]
    sent: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    cached: int = 0  # tokens of the prompt that were read from the cache

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]

    @property
    def seconds(self) -> float:
        return self.times[-1] - self.sent


class Client:
    """Asks one server for completions. Use it as an asynchronous context manager."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._http.aclose()

    async def complete(
        self, prompt: Sequence[int], tokens: int, seed: int = 0, key: str | None = None, temperature: float = 0.8
    ) -> Answer:
        """Exactly `tokens` new tokens. Raises `KvistError` for what the server says against it."""
        body = {
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": temperature,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "return_token_ids": True,
        }
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        answer = Answer(prompt, time.perf_counter())
        async with self._http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            if response.status_code != 200:
                raise KvistError(
                    f"the server answered {response.status_code}: {(await response.aread()).decode()[:300]}"
                )
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    self._take(answer, json.loads(line.removeprefix("data: ")))
        return answer

    @staticmethod
    def _take(answer: Answer, data: dict[str, object]) -> None:
        if "error" in data:
            raise KvistError(f"the server ended an answer: {data['error']}")
        for choice in data["choices"]:  # type: ignore[attr-defined]
            if choice["token_ids"]:
                answer.tokens += choice["token_ids"]
                answer.times.append(time.perf_counter())
        usage = data.get("usage")
        if isinstance(usage, dict):
            answer.cached = usage["prompt_tokens_details"]["cached_tokens"]


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The median and the 99th percentile; zeros of nothing."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (0.0, 0.0)
    cuts = quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]
