"""Blocks on their way to tiers that are slow, that fail, that lie: nothing hangs, nothing wrong comes back."""

import itertools
import logging
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvist.cache.disk import DiskTier
from kvist.cache.kept import Fetch, KeptCache
from kvist.cache.keys import root_key
from kvist.cache.record import BlockId, Loss, header, record_bytes
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
        self.order: list[str] = []  # what was read

    def contains(self, block: str) -> bool | None:
        return block in self.records if self.knows else None

    def probe(self, block: str) -> bool:
        return bool(self.contains(block)) or (not self.knows and block in self.records)

    def get(self, block: str, size: int) -> Buffer | None:
        self.asked += 1
        self.order.append(block)
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
    kept.losses.add(blocks[1].name, Loss.EXPIRED, "memory-tier")
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
    assert sum(kept.counters.losses["memory-tier", loss] for loss in expected) == 1
    assert "a block is not used: " in caplog.text
    assert blocks[victim].name not in tier.records
    kept.close()


def test_a_cache_that_checks_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.cache.kept.read_payload", lambda record, block, payload: record[-payload:])
    tier, block = MemoryTier(), chain(1)[0]
    tier.records[block.name] = header(block, planes(block)) + bytes(PAYLOAD)
    kept = KeptCache([tier], PAYLOAD)
    assert finish(kept, kept.fetch([block], 0)) != [(block, bytes(planes(block)), tier.name)]
    assert kept.counters.hits[tier.name] == 1
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
    # The second may have come when a block or two of the first had been read.
    firsts = [name in {block.name for block in one} for name in tier.order]
    assert all(a != b for a, b in itertools.pairwise(firsts[2:37]))


def test_no_more_is_read_ahead_than_is_taken(kept: KeptCache, tier: MemoryTier) -> None:
    kept._ahead = 3
    blocks = chain(10)
    for block in blocks:
        tier.records[block.name] = header(block, planes(block)) + planes(block)
    fetch = kept.fetch(blocks, 0)
    end = time.monotonic() + 10
    while len(fetch.ready) < 3:
        assert time.monotonic() < end
        time.sleep(0.001)
    time.sleep(0.05)
    assert tier.asked == 3
    kept.take(fetch)
    other = kept.fetch(blocks[:1], 0)  # one that waits to be taken keeps nobody waiting
    assert len(finish(kept, other)) == 1
    assert len(finish(kept, fetch)) == 9


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
    assert kept.counters.losses == {("near", Loss.TRUNCATED): 1}
    assert kept.flush(10)
    assert near.records == far.records
    kept.close()


@pytest.mark.parametrize("knows", [True, False])
def test_what_the_nearer_tier_had_is_pushed_to_the_farther_that_lacks_it_and_only_then(knows: bool) -> None:
    near, far = MemoryTier("near"), MemoryTier("far")
    far.knows = knows  # a store that machines share knows nothing without asking
    kept = KeptCache([near, far], PAYLOAD)
    blocks = chain(4)
    for block in blocks:
        near.records[block.name] = header(block, planes(block)) + planes(block)
    far.records[blocks[2].name] = near.records[blocks[2].name]
    for _ in range(2):
        assert [tier for _, _, tier in finish(kept, kept.fetch(blocks, 0))] == ["near"] * 4
        assert kept.flush(10)
        assert far.records == near.records
        assert kept.counters.written == {"far": 3}
    kept.close()


def test_a_farther_tier_that_fails_loses_nothing_of_what_the_nearer_has() -> None:
    near, far = MemoryTier("near"), MemoryTier("far")
    kept = KeptCache([near, far], PAYLOAD)
    blocks = chain(4)
    for block in blocks:
        near.records[block.name] = header(block, planes(block)) + planes(block)
    kept._writers[1]._write_health.failed(TierError("it is gone"))
    assert [tier for _, _, tier in finish(kept, kept.fetch(blocks, 0))] == ["near"] * 4
    assert kept.flush(10)
    assert not kept.counters.losses
    kept.close()


def test_what_was_used_is_pinned_behind(kept: KeptCache, tier: MemoryTier) -> None:
    kept.pin(["a", "b"], 5.0)
    assert kept.flush(10)
    assert tier.pins == [(["a", "b"], 5.0)]


