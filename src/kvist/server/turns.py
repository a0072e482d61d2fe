"""Long bodies one after another: reading one holds the event loop for a moment, and many of them at once would hold it
for many moments on end."""

import asyncio

_BREATH = 0.01  # seconds, the least that others have between two


class Turns:
    """On the event loop. What runs right behind `wait`, until it waits itself, has the loop for itself; before the next
    has its turn, all others have as long again."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def wait(self) -> None:
        await self._turn.acquire()
        loop = asyncio.get_running_loop()
        began = loop.time()
        # It is called when whoever had the turn waits for something, or is done.
        loop.call_soon(lambda: loop.call_later(max(loop.time() - began, _BREATH), self._turn.release))
