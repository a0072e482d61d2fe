"""What a model's layers keep, described before anything is allocated.

Three of the four axes of a cache stand here: streams x retention x source. The fourth, the codec, belongs to the
layout. A combination is a value of these types, never a class of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvist.base.errors import ConfigError


class Role(StrEnum):
    """How attention reads a stream; it decides how a codec arranges the stream's bytes."""

    KEYS = "keys"  # multiplied with the query: tokens run along the vector lanes
    VALUES = "values"  # weighted and summed: dimensions run along the vector lanes


@dataclass(frozen=True)
class Stream:
    """One sequence of vectors that a layer stores per token: `heads` vectors of `dim` numbers."""

    name: str
    role: Role
    heads: int
    dim: int

    def __post_init__(self) -> None:
        if self.heads < 1 or self.dim < 1:
            raise ConfigError(f"stream {self.name!r} needs at least one head and one dimension, got {self}")


@dataclass(frozen=True)
class Full:
    """Every token is kept."""

    def blocks(self, tokens: int, block_size: int) -> int:
        """Blocks that hold a kept token of a sequence of `tokens` tokens."""
        return -(-tokens // block_size)


@dataclass(frozen=True)
class Window:
    """The last `size` tokens are kept, and the first `sinks`."""

    size: int
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.sinks < 0:
            raise ConfigError(f"a window keeps at least one token and no negative number of sinks, got {self}")

    def blocks(self, tokens: int, block_size: int) -> int:
        """Blocks that hold a kept token of a sequence of `tokens` tokens, wherever the window's ends fall in them."""
        oldest = max(0, tokens - self.size)
        first = oldest // block_size
        return -(-tokens // block_size) - first + min(first, -(-min(self.sinks, oldest) // block_size))


Retention = Full | Window


def window_of(retention: Retention) -> int:
    """As operators take it: 0 where everything is kept."""
    return retention.size if isinstance(retention, Window) else 0


# Tokens that a sequence can be cut by, of those that were computed for it, and be gone on from, whatever the window.
SLACK = 64


class Reading(StrEnum):
    """How attention has its keys and values from a layer's streams."""

    APART = "apart"  # keys from the first stream, values from the second
    JOINED = "joined"  # values from the second stream; keys are the same vectors and, behind them, those of the first
    TIED = "tied"  # values from the only stream; keys are made of the same vectors, in a way that the model says


@dataclass(frozen=True)
class LayerSpec:
    """What one layer keeps, and how attention reads it. A layer with a `source` reads that earlier layer's streams and
    owns none. `softcap`: scores s become softcap * tanh(s / softcap); 0: they stay."""

    streams: tuple[Stream, ...]
    retention: Retention = Full()
    source: int | None = None
    reading: Reading = Reading.APART
    softcap: float = 0.0

    def __post_init__(self) -> None:
        names = [stream.name for stream in self.streams]
        if len(set(names)) != len(names):
            raise ConfigError(f"a layer's streams need different names, got {', '.join(names)}")
        if (self.source is None) == (not self.streams):
            raise ConfigError("a layer either owns streams or reads a source layer's, never both or neither")
        if self.softcap and self.reading is not Reading.APART:
            raise ConfigError("scores are capped over keys and values that stand apart, and no others")


def key_value(heads: int, dim: int, retention: Retention = Full(), softcap: float = 0.0) -> LayerSpec:
    """The usual layer: one key and one value stream, `heads` KV heads of `dim` numbers each."""
    streams = Stream("k", Role.KEYS, heads, dim), Stream("v", Role.VALUES, heads, dim)
    return LayerSpec(streams, retention, softcap=softcap)


def latent(dim: int, rope_dim: int) -> LayerSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): a latent of `dim` numbers for all
    heads, and what of the keys positions rotate."""
    streams = Stream("rope", Role.KEYS, 1, rope_dim), Stream("latent", Role.VALUES, 1, dim)
    return LayerSpec(streams, reading=Reading.JOINED)


def tied(heads: int, dim: int, retention: Retention = Full()) -> LayerSpec:
    """One stream that is read twice, as keys and as values."""
    return LayerSpec((Stream("kv", Role.VALUES, heads, dim),), retention, reading=Reading.TIED)


def shared(source: int, owner: LayerSpec) -> LayerSpec:
    """A layer that reads what layer `source`, which `owner` describes, keeps."""
    return LayerSpec((), owner.retention, source, owner.reading, owner.softcap)


def check_sources(layers: Sequence[LayerSpec]) -> None:
    """Raises `ConfigError` unless every source is an earlier layer that owns streams of the same retention."""
    for index, layer in enumerate(layers):
        if layer.source is None:
            continue
        if not 0 <= layer.source < index:
            raise ConfigError(f"layer {index} reads the cache of layer {layer.source}, which is not before it")
        owner = layers[layer.source]
        if owner.source is not None:
            raise ConfigError(f"layer {index} reads layer {layer.source}, which owns no cache itself")
        if (owner.reading, owner.softcap) != (layer.reading, layer.softcap):
            raise ConfigError(f"layer {index} and its source, layer {layer.source}, are read in different ways")
        if owner.retention != layer.retention:
            raise ConfigError(f"layer {index} and its source, layer {layer.source}, keep different tokens")
