"""From the tokens that a sequence draws to the text that is certain."""

from collections.abc import Sequence

from kvist.text.detokenizer import Detokenizer
from kvist.text.stops import StopMatcher
from kvist.text.tokenizer import Tokenizer


class TextStream:
    """The text of one stream of tokens, up to the first stop string. `end_ids`: tokens that end a text and are none.

    `keep_special`: other special tokens give their text too.
    """

    def __init__(
        self, tokenizer: Tokenizer, end_ids: frozenset[int], stops: Sequence[str] = (), keep_special: bool = False
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special=not keep_special)
        self._stops = StopMatcher(stops)
        self._end_ids = end_ids

    @property
    def stop(self) -> str | None:
        """The stop string that was found; nothing needs to be pushed any more."""
        return self._stops.matched

    def push(self, token: int) -> str:
        """The text that one more token makes certain."""
        return "" if token in self._end_ids else self._stops.push(self._detokenizer.push(token))

    def finish(self) -> str:
        """The rest, once there are no more tokens. Call it once."""
        text = "" if self._stops.matched is not None else self._stops.push(self._detokenizer.finish())
        return text if self._stops.matched is not None else text + self._stops.finish()
