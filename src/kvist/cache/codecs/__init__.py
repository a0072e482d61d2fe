"""How a stream's vectors become bytes. One small file per codec, one line here."""

from kvist.base.errors import ConfigError
from kvist.cache.codecs.base import Codec, Plane
from kvist.cache.codecs.dense import BF16, FP16, FP32, DenseCodec
from kvist.cache.codecs.int4 import INT4, INT4_ROT
from kvist.cache.codecs.int8 import INT8
from kvist.cache.codecs.outlier import TURBO2_5, TURBO3_5
from kvist.cache.codecs.paper import PAPER
from kvist.cache.codecs.turbo import TURBO2, TURBO3, TURBO4
from kvist.cache.spec import Stream

_ALL: tuple[Codec, ...] = (
    *(FP32, BF16, FP16),
    *(INT8, INT4, INT4_ROT),
    *(TURBO4, TURBO3_5, TURBO3, TURBO2_5, TURBO2),
    *PAPER,
)
CODECS: dict[str, Codec] = {codec.name: codec for codec in _ALL}


def codec(name: str) -> Codec:
    """The codec of that name. Raises `ConfigError` listing those that exist."""
    try:
        return CODECS[name]
    except KeyError:
        raise ConfigError(f"there is no KV codec {name!r}; choose one of {', '.join(CODECS)}") from None


def bits_per_value(codec: Codec, stream: Stream, block_size: int) -> float:
    """Bits that one number of `stream` takes, everything counted: the bytes of a block's planes over its numbers."""
    nbytes = sum(plane.nbytes for plane in codec.planes(stream, block_size))
    return 8 * nbytes / (block_size * stream.heads * stream.dim)


__all__ = ["BF16", "CODECS", "FP16", "FP32", "Codec", "DenseCodec", "Plane", "bits_per_value", "codec"]
