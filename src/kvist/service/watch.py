"""Whether the engine's thread gets on with what it has to do."""

import time
from collections.abc import Callable

# Steps that get nothing done wait for the kept cache, which is given up for after seconds.
PATIENCE = 30.0
# A step, or a command, that is under way may be a long one: the widest of a large model takes minutes on few cores.
LONGEST = 900.0


class Watch:
    """A heartbeat of the engine's thread, which alone changes it; any thread may ask. `clock`: seconds that only grow.

    A step that got something done says that all is well, however long it took. Of those that did not the time is
    added up, and what is under way has `LONGEST` seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: float | None = None  # what is under way
        self._lost = 0.0  # seconds in steps that got nothing done, since one did

    def begin(self) -> None:
        """A step, or a command, begins."""
        self._began = self._clock()

    def end(self, moved: bool) -> None:
        """It has ended. `moved`: whether it got something done."""
        assert self._began is not None
        self._lost = 0.0 if moved else self._lost + self._clock() - self._began
        self._began = None

    def trouble(self) -> str | None:
        """Why nothing can be expected, in a line; None while the thread gets on, or has nothing to do."""
        began, lost = self._began, self._lost
        if lost > PATIENCE:
            return f"the engine has work and has got nothing done for {lost:,.0f} s; the log may say why"
        if began is not None and (seconds := self._clock() - began) > LONGEST:
            return f"the engine has been in one step for {seconds:,.0f} s"
        return None
