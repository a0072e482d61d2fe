"""Codecs that keep every number as it is, rounded to a floating-point type: one plane, no scales."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.base.errors import ConfigError
from kvist.cache.codecs.base import Plane
from kvist.cache.spec import Role, Stream
from kvist.ops.coding import Frame
from kvist.ops.packing import (
    gather_keys,
    gather_values,
    key_plane_shape,
    scatter_keys,
    scatter_values,
    unsupported,
    value_plane_shape,
)


@dataclass(frozen=True)
class DenseCodec:
    """Rounds to nearest even into `dtype`; exact when the vectors already have that type."""

    name: str
    dtype: torch.dtype
    in_place: bool = True
    centred: bool = False
    ordered: bool = False

    def planes(self, stream: Stream, block_size: int) -> tuple[Plane, ...]:
        if reason := unsupported(self.dtype, stream.dim, block_size):
            raise ConfigError(f"{self.name} cannot hold the stream {stream.name!r}: {reason}")
        shape_of = key_plane_shape if stream.role is Role.KEYS else value_plane_shape
        shape = shape_of(1, stream.heads, block_size, stream.dim, self.dtype)[1:]
        return (Plane(stream.name, tuple(shape), self.dtype),)

    def coding(self, stream: Stream) -> None:
        return None

    def encode(self, x: Tensor, stream: Stream, frame: Frame) -> tuple[Tensor, ...]:
        plane = torch.zeros((1, *self.planes(stream, len(x))[0].shape), dtype=self.dtype)
        scatter = scatter_keys if stream.role is Role.KEYS else scatter_values
        scatter(plane, torch.arange(len(x)), x)
        return (plane[0],)

    def decode(self, planes: tuple[Tensor, ...], stream: Stream, frame: Frame) -> Tensor:
        keys = stream.role is Role.KEYS
        count = planes[0].shape[1] * 16 if keys else planes[0].shape[1] * (2 if self.dtype is torch.bfloat16 else 1)
        return (gather_keys if keys else gather_values)(planes[0][None], torch.zeros(1, dtype=torch.int64), count)


FP32 = DenseCodec("fp32", torch.float32)
BF16 = DenseCodec("bf16", torch.bfloat16)
FP16 = DenseCodec("fp16", torch.float16)
