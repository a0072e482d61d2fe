"""Decoding and whole prompts beside other engines, in one run on one machine, turn by turn.

Weights are random, the same in all formats and of as many bits. Each setting of another engine is a process of its own,
which computes its context once and goes back to it after each measurement; ours is filled. A setting that is far behind
is left out at greater lengths, where filling it would take long. The best setting at each length is what counts."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from kvist.bench.filled import FilledCache
from kvist.bench.gguf_models import random_gguf
from kvist.bench.machine import Memory, Samples, facts
from kvist.bench.models import random_model
from kvist.bench.peers.worker import PeerError, Worker
from kvist.bench.report import Ratio, Report, Row
from kvist.runtime.batch import Work
from kvist.runtime.runner import Runner
from kvist.service.loaded import Loaded

STEPS = 4  # decode steps that are timed together
FAR_BEHIND = 0.6  # of the fastest setting's speed
LLAMA_CPP = "llama.cpp"
# ik_llama.cpp, a fork for CPUs that is not on PyPI: its tokens a second on another machine, and llama.cpp's there, for
# smollm2-135m with 8-bit weights, each with its best KV type.
IK = {0: (258.0, 186.0), 4096: (115.0, 68.0), 16384: (44.0, 29.8), 32768: (23.5, 13.6)}
IK_SHAPE, IK_WEIGHTS = "smollm2-135m", "int8"


@dataclass(frozen=True)
class Setting:
    """Of llama.cpp: flash attention, and the types of its KV."""

    flash: bool
    keys: str
    values: str

    @property
    def label(self) -> str:
        kv = self.keys if self.keys == self.values else f"K {self.keys}, V {self.values}"
        return f"{kv}, flash attention {'on' if self.flash else 'off'}"


SETTINGS = (
    Setting(False, "f16", "f16"),
    Setting(True, "f16", "f16"),
    Setting(False, "q8_0", "f16"),
    Setting(True, "q8_0", "q8_0"),
    Setting(True, "q4_0", "q4_0"),
)


def peer_python(name: str) -> Path:
    """The python of a peer's environment. Raises `PeerError` where there is none."""
    folder = Path(os.environ.get("KVIST_PEERS", "build/peers"))
    python = folder / name / "bin" / "python"
    if not python.exists():
        raise PeerError(f"{name} is not in {folder}; make bench-peers builds it")
    return python


