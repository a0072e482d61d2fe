"""Leases that share through the prefix tree, driven at random against a plain model.

What a block holds is imitated by the text that led to it: each written position stores the whole sequence up to and
including its token. A lease must read back exactly its own, so KV that was adopted from another sequence, copied short,
evicted under a reader or found in another namespace shows at once. Sealing is imitated as in `test_open_leases`.
"""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvist.base.errors import InvariantError, OutOfBlocks
from kvist.base.events import Adopted, CacheEvent, Evicted
from kvist.cache.manager import CacheManager, Lease
from kvist.cache.pool import BlockPool
from kvist.cache.tree import Node, PrefixTree

SIZE = 4
CAPACITY = 14
OPEN = 9
MOST_LEASES = 4
ONE = st.integers(0, 2**16)
# A beginning of one of three texts, then something else: sequences often begin alike and part anywhere.
TEXTS = st.builds(
    lambda text, shared, rest: [(text * 7 + place * place) % 3 for place in range(shared)] + rest,
    st.integers(0, 2),
    st.integers(1, 22),
    st.lists(st.integers(0, 2), max_size=9),
)

SETTINGS = settings(max_examples=350, stateful_step_count=50, suppress_health_check=list(HealthCheck))


@dataclass
class Running:
    """A sequence under way: all its tokens, and what its lease has committed is a beginning of them."""

    namespace: str
    tokens: list[int]
    lease: Lease

    def written(self, position: int) -> tuple[str, tuple[int, ...]]:
        return self.namespace, tuple(self.tokens[: position + 1])


class PrefixMachine(RuleBasedStateMachine):
    def __init__(self, kind: type[CacheManager], lossy: bool, seen: list[str]) -> None:
        super().__init__()
        self.pool = BlockPool(CAPACITY)
        self.open_pool = BlockPool(OPEN) if lossy else None
        self.events: list[CacheEvent] = []
        self.manager = kind(self.pool, SIZE, self.events.append, self.open_pool)
        self.seen = seen
        self.memory: list[list[object]] = [[None] * SIZE for _ in range(CAPACITY)]
        self.open_memory: list[list[object]] = [[None] * SIZE for _ in range(OPEN)]
        self.sequences: list[Running] = []

    @precondition(lambda self: len(self.sequences) < MOST_LEASES)
    @rule(tokens=TEXTS, namespace=st.sampled_from(["", "", "other"]), all_at_once=st.booleans())
    def begin(self, tokens: list[int], namespace: str, all_at_once: bool) -> None:
        running = Running(namespace, tokens, self.manager.open(namespace))
        self.sequences.append(running)
        self._adopt(running)
        if all_at_once:
            self.compute(len(self.sequences) - 1)

    @precondition(lambda self: self.sequences)
    @rule(one=ONE)
    def adopt(self, one: int) -> None:
        self._adopt(_pick(one, self.sequences))

    @precondition(lambda self: self.sequences)
    @rule(one=ONE, count=st.integers(1, 9))
    def step(self, one: int, count: int) -> None:
        running = _pick(one, self.sequences)
        lease = running.lease
        count = min(count, len(running.tokens) - lease.length)
        if count < 1:
            running.tokens.append(one % 2)
            count = 1
        cost, available, state = self.manager.cost(lease, count)[0], self.manager.available, self._state()
        try:
            copies = self.manager.reserve(lease, count)
        except OutOfBlocks:
            assert self._state() == state
            assert cost > available or self.open_pool is not None
            self.seen.append("refused")
            return
        assert self.manager.available == available - cost
        for copy in copies:
            memory = self.open_memory if copy.open else self.memory
            memory[copy.target] = memory[copy.source].copy()
            self.seen.append("copied")
        for position in range(lease.length, lease.length + count):
            index, offset = divmod(position, SIZE)
            if self.open_pool is None:
                self.memory[lease.table[index]][offset] = running.written(position)
                continue
            if index in lease.open:
                self.open_memory[lease.open[index]][offset] = running.written(position)
            if offset == SIZE - 1:  # sealed: coded whole, from the open block or in passing
                whole = [running.written(index * SIZE + place) for place in range(SIZE)]
                if index in lease.open:
                    assert self.open_memory[lease.open[index]] == whole
                self.memory[lease.table[index]] = list(whole)
        self.manager.commit(lease, count)
        self.manager.publish(lease, running.tokens)
        self.seen.append("step")

    @precondition(lambda self: self.sequences)
    @rule(one=ONE)
    def compute(self, one: int) -> None:
        """All that is known of a sequence, in steps that are not whole blocks."""
        running = _pick(one, self.sequences)
        while len(running.tokens) > running.lease.length:
            before = running.lease.length
            self.step(self.sequences.index(running), 7)
            if running.lease.length == before:
                return

    @precondition(lambda self: len(self.sequences) > 2)
    @rule(one=ONE, cut=st.integers(0, 9))
    def rollback(self, one: int, cut: int) -> None:
        running = _pick(one, self.sequences)
        self.manager.rollback(running.lease, max(0, running.lease.length - cut))
        del running.tokens[max(1, running.lease.length) :]
        self.seen.append("rollback")

    @precondition(lambda self: 0 < len(self.sequences) < MOST_LEASES)
    @rule(one=ONE)
    def fork(self, one: int) -> None:
        running = _pick(one, self.sequences)
        twin = self.manager.fork(running.lease)
        self.sequences.append(Running(running.namespace, running.tokens.copy(), twin))

    @precondition(lambda self: len(self.sequences) > 1)
    @rule(one=ONE, keep=st.sampled_from([True, True, True, False]))
    def release(self, one: int, keep: bool) -> None:
        running = _pick(one, self.sequences)
        self.manager.release(running.lease, running.tokens if keep else None)
        self.sequences.remove(running)
        self.seen.append("kept" if keep else "released")

    @precondition(lambda self: len(self.manager.tree) > 3)
    @rule(few=st.integers(0, 9))
    def clear(self, few: int) -> None:
        if few == 0:
            self.manager.tree.clear()

    @invariant()
    def each_lease_reads_back_its_own_tokens(self) -> None:
        self.manager.check()
        for running in self.sequences:
            lease = running.lease
            for position in range(lease.length):
                index, offset = divmod(position, SIZE)
                if index in lease.open:
                    found = self.open_memory[lease.open[index]][offset]
                else:
                    found = self.memory[lease.table[index]][offset]
                assert found == running.written(position)

    def teardown(self) -> None:
        for running in self.sequences:
            self.manager.release(running.lease, running.tokens)
        self.manager.check()
        assert self.manager.available == CAPACITY
        self.manager.tree.clear()
        self.manager.check()
        assert self.pool.free == CAPACITY
        assert self.open_pool is None or self.open_pool.free == OPEN
        self.seen += ["evicted" for event in self.events if isinstance(event, Evicted)]

    def _adopt(self, running: Running) -> None:
        lease, before = running.lease, running.lease.length
        found = self.manager.adopt(lease, running.tokens[:-1])
        assert lease.length == before + found
        if found:
            assert lease.length < len(running.tokens)
            assert self.events[-1] == Adopted(lease.id, found, lease.length)
            self.seen.append("adopted part of a block" if lease.length % SIZE else "adopted")

    def _state(self) -> object:
        leases = {running.lease.id: running.lease.table.copy() for running in self.sequences}
        counts = [self.pool.count(block) for block in range(CAPACITY)]
        return leases, counts, self.manager.available, len(self.events)


