"""Pool and manager: what they refuse, in which order blocks go back, and that `check()` notices each kind of damage."""

from collections.abc import Callable

import pytest

from kvist.base.errors import InvariantError, OutOfBlocks
from kvist.base.events import CacheEvent, Released, Reserved
from kvist.cache.manager import CacheManager, Copy, Lease
from kvist.cache.pool import BlockPool

BLOCK_SIZE = 4


def grown(manager: CacheManager, tokens: int) -> Lease:
    """A lease with that many committed tokens."""
    lease = manager.open()
    manager.reserve(lease, tokens)
    manager.commit(lease, tokens)
    return lease


@pytest.fixture
def manager() -> CacheManager:
    return CacheManager(BlockPool(8), BLOCK_SIZE)


def test_a_pool_hands_out_each_block_once_and_takes_it_back_from_the_last_holder() -> None:
    pool = BlockPool(3)
    assert sorted(pool.take(3)) == [0, 1, 2]
    assert (pool.free, pool.used) == (0, 3)
    pool.share(1)
    pool.give_back(1)
    assert (pool.count(1), pool.free) == (1, 0)
    pool.give_back(1)
    assert (pool.count(1), pool.free) == (0, 1)
    assert pool.take(1) == [1]
    pool.check()


def test_a_pool_that_cannot_give_all_gives_none() -> None:
    pool = BlockPool(3)
    pool.take(1)
    with pytest.raises(OutOfBlocks, match="2 free blocks and this step needs 3") as refusal:
        pool.take(3)
    assert (refusal.value.needed, refusal.value.free) == (3, 2)
    assert pool.free == 2


def test_what_a_pool_refuses() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)
    pool = BlockPool(1)
    with pytest.raises(InvariantError, match="free and cannot be shared"):
        pool.share(0)
    with pytest.raises(InvariantError, match="nobody holds it"):
        pool.give_back(0)


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda pool: pool._free.append(pool._free[0]), "twice"),
        (lambda pool: pool._free.pop(), "count 0 and is not free"),
        (lambda pool: pool._free.append(0), "count 1 and is free"),
        (lambda pool: pool._counts.__setitem__(0, 0), "count 0 and is not free"),
        (lambda pool: pool._counts.__setitem__(0, -1), "count -1"),
    ],
)
def test_the_check_of_a_pool_can_fail(damage: Callable[[BlockPool], None], finding: str) -> None:
    pool = BlockPool(4)
    pool.take(1)
    pool.check()
    damage(pool)
    with pytest.raises(InvariantError, match=finding):
        pool.check()


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda manager, lease: lease.table.pop(), "1 blocks for"),
        (lambda manager, lease: lease.table.append(7), "3 blocks for"),
        (lambda manager, lease: lease.table.__setitem__(0, lease.table[1]), "holds a block twice"),
        (lambda manager, lease: lease.table.__setitem__(0, 7), "has count 1 and 0 holders"),
        (lambda manager, lease: manager.pool.share(lease.table[0]), "has count 2 and 1 holders"),
        (lambda manager, lease: setattr(lease, "length", 0), "2 blocks for"),
        (lambda manager, lease: setattr(lease, "reserved", -1), "impossible state"),
        (lambda manager, lease: setattr(lease, "released", True), "impossible state"),
        (lambda manager, lease: manager.pool._free.pop(), "not free"),
    ],
)
def test_the_check_of_a_manager_can_fail(damage: Callable[[CacheManager, Lease], None], finding: str) -> None:
    manager = CacheManager(BlockPool(8), BLOCK_SIZE)
    lease = grown(manager, 6)
    manager.check()
    damage(manager, lease)
    with pytest.raises(InvariantError, match=finding):
        manager.check()


def test_the_check_notices_a_shared_block_that_is_about_to_be_written(manager: CacheManager) -> None:
    lease = grown(manager, 6)
    twin = manager.fork(lease)
    manager.check()
    twin.reserved = 1  # as `reserve` would, had it not replaced the block that both hold
    with pytest.raises(InvariantError, match="shares a block that it is about to write"):
        manager.check()