def test_what_is_in_use_is_told_before_more_is_written(tmp_path: Path) -> None:
    """Or the block that a sequence stands behind, not used for long, would make room for the next of the sequence."""
    size = record_bytes(SIZE, PAYLOAD)
    disk, blocks = DiskTier(tmp_path, 10 * size), chain(10)
    for place, block in enumerate(blocks):
        assert disk.put(block.name, (header(block, planes(block)), planes(block)), float(place))
    kept, gate, put = KeptCache([disk], PAYLOAD), threading.Event(), disk.put

    def slow(block: str, record: Sequence[Buffer], until: float) -> bool:
        done = put(block, record, until)
        gate.wait(10)
        return done

    disk.put = slow  # type: ignore[method-assign]
    more = chain(3, seed=1)
    kept.save(more[0], planes(more[0]), time.time())
    while not disk.contains(more[0].name):
        time.sleep(0.001)
    kept.save(more[1], planes(more[1]), time.time())
    kept.pin([blocks[1].name], time.time())
    gate.set()
    assert kept.flush(10)
    assert [disk.contains(block.name) for block in blocks[:4]] == [False, True, False, True]
    kept.close()
    disk.close()


def test_what_waits_to_be_written_is_held_as_long_as_it_was_asked_for_last(tmp_path: Path) -> None:
    disk, blocks, now = DiskTier(tmp_path, 1 << 20), chain(3), time.time()
    kept, gate, put = KeptCache([disk], PAYLOAD), threading.Event(), disk.put
    disk.put = lambda *rest: gate.wait(10) and put(*rest)  # type: ignore[method-assign]
    for block in blocks:
        kept.save(block, planes(block), now)
    kept.pin([block.name for block in blocks], now + 3600)
    kept.pin([block.name for block in blocks], now + 60)
    gate.set()
    assert kept.flush(10)
    held = [disk._entries[block.name].until for block in blocks]
    assert all(until > now + 3599 for until in held)
    assert held == sorted(held, reverse=True)
    assert kept.counters.written["disk"] == 3
    kept.close()
    disk.close()


def test_what_a_stuck_tier_is_not_told_does_not_pile_up(tier: MemoryTier) -> None:
    kept, block = KeptCache([tier], PAYLOAD), chain(1)[0]
    tier.gate.clear()
    kept.save(block, planes(block), 0.0)
    while not kept._writers[0]._busy:
        time.sleep(0.001)
    for place in range(5000):
        kept.pin([f"{place}"], 0.0)
    tier.gate.set()
    assert kept.flush(10)
    assert len(tier.pins) == 1024
    assert tier.pins[-1][0] == ["4999"]
    kept.close()


@pytest.mark.parametrize("act", ["contains", "put", "pin"])
@pytest.mark.parametrize("failure", [TierError("it is gone"), ValueError("a defect"), OSError("the cable")])
def test_whatever_a_tier_raises_while_it_is_written_is_counted_and_told(
    act: str, failure: Exception, tier: MemoryTier, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*rest: object) -> None:
        raise failure

    setattr(tier, act, fail)
    kept, blocks = KeptCache([tier], PAYLOAD), chain(3)
    with caplog.at_level(logging.WARNING, "kvist.cache"):
        if act == "pin":
            for _ in range(5):
                kept.pin(["a"], 0.0)
        for block in blocks:
            kept.save(block, planes(block), 0.0)
        assert kept.flush(10)
    assert kept.counters.failures[tier.name, "write"] == 1  # and then it is left alone
    assert kept.counters.losses["memory-tier", Loss.UNWRITTEN] == 3
    assert all(kept.losses.of(block.name) is Loss.UNWRITTEN for block in blocks)
    assert len(caplog.records) == 1
    assert str(failure) in caplog.text
    kept.close()


def test_why_a_block_is_of_no_use_is_told_even_where_it_cannot_be_removed(kept: KeptCache, tier: MemoryTier) -> None:
    def fail(block: str) -> None:
        raise TierError("read-only")

    tier.remove = fail  # type: ignore[method-assign]
    block = chain(1)[0]
    tier.records[block.name] = header(block, planes(block)) + bytes(PAYLOAD)
    fetch = kept.fetch([block], 0)
    assert finish(kept, fetch) == []
    assert fetch.loss is Loss.CORRUPT
    assert kept.counters.losses == {("memory-tier", Loss.CORRUPT): 1}
    assert not kept.counters.failures


