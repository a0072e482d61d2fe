"""The server under clients of every kind: no defect, no leak, and a clean engine at the end."""

import asyncio
import os
import threading
from pathlib import Path

import psutil
import pytest
from soak import Soak, settle

from kvist.runtime.request import Request
from kvist.server.app import create_app
from kvist.server.connections import BACKLOG
from kvist.server.settings import ServerSettings
from kvist.service.aside import THREAD_NAME
from kvist.service.session import Job
from live import live
from tiny_model import open_serving

MOST_BODY = 1 << 16
LONG_BODY = 1 << 20  # of the long one
SECONDS = 20
LONG = float(os.environ.get("KVIST_SOAK_SECONDS", 20 * 60))
TEMPLATE_PIPES = 6  # of the processes that are started when several chat templates are rendered at once
MOST_GROWTH = 24 << 20  # bytes: the allocator's own play; what leaks grows with the time


def own_threads() -> list[str]:
    """Threads but for those that routes borrow, which stay for a while when they are not needed."""
    borrowed = ("AnyIO", THREAD_NAME)
    return sorted(thread.name for thread in threading.enumerate() if not thread.name.startswith(borrowed))


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
        clients = Soak(server, seed=1, most_body=most_body)
        files, threads = process.num_fds(), own_threads()
        report = asyncio.run(clients.run(seconds))
        assert settle(server) == []
        assert process.num_fds() <= files + TEMPLATE_PIPES
        assert own_threads() == threads
    print(report.table())
    assert report.failures == [], f"{len(report.failures)} of {sum(report.seen.values())}, first of all"
    assert report.growth < MOST_GROWTH
    # All of them came, and met what they were to meet.
    assert min(report.count(kind) for kind in clients.kinds) > 0, report.seen
    assert report.statuses().keys() >= {200, 400, 404, 405, 413, 429}
    assert report.seen["whole", 200] + report.seen["streamed", 200] > seconds / 2


def test_clients_of_every_kind_for_a_while(tiny_model: Path) -> None:
    soak(tiny_model, SECONDS, MOST_BODY)


def test_a_defect_and_a_leak_are_found(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServerSettings(max_body_bytes=MOST_BODY, body_timeout=0.5)
    serving = open_serving(tiny_model)
    app = create_app(serving, settings)
    monkeypatch.setattr(serving.tokenizer, "encode", lambda text, add_special=True: 1 // 0)
    with live(app, serving, settings) as server:
        report = asyncio.run(Soak(server, seed=1, most_body=MOST_BODY).run(1))
        assert any(failure.startswith("500 for /v1/chat/completions") for failure in report.failures)

        async def forget() -> None:
            serving.submit(Job(Request((1, 2, 3), 2000)))

        asyncio.run_coroutine_threadsafe(forget(), server.loop).result(5)
        assert settle(server, 0) != []


@pytest.mark.slow
def test_clients_of_every_kind_for_minutes(tiny_model: Path) -> None:
    """20 minutes, or as many seconds as KVIST_SOAK_SECONDS says."""
    soak(tiny_model, LONG, LONG_BODY)
