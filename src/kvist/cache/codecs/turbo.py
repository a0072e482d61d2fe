"""TurboQuant's codes (Zandieh et al. 2025, arXiv 2504.19874, Algorithm 1) as they serve best: 2, 3 and 4 bits.

Each head is rotated, here by randomized Hadamard blocks, and each of its numbers takes the nearest centroid of the law
that a coordinate of a random direction has; one float16 scale a token. Against the paper's Algorithm 2:

- No second stage of signs. Keys are unbiased already by their scale, |x|^2 / <x, l>, so that inner products with what
  is decoded are right on average (the unbiased scale of EDEN, Vargaftik et al. 2022, arXiv 2108.08842), at less than a
  quarter of the error of the same bits in two stages (`kvist eval codecs`).
- Keys are stored less their mean, which a softmax never sees; a large one would take all of a 3-bit code's range.
- Values have the scale of least squares. In the attention of the bundled model the squared error of what comes out,
  relative, is .110 with it and .125 with the unbiased one at 2 bits, .0288 and .0297 at 3, .0068 both at 4
  (tests/evals/test_codec_distortion.py). An average of hundreds of values with a common part would rather have no bias
  (`kvist eval codecs`).
"""

from functools import cache

from kvist.cache.codecs.codebook import segment
from kvist.cache.codecs.coded import CodedCodec
from kvist.cache.spec import Role, Stream
from kvist.ops.coding import Coding, Rule, rotation_blocks


@cache
def _coding(dim: int, bits: int, rule: Rule) -> Coding:
    return Coding((segment(dim, bits),), rule, rotation_blocks(dim))


def _turbo(bits: int) -> CodedCodec:
    def code(stream: Stream) -> Coding:
        return _coding(stream.dim, bits, rule_of(stream.role))

    return CodedCodec(f"turbo{bits}", code, centred=True)


def rule_of(role: Role) -> Rule:
    """How the streams of a role are scaled."""
    return Rule.UNBIASED if role is Role.KEYS else Rule.LEAST_SQUARES


TURBO4, TURBO3, TURBO2 = _turbo(4), _turbo(3), _turbo(2)
