"""A text as training and validation tokens, and the rows of a step: a function of seed and step alone."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor

from kvist.base.errors import TextError
from kvist.text.training import train_bytes_bpe, train_characters
from kvist.train.settings import TrainSettings, Vocabulary

VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Corpus:
    """`train`, `validation` `[n]` int64: the first nine tenths of the characters, and the rest.

    `digest`: SHA-256 (hex) of the file. `validation_characters`: how many characters `validation` stands for.
    """

    name: str
    digest: str
    tokenizer: tokenizers.Tokenizer
    train: Tensor
    validation: Tensor
    validation_characters: int


def read_corpus(path: Path, settings: TrainSettings) -> Corpus:
    """Read and tokenize `path`. Raises `TextError` when it is no UTF-8 text or too short for the context."""
    try:
        raw = path.read_bytes()
        text = raw.decode()
    except IsADirectoryError:
        raise TextError(f"{path} is a directory; the corpus is one text file") from None
    except FileNotFoundError:
        raise TextError(f"{path} does not exist") from None
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text: byte {error.start:,} is 0x{raw[error.start]:02x}") from None
    if not text:
        raise TextError(f"{path} is empty; a corpus needs text to learn from")
    cut = int(len(text) * (1 - VALIDATION_SHARE))
    if settings.vocabulary is Vocabulary.CHARACTERS:
        tokenizer = train_characters(text)
    else:
        tokenizer = train_bytes_bpe(text[:cut], settings.vocab_size)
    train, validation = _encode(tokenizer, text[:cut]), _encode(tokenizer, text[cut:])
    for name, tokens in (("training", train), ("validation", validation)):
        if len(tokens) < settings.context + 2:
            raise TextError(
                f"{path} is too short: its {name} part has {len(tokens):,} tokens and a context of "
                f"{settings.context:,} needs {settings.context + 2:,}"
            )
    return Corpus(path.name, hashlib.sha256(raw).hexdigest(), tokenizer, train, validation, len(text) - cut)


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> Tensor:
    return torch.tensor(tokenizer.encode(text).ids, dtype=torch.int64)


def training_rows(tokens: Tensor, settings: TrainSettings, step: int) -> Tensor:
    """The rows of step `step`, `[rows, context + 1]` int64: inputs and, one further, targets.

    An epoch cuts the tokens into windows from a random offset on and takes each once, in random order.
    """
    context = settings.context_at(step)
    rows = settings.tokens_per_step // context
    first = rows * (step if step < settings.short_steps else step - settings.short_steps)
    # One window fewer than fit, so that the offset has a whole window's room.
    windows = max(1, (len(tokens) - 1) // context - 1)
    starts: list[int] = []
    while len(starts) < rows:
        epoch, place = divmod(first + len(starts), windows)
        starts += _epoch(len(tokens), context, windows, settings.seed, epoch)[place : place + rows - len(starts)]
    return torch.stack([tokens[start : start + context + 1] for start in starts])


def _epoch(length: int, context: int, windows: int, seed: int, epoch: int) -> list[int]:
    """Where each window of an epoch starts, in the order in which they are taken."""
    # Philox counts its draws in the low words of the counter; the high ones are free to name a stream.
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, epoch, context]))
    offset = int(generator.integers(length - windows * context))
    return [offset + int(window) * context for window in generator.permutation(windows)]
