"""The engine over a runner without a model, driven at random: wrong KV anywhere shows as a wrong token.

Each position shows what it was computed from (see `fake_runner`). So a block that was adopted wrongly, copied
short, evicted under a reader or written by two changes what is drawn. Behind the memory stands a kept cache that writes
and reads when it is told to, loses blocks, and fails in the middle of a load.

That everything ends is a property, too: within so many steps for each sequence, even where every pool has just the
blocks that one request needs."""

from collections import Counter
from collections.abc import Sequence as Tokens

import pytest
from fake_runner import BAD, BLOCKS, SIZE, STEP, FakeKept, FakeRunner, alone
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvist.base.events import Evicted, Reserved
from kvist.cache import layout as layout_module
from kvist.cache import windows as windows_module
from kvist.cache.manager import CacheManager, Lease
from kvist.cache.record import Loss
from kvist.cache.tree import Node
from kvist.cache.windows import WindowGroup
from kvist.runtime.engine import Engine
from kvist.runtime.keeper import Keeper
from kvist.runtime.request import FinishReason, Request, Sampling
from kvist.runtime.scheduler import Scheduler
from kvist.runtime.sequence import Sequence

ONE = st.integers(0, 2**16)
MOST_STEPS = 60  # for each sequence, whatever happens to the others
SETTINGS = settings(max_examples=120, stateful_step_count=40, suppress_health_check=list(HealthCheck))

PROMPTS = st.builds(
    lambda text, shared, rest: tuple([(text * 5 + place * place) % 3 for place in range(shared)] + rest),
    st.integers(0, 2),
    st.integers(1, 18),
    st.lists(st.integers(0, 2), max_size=6),
)


