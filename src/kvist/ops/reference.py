"""The operators in plain PyTorch: slow, obvious, and what every other implementation is tested against.

A row's bits cannot depend on its neighbours because every product has one fixed shape: 16 query rows at their absolute
position modulo 16, against one split of 512 keys, absent rows and keys being zeros. Within a split there is one
maximum and one sum; splits are merged in order (online softmax, Milakov and Gimelshein, arXiv 1805.02867).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.ops import packing
from kvist.ops.packing import SPLIT, Geometry
from kvist.ops.schema import LIBRARIES, REFERENCE

NAMESPACE = REFERENCE
QUERY_ROWS = 16


def write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Stores k and v [T, H, D] at `slots` [T]; see `kvist.ops.schema`. Raises `ValueError` or `IndexError`."""
    geometry = packing.geometry(keys, values)
    rows = (slots.shape[0] if slots.dim() == 1 else -1, geometry.heads, geometry.head_dim)
    if slots.dtype is not torch.int64 or tuple(k.shape) != rows or tuple(v.shape) != rows:
        raise ValueError(
            f"write needs k and v [T, {geometry.heads}, {geometry.head_dim}] and slots [T] int64, "
            f"got {list(k.shape)}, {list(v.shape)} and {list(slots.shape)} {slots.dtype}"
        )
    if k.dtype not in packing.DTYPES or v.dtype != k.dtype:
        raise ValueError(f"write takes k and v of one floating dtype, got {k.dtype} and {v.dtype}")
    limit = geometry.blocks * geometry.block_size
    if bool(((slots < -1) | (slots >= limit)).any()):
        raise IndexError(f"slots must be -1 (padding) or in [0, {limit}), got {slots.min()} to {slots.max()}")
    real = slots >= 0
    packing.scatter_keys(keys, slots[real], k[real])
    packing.scatter_values(values, slots[real], v[real])


