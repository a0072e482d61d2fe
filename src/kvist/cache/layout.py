"""Specs + codec + block size, resolved to bytes. Plan, pool, store and report all read this one description."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kvist.base.errors import ConfigError
from kvist.cache.codecs import Codec, Plane
from kvist.cache.spec import LayerSpec, Retention, check_sources

# Part of the fingerprint: raised whenever the same description comes to mean other bytes.
FORMAT_VERSION = 1
BLOCK_SIZE = 64  # tokens; a multiple of 16 (vector lanes) that divides 512 (the attention's split)


@dataclass(frozen=True)
class LayerLayout:
    """One layer's spec and the planes of one of its blocks, stream by stream. No planes where a source is read."""

    spec: LayerSpec
    planes: tuple[Plane, ...]

    @property
    def block_bytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)


@dataclass(frozen=True)
class Group:
    """Layers that keep the same tokens and so share one block table."""

    retention: Retention
    layers: tuple[int, ...]
    block_bytes: int


@dataclass(frozen=True)
class Layout:
    """The whole cache of one model under one codec. Built by `plan_layout`."""

    layers: tuple[LayerLayout, ...]
    groups: tuple[Group, ...]
    codec: Codec
    block_size: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in every layer."""
        return sum(group.block_bytes for group in self.groups)

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one more token costs where every group keeps it."""
        return self.block_bytes / self.block_size

    def bytes_for(self, tokens: int) -> int:
        """Bytes of the blocks that a sequence of `tokens` tokens holds, group by group, whole blocks."""
        return sum(group.retention.blocks(tokens, self.block_size) * group.block_bytes for group in self.groups)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides what the bytes of a block mean."""
        facts = {
            "format": FORMAT_VERSION,
            "block_size": self.block_size,
            "codec": self.codec.name,
            "layers": [
                {
                    "spec": asdict(layer.spec) | {"retention": repr(layer.spec.retention)},
                    "planes": [[plane.name, list(plane.shape), str(plane.dtype)] for plane in layer.planes],
                }
                for layer in self.layers
            ],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def plan_layout(specs: Sequence[LayerSpec], codec: Codec, block_size: int = BLOCK_SIZE) -> Layout:
    """Resolve a model's layer specs. Raises `ConfigError` when the codec or the block size does not fit them."""
    if block_size < 16 or 512 % block_size:
        raise ConfigError(f"a block holds 16, 32, 64, 128, 256 or 512 tokens, not {block_size}")
    if not specs:
        raise ConfigError("a cache needs at least one layer")
    check_sources(specs)
    layers = tuple(
        LayerLayout(spec, tuple(plane for stream in spec.streams for plane in codec.planes(stream, block_size)))
        for spec in specs
    )
    groups = []
    for retention in dict.fromkeys(spec.retention for spec in specs):
        members = tuple(index for index, spec in enumerate(specs) if spec.retention == retention)
        groups.append(Group(retention, members, sum(layers[index].block_bytes for index in members)))
    return Layout(layers, tuple(groups), codec, block_size)
