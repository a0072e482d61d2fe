"""What a lossy cache changes in a model's predictions: divergence from full precision, token by token of a text.

Teacher-forced over windows of the text (as llama.cpp's `perplexity --kl-divergence`). A query sees its own block in
full precision and all earlier ones through the codecs, so one pass over a window is a run over a compressed prefix.
Only predictions behind at least one coded block count. (Dense codecs write in place, and so round the own block too.)
All caches go through a window side by side, step by step, so that one step's logits of two of them are in memory.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from torch import Tensor

from kvist.base.errors import RequestError, TextError
from kvist.base.tables import Tabular
from kvist.base.units import format_bytes
from kvist.evals.divergence import kl_divergences
from kvist.models.linear import weights_of
from kvist.runtime.feed import feed
from kvist.runtime.runner import Runner
from kvist.service.calibration import observe
from kvist.service.loaded import Loaded
from kvist.service.vectors import VectorMeter, VectorScore
from kvist.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_KV = ("int8", "int4", "int4-rot", "turbo4", "turbo3.5", "turbo3", "turbo2.5", "turbo2")
TOKENS = 4096
LENGTH = 2048
_ROWS = 64  # compared at once, in float64


@dataclass(frozen=True)
class Divergence:
    """Over all counted predictions. KLD: D(full precision ‖ this) in nats over the vocabulary.

    `ppl_ratio`: perplexity of this over that of full precision; `ppl_ratio_error`: its standard error, from the spread
    of the tokens' log-ratios (delta method). `same_top1`: share of predictions whose likeliest token is the same.
    `delta_p_rms`: root mean square of the change in the text's own token's probability.
    """

    kld_mean: float
    kld_median: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    ppl_ratio: float
    ppl_ratio_error: float
    same_top1: float
    delta_p_rms: float


@dataclass(frozen=True)
class Row:
    """One choice of codecs: `kv` as it was asked for, `choice` what that stands for."""

    kv: str
    choice: str
    bits_per_value: float
    bytes_per_token: float
    vectors: VectorScore
    divergence: Divergence

    def to_json(self) -> dict[str, object]:
        facts = {
            "kv": self.kv,
            "choice": self.choice,
            "bits_per_value": self.bits_per_value,
            "bytes_per_token": self.bytes_per_token,
            "distortion": self.vectors.distortion,
        }
        return facts | asdict(self.vectors) | asdict(self.divergence)


@dataclass(frozen=True)
class WeightsRow:
    """The same model with packed weights over the cache in full precision. `loss`: what packing changed of the
    matrices, relative, in squares."""

    weights: str
    bits_per_weight: float
    nbytes: int
    loss: float
    divergence: Divergence

    def to_json(self) -> dict[str, object]:
        facts = {"weights": self.weights, "bits_per_weight": self.bits_per_weight, "bytes": self.nbytes}
        return facts | {"loss": self.loss} | asdict(self.divergence)


@dataclass(frozen=True)
class FidelityReport(Tabular):
    """`rows` by bytes per token, most first; `packed` as they were asked for. `tokens`: fed; `predictions`: counted.
    `to_json`: see docs/json.md."""

    model: str
    base: str
    base_bytes_per_token: float
    base_ppl: float
    text: str
    tokens: int
    predictions: int
    rows: list[Row]
    packed: list[WeightsRow]

    def tables(self) -> list[Table]:
        found = [_weights_table(self)] if self.packed else []
        return [*found, _kv_table(self)] if self.rows else found

    def figure(self) -> "Figure | None":
        """Quality against bytes, a named point for each choice; None where none of them changes anything. Takes
        matplotlib."""
        from kvist.evals.tradeoff import figure

        return figure(self)

    def to_json(self) -> dict[str, object]:
        rows, packed = ([row.to_json() for row in rows] for rows in (self.rows, self.packed))
        return asdict(self) | {"rows": rows, "packed": packed}


def _kv_table(report: FidelityReport) -> Table:
    title = (
        f"{report.model} · {report.text}: {report.predictions:,} predictions behind coded blocks, of "
        f"{report.tokens:,} tokens · against {report.base}: {format_bytes(report.base_bytes_per_token)} a token, "
        f"perplexity {report.base_ppl:.4g}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("KV")
    columns = ("bytes/token", "bits/value", "distortion", "bias", "worst logit corr.", "KLD mean", "median", "p99")
    for column in (*columns, "p99.9", "max", "ppl ratio", "same top-1", "rms Δp"):
        table.add_column(column, justify="right")
    for row in report.rows:
        vectors, found = row.vectors, row.divergence
        kld = (found.kld_mean, found.kld_median, found.kld_p99, found.kld_p999, found.kld_max)
        table.add_row(
            row.kv,
            f"{row.bytes_per_token:,.0f}",
            f"{row.bits_per_value:.3g}",
            f"{vectors.distortion:.2g}",
            f"{vectors.bias:+.1%}",
            f"{vectors.logit_correlation_worst:.4f} in {vectors.logit_correlation_layer}",
            *(f"{value:.2g}" for value in kld),
            f"{found.ppl_ratio:.4f} ± {found.ppl_ratio_error:.4f}",
            f"{found.same_top1:.2%}",
            f"{found.delta_p_rms:.2%}",
        )
    return table


def _weights_table(report: FidelityReport) -> Table:
    table = Table("weights", title=f"packed weights, KV {report.base}", title_justify="left")
    for column in ("bytes", "bits/weight", "loss", "KLD mean", "median", "p99", "ppl ratio", "same top-1"):
        table.add_column(column, justify="right")
    for row in report.packed:
        found = row.divergence
        table.add_row(
            row.weights,
            format_bytes(row.nbytes),
            f"{row.bits_per_weight:.3g}",
            f"{row.loss:.2%}",
            *(f"{value:.2g}" for value in (found.kld_mean, found.kld_median, found.kld_p99)),
            f"{found.ppl_ratio:.4f} ± {found.ppl_ratio_error:.4f}",
            f"{found.same_top1:.2%}",
        )
    return table


def windows(loaded: Loaded, text: str, tokens: int, length: int) -> list[list[int]]:
    """The first `tokens` tokens of `text` in windows of `length`, each begun by what begins every text of this model.

    The last is shorter where they do not divide, and left out where no prediction in it stands behind a coded block.
    Raises `TextError` when that leaves none, `RequestError` for windows too short for it or longer than the context.
    """
    block, context, tokenizer = loaded.layout.block_size, loaded.config.max_positions, loaded.tokenizer()
    needed = block + 2  # a block that is coded, a token that sees it, and the one that is predicted there
    if length > context:
        raise RequestError(f"windows of {length:,} tokens do not fit the model's context of {context:,}")
    if min(tokens, length) < needed:
        raise RequestError(
            f"{min(tokens, length):,} tokens hold no prediction behind a coded block of {block}; {needed} would"
        )
    ids = _encode(tokenizer, text, tokens)
    begin = [token for token in ids[:1] if token in tokenizer.special_ids]
    rest, stride = ids[len(begin) :], length - len(begin)
    found = [begin + rest[start : start + stride] for start in range(0, len(rest), stride)]
    found = [window for window in found if len(window) >= needed]
    if not found:
        raise TextError(f"the text has {len(ids):,} tokens; at least {needed} are needed")
    return found


def _encode(tokenizer: Tokenizer, text: str, tokens: int) -> list[int]:
    """The first `tokens` tokens, without tokenizing all of a long text."""
    part = 8 * tokens
    while len(ids := tokenizer.encode(text[:part])) < tokens and part < len(text):
        part *= 2
    return ids[:tokens]


def run(
    base: Loaded,
    others: Mapping[str, Loaded],
    text: str,
    parts: Sequence[list[int]],
    watch: Callable[[str], None] = lambda what: None,
    stop: Callable[[], bool] = lambda: False,
    packed: Sequence[Loaded] = (),
) -> FidelityReport | None:
    """Hold the same model over other caches, `others` by the names they were asked for by, and with packed weights over
    the same cache, against `base`.

    `parts` are the windows of what is named `text`. `watch` hears what is being done. When `stop` says so, it ends
    after the step under way with the report on what there is by then, or None where that is nothing.
    """
    layouts, length, tokens = [other.layout for other in others.values()], max(map(len, parts)), 0
    vectors = VectorMeter(layouts) if layouts else None
    predictions = _Predictions(
        [loaded.engine(loaded.room(length)).runner for loaded in (base, *others.values(), *packed)]
    )
    for number, window in enumerate(parts, start=1):
        if stop():
            break
        where = f"window {number} of {len(parts)}"
        if vectors is not None:
            watch(f"{where}, vectors")
            observe(base.model, window, vectors.see)
        for count in predictions.feed(window, lambda kv, where=where: watch(f"{where}, {kv}")):
            tokens += count
            if stop():
                break
    if not predictions.count:
        return None
    divergences = predictions.divergences()
    scores = [] if vectors is None else vectors.scores()
    measured = zip(others, layouts, scores, divergences[: len(others)], strict=True)
    rows = [
        Row(kv, layout.kv, layout.bits_per_value, layout.bytes_per_token, score, divergence)
        for kv, layout, score, divergence in measured
    ]
    return FidelityReport(
        model=base.name,
        base=base.layout.kv,
        base_bytes_per_token=base.layout.bytes_per_token,
        base_ppl=predictions.perplexity(),
        text=text,
        tokens=tokens,
        predictions=predictions.count,
        rows=sorted(rows, key=lambda row: -row.bytes_per_token),
        packed=[_weights_row(loaded, found) for loaded, found in zip(packed, divergences[len(others) :], strict=True)],
    )


def _weights_row(loaded: Loaded, found: Divergence) -> WeightsRow:
    forms = [weight.form for weight in weights_of(loaded.model).values() if weight.form is not None]
    nbytes, numbers = sum(form.nbytes for form in forms), sum(form.rows * form.columns for form in forms)
    bits = nbytes * 8 / numbers if numbers else 0.0
    return WeightsRow(loaded.model.weights, bits, nbytes, loaded.model.packing_loss, found)


class _Predictions:
    """The same tokens through several caches, the first in full precision, and how the others' predictions differ."""

    def __init__(self, runners: Sequence[Runner]) -> None:
        self._base, *self._others = runners
        self._losses: list[Tensor] = []  # of the base, nats
        self._found: list[list[Tensor]] = [[] for _ in self._others]

    @property
    def count(self) -> int:
        return sum(map(len, self._losses))

    def feed(self, window: Sequence[int], watch: Callable[[str], None]) -> Iterator[int]:
        """Step by step; yields the tokens of each step once all caches have taken it."""
        runners = [self._base, *self._others]
        leases = [runner.manager.open() for runner in runners]
        size, most = self._base.layout.block_size, self._base.widths.most
        try:
            for start in range(0, len(window), most):
                part = window[start : start + most]
                # Behind a coded block, and with a next token in the window.
                first, end = max(start, size), min(start + len(part), len(window) - 1)
                rows = max(0, start + len(part) - first)
                targets = torch.tensor(window[first + 1 : end + 1], dtype=torch.int64)
                watch(self._base.layout.kv)
                exact = feed(self._base, leases[0], part, rows)[: len(targets)]
                for runner, lease, found in zip(self._others, leases[1:], self._found, strict=True):
                    watch(runner.layout.kv)
                    found.append(compare(exact, feed(runner, lease, part, rows)[: len(targets)], targets))
                self._losses.append(-_log_probabilities(exact, targets))
                yield len(part)
        finally:
            for runner, lease in zip(runners, leases, strict=True):
                runner.manager.release(lease)

    def perplexity(self) -> float:
        """Of full precision."""
        return math.exp(float(torch.cat(self._losses).mean()))

    def divergences(self) -> list[Divergence]:
        return [summarize(torch.cat(found, dim=1)) for found in self._found]


