"""The checks that authors run find what is wrong, and say it in a line."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from packages import FAMILY, TWIG, Halves, Held, read_twig
from torch import Tensor

import kvist
from kvist.cache.disk import DiskTier
from kvist.cache.spec import Stream
from kvist.cache.tier import Buffer
from kvist.models import llama
from kvist.models.decoder import Slot
from kvist.models.families import Family
from kvist.ops.coding import Frame
from kvist.testing import check_codec, check_family, check_tier


class Coarse(Halves):
    def encode(self, x: Tensor, stream: Stream, frame: Frame) -> tuple[Tensor, ...]:
        return super().encode(x / 16, stream, frame)


class Breaks(Halves):
    def decode(self, planes: tuple[Tensor, ...], stream: Stream, frame: Frame) -> Tensor:
        return super().decode(planes, stream, frame) * (1 / (stream.heads - 3))


class Counts(Halves):
    calls: list[int] = []  # noqa: RUF012

    def encode(self, x: Tensor, stream: Stream, frame: Frame) -> tuple[Tensor, ...]:
        self.calls.append(1)
        return super().encode(x + len(self.calls) % 3 / 8, stream, frame)


class Leans(Halves):
    """On the other tokens of its block."""

    def encode(self, x: Tensor, stream: Stream, frame: Frame) -> tuple[Tensor, ...]:
        return super().encode(x - x.mean(0), stream, frame)


class Shifts(Halves):
    def decode(self, planes: tuple[Tensor, ...], stream: Stream, frame: Frame) -> Tensor:
        return super().decode(planes, stream, frame) + 0.25


class Padded(Halves):
    """Its highest bit says nothing."""

    def encode(self, x: Tensor, stream: Stream, frame: Frame) -> tuple[Tensor, ...]:
        return (super().encode(x, stream, frame)[0] & 0x7F,)

    def decode(self, planes: tuple[Tensor, ...], stream: Stream, frame: Frame) -> Tensor:
        return super().decode(((planes[0] << 1) >> 1,), stream, frame)


class Overwrites(Halves):
    def encode(self, x: Tensor, stream: Stream, frame: Frame) -> tuple[Tensor, ...]:
        return super().encode(x.mul_(1.0001), stream, frame)


class TwoStreams(Halves):
    def planes(self, stream: Stream, block_size: int):
        (plane,) = super().planes(stream, block_size)
        return (dataclasses.replace(plane, name="halves"),)


@pytest.mark.parametrize(
    ("codec", "says"),
    [
        (Breaks(), "halves: shapes, types and names .* as it says: ZeroDivisionError: division by zero"),
        (Coarse(), r"normal values lose 0\.\d+ of their square; 0\.1 is the most"),
        (Counts(), "halves, keys in heads of 64, a block of 64: the same block comes to other bytes the second time"),
        (Leans(), "a token comes back otherwise in a block of 16"),
        (Shifts(), "zeros do not come back as zeros"),
        (Padded(), "halves, keys in heads of 32, a block of 16: bit 7 of byte .* idle_bits=True says"),
        (Overwrites(), "encode changes the block that it is given"),
        (Halves(centred=True), "values in a frame of their own lose"),
        (TwoStreams(), "a plane is called STREAM or STREAM.PART"),
        (Halves(name=""), "the codec would not be registered: a name has letters"),
        (3, "the codec would not be registered: its in_place"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_codec_is_found(codec: Halves, says: str) -> None:
    with pytest.raises(AssertionError, match=says) as told:
        check_codec(codec, error=0.1)
    assert "\n" not in str(told.value)


def test_a_codec_that_the_cache_cannot_be_exact_over_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose faults show in a model alone: what comes back depends on what came back before."""

    class Remembers(Halves):
        def decode(self, planes: tuple[Tensor, ...], stream: Stream, frame: Frame) -> Tensor:
            if stream.dim == 64 and stream.heads == 1 and len(planes[0][0]) == 64:
                seen.append(1)
            return super().decode(planes, stream, frame) * (1 + (len(seen) > 400) * 0.25)

    seen: list[int] = []
    with pytest.raises(AssertionError, match="halves is not exact over the cache: "):
        check_codec(Remembers(), error=0.1)


