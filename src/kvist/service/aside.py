"""Work that takes long, beside the event loop: rendering, tokenizing and compiling what a client sent.

Each of these gives other threads their turn: Python's own code after some milliseconds, tokenizing and compiling at
once. So the event loop and the engine go on. What is short is not sent here, for that would only take longer.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from kvist.base.errors import Overloaded, RequestError, Stopping

LIGHT = 1 << 13  # characters that are worked on at once
THREAD_NAME = "kvist-aside"
_THREADS = 4
_EACH = 2  # of these, that one tenant may have at once
_MOST_WAITING = 64  # of one tenant
_SECONDS = 30.0  # that one piece of work may take

T = TypeVar("T")


class Aside:
    """A few threads, shared fairly between tenants. For the event loop's thread.

    A thread cannot be stopped. Work that takes longer than it may is given up by whoever waits for it, and goes on
    holding its place, so that a tenant never has more than its share.
    """

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(_THREADS, THREAD_NAME)
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # in the order in which tenants have their turn

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Raises `Overloaded` when too much of the tenant's waits already, and
        `RequestError` for work that takes too long."""
        await self._turn(tenant)
        try:
            done = asyncio.get_running_loop().run_in_executor(self._threads, work)
        except RuntimeError:  # it was closed meanwhile
            self._leave(tenant)
            raise Stopping("the server is shutting down") from None
        done.add_done_callback(lambda done: self._end(tenant, done))
        try:
            return await asyncio.wait_for(asyncio.shield(done), self._seconds)
        except TimeoutError:
            raise RequestError(
                f"reading this request takes longer than {self._seconds:g} s; ask with less text, or a simpler schema"
            ) from None

    def close(self) -> None:
        """Nothing more begins."""
        self._threads.shutdown(wait=False)

    async def _turn(self, tenant: str) -> None:
        """Wait for a place."""
        if not self._waiting and self._has_place(tenant):
            self._running[tenant] += 1
            return
        queue = self._waiting.setdefault(tenant, deque())
        if len(queue) >= _MOST_WAITING:
            raise Overloaded("too many long requests of yours wait to be read; try again later", retry_after=5)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        self._hand_on()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                if turn in queue:
                    queue.remove(turn)
                self._hand_on()
            else:  # it was given at the same moment
                self._leave(tenant)
            raise

    def _has_place(self, tenant: str) -> bool:
        return self._running.total() < _THREADS and self._running[tenant] < _EACH

    def _hand_on(self) -> None:
        """Give free places to those who wait, a tenant after the other."""
        for tenant, queue in list(self._waiting.items()):
            while queue and queue[0].done():
                queue.popleft()  # its client is leaving at this moment
            if queue and self._has_place(tenant):
                self._running[tenant] += 1
                queue.popleft().set_result(None)
                del self._waiting[tenant]
                self._waiting[tenant] = queue  # behind the others
            if not queue:
                del self._waiting[tenant]

    def _leave(self, tenant: str) -> None:
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        self._hand_on()

    def _end(self, tenant: str, done: asyncio.Future[Any]) -> None:
        if not done.cancelled():
            done.exception()  # whoever waited for it may have left: it is heard here
        self._leave(tenant)
