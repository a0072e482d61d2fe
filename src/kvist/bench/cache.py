"""What the cache is worth: tokens per second with it and without it, over growing lengths."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvist.bench.machine import Memory, Samples, facts, interleave
from kvist.bench.report import Ratio, Report, Row
from kvist.cache.manager import Lease
from kvist.runtime.batch import Work
from kvist.runtime.runner import Runner
from kvist.runtime.widths import Widths
from kvist.service.loaded import Loaded

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CACHED_STEPS = 9  # a round: a cached step is short beside a recomputation
ROUNDS = 3
MOST_SECONDS = 60.0  # of one length, and of one whole text; a token that takes longer is measured once


def run(models: Sequence[tuple[str, Loaded]], contexts: Sequence[int], observe: Callable[[str], None]) -> Report:
    """Each model, by its shape's name, at each of `contexts` that it holds. `observe` hears what is being measured."""
    memory = Memory()
    report = Report(facts())
    report.machine["read_gb_s"] = interleave([memory.read], 9)[0].map(memory.gb_s).median
    for shape, loaded in models:
        bench = _CacheBench(report, shape, loaded, contexts)
        for length in bench.contexts:
            observe(f"{shape}: a token behind {length:,}")
            bench.one_token(length)
        bench.growth()
        observe(f"{shape}: whole texts")
        bench.whole_texts()
        observe(f"{shape}: what exactness costs")
        bench.padding()
    return report


class _CacheBench:
    """Measures one model into a report. Token ids are arbitrary: they do not change what is computed."""

    def __init__(self, report: Report, shape: str, loaded: Loaded, contexts: Sequence[int]) -> None:
        most = loaded.config.max_positions - 1
        self.contexts = sorted({min(context, most) for context in contexts})
        self._report = report
        self._shape = shape
        self._loaded = loaded
        # Two sequences: the cached one, and the one that is computed again and again.
        self._runner: Runner = loaded.engine(loaded.room(self.contexts[-1] + 1, sequences=2)).runner
        self._seconds: dict[str, list[float]] = {"cached": [], "recomputed": []}

    def one_token(self, context: int) -> None:
        """Seconds of the token behind `context` others, cached and recomputed interleaved."""
        lease = self._runner.manager.open()
        self._feed(lease, context)
        cached: list[float] = []
        recomputed: list[float] = []
        started = time.perf_counter()
        while len(recomputed) < ROUNDS and time.perf_counter() - started < MOST_SECONDS:
            cached += [_seconds(lambda: self._next_token(lease)) for _ in range(CACHED_STEPS)]
            recomputed.append(_seconds(lambda: self._from_nothing(context + 1)))
        self._runner.manager.release(lease)
        what = f"next token {self._shape} {context}"
        for engine, values in (("cached", cached), ("recomputed", recomputed)):
            self._seconds[engine].append(statistics.median(values))
            self._add(what, f"kvist {engine}", context, [1 / value for value in values], "tokens/s")
        self._compare(what, "cached", "recomputed", statistics.median(recomputed) / statistics.median(cached))

    def growth(self) -> None:
        """The exponent e of seconds ~ length^e for a token, over all lengths."""
        if len(self.contexts) < 2:
            return
        for engine, values in self._seconds.items():
            exponent = growth(self.contexts, values)
            what = f"growth of a token's time {self._shape} {self.contexts[-1]}"
            self._add(what, f"kvist {engine}", self.contexts[-1], [exponent], "exponent")

    def whole_texts(self) -> None:
        """Texts generated from their first token, with the cache and without, where that is a matter of seconds."""
        for context, seconds in zip(self.contexts, self._seconds["recomputed"], strict=True):
            if seconds * context / 2 > MOST_SECONDS:
                continue
            lease = self._runner.manager.open()
            cached = _seconds(lambda: [self._feed(lease, 1) for _ in range(context)])  # noqa: B023
            self._runner.manager.release(lease)
            recomputed = _seconds(lambda: [self._from_nothing(length + 1) for length in range(context)])  # noqa: B023
            what = f"whole text {self._shape} {context}"
            for engine, value in (("cached", cached), ("recomputed", recomputed)):
                self._add(what, f"kvist {engine}", context, [context / value], "tokens/s")
            self._compare(what, "cached", "recomputed", recomputed / cached)

    def padding(self) -> None:
        """A decode step with its rows padded, as exactness asks, and with one bare row."""
        runner, context = self._runner, self.contexts[0]
        lease = runner.manager.open()
        self._feed(lease, context)
        exact = runner.widths, runner.head_widths
        bare = Widths((1, *runner.widths.agreeing)), Widths((1, *runner.head_widths.agreeing))

        def step(widths: tuple[Widths, Widths]) -> None:
            runner.widths, runner.head_widths = widths
            self._next_token(lease)

        padded, unpadded = interleave([lambda: step(exact), lambda: step(bare)], CACHED_STEPS * ROUNDS)
        runner.widths, runner.head_widths = exact
        runner.manager.release(lease)
        what = f"decode step {self._shape} {context}"
        self._add(what, "kvist exact", context, [1 / value for value in padded.values], "tokens/s")
        self._add(what, "kvist not exact", context, [1 / value for value in unpadded.values], "tokens/s")
        self._compare(what, "exact", "not exact", unpadded.over(padded).median)

    def _add(self, what: str, engine: str, context: int, values: Sequence[float], unit: str) -> None:
        samples = Samples(tuple(values))
        weights, kv = self._loaded.model.weights, self._loaded.layout.kv
        row = Row(
            what,
            engine,
            self._shape,
            weights,
            kv,
            context,
            1,
            samples.median,
            unit,
            samples.spread,
        )
        self._report.rows.append(row)

    def _compare(self, what: str, a: str, b: str, value: float) -> None:
        kv = self._loaded.layout.kv
        self._report.ratios.append(Ratio(what, f"kvist {a} {kv}", f"kvist {b} {kv}", value))

    def _feed(self, lease: Lease, tokens: int) -> None:
        """Append `tokens` tokens; the logits of the last are computed, as a sampler would need them."""
        while tokens:
            count = min(tokens, self._runner.widths.most)
            tokens -= count
            ids = [(lease.length + i) % self._loaded.config.vocab_size for i in range(count)]
            self._runner.run([Work(lease, ids, logits=int(tokens == 0))])

    def _next_token(self, lease: Lease) -> None:
        length = lease.length
        self._feed(lease, 1)
        self._runner.manager.rollback(lease, length)

    def _from_nothing(self, tokens: int) -> None:
        lease = self._runner.manager.open()
        self._feed(lease, tokens)
        self._runner.manager.release(lease)


