"""How a stream's vectors become bytes. One small file per codec, one line here."""

from kvist.base.errors import ConfigError
from kvist.cache.codecs.base import Codec, Plane
from kvist.cache.codecs.dense import BF16, FP16, FP32

CODECS: dict[str, Codec] = {codec.name: codec for codec in (FP32, BF16, FP16)}


def codec(name: str) -> Codec:
    """The codec of that name. Raises `ConfigError` listing those that exist."""
    try:
        return CODECS[name]
    except KeyError:
        raise ConfigError(f"there is no KV codec {name!r}; choose one of {', '.join(CODECS)}") from None


__all__ = ["CODECS", "Codec", "Plane", "codec"]
