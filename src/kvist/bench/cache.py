"""What the cache is worth: tokens per second with it and without it, over growing lengths."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvist.cache.manager import Lease
from kvist.runtime.batch import Work
from kvist.runtime.runner import Runner
from kvist.runtime.widths import Widths
from kvist.service.loaded import Loaded

# A whole text is generated without the cache too where its last token alone would not take longer than this.
WHOLE_TEXT_LAST_TOKEN_S = 0.02
CACHED_STEPS = 9  # per round: a cached step is short beside a recomputation
MOST_SECONDS_PER_LENGTH = 60.0


@dataclass(frozen=True)
class Length:
    """Seconds per new token behind `context` tokens: one sample per round (recomputed) or per step (cached)."""

    context: int
    cached: list[float]
    recomputed: list[float]


class CacheBench:
    """Measures one model. Random token ids: what they are does not change what is computed."""

    def __init__(self, loaded: Loaded, shape: str, contexts: Sequence[int], rounds: int = 3) -> None:
        most = loaded.config.max_positions - 1
        self.contexts = sorted({min(context, most) for context in contexts})
        self.loaded = loaded
        self.shape = shape
        self.rounds = rounds
        # Two sequences: the cached one, and the one that is computed again and again.
        self.runner: Runner = loaded.engine(self.contexts[-1] + 1, sequences=2).runner

    def lengths(self) -> Iterator[Length]:
        """Each length in turn, cached and recomputed interleaved."""
        lease = self.runner.manager.open()
        for context in self.contexts:
            self._feed(lease, context - lease.length)
            cached: list[float] = []
            recomputed: list[float] = []
            started = time.perf_counter()
            while len(recomputed) < self.rounds:
                cached += [self._seconds(lambda: self._next_token(lease)) for _ in range(CACHED_STEPS)]
                recomputed.append(self._seconds(lambda: self._from_nothing(context + 1)))
                if time.perf_counter() - started > MOST_SECONDS_PER_LENGTH:
                    break
            yield Length(context, cached, recomputed)
        self.runner.manager.release(lease)

    def whole_text(self, tokens: int) -> tuple[float, float]:
        """Seconds to generate a text of `tokens` tokens from one, with the cache and without."""
        lease = self.runner.manager.open()
        cached = self._seconds(lambda: [self._feed(lease, 1) for _ in range(tokens)])
        self.runner.manager.release(lease)
        recomputed = self._seconds(lambda: [self._from_nothing(length) for length in range(1, tokens + 1)])
        return cached, recomputed

    def padding(self, context: int) -> tuple[list[float], list[float]]:
        """Seconds of a decode step, exact (rows padded) and not (one row), interleaved."""
        lease = self.runner.manager.open()
        self._feed(lease, context)
        padded, bare = self.runner.widths, Widths((1, *self.runner.widths.agreeing))
        exact: list[float] = []
        unpadded: list[float] = []
        for _ in range(CACHED_STEPS * self.rounds):
            for widths, seconds in ((padded, exact), (bare, unpadded)):
                self.runner.widths = self.runner.head_widths = widths
                seconds.append(self._seconds(lambda: self._next_token(lease)))
        self.runner.widths = padded
        self.runner.manager.release(lease)
        return exact, unpadded

    def _feed(self, lease: Lease, tokens: int) -> None:
        """Append `tokens` tokens; the logits of the last are computed, as a sampler would need them."""
        most = self.runner.widths.most
        while tokens:
            count = min(tokens, most)
            tokens -= count
            ids = [(lease.length + i) % self.loaded.config.vocab_size for i in range(count)]
            self.runner.run([Work(lease, ids, logits=int(tokens == 0))])

    def _next_token(self, lease: Lease) -> None:
        length = lease.length
        self._feed(lease, 1)
        self.runner.manager.rollback(lease, length)

    def _from_nothing(self, tokens: int) -> None:
        lease = self.runner.manager.open()
        self._feed(lease, tokens)
        self.runner.manager.release(lease)

    def _seconds(self, work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started


def growth(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """The exponent e of seconds ~ length^e: the slope of the least-squares line through their logarithms."""
    xs, ys = [math.log(x) for x in lengths], [math.log(y) for y in seconds]
    return statistics.linear_regression(xs, ys).slope
