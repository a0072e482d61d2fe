"""Blocks on their way to tiers that are slow, that fail, that lie: nothing hangs, nothing wrong comes back."""

import logging
import random
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from kvist.cache.kept import Fetch, KeptCache
from kvist.cache.keys import root_key
from kvist.cache.record import BlockId, Loss, header
from kvist.cache.tier import Buffer, TierError

SIZE, PAYLOAD = 16, 200
ROOT = root_key(b"kept", "")


def chain(count: int, seed: int = 0) -> list[BlockId]:
    blocks, parent = list[BlockId](), ROOT
    for number in range(count):
        blocks.append(BlockId.after(ROOT, parent, tuple(range(seed * 1000 + number, seed * 1000 + number + SIZE))))
        parent = blocks[-1].key
    return blocks


def planes(block: BlockId) -> bytearray:
    return bytearray(random.Random(block.key).randbytes(PAYLOAD))


class MemoryTier:
    """A dictionary that can be told to be slow, to fail, or to lie."""

    def __init__(self, name: str = "memory-tier") -> None:
        self.name = name
        self.records: dict[str, bytes] = {}
        self.pins: list[tuple[Sequence[str], float]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.knows = True
        self.asked = 0

    def contains(self, block: str) -> bool | None:
        return block in self.records if self.knows else None

    def get(self, block: str, size: int) -> Buffer | None:
        self.asked += 1
        self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        return self.records.get(block)

    def put(self, block: str, record: Sequence[Buffer], until: float) -> bool:
        self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        self.records[block] = b"".join(bytes(part) for part in record)
        return True

    def pin(self, blocks: Sequence[str], until: float) -> None:
        self.pins.append((blocks, until))

    def remove(self, block: str) -> None:
        self.records.pop(block, None)


@pytest.fixture
def tier() -> MemoryTier:
    return MemoryTier()


@pytest.fixture
def kept(tier: MemoryTier) -> Iterator[KeptCache]:
    cache = KeptCache([tier], PAYLOAD, staging=4 * PAYLOAD)
    yield cache
    tier.gate.set()
    cache.close()


def finish(kept: KeptCache, fetch: Fetch) -> list[tuple[BlockId, bytes, str]]:
    """Everything that a fetch gives."""
    found, end = [], time.monotonic() + 10
    while not fetch.ended:
        assert time.monotonic() < end, "the fetch hangs"
        kept.wait([fetch], 0.1)
        while fetch.ready:
            one = kept.take(fetch)
            found.append((one.block, bytes(one.payload), one.tier))
    return found


def test_what_was_saved_is_fetched_in_order(kept: KeptCache, tier: MemoryTier) -> None:
    blocks = chain(50)
    for block in blocks:
        while not kept.has_room:
            time.sleep(0.001)
        kept.save(block, planes(block), 0.0)
    assert kept.flush(10)
    assert kept.counters.written[tier.name] == 50
    assert finish(kept, kept.fetch(blocks, 0)) == [(block, bytes(planes(block)), tier.name) for block in blocks]
    assert kept.counters.hits[tier.name] == 50


def test_a_fetch_ends_where_a_block_is_missing_and_says_why(kept: KeptCache) -> None:
    blocks = chain(3)
    for block in (blocks[0], blocks[2]):
        kept.save(block, planes(block), 0.0)
    assert kept.flush(10)
    kept.losses.add(blocks[1].name, Loss.EXPIRED)
    fetch = kept.fetch(blocks, 0)
    assert [block for block, _, _ in finish(kept, fetch)] == blocks[:1]
    assert fetch.loss is Loss.EXPIRED


@pytest.mark.parametrize("seed", range(200))
def test_a_tier_that_lies_is_found_out(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    rng, tier, blocks = random.Random(seed), MemoryTier(), chain(4)
    for block in blocks:
        tier.records[block.name] = header(block, planes(block)) + planes(block)
    victim = rng.randrange(4)
    record = bytearray(tier.records[blocks[victim].name])
    kind = seed % 5
    if kind == 0:
        record[rng.randrange(len(record))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del record[rng.randrange(len(record)) :]
    elif kind == 2:
        record += rng.randbytes(rng.randrange(1, 1000))
    elif kind == 3:
        record = bytearray(tier.records[blocks[(victim + 1) % 4].name])
    else:
        record = bytearray(rng.randbytes(rng.randrange(1000)))
    tier.records[blocks[victim].name] = bytes(record)
    kept = KeptCache([tier], PAYLOAD)
    with caplog.at_level(logging.WARNING, "kvist.cache"):
        fetch = kept.fetch(blocks, 0)
        assert finish(kept, fetch) == [(block, bytes(planes(block)), tier.name) for block in blocks[:victim]]
    expected = (Loss.CORRUPT, Loss.TRUNCATED, Loss.FOREIGN, Loss.VERSION)
    assert fetch.loss in expected
    assert sum(kept.counters.losses[loss.value] for loss in expected) == 1
    assert "a block is not used: " in caplog.text
    assert blocks[victim].name not in tier.records
    kept.close()


@pytest.mark.parametrize("failure", [TierError("it is gone"), RuntimeError("a defect"), MemoryError()])
def test_a_tier_that_fails_is_left_alone_for_a_while(
    failure: Exception, kept: KeptCache, tier: MemoryTier, caplog: pytest.LogCaptureFixture
) -> None:
    tier.knows, tier.failure = False, failure
    blocks = chain(2)
    with caplog.at_level(logging.WARNING, "kvist.cache"):
        assert finish(kept, kept.fetch(blocks, 0)) == []
        kept.save(blocks[0], planes(blocks[0]), 0.0)
        assert kept.flush(10)
    assert kept.counters.failures[tier.name, "read"] == 1
    assert kept.counters.failures[tier.name, "write"] == 1
    assert len(caplog.records) == 2
    assert not kept.has(blocks[0])  # it is not asked again
    asked = tier.asked
    assert finish(kept, kept.fetch(blocks, 0)) == []
    assert tier.asked == asked
    kept.save(blocks[1], planes(blocks[1]), 0.0)
    assert kept.flush(10)
    assert kept.losses.of(blocks[1].name) is Loss.UNWRITTEN


def test_a_slow_writer_takes_no_more_than_it_has_room_for(kept: KeptCache, tier: MemoryTier) -> None:
    tier.gate.clear()
    blocks = chain(10)
    taken = 0
    while kept.has_room:
        kept.save(blocks[taken], planes(blocks[taken]), 0.0)
        taken += 1
    assert taken == 4
    assert all(map(kept.is_kept, blocks[:4]))
    assert not kept.flush(0.05)
    tier.gate.set()
    assert kept.flush(10)
    assert kept.has_room


def test_a_fetch_can_be_cancelled_at_any_moment(kept: KeptCache, tier: MemoryTier) -> None:
    rng = random.Random(3)
    blocks = chain(30)
    for block in blocks:
        tier.records[block.name] = header(block, planes(block)) + planes(block)
    for trial in range(200):
        fetch = kept.fetch(blocks, 0)
        if trial % 2:
            kept.wait([fetch], rng.random() * 0.002)
        kept.cancel(fetch)
        kept.cancel(fetch)
        end = time.monotonic() + 10
        while not fetch.done:
            assert time.monotonic() < end
            time.sleep(0.0005)
        assert not fetch.ready
    assert len(finish(kept, kept.fetch(blocks, 0))) == 30


def test_two_fetches_take_turns(tier: MemoryTier) -> None:
    kept = KeptCache([tier], PAYLOAD)
    one, two = chain(20), chain(20, seed=1)
    for block in (*one, *two):
        tier.records[block.name] = header(block, planes(block)) + planes(block)
    tier.gate.clear()
    fetches = [kept.fetch(one, 0), kept.fetch(two, 0)]
    tier.gate.set()
    assert [len(finish(kept, fetch)) for fetch in fetches] == [20, 20]
    kept.close()


@pytest.mark.parametrize("writing", [False, True])
def test_it_closes_in_the_middle_of_anything(writing: bool, tier: MemoryTier) -> None:
    kept = KeptCache([tier], PAYLOAD)
    tier.gate.clear()
    blocks = chain(5)
    tier.knows = False
    kept.fetch(blocks, 0)
    if writing:
        for block in blocks:
            kept.save(block, planes(block), 0.0)
    threading.Timer(0.1, tier.gate.set).start()
    started = time.monotonic()
    kept.close()
    assert time.monotonic() - started < 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvist-")]


def test_the_farther_tier_serves_and_the_nearer_gets_a_copy() -> None:
    near, far = MemoryTier("near"), MemoryTier("far")
    kept = KeptCache([near, far], PAYLOAD)
    blocks = chain(3)
    for block in blocks:
        far.records[block.name] = header(block, planes(block)) + planes(block)
    near.records[blocks[1].name] = b"damaged"
    assert [tier for _, _, tier in finish(kept, kept.fetch(blocks, 0))] == ["far"] * 3
    assert kept.counters.losses[Loss.TRUNCATED.value] == 1
    assert kept.flush(10)
    assert near.records == far.records
    kept.close()


def test_what_was_used_is_pinned_behind(kept: KeptCache, tier: MemoryTier) -> None:
    kept.pin(["a", "b"], 5.0)
    assert kept.flush(10)
    assert tier.pins == [(["a", "b"], 5.0)]
