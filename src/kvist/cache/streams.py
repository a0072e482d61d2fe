"""Layers whose keys are no stream of their own: a latent with its rotated part, or one stream that is read twice.

In PyTorch, over whole blocks that the codecs decode, as `decoded` does it for codecs without a kernel: the products are
the library's, one fixed shape each, so a row's bits depend on its position alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.cache.decoded import decode_block, seal_decoded
from kvist.cache.layout import LayerLayout, StreamLayout
from kvist.cache.spec import Reading, Role
from kvist.cache.step import KeysOf, OpenStep, Step
from kvist.cache.store import OpenPlanes
from kvist.ops import packing
from kvist.ops.attention import Rows
from kvist.ops.reference import merge, sequences


@dataclass(frozen=True)
class StreamView:
    """Such a layer's view of the store; see `LayerView`. `planes`: of all its streams, one after another. `open`: its
    open blocks and where this step's rows lie in them, where codecs are lossy."""

    layout: LayerLayout
    planes: tuple[Tensor, ...]
    step: Step
    open: tuple[OpenPlanes, OpenStep] | None
    group: int  # of its layer
    window: int
    block_size: int

    def write(self, k: Tensor | None, v: Tensor) -> None:
        vectors = (v,) if k is None else (k, v)
        planes, slots = self.planes, self.step.slots[self.group]
        if self.open is not None:
            planes, slots = self.open[0].planes, self.open[1].slots
        real = slots >= 0
        for stream, plane, rows in zip(self.layout.streams, planes, vectors, strict=True):
            scatter = packing.scatter_keys if stream.stream.role is Role.KEYS else packing.scatter_values
            scatter(plane, slots[real], rows[real])
        if self.open is not None and len(self.open[1].sources):
            opened, where = self.open
            for stream, plane, own in zip(self.layout.streams, opened.planes, self._own_planes(), strict=True):
                seal_decoded(plane, own, stream, where.sources, where.targets[self.group])

    def attend(self, q: Tensor, scale: float, keys: KeysOf | None = None) -> Tensor:
        values, step = self.layout.streams[-1].stream, self.step
        out = q.new_zeros(q.shape[0], q.shape[1], values.dim)
        positions = torch.zeros(len(q), dtype=torch.int64)
        found = out.float(), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        own_block = None if self.open is None else self.block_size
        for sequence, rows, length in sequences(step.starts, step.lengths):
            table = step.tables[self.group][sequence]

            def load(start: int, count: int, table: Tensor = table) -> tuple[Tensor, Tensor]:
                ids = table[start // self.block_size :][: -(-count // self.block_size)].clamp(min=0).tolist()
                parts = [self._decoded(stream, own, ids)[:count] for stream, own in self._streams()]
                return self._keys_and_values(parts, start, keys)

            positions[rows] = torch.arange(length - (rows.stop - rows.start), length)
            attention = Rows(values.heads, length, scale, load, own_block, window=self.window, value_dim=values.dim)
            for whole, part in zip(found, attention.attend(q[rows].float()), strict=True):
                whole[rows] = part
        if self.open is None:
            out[:] = found[0]
            return out
        own, used = self._attend_own(q, scale, keys, positions), int(step.starts[-1])
        centre = torch.zeros(values.heads, q.shape[2])  # nothing is lost: see `_decoded`
        earlier, earlier_sum, mine, my_sum = (x[:used] for x in (*found, *own))
        out[:used] = merge(q[:used].float(), earlier, earlier_sum, mine, my_sum, centre, scale).to(q.dtype)
        return out

    def _attend_own(self, q: Tensor, scale: float, keys: KeysOf | None, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over each row's own block in full precision, and its binary log sums."""
        assert self.open is not None
        (opened, where), values = self.open, self.layout.streams[-1].stream
        out, sums = torch.zeros(*q.shape[:2], values.dim), torch.full(q.shape[:2], -torch.inf)
        for number, rows, length in sequences(where.starts, where.lengths):
            block, first = where.tables[number], int(positions[rows.start])

            def load(start: int, count: int, block: Tensor = block, first: int = first) -> tuple[Tensor, Tensor]:
                parts = [
                    (packing.gather_keys if s.stream.role is Role.KEYS else packing.gather_values)(plane, block, count)
                    for s, plane in zip(self.layout.streams, opened.planes, strict=True)
                ]
                return self._keys_and_values(parts, first // self.block_size * self.block_size, keys)

            attention = Rows(values.heads, length, scale, load, window=self.window, value_dim=values.dim)
            out[rows], sums[rows] = attention.attend(q[rows].float())
        return out, sums

    def _keys_and_values(self, parts: list[Tensor], start: int, keys: KeysOf | None) -> tuple[Tensor, Tensor]:
        """What attention reads of the streams' vectors [n, H, D] of the tokens from `start` on."""
        values = parts[-1]
        if self.layout.spec.reading is Reading.JOINED:
            return torch.cat((values, parts[0]), dim=-1), values
        assert keys is not None
        return keys(values, torch.arange(start, start + len(values))), values

    def _decoded(self, stream: StreamLayout, planes: tuple[Tensor, ...], blocks: list[int]) -> Tensor:
        """Whole blocks, with the mean that keys have lost."""
        found = torch.cat([decode_block(stream, planes, block) for block in blocks])
        return found + stream.frame.mean if stream.codec.centred else found

    def _streams(self) -> list[tuple[StreamLayout, tuple[Tensor, ...]]]:
        return list(zip(self.layout.streams, self._own_planes(), strict=True))

    def _own_planes(self) -> list[tuple[Tensor, ...]]:
        """The planes of each stream."""
        found, start = [], 0
        for stream in self.layout.streams:
            found.append(self.planes[start : start + len(stream.planes)])
            start += len(stream.planes)
        return found
