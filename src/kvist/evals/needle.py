"""A needle in a haystack: a sentence with a random number stands in a long text, and the end of the text asks for it.

After Kamradt's test (2023, github.com/gkamradt/LLMTest_NeedleInAHaystack). Whether the greedy continuation is the
number is all or nothing, and small models seldom get there. So the log-probability of the number is measured too, and
once more over as much text without the needle: what lies between the two was read out of the cache.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch

from kvist.base.errors import RequestError, TextError
from kvist.evals.heatmap import Heatmap, Panel, draw
from kvist.runtime.feed import feed
from kvist.runtime.runner import Runner
from kvist.service.loaded import Loaded
from kvist.text.tokenizer import Tokenizer

QUESTION = " The secret number of the lighthouse is"
DIGITS = 5
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LEAST_GAINS = 1.0  # nats that a picture's colors cover: less is noise
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the text that stand before the needle
TRIALS = 4
SHORTEST, LONGEST = 256, 4096  # tokens, of the lengths measured by default
_SENTENCE_ENDS = (".", "!", "?", "\n")


@dataclass(frozen=True)
class Cell:
    """Means over `trials` numbers in sequences of `length` tokens, the needle at `depth` of the text.

    `exact`: the share of trials in which the greedy continuation is the number. Log-probabilities in nats, of the whole
    number; `without`: over as much text without the needle. `cached_tokens`: in the cache when the question began.
    """

    length: int
    depth: float
    trials: int
    cached_tokens: int
    exact: float
    log_probability: float
    log_probability_without: float

    @property
    def gain(self) -> float:
        """Nats by which the needle makes the number likelier."""
        return self.log_probability - self.log_probability_without


@dataclass(frozen=True)
class NeedleRow:
    """One choice of codecs."""

    kv: str
    bits_per_value: float
    bytes_per_token: float
    cells: list[Cell]

    @property
    def exact(self) -> float:
        """Mean over all cells, as are those below."""
        return fmean(cell.exact for cell in self.cells)

    @property
    def log_probability(self) -> float:
        return fmean(cell.log_probability for cell in self.cells)

    @property
    def log_probability_without(self) -> float:
        return fmean(cell.log_probability_without for cell in self.cells)

    @property
    def gain(self) -> float:
        return fmean(cell.gain for cell in self.cells)

    def to_json(self) -> dict[str, object]:
        return {
            "kv": self.kv,
            "bits_per_value": self.bits_per_value,
            "bytes_per_token": self.bytes_per_token,
            "exact": self.exact,
            "log_probability": self.log_probability,
            "log_probability_without": self.log_probability_without,
            "gain": self.gain,
            "cells": [asdict(cell) | {"gain": cell.gain} for cell in self.cells],
        }


@dataclass(frozen=True)
class NeedleReport:
    """`spelling`: how numbers are written, `digits` or `words`. `to_json` is documented in docs/json.md."""

    model: str
    text: str
    spelling: str
    rows: list[NeedleRow]

    def to_json(self) -> dict[str, object]:
        rows = [row.to_json() for row in self.rows]
        return {"model": self.model, "text": self.text, "spelling": self.spelling, "rows": rows}


@dataclass(frozen=True)
class Trial:
    """Token ids: the text with or without its needle, the question behind it, and the number that answers it."""

    context: list[int]
    question: list[int]
    answer: list[int]


class Haystack:
    """A text from which trials are cut, each decided by the seed, its length and its number.

    Numbers are written in digits, or in words for a vocabulary without digits. Raises `TextError` when the text or the
    needle cannot be tokenized.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, seed: int = 0) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        # What begins every text of this model, where something does.
        self._begin = [token for token in tokenizer.encode(text[:1])[:1] if token in tokenizer.special_ids]
        self.tokens = self._encode(text)
        closes = {token: tokenizer.decode([token]).rstrip(" ").endswith(_SENTENCE_ENDS) for token in {*self.tokens}}
        self._ends = [place for place, token in enumerate(self.tokens, start=1) if closes[token]]
        self.spelling = "digits" if self._has_digits() else "words"
        self._encode(self._sentence(range(10)))  # so that a needle that cannot be written is told at once

    def trial(self, length: int, number: int, depth: float | None) -> Trial:
        """Trial `number` in `length` tokens, answer included. `depth`: of the needle in the text; None: no needle.

        The needle stands where a sentence ends, nearest to `depth`; the text ends with a sentence where there is one.
        Raises `RequestError` when `length` tokens have no room for text.
        """
        chosen = random.Random(f"{self._seed} {length} {number}")
        digits = [chosen.randrange(10) for _ in range(DIGITS)]
        needle = [] if depth is None else self._encode(self._sentence(digits))
        question, answer = self._question(digits)
        room = length - sum(map(len, (self._begin, needle, question, answer)))
        if room < 1:
            raise RequestError(f"{length:,} tokens are too short for a needle and its question; ask for more")
        # With and without the needle, the same text stands before the question.
        end = chosen.choice([end for end in self._ends if end >= length] or [len(self.tokens)])
        text = self.tokens[end - room : end]
        if depth is not None:
            breaks = [0, *(place - end + room for place in self._ends if end - room < place < end), room]
            place = min(breaks, key=lambda place: abs(place - depth * room))
            text = text[:place] + needle + text[place:]
        return Trial(self._begin + text, question, answer)

    def _question(self, digits: Sequence[int]) -> tuple[list[int], list[int]]:
        """The question's tokens, and the number's: what follows where the two are written together."""
        question, together = self._encode(QUESTION), self._encode(f"{QUESTION} {self._spell(digits)}")
        pairs = zip(question, together, strict=False)
        shared = next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), len(question))
        return together[:shared], together[shared:]

    def _sentence(self, digits: Sequence[int]) -> str:
        return f"{QUESTION} {self._spell(digits)}."

    def _spell(self, digits: Sequence[int]) -> str:
        return "".join(map(str, digits)) if self.spelling == "digits" else " ".join(WORDS[digit] for digit in digits)

    def _encode(self, text: str) -> list[int]:
        return [token for token in self._tokenizer.encode(text) if token not in self._tokenizer.special_ids]

    def _has_digits(self) -> bool:
        digits = "0123456789"
        try:
            return self._tokenizer.decode(self._encode(digits)).replace(" ", "") == digits
        except TextError:
            return False


