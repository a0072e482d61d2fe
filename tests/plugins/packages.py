"""What tests of plug-ins share: a codec, a family and a tier of somebody else."""

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from kvist.cache.codecs import CODECS, Plane
from kvist.cache.spec import Stream
from kvist.cache.tier import Buffer
from kvist.cache.tiers import TIERS
from kvist.models import llama
from kvist.models.config import ModelConfig
from kvist.models.families import FAMILIES, Family
from kvist.models.keys import Keys
from kvist.ops.coding import Frame

Install = Callable[..., None]

FAMILY = {
    "model_type": "twig",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
INT3 = """
    from kvist.cache.codecs.coded import CodedCodec
    from kvist.ops.coding import Coding, Rule, Segment, rotation_blocks

    def _code(stream):
        return Coding((Segment(stream.dim, 3, tuple(range(-8, 8, 2))),), Rule.SIGNED_MAX, rotation_blocks(stream.dim))

    INT3 = CodedCodec("int3", _code)
"""


@dataclasses.dataclass(frozen=True)
class Halves:
    """A codec with no kernel: whole numbers of a half, up to 63."""

    name: str = "halves"
    in_place: bool = False
    centred: bool = False
    ordered: bool = False

    def planes(self, stream: Stream, block_size: int) -> tuple[Plane, ...]:
        return (Plane(f"{stream.name}.halves", (stream.heads, block_size, stream.dim), torch.int8),)

    def coding(self, stream: Stream) -> None:
        return None

    def encode(self, x: Tensor, stream: Stream, frame: Frame) -> tuple[Tensor, ...]:
        return ((2 * x).round().clamp(-127, 127).to(torch.int8).transpose(0, 1).contiguous(),)

    def decode(self, planes: tuple[Tensor, ...], stream: Stream, frame: Frame) -> Tensor:
        return planes[0].transpose(0, 1).float() / 2


def read_twig(keys: Keys) -> ModelConfig:
    return dataclasses.replace(llama.read(keys, family="llama"), family="twig")


TWIG = Family(read_twig, llama.Llama)


class Held:
    """A tier in a dictionary, for one process."""

    name, budget = "held", "all there is"

    def __init__(self, url: str) -> None:
        if "wrong" in url:
            raise RuntimeError(url)
        self.place, self.records, self.closed = url.partition("?")[0], dict[str, bytes](), False

    def close(self) -> None:
        self.closed = True

    def contains(self, block: str) -> bool | None:
        return block in self.records

    probe = contains

    def get(self, block: str, size: int) -> Buffer | None:
        found = self.records.get(block)
        return None if found is None else found[: size + 1]

    def put(self, block: str, record: Sequence[Buffer], until: float) -> bool:
        self.records[block] = b"".join(record)
        return True

    def pin(self, blocks: Sequence[str], until: float) -> None:
        pass

    def remove(self, block: str) -> None:
        self.records.pop(block, None)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another process has them: ours alone."""
    for registry in (CODECS, FAMILIES, TIERS):
        ours = {name: known for name, known in registry._known.items() if known.version is None}
        monkeypatch.setattr(registry, "_known", ours)