@pytest.fixture(autouse=True)
def _little_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts here are so short that windows would never move on otherwise."""
    for module in (layout_module, windows_module):
        monkeypatch.setattr(module, "SLACK", SIZE)


class EngineMachine(RuleBasedStateMachine):
    def __init__(
        self,
        manager: type[CacheManager],
        scheduler: type[Scheduler],
        keeper: type[Keeper],
        lossy: bool,
        windows: Tokens[int],
        seen: Counter[str],
        tight: int | None = None,
    ) -> None:
        super().__init__()
        self.runner = FakeRunner(manager, lossy, windows, tight)
        self.tight = tight
        self.kept = FakeKept()
        self.engine = Engine(self.runner, STEP, self.kept)  # type: ignore[arg-type]
        self.engine.scheduler.__class__ = scheduler
        self.engine.keeper.__class__ = keeper
        self.sequences: list[Sequence] = []
        self.told: dict[Sequence, list[int]] = {}
        self.seen = seen

    @rule(
        prompt=PROMPTS,
        most=st.integers(1, 14),
        temperature=st.sampled_from([0.0, 1.0]),
        priority=st.integers(0, 2),
        tenant=st.sampled_from(["", "", "other"]),
        adapter=st.sampled_from(["", "", "tuned"]),
        choices=st.sampled_from([1, 1, 1, 2, 4]),
        bad=st.integers(0, 12),
        scored=st.integers(0, 5),
    )
    def add(
        self,
        prompt: tuple[int, ...],
        most: int,
        temperature: float,
        priority: int,
        tenant: str,
        adapter: str,
        choices: int,
        bad: int,
        scored: int,
    ) -> None:
        if bad == 0:
            prompt = (*prompt, BAD)
        if self.tight:
            prompt = prompt[: self.tight]
            # Mostly as many as the pools hold, to the token; the last one drawn is never written.
            most = self.tight + 1 - len(prompt) if bad % 3 else min(most, self.tight + 1 - len(prompt))
        sampling = Sampling(temperature=temperature, seed=len(self.sequences))
        request = Request(
            prompt, most, sampling, frozenset({7}), priority=priority, tenant=tenant, ttl=300.0 * (scored == 2),
            prompt_logprobs=1 if scored == 0 else None, adapter=adapter,
        )  # fmt: skip
        for sequence in self.engine.add_choices(request, choices):
            self.sequences.append(sequence)
            self.told[sequence] = []
        self.seen["choices"] += choices > 1

    @rule(count=st.integers(1, 9))
    def step(self, count: int) -> None:
        for _ in range(count):
            self._step()

    @rule(count=st.integers(1, 9))
    def write(self, count: int) -> None:
        self.kept.write(count)

    @rule(count=st.integers(1, 3))
    def read(self, count: int) -> None:
        self.kept.read(count)

    @rule(room=st.integers(0, 3))
    def writers_keep_up_or_do_not(self, room: int) -> None:
        self.kept.room = room

    @precondition(lambda self: self.sequences)
    @rule(one=ONE)
    def go_on_later(self, one: int) -> None:
        """What somebody has come to is asked for again, when only the kept cache may know it."""
        before = self.sequences[one % len(self.sequences)]
        self.forget_what_nobody_reads(True)
        prompt = tuple(token for token in before.tokens if token != BAD)[: BLOCKS * SIZE - 2]
        self.add(prompt, 3, 0.0, 1, before.request.tenant, before.request.adapter, 1, 1, 1)

    @precondition(lambda self: self.kept.records)
    @rule(one=ONE)
    def lose(self, one: int) -> None:
        name = list(self.kept.records)[one % len(self.kept.records)]
        del self.kept.records[name]
        self.kept.losses.add(name, Loss.EVICTED, "disk")

    @rule(written=st.booleans())
    def forget_what_nobody_reads(self, written: bool) -> None:
        if written:
            self.engine.keeper.pump()
            self.kept.write(BLOCKS)
        self.runner.manager.tree.clear()

    @precondition(lambda self: any(sequence.finish_reason is None for sequence in self.sequences))
    @rule(one=ONE)
    def cancel(self, one: int) -> None:
        live = [sequence for sequence in self.sequences if sequence.finish_reason is None]
        self.engine.finish(live[one % len(live)], FinishReason.CANCELLED)
        self.seen["cancelled"] += 1

    @invariant()
    def all_is_consistent(self) -> None:
        self.engine.check()
        assert self.runner.widest <= STEP

    def teardown(self) -> None:
        steps = 0
        while not self.engine.idle:
            self._step()
            self.engine.check()
            steps += 1
            assert steps < MOST_STEPS * (len(self.sequences) + 1), "nothing comes to its end"
        for sequence in self.sequences:
            self._compare(sequence)
        manager = self.runner.manager
        assert not list(manager.leases)
        assert manager.room == manager.capacities
        self.seen["lost by a window"] += any(-1 in node.windows for node in manager.tree.nodes())
        manager.tree.clear()
        manager.check()
        assert all(pool.free == pool.capacity for pool in (manager.pool, *(group.pool for group in manager.windows)))
        self.seen["read"] += self.kept.hits
        events = self.runner.events
        self.seen["preempted"] += self.engine.scheduler.preemptions
        self.seen["evicted"] += sum(isinstance(event, Evicted) for event in events)
        self.seen["copied"] += sum(event.copies for event in events if isinstance(event, Reserved))

    def _step(self) -> None:
        for drawn in self.engine.step():
            if drawn.token is not None:
                self.told[drawn.sequence].append(drawn.token)

    def _compare(self, sequence: Sequence) -> None:
        expected = alone(sequence.request, [group.window.size for group in self.runner.manager.windows])
        self.seen["restored"] += sequence.cached.tiers["fake"] > 0
        self.seen["lost"] += sequence.loss is not None
        assert sequence.lease is None or sequence.lease.released
        public = sequence.lease is not None and sequence.lease.branch is not None
        self.seen["public"] += public and sequence.cached.prompt > 0
        self.seen["shared"] += sequence.cached.prompt > 0
        self.seen["resumed"] += sequence.cached.resume > 0
        self.seen["forked"] += sequence.cached.fork > 0
        assert self.told[sequence] == sequence.new_tokens
        if BAD in sequence.request.prompt:
            assert sequence.finish_reason in (FinishReason.FAILED, FinishReason.CANCELLED)
            assert sequence.new_tokens == []
            self.seen["failed"] += 1
            return
        assert sequence.new_tokens == expected[: len(sequence.new_tokens)]
        if sequence.finish_reason is not FinishReason.CANCELLED:
            assert len(sequence.new_tokens) == len(expected)
            if sequence.request.prompt_logprobs is not None:
                assert len(sequence.prompt_logprobs) == len(sequence.request.prompt) - 1
                self.seen["scored"] += 1


def drive(
    manager: type[CacheManager],
    scheduler: type[Scheduler],
    keeper: type[Keeper],
    lossy: bool,
    windows: Tokens[int] = (),
    chosen: settings = SETTINGS,
    tight: int | None = None,
) -> Counter[str]:
    seen: Counter[str] = Counter()
    run_state_machine_as_test(
        lambda: EngineMachine(manager, scheduler, keeper, lossy, windows, seen, tight), settings=chosen
    )
    return seen


@pytest.mark.parametrize("windows", [(), (3, 6)], ids=["", "windows"])
@pytest.mark.parametrize("lossy", [False, True], ids=["exact", "lossy"])
def test_whatever_comes_each_draws_what_it_draws_alone(lossy: bool, windows: Tokens[int]) -> None:
    chosen = settings(SETTINGS, max_examples=240) if windows else SETTINGS
    seen = drive(CacheManager, Scheduler, Keeper, lossy, windows, chosen)
    wanted = (
        "choices",
        "cancelled",
        "preempted",
        "evicted",
        "copied",
        "shared",
        "resumed",
        "forked",
        "failed",
        "scored",
        "restored",
        "lost",
        "public",
        *(["lost by a window"] if windows else []),
    )
    assert min(seen[what] for what in wanted) > 5, seen


@pytest.mark.parametrize("tight", [6, 12])
@pytest.mark.parametrize("windows", [(), (3, 6)], ids=["", "windows"])
@pytest.mark.parametrize("lossy", [False, True], ids=["exact", "lossy"])
def test_in_pools_of_what_one_request_needs_each_comes_to_its_end(
    lossy: bool, windows: Tokens[int], tight: int
) -> None:
    seen = drive(CacheManager, Scheduler, Keeper, lossy, windows, settings(SETTINGS, max_examples=60), tight)
    assert min(seen[what] for what in ("choices", "cancelled", "evicted", "shared", "forked")) > 5, seen
    assert min(seen[what] for what in ("copied", "preempted", "failed")) > 0, seen


class CopiesNothing(CacheManager):
    def _shared(self, lease: Lease, first: int, end: int) -> list[int]:
        return []


class AdoptsOneTokenTooMany(CacheManager):
    def adopt(self, lease: Lease, tokens: Tokens[int], partly: bool = True) -> int:
        found = super().adopt(lease, tokens, partly)
        if found and lease.length % self.block_size and lease.length < len(tokens):
            lease.length += 1
            return found + 1
        return found


class PromisesTooMuch(Scheduler):
    """Forgets what the works of a step will take."""

    def _plan_work(self, plan: object, *rest: object, **options: object) -> None:
        super()._plan_work(plan, *rest, **options)  # type: ignore[arg-type]
        plan.spent = 0  # type: ignore[attr-defined]


class ForgetsWhoWasPreempted(Scheduler):
    def _give_up(self, victim: Sequence) -> None:
        super()._give_up(victim)
        self.waiting.remove(victim)


class CopiesAnotherBlock(Keeper):
    def _hand_over(self, node: Node) -> None:
        todo = self._unwritten.pop(node)
        self.kept.save(todo.block, self._store.read_block([node.block ^ 1, *node.windows]), todo.until)


class SeesTooLittle(WindowGroup):
    """Forgets the oldest block that is still seen."""

    def needed(self, length: int) -> list[int]:
        return super().needed(length)[1:]


class AdoptsWhatIsGone(WindowGroup):
    def fits(self, lease: Lease, start: int, nodes: Tokens[Node]) -> bool:
        return True


class CopiesNoWindow(WindowGroup):
    def reserve(self, lease: Lease, first: int, end: int) -> list[tuple[int, int]]:
        super().reserve(lease, first, end)
        return []


class KeepsAnotherBlock(WindowGroup):
    """Publishes a lease's block under the node of the next."""

    def publish(self, lease: Lease, index: int, node: Node) -> None:
        if node.windows[self.place] < 0 and index in lease.windows[self.place]:
            super().publish(lease, index - 1 if index - 1 in lease.windows[self.place] else index, node)


