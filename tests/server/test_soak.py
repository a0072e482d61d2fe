"""The server under clients of every kind: no defect, no leak, and a clean engine at the end."""

import asyncio
import ctypes
import gc
import math
import os
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from attacks import attacks
from prober import Probe, probing, slowest
from soak import KINDS, Report, visit

from kvist.runtime.request import Request
from kvist.server.app import create_app
from kvist.server.connections import BACKLOG
from kvist.server.settings import ServerSettings
from kvist.service.aside import THREAD_NAME
from kvist.service.session import Job
from live import Live, live
from tiny_model import open_serving

MOST_BODY = 1 << 16
LONG_BODY = 1 << 20  # of the long one
SECONDS = 20
LONG = float(os.environ.get("KVIST_SOAK_SECONDS", 20 * 60))
ATTACK_SECONDS = 8
WARM = 0.4  # of the time: caches fill, memory is taken for the first time
TEMPLATE_PIPES = 6  # of the processes that are started when several chat templates are rendered at once
MOST_GROWTH = 24 << 20  # bytes: the allocator's own play; what leaks grows with the time


def own_threads() -> list[str]:
    """Threads but for those that routes borrow, which stay for a while when they are not needed."""
    borrowed = ("AnyIO", THREAD_NAME)
    return sorted(thread.name for thread in threading.enumerate() if not thread.name.startswith(borrowed))


def held() -> int:
    """Bytes that this process, which is the server's, holds; what the allocator has for later is given back first."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def soak(model: Path, seconds: float, most_body: int) -> None:
    settings = ServerSettings(
        max_body_bytes=most_body,
        max_values=most_body // 16,
        body_timeout=2,
        timeout=50,
        # More than lie there at once: whoever has connected and is about to ask would else lose its place now and then.
        max_connections=12 * BACKLOG,
    )
    serving = open_serving(model, blocks=96, running=4, max_waiting=4, timeout=50)
    process = psutil.Process()
    with live(create_app(serving, settings), serving, settings) as server:
        files, threads = process.num_fds(), own_threads()
        with probing(server.port) as probes:
            report = visit(server.port, seconds * WARM, 1, most_body)
            warm = held()
            report += visit(server.port, seconds * (1 - WARM), 2, most_body)
        growth = held() - warm
        assert settle(server) == []
        assert process.num_fds() <= files + TEMPLATE_PIPES
        assert own_threads() == threads
    print(table(probes, report.spans))
    print("statuses · " + ", ".join(f"{status}: {count}" for status, count in sorted(report.statuses().items())))
    print(f"memory · {growth / 2**20:+.1f} MiB since warm")
    assert report.failures == [], f"{len(report.failures)} of {report.seen.total()}, first of all"
    assert [probe for probe in probes if probe.status != 200] == []
    assert growth < MOST_GROWTH
    # All of them came, and met what they were to meet.
    assert min(report.count(kind) for kind in KINDS) > 0, report.seen
    assert report.statuses().keys() >= {200, 400, 404, 405, 413, 429}
    assert report.seen["whole", 200] + report.seen["streamed", 200] > seconds / 2


def table(probes: list[Probe], spans: list[tuple[str, float, float]]) -> str:
    """The slowest `/health` by what was under way meanwhile."""
    under_way: dict[str, list[tuple[float, float]]] = {"anything at all": [(0, math.inf)]}
    for name, start, end in sorted(spans):
        under_way.setdefault(name, []).append((start, end))
    rows = [f"{'while there was under way':<36}{'probes':>8}{'99 of 100, s':>14}{'worst /health, s':>18}"]
    for name, its in under_way.items():
        count, most, worst = slowest(probes, its)
        rows.append(f"{name:<36}{count:>8}{most:>14.3f}{worst:>18.3f}")
    return "\n".join(["", *rows])


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


def test_clients_of_every_kind_for_a_while(tiny_model: Path) -> None:
    soak(tiny_model, SECONDS, MOST_BODY)


def test_a_defect_and_a_leak_are_found(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServerSettings(max_body_bytes=MOST_BODY, body_timeout=0.5)
    serving = open_serving(tiny_model)
    app = create_app(serving, settings)
    monkeypatch.setattr(serving.tokenizer, "encode", lambda text, add_special=True: 1 // 0)
    with live(app, serving, settings) as server:
        report = visit(server.port, 1, 1, MOST_BODY)
        assert any(failure.startswith("500 for /v1/chat/completions") for failure in report.failures)

        async def forget() -> None:
            serving.submit(Job(Request((1, 2, 3), 2000)))

        asyncio.run_coroutine_threadsafe(forget(), server.loop).result(5)
        assert settle(server, 0) != []


@pytest.mark.slow
def test_others_are_answered_under_each_attack(tiny_model: Path) -> None:
    """One client repeats an attack for a while, and then the next; the table says how long `/health` took meanwhile."""
    settings, serving = ServerSettings(), open_serving(tiny_model, blocks=96)
    report = Report()
    with live(create_app(serving, settings), serving, settings) as server, probing(server.port) as probes:
        for attack in attacks(LONG_BODY):
            report += visit(server.port, ATTACK_SECONDS, 1, LONG_BODY, attack.name)
    print(table(probes, report.spans))
    assert report.failures == []
    assert [probe for probe in probes if probe.status != 200] == []
    assert {name for name, _ in report.seen} == {attack.name for attack in attacks(LONG_BODY)}


@pytest.mark.slow
def test_clients_of_every_kind_for_minutes(tiny_model: Path) -> None:
    """20 minutes, or as many seconds as KVIST_SOAK_SECONDS says."""
    soak(tiny_model, LONG, LONG_BODY)
