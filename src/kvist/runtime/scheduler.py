"""Decides what the next step computes. Owns the queue and the running sequences; holds no tensor, draws no token.

There are no prefill and decode phases: a step computes, for each running sequence, tokens that are known and not yet in
the cache. In order:

1. Sequences that wait only for their last token, those longest not served first: one token each.
2. New ones are admitted as long as their tokens find room.
3. The prompts under way share what is left of the step. The first in line gets at least half, so that it never waits
   for those behind it; the rest goes to the shortest, so that a short question does not wait for a long document.

A line is made of places, which go to tenants by what is fair; the places of one tenant go to its sequences by priority.
So priorities count within a tenant, and no tenant comes before another by asking for it.

When blocks run out, the last in line is preempted: its blocks stay in the prefix tree until they are needed, and what
was evicted is computed again. The first in line is never preempted for another, and one that is alone always finds the
blocks that it needs (see `cache.manager`), so something always ends."""

import operator
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from kvist.base.errors import InvariantError, OutOfBlocks
from kvist.cache.manager import CacheManager, Lease, Room, fits
from kvist.cache.tier import MEMORY
from kvist.cache.tree import Node
from kvist.runtime.batch import Work
from kvist.runtime.request import Request
from kvist.runtime.sequence import Cached, Sequence

# The widest step, in tokens, while somebody waits for the next token of an answer: prompts must not make answers
# stutter.
BESIDE_ANSWERS = 128
# Rows of logits that one step may give: each is as wide as the vocabulary.
LOGIT_ROWS = 128


@dataclass
class _Plan:
    """The step as planned so far. `room`: tokens it still takes; `costs`: the blocks that its reservations will take,
    and `spent` all of these."""

    room: int
    spent: Room
    works: dict[Sequence, Work] = field(default_factory=dict)
    costs: dict[Sequence, Room] = field(default_factory=dict)
    preempted: bool = False

    def add(self, sequence: Sequence, work: Work, cost: Room) -> None:
        self.works[sequence] = work
        self.costs[sequence] = cost
        self.spent = tuple(map(operator.add, self.spent, cost))
        self.room -= len(work.tokens)

    def drop(self, sequence: Sequence) -> None:
        """Take back what was planned for a sequence, if anything was."""
        if work := self.works.pop(sequence, None):
            self.spent = tuple(map(operator.sub, self.spent, self.costs.pop(sequence)))
            self.room += len(work.tokens)


class Loader(Protocol):
    """Brings back what is kept of a sequence outside of memory. While its `fetch` is set nothing of it is computed."""

    def begin(self, sequence: Sequence) -> None:
        """It has just got its lease."""
        ...

    def drop(self, sequence: Sequence) -> None:
        """It is about to lose it."""
        ...


