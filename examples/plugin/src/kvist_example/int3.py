"""Three bits: whole levels at even distances, of each vector's largest number, after a rotation."""

from kvist.cache.codecs.coded import CodedCodec
from kvist.cache.spec import Stream
from kvist.ops.coding import Coding, Rule, Segment, rotation_blocks

LEVELS = tuple(range(-8, 8, 2))


def _code(stream: Stream) -> Coding:
    return Coding((Segment(stream.dim, 3, LEVELS),), Rule.SIGNED_MAX, rotation_blocks(stream.dim))


INT3 = CodedCodec("int3", _code)