def _pick(one: int, sequences: list[Running]) -> Running:
    return sequences[one % len(sequences)]


def drive(manager: type[CacheManager], chosen: settings, lossy: bool) -> list[str]:
    seen: list[str] = []
    run_state_machine_as_test(lambda: PrefixMachine(manager, lossy, seen), settings=chosen)
    return seen


@pytest.mark.parametrize("lossy", [False, True])
def test_what_is_shared_is_what_would_have_been_computed(lossy: bool) -> None:
    counted = Counter(drive(CacheManager, SETTINGS, lossy))
    wanted = ("step", "copied", "refused", "rollback", "kept", "adopted", "adopted part of a block", "evicted")
    assert min(counted[what] for what in wanted) > 10, counted


class AdoptsOneTokenTooMany(CacheManager):
    def adopt(self, lease: Lease, tokens: object) -> int:
        found = super().adopt(lease, tokens)  # type: ignore[arg-type]
        if found and lease.length % self.block_size:
            lease.length += 1
        return found


class MixesNamespaces(CacheManager):
    def open(self, namespace: str = "") -> Lease:
        return super().open("")


class PublishesTheWrongBlock(CacheManager):
    def publish(self, lease: Lease, tokens: object) -> None:
        if len(lease.path) == 1 and lease.length >= 2 * self.block_size:
            lease.table[0], lease.table[1] = lease.table[1], lease.table[0]
        super().publish(lease, tokens)  # type: ignore[arg-type]


class WritesIntoWhatItAdopted(CacheManager):
    def _shared(self, lease: Lease, first: int, end: int) -> list[int]:
        return []


class TreeThatForgetsHolders(PrefixTree):
    def hold(self, node: Node) -> None:
        self._idle.pop(node, None)


