"""Tenants that share a folder's budget: each has its part, whatever the others hold and for how long."""

import math
import random
from pathlib import Path

import pytest

from kvist.cache.disk import DiskTier
from kvist.cache.shares import Share

A, B, OLD = "a" * 32, "b" * 32, "c" * 32  # namespaces of two tenants, and of a model that is not served any more
DAY = 86_400.0
RECORD = 100


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def put_in(disk: DiskTier, namespace: str, number: int, until: float) -> bool:
    return disk.put(f"{namespace}/{number:064x}", (bytes(RECORD),), until)


def held_in(disk: DiskTier, namespace: str) -> list[int]:
    return sorted(int(name[33:], 16) for name in disk._entries if name.startswith(namespace))


def shared(folder: Path, clock: Clock) -> DiskTier:
    """Twenty records, of which ten are each tenant's part."""
    disk = DiskTier(folder, 20 * RECORD, clock=clock)
    disk.shares = {name: Share(frozenset({name}), 10 * RECORD) for name in (A, B)}
    return disk


def test_whoever_holds_all_of_it_for_a_day_gives_others_their_parts_back(tmp_path: Path) -> None:
    clock = Clock()
    disk = shared(tmp_path, clock)
    for number in range(30):  # room that nobody else takes is taken, and what is held gives way to its own tenant's
        clock.now += 1
        assert put_in(disk, A, number, clock.now + DAY)
    assert held_in(disk, A) == list(range(10, 30))
    for number in range(10):
        clock.now += 1
        assert put_in(disk, B, number, clock.now)
    assert (held_in(disk, A), held_in(disk, B)) == (list(range(20, 30)), list(range(10)))
    clock.now += 1
    assert put_in(disk, B, 10, clock.now)  # beyond its part: its own oldest has to go, not A's
    assert (held_in(disk, A), held_in(disk, B)) == (list(range(20, 30)), list(range(1, 11)))
    assert put_in(disk, A, 30, clock.now + 2 * DAY)
    assert (held_in(disk, A), held_in(disk, B)) == (list(range(21, 31)), list(range(1, 11)))
    disk.check()


def test_without_shares_whoever_holds_it_for_a_day_has_all_of_it(tmp_path: Path) -> None:
    clock = Clock()
    disk = DiskTier(tmp_path, 20 * RECORD, clock=clock)
    for number in range(20):
        put_in(disk, A, number, clock.now + DAY)
    assert not put_in(disk, B, 0, clock.now)
    assert disk.refused == 1


def test_what_is_of_no_tenant_that_is_known_goes_before_a_part_and_pinned_blocks_never(tmp_path: Path) -> None:
    clock = Clock()
    disk = shared(tmp_path, clock)
    for number in range(20):
        assert put_in(disk, OLD, number, clock.now + DAY)
    disk.pin([f"{OLD}/{number:064x}" for number in range(12)], math.inf)
    for number in range(8):
        assert put_in(disk, A, number, clock.now)
    assert held_in(disk, OLD) == list(range(12))
    assert not put_in(disk, B, 0, clock.now - 9)  # all that is left is pinned, or younger and within a part
    assert held_in(disk, A) == list(range(8))
    disk.check()


def test_a_limit_is_of_all_namespaces_of_a_tenant_together(tmp_path: Path) -> None:
    clock = Clock()
    disk = DiskTier(tmp_path, 20 * RECORD, clock=clock)
    both = Share(frozenset({A, OLD}), 10 * RECORD, 6 * RECORD)
    disk.shares = {A: both, OLD: both}
    for number in range(10):
        clock.now += 1
        assert put_in(disk, (A, OLD)[number % 2], number, clock.now)
    assert sorted(held_in(disk, A) + held_in(disk, OLD)) == list(range(4, 10))


@pytest.mark.parametrize("seed", range(10))
def test_within_its_part_a_tenant_always_gets_room_and_loses_none(seed: int, tmp_path: Path) -> None:
    """Three tenants at random, holding what they like for as long as they like, beside what others left."""
    rng, clock = random.Random(seed), Clock()
    names = [letter * 32 for letter in "abc"]
    disk = DiskTier(tmp_path, 30 * RECORD, clock=clock)
    disk.shares = {name: Share(frozenset({name}), 10 * RECORD) for name in names}
    for number in range(rng.randrange(30)):
        put_in(disk, "f" * 32, number, clock.now + rng.choice([0.0, DAY]))
    for number in range(150):
        clock.now += 1
        name = rng.choices(names, (8, 3, 1))[0]
        before = {other: held_in(disk, other) for other in names}
        done = put_in(disk, name, number, clock.now + rng.choice([0.0, 0.0, 300.0, DAY]))
        assert done or len(before[name]) >= 10
        for other in set(names) - {name}:
            after = held_in(disk, other)
            assert after == before[other] or len(after) >= 10
        assert disk.used <= disk.budget
    assert disk.evicted > 50
    disk.check()