def growth(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """The exponent e of seconds ~ length^e: the slope of the least-squares line through their logarithms."""
    xs, ys = [math.log(x) for x in lengths], [math.log(y) for y in seconds]
    return statistics.linear_regression(xs, ys).slope


def plot(report: Report, path: Path) -> None:
    """Tokens per second over the length, both axes logarithmic, a line per model and engine, as PNG; bars where there
    is one length alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: dict[tuple[str, str], dict[int, float]] = {}
    for row in report.rows:
        if row.what.startswith("next token"):
            name = "with the cache" if row.engine == "kvist cached" else "computed anew"
            lines.setdefault((row.shape, name), {})[row.context] = row.value
    lengths = sorted({length for points in lines.values() for length in points})
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if len(lengths) == 1:
        figure.suptitle(f"The next token behind {lengths[0]:,}, with the cache and computed anew", fontsize=10)
        _bars(axes, lines, lengths[0])
    else:
        figure.suptitle("The next token, with the cache and computed anew", fontsize=10)
        _curves(axes, lines, lengths)
    figure.savefig(path, format="png", dpi=120)


_Lines = dict[tuple[str, str], dict[int, float]]  # tokens per second by length, of a model and how it was run


def _curves(axes: "Axes", lines: _Lines, lengths: Sequence[int]) -> None:
    colors = {shape: f"C{index}" for index, shape in enumerate(dict.fromkeys(shape for shape, _ in lines))}
    for (shape, name), points in lines.items():
        style = "o-" if name == "with the cache" else "o--"
        axes.plot(
            *zip(*points.items(), strict=True), style, color=colors[shape], markersize=4, label=f"{shape}, {name}"
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens before it", ylabel="tokens per second")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def _bars(axes: "Axes", lines: _Lines, length: int) -> None:
    names = [f"{shape}, {name}" for shape, name in lines]
    bars = axes.barh(names, [points[length] for points in lines.values()], color="C0", height=0.6)
    axes.bar_label(bars, fmt="%.3g", padding=4, fontsize=8)
    axes.set_xlabel("tokens per second")
    axes.invert_yaxis()
    axes.margins(x=0.12)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
