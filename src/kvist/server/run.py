"""Listening, serving, and an orderly end.

The first SIGTERM or SIGINT closes the port and refuses what waits; what runs has the grace period to end. The second
ends that, too, at the next step of the engine; each stream gets its proper end. The third kills the process.
"""

import asyncio
import contextlib
import gc
import ipaddress
import logging
import math
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from kvist.base.errors import KvistError
from kvist.server.connections import BACKLOG, QUEUE, bounded, most_connections
from kvist.server.settings import ServerSettings

Stop = Callable[[float], Awaitable[None]]

log = logging.getLogger("kvist.server")

_KEEP_ALIVE = 30  # seconds that a connection may lie idle: longer than clients keep theirs, so that they end it
_DRAIN = 5  # seconds beyond the grace period in which clients must have read their answers
_LAST_WORDS = 0.2  # seconds in which streams that were ended at once are told so
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def listen(host: str, port: int) -> socket.socket:
    """A socket that holds the address; nobody can connect to it yet. Port 0 is any that is free.

    Raises `KvistError` when the address is taken, or none of this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Of a name's addresses an IPv4 one, which is what most clients try for localhost.
        family, kind, protocol, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise KvistError(f"cannot listen on {host!r}: {getattr(error, 'strerror', None) or error}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise KvistError(f"cannot listen on port {port} of {host}: {reason}; choose another with --port") from None
    return listening


def is_loopback(listening: socket.socket) -> bool:
    """Whether only programs on this machine can connect."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def url_of(listening: socket.socket) -> str:
    """Where to ask. An address that stands for all of the machine's is told as this machine's own."""
    host, port = listening.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server with an end of its own: see above.

    `stop` ends the work behind the application: what waits at once, what runs after that many seconds; it may be called
    again with fewer. `ready` is called once the server answers.
    """

    def __init__(
        self,
        app: FastAPI,
        stop: Stop,
        settings: ServerSettings,
        ready: Callable[[], None],
    ) -> None:
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=bounded(most_connections(settings.max_connections), settings.head_timeout),
            backlog=BACKLOG,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=math.ceil(settings.grace) + _DRAIN,
        )
        super().__init__(config)
        self._stop = stop
        self._grace = settings.grace
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # another program was quicker to listen where this one was only bound
            await self.lifespan.shutdown()
            raise KvistError(f"cannot listen: {error.strerror or error}; choose another port with --port") from None
        for listening in sockets or []:
            listening.listen(QUEUE)  # asyncio accepts in a row as many as it lets wait, and that is fewer
        # What is there by now stays. Looking through it again takes the collector a sixth of a second, wherever it is.
        gc.collect()
        gc.freeze()
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Both wait for each other: connections for the answers, the engine for nothing that is still asked."""
        ending = asyncio.create_task(self._end())
        await super().shutdown(sockets)
        await ending
        if self.force_exit:  # uvicorn then leaves the application's own end out
            await self.lifespan.shutdown()
        self._hang_up()  # what is left are readers that do not read
        await asyncio.sleep(0)

    async def _end(self) -> None:
        stop = asyncio.ensure_future(self._stop(self._grace))
        while not stop.done() and not self.force_exit:
            await asyncio.wait({stop}, timeout=0.05)
        if self.force_exit:
            await self._stop(0)
            await asyncio.sleep(_LAST_WORDS)
            self._hang_up()
        await stop

    def _hang_up(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals for as long as it serves. None is raised again: whoever asked for the end has it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.force_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.force_exit = self.should_exit
        self.should_exit = True


def serve(
    app: FastAPI,
    stop: Stop,
    settings: ServerSettings,
    listening: socket.socket,
    ready: Callable[[], None],
) -> None:
    """Answer on `listening` until a signal ends it."""
    asyncio.run(Server(app, stop, settings, ready).serve([listening]))
