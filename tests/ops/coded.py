"""Sequences in coded planes, for tests of the operators over them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from paged import Piece, int32
from torch import Tensor

from kvist.cache.codecs import codec
from kvist.cache.codecs.base import Codec
from kvist.cache.spec import Role, Stream
from kvist.ops import packing
from kvist.ops.backend import Backend
from kvist.ops.coding import Frame


@dataclass(frozen=True)
class CodedStream:
    """One stream's planes with what the operators need beside them; `open`: the same blocks in full precision."""

    codec: Codec
    stream: Stream
    frame: Frame
    planes: list[Tensor]
    open: Tensor

    @property
    def operands(self) -> tuple[list[Tensor], list[int], list[Tensor]]:
        coding = self.codec.coding(self.stream)
        return (self.planes, [], []) if coding is None else (self.planes, coding.flat(), self.frame.tensors(coding))

    def seal(self, ops: Backend, blocks: Sequence[int]) -> None:
        ids = torch.tensor(blocks, dtype=torch.int64)
        ops.seal(self.open, *self.operands, self.stream.role is Role.KEYS, ids, ids)

    def decoded(self, block: int) -> Tensor:
        """[B, H, D] float32, with the mean that coded keys have lost."""
        x = self.codec.decode(tuple(plane[block] for plane in self.planes), self.stream, self.frame)
        return x + self.frame.mean if self.codec.centred else x


@dataclass(frozen=True)
class Coded:
    """Several sequences. Only whole blocks before a query's own are read through codes, so only those are sealed."""

    keys: CodedStream
    values: CodedStream
    tables: Tensor
    block_size: int
    scale: float

    def attend(self, ops: Backend, pieces: Sequence[Piece], padding: int = 0, softcap: float = 0.0) -> Tensor:
        """All pieces in one call, `padding` rows after them: own blocks first, then the coded ones."""
        q = torch.cat([piece.q for piece in pieces])
        q = torch.cat([q, torch.full((padding, *q.shape[1:]), torch.nan, dtype=q.dtype)])
        starts, blocks, lengths = [0], [], []
        for piece in pieces:
            first = piece.length - len(piece.q)
            for index in range(first // self.block_size, (piece.length - 1) // self.block_size + 1):
                end = min(piece.length, (index + 1) * self.block_size)
                starts.append(starts[-1] + end - max(first, index * self.block_size))
                blocks.append(int(self.tables[piece.sequence, index]))
                lengths.append(end - index * self.block_size)
        own = ops.attend_own(
            q,
            self.keys.open,
            self.values.open,
            int32(blocks)[:, None],
            int32(starts),
            int32(lengths),
            self.scale,
            0,
            softcap,
        )
        tables = torch.stack([self.tables[piece.sequence] for piece in pieces])
        where = (tables, int32([0, *accumulate(len(piece.q) for piece in pieces)]), int32([p.length for p in pieces]))
        return ops.attend_coded(
            q, *own, *self.keys.operands, *self.values.operands, *where, self.block_size, self.scale, 0, softcap
        )

    def vectors(self, piece: Piece, exact: bool) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [p + 1, H, D] float64 that each query of a piece sees: `exact`, or through the codecs."""
        blocks = self.tables[piece.sequence, : -(-piece.length // self.block_size)].long()
        k, v = (
            gather(stream.open, blocks, piece.length).double()
            for gather, stream in ((packing.gather_keys, self.keys), (packing.gather_values, self.values))
        )
        whole = [int(block) for block in blocks[: (piece.length - 1) // self.block_size]]
        coded_k, coded_v = (
            torch.cat([stream.decoded(block).double() for block in whole] or [k[:0]])
            for stream in (self.keys, self.values)
        )
        seen = []
        for position in range(piece.length - len(piece.q), piece.length):
            border = 0 if exact else position // self.block_size * self.block_size
            pairs = ((coded_k, k), (coded_v, v))
            seen.append(tuple(torch.cat([coded[:border], own[border : position + 1]]) for coded, own in pairs))
        return seen

    def plainly(self, piece: Piece, exact: bool = False) -> Tensor:
        """Attention of a piece in float64, row by row: [n, Hq, D]."""
        rows = []
        for q, (k, v) in zip(piece.q.double(), self.vectors(piece, exact), strict=True):
            grouped = q.unflatten(0, (k.shape[1], -1))
            weights = torch.softmax(torch.einsum("hgd,thd->hgt", grouped, k) * self.scale, -1)
            rows.append(torch.einsum("hgt,thd->hgd", weights, v).flatten(0, 1))
        return torch.stack(rows)


def coded(
    ops: Backend,
    sequences: Sequence[tuple[Tensor, Tensor]],
    kv: tuple[str, str],
    block_size: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Coded:
    """Writes sequences of k and v [n, H, D] to open blocks in an order that `seed` shuffles; codes the full ones."""
    needed = [-(-len(k) // block_size) for k, _ in sequences]
    blocks, (_, heads, dim) = sum(needed) + 3, sequences[0][0].shape
    generator = torch.Generator().manual_seed(seed)
    streams = []
    for name, role, shape_of in zip(
        kv, (Role.KEYS, Role.VALUES), (packing.key_plane_shape, packing.value_plane_shape), strict=True
    ):
        stream, chosen = Stream(role.value, role, heads, dim), codec(name)
        open = torch.full(shape_of(blocks, heads, block_size, dim, dtype), torch.nan, dtype=dtype)
        planes = [
            torch.full((blocks, *plane.shape), torch.nan if plane.dtype.is_floating_point else 0x5A, dtype=plane.dtype)
            for plane in chosen.planes(stream, block_size)
        ]
        streams.append(CodedStream(chosen, stream, _frame(chosen, stream, sequences, generator), planes, open))
    order = torch.randperm(blocks, generator=generator).int()
    tables = torch.full((len(sequences), max(needed)), -1, dtype=torch.int32)
    for row, (first, count) in enumerate(zip(accumulate([0, *needed]), needed, strict=False)):
        tables[row, :count] = order[first : first + count]
        k, v = sequences[row]
        token = torch.arange(len(k))
        slots = tables[row].long()[token // block_size] * block_size + token % block_size
        ops.write(streams[0].open, streams[1].open, k, v, slots)
        for stream in streams:
            stream.seal(ops, tables[row, : len(k) // block_size].tolist())
    return Coded(*streams, tables, block_size, dim**-0.5)


def _frame(
    chosen: Codec, stream: Stream, sequences: Sequence[tuple[Tensor, Tensor]], generator: torch.Generator
) -> Frame:
    """A frame that uses all the codec asks for."""
    plain = Frame.plain(stream.heads, stream.dim)
    mean, order = plain.mean, plain.order
    if chosen.centred and stream.role is Role.KEYS:
        mean = torch.cat([k for k, _ in sequences]).float().mean(0)
    if chosen.ordered:
        order = torch.stack([torch.randperm(stream.dim, generator=generator) for _ in range(stream.heads)]).int()
    return Frame(mean, order, plain.signs)