def test_a_fork_shares_all_and_copies_only_the_block_it_writes(manager: CacheManager) -> None:
    lease = grown(manager, 6)
    twin = manager.fork(lease)
    assert twin.table == lease.table
    assert manager.pool.used == 2
    old = lease.table[1]
    copies = manager.reserve(twin, 1)
    assert copies == [Copy(old, twin.table[1])]
    assert twin.table[0] == lease.table[0]
    assert twin.table[1] != lease.table[1] == old
    # The tail has one holder again, who writes in place.
    assert manager.reserve(lease, 1) == []
    assert lease.table[1] == old


def test_a_fork_at_the_end_of_a_block_copies_nothing(manager: CacheManager) -> None:
    lease = grown(manager, 2 * BLOCK_SIZE)
    twin = manager.fork(lease)
    assert manager.reserve(twin, 3) == []
    assert twin.table[:2] == lease.table
    assert manager.pool.used == 3


def test_blocks_of_a_tail_go_back_tail_first_and_are_reused_head_first(manager: CacheManager) -> None:
    lease = grown(manager, 4 * BLOCK_SIZE)
    table = lease.table.copy()
    manager.rollback(lease, BLOCK_SIZE)
    assert lease.table == table[:1]
    manager.reserve(lease, 3 * BLOCK_SIZE)
    assert lease.table == table


def test_what_was_reserved_and_not_committed_goes_back(manager: CacheManager) -> None:
    lease = grown(manager, 3)
    manager.reserve(lease, 10)
    assert manager.pool.used == 4
    manager.commit(lease, 2)
    assert (lease.length, lease.reserved, manager.pool.used) == (5, 0, 2)
    manager.reserve(lease, 10)
    manager.rollback(lease, lease.length)
    assert (lease.length, lease.reserved, manager.pool.used) == (5, 0, 2)


def test_what_a_manager_refuses(manager: CacheManager) -> None:
    lease = grown(manager, 6)
    with pytest.raises(ValueError, match="at least one token, got 0"):
        manager.reserve(lease, 0)
    with pytest.raises(ValueError, match="cannot be cut to 7"):
        manager.rollback(lease, 7)
    with pytest.raises(InvariantError, match="commits 1 tokens and has 0 reserved"):
        manager.commit(lease, 1)
    manager.reserve(lease, 2)
    with pytest.raises(InvariantError, match="already has 2 tokens reserved"):
        manager.reserve(lease, 1)
    with pytest.raises(InvariantError, match="in the middle of a step"):
        manager.fork(lease)
    with pytest.raises(InvariantError, match="commits 3 tokens"):
        manager.commit(lease, 3)
    manager.check()


@pytest.mark.parametrize(
    "use",
    [
        lambda manager, lease: manager.reserve(lease, 1),
        lambda manager, lease: manager.commit(lease, 0),
        lambda manager, lease: manager.rollback(lease, 0),
        lambda manager, lease: manager.fork(lease),
    ],
)
def test_a_lease_that_has_ended_or_is_anothers_is_refused(use: Callable[[CacheManager, Lease], object]) -> None:
    manager, other = CacheManager(BlockPool(8), BLOCK_SIZE), CacheManager(BlockPool(8), BLOCK_SIZE)
    ended, foreign = grown(manager, 3), grown(other, 3)
    grown(manager, 3)
    manager.release(ended)
    for lease in (ended, foreign):
        with pytest.raises(InvariantError, match="not a live lease of this manager"):
            use(manager, lease)
    manager.check()


def test_events_are_emitted_after_the_change() -> None:
    pool = BlockPool(8)
    free_at_event: list[tuple[CacheEvent, int]] = []
    manager = CacheManager(pool, BLOCK_SIZE, lambda event: free_at_event.append((event, pool.free)))
    lease = grown(manager, 6)
    manager.release(lease)
    assert free_at_event[0] == (Reserved(lease.id, 6, 2, 0), 6)
    assert free_at_event[-1] == (Released(lease.id, 2), 8)
