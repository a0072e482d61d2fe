"""Specs + codecs + block size, resolved to bytes. Plan, pool, store and report all read this one description."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from kvist.base.errors import ConfigError
from kvist.cache.calibration import Calibration
from kvist.cache.choice import KvChoice
from kvist.cache.codecs import CODECS, FP32, Codec, DenseCodec, Plane
from kvist.cache.spec import SLACK, Full, LayerSpec, Reading, Retention, Role, Stream, Window, check_sources
from kvist.ops.coding import Frame

# Part of the fingerprint: raised whenever the same description comes to mean other bytes.
FORMAT_VERSION = 3
BLOCK_SIZE = 64  # tokens; a multiple of 16 (vector lanes) that divides 512 (the attention's split)
# The open blocks that a sequence may hold at once: the one it is filling, and the one that a step goes on to.
OPEN_BLOCKS = 2


@dataclass(frozen=True)
class StreamLayout:
    """One stream of one layer: its codec, where that puts its vectors, and the planes of one block."""

    stream: Stream
    codec: Codec
    frame: Frame
    planes: tuple[Plane, ...]
    open: Plane  # of one block in full precision

    @property
    def has_kernel(self) -> bool:
        """Whether the operators read its planes. Otherwise its codec decodes them."""
        return self.codec.in_place or self.codec.coding(self.stream) is not None

    @cached_property
    def operands(self) -> tuple[list[int], list[Tensor]]:
        """Coding and frame as the operators take them; empty lists for a dense plane."""
        coding = self.codec.coding(self.stream)
        return ([], []) if coding is None else (coding.flat(), self.frame.tensors(coding))


@dataclass(frozen=True)
class LayerLayout:
    """One layer's spec and its streams. None where a source is read."""

    spec: LayerSpec
    streams: tuple[StreamLayout, ...]

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The planes of one block, stream by stream."""
        return tuple(plane for stream in self.streams for plane in stream.planes)

    @property
    def block_bytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)

    @property
    def opens(self) -> bool:
        """Whether blocks stay open, in full precision, until they are full: some stream is not coded in place."""
        return any(not stream.codec.in_place for stream in self.streams)

    @property
    def open_bytes(self) -> int:
        """Bytes of one open block."""
        return sum(stream.open.nbytes for stream in self.streams) if self.opens else 0


@dataclass(frozen=True)
class Group:
    """Layers that keep the same tokens and so share one block table. The first group of a layout is that of layers that
    keep all of them."""

    retention: Retention
    layers: tuple[int, ...]
    block_bytes: int


@dataclass(frozen=True)
class Layout:
    """The whole cache of one model under one choice of codecs, `kv` as people write it. Built by `plan_layout`."""

    layers: tuple[LayerLayout, ...]
    groups: tuple[Group, ...]
    kv: str
    full: DenseCodec  # what an open block is kept in
    block_size: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in every layer."""
        return sum(group.block_bytes for group in self.groups)

    @property
    def open_bytes(self) -> int:
        """Bytes of one open block in every layer that has them; 0 where every codec writes in place."""
        return sum(layer.open_bytes for layer in self.layers)

    def store_bytes(self, blocks: int, kept: int = 0, passing: int = 0, windows: Sequence[int] = ()) -> int:
        """Bytes of a store of `blocks` blocks, and of so many of each group with a window, with, of open blocks, `kept`
        for each layer and `passing` for all layers of one shape."""
        shapes = {tuple(s.open for s in layer.streams): layer.open_bytes for layer in self.layers if layer.opens}
        own = sum(count * group.block_bytes for count, group in zip((blocks, *windows), self.groups, strict=True))
        return own + kept * self.open_bytes + passing * sum(shapes.values())

    @property
    def needs_calibration(self) -> bool:
        """Whether some codec wants to know the model's own keys and values."""
        codecs = [stream.codec for layer in self.layers for stream in layer.streams]
        return any(codec.centred or codec.ordered for codec in codecs)

    @property
    def windows(self) -> list[Window]:
        """Those of the groups behind the first."""
        return [group.retention for group in self.groups if isinstance(group.retention, Window)]

    @cached_property
    def group_of(self) -> tuple[int, ...]:
        """The number of each layer's group."""
        places = {layer: place for place, group in enumerate(self.groups) for layer in group.layers}
        return tuple(places[layer] for layer in range(len(self.layers)))

    def window_blocks(self, sequences: int, step_tokens: int) -> list[int]:
        """Blocks that each group with a window needs, for so many sequences at once and steps of so many tokens."""
        per_step = -(-step_tokens // self.block_size) + sequences
        return [
            sequences * (window.blocks(window.size + window.sinks + SLACK + self.block_size, self.block_size) + 1)
            + per_step
            for window in self.windows
        ]

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one more token costs where every group keeps it."""
        return self.block_bytes / self.block_size

    @property
    def bits_per_value(self) -> float:
        """Stored bits per number, scales included."""
        numbers = sum(stream.heads * stream.dim for layer in self.layers for stream in layer.spec.streams)
        return self.bytes_per_token * 8 / numbers

    def bytes_for(self, tokens: int) -> int:
        """Bytes of the blocks that a sequence of `tokens` tokens holds, group by group, whole blocks, and of the open
        blocks it may need."""
        kept = sum(group.retention.blocks(tokens, self.block_size) * group.block_bytes for group in self.groups)
        return kept + OPEN_BLOCKS * self.open_bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides what the bytes of a block mean."""
        facts: dict[str, object] = {
            "format": FORMAT_VERSION,
            "block_size": self.block_size,
            "full": self.full.name if self.open_bytes else None,
            "layers": [
                {
                    "spec": _facts(layer.spec),
                    "codecs": [stream.codec.name for stream in layer.streams],
                    "frames": [_digest(stream.frame) for stream in layer.streams],
                    "planes": [[plane.name, list(plane.shape), str(plane.dtype)] for plane in layer.planes],
                }
                for layer in self.layers
            ],
        }
        if plugins := CODECS.versions(stream.codec.name for layer in self.layers for stream in layer.streams):
            facts["plugins"] = plugins
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def plan_layout(
    specs: Sequence[LayerSpec],
    kv: Codec | KvChoice,
    block_size: int = BLOCK_SIZE,
    *,
    full: DenseCodec = FP32,
    calibration: Calibration | None = None,
) -> Layout:
    """Resolve a model's layer specs. `kv`: one codec for everything, or a choice. `full`: the type of open blocks.

    Without a calibration keys are not centred and channels stay in their own order. Raises `ConfigError` when a codec
    or the block size does not fit the specs.
    """
    if block_size < 16 or 512 % block_size:
        raise ConfigError(f"a block holds 16, 32, 64, 128, 256 or 512 tokens, not {block_size}")
    if not specs:
        raise ConfigError("a cache needs at least one layer")
    check_sources(specs)
    choice = kv if isinstance(kv, KvChoice) else KvChoice.of(kv)
    choice.check(specs)
    if calibration is not None and len(calibration.streams) != len(specs):
        raise ConfigError(
            f"the calibration is of another model: it has {len(calibration.streams)} layers where this model has "
            f"{len(specs)}; run kvist calibrate again"
        )
    layers = []
    for index, spec in enumerate(specs):
        streams = []
        for stream in spec.streams:
            codec = choice.codec(index, stream.name)
            # A mean that keys have lost moves all scores of a row alike, but not once they are capped.
            frame = _frame(codec, index, stream, None if spec.softcap else calibration)
            planes = codec.planes(stream, block_size)
            streams.append(StreamLayout(stream, codec, frame, planes, *full.planes(stream, block_size)))
        layers.append(LayerLayout(spec, tuple(streams)))
    groups = []
    # First those that keep everything, be there none: their block table is that of the tokens.
    for retention in dict.fromkeys([Full(), *(spec.retention for spec in specs)]):
        members = tuple(index for index, spec in enumerate(specs) if spec.retention == retention)
        groups.append(Group(retention, members, sum(layers[index].block_bytes for index in members)))
    return Layout(tuple(layers), tuple(groups), choice.name, full, block_size)


def _frame(codec: Codec, layer: int, stream: Stream, calibration: Calibration | None) -> Frame:
    """Where `codec` wants this stream's vectors."""
    frame = Frame.plain(stream.heads, stream.dim)
    if calibration is None or not (codec.centred or codec.ordered):
        return frame
    found = calibration.streams[layer][stream.name]
    if found.mean.shape != frame.mean.shape:
        raise ConfigError(
            f"the calibration is of another model: layer {layer} has {list(found.mean.shape)} numbers for stream "
            f"{stream.name!r} where this model has {list(frame.mean.shape)}; run kvist calibrate again"
        )
    centred = codec.centred and stream.role is Role.KEYS
    return Frame(found.mean if centred else frame.mean, found.order() if codec.ordered else frame.order, frame.signs)


def _facts(spec: LayerSpec) -> dict[str, object]:
    """What a fingerprint says of a spec: as it always was where a layer is read in the usual way."""
    facts = asdict(spec) | {"retention": repr(spec.retention)}
    unusual = {"reading": spec.reading is not Reading.APART, "softcap": spec.softcap != 0}
    return {name: value for name, value in facts.items() if unusual.get(name, True)}


def _digest(frame: Frame) -> str:
    digest = hashlib.sha256()
    for tensor in (frame.mean, frame.order, frame.signs):
        digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return digest.hexdigest()
