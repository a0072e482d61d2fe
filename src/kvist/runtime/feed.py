"""Known tokens run through a cache in pieces."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvist.cache.manager import Lease
from kvist.runtime.batch import Work
from kvist.runtime.runner import Runner


def feed(runner: Runner, lease: Lease, tokens: Sequence[int], logits: int = 0) -> Tensor:
    """Append `tokens` to a lease in the widest steps; the logits `[logits, vocab]` float32 of the last ones.

    Each step attends to what the steps before it have left in the cache.
    """
    most, parts = runner.widths.most, [torch.empty(0, runner.model.config.vocab_size)]
    for start in range(0, len(tokens), most):
        part = tokens[start : start + most]
        wanted = max(0, start + len(part) - max(start, len(tokens) - logits))
        parts += runner.run([Work(lease, part, wanted)])
    return torch.cat(parts)
