"""Servers that really listen on a loopback port, on a thread of this process."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from kvist.server.run import Server, listen, url_of
from kvist.server.settings import ServerSettings


@dataclass
class Live:
    """A server under way. `serving` is what it serves, or what stands for that."""

    url: str
    server: Server
    serving: Any
    thread: threading.Thread
    loop: asyncio.AbstractEventLoop

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def stop(self) -> None:
        """As a signal does."""
        self.server.handle_exit(0, None)

    def ended(self, seconds: float = 20) -> bool:
        self.thread.join(seconds)
        return not self.thread.is_alive()


@contextlib.contextmanager
def live(app: FastAPI, serving: Any, settings: ServerSettings) -> Iterator[Live]:
    """The application behind a port of its own; stopped at the end, whatever is under way."""
    ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    with listen("127.0.0.1", 0) as listening:
        server = Server(app, serving.stop, settings, ready.set)

        async def main() -> None:
            loops.append(asyncio.get_running_loop())
            await server.serve([listening])

        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        assert ready.wait(60), "the server did not start"
        running = Live(url_of(listening), server, serving, thread, loops[0])
        try:
            yield running
        finally:
            server.should_exit = server.force_exit = True
            assert running.ended(), "the server does not end"


def exchange(port: int, sent: bytes, *, until: Callable[[bytes], bool] | None = None, seconds: float = 10) -> bytes:
    """Send bytes as they are and read what comes back: until that is enough, or the connection ends."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(sent)
        while not (until is not None and until(received)):
            try:
                piece = connection.recv(65536)
            except ConnectionResetError:
                break
            if not piece:
                break
            received += piece
    return received


def answer_of(received: bytes) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of a response as it came over the wire."""
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers, json.loads(body) if body else None