class AdoptsWithoutCounting(CacheManager):
    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.tree.__class__ = TreeThatForgetsHolders


@pytest.mark.parametrize(
    "broken",
    [AdoptsOneTokenTooMany, MixesNamespaces, PublishesTheWrongBlock, WritesIntoWhatItAdopted, AdoptsWithoutCounting],
)
def test_the_machine_notices_a_broken_manager(broken: type[CacheManager]) -> None:
    unshrunk = settings(SETTINGS, phases=[Phase.generate], print_blob=False)
    with pytest.raises((AssertionError, ExceptionGroup)):
        drive(broken, unshrunk, lossy=False)


def committed(manager: CacheManager, tokens: list[int], namespace: str = "") -> Lease:
    lease = manager.open(namespace)
    manager.adopt(lease, tokens[:-1])
    manager.reserve(lease, len(tokens) - lease.length)
    manager.commit(lease, len(tokens) - lease.length)
    manager.publish(lease, tokens)
    return lease


def test_the_longest_prefix_is_found_to_the_token_over_live_and_ended_sequences() -> None:
    manager = CacheManager(BlockPool(32), SIZE)
    live = committed(manager, list(range(10)))
    ended = committed(manager, [*range(6), 90, 91, 92, 93, 94])
    manager.release(ended, [*range(6), 90, 91, 92, 93, 94])

    def found(tokens: list[int]) -> int:
        lease = manager.open()
        count = manager.adopt(lease, tokens)
        manager.release(lease)
        manager.check()
        return count

    assert found([*range(8), 7]) == 8  # two full blocks of the one that still runs
    assert found([*range(6), 90, 91, 92, 7]) == 9  # two blocks, and one token of the other's tail
    assert found([*range(6), 90, 91, 92, 93, 94, 95]) == 11
    assert found([*range(6), 7]) == 6  # half a block
    assert found([7, *range(6)]) == 0
    lease = manager.open("other")
    assert manager.adopt(lease, list(range(8))) == 0
    manager.release(lease)
    manager.release(live)
    manager.check()


def test_what_goes_first_is_the_tail_of_what_was_not_used_for_longest() -> None:
    events: list[CacheEvent] = []
    manager = CacheManager(BlockPool(6), SIZE, events.append)
    first, second = [1] * 4 + [2] * 4 + [3] * 4, [1] * 4 + [5] * 4

    def remembered(tokens: list[int]) -> int:
        node, count = manager.tree.root(""), 0
        while (child := manager.tree.child(node, tuple(tokens[count : count + SIZE]))) is not None:
            node, count = child, count + SIZE
        return count

    for tokens in (first, second):
        manager.release(committed(manager, tokens), tokens)
    assert (remembered(first), remembered(second), manager.pool.free) == (12, 8, 2)
    manager.release(committed(manager, [9] * 12), [9] * 12)  # three blocks: one must go
    assert (remembered(first), remembered(second), remembered([9] * 12)) == (8, 8, 12)
    assert sum(isinstance(event, Evicted) for event in events) == 1
    used = manager.open()
    assert manager.adopt(used, first) == 8  # used again, so the other sequence's tail goes next
    manager.release(used)
    manager.release(committed(manager, [8] * 4), [8] * 4)
    assert (remembered(first), remembered(second), remembered([9] * 12)) == (8, 4, 12)
    manager.check()


def test_two_who_compute_the_same_end_with_one_copy_of_it() -> None:
    manager = CacheManager(BlockPool(8), SIZE)
    tokens = list(range(8))
    leases = [manager.open(), manager.open()]
    for lease in leases:
        manager.reserve(lease, 8)
        manager.commit(lease, 8)
    assert manager.pool.used == 4
    for lease in leases:
        manager.publish(lease, tokens)
    assert leases[0].table == leases[1].table
    assert manager.pool.used == 2
    manager.check()


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda manager: manager.tree._idle.popitem(), "idle is wrong"),
        (lambda manager: manager.tree.root("").children.reverse(), "out of order"),
        (lambda manager: manager.tree._idle.move_to_end(next(iter(manager.tree._idle))), "evicted before"),
        (lambda manager: manager.tree._nodes.popitem(), "linked"),
        (lambda manager: setattr(manager.tree.root("").children[0], "tokens", (0,)), "wrong place"),
    ],
)
def test_the_check_of_a_tree_can_fail(damage: object, finding: str) -> None:
    manager = CacheManager(BlockPool(8), SIZE)
    for tokens in ([1] * 8, [2] * 4):
        manager.release(committed(manager, tokens), tokens)
    manager.check()
    damage(manager)  # type: ignore[operator]
    with pytest.raises(InvariantError, match=finding):
        manager.check()
