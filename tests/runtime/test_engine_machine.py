"""The engine over a runner without a model, driven at random: wrong KV anywhere shows as a wrong token.

Each written position stores a digest of the digest before it, as it is *read back from the blocks*, and of its token;
the logits are made of that digest. So a block that was adopted wrongly, copied short, evicted under a reader or written
by two changes what is drawn. Sealing is imitated as in `tests/cache/test_open_leases.py`. Behind the memory stands a
kept cache that writes and reads when it is told to, loses blocks, and fails in the middle of a load."""

from collections import Counter
from collections.abc import Sequence as Tokens
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from torch import Tensor

from kvist.base.errors import NumericsError
from kvist.base.events import CacheEvent, Evicted, Reserved
from kvist.cache.kept import Fetch, Fetched, KeptCounters, Losses
from kvist.cache.manager import CacheManager, Lease
from kvist.cache.pool import BlockPool
from kvist.cache.record import BlockId, Loss
from kvist.cache.tree import Node
from kvist.runtime.batch import Work
from kvist.runtime.engine import Engine
from kvist.runtime.keeper import Keeper
from kvist.runtime.request import FinishReason, Request, Sampling
from kvist.runtime.sampler import sample
from kvist.runtime.scheduler import Scheduler
from kvist.runtime.sequence import Sequence

SIZE = 4
BLOCKS = 12
RUNNING = 4
STEP = 11  # tokens
VOCAB = 8
BAD = VOCAB  # a token whose numbers are not finite
ONE = st.integers(0, 2**16)
SETTINGS = settings(max_examples=120, stateful_step_count=40, suppress_health_check=list(HealthCheck))

PROMPTS = st.builds(
    lambda text, shared, rest: tuple([(text * 5 + place * place) % 3 for place in range(shared)] + rest),
    st.integers(0, 2),
    st.integers(1, 18),
    st.lists(st.integers(0, 2), max_size=6),
)


def digest(before: int, token: int) -> int:
    return hash((before, token, 17))


def logits_of(digest: int) -> Tensor:
    return torch.tensor([(digest >> (5 * place)) % 7 for place in range(VOCAB)] + [-50], dtype=torch.float32)


class FakeRunner:
    """What the engine knows of a runner, over lists instead of tensors."""

    def __init__(self, manager: type[CacheManager], lossy: bool) -> None:
        self.events: list[CacheEvent] = []
        open_pool = BlockPool(2 * RUNNING + 3) if lossy else None
        self.manager = manager(BlockPool(BLOCKS), SIZE, self.events.append, open_pool)
        self.manager.make_public([place * place % 3 for place in range(2 * SIZE + 1)])
        self.widths = SimpleNamespace(most=64)
        self.sequences = RUNNING
        self.model = SimpleNamespace(
            config=SimpleNamespace(max_positions=BLOCKS * SIZE, vocab_size=VOCAB + 1, hidden_size=1),
            adapters=SimpleNamespace(ids=["tuned"]),
        )
        self.blocks: list[list[int | None]] = [[None] * SIZE for _ in range(BLOCKS)]
        self.open: list[list[int | None]] = [[None] * SIZE for _ in range(open_pool.capacity if open_pool else 0)]
        self.widest = 0
        self.store = self
        self.layout = SimpleNamespace(block_bytes=SIZE)

    def read_block(self, blocks: Tokens[int]) -> list[int | None]:
        return self.blocks[blocks[0]].copy()

    def write_block(self, blocks: Tokens[int], data: list[int | None]) -> None:
        assert None not in data
        self.blocks[blocks[0]] = list(data)

    def run(self, works: Tokens[Work]) -> list[Tensor]:
        self.widest = max(self.widest, sum(len(work.tokens) for work in works))
        reserved: list[Lease] = []
        try:
            for work in works:
                copies = self.manager.reserve(work.lease, len(work.tokens))
                reserved.append(work.lease)
                for copy in copies:
                    memory = self.open if copy.open else self.blocks
                    memory[copy.target] = memory[copy.source].copy()
            if any(BAD in work.tokens for work in works):
                raise NumericsError("not finite")
        except BaseException:
            for lease in reserved:
                self.manager.rollback(lease, lease.length)
            raise
        rows = [self._write(work.lease, work.tokens, len(work.adapter)) for work in works]
        for work in works:
            self.manager.commit(work.lease, len(work.tokens))
        return [
            torch.stack([logits_of(d) for d in row])[len(row) - w.logits :] for row, w in zip(rows, works, strict=True)
        ]

    def _write(self, lease: Lease, tokens: Tokens[int], start: int) -> list[int]:
        passing: dict[int, list[int | None]] = {}
        found = []
        for place, token in enumerate(tokens, lease.length):
            index, offset = divmod(place, SIZE)
            before = start if place == 0 else self._read(lease, place - 1, passing)
            assert before is not None, "a position that nobody has written"
            value = digest(before, token)
            if self.manager.open_pool is None:
                self.blocks[lease.table[index]][offset] = value
            else:
                block = (
                    self.open[lease.open[index]] if index in lease.open else passing.setdefault(index, [None] * SIZE)
                )
                block[offset] = value
                if offset == SIZE - 1:
                    self.blocks[lease.table[index]] = block.copy()
            found.append(value)
        return found

    def _read(self, lease: Lease, place: int, passing: dict[int, list[int | None]]) -> int | None:
        index, offset = divmod(place, SIZE)
        if index in lease.open:
            return self.open[lease.open[index]][offset]
        return passing[index][offset] if index in passing else self.blocks[lease.table[index]][offset]


