"""Log-probabilities in the two shapes that OpenAI has: one entry a token in chats, parallel lists in completions."""

from collections.abc import Sequence

from kvist.runtime.request import TokenLogprobs
from kvist.server.openai.replies import LegacyLogprobs, TokenLogprob, TopLogprob
from kvist.service.session import NewToken
from kvist.text.detokenizer import Detokenizer
from kvist.text.tokenizer import Tokenizer

_LOWEST = -9999.0  # what OpenAI gives for -inf, which JSON has no number for


class TokenTexts:
    """The bytes and the text of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}

    def __call__(self, token: int) -> tuple[str, list[int]]:
        """The text and the bytes of a token. The text of one that is a piece of a character is `bytes:\\xe2\\x82`."""
        if token not in self._known:
            raw = self.tokenizer.token_bytes(token)
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            self._known[token] = text, list(raw)
        return self._known[token]

    def entries(self, tokens: Sequence[NewToken], most: int) -> list[TokenLogprob]:
        """The entries of drawn tokens, each with the `most` likeliest beside it. An end-of-text token is no part of an
        answer and has none."""
        ends = self.tokenizer.eos_ids
        return [
            {**self._entry(token.id, token.logprobs.logprob), "top_logprobs": self._top(token.logprobs, most)}
            for token in tokens
            if token.logprobs is not None and token.id not in ends
        ]

    def _top(self, logprobs: TokenLogprobs, most: int) -> list[TopLogprob]:
        return [self._entry(token, logprob) for token, logprob in logprobs.top[:most]]

    def _entry(self, token: int, logprob: float) -> TopLogprob:
        text, raw = self(token)
        return {"token": text, "logprob": finite(logprob), "bytes": raw}


class LegacyWriter:
    """The entries of one choice, as they come. `text_offset` counts characters of the choice's text.

    `top_logprobs` holds the `most` likeliest and the token itself; end-of-text tokens have entries too, for whoever
    scores a text counts on one entry a token.
    """

    def __init__(self, texts: TokenTexts, most: int) -> None:
        self._texts = texts
        self._most = most
        self._detokenizer = Detokenizer(texts.tokenizer)
        self._offset = 0
        self._entries = self._empty()

    def write_prompt(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None], text: str) -> None:
        """The entries of an echoed prompt, whose text is `text`: its end is that of the tokens' texts. Where a special
        token before it is not part of it, it stands at offset 0 as well."""
        detokenizer = Detokenizer(self._texts.tokenizer, skip_special=False)
        lengths = [len(detokenizer.push(token)) for token in tokens]
        offset = len(text) - sum(lengths) - len(detokenizer.finish())
        for token, entry, length in zip(tokens, logprobs, lengths, strict=True):
            self._write(token, entry, max(offset, 0))
            offset += length
        self._offset = len(text)

    def write(self, tokens: Sequence[NewToken]) -> None:
        for token in tokens:
            self._write(token.id, token.logprobs, self._offset)
            self._offset += len(self._detokenizer.push(token.id))

    def take(self) -> LegacyLogprobs:
        """What was written since the last time."""
        entries, self._entries = self._entries, self._empty()
        return entries

    def _write(self, token: int, logprobs: TokenLogprobs | None, offset: int) -> None:
        text, _ = self._texts(token)
        entries = self._entries
        entries["tokens"].append(text)
        entries["text_offset"].append(offset)
        if logprobs is None:  # the first token of a prompt follows nothing
            entries["token_logprobs"].append(None)
            entries["top_logprobs"].append(None)
            return
        top: dict[str, float] = {}
        for other, logprob in (*logprobs.top[: self._most], (token, logprobs.logprob)):
            top.setdefault(self._texts(other)[0], finite(logprob))  # tokens may be spelled alike: the likeliest stays
        entries["token_logprobs"].append(finite(logprobs.logprob))
        entries["top_logprobs"].append(top)

    @staticmethod
    def _empty() -> LegacyLogprobs:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def finite(logprob: float) -> float:
    """A number that JSON has."""
    return max(logprob, _LOWEST)
