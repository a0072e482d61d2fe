"""Sequences in paged planes, for tests of the operators."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kvist.ops.backend import Backend, select
from kvist.ops.build import Variant, unsupported
from kvist.ops.packing import key_plane_shape, value_plane_shape

COMPILED = ("cpu", *(() if unsupported(Variant.AVX2) else ("avx2",)), "portable")
BACKENDS = ("reference", *COMPILED)


def backend(name: str) -> Backend:
    return select("cpu", torch.float32, 64, 64, name)


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class Piece:
    """Queries `[n, Hq, D]` of sequence `sequence`, the last of which stands at position `length - 1`."""

    sequence: int
    q: Tensor
    length: int


@dataclass(frozen=True)
class Paged:
    """Several sequences in one pair of planes. What no token was written to is NaN."""

    keys: Tensor
    values: Tensor
    tables: Tensor
    scale: float

    def attend(self, ops: Backend, pieces: Sequence[Piece], padding: int = 0) -> Tensor:
        """All pieces in one call, `padding` rows after them."""
        q = torch.cat([piece.q for piece in pieces])
        q = torch.cat([q, torch.full((padding, *q.shape[1:]), torch.nan, dtype=q.dtype)])
        starts = int32([0, *accumulate(len(piece.q) for piece in pieces)])
        tables = torch.stack([self.tables[piece.sequence] for piece in pieces])
        lengths = int32([piece.length for piece in pieces])
        return ops.attend(q, self.keys, self.values, tables, starts, lengths, self.scale)


def paged(
    ops: Backend,
    sequences: Sequence[tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    block_size: int = 64,
    seed: int = 0,
    unused: float = torch.nan,
) -> Paged:
    """Writes sequences of k and v `[n, H, D]` to blocks in an order that `seed` shuffles; other memory is `unused`."""
    needed = [-(-len(k) // block_size) for k, _ in sequences]
    blocks = sum(needed) + 3
    _, heads, dim = sequences[0][0].shape
    keys = torch.full(key_plane_shape(blocks, heads, block_size, dim, dtype), unused, dtype=dtype)
    values = torch.full(value_plane_shape(blocks, heads, block_size, dim, dtype), unused, dtype=dtype)
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).int()
    tables = torch.full((len(sequences), max(needed)), -1, dtype=torch.int32)
    for row, (first, count) in enumerate(zip(accumulate([0, *needed]), needed, strict=False)):
        tables[row, :count] = order[first : first + count]
        k, v = sequences[row]
        token = torch.arange(len(k))
        ops.write(keys, values, k, v, tables[row].long()[token // block_size] * block_size + token % block_size)
    return Paged(keys, values, tables, dim**-0.5)


def random_sequence(length: int, heads: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shape = (length, heads, dim)
    return torch.randn(shape, generator=random), torch.randn(shape, generator=random)


def random_queries(length: int, heads: int, dim: int, seed: int) -> Tensor:
    return torch.randn(length, heads, dim, generator=torch.Generator().manual_seed(seed))
