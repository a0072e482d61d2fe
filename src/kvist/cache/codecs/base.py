"""What every codec says of itself."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from kvist.cache.spec import Stream


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
    """Frozen description of one way to store vectors."""

    @property
    def name(self) -> str: ...

    def planes(self, stream: Stream, block_size: int) -> tuple[Plane, ...]:
        """The planes of one block of `stream`. Raises `ConfigError` for a stream that the codec cannot hold."""
        ...
