"""How training runs a decoder: differentiable activations, and views that attend over whole rows at once.

Nothing is paged here. Every row of a step starts at position 0, so a view needs no cache: what `write`
receives is all that `attend` may see. The decoder is the one that the engine runs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.models.decoder import Decoder


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


@dataclass(frozen=True)
class DenseActivations:
    """PyTorch's activations, which have gradients; dropout falls on what enters the MLP's last product."""

    dropout: Dropout

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`[T, 2 I]` → silu(first half) * second half, `[T, I]`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.dropout(F.silu(gate) * up)

    def gelu(self, x: Tensor, tanh: bool) -> Tensor:
        """Gaussian error linear unit of `x`, exact or by its tanh approximation."""
        return self.dropout(F.gelu(x, approximate="tanh" if tanh else "none"))


class DenseView:
    """A `LayerView` over `rows` sequences of equal length, one after the other in a step of `T` tokens."""

    def __init__(self, rows: int, dropout: Dropout) -> None:
        self._rows = rows
        self._dropout = dropout
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def write(self, k: Tensor, v: Tensor) -> None:
        """Keep `k`, `v` `[T, kv_heads, head_dim]` for the `attend` that follows."""
        self._k, self._v = self._by_row(k), self._by_row(v)

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """Causal attention of `q` `[T, heads, head_dim]` within each row. Same shape out."""
        assert self._k is not None
        assert self._v is not None
        grouped = q.shape[1] != self._k.shape[1]
        out: Tensor = F.scaled_dot_product_attention(
            self._by_row(q), self._k, self._v, is_causal=True, scale=scale, enable_gqa=grouped
        )
        self._k = self._v = None
        return self._dropout(out.transpose(1, 2).reshape(q.shape))

    def _by_row(self, x: Tensor) -> Tensor:
        """`[T, heads, head_dim]` → `[rows, heads, T / rows, head_dim]`."""
        rows: Tensor = x.unflatten(0, (self._rows, -1))
        return rows.transpose(1, 2)


def row_logits(model: Decoder, tokens: Tensor, dropout: Dropout) -> Tensor:
    """Logits `[rows, length, vocab_size]` float32 of `tokens` `[rows, length]`; rows start at position 0."""
    rows, length = tokens.shape
    views = [DenseView(rows, dropout) for _ in range(model.config.layers)]
    positions = torch.arange(length).repeat(rows)
    return model.logits(model(tokens.flatten(), positions, views)).view(rows, length, -1)
