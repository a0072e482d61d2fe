"""Layers whose keys are no stream of their own: a latent with its rotated part, or one stream that is read twice."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvist.cache.decoded import decode_block, seal_decoded
from kvist.cache.layout import LayerLayout, StreamLayout
from kvist.cache.spec import Reading, Role
from kvist.cache.step import OpenStep, Step, Tie
from kvist.cache.store import OpenPlanes
from kvist.ops import packing
from kvist.ops.backend import Backend
from kvist.ops.reference_made import Made


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
    backend: Backend

    def write(self, k: Tensor | None, v: Tensor) -> None:
        vectors = (v,) if k is None else (k, v)
        planes, slots = self.planes, self.step.slots[self.group]
        if self.open is not None:
            planes, slots = self.open[0].planes, self.open[1].slots
        real = slots >= 0
        for stream, plane, rows in zip(self.layout.streams, planes, vectors, strict=True):
            scatter = packing.scatter_keys if stream.stream.role is Role.KEYS else packing.scatter_values
            scatter(plane, slots[real], rows[real])
        if self.open is None or not len(self.open[1].sources):
            return
        opened, where = self.open
        for (stream, coded), plane in zip(self._streams(), opened.planes, strict=True):
            blocks = where.sources, where.targets[self.group]
            if stream.has_kernel:
                is_keys = stream.stream.role is Role.KEYS
                self.backend.seal(plane, list(coded), *stream.operands, is_keys, *blocks)
            else:
                seal_decoded(plane, coded, stream, *blocks)

    def attend(self, q: Tensor, scale: float, tie: Tie | None = None) -> Tensor:
        step, own = self.step, list[Tensor]()
        if self.open is not None:
            opened, where = self.open
            dense = [_dense(plane) for plane in opened.planes]
            made_with = self._tie(tie, where.offsets)
            rows = where.tables, where.starts, where.lengths
            own = list(self._attend_made(q, own, dense, made_with, *rows, scale))
        rows = step.tables[self.group], step.starts, step.lengths
        made_with = self._tie(tie, torch.zeros_like(step.lengths))
        if all(stream.has_kernel for stream in self.layout.streams):
            coded = [(list(planes), *stream.operands) for stream, planes in self._streams()]
            out, _ = self._attend_made(q, own, coded, made_with, *rows, scale)
        else:
            *behind, values = (partial(_decoded, *stream) for stream in self._streams())
            kept = self.layout.streams[-1].stream
            made = Made(values, behind[0] if behind else None, made_with, kept.heads, kept.dim, self.block_size)
            out, _ = made.attend(q, own, *rows, scale, self.window)
        return out.to(q.dtype)

    def _attend_made(
        self,
        q: Tensor,
        own: list[Tensor],
        streams: Sequence[tuple[list[Tensor], list[int], list[Tensor]]],
        tie: list[Tensor],
        tables: Tensor,
        starts: Tensor,
        lengths: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """`streams`: planes, coding and frame of each."""
        nothing = list[Tensor](), list[int](), list[Tensor]()
        behind = streams[0] if self.layout.spec.reading is Reading.JOINED else nothing
        where = tables, starts, lengths, self.block_size
        return self.backend.attend_made(q, own, *behind, *streams[-1], tie, *where, scale, self.window)

    def _tie(self, tie: Tie | None, offsets: Tensor) -> list[Tensor]:
        return [] if tie is None else [tie.weight, tie.cos, tie.sin, offsets]

    def _streams(self) -> list[tuple[StreamLayout, tuple[Tensor, ...]]]:
        """Each stream with its planes."""
        found, start = [], 0
        for stream in self.layout.streams:
            found.append((stream, self.planes[start : start + len(stream.planes)]))
            start += len(stream.planes)
        return found


def _dense(plane: Tensor) -> tuple[list[Tensor], list[int], list[Tensor]]:
    """A plane of numbers, as operators take a stream."""
    return [plane], [], []


def _decoded(stream: StreamLayout, planes: tuple[Tensor, ...], blocks: Tensor, count: int) -> Tensor:
    """The first `count` vectors of whole blocks, with the mean that codes have lost."""
    found = torch.cat([decode_block(stream, planes, block) for block in blocks.tolist()])[:count]
    return found + stream.frame.mean if stream.codec.centred else found
