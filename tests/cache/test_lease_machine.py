"""Leases over a pool, driven at random against a plain model that stores the tokens themselves.

The store is a list of token lists, one per block. Only what a manager says is done to it: its copies are applied,
and the reserved positions are written. After every step each lease must read back exactly its own tokens, so a
block shared wrongly, a copy left out or a write into another's block shows as a wrong token.
"""

from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvist.base.errors import OutOfBlocks
from kvist.base.events import CacheEvent, Committed, Released, Reserved, RolledBack
from kvist.cache.manager import CacheManager, Copy, Lease
from kvist.cache.pool import BlockPool

BLOCK_SIZE = 4
CAPACITY = 14
MOST_LEASES = 6
ONE = st.integers(0, 2**16)

SETTINGS = settings(
    max_examples=300,
    stateful_step_count=60,
    suppress_health_check=list(HealthCheck),
)


class LeaseMachine(RuleBasedStateMachine):
    """`expected`: what each live lease has committed; `pending`: what it wrote into its reservation."""

    def __init__(self, kind: type[CacheManager], seen: list[str]) -> None:
        super().__init__()
        self.pool = BlockPool(CAPACITY)
        self.events: list[CacheEvent] = []
        self.manager = kind(self.pool, BLOCK_SIZE, self.events.append)
        self.seen = seen
        self.memory: list[list[int]] = [[-1] * BLOCK_SIZE for _ in range(CAPACITY)]
        self.leases: list[Lease] = []
        self.expected: dict[int, list[int]] = {}
        self.pending: dict[int, list[int]] = {}
        self.next_token = 0

    @precondition(lambda self: len(self.leases) < MOST_LEASES)
    @rule()
    def open(self) -> None:
        self._adopt(self.manager.open(), [])
        self.seen.append("open")

    @precondition(lambda self: self._at_rest())
    @rule(one=ONE, tokens=st.integers(1, 11))
    def reserve(self, one: int, tokens: int) -> None:
        lease = _pick(one, self._at_rest())
        needed, free = self._blocks_needed(lease, tokens), self.pool.free
        before = self._state()
        if needed > free:
            with pytest.raises(OutOfBlocks) as refusal:
                self.manager.reserve(lease, tokens)
            assert (refusal.value.needed, refusal.value.free) == (needed, free)
            assert self._state() == before
            self.seen.append("refused")
            return
        copies = self.manager.reserve(lease, tokens)
        assert self.pool.free == free - needed
        for copy in copies:
            self.memory[copy.target] = self.memory[copy.source].copy()
        self.pending[lease.id] = [self._write(lease, lease.length + index) for index in range(tokens)]
        assert self.events[-1] == Reserved(lease.id, tokens, needed, len(copies))
        self.seen.append("copied" if copies else "reserve")

    @precondition(lambda self: self._in_a_step())
    @rule(one=ONE, part=st.integers(0, 11))
    def commit(self, one: int, part: int) -> None:
        lease = _pick(one, self._in_a_step())
        tokens = part % (lease.reserved + 1)
        self.manager.commit(lease, tokens)
        self.expected[lease.id] += self.pending.pop(lease.id)[:tokens]
        assert self.events[-1] == Committed(lease.id, tokens, len(self.expected[lease.id]))
        self.seen.append("commit")

    @precondition(lambda self: self._at_rest())
    @rule(one=ONE, tokens=st.integers(1, 11))
    def append(self, one: int, tokens: int) -> None:
        """A whole step, which is what a lease mostly sees."""
        self.reserve(one, tokens)
        for lease in self._in_a_step():
            self.commit(self._in_a_step().index(lease), lease.reserved)

    @precondition(lambda self: self.leases)
    @rule(one=ONE, cut=st.integers(0, 9))
    def rollback(self, one: int, cut: int) -> None:
        lease = _pick(one, self.leases)
        length = max(0, lease.length - cut)
        before = len(lease.table)
        self.manager.rollback(lease, length)
        self.pending.pop(lease.id, None)
        del self.expected[lease.id][length:]
        assert self.events[-1] == RolledBack(lease.id, length, before - len(lease.table))
        self.seen.append("rollback")

    @precondition(lambda self: self._at_rest() and len(self.leases) < MOST_LEASES)
    @rule(one=ONE)
    def fork(self, one: int) -> None:
        lease = _pick(one, self._at_rest())
        used = self.pool.used
        self._adopt(self.manager.fork(lease), self.expected[lease.id].copy())
        assert self.pool.used == used, "a fork takes no block"
        self.seen.append("fork")

    @precondition(lambda self: len(self.leases) > MOST_LEASES // 2)
    @rule(one=ONE)
    def release(self, one: int) -> None:
        lease = _pick(one, self.leases)
        held = len(lease.table)
        self.manager.release(lease)
        self.manager.release(lease)
        assert self.events[-1] == Released(lease.id, held)
        self.leases.remove(lease)
        del self.expected[lease.id]
        self.pending.pop(lease.id, None)
        self.seen.append("release")

    @invariant()
    def each_lease_reads_back_its_own_tokens(self) -> None:
        self.manager.check()
        assert list(self.manager.leases) == self.leases
        for lease in self.leases:
            read = [self._read(lease, position) for position in range(lease.length + lease.reserved)]
            assert read == self.expected[lease.id] + self.pending.get(lease.id, [])
        assert self.pool.used == len({block for lease in self.leases for block in lease.table})

    def teardown(self) -> None:
        for lease in self.leases:
            self.manager.release(lease)
        self.manager.check()
        assert self.pool.free == CAPACITY

    def _adopt(self, lease: Lease, tokens: list[int]) -> None:
        self.leases.append(lease)
        self.expected[lease.id] = tokens

    def _at_rest(self) -> list[Lease]:
        return [lease for lease in self.leases if not lease.reserved]

    def _in_a_step(self) -> list[Lease]:
        return [lease for lease in self.leases if lease.reserved]

    def _blocks_needed(self, lease: Lease, tokens: int) -> int:
        """Counted position by position: each block to be written that is missing, or that another lease holds."""
        written = {position // BLOCK_SIZE for position in range(lease.length, lease.length + tokens)}
        others = {block for other in self.leases if other is not lease for block in other.table}
        return sum(index >= len(lease.table) or lease.table[index] in others for index in written)

    def _state(self) -> object:
        leases = [(lease.id, lease.table.copy(), lease.length, lease.reserved) for lease in self.leases]
        return leases, self.pool.free, [self.pool.count(block) for block in range(CAPACITY)], len(self.events)

    def _write(self, lease: Lease, position: int) -> int:
        token = self.next_token = self.next_token + 1
        self.memory[lease.table[position // BLOCK_SIZE]][position % BLOCK_SIZE] = token
        return token

    def _read(self, lease: Lease, position: int) -> int:
        return self.memory[lease.table[position // BLOCK_SIZE]][position % BLOCK_SIZE]


def _pick(one: int, leases: list[Lease]) -> Lease:
    return leases[one % len(leases)]


def drive(manager: type[CacheManager], chosen: settings) -> list[str]:
    """Run the machine over managers of that class; returns what it did, step by step."""
    seen: list[str] = []
    run_state_machine_as_test(lambda: LeaseMachine(manager, seen), settings=chosen)
    return seen


def test_every_lease_reads_back_its_own_tokens() -> None:
    seen = drive(CacheManager, SETTINGS)
    assert len(seen) > 5_000
    counted = Counter(seen)
    assert min(counted[step] for step in ("copied", "refused", "commit", "rollback", "fork", "release")) > 50, counted


class SkipsACopy(CacheManager):
    """Its numbers are all right: only the tokens that are read back tell."""

    def reserve(self, lease: Lease, tokens: int) -> list[Copy]:
        return [Copy(copy.target, copy.target) for copy in super().reserve(lease, tokens)]


class WritesIntoSharedBlocks(CacheManager):
    def reserve(self, lease: Lease, tokens: int) -> list[Copy]:
        first, end = len(lease.table), self.blocks_for(lease.length + tokens)
        lease.table.extend(self.pool.take(max(0, end - first)))
        lease.reserved = tokens
        return []


class ForksWithoutCounting(CacheManager):
    def fork(self, lease: Lease) -> Lease:
        twin = self.open()
        twin.table, twin.length = lease.table.copy(), lease.length
        return twin


class KeepsWhatWasNotCommitted(CacheManager):
    def commit(self, lease: Lease, tokens: int) -> None:
        lease.length, lease.reserved = lease.length + tokens, 0


class RollsBackOneTokenLess(CacheManager):
    def rollback(self, lease: Lease, length: int) -> None:
        super().rollback(lease, min(length + 1, lease.length))


class LeaksOnRelease(CacheManager):
    def release(self, lease: Lease) -> None:
        lease.table = lease.table[:-1]
        super().release(lease)


@pytest.mark.parametrize(
    "broken",
    [
        SkipsACopy,
        WritesIntoSharedBlocks,
        ForksWithoutCounting,
        KeepsWhatWasNotCommitted,
        RollsBackOneTokenLess,
        LeaksOnRelease,
    ],
)
def test_the_machine_notices_a_broken_manager(broken: type[CacheManager]) -> None:
    unshrunk = settings(SETTINGS, phases=[Phase.generate], print_blob=False)
    with pytest.raises((AssertionError, ExceptionGroup)):
        drive(broken, unshrunk)
