"""Stop strings in a stream of text: what comes before the first one is let through, and nothing after."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvist.base.errors import RequestError

# What stands for a special token among characters: lone surrogates, which no decoded text holds.
_MARKS = [chr(code) for code in range(0xD800, 0xE000)]
_NO_MARKS = dict.fromkeys(map(ord, _MARKS))


@dataclass(frozen=True)
class _Pattern:
    """`stop`: what the client called it. `back`: of each of its beginnings, the length of the longest shorter one that
    it ends on (Knuth, Morris and Pratt 1977), so that a stream is read once, whatever the lengths."""

    text: str
    stop: str
    back: tuple[int, ...]


class StopStrings:
    """What ends an answer; made once for all streams of a request.

    `special`: finds a text's special tokens, as `Tokenizer.special_spans`. A stop string that holds the text of one
    matches where the model writes these characters, and where it draws that token.
    """

    def __init__(
        self, stops: Sequence[str], special: Callable[[str], Sequence[tuple[int, int, int]]] = lambda text: ()
    ) -> None:
        """Raises `RequestError` for one that is empty."""
        if any(not stop for stop in stops):
            raise RequestError("a stop string is empty, and would stop every text before its first character")
        marks: dict[int, str] = {}
        texts = {stop: stop for stop in stops}
        for stop in stops:
            marked, end = "", 0
            for token, first, last in special(stop):
                if token in marks or len(marks) < len(_MARKS):
                    marked += stop[end:first] + marks.setdefault(token, _MARKS[len(marks)])
                    end = last
            texts.setdefault(marked + stop[end:], stop)
        self.patterns = tuple(_Pattern(text, stop, _back(text)) for text, stop in texts.items())
        self.marks: Mapping[int, str] = marks  # of the special tokens that some stop string holds


class StopMatcher:
    """Lets text through up to the first stop string, however the text is cut into pieces.

    The first is the one that is complete first, and among those that end together the longest. Text that may
    be the beginning of a stop string is held back until it is not. `matched` is the one found, or None.
    """

    def __init__(self, stops: StopStrings) -> None:
        self._patterns, self._marks = stops.patterns, stops.marks
        self._lengths = [0] * len(stops.patterns)  # of each pattern, how much of it the text ends on
        self._held = ""
        self.matched: str | None = None

    def sees(self, token: int) -> bool:
        """Whether a special token that gives no text may be part of a stop string."""
        return token in self._marks

    def push_special(self, token: int) -> str:
        """As `push`, of a token that `sees`; it is no part of the text that is let through."""
        return self.push(self._marks[token])

    def push(self, piece: str) -> str:
        """The text that no stop string can claim any more. Empty once one has matched."""
        if self.matched is not None:
            return ""
        if not self._patterns:
            return piece
        text = self._held + piece
        for end, character in enumerate(piece, start=len(self._held) + 1):
            if (found := self._advance(character)) is not None:
                self.matched, self._held = found.stop, ""
                return self._shown(text[: end - len(found.text)])
        keep = max(self._lengths)
        self._held = text[len(text) - keep :]
        return self._shown(text[: len(text) - keep])

    def finish(self) -> str:
        """The text held back, which no stop string completed."""
        rest, self._held = self._held, ""
        return self._shown(rest)

    def _advance(self, character: str) -> _Pattern | None:
        """Take note of one more character; the longest pattern that it completes."""
        found: _Pattern | None = None
        for index, pattern in enumerate(self._patterns):
            length = _longer(pattern, self._lengths[index], character)
            self._lengths[index] = length
            if length == len(pattern.text) and (found is None or length > len(found.text)):
                found = pattern
        return found

    def _shown(self, text: str) -> str:
        return text.translate(_NO_MARKS) if self._marks else text


def _longer(pattern: _Pattern, length: int, character: str) -> int:
    """How much of a pattern a text ends on that ended on `length` of it, after one more character."""
    while length and pattern.text[length] != character:
        length = pattern.back[length - 1]
    return length + 1 if pattern.text[length] == character else 0


def _back(text: str) -> tuple[int, ...]:
    back, length = [0], 0
    for character in text[1:]:
        while length and text[length] != character:
            length = back[length - 1]
        length += text[length] == character
        back.append(length)
    return tuple(back)
