"""Is a run with the cache, bit for bit, a run without it? Generates both ways, and tries to break it.

Every check compares the float32 logits of our paged runs with those of a run from nothing: a fresh lease, the whole
sequence, as few steps as possible. `plain attention` then compares that run itself with an implementation that has
no pages, no tiles and no cache; those bits may differ, so it has a tolerance, which is measured
(`kvist.evals.plain_attention`), and is no statement about bits.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

import torch
from rich.table import Table
from torch import Tensor

from kvist.base.errors import RequestError
from kvist.base.events import CacheEvent, Reserved
from kvist.base.tables import Tabular
from kvist.cache.manager import Lease
from kvist.evals.plain_attention import nearness
from kvist.runtime.batch import Work
from kvist.runtime.engine import Engine
from kvist.runtime.request import Request, Sampling
from kvist.runtime.runner import Runner
from kvist.runtime.sampler import sample
from kvist.runtime.sequence import Sequence as Running
from kvist.service.loaded import Loaded


class Kind(StrEnum):
    """What a check compares: bits, which must be equal, or numbers, which must be near each other."""

    EXACT = "exact"
    NEARLY = "nearly"


@dataclass(frozen=True)
class Check:
    """One claim. `compared`: logit rows (or tokens) held against each other; `evidence`: proof that the feature
    under test was in use, as counts, and where the first difference stands if there is one."""

    name: str
    kind: Kind
    passed: bool
    compared: int
    evidence: dict[str, int | float | str]


@dataclass(frozen=True)
class Report(Tabular):
    """`title`: what was verified. `to_json` is documented in docs/json.md."""

    title: str
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def exact(self) -> bool:
        """Whether no bit differed where bits are compared."""
        return all(check.passed for check in self.checks if check.kind is Kind.EXACT)

    def tables(self) -> list[Table]:
        table = Table("check", "result", "compared", "evidence", title=self.title, title_justify="left")
        for check in self.checks:
            evidence = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in check.evidence.items())
            good, bad = ("equal", "DIFFERS") if check.kind is Kind.EXACT else ("near", "FAR")
            result = f"[green]{good}[/]" if check.passed else f"[red]{bad}[/]"
            table.add_row(check.name, result, f"{check.compared:,}", evidence)
        return [table]

    def to_json(self) -> dict[str, object]:
        return {"passed": self.passed, "exact": self.exact, "checks": [asdict(check) for check in self.checks]}


def _short(value: float | str) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)


class Comparison:
    """Counts rows held against each other and remembers the first pair that is not the same."""

    def __init__(self) -> None:
        self.compared = 0
        self.difference: dict[str, int | float | str] = {}

    def rows(self, ours: Tensor, expected: Tensor, where: str) -> None:
        """Bit for bit. `ours`, `expected`: `[rows, vocab]`."""
        self.compared += len(expected)
        if not self.difference and not torch.equal(ours, expected):
            delta = (ours - expected).abs().amax(-1)
            row = int(delta.nonzero()[0]) if bool(delta.any()) else 0
            self.difference = {"differs_at": f"{where}, row {row}", "largest": float(delta.max())}

    def tokens(self, ours: Sequence[int], expected: Sequence[int], where: str) -> None:
        self.compared += len(expected)
        if not self.difference and list(ours) != list(expected):
            first = next((i for i, pair in enumerate(zip(ours, expected, strict=False)) if pair[0] != pair[1]), 0)
            self.difference = {"differs_at": f"{where}, token {first}"}

    def check(self, name: str, evidence: dict[str, int | float | str]) -> Check:
        return Check(name, Kind.EXACT, not self.difference, self.compared, evidence | self.difference)


class Verifier:
    """The checks of one model. `length` prompt tokens and `steps` generated ones, random ids from `seed`."""

    def __init__(self, loaded: Loaded, length: int = 560, steps: int = 24, trials: int = 6, seed: int = 0) -> None:
        context = loaded.config.max_positions
        if context < 8:
            raise RequestError(f"a context of {context} tokens is too short to verify anything (8 are needed)")
        self.steps = min(steps, context // 2)
        self.length = min(length, context - self.steps)
        self.trials = trials
        self.loaded = loaded
        self.random = random.Random(seed)
        self.copies = 0
        self.engine = loaded.engine(loaded.room(self.length + self.steps, sequences=6), listener=self._count)
        self.runner: Runner = self.engine.runner

    @property
    def title(self) -> str:
        """The model, and what it runs on."""
        loaded = self.loaded
        kinds = f"operators {loaded.backend.name} · weights {loaded.model.weights} · KV {loaded.layout.kv}"
        return f"{loaded.name} · {kinds}"

    def run(self) -> Iterator[Check]:
        """The checks, one by one as they end."""
        yield self.generation("greedy: cached = recomputed", Sampling())
        yield self.generation("seeded: cached = recomputed", Sampling(temperature=0.8, top_p=0.95, seed=7))
        yield self.chunkings()
        yield self.batches()
        yield self.engine_beside_others()
        yield self.shared_prefixes()
        yield self.rollbacks()
        yield self.forks()
        yield self.plain_attention()
        self.runner.manager.check()

    def generation(self, name: str, sampling: Sampling) -> Check:
        """Draw `steps` tokens with the cache; at each one, compute everything again from nothing."""
        comparison, tokens = Comparison(), self._tokens(self.length)
        lease = self.runner.manager.open()
        logits = self._feed(lease, tokens)[-1:]
        for step in range(self.steps):
            again = self._fresh(tokens)[-1:]
            comparison.rows(logits, again, f"step {step}")
            token, expected = (sample(row[0], sampling, len(tokens)) for row in (logits, again))
            comparison.tokens([token], [expected], f"step {step}")
            tokens.append(token)
            logits = self._feed(lease, [token])
        evidence = {"prompt": self.length, "steps": self.steps, "blocks_read_from_cache": len(lease.table)}
        self.runner.manager.release(lease)
        return comparison.check(name, evidence)

    def chunkings(self) -> Check:
        """The same tokens in random chunks, from single tokens up."""
        comparison, tokens = Comparison(), self._tokens(self.length)
        expected, chunks = self._fresh(tokens), 0
        for trial in range(self.trials):
            lease, parts = self.runner.manager.open(), []
            while lease.length < len(tokens):
                # Sizes from one token to the widest step, small ones as often as large ones.
                size = int(self.runner.widths.most ** self.random.random())
                parts.append(self._feed(lease, tokens[lease.length : lease.length + size]))
            comparison.rows(torch.cat(parts), expected, f"chunking {trial}")
            chunks += len(parts)
            self.runner.manager.release(lease)
        return comparison.check("chunked = whole", {"trials": self.trials, "chunks": chunks})

    def batches(self) -> Check:
        """Several sequences of random lengths grow side by side, in random strides; each equals itself alone."""
        comparison = Comparison()
        most = self.runner.widths.most
        texts = [self._tokens(self.random.randint(1, self.length)) for _ in range(5)]
        leases = [self.runner.manager.open() for _ in texts]
        parts: list[list[Tensor]] = [[] for _ in texts]
        steps = widest = 0
        while pending := [i for i, text in enumerate(texts) if leases[i].length < len(text)]:
            works = []
            for index in pending:
                stride = self.random.randint(1, max(1, most // len(pending)))
                tokens = texts[index][leases[index].length :][:stride]
                works.append(Work(leases[index], tokens, len(tokens)))
            for index, logits in zip(pending, self.runner.run(works), strict=True):
                parts[index].append(logits)
            steps, widest = steps + 1, max(widest, len(works))
        for index, text in enumerate(texts):
            self.runner.manager.release(leases[index])
            comparison.rows(torch.cat(parts[index]), self._fresh(text), f"sequence {index}")
        return comparison.check("batched = alone", {"sequences": len(texts), "steps": steps, "side_by_side": widest})

    def engine_beside_others(self) -> Check:
        """Seeded requests arriving at random on one engine draw the tokens that they draw alone."""
        requests = [self._request(self._tokens(self.random.randint(1, self.length)), seed) for seed in range(5)]
        comparison = self._against_alone(requests, self._run_to_end(self.engine, requests))
        return comparison.check("seeded requests: together = alone", {"requests": len(requests)})

    def shared_prefixes(self) -> Check:
        """Requests that begin alike, in a pool too small for all, the more urgent ones last: they read each other's
        blocks, preempt each other, and draw the tokens that each draws alone."""
        base, requests = self._tokens(self.length), []
        for seed in range(8):
            prompt = base[: self.random.randint(self.length // 2, self.length)]
            own = self._tokens(self.random.randint(0, self.length - len(prompt)))
            requests.append(self._request([*prompt, *own], seed, priority=-seed))
        size = self.loaded.layout.block_size
        blocks = 2 * -(-(self.length + self.steps) // size)
        runner = Runner(self.loaded.model, self.loaded.layout, blocks, self.loaded.backend, sequences=3)
        engine = Engine(runner, step_tokens=max(4, self.length // 8))  # so that they meet
        sequences = self._run_to_end(engine, requests)
        comparison = self._against_alone(requests, sequences)
        engine.check()
        evidence: dict[str, int | float | str] = {
            "requests": len(requests),
            "tokens_shared": sum(sequence.cached.prompt for sequence in sequences),
            "preemptions": engine.scheduler.preemptions,
        }
        return comparison.check("prefixes shared, preempted = alone", evidence)

    def rollbacks(self) -> Check:
        """Wrong tokens are written, then taken back, at random places: nothing of them remains."""
        comparison, tokens = Comparison(), self._tokens(self.length)
        expected, taken_back, recomputed = self._fresh(tokens), 0, 0
        for trial in range(self.trials):
            lease, kept = self.runner.manager.open(), self.random.randint(0, self.length - 1)
            if kept:
                self._feed(lease, tokens[:kept])
            wrong = self.random.randint(1, self.length - kept)
            self._feed(lease, self._tokens(wrong))
            back = self.random.randint(0, kept)
            taken_back += lease.length - back
            self.runner.manager.rollback(lease, back)
            # Where codecs are lossy, a block that is coded cannot be cut: the lease ends before it.
            recomputed += back - lease.length
            back = lease.length
            comparison.rows(self._feed(lease, tokens[back:]), expected[back:], f"trial {trial}")
            self.runner.manager.release(lease)
        evidence: dict[str, int | float | str] = {"trials": self.trials, "tokens_taken_back": taken_back}
        if self.loaded.layout.open_bytes:
            evidence["tokens_computed_again"] = recomputed
        return comparison.check("rolled back = never written", evidence)

    def forks(self) -> Check:
        """Two sequences share a prefix and part in the middle of a block: neither sees the other's tokens."""
        comparison = Comparison()
        copies = self.copies
        for trial in range(self.trials):
            shared = self.random.randint(1, self.length - 2)
            one, two = self._tokens(self.length), self._tokens(self.length)
            two[:shared] = one[:shared]
            lease = self.runner.manager.open()
            self._feed(lease, one[:shared])
            twin = self.runner.manager.fork(lease)
            # In turns: each writes again after the other has written the same positions.
            middle = self.random.randint(shared + 1, self.length - 1)
            parts: dict[Lease, list[Tensor]] = {twin: [], lease: []}
            for start, end in ((shared, middle), (middle, self.length)):
                for holder, text in ((twin, two), (lease, one)):
                    parts[holder].append(self._feed(holder, text[start:end]))
            for holder, text in ((twin, two), (lease, one)):
                comparison.rows(torch.cat(parts[holder]), self._fresh(text)[shared:], f"trial {trial}")
                self.runner.manager.release(holder)
        evidence = {"trials": self.trials, "blocks_copied_on_write": self.copies - copies}
        return comparison.check("forked = alone", evidence)

    def plain_attention(self) -> Check:
        """A run from nothing against attention written out plainly, without pages."""
        tokens = self._tokens(self.length)
        found = nearness(self.loaded, tokens, self._fresh(tokens))
        evidence: dict[str, int | float | str] = {f"{found.statistic}_relative_error": found.error}
        if found.measured:
            evidence["plain_attention_moved_by_rounding"] = found.measured
        evidence["tolerance"] = found.tolerance
        passed = found.error <= found.tolerance
        return Check("paged = plain attention, nearly", Kind.NEARLY, passed, len(tokens), evidence)

    def _request(self, prompt: Sequence[int], seed: int, priority: int = 0) -> Request:
        return Request(tuple(prompt), self.steps, Sampling(temperature=1.0, seed=seed), priority=priority)

    def _run_to_end(self, engine: Engine, requests: Sequence[Request]) -> list[Running]:
        """The requests arrive one by one, each before a step or not."""
        waiting, sequences = list(requests), []
        while waiting or not engine.idle:
            if waiting and (engine.idle or self.random.random() < 0.5):
                sequences.append(engine.add(waiting.pop(0)))
            engine.step()
        return sequences

    def _against_alone(self, requests: Sequence[Request], sequences: Sequence[Running]) -> Comparison:
        """Each request's tokens against those it draws alone, over a cache that holds nothing."""
        comparison = Comparison()
        for index, (request, ours) in enumerate(zip(requests, sequences, strict=True)):
            self.runner.manager.tree.clear()
            (alone,) = self._run_to_end(self.engine, [request])
            comparison.tokens(ours.new_tokens, alone.new_tokens, f"request {index}")
        self.runner.manager.tree.clear()
        return comparison

    def _fresh(self, tokens: Sequence[int]) -> Tensor:
        """All logits `[len(tokens), vocab]` of a run from nothing, in the widest steps."""
        lease = self.runner.manager.open()
        try:
            return self._feed(lease, tokens)
        finally:
            self.runner.manager.release(lease)

    def _feed(self, lease: Lease, tokens: Sequence[int]) -> Tensor:
        """Append `tokens` to a lease; all their logits."""
        most = self.runner.widths.most
        parts = (tokens[start : start + most] for start in range(0, len(tokens), most))
        return torch.cat([self.runner.run([Work(lease, part, len(part))])[0] for part in parts])

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(self.loaded.config.vocab_size) for _ in range(count)]

    def _count(self, event: CacheEvent) -> None:
        if isinstance(event, Reserved):
            self.copies += event.copies