class Ours:
    """A sequence of a model, at any depth."""

    def __init__(self, loaded: Loaded, most: int) -> None:
        self.kv = loaded.layout.kv
        blocks = -(-(most + STEPS) // loaded.layout.block_size) + 2
        self._runner = Runner(loaded.model, loaded.layout, blocks, loaded.backend, sequences=1)
        self._lease = self._runner.manager.open()

    def fill(self, tokens: int) -> None:
        FilledCache.of(self._runner).append_random(self._lease, tokens - self._lease.length)

    def decode(self, clock: Callable[[], float]) -> float:
        """Seconds a token."""
        depth, start = self._lease.length, clock()
        for _ in range(STEPS):
            self._runner.run([Work(self._lease, [1], logits=1)])
        seconds = clock() - start
        self._runner.manager.rollback(self._lease, depth)
        return seconds / STEPS

    def prefill(self, tokens: int, clock: Callable[[], float]) -> float:
        """Seconds of a whole prompt."""
        lease, most, start = self._runner.manager.open(), self._runner.widths.most, clock()
        for first in range(0, tokens, most):
            count = min(most, tokens - first)
            self._runner.run([Work(lease, [1] * count, logits=int(first + count == tokens))])
        seconds = clock() - start
        self._runner.manager.release(lease)
        return seconds


def decode(
    shape: str, weights: str, contexts: Sequence[int], kvs: Sequence[str], rounds: int, observe: Callable[[str], None]
) -> Report:
    """Steps of one token at each length. Raises `PeerError` without llama.cpp."""
    contexts = sorted(contexts)
    report, memory = Report(facts()), Memory()
    ours = [Ours(loaded, contexts[-1]) for loaded in _models(shape, weights, kvs)]
    reads: list[float] = []
    with _workers(shape, weights, contexts[-1], observe) as workers:
        for context in contexts:
            for one in ours:
                one.fill(context)
            for setting, worker in workers.items():
                observe(f"{shape} {weights}: filling {context:,} tokens of {LLAMA_CPP}, {setting.label}")
                worker.ask("fill", context)
            observe(f"{shape} {weights}: decoding at {context:,}")
            runs = {one.kv: one.decode for one in ours}
            asked = {setting: partial(worker.ask, "decode", STEPS) for setting, worker in workers.items()}
            mine, others, read = _turns(runs, asked, memory, rounds)
            reads += read
            what = f"decode {shape} {weights} {context}"
            best = _compare(report, what, shape, weights, context, mine, others, 1)
            _add_scaled(report, what, shape, weights, context, others)
            for setting in [s for s, time in others.items() if best.median / time.median < FAR_BEHIND]:
                workers.pop(setting).close()
    report.machine["read_gb_s"] = Samples(tuple(reads)).map(memory.gb_s).median
    return report


def prefill(
    shape: str, weights: str, lengths: Sequence[int], kvs: Sequence[str], rounds: int, observe: Callable[[str], None]
) -> Report:
    """Whole prompts of each length. Raises `PeerError` without llama.cpp."""
    lengths = sorted(lengths)
    report, memory = Report(facts()), Memory()
    ours = [Ours(loaded, lengths[-1]) for loaded in _models(shape, weights, kvs)]
    reads: list[float] = []
    with _workers(shape, weights, lengths[-1], observe) as workers:
        for length in lengths:
            observe(f"{shape} {weights}: prompts of {length:,}")
            runs = {one.kv: partial(one.prefill, length) for one in ours}
            asked = {setting: partial(worker.ask, "prefill", length) for setting, worker in workers.items()}
            mine, others, read = _turns(runs, asked, memory, rounds)
            reads += read
            best = _compare(report, f"prompt {shape} {weights} {length}", shape, weights, length, mine, others, length)
            for setting in [s for s, time in others.items() if best.median / time.median < FAR_BEHIND]:
                workers.pop(setting).close()
    report.machine["read_gb_s"] = Samples(tuple(reads)).map(memory.gb_s).median
    return report


def _models(shape: str, weights: str, kvs: Sequence[str]) -> Iterator[Loaded]:
    loaded = random_model(shape, "bf16", weights=None if weights == "bf16" else weights)
    return (loaded.with_kv(kv) for kv in kvs)


@contextlib.contextmanager
def _workers(shape: str, weights: str, most: int, observe: Callable[[str], None]) -> Iterator[dict[Setting, Worker]]:
    python, model, workers = peer_python(LLAMA_CPP), random_gguf(shape, weights), dict[Setting, Worker]()
    first = {"model": str(model), "most": most, "threads": torch.get_num_threads()}
    try:
        for setting in SETTINGS:
            observe(f"loading {LLAMA_CPP}, {setting.label}")
            how = {"flash": setting.flash, "keys": setting.keys, "values": setting.values}
            workers[setting] = Worker(LLAMA_CPP, python, "llama_cpp_worker.py", first | how)
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def _turns(
    ours: dict[str, Callable[[Callable[[], float]], float]],
    theirs: dict[Setting, Callable[[], float]],
    memory: Memory,
    rounds: int,
) -> tuple[dict[str, Samples], dict[Setting, Samples], list[float]]:
    """Each once a round, every other round backwards, after one round that is not counted."""

    def read() -> float:
        start = perf_counter()
        memory.read()
        return perf_counter() - start

    calls: list[tuple[object, Callable[[], float]]] = [(kv, partial(run, perf_counter)) for kv, run in ours.items()]
    calls += [*theirs.items(), (None, read)]
    seconds: dict[object, list[float]] = {name: [] for name, _ in calls}
    for number in range(rounds + 1):
        for name, call in calls if number % 2 else reversed(calls):
            found = call()
            if number:
                seconds[name].append(found)
    taken = {name: Samples(tuple(values)) for name, values in seconds.items()}
    return {kv: taken[kv] for kv in ours}, {s: taken[s] for s in theirs}, seconds[None]


def _compare(
    report: Report,
    what: str,
    shape: str,
    weights: str,
    context: int,
    ours: dict[str, Samples],
    theirs: dict[Setting, Samples],
    tokens: int,
) -> Samples:
    """Rows of all, and ratios of ours to their best setting, round by round; returns that."""
    named = [("kvist", kv, time) for kv, time in ours.items()]
    named += [(LLAMA_CPP, setting.label, time) for setting, time in theirs.items()]
    for engine, kv, time in named:
        speed = time.map(lambda s: tokens / s)
        report.rows.append(Row(what, engine, shape, weights, kv, context, 1, speed.median, "tokens/s", speed.spread))
    setting, best = min(theirs.items(), key=lambda item: item[1].median)
    for kv, time in ours.items():
        report.ratios.append(Ratio(what, f"kvist {kv}", f"{LLAMA_CPP} {setting.label}", best.over(time).median))
    return best


def _add_scaled(
    report: Report, what: str, shape: str, weights: str, context: int, theirs: dict[Setting, Samples]
) -> None:
    """What ik_llama.cpp would reach here if it were as far ahead of llama.cpp as where both were measured."""
    if shape != IK_SHAPE or weights != IK_WEIGHTS or context not in IK:
        return
    fork, original = IK[context]
    speed = fork / original / min(time.median for time in theirs.values())
    row = Row(what, "ik_llama.cpp, scaled", shape, weights, "its best", context, 1, speed, "tokens/s", (speed, speed))
    report.rows.append(row)
