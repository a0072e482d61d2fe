"""Whether the engine's thread gets on with what it has to do."""

import time
from collections.abc import Callable

# A step that has ended and got nothing done waits for the kept cache, which is given up for after seconds.
PATIENCE = 30.0
# A step, or a command, that is under way may be a long one: the widest of a large model takes minutes on few cores.
LONGEST = 900.0


class Watch:
    """A heartbeat of the engine's thread, which alone changes it; any thread may ask. `clock`: seconds that only grow.

    What is under way counts as going on for `LONGEST` seconds; what has ended counts where it got something done.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: float | None = None  # what is under way
        self._moved: float | None = None  # when something was last done; None while there is nothing to do

    def rest(self) -> None:
        """There is nothing to do."""
        self._moved = None

    def begin(self) -> None:
        """A step, or a command, begins."""
        self._began = self._clock()

    def end(self, moved: bool) -> None:
        """It has ended. `moved`: whether it got something done."""
        if moved or self._moved is None:
            self._moved = self._clock()
        self._began = None

    def trouble(self) -> str | None:
        """Why nothing can be expected, in a line; None while the thread gets on, or has nothing to do."""
        began, moved, now = self._began, self._moved, self._clock()
        if began is not None:
            return f"the engine has been in one step for {now - began:,.0f} s" if now - began > LONGEST else None
        if moved is None or now - moved <= PATIENCE:
            return None
        return f"the engine has work and has got nothing done for {now - moved:,.0f} s; the log may say why"
