"""TurboQuant at a half bit (arXiv 2504.19874, section 4.3): the channels of most energy get one bit more than the rest.

A quarter of the channels, which the calibration has put first. Each part has its own rotation and its own scale.
2.5 bits are 32 channels at 3 bits, 96 at 2 and two float16 scales in a head of 128.
"""

from functools import cache

from kvist.cache.codecs.codebook import segment
from kvist.cache.codecs.coded import CodedCodec
from kvist.cache.codecs.turbo import rule_of
from kvist.cache.spec import Stream
from kvist.ops.coding import Coding, Rule, rotation_blocks


def outliers(dim: int) -> int:
    """A quarter of the channels, to the nearest multiple of 16, and 16 at least."""
    return max(16, (dim // 4 + 8) // 16 * 16)


@cache
def _coding(dim: int, bits: int, rule: Rule) -> Coding:
    first, rest = outliers(dim), dim - outliers(dim)
    segments = (segment(first, bits + 1), segment(rest, bits))
    return Coding(segments, rule, rotation_blocks(first) + rotation_blocks(rest))


def _outlier(bits: int) -> CodedCodec:
    def code(stream: Stream) -> Coding:
        return _coding(stream.dim, bits, rule_of(stream.role))

    return CodedCodec(f"turbo{bits}.5", code, centred=True, ordered=True)


TURBO3_5, TURBO2_5 = _outlier(3), _outlier(2)
