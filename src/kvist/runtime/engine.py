"""Grows every running sequence toward what is known of it, one step at a time, and draws what comes next."""

import logging
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvist.base.errors import ContextError, KvistError, PromptTooLong, RequestError
from kvist.base.units import plural
from kvist.cache.kept import KeptCache
from kvist.runtime.batch import Work
from kvist.runtime.keeper import Keeper
from kvist.runtime.request import FinishReason, Request, TokenLogprobs
from kvist.runtime.runner import Runner
from kvist.runtime.sampler import Sampler, check_bias, token_logprobs
from kvist.runtime.scheduler import Scheduler
from kvist.runtime.sequence import Sequence

_log = logging.getLogger("kvist.engine")

# Seconds that a step waits for blocks that are read, when there is nothing to compute.
_PATIENCE = 0.02


@dataclass(frozen=True)
class Drawn:
    """One new token of one sequence; `sequence.finish_reason` is set when it was the last.

    `token` is None where a sequence ended without one: it asked for none, or failed.
    """

    sequence: Sequence
    token: int | None
    logprobs: TokenLogprobs | None = None


@dataclass
class Counters:
    """What the engine has done since it was made."""

    steps: int = 0
    computed: int = 0  # tokens
    drawn: int = 0  # tokens
    sequences: int = 0  # in the last step


