"""Eight bits: whole numbers from -127 to 127 of the largest magnitude of each token and head. Not rotated; keys less
their mean."""

from kvist.cache.codecs.coded import CodedCodec
from kvist.cache.spec import Stream
from kvist.ops.coding import Coding, Rule, Segment


def _code(stream: Stream) -> Coding:
    return Coding((Segment(stream.dim, 8),), Rule.ABSMAX)


INT8 = CodedCodec("int8", _code, centred=True)