class FakeKept:
    """What the keeper knows of a kept cache. Nothing is written or read but by `write` and `read`."""

    def __init__(self) -> None:
        self.tiers = ("fake",)
        self.rivals = ()
        self.losses = Losses(KeptCounters())
        self.records: dict[str, list[int | None]] = {}
        self.queue: dict[str, list[int | None]] = {}
        self.fetches: list[Fetch] = []
        self.room = 3
        self.hits = 0

    @property
    def has_room(self) -> bool:
        return len(self.queue) < self.room

    def has(self, block: BlockId) -> bool:
        return block.name in self.records

    def is_kept(self, block: BlockId) -> bool:
        return block.name in self.records or block.name in self.queue

    def save(self, block: BlockId, payload: list[int | None], until: float) -> None:
        self.queue[block.name] = payload

    def pin(self, blocks: Tokens[str], until: float) -> None:
        pass

    def fetch(self, blocks: Tokens[BlockId], start: int) -> Fetch:
        self.fetches.append(Fetch(blocks, start))
        return self.fetches[-1]

    def take(self, fetch: Fetch) -> Fetched:
        fetch.taken += 1
        return fetch.ready.popleft()

    def cancel(self, fetch: Fetch) -> None:
        fetch.cancelled = True
        fetch.ready.clear()

    def wait(self, fetches: Tokens[Fetch], seconds: float) -> None:
        self.read(1)

    def write(self, count: int) -> None:
        for name in list(self.queue)[:count]:
            self.records[name] = self.queue.pop(name)

    def read(self, count: int) -> None:
        self.fetches = [fetch for fetch in self.fetches if not fetch.done and not fetch.cancelled]
        for fetch in self.fetches:
            for block in fetch.blocks[fetch.read : fetch.read + count]:
                fetch.read += 1
                fetch.done = fetch.read == len(fetch.blocks)
                if block.name not in self.records:
                    fetch.done = True
                    break
                self.hits += 1
                fetch.ready.append(Fetched(block, self.records[block.name].copy(), "fake"))  # type: ignore[arg-type]


def alone(request: Request) -> list[int]:
    """What a request draws, from nothing."""
    tokens, value = list(request.prompt), len(request.adapter)
    for token in tokens:
        value = digest(value, token)
    while len(tokens) - len(request.prompt) < request.max_tokens and len(tokens) <= BLOCKS * SIZE:
        token = sample(logits_of(value), request.sampling, len(tokens))
        tokens.append(token)
        value = digest(value, token)
        if token in request.stop_ids:
            break
    return tokens[len(request.prompt) :]


class EngineMachine(RuleBasedStateMachine):
    def __init__(
        self,
        manager: type[CacheManager],
        scheduler: type[Scheduler],
        keeper: type[Keeper],
        lossy: bool,
        seen: Counter[str],
    ) -> None:
        super().__init__()
        self.runner = FakeRunner(manager, lossy)
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
        self.kept.losses.add(name, Loss.EVICTED)

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
            assert steps < 60 * (len(self.sequences) + 1), "nothing comes to its end"
        for sequence in self.sequences:
            self._compare(sequence)
        manager = self.runner.manager
        assert not list(manager.leases)
        assert manager.available == BLOCKS
        manager.tree.clear()
        manager.check()
        assert manager.pool.free == BLOCKS
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
        expected = alone(sequence.request)
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
    chosen: settings = SETTINGS,
) -> Counter[str]:
    seen: Counter[str] = Counter()
    run_state_machine_as_test(lambda: EngineMachine(manager, scheduler, keeper, lossy, seen), settings=chosen)
    return seen


@pytest.mark.parametrize("lossy", [False, True])
def test_whatever_comes_each_draws_what_it_draws_alone(lossy: bool) -> None:
    seen = drive(CacheManager, Scheduler, Keeper, lossy)
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
    )
    assert min(seen[what] for what in wanted) > 10, seen


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
        self.kept.save(todo.block, self._store.read_block([node.block ^ 1]), todo.until)


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
        drive(manager, scheduler, keeper, False, unshrunk)
