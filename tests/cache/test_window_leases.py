"""Leases over layers with windows, driven at random against the tokens themselves.

Each pool is a list of token lists. Only what the manager says is done to them. A lease must be able to read in every
group all that the token behind it sees, also what it found in the prefix tree, and bear a small cut at any time."""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvist.base.errors import InvariantError, OutOfBlocks
from kvist.cache import windows
from kvist.cache.manager import CacheManager, Lease
from kvist.cache.pool import BlockPool
from kvist.cache.spec import Window
from kvist.cache.windows import WindowGroup

SIZE, CAPACITY, SLACK = 4, 60, 3
WINDOWS = (Window(5), Window(9, sinks=2), Window(1))
TIGHT, AMPLE = 9, 16  # blocks of a window's pool
ONE = st.integers(0, 2**16)
SETTINGS = settings(
    max_examples=300, stateful_step_count=60, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
UNWRITTEN = -1


class WindowMachine(RuleBasedStateMachine):
    """`tokens`: of each live lease, what it has committed and, in a step, written. Few different ones, so that
    sequences share beginnings."""

    def __init__(self, seen: list[str], capacity: int) -> None:
        super().__init__()
        pools = [BlockPool(capacity) for _ in WINDOWS]
        self.manager = CacheManager(BlockPool(CAPACITY), SIZE, windows=list(zip(WINDOWS, pools, strict=True)))
        self.memory = [[[UNWRITTEN] * SIZE for _ in range(CAPACITY)]]
        self.memory += [[[UNWRITTEN] * SIZE for _ in range(capacity)] for _ in WINDOWS]
        self.tokens: dict[Lease, list[int]] = {}
        self.floor: dict[Lease, int] = {}  # to what length each can surely be cut
        self.known: list[list[int]] = [[]]  # what was published at some time
        self.seen = seen

    def table(self, lease: Lease, group: int) -> dict[int, int]:
        return dict(enumerate(lease.table)) if group == 0 else lease.windows[group - 1]

    @precondition(lambda self: len(self.tokens) < 4)
    @rule(one=ONE, length=st.integers(0, 40), rest=st.lists(st.integers(0, 1), max_size=5))
    def begin(self, one: int, length: int, rest: list[int]) -> None:
        """A new lease takes over what the tree has of its tokens, which begin as others' did."""
        prefix = [*self.known[one % len(self.known)][:length], *rest]
        lease = self.manager.open()
        found = self.manager.adopt(lease, prefix)
        assert found == lease.length <= len(prefix)
        self.tokens[lease] = prefix[:found]
        self.floor[lease] = found
        if found:
            self.seen.append("found")
            if any(0 not in table for table in lease.windows):
                self.seen.append("found behind a window")

    @precondition(lambda self: self.tokens)
    @rule(one=ONE, added=st.lists(st.integers(0, 1), min_size=1, max_size=11), part=st.integers(0, 11))
    def step(self, one: int, added: list[int], part: int) -> None:
        lease = self.pick(one)
        self.floor[lease] = max(self.floor[lease], lease.length - SLACK)
        try:
            copies = self.manager.reserve(lease, len(added))
        except OutOfBlocks:
            self.seen.append("refused")
            return
        for copy in copies:
            pool = self.memory[0 if copy.window is None else copy.window + 1]
            pool[copy.target] = pool[copy.source].copy()
            self.seen.append("copied")
        for offset, token in enumerate(added):
            index, place = divmod(lease.length + offset, SIZE)
            for group, pool in enumerate(self.memory):
                pool[self.table(lease, group)[index]][place] = token
        self.manager.check()
        kept = min(part, len(added))
        self.manager.commit(lease, kept)
        self.tokens[lease] += added[:kept]
        if sum(map(len, lease.windows)) < len(WINDOWS) * len(lease.table):
            self.seen.append("let go")

    @precondition(lambda self: self.tokens)
    @rule(one=ONE)
    def publish(self, one: int) -> None:
        lease = self.pick(one)
        self.manager.publish(lease, self.tokens[lease])
        self.floor[lease] = max(self.floor[lease], lease.length - SLACK)
        self.known.append(self.tokens[lease].copy())

    @precondition(lambda self: self.tokens)
    @rule(one=ONE, by=st.integers(0, 30))
    def cut(self, one: int, by: int) -> None:
        lease = self.pick(one)
        length = max(0, lease.length - by)
        self.manager.rollback(lease, length)
        assert lease.length in (length, 0)
        if lease.length != length:
            assert length < self.floor[lease], f"cut by {by} tokens, the lease lost everything"
            self.seen.append("lost by a cut")
        del self.tokens[lease][lease.length :]
        self.floor[lease] = min(self.floor[lease], lease.length)

    @precondition(lambda self: self.tokens and len(self.tokens) < 4)
    @rule(one=ONE)
    def fork(self, one: int) -> None:
        lease = self.pick(one)
        twin = self.manager.fork(lease)
        self.tokens[twin], self.floor[twin] = self.tokens[lease].copy(), self.floor[lease]

    @precondition(lambda self: self.tokens)
    @rule(one=ONE, keeps=st.booleans())
    def end(self, one: int, keeps: bool) -> None:
        lease = self.pick(one)
        tokens = self.tokens.pop(lease)
        self.known += [tokens] if keeps else []
        self.manager.release(lease, tokens if keeps else None)

    @rule()
    def clear(self) -> None:
        self.manager.tree.clear()
        if not self.tokens:
            assert self.manager.pool.used == 0
            assert all(group.pool.used == 0 for group in self.manager.windows)

    @invariant()
    def everything_that_is_seen_is_there(self) -> None:
        self.manager.check()
        for lease, tokens in self.tokens.items():
            assert lease.length == len(tokens)
            for group in range(len(self.memory)):
                table, pool = self.table(lease, group), self.memory[group]
                window = None if group == 0 else WINDOWS[group - 1]
                for position, token in enumerate(tokens):
                    seen = window is None or position > len(tokens) - window.size or position < window.sinks
                    if seen:
                        assert pool[table[position // SIZE]][position % SIZE] == token

    def pick(self, one: int) -> Lease:
        return list(self.tokens)[one % len(self.tokens)]


@pytest.fixture(autouse=True)
def _little_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "SLACK", SLACK)


def test_windows() -> None:
    seen: list[str] = []
    for capacity in (TIGHT, AMPLE):
        run_state_machine_as_test(lambda capacity=capacity: WindowMachine(seen, capacity), settings=SETTINGS)
    events = {"found", "found behind a window", "refused", "copied", "let go", "lost by a cut"}
    assert events <= set(seen), f"never seen: {events - set(seen)}"


@pytest.mark.parametrize("defect", ["needed", "adopt", "trim"])
def test_the_machine_finds_what_is_wrong(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these forgets a block, or a condition."""
    original = getattr(WindowGroup, defect)
    wrong = {
        "needed": lambda self, length: original(self, length)[1:],
        "adopt": lambda self, lease, index, node: index % 2 and original(self, lease, index, node),
        "trim": lambda self, lease: self.cut(lease, lease.length // SIZE),
    }
    monkeypatch.setattr(WindowGroup, defect, wrong[defect])
    with pytest.raises(Exception):  # noqa: B017
        run_state_machine_as_test(lambda: WindowMachine([], TIGHT), settings=settings(SETTINGS, max_examples=300))


@pytest.mark.parametrize("broken", [False, True])
def test_a_prefix_whose_window_is_gone_is_not_found(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = BlockPool(8)
    manager = CacheManager(BlockPool(100), SIZE, windows=[(Window(8), pool)])
    first, second = list(range(40)), list(range(100, 140))
    for tokens in (first, second):
        lease = manager.open()
        for position in range(0, 40, SIZE):
            manager.reserve(lease, SIZE)
            manager.commit(lease, SIZE)
            manager.publish(lease, tokens[: position + SIZE])
        manager.release(lease, tokens)
    lease = manager.open()
    if not broken:
        assert manager.adopt(lease, first) == 0, "the pool holds the windows of the second, no more of the first"
        assert manager.adopt(manager.open(), [*second, 7]) == 40
        manager.check()
        return
    monkeypatch.setattr(WindowGroup, "fits", lambda self, lease, start, nodes: True)
    manager.adopt(lease, first)
    with pytest.raises(InvariantError):
        manager.check()


def test_a_window_takes_what_it_needs_however_long_the_sequence() -> None:
    pool = BlockPool(6)
    manager = CacheManager(BlockPool(1000), SIZE, windows=[(Window(8), pool)])
    lease = manager.open()
    for position in range(2000):
        manager.reserve(lease, 1)
        manager.commit(lease, 1)
        manager.check()
        assert len(lease.windows[0]) <= 2 + 1 + 1 + 1  # the window, its ends, and what a cut may need
        if position % 7 == 0:
            manager.publish(lease, [1] * 2000)
    manager.release(lease)
