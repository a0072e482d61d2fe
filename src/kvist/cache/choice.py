"""Which codec holds which stream of which layer, as people write it.

turbo4                      every stream of every layer
k=int8,v=turbo4             by stream
turbo4,0-1:bf16,9:k=int8    by layer too: what stands further right wins
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvist.base.errors import ConfigError
from kvist.cache.codecs import CODECS, Codec, codec
from kvist.cache.spec import LayerSpec

_PART = re.compile(r"(?:(\d{1,5})(?:-(\d{1,5}))?:)?(?:(\w+)=)?([\w.-]+)")


@dataclass(frozen=True)
class Part:
    """`codec` for stream `stream` (or all) of layers `first` to `last` (or all)."""

    text: str
    first: int | None
    last: int | None
    stream: str | None
    codec: Codec

    def covers(self, layer: int, stream: str) -> bool:
        within = self.first is None or self.last is None or self.first <= layer <= self.last
        return within and self.stream in (None, stream)

    def hides(self, other: "Part") -> bool:
        """Whether it says something of all that `other` speaks of."""
        if self.stream not in (None, other.stream):
            return False
        if self.first is None or self.last is None:
            return True
        if other.first is None or other.last is None:
            return False
        return self.first <= other.first and other.last <= self.last


@dataclass(frozen=True)
class KvChoice:
    """A parsed choice. Built by `parse_choice`, or by `KvChoice.of` from one codec for everything."""

    name: str
    parts: tuple[Part, ...]

    @staticmethod
    def of(codec: Codec) -> "KvChoice":
        return KvChoice(codec.name, (Part(codec.name, None, None, None, codec),))

    def codec(self, layer: int, stream: str) -> Codec:
        """Raises `ConfigError` when no part of the choice covers this stream."""
        for part in reversed(self.parts):
            if part.covers(layer, stream):
                return part.codec
        raise ConfigError(f"--kv {self.name} says nothing of stream {stream!r} of layer {layer}; begin it with a codec")

    @property
    def plugins(self) -> dict[str, str]:
        """Who made the codecs that are not ours, by name."""
        return CODECS.versions(part.codec.name for part in self.parts)

    def check(self, specs: Sequence[LayerSpec]) -> None:
        """Raises `ConfigError` when a part names a stream or a layer that the model does not have."""
        streams = sorted({stream.name for spec in specs for stream in spec.streams})
        for part in self.parts:
            if part.stream is not None and part.stream not in streams:
                raise ConfigError(
                    f"--kv {part.text}: there is no stream {part.stream!r}; streams are {', '.join(streams)}"
                )
            if part.last is not None and part.last >= len(specs):
                raise ConfigError(f"--kv {part.text}: the model's layers are 0 to {len(specs) - 1}")


def parse_choice(text: str) -> KvChoice:
    """Raises `ConfigError` that shows the part that cannot be read, or that a later part replaces, or lists the codecs
    when one is unknown."""
    parts = []
    for piece in text.split(","):
        match = _PART.fullmatch(piece.strip())
        if match is None:
            raise ConfigError(f"cannot read {piece!r} in --kv {text}; write a codec, k=CODEC, 3:CODEC or 0-2:v=CODEC")
        first, last, stream, name = match.groups()
        low = None if first is None else int(first)
        high = low if last is None else int(last)
        if low is not None and high is not None and high < low:
            raise ConfigError(f"--kv {piece.strip()}: layers {low} to {high} are none; write them in rising order")
        parts.append(Part(piece.strip(), low, high, stream, codec(name)))
        for earlier in parts[:-1]:
            if parts[-1].hides(earlier):
                raise ConfigError(
                    f"--kv {text}: {parts[-1].text} leaves nothing of {earlier.text}; what stands further right wins "
                    "(to compare choices, give --kv several times)"
                )
    return KvChoice(",".join(part.text for part in parts), tuple(parts))
