"""How a stream's vectors become bytes. One small file per codec, one line here; docs/plugins.md for those of others."""

from kvist.base.errors import ConfigError
from kvist.base.registry import Registry
from kvist.cache.codecs.base import Codec, Plane
from kvist.cache.codecs.conformance import refusal
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
CODECS: Registry[Codec] = Registry("KV codec", "kvist.codecs", refusal)
for _codec in _ALL:
    CODECS.register(_codec.name, _codec)


def register_codec(codec: Codec, *, version: str) -> None:
    """Have it chosen by its name, as in `--kv` and `LLM(kv=...)`, for as long as this process lives.

    `version`: another one whenever the same vectors become other bytes; what was kept under another is not found.
    Raises `PluginError` for a name that is taken, and for what is no codec.
    """
    CODECS.register(getattr(codec, "name", ""), codec, version)


def codec(name: str) -> Codec:
    """Raises `ConfigError` listing those that exist, and `PluginError` for one of somebody else that cannot be used."""
    try:
        return CODECS[name]
    except KeyError:
        raise ConfigError(f"there is no KV codec {name!r}; choose one of {', '.join(CODECS)}") from None


def bits_per_value(codec: Codec, stream: Stream, block_size: int) -> float:
    """Bits that one number of `stream` takes, everything counted: the bytes of a block's planes over its numbers."""
    nbytes = sum(plane.nbytes for plane in codec.planes(stream, block_size))
    return 8 * nbytes / (block_size * stream.heads * stream.dim)


__all__ = [
    "BF16",
    "CODECS",
    "FP16",
    "FP32",
    "Codec",
    "DenseCodec",
    "Plane",
    "bits_per_value",
    "codec",
    "register_codec",
]
