"""What every codec says of itself."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvist.cache.spec import Stream
from kvist.ops.coding import Coding, Frame


@dataclass(frozen=True)
class Plane:
    """One tensor of a stream's bytes: `shape` is that of one block, all heads; the store adds the block axis."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one block."""
        return math.prod(self.shape) * self.dtype.itemsize


class Codec(Protocol):
    """Frozen description of one way to store vectors. A stream's frame is part of the model's calibration."""

    @property
    def name(self) -> str: ...

    @property
    def in_place(self) -> bool:
        """Whether a token is written into its block at once and read from there. Otherwise a block is open, in full
        precision, until it is full; then it is coded whole, and queries of later blocks see what the codec left.
        """
        ...

    @property
    def centred(self) -> bool:
        """Whether keys are stored less their calibrated mean."""
        ...

    @property
    def ordered(self) -> bool:
        """Whether channels are put in their calibrated order, those of most energy first."""
        ...

    def planes(self, stream: Stream, block_size: int) -> tuple[Plane, ...]:
        """The planes of one block of `stream`. Raises `ConfigError` for a stream that the codec cannot hold."""
        ...

    def coding(self, stream: Stream) -> Coding | None:
        """What the kernels read. None for a dense plane, and for a codec that only `decode` can read."""
        ...

    def encode(self, x: Tensor, stream: Stream, frame: Frame) -> tuple[Tensor, ...]:
        """One block `x` [B, heads, dim] float32 → its planes. The oracle of the kernels."""
        ...

    def decode(self, planes: tuple[Tensor, ...], stream: Stream, frame: Frame) -> Tensor:
        """The planes of one block → [B, heads, dim] float32, less the frame's mean where the codec is centred."""
        ...
