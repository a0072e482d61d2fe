"""How long one callback holds the event loop, whatever a client sends. Prints the table of docs/security.md.

What is measured is processor time of the loop's thread alone, so that other threads and processes count little.
"""

import asyncio
import itertools
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from attacks import attacks

from kvist.server.app import create_app
from kvist.server.settings import ServerSettings
from live import live
from tiny_model import open_serving

ROUNDS = 3
MOST = 0.25  # seconds of processor time: what is promised of `/health`
JSON = {"content-type": "application/json"}


class Longest:
    """The longest callback of the loops of this process since it was last asked."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def taken(self) -> float:
        found, self.seconds = self.seconds, 0.0
        return found


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> Longest:
    measured, run = Longest(), asyncio.Handle._run  # type: ignore[attr-defined]

    def timed(handle: asyncio.Handle) -> Any:
        start = time.thread_time()
        try:
            return run(handle)
        finally:
            measured.seconds = max(measured.seconds, time.thread_time() - start)

    monkeypatch.setattr(asyncio.Handle, "_run", timed)
    return measured


def test_what_is_measured(longest: Longest) -> None:
    def work() -> None:
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass

    async def main() -> None:
        asyncio.get_running_loop().call_soon(work)
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert longest.taken() >= 0.05
    assert longest.taken() == 0


@pytest.mark.slow
def test_no_body_holds_the_loop(tiny_model: Path, longest: Longest) -> None:
    settings, serving = ServerSettings(), open_serving(tiny_model)
    with live(create_app(serving, settings), serving, settings) as server:
        sizes = (1 << 20, settings.max_body_bytes - 4096)
        names = [attack.name for attack in attacks(1024)]
        rows = {name: list[tuple[float, float]]() for name in names}
        for size, _ in itertools.product(sizes, range(ROUNDS)):
            for attack in attacks(size):
                longest.taken()
                start = time.perf_counter()
                answer = httpx.post(f"{server.url}{attack.path}", content=attack.body, headers=JSON, timeout=120)
                answered = time.perf_counter() - start
                asyncio.run_coroutine_threadsafe(asyncio.sleep(0), server.loop).result(60)  # what sent it has ended
                rows[attack.name].append((answered, longest.taken()))
                assert answer.status_code in attack.statuses, f"{attack.name}: {answer.text[:500]}"
    print("\n| attack | 1 MiB: answered after | holds the loop | 8 MiB: answered after | holds the loop |")
    for name, found in rows.items():
        small, large = found[:ROUNDS], found[ROUNDS:]
        # The least of the rounds, for others' work on the machine only ever adds to it.
        least = [min(column) for part in (small, large) for column in zip(*part, strict=True)]
        print(f"| {name} | {' | '.join(f'{seconds:.2f} s' for seconds in least)} |")
    assert max(min(held for _, held in found) for found in rows.values()) < MOST
