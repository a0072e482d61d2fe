"""Blocks on their way between the store's memory and the tiers behind it: written behind, read ahead, verified.

The engine's thread hands over copies of blocks and never waits for a tier; a thread for each tier writes them. One more
thread reads what sequences are about to need, checks every byte of it, and hands it over in order. Whatever goes wrong
with a tier is counted, told once in a while, and otherwise as if the tier had nothing."""

import contextlib
import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvist.cache.record import BadRecord, BlockId, Loss, header, read_payload, record_bytes
from kvist.cache.tier import MEMORY, Buffer, Tier, TierError

_log = logging.getLogger("kvist.cache")

STAGING = 128 << 20  # bytes that wait to be written to one tier, at most
READ, WRITE = ACTS = ("read", "write")  # what a tier may fail at
STALL = 5.0  # seconds after which a block that does not come is computed instead
_AHEAD = 32 << 20  # bytes that are read ahead for one sequence
_REMEMBERED = 1 << 16  # losses
_PINS = 1 << 10  # that wait while a tier is stuck; the oldest are forgotten, which only makes blocks seem older
_PAUSE = 10.0  # seconds in which a tier that failed is left alone
_QUIET = 30.0  # seconds between two lines in the log about one kind of failure


@dataclass(frozen=True)
class Fetched:
    """A block's planes, and the tier that had them."""

    block: BlockId
    payload: Buffer
    tier: str


class Fetch:
    """Blocks of one sequence, read in their order until one cannot be had. `ready` holds those that wait to be taken.

    `loss`: why it ended early, where that is known; valid once `done`, which is set last."""

    def __init__(self, blocks: Sequence[BlockId], start: int) -> None:
        self.blocks = blocks
        self.start = start
        self.ready: deque[Fetched] = deque()
        self.taken = 0
        self.cancelled = False
        self.done = False
        self.loss: Loss | None = None
        self.read = 0  # how many blocks have been read
        self.moved = time.monotonic()  # when one was last taken

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.done and not self.ready


@dataclass
class KeptCounters:
    """What was done since the start: of blocks. `hits` by tier, `failures` by tier and act, `losses` by tier and
    reason. Each is added to by one thread."""

    written: Counter[str] = field(default_factory=Counter)
    written_bytes: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    losses: Counter[tuple[str, Loss]] = field(default_factory=Counter)


class Losses:
    """Why blocks that were there once are gone: the last of them, by key. Any thread may ask and tell."""

    def __init__(self, counters: KeptCounters) -> None:
        self._counters = counters
        self._lock = threading.Lock()
        self._found: OrderedDict[str, Loss] = OrderedDict()

    def add(self, block: str, loss: Loss, tier: str) -> None:
        """`tier`: which one lost it, or the memory."""
        with self._lock:
            self._counters.losses[tier, loss] += 1
            self._found[block] = loss
            self._found.move_to_end(block)
            while len(self._found) > _REMEMBERED:
                self._found.popitem(last=False)

    def clear(self, block: str) -> None:
        """It is there again."""
        with self._lock:
            self._found.pop(block, None)

    def of(self, block: str) -> Loss | None:
        with self._lock:
            return self._found.get(block)


