"""Decoding and whole prompts beside other engines, in one run on one machine, turn by turn.

Weights are random, the same in all formats and of as many bits. Each setting of another engine is a process of its own,
which computes its context once and goes back to it after each measurement; ours is filled. A setting that is far behind
is left out at greater lengths, where filling it would take long. The best setting at each length is what counts."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from kvist.bench.filled import FilledCache
from kvist.bench.machine import Memory, Samples, facts
from kvist.bench.models import random_model
from kvist.bench.peers.engines import LLAMA_CPP, SETTINGS, Setting, model_of
from kvist.bench.peers.worker import Worker
from kvist.bench.report import Ratio, Report, Row
from kvist.runtime.batch import Work
from kvist.runtime.runner import Runner
from kvist.service.loaded import Loaded

STEPS = 4  # decode steps that are timed together
FAR_BEHIND = 0.6  # of the speed of an engine's fastest setting
# ik_llama.cpp, a fork for CPUs that is not on PyPI: its tokens a second on another machine, and llama.cpp's there, for
# smollm2-135m with 8-bit weights, each with its best KV type.
IK = {0: (258.0, 186.0), 4096: (115.0, 68.0), 16384: (44.0, 29.8), 32768: (23.5, 13.6)}
IK_SHAPE, IK_WEIGHTS = "smollm2-135m", "int8"


class Ours:
    """A sequence of a model, at any depth."""

    def __init__(self, loaded: Loaded, most: int) -> None:
        self.kv = loaded.layout.kv
        blocks = -(-(most + STEPS) // loaded.layout.block_size) + 2
        self._runner = Runner(loaded.model, loaded.layout, blocks, loaded.backend, sequences=1)
        self._lease = self._runner.manager.open()

    def fill(self, tokens: int) -> None:
        FilledCache.of(self._runner).append_random(self._lease, tokens - self._lease.length)

    def decode(self, tokens: int, clock: Callable[[], float]) -> float:
        """Seconds a token, of so many."""
        depth, start = self._lease.length, clock()
        for _ in range(tokens):
            self._runner.run([Work(self._lease, [1], logits=1)])
        seconds = clock() - start
        self._runner.manager.rollback(self._lease, depth)
        return seconds / tokens

    def prefill(self, tokens: int, clock: Callable[[], float]) -> float:
        """Seconds of a whole prompt."""
        lease, most, start = self._runner.manager.open(), self._runner.widths.most, clock()
        for first in range(0, tokens, most):
            count = min(most, tokens - first)
            self._runner.run([Work(lease, [1] * count, logits=int(first + count == tokens))])
        seconds = clock() - start
        self._runner.manager.release(lease)
        return seconds


class What(StrEnum):
    """What is measured: steps of one token behind contexts of each length, or whole prompts of each length."""

    DECODE = "decode"
    PREFILL = "prefill"


def run(
    what: What,
    shapes: Sequence[str],
    weights: Sequence[str],
    lengths: Sequence[int],
    kvs: Sequence[str],
    rounds: int,
    pythons: Mapping[str, Path],
    observe: Callable[[str], None],
) -> Report:
    """Every shape with each of `weights`, at each length. `pythons`: of the environments of the engines to compare
    with, by their names. Raises `PeerError` where one fails."""
    report, memory = Report(facts()), Memory()
    reads: list[float] = []
    for shape in shapes:
        for bits in weights:
            case = _Case(what, shape, bits, report, memory, rounds, observe)
            reads += case.run(sorted(lengths), kvs, pythons)
    report.machine["read_gb_s"] = Samples(tuple(reads)).map(memory.gb_s).median
    return report


@dataclass(frozen=True)
class _Case:
    """One shape with weights of so many bits."""

    what: What
    shape: str
    weights: str
    report: Report
    memory: Memory
    rounds: int
    observe: Callable[[str], None]

    def run(self, lengths: Sequence[int], kvs: Sequence[str], pythons: Mapping[str, Path]) -> list[float]:
        """Adds rows and ratios to the report. Returns how long each reading of the memory took."""
        ours = [Ours(loaded, lengths[-1]) for loaded in _models(self.shape, self.weights, kvs)]
        reads: list[float] = []
        with _workers(self.shape, self.weights, lengths[-1], pythons, self.observe) as workers:
            for length in lengths:
                if self.what is What.DECODE:
                    self._fill(ours, workers, length)
                self.observe(f"{self.shape} {self.weights}: {self.what} at {length:,}")
                tokens = STEPS if self.what is What.DECODE else length
                runs = {one.kv: partial(getattr(one, self.what), tokens, perf_counter) for one in ours}
                asked = {setting: partial(worker.ask, self.what, tokens) for setting, worker in workers.items()}
                mine, others, read = _turns(runs, asked, self.memory, self.rounds)
                reads += read
                best = self._compare(length, mine, others)
                for setting, time in others.items():
                    if best[setting.engine].median / time.median < FAR_BEHIND:
                        workers.pop(setting).close()
        return reads

    def _fill(self, ours: Sequence[Ours], workers: dict[Setting, Worker], length: int) -> None:
        """Bring all to a context of that length."""
        for one in ours:
            one.fill(length)
        for setting, worker in workers.items():
            self.observe(f"{self.shape} {self.weights}: filling {length:,} tokens of {setting.engine}, {setting.label}")
            worker.ask("fill", length)

    def _compare(self, length: int, ours: dict[str, Samples], theirs: dict[Setting, Samples]) -> dict[str, Samples]:
        """Rows of all, and ratios of ours to each engine's best setting, round by round; returns those settings'."""
        name = f"{self.what} {self.shape} {self.weights} {length}"
        tokens, best = 1 if self.what is What.DECODE else length, dict[str, Samples]()
        named = [("kvist", kv, time) for kv, time in ours.items()]
        named += [(setting.engine, setting.label, time) for setting, time in theirs.items()]
        for engine, kv, time in named:
            self._add(name, engine, kv, length, time.map(lambda s: tokens / s))
        for engine in dict.fromkeys(setting.engine for setting in theirs):
            own = [(setting, time) for setting, time in theirs.items() if setting.engine == engine]
            setting, best[engine] = min(own, key=lambda item: item[1].median)
            for kv, time in ours.items():
                ratio = best[engine].over(time).median
                self.report.ratios.append(Ratio(name, f"kvist {kv}", f"{engine} {setting.label}", ratio))
        known = self.what is What.DECODE and self.shape == IK_SHAPE and self.weights == IK_WEIGHTS and length in IK
        if known and LLAMA_CPP in best:
            # What it would reach here if it were as far ahead of llama.cpp as where both were measured.
            fork, original = IK[length]
            self._add(
                name, "ik_llama.cpp, scaled", "its best", length, best[LLAMA_CPP].map(lambda s: fork / original / s)
            )
        return best

    def _add(self, name: str, engine: str, kv: str, length: int, speed: Samples) -> None:
        row = Row(name, engine, self.shape, self.weights, kv, length, 1, speed.median, "tokens/s", speed.spread)
        self.report.rows.append(row)


def _models(shape: str, weights: str, kvs: Sequence[str]) -> Iterator[Loaded]:
    loaded = random_model(shape, "bf16", weights=None if weights == "bf16" else weights)
    return (loaded.with_kv(kv) for kv in kvs)


@contextlib.contextmanager
def _workers(
    shape: str, weights: str, most: int, pythons: Mapping[str, Path], observe: Callable[[str], None]
) -> Iterator[dict[Setting, Worker]]:
    workers = dict[Setting, Worker]()
    try:
        for engine, python in pythons.items():
            observe(f"loading {engine}")
            model = model_of(engine, shape, weights, python)
            first = {"model": str(model), "most": most, "threads": torch.get_num_threads()}
            script = f"{engine.replace('.', '_')}_worker.py"
            for setting in SETTINGS[engine]:
                workers[setting] = Worker(engine, python, script, first | dict(setting.how))
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def _turns(
    ours: dict[str, Callable[[], float]],
    theirs: dict[Setting, Callable[[], float]],
    memory: Memory,
    rounds: int,
) -> tuple[dict[str, Samples], dict[Setting, Samples], list[float]]:
    """Each once a round, every other round backwards, after one round that is not counted."""

    def read() -> float:
        start = perf_counter()
        memory.read()
        return perf_counter() - start

    calls: list[tuple[object, Callable[[], float]]] = [*ours.items(), *theirs.items(), (None, read)]
    seconds: dict[object, list[float]] = {name: [] for name, _ in calls}
    for number in range(rounds + 1):
        for name, call in calls if number % 2 else reversed(calls):
            found = call()
            if number:
                seconds[name].append(found)
    taken = {name: Samples(tuple(values)) for name, values in seconds.items()}
    return {kv: taken[kv] for kv in ours}, {s: taken[s] for s in theirs}, seconds[None]
