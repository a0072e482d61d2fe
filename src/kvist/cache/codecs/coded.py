"""Codecs that the kernels read: a few bits a number, with scales. See `kvist.ops.coding`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.base.errors import ConfigError
from kvist.cache.codecs.base import Plane
from kvist.cache.spec import Role, Stream
from kvist.ops.coding import Coding, Frame, decode, encode, pack_block, unpack_block, unsupported_coding


@dataclass(frozen=True)
class CodedCodec:
    """`code` says how a stream's vectors are coded; the rest follows from it."""

    name: str
    code: Callable[[Stream], Coding]
    centred: bool = False
    ordered: bool = False
    in_place: bool = False

    def planes(self, stream: Stream, block_size: int) -> tuple[Plane, ...]:
        if reason := unsupported_coding(stream.dim, block_size):
            raise ConfigError(f"{self.name} cannot hold the stream {stream.name!r}: {reason}")
        coding = self.code(stream)
        return (
            Plane(f"{stream.name}.codes", (stream.heads, coding.code_bytes(block_size)), torch.uint8),
            Plane(f"{stream.name}.scales", (stream.heads, len(coding.segments), block_size), torch.float16),
        )

    def coding(self, stream: Stream) -> Coding:
        return self.code(stream)

    def encode(self, x: Tensor, stream: Stream, frame: Frame) -> tuple[Tensor, ...]:
        codes, scales = encode(x, self.code(stream), frame)
        return pack_block(codes, self.code(stream), stream.role is Role.KEYS), scales.permute(1, 2, 0).contiguous()

    def decode(self, planes: tuple[Tensor, ...], stream: Stream, frame: Frame) -> Tensor:
        packed, scales = planes
        codes = unpack_block(packed, self.code(stream), stream.role is Role.KEYS, scales.shape[-1])
        return decode(codes, scales.permute(2, 0, 1), self.code(stream), frame)
