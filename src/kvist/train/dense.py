"""How training runs a decoder, the same that the engine runs: without a cache, and with dropout.

Nothing is paged here. Every row of a step starts at position 0, so a view needs no cache.
"""

import torch
from torch import Tensor

from kvist.cache.step import Tie
from kvist.models.decoder import Decoder
from kvist.models.plain import PlainActivations, PlainView


class Dropout:
    """Zeroes a number with probability `rate`, scales others by 1 / (1 - rate) (Srivastava et al. 2014).

    It falls between `begin` and `end` only, and a step's masks come from its seed and number alone, so that a
    resumed run draws those of an uninterrupted one.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._active = False
        self._generator = torch.Generator()

    def begin(self, seed: int, step: int) -> None:
        # The generator takes 32 bits; two seeds share no masks in runs of less than a million steps.
        self._generator.manual_seed((seed * 1_000_003 + step) % 2**32)
        self._active = self._rate > 0

    def end(self) -> None:
        self._active = False

    def __call__(self, x: Tensor) -> Tensor:
        """`x` with dropout applied, or `x` itself outside of `begin` and `end`."""
        if not self._active:
            return x
        keep = 1 - self._rate
        mask = torch.empty_like(x).bernoulli_(keep, generator=self._generator)
        return x * mask.div_(keep)


class DenseActivations:
    """Plain activations; dropout falls on what enters the MLP's last product."""

    def __init__(self, dropout: Dropout) -> None:
        self._plain = PlainActivations()
        self._dropout = dropout

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`[T, 2 I]` → silu(first half) * second half, `[T, I]`."""
        return self._dropout(self._plain.silu_mul(gate_up))

    def gelu(self, x: Tensor, tanh: bool) -> Tensor:
        """Gaussian error linear unit of `x`, exact or by its tanh approximation."""
        return self._dropout(self._plain.gelu(x, tanh))


class DenseView:
    """A plain `LayerView` over `rows` sequences of equal length; dropout falls on what attention gives."""

    def __init__(self, rows: int, dropout: Dropout) -> None:
        self._plain = PlainView(rows)
        self._dropout = dropout

    def write(self, k: Tensor | None, v: Tensor) -> None:
        """Keep `k`, `v` `[T, kv_heads, head_dim]` for the `attend` that follows."""
        self._plain.write(k, v)

    def attend(self, q: Tensor, scale: float, tie: Tie | None = None) -> Tensor:
        """Causal attention of `q` `[T, heads, head_dim]` within each row. Same shape out."""
        return self._dropout(self._plain.attend(q, scale, tie))


def row_logits(model: Decoder, tokens: Tensor, dropout: Dropout) -> Tensor:
    """Logits `[rows, length, vocab_size]` float32 of `tokens` `[rows, length]`; rows start at position 0."""
    rows, length = tokens.shape
    views = [DenseView(rows, dropout) for _ in range(model.config.layers)]
    positions = torch.arange(length).repeat(rows)
    return model.logits(model(tokens.flatten(), positions, views)).view(rows, length, -1)
