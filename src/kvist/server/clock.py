"""How long the parts of an answer took, for the APIs that tell it."""

import time


class Clock:
    """When a request was asked, had its first token, and ended. In seconds, of a clock that only goes on."""

    def __init__(self) -> None:
        self._asked = self._first = self._last = time.perf_counter()
        self._begun = False

    def note(self, tokens: int) -> None:
        """So many tokens have come."""
        self._last = time.perf_counter()
        if tokens and not self._begun:
            self._first, self._begun = self._last, True

    @property
    def prefill(self) -> float:
        """Until the first token; all there was, where none came."""
        return (self._first if self._begun else self._last) - self._asked

    @property
    def decode(self) -> float:
        """From the first token on."""
        return self._last - self._first if self._begun else 0.0

    @property
    def total(self) -> float:
        return self._last - self._asked
