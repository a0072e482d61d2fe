"""Stop strings in a stream of text: what comes before the first one is let through, and nothing after."""

from collections.abc import Sequence

from kvist.base.errors import RequestError


class StopMatcher:
    """Lets text through up to the first stop string, however the text is cut into pieces.

    The first is the one that is complete first, and among those that end together the longest. Text that may
    be the beginning of a stop string is held back until it is not. `matched` is the one found, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise RequestError("a stop string is empty, and would stop every text before its first character")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """The text that no stop string can claim any more. Empty once one has matched."""
        if self.matched is not None:
            return ""
        text = self._held + piece
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text held back, which no stop string completed."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