class NeedleEval:
    """Trials of each length and depth, the same for every cache.

    `lengths` in tokens, by default powers of two as far as context and text reach. Raises `RequestError` for lengths
    that do not fit them.
    """

    def __init__(self, haystack: Haystack, context: int, lengths: Sequence[int] = (), trials: int = TRIALS) -> None:
        self._haystack = haystack
        self._trials = trials
        self._lengths = list(lengths) or _lengths(min(context, len(haystack.tokens)))
        longest = max(self._lengths)
        if longest > context:
            raise RequestError(f"the model's context has {context:,} tokens; {longest:,} do not fit")
        if longest > len(haystack.tokens):
            raise RequestError(f"the text has {len(haystack.tokens):,} tokens; {longest:,} were asked for")

    def score(self, loaded: Loaded, kv: str, observe: Callable[[str], None] = lambda what: None) -> NeedleRow:
        """The trials over the cache of `loaded`, named `kv`. `observe` is told what begins."""
        runner = loaded.engine(loaded.room(max(self._lengths))).runner
        cells = []
        for length in self._lengths:
            numbers = range(self._trials)
            observe(f"{kv}, {length:,} tokens, no needle")
            without = [_ask(runner, self._haystack.trial(length, number, None)) for number in numbers]
            for depth in DEPTHS:
                observe(f"{kv}, {length:,} tokens, needle at {depth:.0%}")
                found = [_ask(runner, self._haystack.trial(length, number, depth)) for number in numbers]
                cells.append(
                    Cell(
                        length=length,
                        depth=depth,
                        trials=self._trials,
                        cached_tokens=min(asked.cached_tokens for asked in found),
                        exact=fmean(asked.exact for asked in found),
                        log_probability=fmean(asked.log_probability for asked in found),
                        log_probability_without=fmean(asked.log_probability for asked in without),
                    )
                )
        return NeedleRow(kv, loaded.layout.bits_per_value, loaded.layout.bytes_per_token, cells)


@dataclass(frozen=True)
class _Asked:
    """What one trial gave."""

    exact: bool
    log_probability: float
    cached_tokens: int


def _ask(runner: Runner, trial: Trial) -> _Asked:
    """The text into the cache, then the question over it, with the answer given token by token.

    Greedy decoding writes the answer exactly when each of its tokens is the likeliest after those before it.
    """
    lease, answer = runner.manager.open(), torch.tensor(trial.answer)
    feed(runner, lease, trial.context)
    cached = lease.length
    logits = feed(runner, lease, trial.question + trial.answer[:-1], len(answer))
    runner.manager.release(lease)
    chosen = logits.double().log_softmax(-1).gather(-1, answer[:, None])
    return _Asked(bool((logits.argmax(-1) == answer).all()), float(chosen.sum()), cached)


def _lengths(most: int) -> list[int]:
    """Powers of two from `SHORTEST` to `LONGEST`, up to `most`; `most` itself when it is shorter than all."""
    length, lengths = SHORTEST, []
    while length <= min(most, LONGEST):
        lengths.append(length)
        length *= 2
    return lengths or [most]


def plot(report: NeedleReport, path: Path) -> None:
    """Exact answers and the gain by length and depth, a panel for each choice of codecs, as PNG. Takes matplotlib.
    Where all shares of exact answers are the same, the title says it, and no panel."""
    lengths = list(dict.fromkeys(cell.length for cell in report.rows[0].cells))
    cells = [cell for row in report.rows for cell in row.cells]
    low = min(0.0, *(cell.gain for cell in cells))
    high = max(low + LEAST_GAINS, *(cell.gain for cell in cells))
    exact = [_panel(row, lengths, row.exact, lambda cell: cell.exact) for row in report.rows]
    gain = [_panel(row, lengths, row.gain, lambda cell: cell.gain) for row in report.rows]
    maps = [Heatmap("gain by the needle (nats)", gain, low, high, lambda value: f"{round(value, 1) + 0.0:.1f}")]
    title, shares = f"{report.model}: a number in {report.text}", {cell.exact for cell in cells}
    if len(shares) > 1:
        maps.insert(0, Heatmap("share of exact answers", exact, 0.0, 1.0, lambda value: f"{value:.2f}"))
    else:
        title += f"; {shares.pop():.0%} of answers exact, everywhere"
    depths = [f"{100 * depth:.0f}" for depth in DEPTHS]
    draw(path, title, maps, [f"{length:,}" for length in lengths], depths, "depth of the needle (%)")


def _panel(row: NeedleRow, lengths: Sequence[int], mean: float, value: Callable[[Cell], float]) -> Panel:
    found = {(cell.length, cell.depth): value(cell) for cell in row.cells}
    values: list[list[float | None]] = [[found[length, depth] for depth in DEPTHS] for length in lengths]
    return Panel(f"{row.kv}: {row.bits_per_value:.3g} bits, mean {mean:.3g}", values)
