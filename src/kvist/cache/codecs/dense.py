"""Codecs that keep every number as it is, rounded to a floating-point type: one plane, no scales."""

from dataclasses import dataclass

import torch

from kvist.base.errors import ConfigError
from kvist.cache.codecs.base import Plane
from kvist.cache.spec import Role, Stream
from kvist.ops.packing import key_plane_shape, unsupported, value_plane_shape


@dataclass(frozen=True)
class DenseCodec:
    """Rounds to nearest even into `dtype`; exact when the vectors already have that type."""

    name: str
    dtype: torch.dtype

    def planes(self, stream: Stream, block_size: int) -> tuple[Plane, ...]:
        if reason := unsupported(self.dtype, stream.dim, block_size):
            raise ConfigError(f"{self.name} cannot hold the stream {stream.name!r}: {reason}")
        shape_of = key_plane_shape if stream.role is Role.KEYS else value_plane_shape
        shape = shape_of(1, stream.heads, block_size, stream.dim, self.dtype)[1:]
        return (Plane(stream.name, tuple(shape), self.dtype),)


FP32 = DenseCodec("fp32", torch.float32)
BF16 = DenseCodec("bf16", torch.bfloat16)
FP16 = DenseCodec("fp16", torch.float16)