class Scheduler:
    """`step_tokens`: the most tokens of one step. `most_running`: how many sequences may hold leases at once. `loader`:
    where something is kept outside of memory."""

    def __init__(
        self, manager: CacheManager, step_tokens: int, most_running: int, loader: Loader | None = None
    ) -> None:
        if min(step_tokens, most_running) < 1:
            raise ValueError(f"a step computes at least one token, got {min(step_tokens, most_running)}")
        self.step_tokens = step_tokens
        self.most_running = most_running
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._manager = manager
        self._loader = loader
        # Tokens computed for each tenant that has asked for something. A tenant that comes back starts with the others:
        # what it did not use is not saved up (virtual token counter, Sheng et al., OSDI 2024, section 4).
        self._served: dict[str, float] = {}
        # Who was last found to have no room, and how many blocks could be had then: until there are more, and as long
        # as nobody comes before it, it is not looked at again, as looking takes a walk through the prefix tree.
        self._refused: tuple[Sequence, Room] | None = None
        self._step = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        tenant = sequence.request.tenant
        active = {other.request.tenant for other in (*self.waiting, *self.running)}
        if tenant not in active:
            floor = min((self._served[other] for other in active), default=0.0)
            self._served[tenant] = max(self._served.get(tenant, 0.0), floor)
        self.waiting.append(sequence)

    def run(self, sequence: Sequence) -> None:
        """A sequence that has its lease joins the running ones."""
        sequence.turn = self._served[sequence.request.tenant]
        self.running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it stands. Its lease is the caller's."""
        (self.waiting if sequence in self.waiting else self.running).remove(sequence)

    def plan(self) -> dict[Sequence, Work]:
        """The works of the next step, which fit the pool together; leases are opened, lengthened and ended on the way.

        Empty when nothing is waiting or running, and now and then when somebody was preempted.
        """
        self._step += 1
        for sequence in self.running:
            self._adopt(sequence)
        answers = [sequence for sequence in self.running if sequence.pending == 1]
        room = min(self.step_tokens, BESIDE_ANSWERS) if answers else self.step_tokens
        plan = _Plan(room, tuple(0 for _ in self._manager.room))
        self._plan_answers(plan, answers)
        if not plan.preempted:
            self._admit(plan)
            # A block that was lent to one of these by the tree may have got another holder.
            for sequence, work in list(plan.works.items()):
                plan.drop(sequence)
                plan.add(sequence, work, self._manager.cost(work.lease, len(work.tokens)))
        self._plan_prompts(plan)
        for sequence, work in plan.works.items():
            sequence.last_step = self._step
            self._served[sequence.request.tenant] += len(work.tokens)
        return plan.works

    def check(self) -> None:
        """Raises `InvariantError` unless each running sequence holds a live lease of its own that stops short of its
        last token, and no waiting one holds any."""
        leases = [sequence.lease for sequence in self.running]
        if len(set(map(id, leases))) < len(leases) or not {*map(id, leases)} <= {*map(id, self._manager.leases)}:
            raise InvariantError("a running sequence shares its lease or holds one that has ended")
        if any(sequence.pending < 1 for sequence in self.running):
            raise InvariantError("a running sequence has nothing left to compute")
        if any(sequence.lease is not None for sequence in self.waiting):
            raise InvariantError("a waiting sequence holds a lease")
        if len(self.running) > self.most_running:
            raise InvariantError(f"{len(self.running)} sequences run where {self.most_running} may")

    def _by_share(self, sequence: Sequence) -> tuple[float, int]:
        """Places of those that want to be computed: whose tenant was served least, then who came first."""
        return self._served[sequence.request.tenant], sequence.number

    def _victim(self) -> Sequence:
        """The last in line of those that run. Places go by the tenants' shares when each was admitted, so that they
        stay as they are while it runs."""
        return _line(self.running, lambda s: (s.turn, s.number))[-1]

    def _plan_answers(self, plan: _Plan, answers: list[Sequence]) -> None:
        """One token each, while there is room; a quarter of it is left to prompts where there are some."""
        prompts = len(answers) < len(self.running) or self.waiting
        kept = plan.room // 4 if prompts else 0
        for sequence in _line(answers, lambda s: (s.last_step, s.number)):
            if plan.room <= kept:
                break
            if sequence.lease is not None:  # it may have been preempted for one before it
                self._plan_work(plan, sequence, 1)

    def _plan_prompts(self, plan: _Plan) -> None:
        ready = (s for s in self.running if s not in plan.works and s.pending > 1 and s.fetch is None)
        prompts = self._without_twins(_line(ready, self._by_share))
        if not prompts or plan.room < 1:
            return
        first, others = prompts[0], sorted(prompts[1:], key=lambda s: s.pending)
        for_others = min(plan.room // 2, sum(sequence.pending for sequence in others))
        self._plan_work(plan, first, plan.room - for_others)
        for sequence in others:
            if plan.room < 1:
                break
            if sequence.lease is not None:
                self._plan_work(plan, sequence, plan.room, may_preempt=not plan.works)

    def _without_twins(self, prompts: list[Sequence]) -> list[Sequence]:
        """Less those whose next block another computes just now: once it is published they adopt it."""
        size = self._manager.block_size
        under_way: set[tuple[Node, tuple[int, ...]]] = set()
        kept = []
        for sequence in prompts:
            assert sequence.lease is not None
            start = sequence.lease.length // size * size
            block = tuple(sequence.tokens[start : start + size])
            if len(block) == size and start + size <= sequence.reusable:
                key = sequence.lease.tip, block
                if key in under_way and sequence.lease.length == start:
                    continue
                under_way.add(key)
            kept.append(sequence)
        return kept

    def _plan_work(self, plan: _Plan, sequence: Sequence, most: int, may_preempt: bool = True) -> None:
        """Plan the next tokens of a sequence, at most `most`: as many as there are blocks for, at least one if others
        can be preempted for it."""
        lease = sequence.lease
        assert lease is not None
        request, size = sequence.request, self._manager.block_size
        count = min(most, sequence.pending)
        watched = request.prompt_logprobs is not None and lease.length < len(request.prompt) - 1
        if watched:
            count = min(count, LOGIT_ROWS)
        most, left = count, self._left(plan)
        while not fits(cost := self._manager.cost(lease, count), left):
            # As far as the block border before, or else all of it beside one less.
            count = (lease.length + count - 1) // size * size - lease.length
            if count <= 0:
                if not may_preempt or not self._preempt(plan, sequence):
                    return
                count, left = most, self._left(plan)
        tokens = sequence.tokens[lease.length : lease.length + count]
        ends = lease.length + count == len(sequence.tokens)
        logits = count if watched else int(ends and request.max_tokens > 0)
        plan.add(sequence, Work(lease, tokens, logits, sequence.pooled, request.adapter), cost)

    def _left(self, plan: _Plan) -> Room:
        """The blocks of each pool that are left."""
        return tuple(map(operator.sub, self._manager.room, plan.spent))

    def _preempt(self, plan: _Plan, wanting: Sequence) -> bool:
        """Make room for `wanting`: the last in line gives up its lease. False when that was `wanting` itself."""
        if len(self.running) == 1:
            raise OutOfBlocks(self._manager.blocks_for(len(wanting.tokens)), self._manager.available)
        victim = self._victim()
        plan.drop(victim)
        self._give_up(victim)
        plan.preempted = True
        return victim is not wanting

    def _give_up(self, victim: Sequence) -> None:
        """A running sequence goes back to the queue."""
        assert victim.lease is not None
        if self._loader is not None:
            self._loader.drop(victim)
        self._manager.release(victim.lease, victim.tokens)
        victim.lease = None
        victim.preempted += 1
        if not victim.last_step:
            victim.cached = Cached()  # nothing of it was used yet
        if victim.pooled is not None:
            victim.pooled.zero_()
        self.running.remove(victim)
        self.waiting.append(victim)
        self.preemptions += 1

    def _admit(self, plan: _Plan) -> None:
        while self.waiting:
            sequence = _line(self.waiting, self._by_share)[0]
            if not self._has_room(sequence):
                own = [other for other in self.running if other.request.tenant == sequence.request.tenant]
                victim = max(own, key=lambda s: (s.request.priority, s.number), default=None)
                if victim is None or victim.request.priority <= sequence.request.priority:
                    return
                plan.drop(victim)
                self._give_up(victim)
                continue
            self.waiting.remove(sequence)
            self.run(sequence)
            if self._loader is not None:
                self._loader.begin(sequence)
            sequence.times.admitted = sequence.times.admitted or time.perf_counter()

    def _has_room(self, sequence: Sequence) -> bool:
        """Give the sequence a lease, with what the prefix tree holds of it, if all its tokens fit beside the running
        ones.

        A block more is asked for each of these, so that they do not preempt it with their next tokens.
        """
        room = self._manager.room
        if len(self.running) >= self.most_running or (self.running and self._is_refused(sequence, room)):
            return False
        lease = sequence.lease = self._open(sequence.request)
        self._adopt(sequence)
        growth = {s.lease: self._promised(s) for s in self.running if s.lease is not None}
        if not self.running or self._manager.can_grow(growth | {lease: sequence.pending}):
            return True
        sequence.count_cached(-lease.length, MEMORY)  # it will be found, and counted, again
        self._manager.release(lease)
        sequence.lease = None
        self._refused = sequence, room
        return False

    def _promised(self, sequence: Sequence) -> int:
        """Tokens that a running sequence finds room for whoever is admitted."""
        assert sequence.lease is not None
        most = max(sequence.most_tokens, len(sequence.tokens)) - sequence.lease.length
        return min(sequence.pending + self._manager.block_size, most)

    def _open(self, request: Request) -> Lease:
        """A lease for a request. What is public was computed without an adapter."""
        return self._manager.open(request.namespace, () if request.adapter else request.prompt)

    def _is_refused(self, sequence: Sequence, room: Room) -> bool:
        return self._refused is not None and self._refused[0] is sequence and fits(room, self._refused[1])

    def _adopt(self, sequence: Sequence) -> None:
        """Lengthen a lease by what the prefix tree holds of its sequence."""
        assert sequence.lease is not None
        if sequence.fetch or sequence.pending == 1 or sequence.lease.length % self._manager.block_size:
            return
        found = self._manager.adopt(sequence.lease, sequence.tokens[: sequence.reusable])
        sequence.count_cached(found, MEMORY)


def _line(sequences: Iterable[Sequence], place: Callable[[Sequence], tuple[float, int]]) -> list[Sequence]:
    """These in order of `place`, where the places of each tenant are taken by its own, the more urgent first."""
    line = sorted(sequences, key=place)
    own: dict[str, list[Sequence]] = {}
    for sequence in line:
        own.setdefault(sequence.request.tenant, []).append(sequence)
    urgent = {tenant: iter(sorted(ours, key=lambda s: s.request.priority)) for tenant, ours in own.items()}
    return [next(urgent[sequence.request.tenant]) for sequence in line]
