"""From one row of logits to one token. Every draw depends on that row, the sequence's own tokens, the seed and the
position alone."""

import math
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from kvist.base.errors import RequestError
from kvist.runtime.request import Grammar, Sampling, TokenLogprobs

_FIRST_TRY = 256  # of the likeliest tokens, among which top-p mostly finds its own


class Sampler:
    """Draws the tokens of one sequence, and remembers them as far as penalties and the grammar need it.

    `ends`: tokens that are not drawn as one of the first `min_tokens`, unless the grammar allows nothing else.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        grammar: Grammar | None = None,
        *,
        ends: Collection[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._sampling = sampling
        self._grammar = grammar
        self._ends = sorted(ends)
        self._held = min_tokens if self._ends else 0  # tokens of the answer that may not be ends
        self._counts: Counter[int] = Counter()  # of the answer's tokens
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._bias = dict(sampling.logit_bias)
        self._changes = (
            bool(self._bias or sampling.presence_penalty or sampling.frequency_penalty or grammar is not None)
            or sampling.repetition_penalty != 1
            or self._held > 0
        )

    @property
    def ended(self) -> bool:
        """Whether the grammar lets nothing follow."""
        return self._grammar is not None and self._grammar.ended

    def draw(self, logits: Tensor, position: int) -> int:
        """The token at `position` of the sequence. `logits`: `[V]` float32 of the position before it, not changed.

        Raises `RequestError` when the grammar allows no token.
        """
        return sample(self._changed(logits) if self._changes else logits, self._sampling, position)

    def accept(self, token: int) -> None:
        """Take note of a token of the answer."""
        sampling = self._sampling
        self._held = max(self._held - 1, 0)
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts[token] += 1
        if sampling.repetition_penalty != 1:
            self._seen.add(token)
        if self._grammar is not None:
            self._grammar.accept(token)

    def _changed(self, logits: Tensor) -> Tensor:
        sampling, row = self._sampling, logits.clone()
        if sampling.repetition_penalty != 1:
            ids = torch.tensor(sorted(self._seen))
            seen = row[ids]
            penalty = sampling.repetition_penalty
            row[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
        if self._counts:
            counts = torch.tensor(list(self._counts.values()), dtype=row.dtype)
            row[torch.tensor(list(self._counts))] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if self._bias:
            row[torch.tensor(list(self._bias))] += torch.tensor(list(self._bias.values()), dtype=row.dtype)
        if self._grammar is not None:
            self._grammar.forbid(row)
            if not bool(row.max() > -math.inf):
                raise RequestError("the grammar of this request allows no token here")
        return self._without_ends(row) if self._held else row

    def _without_ends(self, row: Tensor) -> Tensor:
        """`row` `[V]` with its ends forbidden; as it was, where a grammar lets nothing else come."""
        kept = row.clone()
        kept[[token for token in self._ends if token < len(row)]] = -math.inf
        return kept if bool(kept.max() > -math.inf) else row


def check_bias(sampling: Sampling, vocab_size: int) -> None:
    """Raises `RequestError` when a logit bias names a token that there is not."""
    for token, _ in sampling.logit_bias:
        if not 0 <= token < vocab_size:
            raise RequestError(f"logit_bias names token {token}, outside the vocabulary of {vocab_size:,}")


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Of each row of `logits` `[R, V]` float32: the log-probability of its token and of the `top` likeliest, computed
    in float64. Equal ones stand in the order of their ids."""
    found = []
    for row, token in zip(logits.double().log_softmax(-1), tokens, strict=True):
        ids = _largest(row, min(top, len(row)))
        likeliest = tuple(zip(ids.tolist(), row[ids].tolist(), strict=True))
        found.append(TokenLogprobs(float(row[token]), likeliest))
    return found


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that `sampling` draws from: `[V]` float64, sums to 1. `logits`: `[V]` float32."""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), logits.shape[0]).double()
    ids, kept = _kept(logits, sampling)
    result = torch.zeros(logits.shape[0], dtype=torch.float64)
    result[ids] = kept
    return result


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of that seed and position: Philox, a counter-based generator (Salmon et al. 2011)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def draw(distribution: Tensor, number: float) -> int:
    """The token id at `number` of the cumulated distribution `[V]` float64."""
    cumulated = distribution.cumsum(-1)
    index = int(torch.searchsorted(cumulated, number * float(cumulated[-1]), right=True))
    # Rounding may put the number past the last token of non-zero probability.
    return min(index, int(distribution.nonzero()[-1]))


def sample(logits: Tensor, sampling: Sampling, position: int) -> int:
    """The token at `position` of its sequence, drawn from the logits `[V]` of the position before it."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    ids, kept = _kept(logits, sampling)
    return int(ids[draw(kept, uniform(sampling.seed, position))])


def _kept(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that the filters leave, in the order of their ids, and their probabilities float64, which sum to 1."""
    # The largest logit is subtracted before dividing, so that a tiny temperature overflows nothing.
    scaled = (logits.double() - logits.max()) / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
        # Compared before the exponential, whose rounding could tell equal logits apart; the largest is 0 here.
        floor = math.log(sampling.min_p) if sampling.min_p else -math.inf
        ids = (scaled >= floor).nonzero().flatten() if sampling.min_p else torch.arange(len(scaled))
        return ids, scaled[ids].softmax(-1)
    ids, kept = _likeliest(scaled, sampling)
    if sampling.min_p:
        ids = ids[: int((scaled[ids] >= math.log(sampling.min_p)).sum())]
        kept = kept[: len(ids)]
    ids, order = ids.sort()
    return ids, kept[order] / kept.sum()


def _likeliest(scaled: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """What top-k and top-p leave, the likeliest first: ids, and probabilities among what top-k leaves.

    Top-p rarely needs more than the first few hundred, so the rest is sorted only when it does.
    """
    most = len(scaled)
    count = min(sampling.top_k or _FIRST_TRY, most)
    total = None if sampling.top_k else scaled.exp().sum()
    while True:
        ids = _largest(scaled, count)
        kept = scaled[ids].softmax(-1) if total is None else scaled[ids].exp() / total
        if sampling.top_p == 1:
            return ids, kept
        reached = int((kept.cumsum(-1) < sampling.top_p).sum()) + 1
        if reached <= count or total is None or count == most:
            return ids[:reached], kept[:reached]
        count = min(8 * count, most)


def _largest(values: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest of `values` `[V]`, the largest first; equal ones in the order of their ids, here as
    everywhere."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    ids = (values >= values.topk(count).values[-1]).nonzero().flatten()
    return ids[values[ids].sort(descending=True, stable=True).indices[:count]]
