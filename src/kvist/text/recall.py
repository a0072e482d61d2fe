"""Associative recall: sequences of token ids, made from a seed, in which every answer stands earlier in the sequence.

After multi-query associative recall (Arora et al. 2023, arXiv 2312.04927). A sequence is a *context*, pairs of a key
and its value at random places in noise, and a *query block*, the same keys in another order, each followed by its
value. A model that knows a value has read it out of its cache: nothing else in the sequence tells it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.base.errors import RequestError

VOCAB_SIZE = 512
BEGIN, QUERY = 0, 1  # the first token of a sequence, and of its query block
FIRST_KEY, KEYS = 2, 190
FIRST_VALUE, VALUES = FIRST_KEY + KEYS, 190
FIRST_NOISE = FIRST_VALUE + VALUES
MOST_PAIRS = KEYS  # a key stands in a sequence once


@dataclass(frozen=True)
class RecallBatch:
    """`tokens` `[rows, length]` int64: `context` tokens, then the query block.

    `places` `[rows, pairs]` int64: where the key stands in the context that query i of the row asks for.
    """

    tokens: Tensor
    context: int
    places: Tensor

    @property
    def questions(self) -> Tensor:
        """`[pairs]` int64: the positions of the queries' keys. The logits there predict the values."""
        return torch.arange(self.context + 1, self.tokens.shape[1], 2)

    @property
    def answers(self) -> Tensor:
        """The right values, `[rows, pairs]` int64."""
        return self.tokens[:, self.context + 2 :: 2]


def recall_batch(rows: int, length: int, pairs: int, generator: torch.Generator) -> RecallBatch:
    """`rows` sequences of `length` tokens with `pairs` pairs each, all of them asked for.

    Raises `RequestError` when there are no such sequences.
    """
    context = length - 1 - 2 * pairs
    slots = (context - 1) // 2  # pairs of places behind the first token
    if not 1 <= pairs <= min(MOST_PAIRS, slots):
        raise RequestError(
            f"{length:,} tokens do not hold {pairs:,} pairs and their queries: each takes four tokens, a sequence two "
            f"more, and there are {MOST_PAIRS} keys"
        )

    def numbers(first: int, count: int, *size: int) -> Tensor:
        return torch.randint(first, first + count, size, generator=generator)

    def different(count: int, of: int) -> Tensor:
        return torch.rand(rows, of, generator=generator).argsort(1)[:, :count]

    tokens = numbers(FIRST_NOISE, VOCAB_SIZE - FIRST_NOISE, rows, length)
    tokens[:, 0], tokens[:, context] = BEGIN, QUERY
    keys, values = FIRST_KEY + different(pairs, KEYS), numbers(FIRST_VALUE, VALUES, rows, pairs)
    places = 1 + 2 * different(pairs, slots)
    tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
    order = different(pairs, pairs)
    tokens[:, context + 1 :: 2], tokens[:, context + 2 :: 2] = keys.gather(1, order), values.gather(1, order)
    return RecallBatch(tokens, context, places.gather(1, order))
