"""Small vocabularies from a corpus: one token per character, or byte-level BPE. Deterministic."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from kvist.base.errors import TextError
from kvist.base.files import atomic_file
from kvist.text.tokenizer import END_OF_TEXT

_BYTES = 256


def train_characters(corpus: str) -> Tokenizer:
    """One token per character (code point) of `corpus`, ids in code point order.

    No token stands for unknown characters: encoding one is an error. Raises `TextError` for an empty corpus.
    """
    _check(corpus)
    vocabulary = {character: index for index, character in enumerate(sorted(set(corpus)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def train_bytes_bpe(corpus: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE: `END_OF_TEXT` at id 0, the 256 bytes, then merges up to `vocab_size`.

    Every text can be encoded. A small corpus may run out of pairs and give fewer tokens. Raises `TextError`
    for an empty corpus, or a size that has no room for the bytes.
    """
    _check(corpus)
    if vocab_size <= _BYTES:
        raise TextError(f"a byte-level vocabulary needs at least {_BYTES + 1} tokens, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus], trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, eos: str | None = None) -> None:
    """Write tokenizer.json and tokenizer_config.json, which transformers' `AutoTokenizer` reads too.

    `eos` is the token that ends a text. Raises `TextError` when the vocabulary lacks it, `KvistError` when a
    file cannot be written.
    """
    if eos is not None and tokenizer.token_to_id(eos) is None:
        raise TextError(f"the vocabulary has no token {eos!r} to end a text with")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if eos is not None:
        config["eos_token"] = eos
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    for name, text in files.items():
        with atomic_file(directory / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def _check(corpus: str) -> None:
    if not corpus:
        raise TextError("the corpus is empty; a vocabulary needs text to be made from")
    if surrogate := next((character for character in corpus if "\ud800" <= character <= "\udfff"), ""):
        raise TextError(f"the corpus holds the lone surrogate U+{ord(surrogate):04X}, which is no character")
