"""Traces of real traffic in Mooncake's format, replayed: JSON lines with `timestamp` (milliseconds), `input_length`,
`output_length` and `hash_ids`, one for each 512 tokens of the input; equal ids are equal tokens (Qin et al. 2024,
arXiv 2407.00079, appendix; the traces published with it)."""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvist.base.errors import KvistError
from kvist.bench.client import Answer, Client

BLOCK = 512  # tokens behind one hash id
_MOST_LINE = 1 << 20  # bytes
_MOST_TOKENS = 4_000_000  # of one request


@dataclass(frozen=True)
class Arrival:
    """One request of a trace. `at`: seconds after the first."""

    at: float
    prompt_tokens: int
    new_tokens: int
    blocks: tuple[int, ...]

    def prompt(self, vocab: int, scale: float) -> tuple[int, ...]:
        """Its tokens: each block's are drawn from its id, so that equal blocks are equal. `scale` shortens blocks
        alike."""
        size = max(1, round(BLOCK * scale))
        tokens: list[int] = []
        for block in self.blocks:
            rng = random.Random(block)
            tokens += [rng.randrange(vocab) for _ in range(size)]
        return tuple(tokens[: max(1, round(self.prompt_tokens * scale))])


def read_trace(path: Path, limit: int | None = None) -> list[Arrival]:
    """The first `limit` requests of a trace, in the order of their times. Raises `KvistError` naming the line."""
    arrivals: list[Arrival] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(_MOST_LINE + 1), b""), 1):
                if limit is not None and len(arrivals) >= limit:
                    break
                if line.strip():
                    arrivals.append(_arrival(line, f"{path}, line {number}"))
    except OSError as error:
        raise KvistError(f"cannot read {path}: {error.strerror}") from None
    if not arrivals:
        raise KvistError(f"{path} holds no request")
    arrivals.sort(key=lambda arrival: arrival.at)
    start = arrivals[0].at
    return [Arrival(a.at - start, a.prompt_tokens, a.new_tokens, a.blocks) for a in arrivals]


def _arrival(line: bytes, where: str) -> Arrival:
    if len(line) > _MOST_LINE:
        raise KvistError(f"{where} is longer than {_MOST_LINE:,} bytes")
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        raise KvistError(f"{where} is no JSON") from None
    if not isinstance(raw, dict):
        raise KvistError(f"{where} is no JSON object")
    timestamp = _number(raw, "timestamp", where, 0, 1e15)
    prompt, new = (int(_number(raw, key, where, 1, _MOST_TOKENS)) for key in ("input_length", "output_length"))
    blocks = raw.get("hash_ids")
    if not isinstance(blocks, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in blocks):
        raise KvistError(f"{where}: hash_ids should be a list of whole numbers")
    if len(blocks) != -(-prompt // BLOCK):
        raise KvistError(
            f"{where}: {prompt:,} tokens are {-(-prompt // BLOCK)} blocks of {BLOCK}, and hash_ids has {len(blocks)}"
        )
    return Arrival(timestamp / 1000, prompt, new, tuple(blocks))


def _number(raw: dict[str, Any], key: str, where: str, least: float, most: float) -> float:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise KvistError(f"{where}: {key} should be a number from {least:g} to {most:g}, got {value!r}")
    return value


async def replay(
    url: str, arrivals: Sequence[Arrival], vocab: int, scale: float, speed: float, watch: Callable[[str], None]
) -> list[Answer]:
    """Each request at its time, `speed` times as fast as it was recorded; the answers in the order of the trace."""
    started, done = time.perf_counter(), 0

    async def one(number: int, arrival: Arrival, client: Client) -> Answer:
        nonlocal done
        await asyncio.sleep(max(0.0, arrival.at / speed - (time.perf_counter() - started)))
        new = max(1, round(arrival.new_tokens * scale))
        answer = await client.complete(arrival.prompt(vocab, scale), new, seed=number)
        done += 1
        watch(f"trace: {done:,} of {len(arrivals):,} requests")
        return answer

    async with Client(url) as client:
        return await asyncio.gather(*(one(number, arrival, client) for number, arrival in enumerate(arrivals)))
