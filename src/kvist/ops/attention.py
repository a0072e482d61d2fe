"""Attention of one sequence's newest rows in plain PyTorch: what the reference operators are made of.

A row's bits cannot depend on its neighbours because every product has one fixed shape: 16 query rows at their absolute
position modulo 16, against one split of 512 keys, absent rows and keys being zeros. Within a split there is one
maximum and one sum; splits are merged in order (online softmax, Milakov and Gimelshein, arXiv 1805.02867).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.ops.packing import SPLIT

QUERY_ROWS = 16


@dataclass(frozen=True)
class _Partial:
    """Attention of query rows over some of their keys: maximum and sum [H, R, 1], unnormalized output [H, R, D]."""

    maximum: Tensor
    total: Tensor
    weighted: Tensor

    def merge(self, later: "_Partial") -> "_Partial":
        """Both together. Rows that see none of the later keys (maximum -inf, all else zero) keep their bits."""
        maximum = torch.maximum(self.maximum, later.maximum)
        top = maximum.masked_fill(maximum == -torch.inf, 0)  # of a row that sees none of either
        mine, theirs = torch.exp(self.maximum - top), torch.exp(later.maximum - top)
        return _Partial(
            maximum,
            self.total * mine + later.total * theirs,
            self.weighted * mine + later.weighted * theirs,
        )


@dataclass(frozen=True)
class Rows:
    """The newest rows of a sequence of `length` tokens, against `heads` KV heads.

    `load(start, count)` gives keys and values [count, heads, D] float32 of the tokens from `start` on, a multiple of
    512. A row at position p sees tokens 0 to p, or, with blocks of `own_block` tokens, those before its own block; of
    these, where there is a `window`, those behind p - window. `rounded`: queries and weights enter the products as
    bf16. `softcap`: what holds the scores within it, or 0. `value_dim`: of values, where it is not that of keys.
    """

    heads: int
    length: int
    scale: float
    load: Callable[[int, int], tuple[Tensor, Tensor]]
    own_block: int | None = None
    rounded: bool = False
    window: int = 0
    softcap: float = 0.0
    value_dim: int = 0

    def attend(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [n, Hq, D] float32 of the last n positions → result [n, Hq, value dim], and log2 of the sum of
        exp(score) [n, Hq]. A row that sees nothing gives zeros and -inf.
        """
        first = self.length - rows.shape[0]
        tiles = range(first // QUERY_ROWS, (self.length - 1) // QUERY_ROWS + 1)
        taken = _rounded(rows) if self.rounded else rows
        queries = {tile: self._place(taken, tile * QUERY_ROWS - first) for tile in tiles}
        partials: dict[int, _Partial] = {}
        last = self._seen(torch.tensor(self.length - 1))
        begin = int(self._oldest(torch.tensor(first))) // SPLIT * SPLIT
        for start in range(begin, int(last), SPLIT):
            keys, values = self._load(start, min(SPLIT, int(last) - start))
            for tile, query in queries.items():
                positions = tile * QUERY_ROWS + torch.arange(QUERY_ROWS)
                seen, oldest = self._seen(positions) - start, self._oldest(positions) - start
                present = max(0, first - tile * QUERY_ROWS)  # of the tile's rows, the first that there is
                if int(seen[-1]) <= 0 or int(oldest[present]) >= SPLIT:
                    continue
                part = self._partial(query, keys, values, seen, oldest, int(oldest[present]))
                partials[tile] = partials[tile].merge(part) if tile in partials else part
        out = rows.new_zeros(*rows.shape[:2], self.value_dim or rows.shape[2])
        lse = rows.new_full(rows.shape[:2], -torch.inf)
        for tile, part in partials.items():
            offset = tile * QUERY_ROWS - first
            low, high = self._span(rows.shape[0], offset)
            mine = slice(low - offset, high - offset)
            out[low:high] = self._by_row((part.weighted / part.total).masked_fill(part.total == 0, 0))[mine]
            sums = part.maximum * math.log2(math.e) + torch.log2(part.total)
            lse[low:high] = self._by_row(sums)[mine, :, 0]
        return out, lse

    def _seen(self, position: Tensor) -> Tensor:
        """How many tokens the rows at these positions see."""
        return position + 1 if self.own_block is None else position // self.own_block * self.own_block

    def _oldest(self, position: Tensor) -> Tensor:
        """The first of these."""
        return (position + 1 - self.window).clamp(min=0) if self.window else torch.zeros_like(position)

    def _by_row(self, x: Tensor) -> Tensor:
        """[H, G * 16, n] → [16, Hq, n]."""
        return x.unflatten(1, (-1, QUERY_ROWS)).permute(2, 0, 1, 3).flatten(1, 2)

    def _span(self, count: int, offset: int) -> tuple[int, int]:
        """The rows of a call of `count` rows that lie in the tile whose first row would be row `offset`."""
        return max(offset, 0), min(offset + QUERY_ROWS, count)

    def _place(self, rows: Tensor, offset: int) -> Tensor:
        """The rows of one tile as [H, G * 16, D], each at its place in the tile, zeros elsewhere."""
        low, high = self._span(rows.shape[0], offset)
        tile = rows.new_zeros(QUERY_ROWS, *rows.shape[1:])
        tile[low - offset : high - offset] = rows[low:high]
        return tile.unflatten(1, (self.heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)

    def _load(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys [H, D, 512] and values [H, 512, D] of `count` tokens from `start` on, zeros after them."""
        found = self.load(start, count)
        keys, values = (x.new_zeros(SPLIT, *x.shape[1:]) for x in found)
        keys[:count], values[:count] = found
        return keys.permute(1, 2, 0).contiguous(), values.permute(1, 0, 2).contiguous()

    def _partial(
        self, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, oldest: Tensor, begin: int
    ) -> _Partial:
        """One tile over one split. `seen`, `oldest` [16]: each row sees its keys from the one to the other, perhaps
        none; no row that there is sees any before `begin`."""
        token = torch.arange(SPLIT, device=keys.device)
        hidden = (token >= seen[:, None]) | (token < oldest[:, None])
        hidden = hidden.repeat(query.shape[1] // QUERY_ROWS, 1)
        scores = torch.bmm(query, keys) * self.scale
        if self.softcap:  # tanh x = 1 - 2 / (1 + e^2x); `torch.tanh` has other bits in the tail of its vector loop
            scores = self.softcap * (1 - 2 / (1 + torch.exp(scores * (2 / self.softcap))))
        scores = scores.masked_fill(hidden, -torch.inf)
        maximum = scores.amax(-1, keepdim=True)
        # A row that sees nothing here has only -inf; any finite maximum makes its weights exact zeros.
        weights = torch.exp(scores - maximum.masked_fill(maximum == -torch.inf, 0))
        known = values.masked_fill(((token >= seen[-1]) | (token < begin))[:, None], 0)
        products = torch.bmm(_rounded(weights) if self.rounded else weights, known)
        return _Partial(maximum, sum_by_halves(weights), products)


def sum_by_halves(x: Tensor) -> Tensor:
    """Sum over the last axis, kept, in one fixed order."""
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = torch.cat((x, torch.zeros_like(x[..., :1])), dim=-1)
        low, high = x.chunk(2, dim=-1)
        x = low + high
    return x


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()
