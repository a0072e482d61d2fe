"""How many connections there may be, and how long one may take to say what it wants.

A client that connects and says nothing, or a byte now and then, holds a file descriptor. So there is a bound, beneath
what the process may open, and whoever comes when it is reached takes the place of one that says nothing: a server that
is full of these still answers. Those whose request has arrived are never ended for another.
"""

import asyncio
import resource
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

BACKLOG = 64  # connections that are accepted in a row, before anything looks at how many there are
QUEUE = 1024  # that the kernel holds until then; whoever comes beyond these tries again after a second
_RESERVE = 128  # file descriptors for everything else: `BACKLOG`, models, the cache on disk, its remote
_LEAST = 16


def most_connections(wanted: int) -> int:
    """As many as wanted, or as the process may have files open less a reserve."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, max(_LEAST, soft - _RESERVE))


def bounded(most: int, head_timeout: float) -> type[H11Protocol]:
    """A protocol for `uvicorn.Config`: at most so many connections, each with so many seconds for a request's head."""

    class Bounded(Connection):  # uvicorn makes them, and passes nothing of ours
        most_open, head_seconds = most, head_timeout

    return Bounded


class Connection(H11Protocol):
    """One connection. `waits`: its next request has not arrived whole."""

    most_open: int
    head_seconds: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.most_open:
            silent = [other for other in cast(set[Connection], self.connections) if other.waits]
            (min(silent, key=Connection.worth).transport if silent else transport).abort()
        super().connection_made(transport)
        self.heard = self.loop.time()
        self._time_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.heard = self.loop.time()
        self._time_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    @property
    def waits(self) -> bool:
        return not self.transport.is_closing() and (
            self.conn.their_state is h11.IDLE or (self.cycle is not None and self.cycle.more_body)
        )

    def worth(self) -> tuple[bool, float]:
        """Whoever was answered before and may ask again goes last; of the others the one that was silent for longest
        goes first."""
        return self.cycle is not None and self.cycle.response_complete, self.heard

    def _time_head(self) -> None:
        """A head has its time from when it could begin, however it trickles in."""
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
