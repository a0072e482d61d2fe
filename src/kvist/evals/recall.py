"""What a cache forgets: associative recall over it, and how far the answers are from those over full precision.

The sequences are those of `kvist.text.recall`, made afresh from a seed. The context is run first and lies in the cache,
in the codec's form, when the query block is run over it, with the right answers given (teacher forcing): so every
question is asked of the same cache, however many answers were wrong before it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvist.base.errors import RequestError
from kvist.evals.divergence import kl_divergences
from kvist.evals.heatmap import Heatmap, Panel, draw
from kvist.runtime.feed import feed
from kvist.runtime.runner import Runner
from kvist.service.loaded import Loaded
from kvist.text.recall import VOCAB_SIZE, RecallBatch, recall_batch

LENGTHS = (128, 256, 512, 1024)
QUESTIONS = 2048
TOKENS_PER_PAIR = 8
DEPTHS = 8  # bins of equal width over the context


@dataclass(frozen=True)
class Score:
    """Answers to `questions` questions. Divergences from the run over full precision in nats, D(full ‖ this), over the
    whole vocabulary at each answer; `same_top1`: the share of answers for which both runs rank the same token first.
    """

    questions: int
    accuracy: float
    kld_mean: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    same_top1: float


@dataclass(frozen=True)
class DepthScore:
    """Of the pairs that begin from `start` (inclusive) to `end` of the context, as shares of it; 0 is its beginning."""

    start: float
    end: float
    score: Score

    def to_json(self) -> dict[str, object]:
        return {"start": self.start, "end": self.end} | asdict(self.score)


@dataclass(frozen=True)
class LengthScore:
    """Of sequences of `length` tokens with `pairs` pairs.

    `cached_tokens`: how many tokens of each lay in the cache when its query block began, read by all its questions.
    `by_depth` leaves out a depth at which no pair stands.
    """

    length: int
    pairs: int
    cached_tokens: int
    score: Score
    by_depth: list[DepthScore]

    def to_json(self) -> dict[str, object]:
        facts = {"length": self.length, "pairs": self.pairs, "cached_tokens": self.cached_tokens}
        return facts | asdict(self.score) | {"by_depth": [depth.to_json() for depth in self.by_depth]}


@dataclass(frozen=True)
class KvScore:
    """Of one choice of codecs; `score` and `by_depth` over all lengths together."""

    kv: str
    bits_per_value: float
    bytes_per_token: float
    score: Score
    by_length: list[LengthScore]
    by_depth: list[DepthScore]

    def to_json(self) -> dict[str, object]:
        facts = {"kv": self.kv, "bits_per_value": self.bits_per_value, "bytes_per_token": self.bytes_per_token}
        parts = {
            "by_length": [length.to_json() for length in self.by_length],
            "by_depth": [depth.to_json() for depth in self.by_depth],
        }
        return facts | asdict(self.score) | parts


@dataclass(frozen=True)
class RecallReport:
    """`to_json` is documented in docs/json.md."""

    model: str
    rows: list[KvScore]

    def to_json(self) -> dict[str, object]:
        return {"model": self.model, "rows": [row.to_json() for row in self.rows]}


@dataclass(frozen=True)
class _Answers:
    """One run over the sequences of one length: `logits` `[rows, pairs, vocab]` float32 at the questions."""

    batch: RecallBatch
    logits: Tensor
    cached_tokens: int


@dataclass(frozen=True)
class _Measured:
    """One number per question, in one order: `right`, `same` bool, `divergence` float64, `depth` bin int64."""

    right: Tensor
    same: Tensor
    divergence: Tensor
    depth: Tensor

    def score(self, chosen: Tensor | slice = slice(None)) -> Score:
        """Of the `chosen` questions, or of all."""
        right, same, divergence = self.right[chosen], self.same[chosen], self.divergence[chosen]
        p99, p999 = (float(divergence.quantile(share)) for share in (0.99, 0.999))
        return Score(
            questions=len(right),
            accuracy=float(right.double().mean()),
            kld_mean=float(divergence.mean()),
            kld_p99=p99,
            kld_p999=p999,
            kld_max=float(divergence.max()),
            same_top1=float(same.double().mean()),
        )

    def by_depth(self) -> list[DepthScore]:
        found = ((bin, self.depth == bin) for bin in range(DEPTHS))
        return [
            DepthScore(bin / DEPTHS, (bin + 1) / DEPTHS, self.score(chosen)) for bin, chosen in found if chosen.any()
        ]


class RecallEval:
    """The sequences of each length, and the full-precision run of one model that others are held against.

    `lengths` in tokens, a pair for every eight; `questions`: at least so many for each length. Raises `RequestError`
    when `full` is no model of this task or a length does not fit its context.
    """

    def __init__(
        self,
        full: Loaded,
        lengths: Sequence[int] = LENGTHS,
        questions: int = QUESTIONS,
        seed: int = 0,
        observe: Callable[[str], None] = lambda what: None,
    ) -> None:
        if full.config.vocab_size != VOCAB_SIZE:
            raise RequestError(
                f"{full.name} is no recall model: its vocabulary has {full.config.vocab_size:,} tokens, the task's has "
                f"{VOCAB_SIZE}; kvist train --preset recall makes one"
            )
        if max(lengths) > full.config.max_positions:
            raise RequestError(
                f"{full.name} has a context of {full.config.max_positions:,} tokens; {max(lengths):,} do not fit"
            )
        self._batches: list[RecallBatch] = []
        for length in lengths:
            pairs = length // TOKENS_PER_PAIR
            generator = torch.Generator().manual_seed(seed * 1_000_003 + length)
            self._batches.append(recall_batch(-(-questions // max(pairs, 1)), length, pairs, generator))
        self._full = self._run(full, lambda length: observe(f"full precision, {length:,} tokens"))

    def score(self, loaded: Loaded, kv: str, observe: Callable[[str], None] = lambda what: None) -> KvScore:
        """The same sequences over the cache of `loaded`, named `kv`. `observe` is told what begins."""
        measured, by_length = [], []
        answers = self._run(loaded, lambda length: observe(f"{kv}, {length:,} tokens"))
        for full, ours in zip(self._full, answers, strict=True):
            found = _compare(full, ours)
            tokens, answers = full.batch.tokens, full.batch.answers
            by_length.append(
                LengthScore(tokens.shape[1], answers.shape[1], ours.cached_tokens, found.score(), found.by_depth())
            )
            measured.append(found)
        every = _together(measured)
        layout = loaded.layout
        return KvScore(kv, layout.bits_per_value, layout.bytes_per_token, every.score(), by_length, every.by_depth())

    def _run(self, loaded: Loaded, observe: Callable[[int], None]) -> list[_Answers]:
        runner = loaded.engine(loaded.room(max(batch.tokens.shape[1] for batch in self._batches))).runner
        answers = []
        for batch in self._batches:
            observe(batch.tokens.shape[1])
            answers.append(_ask(runner, batch))
        return answers


def _ask(runner: Runner, batch: RecallBatch) -> _Answers:
    """Row by row: the context into the cache, then the query block over it."""
    logits, cached = [], batch.context
    for row in batch.tokens.tolist():
        lease = runner.manager.open()
        feed(runner, lease, row[: batch.context])
        cached = min(cached, lease.length)
        # Nothing is asked behind the last value.
        questions = row[batch.context : -1]
        # A marker and a key, then a value and a key, and so on: every second row stands on a key.
        logits.append(feed(runner, lease, questions, len(questions))[1::2])
        runner.manager.release(lease)
    return _Answers(batch, torch.stack(logits), cached)


def _compare(full: _Answers, ours: _Answers) -> _Measured:
    batch, top = full.batch, ours.logits.argmax(-1)
    return _Measured(
        right=(top == batch.answers).flatten(),
        same=(top == full.logits.argmax(-1)).flatten(),
        divergence=kl_divergences(full.logits, ours.logits).flatten(),
        depth=(batch.places * DEPTHS // batch.context).flatten(),
    )


def _together(parts: Sequence[_Measured]) -> _Measured:
    return _Measured(
        right=torch.cat([part.right for part in parts]),
        same=torch.cat([part.same for part in parts]),
        divergence=torch.cat([part.divergence for part in parts]),
        depth=torch.cat([part.depth for part in parts]),
    )


def plot(report: RecallReport, path: Path) -> None:
    """Accuracy by length and depth, a panel for each choice of codecs, as PNG. Takes matplotlib."""
    panels = []
    for row in report.rows:
        values: list[list[float | None]] = []  # in percent
        for length in row.by_length:
            found = {depth.start: 100 * depth.score.accuracy for depth in length.by_depth}
            values.append([found.get(bin / DEPTHS) for bin in range(DEPTHS)])
        panels.append(Panel(f"{row.kv}: {row.bits_per_value:.3g} bits, {row.score.accuracy:.2%}", values))
    measured = [value for panel in panels for row in panel.values for value in row if value is not None]
    # From a multiple of ten at or below the lowest, so that small losses are seen.
    low = math.floor(min(*measured, 90.0) / 10) * 10
    lengths = [f"{length.length:,}" for length in report.rows[0].by_length]
    depths = [f"{bin / DEPTHS:.0%} to {(bin + 1) / DEPTHS:.0%}" for bin in range(DEPTHS)]
    accuracy = Heatmap("right answers (%)", panels, low, 100.0, lambda value: f"{value:.1f}")
    draw(
        path,
        f"{report.model}: right answers, by codec",
        [accuracy],
        lengths,
        depths,
        "depth of the pair in its context",
    )
