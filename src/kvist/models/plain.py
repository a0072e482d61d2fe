"""A decoder without the cache and without our operators: PyTorch's own attention and activations, differentiable.

For training, and as the oracle that `verify` holds the paged run against.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.cache.spec import LayerSpec, Reading, key_value, window_of
from kvist.cache.step import Tie
from kvist.models.config import ModelConfig

_USUAL = key_value(1, 1)  # keys and values apart, all of them kept, however many


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
    """A `LayerView` over a step's own rows: `sequences` whole sequences of equal length, one after another, of a layer
    as `spec` describes it."""

    def __init__(self, sequences: int = 1, spec: LayerSpec = _USUAL) -> None:
        self._sequences = sequences
        self._spec = spec
        self.k: Tensor | None = None
        self.v = torch.empty(0)

    def write(self, k: Tensor | None, v: Tensor) -> None:
        """`k`, `v` `[sequences * T, kv_heads, dim]`: all that the next `attend` sees."""
        self.k, self.v = k, v

    def attend(self, q: Tensor, scale: float, tie: Tie | None = None) -> Tensor:
        """Causal attention of `q` `[sequences * T, heads, dim]` within each sequence, `[..., dim of values]`."""
        length = len(q) // self._sequences
        k = keys_of(self._spec, self.k, self.v, torch.arange(length).repeat(self._sequences), tie)
        window = window_of(self._spec.retention)
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        seen = seen.triu(1 - window) if 0 < window < length else None if not self._spec.softcap else seen
        q, k, v = (x.unflatten(0, (self._sequences, -1)).transpose(1, 2) for x in (q, k, self.v))
        return attention(q, k, v, seen, scale, self._spec.softcap).transpose(1, 2).flatten(0, 1)


def plain_views(config: ModelConfig, sequences: int = 1) -> list[PlainView]:
    """One for each layer of a model; those that read another's share its."""
    views = list[PlainView]()
    for spec in config.layer_specs():
        views.append(PlainView(sequences, spec) if spec.source is None else views[spec.source])
    return views


def keys_of(spec: LayerSpec, k: Tensor | None, v: Tensor, positions: Tensor, tie: Tie | None) -> Tensor:
    """The keys of a layer from what was written of `positions`: the first stream `k` and the last one `v`."""
    match spec.reading:
        case Reading.APART:
            assert k is not None
            return k
        case Reading.JOINED:
            assert k is not None
            return torch.cat((v, k), dim=-1)
        case Reading.TIED:
            assert tie is not None
            return tie.keys(v, positions)


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float) -> Tensor:
    """PyTorch's attention of `q` `[S, heads, T, D]` over `k`, `v` `[S, kv_heads, N, ...]`; `seen` `[T, N]`, or causal.
    Written out where scores are capped, which PyTorch's does not do."""
    grouped = q.shape[1] != k.shape[1]
    if not softcap:
        how = {"attn_mask": seen, "is_causal": seen is None, "scale": scale, "enable_gqa": grouped}
        return F.scaled_dot_product_attention(q, k, v, **how)
    assert seen is not None
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


class CodedPlainView:
    """One sequence under a lossy cache, written out plainly: a query sees its own block as it is, and of earlier whole
    blocks what `keys` and `values` make of them ([B, H, D] float32 to the same), those of the first stream and of the
    last one.
    """

    def __init__(
        self,
        block_size: int,
        keys: Callable[[Tensor], Tensor],
        values: Callable[[Tensor], Tensor],
        spec: LayerSpec = _USUAL,
    ) -> None:
        self._spec = spec
        self._block_size, self._codecs = block_size, (keys, values)
        self._own: list[Tensor | None] = []
        self._earlier: list[Tensor | None] = []

    def write(self, k: Tensor | None, v: Tensor) -> None:
        """`k`, `v` `[T, kv_heads, dim]`: all that the next `attend` sees."""
        self._own = [None if k is None else k.float(), v.float()]
        self._earlier = []
        for x, codec in zip(self._own, self._codecs, strict=True):
            if x is None:
                self._earlier.append(None)
                continue
            whole = len(x) // self._block_size * self._block_size
            blocks = [codec(block) for block in x[:whole].split(self._block_size) if whole]
            self._earlier.append(torch.cat([*blocks, x[whole:]]))

    def attend(self, q: Tensor, scale: float, tie: Tie | None = None) -> Tensor:
        """Causal attention of `q` `[T, heads, dim]`, block by block of queries."""
        parts, window = [], window_of(self._spec.retention)
        for start in range(0, len(q), self._block_size):
            rows = q[start : start + self._block_size].float()
            end = start + len(rows)
            first, last = (
                None if own is None or earlier is None else torch.cat([earlier[:start], own[start:end]])
                for earlier, own in zip(self._earlier, self._own, strict=True)
            )
            assert last is not None
            k = keys_of(self._spec, first, last, torch.arange(end), tie)
            seen = torch.ones(len(rows), end, dtype=torch.bool).tril(start)
            seen = seen.triu(start + 1 - window) if window else seen
            sides = (x.transpose(0, 1)[None] for x in (rows, k, last))
            parts.append(attention(*sides, seen, scale, self._spec.softcap)[0].transpose(0, 1))
        return torch.cat(parts).to(q.dtype)