class KeptCache:
    """`tiers`: the nearest first; there may be none. `payload`: bytes of a block's planes. `staging`: of the blocks
    that wait to be written to one tier."""

    def __init__(self, tiers: Sequence[Tier], payload: int, staging: int = STAGING) -> None:
        self.tiers = tuple(tiers)
        # Other identities that something may be kept under which would be found here, were they not other ones.
        self.rivals: Sequence[bytes] = ()
        self.counters = KeptCounters()
        self.losses = Losses(self.counters)
        self._payload = payload
        self._ahead = max(2, _AHEAD // payload)
        self._health = {tier.name: _Health(tier.name, READ, self.counters) for tier in tiers}
        self._fetches: deque[Fetch] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._reading = 0.0  # since when the reader is reading a block; 0 while it is not
        self._reading_from = MEMORY  # the tier that was asked last
        self._writers = [_Writer(self, tier, self._health[tier.name], staging) for tier in tiers]
        self._reader = threading.Thread(target=self._read_all, name="kvist-read", daemon=True)
        if tiers:
            self._reader.start()

    @property
    def payload(self) -> int:
        """Bytes of a block's planes."""
        return self._payload

    def has(self, block: BlockId) -> bool:
        """Whether it may be worth to fetch the block. Quick: no tier is asked that would have to look around."""
        if self._reading and time.monotonic() - self._reading > STALL:
            return False  # the reader is stuck in a tier: whoever waited for it would wait in vain
        return any(tier.contains(block.name) is not False for tier in self._open_tiers())

    def is_kept(self, block: BlockId) -> bool:
        """Whether a tier is known to have the block, or is about to."""
        return any(tier.contains(block.name) for tier in self.tiers) or any(
            writer.is_queued(block) for writer in self._writers
        )

    @property
    def has_room(self) -> bool:
        """Whether one more block may be handed over for writing."""
        return all(writer.has_room for writer in self._writers)

    def save(self, block: BlockId, payload: Buffer, until: float) -> None:
        """Write a block behind. `payload` belongs to the cache from now on."""
        self.losses.clear(block.name)
        for writer in self._writers:
            writer.add(block, payload, until)

    def fetch(self, blocks: Sequence[BlockId], start: int) -> Fetch:
        """Begin to read these blocks, which follow each other in one sequence, the first being its block `start`."""
        fetch = Fetch(blocks, start)
        with self._wake:
            self._fetches.append(fetch)
            self._wake.notify_all()
        return fetch

    def take(self, fetch: Fetch) -> Fetched:
        """The next block of a fetch that has one ready."""
        found = fetch.ready.popleft()
        with self._wake:
            fetch.taken += 1
            fetch.moved = time.monotonic()
            self._wake.notify_all()
        return found

    def cancel(self, fetch: Fetch) -> None:
        """Nobody wants it any more. At any moment, any number of times."""
        with self._wake:
            fetch.cancelled = True
            fetch.ready.clear()
            self._wake.notify_all()

    def stalled(self, block: BlockId) -> None:
        """A block has not come in time: told as lost by the tier that is at work."""
        self.losses.add(block.name, Loss.UNREADABLE, self._reading_from)

    def wait(self, fetches: Sequence[Fetch], seconds: float) -> None:
        """Until one of them has something to take or has ended, but no longer than `seconds`."""
        with self._wake:
            self._wake.wait_for(lambda: any(fetch.ready or fetch.done for fetch in fetches), seconds)

    def pin(self, blocks: Sequence[str], until: float) -> None:
        """These blocks, by name, were used, and others go first until `until`; done behind, by the writers."""
        for writer in self._writers:
            writer.add_pin(blocks, until)

    def flush(self, seconds: float) -> bool:
        """Wait until everything that was handed over is written, but no longer than `seconds`; whether it is."""
        end = time.monotonic() + seconds
        written = [writer.flush(max(0.0, end - time.monotonic())) for writer in self._writers]
        return all(written)

    def close(self) -> None:
        """End the threads. What was not written by then is not written. One that is stuck in a tier is left behind."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for writer in self._writers:
            writer.close()
        if self.tiers:
            self._reader.join(STALL)

    # ---- the reader's thread

    def _open_tiers(self) -> list[Tier]:
        return [tier for tier in self.tiers if self._health[tier.name].is_well]

    def _read_all(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._next() is not None)
                if self._closed:
                    return
                fetch = self._next()
                assert fetch is not None
                self._fetches.remove(fetch)
                self._fetches.append(fetch)  # in turns, a block of each
            self._reading = time.monotonic()
            found = None if fetch.cancelled else self._read(fetch.blocks[fetch.read])
            self._reading = 0.0
            with self._wake:
                fetch.read += 1
                if found is not None and not fetch.cancelled:
                    fetch.ready.append(found)
                elif found is None:
                    fetch.loss = self.losses.of(fetch.blocks[fetch.read - 1].name)
                if found is None or fetch.cancelled or fetch.read == len(fetch.blocks):
                    fetch.done = True
                    self._fetches.remove(fetch)
                self._wake.notify_all()

    def _next(self) -> Fetch | None:
        """The fetch whose turn it is, of those that are not far enough ahead."""
        return next((f for f in self._fetches if f.cancelled or f.read - f.taken < self._ahead), None)

    def _read(self, block: BlockId) -> Fetched | None:
        """A block from the nearest tier that has it, whole and right."""
        size = record_bytes(len(block.tokens), self._payload)
        for place, tier in enumerate(self.tiers):
            health = self._health[tier.name]
            if not health.is_well:
                continue
            self._reading_from = tier.name
            try:
                payload = self._read_from(tier, block, size)
            except BadRecord as error:
                health.complain(f"a block is not used: {error}")
                self.losses.add(block.name, error.loss, tier.name)
                continue
            except Exception as error:  # whatever a tier does, what it has is computed again
                health.failed(error)
                self.losses.add(block.name, Loss.UNREADABLE, tier.name)
                continue
            if payload is None:
                continue
            self.counters.hits[tier.name] += 1
            for other, writer in enumerate(self._writers):  # the other tiers get it, too, if they lack it
                if other != place and writer.has_time:
                    writer.add(block, payload, time.time())
            return Fetched(block, payload, tier.name)
        return None

    def _read_from(self, tier: Tier, block: BlockId, size: int) -> Buffer | None:
        """The planes of a block from one tier; None where it has none. What is no such block is removed there."""
        if tier.contains(block.name) is False or (record := tier.get(block.name, size)) is None:
            return None
        try:
            return read_payload(record, block, self._payload)
        except BadRecord:
            with contextlib.suppress(Exception):  # why it is of no use matters more
                tier.remove(block.name)
            raise


class _Health:
    """Whether a tier is worth asking. One that failed is left alone for a while."""

    def __init__(self, name: str, act: str, counters: KeptCounters) -> None:
        self._name = name
        self._act = act
        self._counters = counters
        self._until = 0.0
        self._told = -_QUIET
        self._unsaid = 0

    @property
    def is_well(self) -> bool:
        return time.monotonic() >= self._until

    def failed(self, error: Exception) -> None:
        """It could not do what was asked."""
        self._until = time.monotonic() + _PAUSE
        self._counters.failures[self._name, self._act] += 1
        self.complain(str(error) if isinstance(error, TierError) else f"{type(error).__name__}: {error}")

    def complain(self, message: str) -> None:
        """Say it in the log, not too often."""
        now = time.monotonic()
        if now - self._told < _QUIET:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} more such lines were left out)" if self._unsaid else ""
        _log.warning("kept cache, %s: %s%s", self._name, message, more)
        self._told, self._unsaid = now, 0


class _Writer:
    """Writes blocks to one tier, on a thread of its own."""

    def __init__(self, kept: KeptCache, tier: Tier, health: _Health, staging: int) -> None:
        self._kept = kept
        self._tier = tier
        self._health = health
        self._most = max(2, staging // kept.payload)
        self._queue: OrderedDict[str, tuple[BlockId, Buffer, float]] = OrderedDict()
        self._pins: deque[tuple[Sequence[str], float]] = deque(maxlen=_PINS)
        self._busy = False
        self._closed = False
        self._wake = threading.Condition()
        self._write_health = _Health(tier.name, WRITE, kept.counters)
        self._thread = threading.Thread(target=self._run, name=f"kvist-write-{tier.name}", daemon=True)
        self._thread.start()

    @property
    def has_room(self) -> bool:
        return len(self._queue) < self._most

    @property
    def has_time(self) -> bool:
        """Whether copies of what another tier has may be handed over, too."""
        return self.has_room and self._write_health.is_well

    def is_queued(self, block: BlockId) -> bool:
        return block.name in self._queue

    def add(self, block: BlockId, payload: Buffer, until: float) -> None:
        with self._wake:
            self._queue[block.name] = block, payload, until
            self._wake.notify_all()

    def add_pin(self, blocks: Sequence[str], until: float) -> None:
        with self._wake:
            for place, block in enumerate(blocks):
                later = until + (len(blocks) - place) * 1e-6  # as tiers do, so that a block goes before its parent
                if (todo := self._queue.get(block)) is not None and todo[2] < later:
                    self._queue[block] = todo[0], todo[1], later
            self._pins.append((blocks, until))
            self._wake.notify_all()

    def flush(self, seconds: float) -> bool:
        with self._wake:
            return self._wake.wait_for(lambda: not (self._queue or self._pins or self._busy), seconds)

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join(STALL)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._queue or self._pins)
                if self._closed:
                    return
                self._busy = True
                # What is in use is told first: what is written next must not push out the blocks that it stands behind.
                pins = self._pins.popleft() if self._pins else None
                # A block stays in the queue until it is written, so that it is always found in one of the two.
                todo = next(iter(self._queue.values()), None) if pins is None else None
            try:
                if todo is not None:
                    self._write(*todo)
                elif pins is not None and self._write_health.is_well:
                    self._tier.pin(*pins)
            except Exception as error:  # whatever a tier does, the others go on
                self._write_health.failed(error)
                if todo is not None:
                    self._kept.losses.add(todo[0].name, Loss.UNWRITTEN, self._tier.name)
            with self._wake:
                self._busy = False
                if todo is not None and self._queue.get(todo[0].name) is todo:
                    del self._queue[todo[0].name]
                self._wake.notify_all()

    def _write(self, block: BlockId, payload: Buffer, until: float) -> None:
        counters, name = self._kept.counters, self._tier.name
        if not self._write_health.is_well:
            self._kept.losses.add(block.name, Loss.UNWRITTEN, name)
            return
        if self._tier.probe(block.name):
            self._tier.pin([block.name], until)
            return
        head = header(block, payload)
        if self._tier.put(block.name, (head, payload), until):
            counters.written[name] += 1
            counters.written_bytes[name] += len(head) + memoryview(payload).nbytes
        else:
            self._kept.losses.add(block.name, Loss.UNWRITTEN, name)