def attend(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, starts: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Causal attention over paged keys and values; see `kvist.ops.schema`. Raises `ValueError` or `IndexError`."""
    geometry = packing.geometry(keys, values)
    _check_attend(geometry, q, tables, starts, lengths, scale)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    bounds = starts.tolist()
    for sequence, length in enumerate(lengths.tolist()):
        first, last = bounds[sequence], bounds[sequence + 1]
        if first < last:
            rows = _rounded(q[first:last].float(), geometry)
            out[first:last] = _Sequence(geometry, keys, values, tables[sequence], length, scale).attend(rows)
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2I] → silu(gate) * up [..., I], in float32, rounded once.

    Composed from `torch.exp` and exact operations: `F.silu` has other bits in the tail of its vector loop.
    """
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2 or gate_up.dtype not in packing.DTYPES:
        raise ValueError(f"silu_mul takes a floating [..., 2I] tensor, got {list(gate_up.shape)} {gate_up.dtype}")
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def gelu(x: Tensor, tanh: bool) -> Tensor:
    """x Φ(x), in float32, rounded once; `tanh` takes the tanh form (Hendrycks and Gimpel, arXiv 1606.08415)."""
    if x.dtype not in packing.DTYPES:
        raise ValueError(f"gelu takes a floating tensor, got {x.dtype}")
    wide = x.float()
    if tanh:  # 0.5 x (1 + tanh u) = x / (1 + exp(-2u))
        u = 0.7978845608028654 * (wide + 0.044715 * (wide * wide * wide))
        return (wide / (1 + torch.exp(-2 * u))).to(x.dtype)
    return (0.5 * wide * (1 + torch.erf(wide * 0.7071067811865476))).to(x.dtype)


@dataclass(frozen=True)
class _Partial:
    """Attention of query rows over some of their keys: maximum and sum [H, R, 1], unnormalized output [H, R, D]."""

    maximum: Tensor
    total: Tensor
    weighted: Tensor

    def merge(self, later: "_Partial") -> "_Partial":
        """Both together. Rows that see none of the later keys (maximum -inf, all else zero) keep their bits."""
        maximum = torch.maximum(self.maximum, later.maximum)
        mine, theirs = torch.exp(self.maximum - maximum), torch.exp(later.maximum - maximum)
        return _Partial(
            maximum,
            self.total * mine + later.total * theirs,
            self.weighted * mine + later.weighted * theirs,
        )


@dataclass(frozen=True)
class _Sequence:
    """One sequence's keys and values, and its causal attention. `table` names its blocks."""

    geometry: Geometry
    keys: Tensor
    values: Tensor
    table: Tensor
    length: int
    scale: float

    def attend(self, rows: Tensor) -> Tensor:
        """Rows [n, Hq, D] float32 of the last n positions → [n, Hq, D] float32."""
        first = self.length - rows.shape[0]
        tiles = range(first // QUERY_ROWS, (self.length - 1) // QUERY_ROWS + 1)
        queries = {tile: self._place(rows, tile * QUERY_ROWS - first) for tile in tiles}
        partials: dict[int, _Partial] = {}
        for start in range(0, self.length, SPLIT):
            keys, values = self._load(start)
            for tile, query in queries.items():
                position = tile * QUERY_ROWS + torch.arange(QUERY_ROWS, device=rows.device)
                if int(position[-1]) < start:
                    continue
                part = self._partial(query, keys, values, position - start)
                partials[tile] = partials[tile].merge(part) if tile in partials else part
        out = torch.empty_like(rows)
        for tile, part in partials.items():
            result = (part.weighted / part.total).unflatten(1, (-1, QUERY_ROWS)).permute(2, 0, 1, 3).flatten(1, 2)
            low, high = self._span(rows.shape[0], tile * QUERY_ROWS - first)
            out[low:high] = result[low - (tile * QUERY_ROWS - first) :][: high - low]
        return out

    def _span(self, count: int, offset: int) -> tuple[int, int]:
        """The rows of a call of `count` rows that lie in the tile whose first row would be row `offset`."""
        return max(offset, 0), min(offset + QUERY_ROWS, count)

    def _place(self, rows: Tensor, offset: int) -> Tensor:
        """The rows of one tile as [H, G * 16, D], each at its place in the tile, zeros elsewhere."""
        low, high = self._span(rows.shape[0], offset)
        tile = rows.new_zeros(QUERY_ROWS, *rows.shape[1:])
        tile[low - offset : high - offset] = rows[low:high]
        return tile.unflatten(1, (self.geometry.heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)

    def _load(self, start: int) -> tuple[Tensor, Tensor]:
        """Keys [H, D, 512] and values [H, 512, D] from token `start` on, zeros beyond the sequence."""
        blocks = self.table[start // self.geometry.block_size :]
        count = min(SPLIT, self.length - start)
        shape = (SPLIT, self.geometry.heads, self.geometry.head_dim)
        keys = torch.zeros(shape, device=self.keys.device)
        values = torch.zeros(shape, device=self.keys.device)
        keys[:count] = packing.gather_keys(self.keys, blocks, count)
        values[:count] = packing.gather_values(self.values, blocks, count)
        return keys.permute(1, 2, 0).contiguous(), values.permute(1, 0, 2).contiguous()

    def _partial(self, query: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> _Partial:
        """One tile over one split. `position` [16] is each row's last visible key, counted within the split."""
        token = torch.arange(SPLIT, device=keys.device)
        hidden = (token > position[:, None]).repeat(query.shape[1] // QUERY_ROWS, 1)
        scores = (torch.bmm(query, keys) * self.scale).masked_fill(hidden, -torch.inf)
        maximum = scores.amax(-1, keepdim=True)
        # A row that sees nothing here has only -inf; any finite maximum makes its weights exact zeros.
        weights = torch.exp(scores - maximum.masked_fill(maximum == -torch.inf, 0))
        known = values.masked_fill((token > position[-1])[:, None], 0)
        return _Partial(maximum, _sum(weights), torch.bmm(_rounded(weights, self.geometry), known))


def _sum(weights: Tensor) -> Tensor:
    """Sum over the last axis, kept, in one fixed order: by halves."""
    while weights.shape[-1] > 1:
        low, high = weights.chunk(2, dim=-1)
        weights = low + high
    return weights


def _rounded(x: Tensor, geometry: Geometry) -> Tensor:
    """x as the plane's products take it: bf16 planes multiply bf16 numbers, the others float32."""
    return x.to(torch.bfloat16).float() if geometry.dtype is torch.bfloat16 else x


def _check_attend(geometry: Geometry, q: Tensor, tables: Tensor, starts: Tensor, lengths: Tensor, scale: float) -> None:
    if q.dim() != 3 or q.shape[2] != geometry.head_dim or not q.shape[1] or q.shape[1] % geometry.heads:
        raise ValueError(
            f"attend needs q [T, a multiple of {geometry.heads}, {geometry.head_dim}], got {list(q.shape)}"
        )
    if q.dtype not in packing.DTYPES:
        raise ValueError(f"attend takes q as float32, bfloat16 or float16, got {q.dtype}")
    sequences = lengths.shape[0] if lengths.dim() == 1 else -1
    if tables.dim() != 2 or tables.shape[0] != sequences or tuple(starts.shape) != (sequences + 1,):
        raise ValueError(
            f"attend needs tables [S, max_blocks], starts [S + 1] and lengths [S], "
            f"got {list(tables.shape)}, {list(starts.shape)} and {list(lengths.shape)}"
        )
    if any(x.dtype is not torch.int32 for x in (tables, starts, lengths)):
        raise ValueError(f"tables, starts and lengths are int32, got {tables.dtype}, {starts.dtype}, {lengths.dtype}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    counts = starts.diff()
    if int(starts[0]) != 0 or bool((counts < 0).any()) or int(starts[-1]) > q.shape[0]:
        raise ValueError(f"starts must rise from 0 to at most the {q.shape[0]} rows of q, got {starts.tolist()}")
    if bool((lengths < counts).any()) or bool((lengths > tables.shape[1] * geometry.block_size).any()):
        raise ValueError(
            f"lengths must cover each sequence's queries and fit its {tables.shape[1]} blocks of "
            f"{geometry.block_size}, got {lengths.tolist()}"
        )
    needed = (lengths[:, None] + geometry.block_size - 1) // geometry.block_size
    used = tables[torch.arange(tables.shape[1], device=tables.device) < needed]
    if bool(((used < 0) | (used >= geometry.blocks)).any()):
        raise IndexError(f"block ids must be in [0, {geometry.blocks}), got {used.min()} to {used.max()}")


LIBRARIES[REFERENCE].impl("write", write, "CompositeExplicitAutograd")
LIBRARIES[REFERENCE].impl("attend", attend, "CompositeExplicitAutograd")
LIBRARIES[REFERENCE].impl("silu_mul", silu_mul, "CompositeExplicitAutograd")
LIBRARIES[REFERENCE].impl("gelu", gelu, "CompositeExplicitAutograd")
LIBRARIES[REFERENCE].impl("instruction_set", lambda: "PyTorch", "CompositeExplicitAutograd")
