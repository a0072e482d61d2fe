"""Whole steps of a model at growing depths, over each KV codec: what a long context costs, weights included.

Weights are random and the context is not computed but filled in (`FilledCache`), which changes no time. Steps at all
depths and over all codecs take turns, so that what disturbs one disturbs the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvist.bench.filled import FilledCache
from kvist.bench.machine import Memory, Samples, facts, interleave
from kvist.bench.report import Ratio, Report, Row
from kvist.cache.manager import Lease
from kvist.runtime.batch import Work
from kvist.runtime.runner import Runner
from kvist.service.loaded import Loaded

STEPS = 4  # decode steps that are timed together
PREFILL, PREFILL_DEPTH = 512, 4096


@dataclass(frozen=True)
class _Depth:
    """A sequence of `tokens` committed tokens over one choice of codecs."""

    kv: str
    tokens: int
    runner: Runner
    lease: Lease

    def decode(self) -> None:
        """A few tokens one by one, then taken back."""
        for _ in range(STEPS):
            self.runner.run([Work(self.lease, [1], logits=1)])
        self.runner.manager.rollback(self.lease, self.tokens)

    def prefill(self) -> None:
        """512 tokens, in steps as wide as they come, then taken back."""
        most = min(PREFILL, self.runner.widths.most)
        for start in range(0, PREFILL, most):
            count = min(most, PREFILL - start)
            self.runner.run([Work(self.lease, [1] * count, logits=int(start + count == PREFILL))])
        self.runner.manager.rollback(self.lease, self.tokens)


def run(
    models: Sequence[tuple[str, Loaded]],
    depths: Sequence[int],
    kvs: Sequence[str],
    rounds: int,
    observe: Callable[[str], None],
) -> Report:
    """Each model, by its shape's name: decoding and a prefill of 512 tokens at depth 0 and at `depths`, which are
    rounded down to whole blocks. `observe` hears what is being measured.
    """
    memory = Memory()
    report = Report(facts())
    reads: list[Samples] = []
    for shape, loaded in models:
        bench = _Bench(report, shape, loaded, kvs, depths, rounds)
        observe(f"{shape}: filling the caches")
        sequences = bench.sequences()
        observe(f"{shape}: decoding")
        reads.append(bench.decode(sequences, memory))
        observe(f"{shape}: prefill")
        bench.prefill([sequence for sequence in sequences if sequence.tokens in (0, PREFILL_DEPTH)])
        observe(f"{shape}: encoding")
        bench.encoding()
    report.machine["read_gb_s"] = Samples(tuple(value for read in reads for value in read.values)).median
    return report


class _Bench:
    """Measures one model into a report."""

    def __init__(
        self, report: Report, shape: str, loaded: Loaded, kvs: Sequence[str], depths: Sequence[int], rounds: int
    ) -> None:
        size = loaded.layout.block_size
        self._depths = sorted({0, PREFILL_DEPTH, *(depth // size * size for depth in depths)})
        self._report, self._shape, self._rounds = report, shape, rounds
        tokens = sum(depth + PREFILL for depth in self._depths)
        # Room for all depths side by side; a sequence more than they are, for the one that measures encoding.
        self._runners = {kv: _runner(loaded.with_kv(kv), tokens, len(self._depths) + 1) for kv in kvs}
        self._weights = loaded.model.weights
        self._steps: dict[tuple[str, int], Samples] = {}

    def sequences(self) -> list[_Depth]:
        sequences = []
        for kv, runner in self._runners.items():
            for depth in self._depths:
                lease = runner.manager.open()
                FilledCache.of(runner).append_random(lease, depth)
                sequences.append(_Depth(kv, depth, runner, lease))
        return sequences

    def decode(self, sequences: Sequence[_Depth], memory: Memory) -> Samples:
        """Returns the read bandwidth of the same rounds, in GB/s."""
        *times, read = interleave([*(sequence.decode for sequence in sequences), memory.read], self._rounds)
        self._compare("decode", sequences, [time.map(lambda s: s / STEPS) for time in times], 1)
        return read.map(memory.gb_s)

    def prefill(self, sequences: Sequence[_Depth]) -> None:
        times = interleave([sequence.prefill for sequence in sequences], self._rounds)
        self._compare(f"prefill of {PREFILL}", sequences, times, PREFILL)

    def encoding(self) -> None:
        """What coding a block costs, spread over its tokens, as a share of a decode step at 4k."""
        for kv, runner in self._runners.items():
            if runner.passing is None:
                continue
            seconds, size = self._seal_seconds(runner), runner.layout.block_size
            what = f"encoding {self._shape}"
            share = self._steps[kv, PREFILL_DEPTH].map(lambda step, s=seconds.median / size: s / step)
            self._add(what, kv, 0, seconds.map(lambda s, size=size: s / size * 1e6), "us a token")
            self._add(what, kv, PREFILL_DEPTH, share, "of a decode step")

    def _seal_seconds(self, runner: Runner) -> Samples:
        """Of coding one block in every layer: writing the token that fills it, less writing one that does not."""
        cache, lease, size = FilledCache.of(runner), runner.manager.open(), runner.layout.block_size
        cache.append_random(lease, size - 2)
        streams = runner.layout.layers[0].spec.streams
        k, v = (torch.randn(1, s.heads, s.dim).to(runner.layout.full.dtype) for s in streams)
        plain = cache.step(lease, 1)
        for view in plain:
            view.write(k, v)
        runner.manager.commit(lease, 1)
        filling = cache.step(lease, 1)
        times = interleave(
            [lambda: [view.write(k, v) for view in filling], lambda: [view.write(k, v) for view in plain]],
            self._rounds,
        )
        runner.manager.release(lease)
        return Samples(tuple(full - other for full, other in zip(times[0].values, times[1].values, strict=True)))

    def _compare(self, what: str, sequences: Sequence[_Depth], times: Sequence[Samples], tokens: int) -> None:
        """Rows for each, and ratios: to the same codec's start, and at each depth to the first codec."""
        found = {(s.kv, s.tokens): time for s, time in zip(sequences, times, strict=True)}
        self._steps |= found if tokens == 1 else {}
        first = next(iter(self._runners))
        for (kv, depth), seconds in found.items():
            self._add(f"{what} {self._shape} {depth}", kv, depth, seconds.map(lambda s: tokens / s), "tokens/s")
        for (kv, depth), seconds in found.items():
            if depth:
                ratio = found[kv, 0].over(seconds).median
                name = f"{what} {self._shape}"
                self._report.ratios.append(Ratio(name, f"kvist {kv} at {depth}", f"kvist {kv} at 0", ratio))
        for (kv, depth), seconds in found.items():
            if kv != first:
                ratio = found[first, depth].over(seconds).median
                name = f"{what} {self._shape} {depth}"
                self._report.ratios.append(Ratio(name, f"kvist {kv}", f"kvist {first}", ratio))

    def _add(self, what: str, kv: str, context: int, samples: Samples, unit: str) -> None:
        row = Row(what, "kvist", self._shape, self._weights, kv, context, 1, samples.median, unit, samples.spread)
        self._report.rows.append(row)


def _runner(loaded: Loaded, tokens: int, sequences: int) -> Runner:
    size = loaded.layout.block_size
    blocks = -(-tokens // size) + sequences
    return Runner(loaded.model, loaded.layout, blocks, loaded.backend, sequences=sequences)
