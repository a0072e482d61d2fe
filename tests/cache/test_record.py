"""Records of blocks: what is not exactly the block that was asked for is never taken for it."""

import hashlib
import random
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.cache.keys import block_key, pack_tokens, root_key, unpack_tokens
from kvist.cache.record import BadRecord, BlockId, Loss, header, read_payload, record_bytes

SIZE, PAYLOAD = 16, 500
ROOT = root_key(b"identity", "tenant")
BLOCK = BlockId.after(ROOT, ROOT, tuple(range(100, 100 + SIZE)))
PLANES = random.Random(0).randbytes(PAYLOAD)
GOOD = header(BLOCK, PLANES) + PLANES
HEAD = record_bytes(SIZE, 0)


def test_a_record_is_what_was_written() -> None:
    assert len(GOOD) == record_bytes(SIZE, PAYLOAD)
    assert bytes(read_payload(GOOD, BLOCK, PAYLOAD)) == PLANES
    assert unpack_tokens(pack_tokens(BLOCK.tokens)) == BLOCK.tokens


def test_the_layout_is_that_of_the_documentation() -> None:
    assert GOOD[:8] == bytes.fromhex("894B495653540D0A".replace("4B4956", "4B5649"))
    assert struct.unpack_from("<IIQ", GOOD, 8) == (1, SIZE, PAYLOAD)
    assert GOOD[24:56] == BLOCK.namespace
    assert GOOD[56:88] == BLOCK.parent
    assert unpack_tokens(GOOD[120 : 120 + 4 * SIZE]) == BLOCK.tokens
    assert len(GOOD) == 152 + 4 * SIZE + PAYLOAD


def test_keys_differ_by_everything_that_they_stand_for() -> None:
    keys = {
        root_key(b"a", "b"), root_key(b"ab", ""), root_key(b"", "ab"), root_key(b"a", ""),
        BLOCK.key, block_key(BLOCK.key, BLOCK.tokens), block_key(ROOT, BLOCK.tokens[:-1]),
        block_key(ROOT, (*BLOCK.tokens[:-1], 0)), block_key(root_key(b"identity", "other"), BLOCK.tokens),
    }  # fmt: skip
    assert len(keys) == 9


@pytest.mark.parametrize("seed", range(4))
def test_no_flipped_bit_goes_unnoticed(seed: int) -> None:
    rng = random.Random(seed)
    places = range(seed * 8 * HEAD // 4, (seed + 1) * 8 * HEAD // 4)  # all bits of the header
    for bit in [*places, *(rng.randrange(8 * HEAD, 8 * len(GOOD)) for _ in range(300))]:
        bad = bytearray(GOOD)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadRecord) as found:
            read_payload(bad, BLOCK, PAYLOAD)
        assert found.value.loss in (Loss.CORRUPT, Loss.VERSION)


def test_every_length_but_the_right_one_is_refused() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(BadRecord) as found:
            read_payload(GOOD[:length], BLOCK, PAYLOAD)
        assert found.value.loss is Loss.TRUNCATED
    with pytest.raises(BadRecord) as found:
        read_payload(GOOD + b"\0", BLOCK, PAYLOAD)
    assert found.value.loss is Loss.TRUNCATED


def test_another_version_is_told_as_such() -> None:
    bad = bytearray(GOOD)
    struct.pack_into("<I", bad, 8, 2)
    with pytest.raises(BadRecord, match="version 2 of the format, and 1 is read here") as found:
        read_payload(bad, BLOCK, PAYLOAD)
    assert found.value.loss is Loss.VERSION


@pytest.mark.parametrize(
    "other",
    [
        BlockId.after(root_key(b"identity", "other"), root_key(b"identity", "other"), BLOCK.tokens),
        BlockId.after(ROOT, BLOCK.key, BLOCK.tokens),
        BlockId.after(ROOT, ROOT, (*BLOCK.tokens[:-1], 7)),
    ],
)
def test_a_good_record_of_another_block_is_foreign(other: BlockId) -> None:
    with pytest.raises(BadRecord) as found:
        read_payload(header(other, PLANES) + PLANES, BLOCK, PAYLOAD)
    assert found.value.loss is Loss.FOREIGN
    shorter = BlockId.after(ROOT, ROOT, BLOCK.tokens[:-1])
    with pytest.raises(BadRecord):
        read_payload(header(shorter, PLANES) + PLANES, BLOCK, PAYLOAD)
    with pytest.raises(BadRecord) as found:
        read_payload(header(BLOCK, PLANES[:-1]) + PLANES[:-1], BLOCK, PAYLOAD)
    assert found.value.loss is Loss.FOREIGN


def test_hostile_numbers_take_no_memory_and_raise_nothing_else() -> None:
    """Sizes and counts that lie, with digests that are right: whoever writes files can make those, too."""
    rng = random.Random(8)
    tracemalloc.start()
    for _ in range(500):
        bad = bytearray(GOOD)
        struct.pack_into("<I", bad, 12, rng.choice([0, 1, SIZE - 1, SIZE + 1, 2**20, 2**32 - 1]))
        struct.pack_into("<Q", bad, 16, rng.choice([0, 1, PAYLOAD - 1, PAYLOAD + 1, 2**40, 2**64 - 1]))
        bad[HEAD - 32 : HEAD] = hashlib.sha256(bad[: HEAD - 32]).digest()
        if rng.random() < 0.3:
            bad[rng.randrange(len(bad)) :] = rng.randbytes(rng.randrange(600))
        with pytest.raises(BadRecord):
            read_payload(bad, BLOCK, PAYLOAD)
    for _ in range(500):
        with pytest.raises(BadRecord):
            read_payload(rng.randbytes(rng.randrange(2000)), BLOCK, PAYLOAD)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


@settings(max_examples=500)
@given(
    cuts=st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 80), st.binary(max_size=80)), max_size=4),
    sealed=st.booleans(),
)
def test_whatever_is_spliced_in_nothing_comes_back_but_what_was_written(
    cuts: list[tuple[int, int, bytes]], sealed: bool
) -> None:
    """`sealed`: with the digest of the header that belongs to what it became."""
    bad = bytearray(GOOD)
    for place, count, data in cuts:
        bad[place : place + count] = data
    if sealed and len(bad) >= HEAD:
        bad[HEAD - 32 : HEAD] = hashlib.sha256(bad[: HEAD - 32]).digest()
    try:
        found = bytes(read_payload(bad, BLOCK, PAYLOAD))
    except BadRecord:
        assert bad != GOOD
    else:
        assert found == PLANES
        assert bad == GOOD


def test_every_byte_of_a_good_record_is_needed() -> None:
    """Any byte changed, and the header's digest made right again: what the record says is compared, not believed."""
    for place in range(HEAD - 32):
        bad = bytearray(GOOD)
        bad[place] ^= 0xFF
        bad[HEAD - 32 : HEAD] = hashlib.sha256(bad[: HEAD - 32]).digest()
        with pytest.raises(BadRecord):
            read_payload(bad, BLOCK, PAYLOAD)


def test_a_reader_that_looks_at_no_digest_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Same:
        def digest(self) -> bytes:
            return GOOD[88:120]

    bad = bytearray(GOOD)
    bad[-1] ^= 1
    bad[HEAD - 32 : HEAD] = GOOD[88:120]
    monkeypatch.setattr("kvist.cache.record.hashlib.sha256", lambda data: Same())
    assert bytes(read_payload(bad, BLOCK, PAYLOAD)) != PLANES
