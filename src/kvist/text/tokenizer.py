"""A checkpoint's tokenizer: text to token ids and back, and which ids end a text."""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from kvist.base.errors import KvistError, TextError
from kvist.base.files import MAX_JSON_BYTES, read_json

TOKENIZER = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"  # GPT-2's
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_SHOWN_CHARACTERS = 100
_SHOWN_REASON = 200  # characters of what the library says
_MOST_BYTES = 256 << 20  # of tokenizer.json
_LONG = 1 << 12  # characters of a text that is encoded without holding the interpreter
_SHRINKS = 4  # by how much a normalizer may shorten a text: composing takes three bytes for one


class Tokenizer:
    """Text and token ids, by the rules of a `tokenizers.Tokenizer`.

    `eos_ids` are the ids that end a text (a chat model may have several), `bos_id` the one that begins it, if
    any. Padding and truncation that the file asks for are switched off: a text is encoded whole and as it is.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_ids: Iterable[int] = (), bos_id: int | None = None) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.eos_ids = frozenset(eos_ids)
        self.bos_id = bos_id
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._added = frozenset(added)
        decoder = b"" if backend.decoder is None else backend.decoder.__getstate__()
        is_words = isinstance(backend.model, models.WordLevel)
        self._of_characters = is_words and all(len(token) == 1 for token in backend.get_vocab(with_added_tokens=False))
        self._falls_back = b"ByteFallback" in decoder  # to tokens that are single bytes, spelled <0xE2>

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Reads tokenizer.json, or a GPT-2's vocab.json and merges.txt, and the configurations beside it.

        The end-of-text ids are those of generation_config.json, config.json, tokenizer_config.json and
        special_tokens_map.json together. Raises `TextError` for a missing or unreadable file.
        """
        named = _optional(directory / "special_tokens_map.json") | _optional(directory / "tokenizer_config.json")
        bos, eos = (_content(named.get(key)) for key in ("bos_token", "eos_token"))
        if (directory / TOKENIZER).is_file():
            backend = _read_backend(directory / TOKENIZER)
        elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            backend = _read_gpt2(directory, (bos, eos, END_OF_TEXT))
        else:
            raise TextError(f"{directory} holds neither tokenizer.json nor vocab.json with merges.txt")
        eos_ids = _eos_ids(directory / "generation_config.json") | _eos_ids(directory / "config.json")
        eos_id = None if eos is None else backend.token_to_id(eos)
        bos_id = None if bos is None else backend.token_to_id(bos)
        return cls(backend, eos_ids if eos_id is None else eos_ids | {eos_id}, bos_id)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids, with the special tokens that the file's post-processor adds unless `add_special` is False: a chat
        template writes them itself.

        Raises `TextError` for a lone surrogate, and for a character that a vocabulary of characters lacks.
        """
        try:
            if len(text) < _LONG:
                return self._backend.encode(text, add_special_tokens=add_special).ids
            # A batch is encoded while other threads run; the other call holds them all up.
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
        except BaseException as error:
            raise TextError(self._refusal(text, _failure(error))) from error

    def fewest_tokens(self, text: str) -> int:
        """At least so many tokens a text has, told from its length alone; 0 where a token may stand for any length."""
        if not self._longest:
            return 0
        return len(text.encode(errors="replace")) // self._longest

    @cached_property
    def _longest(self) -> int:
        """The most bytes of a text that one token may stand for. 0: any number, as one for all that is unknown may."""
        if not (self.byte_level or self._falls_back):
            return 0
        width = max(len(token if self.byte_level else token.encode()) for token in self._backend.get_vocab())
        width = max(width, *(len(self.token_bytes(index)) for index in self._added), 1)
        return width if self._backend.normalizer is None else width * _SHRINKS

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without a token nothing. Raises `TextError`
        where the file's decoder fails."""
        try:
            return self._backend.decode(ids, skip_special_tokens=skip_special)
        except BaseException as error:
            raise TextError(f"the tokens cannot be made text: {_one_line(_failure(error))}") from error

    def missing(self, text: str) -> list[str]:
        """The characters of a text that no token spells. Only a vocabulary of characters lacks any."""
        if not self._of_characters:
            return []
        return sorted(character for character in set(text) if self._backend.token_to_id(character) is None)

    def replaced(self, text: str) -> tuple[str, list[str]]:
        """A text that can be spelled, and the characters in whose place it has a question mark, or a space."""
        missing = self.missing(text)
        if not missing:
            return text, []
        instead = next((character for character in "? " if self._backend.token_to_id(character) is not None), "")
        return text.translate(dict.fromkeys(map(ord, missing), instead)), missing

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry for an id, as it is spelled there; None for an id without one."""
        return self._backend.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds within a text; none for an id without a token. A special token's are its name."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return token.encode()
        if self.byte_level:
            return bytes(BYTE_OF[character] for character in token if character in BYTE_OF)
        if _BYTE_TOKEN.fullmatch(token) and self._falls_back:
            return bytes([int(token[3:5], 16)])
        # Twice, because a text's first token may be decoded unlike the others.
        twice, once = (self.decode([token_id] * count, skip_special=False) for count in (2, 1))
        return twice[len(once) :].encode()

    def special_spans(self, text: str) -> list[tuple[int, int, int]]:
        """The special tokens whose text stands in `text`: id, and where it begins and ends, in order."""
        found, end = [], 0
        for token_id in self.encode(text, add_special=False) if self.special_ids else ():
            if token_id in self.special_ids and (token := self.token(token_id)):
                first = text.find(token, end)
                if first >= 0:  # the unknown token stands for other text
                    end = first + len(token)
                    found.append((token_id, first, end))
        return found

    def _refusal(self, text: str, error: BaseException) -> str:
        surrogate = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
        if surrogate is not None:
            return f"the text holds the lone surrogate U+{ord(surrogate):04X}, which is no character"
        vocabulary = self._backend.get_vocab()
        missing = next((character for character in text if character not in vocabulary), None)
        if missing is None or not isinstance(self._backend.model, models.WordLevel):
            return f"the text cannot be tokenized: {_one_line(error)}"
        known = "".join(sorted(token for token in vocabulary if len(token) == 1))
        shown = known if len(known) <= _SHOWN_CHARACTERS else f"{known[:_SHOWN_CHARACTERS]}..."
        return f"{missing!r} is not among the {len(known)} characters of this model's vocabulary: {shown!r}"


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if path.stat().st_size > _MOST_BYTES:
        raise TextError(f"{path} is larger than {_MOST_BYTES:,} bytes, too large for a tokenizer")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:
        raise TextError(f"{path} is not a tokenizer that can be read: {_one_line(_failure(error))}") from error
    _object(path, _MOST_BYTES)  # the library takes the last of two values
    return backend


def _read_gpt2(directory: Path, special: Iterable[str | None]) -> tokenizers.Tokenizer:
    """GPT-2's byte-level BPE from its two files, with those of `special` that its vocabulary has."""
    try:
        model = models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    except Exception as error:  # the library raises plain Exception
        raise TextError(f"{directory}: vocab.json and merges.txt cannot be read: {_one_line(error)}") from error
    _object(directory / "vocab.json", _MOST_BYTES)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    known = sorted({token for token in special if token is not None and backend.token_to_id(token) is not None})
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in known])
    return backend


def _optional(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file."""
    return _object(path) if path.exists() else {}


def _object(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `path`; no key in it has two values."""
    try:
        return read_json(path, limit)
    except KvistError as error:
        raise TextError(str(error)) from error


def _content(token: Any) -> str | None:
    """A special token's text, which configurations write as a string or as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str) and any("\ud800" <= character <= "\udfff" for character in token):
        raise TextError(f"a special token's text holds a lone surrogate: {token!r:.80}")
    return token if isinstance(token, str) else None


def _eos_ids(path: Path) -> frozenset[int]:
    """`eos_token_id` in `path`: an id, a list of ids, or absent."""
    value = _optional(path).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise TextError(f"{path}: eos_token_id should be a token id or a list of them, got {value!r:.80}")
    return frozenset(ids)


def _byte_alphabet() -> dict[str, int]:
    """The byte behind each of GPT-2's 256 characters: printable Latin-1 is itself, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()  # how byte-level vocabularies spell bytes


def _failure(error: BaseException) -> BaseException:
    """The library's own failure: a plain Exception, or a panic of its Rust, which is none of Exception's kind. What it
    is not, as Ctrl-C, is raised again."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return error
    raise error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:_SHOWN_REASON]
