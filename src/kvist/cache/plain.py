"""A layer view without a cache: attention among the step's own rows, for training and as an oracle."""

import torch
import torch.nn.functional as F
from torch import Tensor


class PlainView:
    """One step holds `sequences` whole sequences of equal length, one after another; differentiable."""

    def __init__(self, sequences: int = 1) -> None:
        self._sequences = sequences
        self._k = self._v = torch.empty(0)

    def write(self, k: Tensor, v: Tensor) -> None:
        """`k`, `v` `[sequences * T, kv_heads, head_dim]`, kept until the next write."""
        self._k, self._v = k, v

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """Causal attention of `q` `[sequences * T, heads, head_dim]` over what was written last. Same shape out."""
        q, k, v = (x.unflatten(0, (self._sequences, -1)).transpose(1, 2) for x in (q, self._k, self._v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(0, 1)
