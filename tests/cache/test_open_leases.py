"""Leases over a pool with open blocks, driven at random against a plain model that stores the tokens themselves.

What a lossy cache does to a block is imitated by a mark: a token that was coded reads back as a coded one. A lease must
read back its full blocks coded and its partly filled one as written; each block must have been coded exactly once since
it was last filled, from exactly the tokens of the lease that filled it.
"""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvist.base.errors import InvariantError, OutOfBlocks
from kvist.cache.manager import CacheManager, Copy, Lease
from kvist.cache.pool import BlockPool

SIZE = 4
CAPACITY = 16
OPEN = 7
MOST_LEASES = 5
ONE = st.integers(0, 2**16)

SETTINGS = settings(max_examples=300, stateful_step_count=60, suppress_health_check=list(HealthCheck))


@dataclass(frozen=True)
class Coded:
    token: int


class OpenLeaseMachine(RuleBasedStateMachine):
    """`expected`: the tokens each live lease has committed; `pending`: those it wrote into its reservation."""

    def __init__(self, kind: type[CacheManager], seen: list[str]) -> None:
        super().__init__()
        self.pool, self.open_pool = BlockPool(CAPACITY), BlockPool(OPEN)
        self.manager = kind(self.pool, SIZE, open_pool=self.open_pool)
        self.seen = seen
        self.coded: list[list[Coded | None]] = [[None] * SIZE for _ in range(CAPACITY)]
        self.open: list[list[int]] = [[-1] * SIZE for _ in range(OPEN)]
        self.leases: list[Lease] = []
        self.expected: dict[int, list[int]] = {}
        self.pending: dict[int, list[int]] = {}
        self.next_token = 0

    @precondition(lambda self: len(self.leases) < MOST_LEASES)
    @rule()
    def begin(self) -> None:
        lease = self.manager.open()
        self.leases.append(lease)
        self.expected[lease.id] = []

    @precondition(lambda self: self._at_rest())
    @rule(one=ONE, tokens=st.integers(1, 14))
    def reserve(self, one: int, tokens: int) -> None:
        lease = _pick(one, self._at_rest())
        before = self._state()
        try:
            copies = self.manager.reserve(lease, tokens)
        except OutOfBlocks:
            assert self._state() == before
            self.seen.append("refused")
            return
        for copy in copies:
            if copy.open:
                self.open[copy.target] = self.open[copy.source].copy()
                self.seen.append("copied")
        self.pending[lease.id] = self._step(lease, tokens)
        if len(set(lease.open)) > 1:
            self.seen.append("across blocks")

    @precondition(lambda self: self._in_a_step())
    @rule(one=ONE, part=st.integers(0, 14))
    def commit(self, one: int, part: int) -> None:
        """All, or a part that ends in a block that is still open, or at the end of a block."""
        lease = _pick(one, self._in_a_step())
        tokens = part % (lease.reserved + 1)
        end = lease.length + tokens
        if end % SIZE and end // SIZE not in lease.open:
            tokens = lease.reserved
        self.manager.commit(lease, tokens)
        self.expected[lease.id] += self.pending.pop(lease.id)[:tokens]
        self.seen.append("commit")

    @precondition(lambda self: self._at_rest())
    @rule(one=ONE, tokens=st.integers(1, 9))
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
        still_open = length % SIZE == 0 or length // SIZE in lease.open
        self.manager.rollback(lease, length)
        assert lease.length == (length if still_open else length // SIZE * SIZE)
        self.pending.pop(lease.id, None)
        del self.expected[lease.id][lease.length :]
        self.seen.append("rollback" if still_open else "cut before a coded block")

    @precondition(lambda self: self._at_rest() and len(self.leases) < MOST_LEASES)
    @rule(one=ONE)
    def fork(self, one: int) -> None:
        lease = _pick(one, self._at_rest())
        twin = self.manager.fork(lease)
        self.leases.append(twin)
        self.expected[twin.id] = self.expected[lease.id].copy()
        self.seen.append("fork")

    @precondition(lambda self: len(self.leases) > MOST_LEASES // 2)
    @rule(one=ONE)
    def release(self, one: int) -> None:
        lease = _pick(one, self.leases)
        self.manager.release(lease)
        self.leases.remove(lease)
        del self.expected[lease.id]
        self.pending.pop(lease.id, None)

    @invariant()
    def each_lease_reads_back_its_own_tokens(self) -> None:
        self.manager.check()
        for lease in self.leases:
            tokens = self.expected[lease.id] + self.pending.get(lease.id, [])
            whole = lease.length // SIZE * SIZE
            for position, token in enumerate(tokens):
                block, within = divmod(position, SIZE)
                if position < whole:
                    assert self.coded[lease.table[block]][within] == Coded(token)
                elif block in lease.open:
                    assert self.open[lease.open[block]][within] == token

    def teardown(self) -> None:
        for lease in self.leases:
            self.manager.release(lease)
        self.manager.check()
        assert (self.pool.free, self.open_pool.free) == (CAPACITY, OPEN)

    def _step(self, lease: Lease, tokens: int) -> list[int]:
        """Write as a step does: into open blocks, and past them; what is then full is coded."""
        written = []
        passing: dict[int, list[int]] = {}
        for position in range(lease.length, lease.length + tokens):
            block, within = divmod(position, SIZE)
            self.next_token += 1
            written.append(self.next_token)
            held = self.open[lease.open[block]] if block in lease.open else passing.setdefault(block, [-1] * SIZE)
            held[within] = self.next_token
            if within == SIZE - 1:
                self.coded[lease.table[block]] = [Coded(token) for token in held]
        assert all(-1 not in block for block in passing.values()), "a block that is not filled whole was not opened"
        return written

    def _at_rest(self) -> list[Lease]:
        return [lease for lease in self.leases if not lease.reserved]

    def _in_a_step(self) -> list[Lease]:
        return [lease for lease in self.leases if lease.reserved]

    def _state(self) -> object:
        leases = [(lease.table.copy(), lease.length, lease.reserved, lease.open.copy()) for lease in self.leases]
        counts = [[pool.count(block) for block in range(pool.capacity)] for pool in (self.pool, self.open_pool)]
        return leases, counts


def _pick(one: int, leases: list[Lease]) -> Lease:
    return leases[one % len(leases)]


def drive(manager: type[CacheManager], chosen: settings) -> list[str]:
    seen: list[str] = []
    run_state_machine_as_test(lambda: OpenLeaseMachine(manager, seen), settings=chosen)
    return seen


def test_every_lease_reads_back_its_own_tokens() -> None:
    counted = Counter(drive(CacheManager, SETTINGS))
    needed = ("refused", "copied", "across blocks", "commit", "rollback", "cut before a coded block", "fork")
    assert min(counted[step] for step in needed) > 50, counted


class SkipsAnOpenCopy(CacheManager):
    def reserve(self, lease: Lease, tokens: int) -> list[Copy]:
        return [copy for copy in super().reserve(lease, tokens) if not copy.open]


class ForksOneOpenBlock(CacheManager):
    def fork(self, lease: Lease) -> Lease:
        twin = super().fork(lease)
        for block in twin.open.values():
            assert self.open_pool is not None
            self.open_pool.give_back(block)
        return twin


class CutsWithinACodedBlock(CacheManager):
    """Keeps the length it was asked for, though the tokens of that block are there coded only."""

    def rollback(self, lease: Lease, length: int) -> None:
        super().rollback(lease, length)
        if lease.length != length:
            assert self.open_pool is not None
            lease.open[length // SIZE] = self.open_pool.take(1)[0]
            lease.table.append(self.pool.take(1)[0])
            lease.length = length


class KeepsBlocksOpen(CacheManager):
    def commit(self, lease: Lease, tokens: int) -> None:
        opened = lease.open.copy()
        super().commit(lease, tokens)
        lease.open = opened


class OpensTheLastBlockOnly(CacheManager):
    def reserve(self, lease: Lease, tokens: int) -> list[Copy]:
        copies = super().reserve(lease, tokens)
        first = lease.length // SIZE
        if len(lease.open) > 1 and self.open_pool is not None:
            self.open_pool.give_back(lease.open.pop(first))
        return copies


@pytest.mark.parametrize(
    "broken", [SkipsAnOpenCopy, ForksOneOpenBlock, CutsWithinACodedBlock, KeepsBlocksOpen, OpensTheLastBlockOnly]
)
def test_the_machine_notices_a_broken_manager(broken: type[CacheManager]) -> None:
    unshrunk = settings(SETTINGS, phases=[Phase.generate], print_blob=False)
    with pytest.raises((AssertionError, ExceptionGroup, OutOfBlocks)):
        drive(broken, unshrunk)


def test_a_step_is_not_cut_within_a_block_that_it_coded() -> None:
    """The middle block of three was never open, so a commit that ends in it has nothing to go on with."""
    manager = CacheManager(BlockPool(4), SIZE, open_pool=BlockPool(2))
    lease = manager.open()
    manager.reserve(lease, 10)
    assert sorted(lease.open) == [0, 2]
    with pytest.raises(InvariantError, match="within a block that is already coded"):
        manager.commit(lease, 6)


def test_drafts_may_cross_the_end_of_a_block_and_be_cut_anywhere() -> None:
    for kept in range(5):
        manager = CacheManager(BlockPool(4), SIZE, open_pool=BlockPool(2))
        lease = manager.open()
        manager.reserve(lease, 2)
        manager.commit(lease, 2)
        manager.reserve(lease, 4)
        manager.commit(lease, kept)
        assert lease.length == 2 + kept
        manager.check()


def test_open_blocks_run_out_without_a_trace() -> None:
    manager = CacheManager(BlockPool(8), SIZE, open_pool=BlockPool(2))
    one, two = manager.open(), manager.open()
    manager.reserve(one, 6)
    with pytest.raises(OutOfBlocks) as refusal:
        manager.reserve(two, 1)
    assert (refusal.value.needed, refusal.value.free) == (1, 0)
    assert (two.table, two.reserved, two.open) == ([], 0, {})
    manager.commit(one, 6)
    manager.reserve(two, 1)
    manager.check()
