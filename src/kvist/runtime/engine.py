"""Grows every running sequence toward what is known of it, one step at a time, and draws what comes next."""

from collections import deque
from dataclasses import dataclass

from kvist.base.errors import InvariantError, RequestError
from kvist.base.units import plural
from kvist.runtime.batch import Work
from kvist.runtime.request import FinishReason, Request, Sequence
from kvist.runtime.runner import Runner
from kvist.runtime.sampler import sample


@dataclass(frozen=True)
class Drawn:
    """One new token of one sequence; `sequence.finish_reason` is set when it was the last."""

    sequence: Sequence
    token: int


class Engine:
    """Many sequences over one runner. There are no prefill and decode phases: a step computes, for each running
    sequence in the order of admission, as many of its not yet computed tokens as the step still has room for.

    A sequence is admitted when the blocks it may come to need are not promised to another, so a running sequence
    never runs out.
    """

    def __init__(self, runner: Runner, step_tokens: int | None = None) -> None:
        if step_tokens is not None and step_tokens < 1:
            raise ValueError(f"a step computes at least one token, got {step_tokens}")
        self.runner = runner
        self.step_tokens = min(step_tokens or runner.widths.most, runner.widths.most)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def add(self, request: Request) -> Sequence:
        """Queue a request. Raises `RequestError` when it can never run, saying by how much it does not fit."""
        config = self.runner.model.config
        length = len(request.prompt)
        if length > config.max_positions:
            raise RequestError(
                f"the prompt has {plural(length, 'token')}, {length - config.max_positions:,} more than the context of "
                f"{config.max_positions:,}"
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < config.vocab_size:
            raise RequestError(f"a token id of the prompt is outside the vocabulary of {config.vocab_size:,}")
        sequence = Sequence(request)
        needed, capacity = self._blocks(sequence), self.runner.manager.pool.capacity
        if needed > capacity:
            raise RequestError(f"the request needs {plural(needed, 'KV block')} and the pool has {capacity:,}")
        self._waiting.append(sequence)
        return sequence

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence between two steps, wherever it stands; its blocks go back. Ending it again does nothing."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        if sequence.lease is None:
            self._waiting.remove(sequence)
            return
        sequence.kv_blocks = len(sequence.lease.table)
        self.runner.manager.release(sequence.lease)
        self._running.remove(sequence)

    def step(self) -> list[Drawn]:
        """Run one step; returns the tokens it drew, in the order of admission. Does nothing when idle.

        When the model's numbers are not finite (`NumericsError`), the sequences of that step are ended first.
        """
        self._admit()
        scheduled = self._schedule()
        if not scheduled:
            return []
        try:
            logits = self.runner.run([work for _, work in scheduled])
        except BaseException:
            for sequence, _ in scheduled:
                self.finish(sequence, FinishReason.CANCELLED)
            raise
        drawn = []
        for (sequence, work), rows in zip(scheduled, logits, strict=True):
            if not work.logits:
                continue
            token = sample(rows[-1], sequence.request.sampling, len(sequence.tokens))
            sequence.tokens.append(token)
            drawn.append(Drawn(sequence, token))
            self._finish_if_done(sequence, token)
        return drawn

    def check(self) -> None:
        """Raises `InvariantError` unless the cache is consistent, each running sequence holds a live lease of its own
        that stops short of its last token, and no waiting one holds any.
        """
        manager = self.runner.manager
        manager.check()
        held = [sequence.lease for sequence in self._running]
        if len({id(lease) for lease in held}) < len(held) or not {*map(id, held)} <= {*map(id, manager.leases)}:
            raise InvariantError("a running sequence shares its lease or holds one that has ended")
        if any(lease is None or lease.length >= len(s.tokens) for lease, s in zip(held, self._running, strict=True)):
            raise InvariantError("a running sequence has nothing left to compute")
        if any(sequence.lease is not None for sequence in self._waiting):
            raise InvariantError("a waiting sequence holds a lease")

    def _blocks(self, sequence: Sequence) -> int:
        """The most blocks that a sequence may come to hold."""
        most = min(sequence.most_tokens, self.runner.model.config.max_positions)
        return self.runner.manager.blocks_for(most)

    def _admit(self) -> None:
        manager = self.runner.manager
        promised = sum(map(self._blocks, self._running))
        while self._waiting and promised + self._blocks(self._waiting[0]) <= manager.pool.capacity:
            sequence = self._waiting.popleft()
            sequence.lease = manager.open()
            self._running.append(sequence)
            promised += self._blocks(sequence)

    def _schedule(self) -> list[tuple[Sequence, Work]]:
        budget = self.step_tokens
        scheduled = []
        for sequence in self._running:
            lease = sequence.lease
            assert lease is not None
            tokens = sequence.tokens[lease.length : lease.length + budget]
            if not tokens:
                break
            reaches_end = lease.length + len(tokens) == len(sequence.tokens)
            scheduled.append((sequence, Work(lease, tokens, logits=int(reaches_end))))
            budget -= len(tokens)
        return scheduled

    def _finish_if_done(self, sequence: Sequence, token: int) -> None:
        request = sequence.request
        full = len(sequence.tokens) > self.runner.model.config.max_positions
        if token in request.stop_ids:
            self.finish(sequence, FinishReason.STOP)
        elif full or len(sequence.new_tokens) == request.max_tokens:
            self.finish(sequence, FinishReason.LENGTH)
