"""Four bits in small groups, as ggml's q4_0: the bar that any cleverer codec has to clear.

A group of 32 channels has one scale; its number of largest magnitude takes level -8, and 7 is the highest level.
`int4-rot` rotates each head first, as llama.cpp does (pull request 21038): by Hadamard blocks of the largest power of
two that divides the head, where that is 64 at least. llama.cpp leaves other heads as they are; here they are rotated
by the blocks that sum to them. Unlike llama.cpp's, a rotation here begins with signs.
"""

from functools import cache

from kvist.cache.codecs.coded import CodedCodec
from kvist.cache.spec import Stream
from kvist.ops.coding import Coding, Rule, Segment, rotation_blocks

GROUP = 32
LEVELS = tuple(range(-64, 64, 8))  # -8 to 7 times a power of two, so that scales are rounded as ggml rounds them


@cache
def _segments(dim: int) -> tuple[Segment, ...]:
    """Groups of 32 channels; the last has 16 where the head leaves no more."""
    return tuple(Segment(min(GROUP, dim - start), 4, LEVELS) for start in range(0, dim, GROUP))


def _code(stream: Stream) -> Coding:
    return Coding(_segments(stream.dim), Rule.SIGNED_MAX)


def _code_rotated(stream: Stream) -> Coding:
    dim = stream.dim
    block = dim & -dim
    blocks = (block,) * (dim // block) if block >= 64 else rotation_blocks(dim)
    return Coding(_segments(dim), Rule.SIGNED_MAX, blocks)


INT4 = CodedCodec("int4", _code)
INT4_ROT = CodedCodec("int4-rot", _code_rotated)