def compare(exact: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    """Logits `[rows, vocab]` of two runs and the tokens that came next → `[4, rows]` float64: D(exact ‖ other), log of
    the ratio of the text's probabilities (positive: `other` finds it less likely), whether the likeliest token is the
    same, and the change in the probability of the text's token."""
    parts = [torch.empty(4, 0, dtype=torch.float64)]
    for ours, theirs, target in zip(exact.split(_ROWS), other.split(_ROWS), targets.split(_ROWS), strict=True):
        before, after = _log_probabilities(ours, target), _log_probabilities(theirs, target)
        same = (ours.argmax(-1) == theirs.argmax(-1)).double()
        parts.append(torch.stack([kl_divergences(ours, theirs), before - after, same, after.exp() - before.exp()]))
    return torch.cat(parts, dim=1)


def summarize(found: Tensor) -> Divergence:
    """Of what `compare` gives, `[4, n]` with at least one prediction."""
    divergence, log_ratio, same, delta_p = found
    median, p99, p999 = (float(divergence.quantile(share)) for share in (0.5, 0.99, 0.999))
    ratio = math.exp(float(log_ratio.mean()))
    error = float(log_ratio.std()) / math.sqrt(len(log_ratio)) if len(log_ratio) > 1 else 0.0
    return Divergence(
        kld_mean=float(divergence.mean()),
        kld_median=median,
        kld_p99=p99,
        kld_p999=p999,
        kld_max=float(divergence.max()),
        ppl_ratio=ratio,
        ppl_ratio_error=ratio * error,
        same_top1=float(same.mean()),
        delta_p_rms=math.sqrt(float(delta_p.square().mean())),
    )


def _log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of `tokens` `[rows]` under `logits` `[rows, vocab]`: float64."""
    logits = logits.double()
    chosen: Tensor = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return chosen