@pytest.mark.parametrize(
    ("manager", "scheduler", "keeper"),
    [
        (CopiesNothing, Scheduler, Keeper),
        (AdoptsOneTokenTooMany, Scheduler, Keeper),
        (CacheManager, PromisesTooMuch, Keeper),
        (CacheManager, ForgetsWhoWasPreempted, Keeper),
        (CacheManager, Scheduler, CopiesAnotherBlock),
    ],
)
def test_the_machine_notices_what_is_broken(
    manager: type[CacheManager], scheduler: type[Scheduler], keeper: type[Keeper]
) -> None:
    unshrunk = settings(SETTINGS, phases=[Phase.generate], print_blob=False)
    with pytest.raises((Exception, ExceptionGroup)):
        drive(manager, scheduler, keeper, False, (), unshrunk)


@pytest.mark.parametrize("group", [SeesTooLittle, AdoptsWhatIsGone, CopiesNoWindow, KeepsAnotherBlock])
def test_the_machine_notices_what_is_broken_of_windows(group: type[WindowGroup]) -> None:
    class Broken(CacheManager):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[arg-type]
            for one in self.windows:
                one.__class__ = group

    unshrunk = settings(SETTINGS, phases=[Phase.generate], print_blob=False)
    with pytest.raises((Exception, ExceptionGroup)):
        drive(Broken, Scheduler, Keeper, False, (3, 6), unshrunk)