@pytest.mark.parametrize("act", ["get", "put", "pin", "contains"])
def test_a_tier_that_hangs_for_good_does_not_keep_it_from_closing(
    act: str, tier: MemoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvist.cache.kept.STALL", 0.1)
    gate = threading.Event()

    def hang(*rest: object) -> None:
        gate.wait(20)

    setattr(tier, act, hang)
    kept, blocks = KeptCache([tier], PAYLOAD), chain(2)
    tier.records[blocks[0].name] = header(blocks[0], planes(blocks[0])) + planes(blocks[0])
    if act == "get":
        kept.fetch(blocks, 0)
    elif act == "pin":
        kept.pin(["a"], 0.0)
    else:
        kept.save(blocks[1], planes(blocks[1]), 0.0)
    time.sleep(0.05)
    started = time.monotonic()
    assert kept.flush(0.05) == (act == "get")
    kept.close()
    assert time.monotonic() - started < 3
    assert kept.flush(0.05) == (act == "get")
    gate.set()
    end = time.monotonic() + 10
    while [thread for thread in threading.enumerate() if thread.name.startswith("kvist-")]:
        assert time.monotonic() < end, "a thread stays"
        time.sleep(0.001)


class Whims(MemoryTier):
    """Slow, failing and lying at random."""

    def __init__(self, name: str, rng: random.Random) -> None:
        super().__init__(name)
        self.rng = rng

    def _whim(self) -> None:
        if self.rng.random() < 0.2:
            time.sleep(self.rng.random() * 0.0005)
        if self.rng.random() < 0.1:
            raise self.rng.choice([TierError("it is gone"), RuntimeError("a defect")])

    def contains(self, block: str) -> bool | None:
        return self.rng.choice([None, super().contains(block)])

    def get(self, block: str, size: int) -> Buffer | None:
        self._whim()
        record = super().get(block, size)
        if record is not None and self.rng.random() < 0.2:
            damaged = bytearray(record)
            damaged[self.rng.randrange(len(damaged))] ^= 1 << self.rng.randrange(8)
            return damaged[: self.rng.randrange(len(damaged))] if self.rng.random() < 0.3 else damaged
        return record

    def put(self, block: str, record: Sequence[Buffer], until: float) -> bool:
        self._whim()
        return self.rng.random() < 0.9 and super().put(block, record, until)

    def pin(self, blocks: Sequence[str], until: float) -> None:
        self._whim()


@pytest.mark.parametrize("part", range(4))
def test_over_tiers_with_whims_all_is_accounted_for_and_right(
    part: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred trials each. What was handed over is written or lost, what comes back is the beginning of what was
    asked for, and nothing hangs."""
    hits = losses = failures = 0
    for seed in range(part * 100, part * 100 + 100):
        rng = random.Random(seed)
        monkeypatch.setattr("kvist.cache.kept._PAUSE", rng.choice([0.0, 0.002]))
        tiers = [Whims(name, random.Random(seed)) for name in ("near", "far")[: rng.randint(1, 2)]]
        kept, chains, saved = KeptCache(tiers, PAYLOAD, staging=6 * PAYLOAD), [chain(8, one) for one in range(3)], 0
        for tier, block in itertools.product(tiers, itertools.chain(*chains)):
            if rng.random() < 0.8:
                tier.records[block.name] = header(block, planes(block)) + planes(block)
        before = [set(tier.records) for tier in tiers]
        fetches, given = list[tuple[Fetch, list[BlockId]]](), list[tuple[BlockId, Buffer]]()
        for _ in range(30):
            blocks, act = rng.choice(chains), rng.randrange(5)
            if act < 2 and kept.has_room:
                block = rng.choice(blocks)
                saved += not any(writer.is_queued(block) for writer in kept._writers)
                kept.save(block, planes(block), 0.0)
            elif act == 2:
                fetches.append((kept.fetch(blocks, 0), blocks))
            elif act == 3:
                kept.pin([block.name for block in blocks], 0.0)
            elif fetches:
                fetch, blocks = rng.choice(fetches)
                given += [(one.block, one.payload) for one in (kept.take(fetch) for _ in list(fetch.ready)[:2])]
                if rng.random() < 0.3:
                    kept.cancel(fetch)
        for fetch, blocks in fetches:
            if not fetch.cancelled:
                taken = fetch.taken
                rest = finish(kept, fetch)
                assert [block for block, _, _ in rest] == blocks[taken : taken + len(rest)]
                given += [(block, payload) for block, payload, _ in rest]
        assert all(bytes(payload) == planes(block) for block, payload in given)
        assert kept.flush(10)
        counted, new = kept.counters, [set(tier.records) - old for tier, old in zip(tiers, before, strict=True)]
        assert sum(counted.written.values()) >= sum(map(len, new))
        # Saved twice while it waits, it is written once; what one tier gave is written to the other as well.
        assert sum(counted.losses[tier.name, Loss.UNWRITTEN] for tier in tiers) <= len(tiers) * saved + sum(
            counted.hits.values()
        )
        hits, losses = hits + sum(counted.hits.values()), losses + sum(counted.losses.values())
        failures += sum(counted.failures.values())
        kept.close()
    assert hits > 300
    assert losses > 300
    assert failures > 100
    assert caplog.records
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvist-")]
