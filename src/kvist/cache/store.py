"""The only tensors that hold KV."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kvist.base.errors import KvistError
from kvist.base.units import format_bytes
from kvist.cache.codecs import Plane
from kvist.cache.layout import Layout, StreamLayout
from kvist.cache.manager import Copy
from kvist.cache.spec import Reading
from kvist.ops.memory import zeros

StoreOperands = tuple[list[Tensor], list[int], list[Tensor], list[Tensor], list[int], list[Tensor]]


@dataclass(frozen=True)
class OpenPlanes:
    """The open blocks of all layers of one shape, in full precision, in one plane for each stream.

    First `passing` blocks that every layer uses in its turn, for blocks that a step fills whole; then `kept` blocks of
    each layer, by the ids of the pool of open blocks.
    """

    planes: tuple[Tensor, ...]  # of keys, where there are some, then of values
    layers: tuple[int, ...]
    passing: int
    kept: int

    @property
    def keys(self) -> Tensor:
        return self.planes[0]

    @property
    def values(self) -> Tensor:
        return self.planes[-1]

    def for_layers(self, ids: Tensor, size: int) -> Tensor:
        """Ids of blocks, or of slots in blocks of `size` tokens, as they lie for each layer: [layers, *ids.shape].

        Numbers below `passing` blocks name passing blocks, those from there on the kept ones of the layer.
        """
        kept = (ids >= self.passing * size).to(ids.dtype)
        layer = torch.arange(len(self.layers), dtype=ids.dtype).view(-1, *[1] * ids.dim())
        return ids + layer * (kept * (self.kept * size))


class Store:
    """Planes for `blocks` blocks of a layout, and `windows` of its groups with a window: one tensor per layer and
    plane, `[blocks, *plane.shape]`.

    Where layers have open blocks, also `kept` of them for each and `passing` for all. Memory comes zeroed from the
    operating system page by page as blocks are first written, so a large pool costs what is used of it. Raises
    `KvistError` when even the promise cannot be had.
    """

    def __init__(
        self, layout: Layout, blocks: int, kept: int = 0, passing: int = 0, windows: Sequence[int] = ()
    ) -> None:
        self.layout = layout
        self.blocks = blocks
        counts = (blocks, *windows)
        if len(counts) != len(layout.groups):
            raise ValueError(f"the layout has {len(layout.groups)} groups, not {len(counts)}")
        try:
            self._layers = [
                tuple(zeros((counts[group], *p.shape), p.dtype) for p in layer.planes)
                for layer, group in zip(layout.layers, layout.group_of, strict=True)
            ]
            self.open_planes = _open_planes(layout, kept, passing)
        except MemoryError:
            raise KvistError(
                f"the KV of {blocks * layout.block_size:,} tokens takes "
                f"{format_bytes(layout.store_bytes(blocks, kept, passing, windows))}, "
                "more than this machine can give; ask for fewer tokens or a smaller codec"
            ) from None
        # The same memory as bytes [blocks, bytes of one block], plane by plane, with the number of its group.
        self._bytes = [
            (group, plane.view(len(plane), -1).view(torch.uint8).numpy())
            for own, group in zip(self._layers, layout.group_of, strict=True)
            for plane in own
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all planes, read from the tensors themselves."""
        own = sum(plane.nbytes for planes in self._layers for plane in planes)
        return own + sum(plane.nbytes for open in self.open_planes for plane in open.planes)

    @cached_property
    def operands(self) -> StoreOperands | None:
        """The planes, coding and frames of the keys of all layers, then those of the values, as operators take them
        that do whole layers. None where layers differ, or have a codec without a kernel."""
        layers = self.layout.layers
        if len(set(self.layout.group_of)) > 1 or any(layer.spec.source is not None for layer in layers):
            return None
        if any(layer.spec.reading is not Reading.APART or layer.spec.softcap for layer in layers):
            return None
        if not all(stream.has_kernel for layer in layers for stream in layer.streams):
            return None
        keys, values = (_side([layer.streams[side] for layer in layers], self._layers, side) for side in (0, 1))
        one_open = len(self.open_planes) == 1 and len(self.open_planes[0].layers) == len(layers)
        if keys is None or values is None or (self.open_planes and not one_open):
            return None
        return *keys, *values

    def planes(self, layer: int) -> tuple[Tensor, ...]:
        """The planes that `layer` reads: its own, or those of its source."""
        return self._layers[self.owner(layer)]

    def owner(self, layer: int) -> int:
        """The layer whose planes `layer` reads: itself, or its source."""
        source = self.layout.layers[layer].spec.source
        return layer if source is None else source

    def read_block(self, blocks: Sequence[int]) -> bytearray:
        """A copy of the bytes of a block, by its number in each group: its planes of every layer, in the layout's
        order."""
        data = bytearray(self.layout.block_bytes)
        target, place = np.frombuffer(data, np.uint8), 0
        for group, plane in self._bytes:
            target[place : place + plane.shape[1]] = plane[blocks[group]]
            place += plane.shape[1]
        return data

    def write_block(self, blocks: Sequence[int], data: bytes | bytearray | memoryview) -> None:
        """Make the bytes of a block those that `read_block` gave."""
        source, place = np.frombuffer(data, np.uint8), 0
        if len(source) != self.layout.block_bytes:
            raise ValueError(f"a block has {self.layout.block_bytes} bytes, not {len(source)}")
        for group, plane in self._bytes:
            plane[blocks[group]] = source[place : place + plane.shape[1]]
            place += plane.shape[1]

    def copy(self, copies: Sequence[Copy]) -> None:
        """Carry out what a reservation asked for: whole blocks, every plane that is written before it is full."""
        by_group = [
            _ids(copy for copy in copies if not copy.open and copy.window == (group - 1 if group else None))
            for group in range(len(self.layout.groups))
        ]
        for layer, planes, group in zip(self.layout.layers, self._layers, self.layout.group_of, strict=True):
            own = by_group[group]
            for plane in () if layer.opens or not own.numel() else planes:
                plane[own[1]] = plane[own[0]]
        opened = _ids(copy for copy in copies if copy.open)
        for open in self.open_planes if opened.numel() else ():
            sources, targets = open.for_layers(open.passing + opened, 1).transpose(0, 1).flatten(1)
            for plane in open.planes:
                plane[targets] = plane[sources]


