"""A decoder without the cache and without our operators: PyTorch's own attention and activations, differentiable.

For training, and as the oracle that `verify` holds the paged run against.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.cache.spec import window_of
from kvist.models.config import ModelConfig


class PlainActivations:
    """PyTorch's activations; their bits may depend on where a number stands."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`[T, 2 I]` → silu(first half) * second half, `[T, I]`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gelu(self, x: Tensor, tanh: bool) -> Tensor:
        """Gaussian error linear unit of `x`, exact or by its tanh approximation."""
        return F.gelu(x, approximate="tanh" if tanh else "none")


class PlainView:
    """A `LayerView` over a step's own rows: `sequences` whole sequences of equal length, one after another. `window`: a
    query sees so many tokens up to its own; 0: all."""

    def __init__(self, sequences: int = 1, window: int = 0) -> None:
        self._sequences = sequences
        self._window = window
        self.k = self.v = torch.empty(0)

    def write(self, k: Tensor, v: Tensor) -> None:
        """`k`, `v` `[sequences * T, kv_heads, head_dim]`: all that the next `attend` sees."""
        self.k, self.v = k, v

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """Causal attention of `q` `[sequences * T, heads, head_dim]` within each sequence. Same shape out."""
        q, k, v = (x.unflatten(0, (self._sequences, -1)).transpose(1, 2) for x in (q, self.k, self.v))
        grouped, length = q.shape[1] != k.shape[1], q.shape[2]
        windowed = 0 < self._window < length
        seen = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - self._window) if windowed else None
        how = {"attn_mask": seen, "is_causal": seen is None, "scale": scale, "enable_gqa": grouped}
        out = F.scaled_dot_product_attention(q, k, v, **how)
        return out.transpose(1, 2).flatten(0, 1)


def plain_views(config: ModelConfig, sequences: int = 1) -> list[PlainView]:
    """One for each layer of a model."""
    return [PlainView(sequences, window_of(spec.retention)) for spec in config.layer_specs()]


class CodedPlainView:
    """One sequence under a lossy cache, written out plainly: a query sees its own block as it is, and of earlier whole
    blocks what `keys` and `values` make of them ([B, H, D] float32 to the same).
    """

    def __init__(
        self,
        block_size: int,
        keys: Callable[[Tensor], Tensor],
        values: Callable[[Tensor], Tensor],
        window: int = 0,
    ) -> None:
        self._window = window
        self._block_size, self._keys, self._values = block_size, keys, values
        self._own: list[Tensor] = []
        self._earlier: list[Tensor] = []

    def write(self, k: Tensor, v: Tensor) -> None:
        """`k`, `v` `[T, kv_heads, head_dim]`: all that the next `attend` sees."""
        self._own = [k.float(), v.float()]
        self._earlier = []
        for x, codec in zip(self._own, (self._keys, self._values), strict=True):
            whole = len(x) // self._block_size * self._block_size
            blocks = [codec(block) for block in x[:whole].split(self._block_size) if whole]
            self._earlier.append(torch.cat([*blocks, x[whole:]]))

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """Causal attention of `q` `[T, heads, head_dim]`, block by block of queries. Same shape out."""
        parts = []
        for start in range(0, len(q), self._block_size):
            rows = q[start : start + self._block_size].float()
            k, v = (
                torch.cat([earlier[:start], own[start : start + len(rows)]]).transpose(0, 1)[None]
                for earlier, own in zip(self._earlier, self._own, strict=True)
            )
            seen = torch.ones(len(rows), start + len(rows), dtype=torch.bool).tril(start)
            if self._window:
                seen = seen.triu(start + 1 - self._window)
            out = F.scaled_dot_product_attention(
                rows.transpose(0, 1)[None], k, v, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts).to(q.dtype)
