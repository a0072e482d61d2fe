"""Which codec is enough for which layer: measured on the model's own vectors, stream by stream, cheapest first.

Two numbers speak for a codec in a layer, each of its worst head. The correlation of exact and coded scores: of what can
be known of keys alone, it tells best whether a model survives. And what attention's output keeps of its variance, which
weighs an error as the layer's own softmax does: where attention is sharp, keys need more than their scores show. Keys
have to hold both above the threshold, values the second; a stream that keys are made of and values are too, both. What
several layers read is measured with the queries of all of them.

The default of 0.99 leaves noise of about a hundredth of the signal. Mean KL divergence under it, beside uniform codecs
of about its size: the bundled model 0.0015 at 3.1 bits (turbo3 0.0009 at 3.25, turbo2.5 0.0026 at 2.75); the recall
model 0.00007 at 4.5 (int4-rot 0.00014 at 4.5, turbo4 0.00022 at 4.25); random weights whose keys share a mean of 2.5 to
3.5 deviations 0.0031 at 3.9 (turbo4 0.0025 at 4.25, turbo3.5 0.0070 at 3.75). At 0.98 the three take 2.75, 3.4 and 3.25
bits for 0.0020, 0.00021 and 0.011. (`kvist fidelity` on the last tenth of Tiny Shakespeare; `kvist eval recall`.)
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby

from torch import Tensor

from kvist.base.errors import ConfigError, RequestError
from kvist.cache.calibration import Calibration, StreamStatistics
from kvist.cache.choice import parse_choice
from kvist.cache.codecs import CODECS, FP16, bits_per_value
from kvist.cache.layout import BLOCK_SIZE, Layout, StreamLayout, plan_layout
from kvist.cache.spec import Reading, Role
from kvist.service.calibration import Vectors, measure, observe
from kvist.service.digest import model_digest
from kvist.service.loaded import Loaded
from kvist.service.vectors import compare_outputs, compare_scores, decoded

THRESHOLD = 0.99
SHORTEST = 2 * BLOCK_SIZE  # tokens: a block that is coded and one that sees it
_THIRDS = 3


@dataclass(frozen=True)
class Candidate:
    """One codec for one stream of one layer, at `bits` per value.

    Of the worst head of any layer that reads it: `output`, 1 less the mean squared error of attention's output,
    relative to its variance; for a stream that keys are made of also `correlation`, of exact and coded scores.
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
class StreamFinding:
    """One stream of one layer. `tried`: all candidates, cheapest first; `chosen`: the proposed one.

    Of a stream of keys, lengths of means in units of the root mean square of the distance of a head's keys from their
    mean. `mean`: of the mean key of the worst head. `drift`: of the way from there to the mean key of a third of the
    text, worst third and head.
    """

    tried: list[Candidate]
    chosen: Candidate
    mean: float | None = None
    drift: float | None = None

    def to_json(self) -> dict[str, object]:
        means = {} if self.mean is None else {"mean": self.mean, "drift": self.drift}
        return {"codec": self.chosen.codec, **means, "tried": [found.to_json() for found in self.tried]}


@dataclass(frozen=True)
class LayerFinding:
    """One layer that keeps streams of its own, by name. `readers`: other layers that read them."""

    layer: int
    readers: list[int]
    streams: dict[str, StreamFinding]

    def to_json(self) -> dict[str, object]:
        streams = {name: stream.to_json() for name, stream in self.streams.items()}
        return {"layer": self.layer, "readers": self.readers, "streams": streams}


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

    def worst(self) -> dict[str, list[Candidate]]:
        """For each stream and each codec, the least of each number over the layers."""
        tried: dict[str, list[list[Candidate]]] = {}
        for layer in self.layers:
            for name, stream in layer.streams.items():
                tried.setdefault(name, []).append(stream.tried)
        return {name: _worst(layers) for name, layers in tried.items()}

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
    watch("means")
    calibration = measure(loaded.model, tokens, model_digest(loaded.model, loaded.weights_digest()))
    layouts = _candidates(loaded, calibration)
    measured = _Measured(layouts, calibration, threshold)

    def see(layer: int, seen: Vectors) -> None:
        watch(f"layer {layer} of {loaded.config.layers}")
        measured.see(layer, seen)

    observe(loaded.model, tokens, see)
    findings = measured.findings()
    assignment: dict[str, dict[int, str]] = {}
    for finding in findings:
        for name, stream in finding.streams.items():
            assignment.setdefault(name, {})[finding.layer] = stream.chosen.codec
    proposal = compact(assignment)
    choice = parse_choice(proposal)
    calibration = replace(calibration, proposal=proposal, plugins=choice.plugins)
    layout = plan_layout(loaded.config.layer_specs(), choice, full=loaded.layout.full, calibration=calibration)
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


