"""Which codec is enough for which layer: measured on the model's own vectors, stream by stream, cheapest first.

Two numbers speak for a codec in a layer, each of its worst head. The correlation of exact and coded scores: of what can
be known of keys alone, it tells best whether a model survives. And what attention's output keeps of its variance, which
weighs an error as the layer's own softmax does: where attention is sharp, keys need more than their scores show. Keys
have to hold both above the threshold, values the second.

The default of 0.99 leaves noise of about a hundredth of the signal. Mean KL divergence under it, beside uniform codecs
of about its size: the bundled model 0.0015 at 3.1 bits (turbo3 0.0009 at 3.25, turbo2.5 0.0026 at 2.75); the recall
model 0.00007 at 4.5 (int4-rot 0.00014 at 4.5, turbo4 0.00022 at 4.25); random weights whose keys share a mean of 2.5 to
3.5 deviations 0.0031 at 3.9 (turbo4 0.0025 at 4.25, turbo3.5 0.0070 at 3.75). At 0.98 the three take 2.75, 3.4 and 3.25
bits for 0.0020, 0.00021 and 0.011. (`kvist fidelity` on the last tenth of Tiny Shakespeare; `kvist eval recall`.)
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby

from torch import Tensor

from kvist.base.errors import ConfigError, RequestError
from kvist.cache.calibration import Calibration, StreamStatistics
from kvist.cache.choice import parse_choice
from kvist.cache.codecs import CODECS, FP16, bits_per_value
from kvist.cache.layout import BLOCK_SIZE, Layout, StreamLayout, plan_layout
from kvist.cache.spec import Reading
from kvist.evals.vectors import compare_outputs, compare_scores, decoded
from kvist.service.calibration import Vectors, measure, model_digest, observe
from kvist.service.loaded import Loaded

THRESHOLD = 0.99
SHORTEST = 2 * BLOCK_SIZE  # tokens: a block that is coded and one that sees it
_THIRDS = 3


@dataclass(frozen=True)
class Candidate:
    """One codec for one stream of one layer, at `bits` per value.

    Of its worst head: `output`, 1 less the mean squared error of attention's output, relative to its variance; for keys
    also `correlation`, of exact and coded scores.
    """

    codec: str
    bits: float
    output: float
    correlation: float | None = None

    @property
    def quality(self) -> float:
        """What the threshold is for."""
        return self.output if self.correlation is None else min(self.output, self.correlation)

    def to_json(self) -> dict[str, object]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class LayerFinding:
    """One layer. Lengths of means are in units of the root mean square of the distance of a head's keys from their
    mean. `mean`: of the mean key of the worst head. `drift`: of the way from there to the mean key of a third of the
    text, worst third and head. `keys`, `values`: all candidates, cheapest first; `k`, `v`: the proposed ones.
    """

    layer: int
    mean: float
    drift: float
    keys: list[Candidate]
    values: list[Candidate]
    k: Candidate
    v: Candidate

    def to_json(self) -> dict[str, object]:
        tried = {"keys": [k.to_json() for k in self.keys], "values": [v.to_json() for v in self.values]}
        return asdict(self) | {"k": self.k.codec, "v": self.v.codec} | tried


@dataclass(frozen=True)
class CalibrationReport:
    """`tokens`: measured on; `text`: their name. `to_json` is documented in docs/json.md."""

    model: str
    text: str
    tokens: int
    threshold: float
    proposal: str
    bits_per_value: float
    bytes_per_token: float
    layers: list[LayerFinding]

    def worst(self) -> list[tuple[Candidate, Candidate]]:
        """For each codec, as keys and as values, the least of each number over the layers."""
        keys = zip(*(layer.keys for layer in self.layers), strict=True)
        values = zip(*(layer.values for layer in self.layers), strict=True)
        return [(_worst(k), _worst(v)) for k, v in zip(keys, values, strict=True)]

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"layers": [layer.to_json() for layer in self.layers]}


def calibrate(
    loaded: Loaded,
    tokens: list[int],
    text: str,
    threshold: float = THRESHOLD,
    watch: Callable[[str], None] = lambda what: None,
) -> tuple[Calibration, CalibrationReport]:
    """Measure `tokens` of what is named `text`, and propose for each stream of each layer the cheapest codec whose
    quality is at least `threshold`; that of the model's own dense type is 1.

    `watch` hears what is being done. Raises `RequestError` for a threshold outside of 0 to 1 or too few tokens.
    """
    if not 0 < threshold <= 1:
        raise RequestError(f"a threshold lies between 0 and 1, got {threshold}")
    if len(tokens) < SHORTEST:
        raise RequestError(f"a calibration needs at least {SHORTEST} tokens; the text has {len(tokens):,}")
    specs = loaded.config.layer_specs()
    if any(spec.source is not None or spec.reading is not Reading.APART for spec in specs):
        raise ConfigError("kvist calibrate proposes codecs where every layer keeps keys and values, apart, of its own")
    watch("means")
    calibration = measure(loaded.model, tokens, model_digest(loaded.model))
    layouts = _candidates(loaded, calibration)
    findings: list[LayerFinding] = []

    def see(layer: int, seen: Vectors) -> None:
        watch(f"layer {layer} of {loaded.config.layers}")
        findings.append(_finding(layer, seen, layouts, calibration, threshold))

    observe(loaded.model, tokens, see)
    proposal = compact([(finding.k.codec, finding.v.codec) for finding in findings])
    calibration = replace(calibration, proposal=proposal)
    layout = plan_layout(
        loaded.config.layer_specs(), parse_choice(proposal), full=loaded.layout.full, calibration=calibration
    )
    return calibration, CalibrationReport(
        model=loaded.name,
        text=text,
        tokens=len(tokens),
        threshold=threshold,
        proposal=proposal,
        bits_per_value=layout.bits_per_value,
        bytes_per_token=layout.bytes_per_token,
        layers=findings,
    )


def _candidates(loaded: Loaded, calibration: Calibration) -> list[Layout]:
    """The whole cache under each codec that the kernels read and that is cheaper than the model's own type, and under
    that; cheapest first. Not under fp16: another text may hold numbers beyond its range."""
    specs, full = loaded.config.layer_specs(), loaded.layout.full
    own = plan_layout(specs, full, full=full)
    found = []
    for codec in CODECS.values():
        try:
            layout = plan_layout(specs, codec, full=full, calibration=calibration)
        except ConfigError:  # it cannot hold such heads
            continue
        read = all(stream.has_kernel for layer in layout.layers for stream in layer.streams)
        if read and codec is not FP16 and layout.bits_per_value < own.bits_per_value:
            found.append(layout)
    return [*sorted(found, key=lambda layout: layout.bits_per_value), own]


def _finding(
    layer: int, seen: Vectors, layouts: Sequence[Layout], calibration: Calibration, threshold: float
) -> LayerFinding:
    size = layouts[0].block_size
    keys, values = zip(*(layout.layers[layer].streams for layout in layouts), strict=True)
    exact_k, exact_v = seen.k.float(), seen.v.float()
    coded_k = [decoded(stream, seen.k, size) for stream in keys]
    coded_v = [decoded(stream, seen.v, size) for stream in values]
    scores = compare_scores(seen, coded_k, size)
    outputs = compare_outputs(seen, [(k, exact_v) for k in coded_k] + [(exact_k, v) for v in coded_v], size)
    of_k, of_v = outputs[: len(keys)], outputs[len(keys) :]
    k = [
        _candidate(stream, size, output.kept(), score.correlation())
        for stream, output, score in zip(keys, of_k, scores, strict=True)
    ]
    v = [_candidate(stream, size, output.kept()) for stream, output in zip(values, of_v, strict=True)]
    mean, drift = mean_and_drift(seen.k, calibration.streams[layer]["k"])
    return LayerFinding(layer, mean, drift, k, v, _cheapest(k, threshold), _cheapest(v, threshold))


def _candidate(stream: StreamLayout, block_size: int, kept: Tensor, correlation: Tensor | None = None) -> Candidate:
    bits = bits_per_value(stream.codec, stream.stream, block_size)
    worst = None if correlation is None else float(correlation.min())
    return Candidate(stream.codec.name, bits, float(kept.min()), worst)


def _worst(candidates: Sequence[Candidate]) -> Candidate:
    """Of one codec in several layers."""
    correlations = [found.correlation for found in candidates if found.correlation is not None]
    output = min(found.output for found in candidates)
    return replace(candidates[0], output=output, correlation=min(correlations, default=None))


def _cheapest(candidates: Sequence[Candidate], threshold: float) -> Candidate:
    """Of those that are good enough, and of equally cheap ones the best. The last candidate is the model's own type,
    which changes nothing."""
    enough = [found for found in candidates[:-1] if found.quality >= threshold]
    return min(enough, key=lambda found: (found.bits, -found.quality), default=candidates[-1])


def mean_and_drift(keys: Tensor, statistics: StreamStatistics) -> tuple[float, float]:
    """Of `keys` `[T, heads, D]`, as `LayerFinding` has them; 0 for heads whose keys do not vary."""
    deviation = statistics.energy.sum(-1).sqrt()
    unit = deviation.where(deviation > 0, float("inf"))
    thirds = [third.float().mean(0) for third in keys.tensor_split(_THIRDS)]
    drift = max(float(((third - statistics.mean).norm(dim=-1) / unit).max()) for third in thirds)
    return float((statistics.mean.norm(dim=-1) / unit).max()), drift


def compact(assignment: Sequence[tuple[str, str]]) -> str:
    """The codecs of keys and values, layer by layer, as `parse_choice` reads them: what most layers have, then the
    layers that have another one."""
    streams = {"k": [k for k, _ in assignment], "v": [v for _, v in assignment]}
    usual = {name: Counter(codecs).most_common(1)[0][0] for name, codecs in streams.items()}
    parts = [f"{name}={codec}" for name, codec in usual.items()]
    if usual["k"] == usual["v"]:
        parts = [usual["k"]]
    for name, codecs in streams.items():
        for codec, layers in groupby(range(len(codecs)), key=lambda layer, codecs=codecs: codecs[layer]):
            run = list(layers)
            if codec != usual[name]:
                where = f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}"
                parts.append(f"{where}:{name}={codec}")
    return ",".join(parts)
