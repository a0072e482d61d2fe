"""A decoder without the cache and without our operators: PyTorch's own attention and activations, differentiable.

For training, and as the oracle that `verify` holds the paged run against.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """A `LayerView` over a step's own rows: `sequences` whole sequences of equal length, one after another."""

    def __init__(self, sequences: int = 1) -> None:
        self._sequences = sequences
        self._k = self._v = torch.empty(0)

    def write(self, k: Tensor, v: Tensor) -> None:
        """`k`, `v` `[sequences * T, kv_heads, head_dim]`: all that the next `attend` sees."""
        self._k, self._v = k, v

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """Causal attention of `q` `[sequences * T, heads, head_dim]` within each sequence. Same shape out."""
        q, k, v = (x.unflatten(0, (self._sequences, -1)).transpose(1, 2) for x in (q, self._k, self._v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)
