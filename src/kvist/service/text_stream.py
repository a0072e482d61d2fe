"""From the tokens that a sequence draws to the text that is certain."""

from collections.abc import Sequence

from kvist.base.errors import TextError
from kvist.text.detokenizer import Detokenizer
from kvist.text.stops import StopMatcher, StopStrings
from kvist.text.tokenizer import Tokenizer

_NO_STOPS = StopStrings(())


def stop_strings(tokenizer: Tokenizer, stops: Sequence[str]) -> StopStrings:
    """What ends an answer of the model with this tokenizer: special tokens in it are found. Raises `RequestError`."""
    return StopStrings(stops, lambda text: _special_spans(tokenizer, text))


def _special_spans(tokenizer: Tokenizer, text: str) -> Sequence[tuple[int, int, int]]:
    try:
        return tokenizer.special_spans(text)
    except TextError:  # a vocabulary without some of its characters: the model cannot write it
        return ()


class TextStream:
    """The text of one stream of tokens, up to the first stop string. `end_ids`: tokens that end a text and are none.

    `keep_special`: other special tokens give their text too. Those that give none are seen by stop strings all the
    same.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_ids: frozenset[int],
        stops: StopStrings = _NO_STOPS,
        keep_special: bool = False,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special=not keep_special)
        self._stops = StopMatcher(stops)
        self._silent = end_ids if keep_special else end_ids | tokenizer.special_ids

    @property
    def stop(self) -> str | None:
        """The stop string that was found; nothing needs to be pushed any more."""
        return self._stops.matched

    def push(self, token: int) -> str:
        """The text that one more token makes certain."""
        if token not in self._silent:
            return self._stops.push(self._detokenizer.push(token))
        if not self._stops.sees(token):
            return ""
        # What a character still waits for does not come behind this token.
        return self._stops.push(self._detokenizer.finish()) + self._stops.push_special(token)

    def finish(self) -> str:
        """The rest, once there are no more tokens. Call it once."""
        text = "" if self._stops.matched is not None else self._stops.push(self._detokenizer.finish())
        return text if self._stops.matched is not None else text + self._stops.finish()
