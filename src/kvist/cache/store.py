"""The only tensors that hold KV."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from kvist.base.errors import KvistError
from kvist.base.units import format_bytes
from kvist.cache.layout import Layout
from kvist.cache.manager import Copy

_CACHE_LINE = 64  # bytes


class Store:
    """Planes for `blocks` blocks of a layout: one tensor per layer and plane, `[blocks, *plane.shape]`.

    Memory comes zeroed from the operating system page by page as blocks are first written, so a large pool costs
    what is used of it. Raises `KvistError` when even the promise cannot be had.
    """

    def __init__(self, layout: Layout, blocks: int) -> None:
        self.layout = layout
        self.blocks = blocks
        try:
            self._layers = [tuple(_zeros((blocks, *p.shape), p.dtype) for p in layer.planes) for layer in layout.layers]
        except MemoryError:
            raise KvistError(
                f"the KV of {blocks * layout.block_size:,} tokens takes {format_bytes(blocks * layout.block_bytes)}, "
                "more than this machine can give; ask for fewer tokens or a smaller codec"
            ) from None

    @property
    def nbytes(self) -> int:
        """Bytes of all planes, read from the tensors themselves."""
        return sum(plane.nbytes for planes in self._layers for plane in planes)

    def planes(self, layer: int) -> tuple[torch.Tensor, ...]:
        """The planes that `layer` reads: its own, or those of its source."""
        source = self.layout.layers[layer].spec.source
        return self._layers[layer if source is None else source]

    def copy(self, copies: Sequence[Copy]) -> None:
        """Carry out what a reservation asked for: whole blocks, every plane."""
        if not copies:
            return
        sources = torch.tensor([copy.source for copy in copies])
        targets = torch.tensor([copy.target for copy in copies])
        for planes in self._layers:
            for plane in planes:
                plane[targets] = plane[sources]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # numpy's zeros are calloc's: untouched pages cost nothing, and large arrays ask for huge pages. They begin
    # wherever malloc's header ends, so a plane begins at the first cache line, or each vector would span two.
    count = math.prod(shape) * dtype.itemsize
    raw = np.zeros(count + _CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % _CACHE_LINE
    return torch.from_numpy(raw[start : start + count]).view(dtype).view(shape)