class Engine:
    """Many sequences over one runner. The scheduler decides what a step computes; the engine runs it, publishes the
    blocks that are now full, and draws the tokens. `step_tokens`: the most tokens of one step, by default as wide as
    exact. `kept`: the tiers behind the memory; without them what does not fit there is computed again."""

    def __init__(self, runner: Runner, step_tokens: int | None = None, kept: KeptCache | None = None) -> None:
        if step_tokens is not None and step_tokens < 1:
            raise ValueError(f"a step computes at least one token, got {step_tokens}")
        self.runner = runner
        self.keeper = Keeper(runner.manager, runner.store, kept or KeptCache((), runner.layout.block_bytes), time.time)
        most = min(step_tokens or runner.widths.most, runner.widths.most)
        self.scheduler = Scheduler(runner.manager, most, runner.sequences, self.keeper)
        self.counters = Counters()
        self._added = 0

    @property
    def idle(self) -> bool:
        return not self.scheduler.waiting and not self.scheduler.running

    def check_request(self, request: Request) -> None:
        """Raises `RequestError` when it can never run, saying by how much it does not fit. May be called at any time,
        from any thread."""
        config = self.runner.model.config
        length = len(request.prompt)
        if length > config.max_positions:
            raise PromptTooLong(length, config.max_positions, config.max_positions)
        if not 0 <= min(request.prompt) <= max(request.prompt) < config.vocab_size:
            raise RequestError(f"a token id of the prompt is outside the vocabulary of {config.vocab_size:,}")
        known = () if self.runner.model.adapters is None else self.runner.model.adapters.ids
        if request.adapter and request.adapter not in known:
            raise RequestError(f"there is no adapter {request.adapter[:40]!r}")
        check_bias(request.sampling, config.vocab_size)
        most = min(length + max(request.max_tokens - 1, 0), config.max_positions)
        manager = self.runner.manager
        (needed, *others), (capacity, *pools) = manager.most_blocks(most), manager.capacities
        if manager.most_blocks(length)[0] > capacity:
            room = capacity * manager.block_size
            raise PromptTooLong(length, room, room)
        if needed > capacity:
            raise ContextError(
                f"the request needs {plural(needed, 'KV block')} and the pool has {capacity:,}: it may come to "
                f"{most:,} tokens and {capacity * manager.block_size:,} fit"
            )
        names = [*(f"the layers with a window of {group.window.size:,}" for group in manager.windows), "open ones"]
        for name, needed, capacity in zip(names, others, pools, strict=False):
            if needed > capacity:
                raise ContextError(
                    f"the request needs {plural(needed, 'KV block')} of {name} and their pool has {capacity:,}"
                )

    def add(self, request: Request) -> Sequence:
        """Queue a request. Raises `RequestError` when it can never run."""
        return self.add_choices(request, 1)[0]

    def add_choices(self, request: Request, choices: int) -> list[Sequence]:
        """Queue several answers to one prompt, which is computed once. Choice `i` draws with the request's seed + i."""
        self.check_request(request)
        now = time.perf_counter()
        sequences = []
        for index in range(choices):
            sampling = replace(request.sampling, seed=(request.sampling.seed + index) % 2**64)
            grammar = request.grammar() if request.grammar else None
            ends, held = request.stop_ids, request.min_tokens
            sampler = Sampler(sampling, request.prompt, grammar, ends=ends, min_tokens=held)
            sequence = Sequence(replace(request, sampling=sampling), self._added, sampler)
            sequence.times.added = now
            if request.pooled:
                sequence.pooled = torch.zeros(self.runner.model.config.hidden_size, dtype=torch.float64)
            self._added += 1
            sequences.append(sequence)
        first, *twins = sequences
        self._lead(first, twins)
        self.scheduler.add(first)
        return sequences

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence between two steps, wherever it stands; its blocks go back, or stay in the prefix tree as long
        as there is room. Ending it again does nothing."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        if sequence.leader is not None:
            sequence.leader.twins.remove(sequence)
            sequence.leader = None
            return
        self.scheduler.remove(sequence)
        self.keeper.drop(sequence)
        if sequence.lease is not None:
            sequence.kv_blocks = len(sequence.lease.table)
            # After a defect nobody should find what was computed.
            self.runner.manager.release(sequence.lease, None if reason is FinishReason.FAILED else sequence.tokens)
        if sequence.twins:
            first, *others = sequence.twins
            sequence.twins = []
            self._lead(first, others)
            self.scheduler.add(first)

    def step(self) -> list[Drawn]:
        """Run one step; returns the tokens it drew, and the sequences that ended without one. Does nothing when idle.

        Whatever fails ends a sequence, with its `error`, so that no step is tried again and again: the one whose
        numbers are not finite (`NumericsError`), whose grammar fails, or in whose work or publishing a defect shows;
        where no one can be told from the others, all that run. The others go on. What interrupts a step
        (`KeyboardInterrupt`) ends those that run, and is raised.
        """
        try:
            return self._step()
        except BaseException:
            for sequence in list(self.scheduler.running):
                self.finish(sequence, FinishReason.CANCELLED)
            raise

    def check(self) -> None:
        """Raises `InvariantError` unless the cache and the scheduler are consistent."""
        self.runner.manager.check()
        self.scheduler.check()

    def _step(self) -> list[Drawn]:
        try:
            self.keeper.advance(self.scheduler.running)
            works = self.scheduler.plan()
            if not works:
                self.keeper.wait(self.scheduler.running, _PATIENCE)
                return []
        except Exception as error:
            # Those that run hold all that a step is planned over. Where none does it is a new one that fails.
            return [self._fail(sequence, error) for sequence in self.scheduler.running or self.scheduler.waiting[:1]]
        self.counters.steps += 1
        self.counters.sequences = len(works)
        self.counters.computed += sum(len(work.tokens) for work in works.values())
        drawn: list[Drawn] = []
        for sequence, logits in self._run(works):
            if isinstance(logits, Exception):
                drawn.append(self._fail(sequence, logits))
                continue
            try:
                drawn += self._advance(sequence, logits)
            except Exception as error:
                drawn.append(self._fail(sequence, error))
        return drawn

    def _lead(self, first: Sequence, twins: list[Sequence]) -> None:
        first.leader = None
        first.twins = twins
        for twin in twins:
            twin.leader = first

    def _run(self, works: dict[Sequence, Work]) -> list[tuple[Sequence, Tensor | Exception]]:
        """Each sequence with its logits, or why it has none. A step that fails is run again one by one: the same
        bits."""
        try:
            return list(zip(works, self.runner.run(list(works.values())), strict=True))
        except Exception as error:
            if len(works) > 1:
                return [pair for sequence, work in works.items() for pair in self._run({sequence: work})]
            return [(sequence, error) for sequence in works]

    def _fail(self, sequence: Sequence, error: Exception) -> Drawn:
        """End a sequence because of what its request met, or of a defect, which goes to the log."""
        if not isinstance(error, KvistError):
            _log.error("a step failed", exc_info=error)
            error = KvistError("the engine failed on this request; the log says why")
        sequence.error = error
        self.finish(sequence, FinishReason.FAILED)
        return Drawn(sequence, None)

    def _advance(self, sequence: Sequence, logits: Tensor) -> list[Drawn]:
        """What follows from a step of one sequence."""
        lease, request = sequence.lease, sequence.request
        assert lease is not None
        self.keeper.keep(sequence, self.runner.manager.publish(lease, sequence.tokens))
        self._note_prompt(sequence, logits)
        if lease.length < len(sequence.tokens):
            return []
        if request.max_tokens == 0:
            self.finish(sequence, FinishReason.LENGTH)
            return [Drawn(sequence, None)]
        forked = [sequence]
        while sequence.twins:
            twin = sequence.twins[0]
            if len(self.scheduler.running) < self.scheduler.most_running:
                twin.lease = self.runner.manager.fork(lease)
                twin.cached.fork = len(request.prompt)
                twin.prompt_logprobs = sequence.prompt_logprobs
                twin.times.admitted = sequence.times.admitted
                self.scheduler.run(twin)
                forked.append(twin)
            else:
                self.scheduler.add(twin)
            twin.leader = None
            del sequence.twins[0]
        return [self._draw(one, logits[-1]) for one in forked]

    def _note_prompt(self, sequence: Sequence, logits: Tensor) -> None:
        """Keep the log-probabilities of the prompt's tokens that these logits predict, and that are not known yet."""
        prompt, wanted = sequence.request.prompt, sequence.request.prompt_logprobs
        assert sequence.lease is not None
        if wanted is None:
            return
        first = sequence.lease.length - len(logits)  # the position of the first row; it predicts the next
        known = len(sequence.prompt_logprobs)
        rows = logits[known - first : len(prompt) - 1 - first] if known >= first else logits[:0]
        if len(rows):
            sequence.prompt_logprobs += token_logprobs(rows, prompt[known + 1 : known + 1 + len(rows)], wanted)

    def _draw(self, sequence: Sequence, row: Tensor) -> Drawn:
        request, logprobs = sequence.request, None
        try:
            token = sequence.sampler.draw(row, len(sequence.tokens))
            sequence.sampler.accept(token)
            if request.logprobs is not None:
                (logprobs,) = token_logprobs(row[None], [token], request.logprobs)
        except Exception as error:
            return self._fail(sequence, error)
        sequence.tokens.append(token)
        self.counters.drawn += 1
        times = sequence.times
        times.last = time.perf_counter()
        times.first = times.first or times.last
        full = len(sequence.tokens) > self.runner.model.config.max_positions
        if token in request.stop_ids or sequence.sampler.ended:
            self.finish(sequence, FinishReason.STOP)
        elif full or len(sequence.tokens) - len(request.prompt) >= request.max_tokens:
            self.finish(sequence, FinishReason.LENGTH)
        return Drawn(sequence, token, logprobs)
