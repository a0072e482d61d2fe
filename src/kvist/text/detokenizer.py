"""Token ids to text, one at a time. What was returned stays; all pieces joined are the text of the whole."""

import codecs

from kvist.text.tokenizer import BYTE_OF, Tokenizer

_UNDECODED = "\ufffd"


class Detokenizer:
    """The text of one stream of token ids. Special tokens give none where `skip_special`, as in `decode`."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._tokenizer = tokenizer
        self._text: _ByteText | _WindowText = _ByteText() if tokenizer.byte_level else _WindowText(tokenizer)

    def push(self, token_id: int) -> str:
        """The text that is settled by one more token: empty while a character is incomplete."""
        token = self._tokenizer.token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        return self._text.push(token_id, token)

    def finish(self) -> str:
        """The rest. An incomplete character becomes U+FFFD, as in `decode`; what is pushed after cannot complete it."""
        return self._text.finish()


class _ByteText:
    """Byte-level vocabularies: a token is bytes, spelled in GPT-2's alphabet of 256 printable characters."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int, token: str) -> str:
        try:
            raw = bytes(BYTE_OF[character] for character in token)
        except KeyError:  # an added token, spelled as itself
            raw = token.encode()
        return self._utf8.decode(raw)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowText:
    """Any other vocabulary: what a token adds to the text of the tokens before it, in a window that moves.

    A byte token (`<0xE2>`) waits for the end of its run, since one bad byte makes U+FFFD of the whole run.
    The tokens settled last are kept as context, because a text's first token is decoded unlike the others.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int, token: str) -> str:
        self._pending.append(token_id)
        in_byte_run = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        return "" if in_byte_run else self._settle(final=False)

    def finish(self) -> str:
        return self._settle(final=True)

    def _settle(self, final: bool) -> str:
        before = self._tokenizer.decode(self._context, skip_special=False)
        text = self._tokenizer.decode(self._context + self._pending, skip_special=False)
        if text.endswith(_UNDECODED) and not final:
            return ""
        self._context, self._pending = self._pending or self._context, []
        return text[len(before) :]