def test_padding_may_be_declared() -> None:
    check_codec(Padded(), error=0.1, idle_bits=True)


# ---- families


@pytest.fixture
def twig(tmp_path: Path) -> Path:
    (tmp_path / "twig").mkdir()
    (tmp_path / "twig" / "config.json").write_text(json.dumps(FAMILY))
    return tmp_path / "twig"


class Forgetful(llama.Llama):
    """Its output weights go where nothing reads them from."""

    def slots(self) -> list[Slot]:
        return [slot for slot in super().slots() if slot.parameter != "blocks.1.attention.out.weight"]


class Places(llama.Llama):
    """Rotates by where a row stands in its step."""

    def forward(self, tokens: Tensor, positions: Tensor, layers: Sequence) -> Tensor:
        return super().forward(tokens, torch.arange(len(positions)), layers)


def test_what_is_wrong_with_a_family_is_found(twig: Path) -> None:
    with pytest.raises(AssertionError, match=r"random weights cannot be written: .*architecture 'twig' is not"):
        check_family(twig)
    kvist.register_family("twig", Family(read_twig, Places), version="1")
    with pytest.raises(AssertionError, match="twig with --kv fp32 is not exact over the cache: greedy: cached = reco"):
        check_family(twig)


def test_a_weight_that_is_not_read_is_found(twig: Path) -> None:
    kvist.register_family("twig", Family(read_twig, Forgetful), version="1")
    with pytest.raises(AssertionError, match=r"twig: .*blocks\.1"):
        check_family(twig)


def test_a_right_one_passes(twig: Path) -> None:
    kvist.register_family("twig", TWIG, version="1")
    check_family(twig)
    assert [path.name for path in twig.iterdir()] == ["config.json"]


# ---- tiers


def made(kind: type[Held] = Held) -> Held:
    return kind("held://here")


class Cuts(Held):
    def get(self, block: str, size: int) -> Buffer | None:
        found = super().get(block, size)
        return found if found is None else found[:size]


class Strips(Held):
    def put(self, block: str, record: Sequence[Buffer], until: float) -> bool:
        return super().put(block, [bytes(part).rstrip(b"\xff") for part in record[:1]], until)


class Keeps(Held):
    def remove(self, block: str) -> None:
        pass


class Raises(Held):
    def pin(self, blocks: Sequence[str], until: float) -> None:
        for block in blocks:
            self.records[block] = self.records[block]


class Lies(Held):
    def put(self, block: str, record: Sequence[Buffer], until: float) -> bool:
        return len(self.records) > 20 or super().put(block, record, until)


class Gone(Held):
    def probe(self, block: str) -> bool:
        raise ConnectionError("gone")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Cuts, "`get` cuts what is too long so that it seems right"),
        (Strips, "a record does not come back byte for byte"),
        (Keeps, "a record is there after it was removed"),
        (Raises, "what is put is there: KeyError"),
        (Lies, "a record that it says it keeps is not there"),
        (Held, "it keeps 300000 bytes of records, and 100000 are the most"),
    ],
)
def test_what_is_wrong_with_a_tier_is_found(kind: type[Held], says: str) -> None:
    with pytest.raises(AssertionError, match=f"held: {says}"):
        check_tier(lambda: made(kind), budget=100_000)


def test_one_that_fails_otherwise_is_found() -> None:
    with pytest.raises(AssertionError, match="`probe` of one that is gone raises ConnectionError, which is no TierErr"):
        check_tier(made, broken=lambda: made(Gone))
    check_tier(made)


def test_ours_pass(tmp_path: Path) -> None:
    def closed() -> DiskTier:
        tier = DiskTier(tmp_path / "closed", 1 << 20)
        tier.close()
        return tier

    check_tier(lambda: DiskTier(tmp_path / "disk", 100_000), budget=100_000, broken=closed)