class _Measured:
    """What each of `layouts` does to each stream; `see` is called layer by layer."""

    def __init__(self, layouts: Sequence[Layout], calibration: Calibration, threshold: float) -> None:
        self._layouts = layouts
        self._calibration = calibration
        self._threshold = threshold
        self._specs = [layer.spec for layer in layouts[0].layers]
        # By layer and stream: the candidates, as each layer that reads it finds them, and of keys mean and drift.
        self._tried: dict[tuple[int, str], list[list[Candidate]]] = {}
        self._means: dict[tuple[int, str], tuple[float, float]] = {}

    def see(self, layer: int, seen: Vectors) -> None:
        source = self._specs[layer].source
        owner = layer if source is None else source
        for place, stream in enumerate(self._specs[owner].streams):
            key = owner, stream.name
            found = _candidates_of(seen, place, [layout.layers[owner].streams[place] for layout in self._layouts])
            self._tried.setdefault(key, []).append(found)
            if owner == layer and stream.role is Role.KEYS:
                self._means[key] = mean_and_drift(seen.streams[place], self._calibration.streams[layer][stream.name])

    def findings(self) -> list[LayerFinding]:
        """Of the layers that keep something, in order."""
        found = []
        for layer, spec in enumerate(self._specs):
            if spec.source is not None:
                continue
            readers = [number for number, other in enumerate(self._specs) if other.source == layer]
            streams = {stream.name: self._stream((layer, stream.name)) for stream in spec.streams}
            found.append(LayerFinding(layer, readers, streams))
        return found

    def _stream(self, key: tuple[int, str]) -> StreamFinding:
        tried = _worst(self._tried[key])
        return StreamFinding(tried, _cheapest(tried, self._threshold), *self._means.get(key, ()))


def _candidates_of(seen: Vectors, place: int, layouts: Sequence[StreamLayout]) -> list[Candidate]:
    """Each of `layouts` for the stream at `place` of one layer, beside its other streams as they are."""
    sides = []
    for layout in layouts:
        streams = [stream.float() for stream in seen.streams]
        streams[place] = decoded(layout, streams[place], BLOCK_SIZE)
        sides.append(seen.sides([stream[: len(streams[place])] for stream in streams]))
    outputs = [output.kept().min() for output in compare_outputs(seen, sides, BLOCK_SIZE)]
    correlations: list[float | None] = [None] * len(layouts)
    if place == 0 or seen.spec.reading is Reading.JOINED:  # keys are made of it
        found = compare_scores(seen, [keys for keys, _ in sides], BLOCK_SIZE)
        correlations = [float(of.correlation().min()) for of in found]
    return [
        Candidate(of.codec.name, bits_per_value(of.codec, of.stream, BLOCK_SIZE), float(output), correlation)
        for of, output, correlation in zip(layouts, outputs, correlations, strict=True)
    ]


def _worst(tried: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """For each codec the least of each number, and the most bits, over several lists of the same codecs."""
    found = []
    for same in zip(*tried, strict=True):
        correlations = [one.correlation for one in same if one.correlation is not None]
        bits, output = max(one.bits for one in same), min(one.output for one in same)
        found.append(Candidate(same[0].codec, bits, output, min(correlations, default=None)))
    return found


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


def compact(assignment: Mapping[str, Mapping[int, str]]) -> str:
    """The codecs of each stream by layer, of those that have it, as `parse_choice` reads them: what most layers have,
    then the layers that have another one."""
    usual = {name: Counter(codecs.values()).most_common(1)[0][0] for name, codecs in assignment.items()}
    same = len(set(usual.values())) == 1
    parts = [*dict.fromkeys(usual.values())] if same else [f"{name}={codec}" for name, codec in usual.items()]
    for name, codecs in assignment.items():
        for codec, layers in groupby(sorted(codecs), key=codecs.__getitem__):
            run = list(layers)
            if codec != usual[name]:
                where = f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}"
                parts.append(f"{where}:{name}={codec}")
    return ",".join(parts)