def _side(
    streams: Sequence[StreamLayout], layers: Sequence[tuple[Tensor, ...]], side: int
) -> tuple[list[Tensor], list[int], list[Tensor]] | None:
    """Planes, coding and frames of one stream of every layer; None where their codecs differ."""
    codings = [stream.operands[0] for stream in streams]
    if any(coding != codings[0] for coding in codings) or len({tuple(s.planes) for s in streams}) > 1:
        return None
    count = len(streams[0].planes)
    planes = [plane for own in layers for plane in (own[:count] if side == 0 else own[len(own) - count :])]
    return planes, codings[0], [tensor for stream in streams for tensor in stream.operands[1]]


def _ids(copies: Iterable[Copy]) -> Tensor:
    """Sources and targets [2, n] int64."""
    return torch.tensor([(copy.source, copy.target) for copy in copies], dtype=torch.int64).view(-1, 2).T


def _open_planes(layout: Layout, kept: int, passing: int) -> list[OpenPlanes]:
    """Planes for each shape of streams that a layer with open blocks has."""
    shapes: dict[tuple[Plane, ...], list[int]] = {}
    for index, layer in enumerate(layout.layers):
        if layer.opens:
            shapes.setdefault(tuple(stream.open for stream in layer.streams), []).append(index)
    planes = []
    for streams, layers in shapes.items():
        count = passing + kept * len(layers)
        opened = tuple(zeros((count, *plane.shape), plane.dtype) for plane in streams)
        planes.append(OpenPlanes(opened, tuple(layers), passing, kept))
    return planes
