"""From one row of logits to one token. Every draw depends on that row, the seed and the position alone."""

import math

import numpy as np
import torch
from torch import Tensor

from kvist.runtime.request import Sampling


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that `sampling` draws from: `[V]` float64, sums to 1. `logits`: `[V]` float32."""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), logits.shape[0]).double()
    # The largest logit is subtracted before dividing, so that a tiny temperature overflows nothing.
    scaled = (logits.double() - logits.max()) / sampling.temperature
    # Stable: equal logits keep the order of their ids, here as everywhere.
    ordered, ids = scaled.sort(descending=True, stable=True)
    if sampling.top_k:
        ordered = ordered[: sampling.top_k]
    kept = ordered.softmax(-1)
    if sampling.top_p < 1:
        kept = kept[: int((kept.cumsum(-1) < sampling.top_p).sum()) + 1]
    if sampling.min_p:
        # Compared before the exponential, whose rounding could tell equal logits apart; the largest is 0 here.
        kept = kept[: int((ordered[: len(kept)] >= math.log(sampling.min_p)).sum())]
    result = torch.zeros(logits.shape[0], dtype=torch.float64)
    result[ids[: kept.shape[0]]] = kept / kept.sum()
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
    return draw(probabilities(logits, sampling), uniform(sampling.seed, position))
